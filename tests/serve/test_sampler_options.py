"""What the sampler's deployment asks of Serve, and its engine's settings. Without Ray."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raystill.config.run import RunConfig
from raystill.datasets.stream.teacher_calls import SERVE
from raystill.run import Run
from raystill.serve.sampler import SamplerSettings, engine_settings
from raystill.serve.sampler_app import SamplerApp, deployment_options


def config(**policy: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": "t", "max_num_seqs": 12},
            "student": {"init": "from_teacher", "layers": [0]},
            "prompts": {"path": "p.jsonl"},
            "stream": {"order": "fixed", "group_rows": 4},
            "policy": {"student_share": 0.5, **policy},
        }
    )


def test_a_fixed_number_of_samplers_runs_on_the_teachers_cores_or_on_a_gpu_each() -> None:
    options = deployment_options(config(num_replicas=2), has_gpus=False)
    assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 0.0, "num_gpus": 0, "resources": {}}
    options = deployment_options(config(), has_gpus=True)
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1, "resources": {}}


def test_samplers_are_added_when_more_groups_wait_than_fill_the_slots_of_those_there_are() -> None:
    """Twelve slots are three groups of four; Serve rounds requests / target up."""
    bounds = {"min": 1, "max": 3, "upscale_delay_s": 2, "downscale_delay_s": 30}
    options = deployment_options(config(num_replicas=bounds), has_gpus=False)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (2.0, 30.0)
    for groups, replicas in ((3, 1), (4, 2), (6, 2), (8, 3), (9, 3)):
        assert -(-groups // scaling["target_ongoing_requests"]) == replicas
    assert "num_replicas" not in options


def test_samplers_go_to_the_nodes_that_are_named() -> None:
    asked = config(
        label_selector={"role": "sampler"},
        resources_per_replica={"slot": 0.5},
        accelerator_type="L4",
    )
    actor = deployment_options(asked, has_gpus=False)["ray_actor_options"]
    assert actor == {
        "num_cpus": 1.0,
        "num_gpus": 1,
        "resources": {"slot": 0.5},
        "accelerator_type": "L4",
        "label_selector": {"role": "sampler"},
    }


@pytest.mark.parametrize("limit_s", [None, 7.5])
def test_the_time_of_a_row_is_kept_by_its_engine(tmp_path: Path, limit_s: float | None) -> None:
    """A limit of the group would count what its rows wait for a place, or for one that is alone."""
    (tmp_path / "config.json").write_text("{}")
    written = config().model_dump(mode="json")
    written["teacher"]["request_timeout_s"] = limit_s
    asked = RunConfig.model_validate(written)
    settings = SamplerSettings(asked, None, "logs")
    made = engine_settings(settings, tmp_path, {"stop_token_ids": [1]}, None, 0)
    assert made.teacher.request_timeout_s == limit_s


@pytest.mark.parametrize(
    ("asked", "teacher", "student", "expected"),
    [(None, 2048, 8192, 2048), (512, 2048, 8192, 512), (None, None, 4096, 4096)],
)
def test_it_writes_no_more_than_its_teacher_reads(
    tmp_path: Path, asked: int | None, teacher: int | None, student: int, expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": student}))
    written = config().model_dump(mode="json")
    written["teacher"]["max_model_len"] = asked
    settings = SamplerSettings(RunConfig.model_validate(written), None, "logs", context=teacher)
    made = engine_settings(settings, tmp_path, {"stop_token_ids": [1]}, None, 0)
    assert made.teacher.max_model_len == expected


def test_a_sampler_and_a_teacher_are_not_described_to_serve_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve pickles by a list of modules that a process has once: one of two threads would fail."""
    free: list[bool] = []

    def asks(*arguments: Any, **options: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(SERVE.acquire, blocking=False).result())
        return SimpleNamespace(bind=lambda *_: None)

    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("ray.serve.deployment", asks)
    monkeypatch.setattr("ray.serve.run_many", asks)
    monkeypatch.setattr("ray.serve.RunTarget", lambda *_, **__: None)
    folder = SimpleNamespace(logs="logs")
    named = {"folder": folder, "sampler_app": "sampler-r", "by_teacher": dict}
    run = SimpleNamespace(config=config(), coordinator=None, **named)
    SamplerApp(cast(Run, run)).deploy()
    assert free == [False, False]
