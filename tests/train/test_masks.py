"""Masks [S, S]: made for packed rows alone, also in a compiled graph; the states stay the same."""

import pytest
import torch
from transformers import masking_utils

from raystill.train.batch.batch import collate, dummy_micro_batch
from raystill.train.student.masks import ROWS
from raystill.train.student.module import StudentModule
from tests.support.tiny_student import VOCAB, make_row, tiny_module
from tests.train.test_families import teacher_of

ROWS_OF_BATCH = [make_row(i) for i in range(4)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_student_attends_by_the_causal_kernel_unless_rows_are_packed(packed):
    module, calls, graphs = tiny_module(), [], []

    def backend(graph, _):
        graphs.append(graph)
        nodes = [n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)]
        calls.extend((n.kwargs["attn_mask"] is not None, n.kwargs["is_causal"]) for n in nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module.hidden_states, backend=backend, dynamic=True)
    for rows in (ROWS_OF_BATCH, [make_row(i) for i in range(7)]):
        batch = collate(rows, "topk", VOCAB, packed=packed)
        assert torch.equal(compiled(batch), module.hidden_states(batch))
    assert len(graphs) == 1 and calls == [(packed, not packed)] * 2  # Of two layers.
    assert ROWS.packed is None


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Mixtral", "SmolLM3", "Qwen3Moe"])
def test_without_positions_the_states_are_bitwise_those_with_them(family):
    module = StudentModule(teacher_of(family, vocab_size=VOCAB)).eval()
    given = []
    decoder = module.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    for rows in (ROWS_OF_BATCH, ROWS_OF_BATCH[:1]):
        batch = collate(rows, "topk", VOCAB)
        with torch.no_grad():
            states = module.hidden_states(batch)
            expected = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids)
        expected = expected.last_hidden_state.flatten(0, 1)[batch.logit_index]
        assert torch.equal(states, expected)
        assert given[-2] is None and given[-1] is batch.position_ids
    packed = collate(ROWS_OF_BATCH, "topk", VOCAB, packed=True)
    module.hidden_states(packed)
    assert given[-1] is packed.position_ids
    module.hidden_states(dummy_micro_batch("topk", 5))
    assert given[-1] is None


def test_what_is_known_of_the_rows_ends_with_the_pass_and_others_are_looked_at():
    module = tiny_module()
    batch = collate(ROWS_OF_BATCH, "topk", VOCAB)
    module.model.model.norm.forward = None  # Calling it raises an error.
    with pytest.raises(TypeError):
        module.hidden_states(batch)
    assert ROWS.packed is None
    positions = collate(ROWS_OF_BATCH, "topk", VOCAB, packed=True).position_ids
    assert masking_utils.find_packed_sequence_indices(positions) is not None
