"""Waits for resources: told once, with what is asked for and what there is, and ended in time."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raystill.base.errors import RunError
from raystill.cluster.job import waiting
from raystill.cluster.job.waiting import TELL_AFTER_S, Wait, Waits, has_worker_group
from raystill.config.run import RunConfig
from raystill.model.on_node import ModelSource
from raystill.serve.deploy import TeacherApp


def there() -> str:
    return "the cluster has CPU: 4, of which free CPU: 1"


def test_a_wait_is_told_once_after_half_a_minute_and_ends_at_its_limit() -> None:
    wait = Wait("2 student workers of CPU: 3 each", "training.startup_timeout_s", 60.0)
    assert wait.look(True, 100.0, there) is None
    assert wait.look(True, 100.0 + TELL_AFTER_S - 1, there) is None
    assert wait.look(True, 131.0, there) == (
        "waiting for 2 student workers of CPU: 3 each, 0:31 so far, at most 1:00 "
        "(training.startup_timeout_s); the cluster has CPU: 4, of which free CPU: 1"
    )
    assert wait.look(True, 140.0, there) is None
    with pytest.raises(RunError, match=r"had no place for 1:00, which is training.*free CPU: 1"):
        wait.look(True, 160.0, there)


def test_a_wait_that_was_over_begins_anew() -> None:
    wait = Wait("a worker", "training.startup_timeout_s", 60.0)
    wait.look(True, 0.0, there)
    assert wait.look(True, 40.0, there)
    assert wait.look(False, 50.0, there) is None
    assert wait.look(True, 70.0, there) is None
    assert wait.look(True, 101.0, there)


@pytest.mark.ray
def test_workers_without_a_place_are_noticed_and_those_with_one_are_left_alone(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    class Holder:
        def ready(self) -> None: ...

    config = RunConfig.model_validate(
        {
            "teacher": {"model": "t"},
            "student": {"layers": [0]},
            "prompts": {"path": "p"},
            "training": {"cpus_per_worker": 3, "startup_timeout_s": 4},
        }
    )
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.ready.remote())
    release = tmp_path / "release"

    def work() -> None:
        while not release.exists():
            time.sleep(0.2)

    trainer = TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 3.0}),
        run_config=TrainRunConfig(storage_path=str(tmp_path)),
    )
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    try:
        app = TeacherApp("teacher", config, ModelSource("t", "nowhere"))
        waits = Waits(config, {"": app})
        with pytest.raises(RunError, match=r"1 student worker of CPU: 3 each had no place") as told:
            for _ in range(60):
                assert waits.look(teacher_is_starting=True) == []
                time.sleep(0.5)
        assert "the cluster has CPU: 4, of which free CPU: 2" in str(told.value)
    finally:
        ray.kill(holder)
    deadline = time.monotonic() + 60
    while not has_worker_group({"CPU": 3.0}):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not has_worker_group({"CPU": 2.0})
    release.touch()
    thread.join(60)
    assert not thread.is_alive()
    assert not has_worker_group({"CPU": 3.0})


@pytest.mark.parametrize("kept", [True, False])
def test_replicas_that_lose_their_nodes_are_told_of_for_as_long_as_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """A teacher that scores what the student writes is needed after its thread has returned."""
    monkeypatch.setattr(waiting, "has_worker_group", lambda _: True)
    monkeypatch.setattr(waiting, "what_there_is", there)
    waits = object.__new__(Waits)
    waits._bundle, waits._next_look, waits._kept = {}, 0.0, kept
    waits._workers = Wait("a worker", "training.startup_timeout_s", 60.0)
    teacher: Any = SimpleNamespace(waits_for_resources=lambda: True)
    waits._replicas = [(teacher, Wait("the teacher", "teacher.startup_timeout_s", 120.0))]
    now = 0.0

    def look(seconds: float) -> list[str]:
        nonlocal now
        now += seconds
        monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now))
        return waits.look(teacher_is_starting=False)

    look(10.0)
    assert bool(look(40.0)) == kept
    if kept:
        with pytest.raises(RunError, match=r"the teacher had no place"):
            look(90.0)
    else:
        assert look(90.0) == []
