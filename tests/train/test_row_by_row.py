"""Rows attended to one by one on a CPU, and what they begin with computed once: the gradient is
that of padded rows.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, DogeConfig, LlamaConfig, MistralConfig, Qwen3Config
from transformers import AutoModelForCausalLM as Auto

from raystill.train.batch.batch import collate
from raystill.train.batch.beginnings import places_of
from raystill.train.evaluation.teacher_forced import evaluate
from raystill.train.step.micro_batches import share
from raystill.train.step.ranks import Ranks
from raystill.train.student import row_by_row
from raystill.train.student.module import StudentModule, has_attention_cap
from raystill.train.student.row_by_row import ROW_BY_ROW, attend, why_not_row_by_row
from raystill.train.student.sharding import place_student
from tests.support.tiny_student import (
    VOCAB,
    gradients_of_first_step,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    training_config,
)
from tests.train.test_family_table import FAMILIES, teacher_of
from tests.train.test_student_module import build

CPU = torch.device("cpu")
STAY_PADDED = ("StableLm",)
"""Families that are found to mix rows when it is tried: their layers do not hear of bounds."""
SHAPES = ("unlike", "template", "one prompt", "twice the same", "beginning of another")


def rows_of(shape):
    """Eight rows that have more and less in common."""
    rows = [make_row(number) for number in range(8)]
    template = np.arange(3, 15, dtype=np.int32)
    if shape != "unlike":
        for row in rows:
            row.prompt_ids = np.concatenate([template, row.prompt_ids])
    if shape == "one prompt":
        for row in rows[:5]:
            row.prompt_ids = rows[0].prompt_ids
    if shape == "twice the same":
        rows = [make_row(number // 2) for number in range(8)]
        for number, row in enumerate(rows):
            row.position = row.row = number
    if shape == "beginning of another":  # One row's whole input is the beginning of the next.
        first, second = rows[0], rows[1]
        text = np.concatenate([second.prompt_ids, second.response_ids])
        cut = len(text) - 2 - len(first.response_ids)
        first.prompt_ids = text[:cut]
        first.response_ids = text[cut:-2].copy()
    return rows


def padded_and_shared(rows, dtype=torch.float64, **settings):
    """Gradients and results of a first step, by padded SDPA and row by row."""
    found = []
    training = training_config(
        **{"param_dtype": "float64" if dtype == torch.float64 else "float32"} | settings
    )
    for attention in ("sdpa", "auto"):
        model = tiny_module(dtype).model
        own = training.model_copy(update={"attention": attention})
        student = place_student(model, own, CPU, 1)
        assert student.shared == (attention == "auto")
        kept = {"packed": student.packed, "shared": student.shared}
        found.append(gradients_of_first_step(student, make_step(student, own, **kept), rows))
    return found


@pytest.mark.parametrize("budget", [40, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_has_the_gradient_of_padded_rows(shape, budget):
    (padded, before), (shared, after) = padded_and_shared(
        rows_of(shape), tokens_per_micro_batch=budget
    )
    # Norms are in float32: what several rows begin with has one rounding instead of theirs.
    assert relative_error(shared, padded) < 1e-7
    assert after.loss == pytest.approx(before.loss, rel=1e-10)
    assert after.tokens == before.tokens and after.padding_fraction == 0


def test_layers_that_are_computed_again_know_where_rows_begin():
    """The backward pass runs a layer again, when the forward pass of the model has long ended."""
    rows = rows_of("one prompt")
    plain = padded_and_shared(rows)[0][0]
    again = padded_and_shared(rows, activation_checkpointing=True)[1][0]
    assert relative_error(again, plain) < 1e-7


def test_products_in_bfloat16_are_as_near_as_those_of_padded_rows():
    rows = rows_of("template")
    exact = padded_and_shared(rows)[0][0]
    (padded, _), (shared, _) = padded_and_shared(rows, torch.float32, compute_dtype="bfloat16")
    assert relative_error(shared.double(), exact) < 1.2 * relative_error(padded.double(), exact)


@pytest.mark.parametrize("by", ["entropy", "confidence"])
def test_weights_stay_within_the_row_of_their_token(by):
    """The token that predicts the first word of each answer stands at one place for all of them."""
    rows = rows_of("one prompt")
    apart, once = (
        share(collate(rows, "topk", VOCAB, "row", packed=True, shared=shared), by, None)
        for shared in (False, True)
    )
    assert once.padded_tokens < apart.padded_tokens
    assert len(set(once.logit_index.tolist())) < once.num_tokens
    assert torch.equal(once.weights, apart.weights)
    assert torch.equal(once.targets, apart.targets)


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_on_held_out_rows_are_those_of_padded_rows(shape):
    found = []
    for attention in ("sdpa", "auto"):
        training = training_config(param_dtype="float64", attention=attention)
        student = place_student(tiny_module(torch.float64).model, training, CPU, 1)
        settings = dict(tokens_budget=64, student_vocab=VOCAB, device=CPU, ranks=Ranks())
        found.append(evaluate(student, rows_of(shape), **settings))
    assert found[0]["num_tokens"] == found[1]["num_tokens"]
    for name, value in found[0].items():
        if isinstance(value, float):
            assert found[1][name] == pytest.approx(value, rel=1e-9), name


def test_a_row_of_another_length_is_attended_to_in_the_models_own_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(
        row_by_row,
        "scaled_dot_product_attention",
        lambda query, *_, **__: seen.append(query.dtype) or query,
    )
    for length, expected in ((512, torch.float32), (513, torch.bfloat16)):
        states = torch.randn(1, 2, length + 3, 4, dtype=torch.bfloat16)
        bounds = torch.tensor([0, 3, length + 3])
        out, _ = attend(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=bounds)
        assert set(seen) == {expected} and out.dtype == torch.bfloat16
        seen.clear()


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9)


@given(texts)
def test_two_rows_have_one_place_exactly_where_they_are_equal_so_far(rows):
    places = places_of([np.array(row, np.int32) for row in rows])
    held = {}
    for row, mine in zip(rows, places, strict=True):
        assert len(mine) == len(row)
        for end, place in enumerate(mine.tolist(), 1):
            assert held.setdefault(place, tuple(row[:end])) == tuple(row[:end])
    assert sorted(held) == list(range(len(held)))
    assert len(set(held.values())) == len(held)


def small(config, **more):
    return Auto.from_config(
        config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, **more,
        )
    )  # fmt: skip


def test_layers_that_do_not_see_the_whole_row_keep_sdpa():
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    for model in (small(MistralConfig, sliding_window=4), small(Qwen3Config, **windows)):
        assert "do not attend to the whole row" in why_not_row_by_row(model, CPU, False)
        student = place_student(model, training_config(), CPU, 1)
        assert not student.packed and not student.shared
    for model in (small(MistralConfig, sliding_window=None), small(Qwen3Config)):
        assert place_student(model, training_config(), CPU, 1).shared


def test_a_compiled_a_capped_and_a_gpu_student_keep_theirs():
    model = small(LlamaConfig)
    assert why_not_row_by_row(model, CPU, True) and why_not_row_by_row(model, CPU, False) is None
    assert why_not_row_by_row(model, torch.device("cuda"), False)
    capped = StudentModule(build("gemma2")).model
    assert "does not attend by SDPA" in why_not_row_by_row(capped, CPU, False)
    assert not place_student(model, training_config(compile=True), CPU, 1).packed


def test_a_model_whose_layers_do_not_say_where_rows_begin_stays_padded(monkeypatch, caplog):
    """Its attention is called without the bounds, and no mask is made either: a trial tells."""

    def deaf(*given, cu_seq_lens_q=None, row_places=None, row_firsts=None, **more):
        return attend(*given, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, ROW_BY_ROW, deaf)
    student = place_student(small(LlamaConfig), training_config(), CPU, 1)
    assert not student.packed and not student.shared
    assert "rows are padded" in caplog.text
    rows = [make_row(number) for number in range(4)]
    settings = dict(tokens_budget=64, student_vocab=VOCAB, device=CPU, ranks=Ranks())
    found = evaluate(student, rows, **settings)
    plain = place_student(student.model, training_config(attention="sdpa"), CPU, 1)
    assert evaluate(plain, rows, **settings) == pytest.approx(found)


def test_a_mask_of_the_layers_own_is_never_left_out():
    """Doge makes one of the values: with several rows in a sequence nobody would apply it."""
    torch.manual_seed(0)
    model = small(DogeConfig, keep_window_size=4).float()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
    found = []
    for attention in ("sdpa", "auto"):
        training = training_config(attention=attention)
        student = place_student(copy.deepcopy(model), training, CPU, 1)
        step = make_step(student, training, packed=student.packed, shared=student.shared)
        found.append(gradients_of_first_step(student, step, rows_of("template")))
        assert not student.packed
    (plain, before), (ours, after) = found
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert relative_error(ours, plain) < 1e-6
    with pytest.raises(ValueError, match=r"true, but .* makes a mask of its own"):
        place_student(model, training_config(packing=True, attention="auto"), CPU, 1)
    states, mask = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 5)
    one = attend(torch.nn.Module(), *[states] * 3, mask, cu_seq_lens_q=torch.tensor([0, 5]))[0]
    wanted = torch.nn.functional.scaled_dot_product_attention(*[states] * 3, mask)
    assert torch.allclose(one, wanted.transpose(1, 2))


@pytest.mark.parametrize("family", [f for f in FAMILIES if "vision" not in f])
def test_every_family_that_takes_it_has_the_gradient_of_padded_rows(family):
    """Or says by itself that it does not: windows, chunks, states, positions of its own."""
    found = []
    for attention in ("sdpa", "auto"):
        model = teacher_of(family).float()
        if has_attention_cap(model) or model.config._attn_implementation != "sdpa":
            attention = "auto"
        training = training_config(attention=attention)
        student = place_student(model, training, CPU, 1)
        kept = {"packed": student.packed, "shared": student.shared}
        step = make_step(student, training, **kept)
        found.append((kept, *gradients_of_first_step(student, step, rows_of("template"))))
    (_, plain, before), (kept, ours, after) = found
    fits = why_not_row_by_row(StudentModule(teacher_of(family)).model, CPU, False) is None
    assert kept["shared"] is (fits and family not in STAY_PADDED)
    assert after.loss == pytest.approx(before.loss, rel=1e-5)
    assert relative_error(ours, plain) < 1e-4
