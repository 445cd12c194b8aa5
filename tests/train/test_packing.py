"""Packed sequences: no row sees another, and loss and gradient are those of padded rows."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raystill.config.training import TrainingConfig
from raystill.train.batch.batch import collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.step.micro_batches import DeviceCopies, share
from raystill.train.student import attention
from raystill.train.student.attention import use_attention, use_packing, why_not
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import place_student
from tests.support.tiny_student import (
    VOCAB,
    gradients_of_first_step,
    make_hidden_row,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    tiny_teacher,
    training_config,
)
from tests.train.test_student_module import build

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = ("tied", "untied", "gemma2", "cohere", "granite")
NUM_ROWS = 9


def rows_of(lengths):
    """Rows of so many inputs, a prompt of one token each."""
    ids = [np.full(n, 5, np.int32) for n in lengths]
    return [Row(i, i, each[:1], each) for i, each in enumerate(ids)]


def test_rows_stand_one_behind_the_other_with_positions_of_their_own():
    first = Row(0, 0, np.int32([11, 12]), np.int32([13, 14]))
    second = Row(1, 1, np.int32([21]), np.int32([22, 23]))
    batch = collate([first, second], "text", VOCAB, packed=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.logit_index.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [13, 14, 22, 23]
    assert batch.row_starts.tolist() == [0, 3, 5]
    assert (batch.longest, batch.input_tokens, batch.padded_tokens) == (3, 5, 5)


def test_the_cut_fills_each_sequence_and_takes_every_row_once():
    rows = rows_of([7, 3, 5, 5, 2, 9, 4, 12, 1])
    groups = cut_micro_batches(rows, 10, packed=True)
    lengths = [[row.num_inputs for row in group] for group in groups]
    assert lengths == [[12], [9, 1], [7, 3], [5, 5], [4, 2]]  # 12 is over the budget, so alone.
    assert groups == cut_micro_batches(rows[::-1], 10, packed=True)
    assert len(groups) < len(cut_micro_batches(rows, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_step_has_the_gradient_of_a_padded_one(kind):
    """In windows of 4 tokens as well (Gemma 2), which end inside rows and must not cross them."""
    results = {}
    for packed in (False, True):
        model = build(kind)
        if kind == "gemma2":
            model.config.sliding_window = 4
            for layer in model.model.layers:
                layer.self_attn.sliding_window = 4
        module = StudentModule(model).train()
        step = make_step(module, packed=packed)
        rows = [make_row(i) for i in range(NUM_ROWS)]
        results[packed] = gradients_of_first_step(module, step, rows)
    (padded, of_padded), (packed, of_packed) = results[False], results[True]
    exact = 1e-7 if kind in ("gemma2", "cohere") else 1e-10  # Their norms are in float32.
    assert relative_error(packed, padded) < exact
    assert of_packed.loss == pytest.approx(of_padded.loss, rel=exact)
    assert of_padded.padding_fraction > 0 == of_packed.padding_fraction


def test_packed_hidden_states_have_the_gradient_of_padded_ones():
    results = []
    for packed in (False, True):
        module = tiny_module(torch.float64)
        kwargs = dict(signal_kind="hidden", teacher=tiny_teacher(torch.float64), packed=packed)
        rows = [make_hidden_row(i) for i in range(NUM_ROWS)]
        results.append(gradients_of_first_step(module, make_step(module, **kwargs), rows)[0])
    assert relative_error(results[1], results[0]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_sees_another(kind):
    """Another text in one row leaves the other's hidden states bit for bit as they were."""
    student = StudentModule(build(kind))
    for changed, kept in ((0, 1), (1, 0)):
        rows = [make_row(1, tokens=9), make_row(2, tokens=12)]
        before = collate(rows, "text", VOCAB, packed=True)
        of_kept = (before.logit_index >= before.row_starts[1]) == bool(kept)
        rows[changed].response_ids = rows[changed].response_ids[::-1].copy()
        after = collate(rows, "text", VOCAB, packed=True)
        assert not torch.equal(before.input_ids, after.input_ids)
        first, second = (student.hidden_states(batch)[of_kept] for batch in (before, after))
        assert torch.equal(first, second)


def test_token_weights_are_shared_within_each_row():
    rows = [make_row(i) for i in range(4)]
    padded, packed = (
        share(collate(rows, "topk", VOCAB, packed=how), "entropy", None).weights
        for how in (False, True)
    )
    assert torch.equal(padded, packed)
    assert len(set(padded.tolist())) > 4


