"""What can be foreseen from a run file: a teacher without room, settings that undo each other."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raystill.cluster.check.ahead.effects import check_effects, effect_notices
from raystill.cluster.check.ahead.teacher_memory import check_replicas, replica_notices
from raystill.cluster.check.static import check_run_file
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder
from tests.support.end_to_end import TEACHER

ROOT = Path(__file__).resolve().parents[2]


class Rows:
    """Tables of which only their sizes matter."""

    def __init__(self, train: int, held_out: int) -> None:
        self.train = SimpleNamespace(num_rows=train)
        self.held_out = SimpleNamespace(num_rows=held_out)


def config(**sections: Any) -> RunConfig:
    own = {"teacher": {"model": "t"}, "prompts": {"path": "p"}, "student": {"layers": [0]}}
    for name, section in sections.items():
        own[name] = {**own.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(own)


def big_teacher(tmp_path: Path, dtype: str = "BF16", gigabytes: float = 138.5) -> ModelFolder:
    """A model of so many bytes, whose file has a hole where they would be."""
    width = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype]
    numbers = int(gigabytes * 1e9 / width)
    entry = {"dtype": dtype, "shape": [numbers], "data_offsets": [0, numbers * width]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + numbers * width)
    told: dict[str, Any] = {"num_attention_heads": 64, "num_hidden_layers": 80}
    if dtype.startswith("F8"):
        told["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    return ModelFolder("big", tmp_path)


def problems(teacher: ModelFolder, **settings: Any) -> list[str]:
    return [f"{p.where} {p.message}" for p in check_replicas(config(teacher=settings), teacher)]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accelerator_type": "H100", "tensor_parallel_size": 8}, None),
        ({"accelerator_type": "H100", "tensor_parallel_size": 2}, None),
        (
            {"accelerator_type": "H100"},
            "138 GB of weights on each of 1 GPUs",
        ),
        ({"accelerator_type": "L40S", "tensor_parallel_size": 2}, "set tensor_parallel_size: 4"),
        ({"accelerator_type": "L40S", "pipeline_parallel_size": 2}, "tensor_parallel_size: 2"),
        (
            {"accelerator_type": "H100", "tensor_parallel_size": 2, "kv_cache_gib": 10},
            "kv_cache_gib",
        ),
        ({"accelerator_type": "T4", "kv_cache_gib": 80}, "may use 0 GB of T4"),
        ({"accelerator_type": "T4", "kv_cache_gib": 13.4110451}, "may use 0 GB of T4"),
        (
            {"accelerator_type": "T4", "gpus_per_replica": 0.5, "gpu_memory_utilization": 0.5},
            "); set an accelerator_type",
        ),
        ({"accelerator_type": "L40S", "engine_args": {"cpu_offload_gb": 100}}, None),
        ({"accelerator_type": "H100", "tensor_parallel_size": 3}, "64 attention heads"),
        ({"tensor_parallel_size": 3}, "one of 1, 2, 4, 8, 16, 32, 64"),
        ({"accelerator_type": "H100", "gpus_per_replica": 0}, None),
        ({"accelerator_type": "H100", "quantization": "fp8"}, None),
        ({"accelerator_type": "H1000"}, None),
        ({"engine": "synthetic", "accelerator_type": "T4"}, None),
        ({}, None),
    ],
)
def test_a_teacher_that_no_gpu_has_room_for_is_refused(
    tmp_path: Path, settings: dict[str, Any], told: str | None
) -> None:
    found = problems(big_teacher(tmp_path), **settings)
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    ("dtype", "setting", "fits"),
    [("F32", "auto", True), ("F32", "float32", False), ("BF16", "float32", False)],
)
def test_weights_count_as_the_engine_holds_them(
    tmp_path: Path, dtype: str, setting: str, fits: bool
) -> None:
    teacher = big_teacher(tmp_path, dtype, 138.0 if dtype == "F32" else 69.0)
    assert bool(problems(teacher, accelerator_type="H100", dtype=setting)) != fits


def test_weights_that_are_quantised_count_as_they_are(tmp_path: Path) -> None:
    teacher = big_teacher(tmp_path, "F8_E4M3", 70.0)
    assert problems(teacher, accelerator_type="H100") == []
    assert problems(teacher, accelerator_type="L40S")


def test_a_gpu_that_nobody_knows_is_told_with_the_nearest_name() -> None:
    (told,) = replica_notices(config(teacher={"accelerator_type": "h1000"}))
    assert "'h1000', whose memory is not known" in told and "did you mean H100?" in told
    assert not list(replica_notices(config(teacher={"accelerator_type": "H100"})))


def test_a_truncated_answer_must_not_end_a_run_that_drops_them() -> None:
    (problem,) = check_effects(config(stream={"on_truncated": "drop"}))
    assert problem.where == "stream.on_truncated" and "max_drop_fraction" in problem.message
    assert not list(
        check_effects(config(stream={"on_truncated": "drop", "max_drop_fraction": 0.1}))
    )


def test_a_filter_that_rejects_every_answer_is_refused() -> None:
    sampling = {"teacher": {"sampling": {"max_tokens": 16}}}
    (problem,) = check_effects(config(filters=[{"length": {"min_tokens": 17}}], **sampling))
    assert problem.where == "filters.rules.0.length.min_tokens" and "is 17" in problem.message
    assert not list(check_effects(config(filters=[{"length": {"min_tokens": 16}}], **sampling)))


def test_answers_that_the_prompts_bring_have_any_length_and_end() -> None:
    sections = {
        "filters": [{"length": {"min_tokens": 5000}}],
        "stream": {"on_truncated": "drop"},
        "prompts": {"response_field": "answer"},
    }
    assert not list(check_effects(config(**sections)))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"training": {"warmup_steps": 4}}, "up to 1 of"),
        ({"training": {"warmup_steps": 8}}, "up to 0.5 of"),
        ({"training": {"warmup_steps": 3}}, None),
        ({"evaluation": {"every_steps": 4, "held_out_rows": 8}}, "before and after training alone"),
        ({"evaluation": {"every_steps": 3, "held_out_rows": 8}}, None),
        ({"objective": {"forward_kl": 1.0, "jsd_beta": 0.3}}, "jsd_beta has no effect"),
        ({"objective": {"forward_kl": 1.0, "skew_alpha": 0.3}}, "skew_alpha has no effect"),
        (
            {"objective": {"forward_kl": 1.0, "temperature_squared": True}},
            "temperature_squared has no effect at objective.temperature 1",
        ),
        ({"policy": {"max_staleness_steps": 3}}, "policy has no effect"),
        ({}, None),
    ],
)
def test_settings_without_effect_are_told(sections: dict[str, Any], told: str | None) -> None:
    rows: Any = Rows(32, 8)
    training = {"training": {"rows_per_step": 8, **sections.get("training", {})}}
    found = list(effect_notices(config(**{**sections, **training}), rows))
    assert len(found) == (told is not None), found
    assert told is None or told in found[0]


def test_an_evaluation_without_rows_is_told() -> None:
    rows: Any = Rows(32, 0)
    (told,) = effect_notices(config(evaluation={"every_steps": 2}), rows)
    assert "no held-out rows" in told


def test_the_check_tells_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [
        "stream.on_truncated=drop",
        "training.warmup_steps=100",
        f"teacher.model={TEACHER}",
    ]
    checked = check_run_file("configs/tiny.yaml", overrides)
    assert [problem.where for problem in checked.problems] == ["stream.on_truncated"]
    assert any("training.warmup_steps" in notice for notice in checked.notices)
