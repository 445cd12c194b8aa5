"""A narrower student: the parts that do nothing go first, and what is left computes what it did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.config.student import StudentConfig
from raystill.model.sizes import EVEN_TYPES, PLAIN_TYPES, Sizes
from raystill.train.start.rms import factor, offset_of, unit_shares
from raystill.train.start.shape import choose_shape
from raystill.train.start.texts import Texts
from raystill.train.start.width import Widths, choose_widths, narrow
from raystill.train.step.ranks import Ranks
from raystill.train.student.build import build_student
from raystill.train.worker.shape import known_shape, run_shape
from tests.support.runs import run_of

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "tied llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # Biases of queries, keys and values.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),  # Norms of queries and keys.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"query_pre_attn_scalar": 8}),  # Four norms.
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),  # Norms of all queries, or keys, together.
}
EACH_HEAD_ALONE = [family for family in FAMILIES if family != "olmo2"]
TEXTS = Texts.of(
    [np.array([3, 4, 5]), np.array([6, 7, 8, 9, 10])],
    [np.array([11, 12, 13, 14]), np.array([15, 2])],
)


def model_of(family: str) -> Any:
    config, kind, more = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config(**SIZES, initializer_range=0.3, **more)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**TEXTS.inputs(model)).logits[TEXTS.present]


@torch.no_grad()
def silence(model: Any, ffn: list[int], heads: list[int]) -> None:
    """These neurons and query heads add nothing any more."""
    size = Sizes.of(model.config.to_dict()).head_size
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[ffn] = 0
        columns = [head * size + i for head in heads for i in range(size)]
        layer.self_attn.o_proj.weight[:, columns] = 0


@pytest.mark.parametrize("family", EACH_HEAD_ALONE)
def test_without_what_adds_nothing_the_model_computes_the_same(family: str) -> None:
    model = model_of(family)
    ffn, heads = [0, 7, 31], [1, 2]
    silence(model, ffn, heads)
    expected = logits(model)
    widths = choose_widths(model, TEXTS, ffn=48 - len(ffn))
    assert widths.ffn == [[i for i in range(48) if i not in ffn]] * 3
    # One head of each group: which one is free to choose, so it is given here.
    smaller = narrow(model, Widths(ffn=widths.ffn, heads=[[0, 3]] * 3))
    assert torch.allclose(logits(smaller), expected, atol=1e-5)
    assert logits(model).equal(expected), "the teacher is as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_is_saved_and_loads_as_what_it_is(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    widths = choose_widths(model, TEXTS, hidden=24, ffn=20, heads=2)
    smaller: Any = narrow(model, widths)
    sizes = Sizes.of(smaller.config.to_dict())
    assert sizes == Sizes(hidden=24, ffn=20, heads=2, kv_heads=2, head_size=8)
    whole = Sizes.of(model.config.to_dict())
    assert whole.narrowed(24, 20, 2) == sizes
    for name, tensor in model.state_dict().items():
        assert whole.reshaped(name, tensor.shape, sizes) == smaller.state_dict()[name].shape, name
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(smaller))
    tied = smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    loss = smaller.train()(input_ids=TEXTS.input_ids, labels=TEXTS.input_ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in smaller.parameters())


def test_each_weight_has_the_rows_and_columns_that_were_kept() -> None:
    model = model_of("qwen2")
    hidden, ffn, heads = list(range(0, 32, 2)), [[1, 5]] * 3, [[2, 3]] * 3
    smaller: Any = narrow(model, Widths(hidden, ffn, heads))
    old, new = model.model.layers[1], smaller.model.layers[1]
    rows = torch.arange(16, 32)  # Of heads 2 and 3.
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[rows][:, hidden])
    assert torch.equal(new.self_attn.q_proj.bias, old.self_attn.q_proj.bias[rows])
    kv = torch.arange(8, 16)  # Both heads share key-value head 1.
    assert torch.equal(new.self_attn.v_proj.weight, old.self_attn.v_proj.weight[kv][:, hidden])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[hidden][:, rows])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[hidden][:, [1, 5]])
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, hidden])
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[hidden])


def test_a_norm_of_all_queries_goes_with_their_heads_and_not_with_the_hidden_units() -> None:
    model = model_of("olmo2")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.copy_(torch.arange(len(norm.weight)))  # As many queries as units: 32.
    for heads, keys in (([[0, 2], [1, 2], [1, 3]], [0, 1]), ([[2, 3]] * 3, [1])):
        smaller: Any = narrow(model, Widths(hidden=list(range(24)), heads=heads))
        for layer, kept in zip(smaller.model.layers, heads, strict=True):
            rows = [[8 * head + i for head in some for i in range(8)] for some in (kept, keys)]
            assert layer.self_attn.q_norm.weight.tolist() == rows[0]
            assert layer.self_attn.k_norm.weight.tolist() == rows[1]


def test_queries_are_no_hidden_units_where_these_are_chosen() -> None:
    model = model_of("olmo2")
    expected = choose_widths(model, TEXTS, hidden=24).hidden
    # It changes the queries' sizes, and not what attention computes of them.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight[:] *= 100
            layer.self_attn.k_norm.weight[:] /= 100
    assert choose_widths(model, TEXTS, hidden=24).hidden == expected


@pytest.mark.parametrize("model_type", sorted(PLAIN_TYPES | EVEN_TYPES))
def test_which_architectures_take_a_multiple_of_the_heads_only(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    sizes = {**SIZES, "hidden_size": 30}
    try:
        CONFIG_MAPPING[model_type](**sizes)
    except Exception as error:  # Each has validators of its own.
        assert "multiple" in str(error)
        refused = True
    else:
        refused = False
    assert refused == (model_type in EVEN_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_units_that_are_always_zero_the_model_computes_the_same(family: str) -> None:
    model = model_of(family)
    zero = [0, 3, 9, 30]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, zero] = 0
        model.lm_head.weight[:, zero] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[zero] = 0
            layer.mlp.down_proj.weight[zero] = 0
    widths = choose_widths(model, TEXTS, hidden=28)
    assert widths.hidden == [i for i in range(32) if i not in zero]
    smaller: Any = narrow(model, widths)
    assert torch.allclose(logits(smaller), logits(model), atol=1e-4)
    assert (logits(narrow(model, replace(widths, norms=None))) - logits(model)).abs().max() > 1e-2


def test_norms_are_scaled_by_what_they_pass_on_and_only_with_fewer_units() -> None:
    """On one token of squares 9 and 16 + 2 * 0: all units' mean is 25/4, of the first two 25/2."""
    states, count = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.ones(1, 1)
    assert factor(unit_shares(states, count), [0, 1]) == pytest.approx(2**0.5)
    assert choose_widths(model_of("llama"), TEXTS, ffn=20).norms is None
    names = (choose_widths(model_of("gemma2"), TEXTS, hidden=24).norms or {}).keys()
    assert len(names) == 4 * 3 + 1 and "model.norm" in names
    queries = (choose_widths(model_of("olmo2"), TEXTS, hidden=24).norms or {}).keys()
    assert len(queries) == 2 * 3 + 1 and not any("q_norm" in name for name in queries)
    gemma = model_of("gemma2").model.norm
    assert (offset_of(gemma), offset_of(model_of("qwen3").model.norm)) == (1.0, 0.0)
    assert offset_of(torch.nn.LayerNorm(32)) is None


