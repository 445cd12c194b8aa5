"""Layers by importance: layers that do nothing go first, and the teacher is whole again after."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.config.student import LayerChoice
from raystill.train.start import shape as shapes
from raystill.train.start.importance import (
    block_influence,
    choose_layers,
    judged_log_probs,
    only_layers,
)
from raystill.train.start.shape import Shape
from raystill.train.start.texts import Texts
from raystill.train.step.ranks import Ranks
from raystill.train.student.build import build_student
from raystill.train.worker.shape import float32_on_cpu, known_shape, run_shape
from tests.support.runs import run_of

NUM_LAYERS, IDLE = 6, (1, 4)
PROMPTS = [np.array([3, 4, 5]), np.array([6, 7, 8, 9, 10])]
ANSWERS = [np.array([11, 12, 13, 14]), np.array([15, 2])]


def teacher() -> LlamaForCausalLM:
    """Six layers, of which two add nothing to what goes through them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        for layer in IDLE:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts.of(PROMPTS, ANSWERS)


def test_answers_are_judged_from_the_position_before_their_first_token(texts: Texts) -> None:
    assert texts.input_ids.tolist() == [[3, 4, 5, 11, 12, 13, 14], [6, 7, 8, 9, 10, 15, 2]]
    assert texts.judged.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [0, 5], [1, 4], [1, 5]]
    short = Texts.of(PROMPTS[:1] + PROMPTS, [ANSWERS[1], *ANSWERS])
    assert short.present.sum(1).tolist() == [5, 7, 7]


@torch.no_grad()
def test_influence_is_the_cosine_between_what_goes_in_and_out(texts: Texts) -> None:
    model = teacher()
    influence = block_influence(model, texts)
    states = model(**texts.inputs(model), output_hidden_states=True)
    before, after = states.hidden_states[2], states.hidden_states[3]  # In and out of layer 2.
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)[texts.present]
    assert influence[2] == pytest.approx(1 - float(cosine.mean()), rel=1e-5)
    assert [i for i, score in enumerate(influence) if score < 1e-6] == list(IDLE)


@pytest.mark.parametrize("search", [False, True])
def test_layers_that_do_nothing_go_first(texts: Texts, search: bool) -> None:
    chosen = choose_layers(teacher(), texts, NUM_LAYERS - len(IDLE), search)
    assert chosen.layers == [0, 2, 3, 5]
    assert chosen.kl == pytest.approx(0.0, abs=1e-5)


@torch.no_grad()
def test_the_search_is_never_worse_than_influence_alone(texts: Texts) -> None:
    model = teacher()
    log_p = judged_log_probs(model, texts)
    for keep in range(1, NUM_LAYERS):
        plain = choose_layers(model, texts, keep, search=False)
        searched = choose_layers(model, texts, keep, search=True)
        assert len(searched.layers) == keep
        assert searched.layers == sorted(searched.layers)
        assert searched.kl <= plain.kl
        with only_layers(model, searched.layers):
            log_q = judged_log_probs(model, texts)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert searched.kl == pytest.approx(float(kl), rel=1e-5, abs=1e-7)


@torch.no_grad()
def test_the_teacher_is_whole_again_afterwards(texts: Texts) -> None:
    model = teacher()
    before, config = judged_log_probs(model, texts), model.config.to_dict()
    choose_layers(model, texts, 3)
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(NUM_LAYERS))
    assert torch.equal(judged_log_probs(model, texts), before)
    with pytest.raises(RuntimeError), only_layers(model, [0]):
        raise RuntimeError
    assert torch.equal(judged_log_probs(model, texts), before)


def run_config(folder: Path, refit: bool, **layers: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(folder), "sampling": {"max_tokens": 6, "temperature": 1.0}},
            "student": {"layers": layers, "refit": refit},
            "prompts": {"path": "unused"},
        }
    )


@pytest.mark.parametrize("refit", [False, True])
def test_a_run_chooses_once_and_keeps_the_same_layers_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    import pyarrow as pa

    place = tmp_path / "teacher"
    teacher().save_pretrained(place)
    keep = 3 if refit else 4  # Without the idle ones there is nothing to fit.
    config, folder = run_config(place, refit, keep=keep), RunFolder(str(tmp_path / "run")).ensure()
    prompts = pa.table({"prompt_ids": pa.array([[3, 4, 5], [6, 7], []], pa.list_(pa.int32()))})
    folder.write_table("prompts/train.parquet", prompts)
    run, cpu = run_of(config, folder, str(place)), torch.device("cpu")

    def build() -> torch.nn.Module:
        def choose(model: torch.nn.Module) -> Shape:
            return run_shape(run, str(place), Ranks(), cpu, model)

        return build_student(config, str(place), 0, choose)

    student = build()
    layers = json.loads(folder.read_text("layers.json"))["layers"]
    assert len(layers) == keep and set(layers) <= {0, 2, 3, 5}
    assert student.config.num_hidden_layers == keep
    assert not student.config.use_cache
    monkeypatch.setattr(shapes, "choose_layers", None)  # Another choice would fail.
    again = build()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    known = known_shape(run, Ranks())
    later = build_student(config, str(place), 0, known=known)  # Of the kept layers alone.
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name])
    if refit:
        folder.delete("refit.safetensors")
        with pytest.raises(RunError, match=r"refit.safetensors is not the file that layers.json"):
            build()


def test_a_cpu_judges_in_float32_and_gives_the_weights_back_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raystill.train.worker.shape.cpu_has_bfloat16", lambda: False)
    model = teacher().to(torch.bfloat16)
    model.model.norm.float()
    model.register_buffer("scale", torch.tensor(0.1, dtype=torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = model.lm_head.weight
    with float32_on_cpu(model, torch.device("cpu")):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    after = model.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.lm_head.weight is head
    with float32_on_cpu(model, torch.device("meta")):
        assert model.lm_head.weight.dtype == torch.bfloat16
    monkeypatch.setattr("raystill.train.worker.shape.cpu_has_bfloat16", lambda: True)
    with float32_on_cpu(model, torch.device("cpu")):
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_even_layers_include_the_first_and_the_last() -> None:
    assert LayerChoice(keep=3, by="even").evenly(7) == [0, 3, 6]
    assert LayerChoice(keep=1, by="even").evenly(7) == [0]
    assert LayerChoice(keep=7, by="even").evenly(7) == list(range(7))
    with pytest.raises(ValidationError):
        LayerChoice(keep=0)
