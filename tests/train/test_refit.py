"""Fitted weights: nearer to the teacher's stream, never further, and as recorded in the student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from raystill.cluster.check.models import check_student
from raystill.config.run import RunConfig
from raystill.config.student import StudentConfig
from raystill.model.files import ModelFolder
from raystill.train.start import refit as refitting
from raystill.train.start.importance import judged_log_probs
from raystill.train.start.refit import USUAL_STRENGTH, refit, stream_after
from raystill.train.start.shape import choose_shape
from raystill.train.start.texts import Texts, packed_for

NUM_LAYERS, TEXTS = 5, 12
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def texts(count: int = TEXTS, seed: int = 0) -> Texts:
    draw = np.random.default_rng(seed)
    some = [draw.integers(3, 60, size=length) for length in draw.integers(4, 20, size=2 * count)]
    return Texts.of(some[:count], some[count:])


def teacher(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**SIZES, **more)).eval()


def kl(teacher_log_p: torch.Tensor, student: Any, given: Texts) -> float:
    with torch.no_grad():
        log_q = judged_log_probs(student, given)
    return float((teacher_log_p.exp() * (teacher_log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("tokens", "size"), [(30, 50), (50, 30), (40, 40)])
def test_the_fit_is_that_of_ridge_regression(tokens: int, size: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, size, generator=draw, dtype=torch.float64)
    y = torch.randn(tokens, 7, generator=draw, dtype=torch.float64)
    penalty = 0.3 * float(x.pow(2).sum(0).mean())
    rows = torch.cat([x, penalty**0.5 * torch.eye(size, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(size, 7)])).solution
    for few in (True, False):
        found = refitting._solver(x, y, few)(0.3)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [40, 400])
def test_the_last_fit_is_that_of_all_tokens(tokens: int) -> None:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(tokens, 60, generator=draw), torch.randn(tokens, 6, generator=draw)
    weights = torch.rand(tokens, generator=draw) + 0.5
    found, strength = refitting._ridge(x, y, weights, torch.arange(tokens) % 4 == 3)
    root = weights.double().sqrt()[:, None]
    wanted = refitting._solver(x.double() * root, y.double() * root, few=True)(strength)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_what_a_projection_can_do_is_found_and_noise_is_not_followed() -> None:
    draw = torch.Generator().manual_seed(2)
    x, change = torch.randn(400, 20, generator=draw), torch.randn(20, 6, generator=draw)
    aside = torch.arange(400) % 4 == 3
    weights = torch.rand(400, generator=draw) + 0.5
    found, strength = refitting._ridge(x, x @ change, weights, aside)
    assert strength == min(refitting.STRENGTHS)
    assert float((found - change).norm() / change.norm()) < 0.12
    _, strength = refitting._ridge(x, torch.randn(400, 6, generator=draw), weights, aside)
    assert strength >= 3
    _, strength = refitting._ridge(x, x @ change, weights, torch.zeros(400, dtype=torch.bool))
    assert strength == USUAL_STRENGTH


@pytest.mark.parametrize(
    "student",
    [
        {"layers": [0, 1, 4]},
        {"layers": [0, 2]},
        {"layer_stride": 2},
        {"ffn_size": 24},
        {"layers": [0, 1, 4], "hidden_size": 24, "num_heads": 2},
    ],
)
def test_a_fitted_student_starts_closer_on_texts_that_it_was_not_fitted_on(student: Any) -> None:
    judged, others = texts(48), texts(16, seed=5)
    log_p = judged_log_probs(teacher(), others).detach()
    plain = choose_shape(StudentConfig(**student), teacher(), judged).shape.cut(teacher())
    whole = teacher()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    chosen = choose_shape(StudentConfig(**student, refit=True), whole, judged)
    assert all(torch.equal(whole.state_dict()[name], before[name]) for name in before)
    assert chosen.fits and all(f.error_after < f.error_before for f in chosen.fits.values())
    fitted = chosen.shape.cut(whole).eval()
    assert kl(log_p, fitted, others) < 0.97 * kl(log_p, plain.eval(), others)


def test_the_student_computes_the_stream_that_was_told() -> None:
    judged, layers = texts(), [0, 2, 3]
    chosen = choose_shape(StudentConfig(layers=layers, refit=True), teacher(), judged)
    assert sorted(chosen.fits) == [0, 2]  # Before layers 1 and 4, which are left out.
    judged = packed_for(teacher(), judged)
    wanted = stream_after(teacher(), judged, [1, 4])
    found = stream_after(chosen.shape.cut(teacher()), judged, [0, 2])
    for number, end in ((0, 1), (2, 4)):
        weights = 1 / wanted[end].pow(2).mean(-1)
        error = ((found[number] - wanted[end]).pow(2).mean(-1) * weights).mean()
        assert chosen.fits[number].error_after == pytest.approx(float(error), rel=1e-4)


def test_weights_in_16_bits_are_fitted_and_left_in_16_bits() -> None:
    whole = teacher().to(torch.bfloat16)
    chosen = choose_shape(StudentConfig(layers=[0, 1, 4], refit=True), whole, texts())
    assert {fit.weight.dtype for fit in chosen.fits.values()} == {torch.float32}
    student = chosen.shape.cut(whole)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.bfloat16}


def test_a_layer_whose_output_goes_through_a_norm_keeps_its_weight_unless_a_fit_helps() -> None:
    whole = teacher(Gemma2ForCausalLM, Gemma2Config, query_pre_attn_scalar=8)
    chosen = choose_shape(StudentConfig(layers=[0, 1, 4], refit=True), whole, texts())
    assert all(fit.error_after < fit.error_before for fit in chosen.fits.values())


def test_a_stream_that_is_not_finite_fits_nothing() -> None:
    whole = teacher()
    targets = {0: torch.full((int(texts().present.sum()), 32), float("nan"))}
    assert refit(whole, texts(), targets) == {}
    targets = {0: torch.zeros(int(texts().present.sum()), 32)}
    assert refit(whole, texts(), targets) == {}


def test_a_teacher_without_the_projection_is_refused_by_check_and_by_the_run(
    tmp_path: Path,
) -> None:
    experts = teacher(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=60)).eval()
    for number, model in enumerate((experts, other)):
        layers = model.config.num_hidden_layers
        with pytest.raises(ValueError, match=r"linear modules named down_proj.*student.refit: fal"):
            choose_shape(StudentConfig(layers=[layers - 1], refit=True), model, texts())
            choose_shape(StudentConfig(layers=[0], refit=True), model, texts())
        place = tmp_path / str(number)
        model.save_pretrained(place)
        config = RunConfig.model_validate(
            {
                "teacher": {"model": str(place)},
                "student": {"layers": [0], "refit": True},
                "prompts": {"path": "unused"},
            }
        )
        folder = ModelFolder(str(place), place)
        problems = [str(problem) for problem in check_student(config, folder, folder)]
        assert any("student.refit: is true, but" in problem for problem in problems), problems


def test_a_student_of_its_own_has_nothing_to_fit_to() -> None:
    with pytest.raises(ValueError, match="num_heads and refit belong to init: from_teacher"):
        StudentConfig(init="model", model="x", refit=True)