def test_heads_go_one_of_each_group_or_in_whole_groups() -> None:
    model = model_of("llama")
    for count, per_group in ((2, 1), (4, 2)):
        for heads in choose_widths(model, TEXTS, heads=count).heads or []:
            assert [sum(h // 2 == g for h in heads) for g in (0, 1)] == [per_group] * 2
    config = LlamaConfig(
        **{**SIZES, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    )
    for heads in choose_widths(LlamaForCausalLM(config).eval(), TEXTS, heads=4).heads or []:
        assert len(heads) == 4
        assert len({h // 2 for h in heads}) == 2
    with pytest.raises(ValueError, match=r"student\.num_heads: is 3.*2, 4"):
        choose_widths(model, TEXTS, heads=3)


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ({"hidden": 33}, r"student\.hidden_size: is 33, but the teacher has 32"),
        ({"ffn": 64}, r"student\.ffn_size: is 64, but the teacher has 48"),
        ({"heads": 8}, r"student\.num_heads: is 8"),
    ],
)
def test_more_than_the_teacher_has_is_refused(widths: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_widths(model_of("llama"), TEXTS, **widths)


def test_a_model_with_other_parts_is_refused_by_the_name_of_the_part() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)).eval()
    with pytest.raises(ValueError, match="has no num_attention_heads"):
        choose_widths(gpt2, TEXTS, ffn=16)
    phi = PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 4})).eval()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.dense\.weight has no part"):
        narrow(phi, Widths(hidden=list(range(16))))


def test_sizes_that_the_architecture_does_not_take_together_are_refused_with_its_reason() -> None:
    model = model_of("llama")
    widths = choose_widths(model, TEXTS, hidden=30, heads=4)
    with pytest.raises(ValueError, match=r"LlamaConfig does not take .*multiple of the number of"):
        narrow(model, widths)


def test_a_run_cuts_layers_and_widths_and_keeps_them_at_every_start(tmp_path: Path) -> None:
    import pyarrow as pa

    place = tmp_path / "teacher"
    model_of("llama").save_pretrained(place)
    config = RunConfig.model_validate(
        {
            "teacher": {"model": str(place), "sampling": {"max_tokens": 6, "temperature": 1.0}},
            "student": {"layers": [0, 2], "ffn_size": 16, "hidden_size": 24, "num_heads": 2},
            "prompts": {"path": "unused"},
        }
    )
    folder = RunFolder(str(tmp_path / "run")).ensure()
    prompts = pa.table({"prompt_ids": pa.array([[3, 4, 5], [6, 7]], pa.list_(pa.int32()))})
    folder.write_table("prompts/train.parquet", prompts)
    run, cpu = run_of(config, folder, str(place)), torch.device("cpu")
    students = [
        build_student(config, str(place), 0, lambda m: run_shape(run, str(place), Ranks(), cpu, m))
        for _ in range(2)
    ]
    students.append(build_student(config, str(place), 0, known=known_shape(run, Ranks())))
    found: Any = students[0].config
    assert (found.num_hidden_layers, found.hidden_size, found.intermediate_size) == (2, 24, 16)
    for name, tensor in students[0].state_dict().items():
        assert all(torch.equal(tensor, one.state_dict()[name]) for one in students[1:])


def test_all_layers_are_kept_where_only_a_width_is_named() -> None:
    student = StudentConfig(ffn_size=16)
    chosen = choose_shape(student, model_of("llama"), TEXTS)
    assert (chosen.shape.layers, chosen.layers) == ([0, 1, 2], None)
    with pytest.raises(ValidationError, match="belong to init: from_teacher"):
        StudentConfig(init="model", model="x", ffn_size=16)
    with pytest.raises(ValidationError, match="or a width"):
        StudentConfig()