def varlen(module, query, key, value, mask, **kwargs):
    """What FlashAttention does with the bounds that it is given: each row by itself, causal."""
    assert mask is None
    bounds = kwargs.pop("cu_seq_lens_q").tolist()
    assert bounds == kwargs.pop("cu_seq_lens_k").tolist()
    widths = [end - start for start, end in pairwise(bounds)]
    assert max(widths) == kwargs.pop("max_length_q") == kwargs.pop("max_length_k")
    kwargs["position_ids"] = None
    parts = [
        sdpa_attention_forward(module, *each, None, is_causal=True, **kwargs)[0]
        for each in zip(*(t.split(widths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


@pytest.mark.parametrize("kind", ["tied", "cohere", "granite"])
def test_flash_attention_is_told_where_rows_begin(kind):
    AttentionInterface.register("flash_reference", varlen)
    results = []
    for name in ("sdpa", "flash_reference"):
        model = build(kind)
        module = StudentModule(model).train()
        model.config._attn_implementation = name
        rows = [make_row(i) for i in range(NUM_ROWS)]
        results.append(gradients_of_first_step(module, make_step(module, packed=True), rows)[0])
    assert relative_error(results[1], results[0]) < 1e-10


def test_a_model_that_lets_packed_rows_see_each_other_stays_padded(caplog):
    def unmasked(module, query, key, value, mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("leaking_flash", unmasked)
    student = tiny_module().train()
    assert use_packing(True, student, "sdpa", CPU)
    assert student.training
    student.model.config._attn_implementation = "leaking_flash"
    with pytest.raises(ValueError, match="with the row before it; set"):
        use_packing(True, student, "leaking_flash", CPU)
    assert not use_packing("auto", student, "leaking_flash", CPU)
    assert "rows are padded" in caplog.text


def test_packing_follows_the_kernel_and_the_layers():
    student = StudentModule(build("tied"))
    assert use_packing("auto", student, "flash_attention_2", CPU)
    assert not use_packing("auto", student, "sdpa", CPU)
    assert use_packing(True, student, "sdpa", CPU)
    assert not use_packing(False, student, "flash_attention_2", CPU)
    student.model.config.layer_types = ["chunked_attention"]
    assert not use_packing("auto", student, "flash_attention_2", CPU)
    with pytest.raises(ValueError, match="layers of type chunked_attention"):
        use_packing(True, student, "flash_attention_2", CPU)


def test_attention_follows_device_precision_and_model():
    model, capped = build("tied"), StudentModule(build("gemma2")).model
    assert capped.config.attn_logit_softcapping is not None
    assert use_attention("auto", model, CPU, torch.float32, compiled=True) == "sdpa"
    assert use_attention("auto", model, GPU, torch.float32) == "sdpa"
    assert use_attention("auto", capped, CPU, torch.float32) == "eager"
    with pytest.raises(ValueError, match="leaves out the cap that Gemma2ForCausalLM"):
        use_attention("sdpa", capped, CPU, torch.float32)
    with pytest.raises(ValueError, match="it needs a GPU and bfloat16; set"):
        use_attention("flash_attention_2", model, CPU, torch.bfloat16)
    assert use_attention("eager", model, CPU, torch.float32) == "eager"
    with pytest.raises(ValidationError, match="attention is flash_attention_2, which computes in"):
        TrainingConfig(attention="flash_attention_2", compute_dtype="float32")


def test_flash_attention_is_taken_where_it_can_run(monkeypatch):
    """By stand-ins for the GPU's capability and for the packages."""

    def installed(**functions):
        for module in ("flash_attn", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, module, functions.get(module))

    def on(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    kernel = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, softcap=0.0: None)
    older = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: None)
    model, capped = build("tied"), build("gemma2")

    def first(model):
        return attention._fastest(model, GPU, torch.bfloat16)

    installed(flash_attn=kernel, flash_attn_interface=kernel)
    for capability, expected in (((9, 0), "3"), ((8, 9), "2"), ((12, 0), "2"), ((7, 5), None)):
        on(*capability)
        assert first(model) == (expected and f"flash_attention_{expected}"), capability
    on(9, 0)
    model.config.attention_dropout = 0.1
    assert first(model) == "flash_attention_2"
    installed(flash_attn=older)
    assert first(model) == "flash_attention_2" and first(capped) is None
    assert "leaves out the cap" in why_not("flash_attention_2", capped, GPU, torch.bfloat16)
    installed()
    reason = why_not("flash_attention_2", model, GPU, torch.bfloat16)
    assert "flash_attn cannot be imported on this worker" in reason
    installed(flash_attn=kernel)
    model._compatible_flash_implementations = ["flash_attention_4"]
    assert first(model) is None


def test_a_capped_model_is_trained_with_its_cap():
    """SDPA would leave the cap out: another model than the one that is exported and served."""

    def placed():
        return place_student(build("gemma2"), training_config(param_dtype="float64"), CPU, 1)

    batch = collate([make_row(1)], "text", VOCAB)
    capped, uncapped = placed(), placed()
    for layer in uncapped.model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    capped.model.model.layers[0].self_attn.attn_logit_softcapping = 1e-3
    assert not torch.allclose(capped.logits(batch), uncapped.logits(batch), rtol=1e-6)


def test_a_student_is_packed_when_it_is_asked_for():
    training = training_config(packing=True)
    plain = training_config(attention="sdpa")
    assert place_student(build("tied").float(), training, CPU, 1).packed
    assert not place_student(build("tied").float(), plain, CPU, 1).packed


def test_every_tensor_goes_to_the_device():
    """By a stand-in for the copy, since there is one device here: none is left behind."""
    batch = collate([make_row(1), make_row(1)], "topk", VOCAB, packed=True, shared=True)
    copies = DeviceCopies(CPU)
    moved = copies.copy(batch)
    assert torch.equal(moved.input_ids, batch.input_ids)
    meta = batch.mapped(lambda tensor: tensor.to("meta"))
    tensors = [v for v in vars(meta).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 8  # Two more are the partition's.
    assert all(t.is_meta for t in (*tensors, meta.partition.ids, meta.partition.log_p))
    assert meta.longest == batch.longest
