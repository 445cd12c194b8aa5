"""Placing the student: what the workers are given, and what a person is told when they fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.worker_group import state as states
from ray.train.v2._internal.execution.worker_group import worker_group as worker_groups
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig

from raystill.base.errors import RunError
from raystill.config.run import RunConfig, absolute_paths
from raystill.train.worker.fit import Trainer, WholeGroup, root_cause
from raystill.train.worker.meeting import Meeting, MeetingConfig


class Wrapped(Exception):
    """As Ray Train wraps a worker's error, and Ray that of a remote call."""

    def __init__(self, base=None, cause=None):
        super().__init__("a traceback of many lines")
        self._base_exc = base
        if cause is not None:
            self.cause = cause


def test_the_reason_is_found_inside_rays_wrappings():
    reason = RunError("the loss of step 3 is nan")
    assert root_cause(Wrapped(base=Wrapped(cause=reason))) is reason
    assert root_cause(reason) is reason


def test_a_reason_that_names_itself_ends_the_search():
    error = Wrapped()
    error.cause = error
    assert root_cause(error) is error


def run_config(student):
    return RunConfig.model_validate(
        {"teacher": {"model": "t"}, "prompts": {"path": "p"}, "student": student}
    )


def test_a_local_student_folder_is_made_absolute_for_workers_that_run_elsewhere(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.mkdir("mine")
    local = absolute_paths(run_config({"init": "model", "model": "mine"}))
    assert local.student.model == str(tmp_path / "mine")
    for student in ({"init": "model", "model": "hub/name"}, {"layers": [0]}):
        config = run_config(student)
        assert absolute_paths(config) == config


def test_ray_train_runs_with_all_its_parts_but_the_cleaner():
    """A Ray in which the cleaner has another name or place fails here, not in the run."""

    def parts(kind):
        return [type(part).__name__ for part in kind(print)._create_default_callbacks()]

    all_of_them = parts(TorchTrainer)
    assert "PlacementGroupCleanerCallback" in all_of_them
    left = [name for name in all_of_them if name != "PlacementGroupCleanerCallback"]
    assert parts(Trainer) == [*left, "SureExit", "StartsWhole"]


class Ref:
    """What a worker's method gives: it dies in one of them, and a peer may see that first."""

    def __init__(self, of):
        self.of = of


class Place:
    """A placement group."""

    def __init__(self):
        self.removed, self.placement_group = 0, None

    def wait(self, seconds):
        return True

    def shutdown(self):
        self.removed += 1


class StartedWorker:
    def __init__(self, rank):
        self.distributed_context = SimpleNamespace(world_rank=rank, local_rank=0, node_rank=0)
        self.metadata = SimpleNamespace(node_ip="", pid=0)
        self.actor = SimpleNamespace(
            run_train_fn=SimpleNamespace(remote=lambda _: Ref("run_train_fn"))
        )

    def execute_async(self, work, *_, **__):
        return Ref(work.__name__)


@pytest.fixture
def group_that_dies(monkeypatch):
    """Ray's own way to start a group, with our meeting; (group, place) by where a worker dies."""

    def made(dies_at, kind=WholeGroup):
        def get(refs, timeout=None):
            for ref in refs if isinstance(refs, list) else [refs]:
                if ref.of == dies_at:
                    raise RayActorError
            return [None] * len(refs) if isinstance(refs, list) else ("127.0.0.1", 1)

        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: Mock(get_node_id=lambda: "n"))
        monkeypatch.setattr(worker_groups, "SynchronizationActor", Mock())
        monkeypatch.setattr(worker_groups, "ray_state", Mock())
        worker_groups.ray_state.get_max_resources_from_cluster_config.return_value = None
        for name in ("_shutdown_workers", "_shutdown_sync_actor"):
            monkeypatch.setattr(states, name, lambda *_, **__: None)
        shards = object.__new__(DatasetsCallback)
        shards._data_context = shards._dataset_shard_provider = None
        settings = SimpleNamespace(failure_config=FailureConfig(max_failures=2))
        group, place = object.__new__(kind), Place()
        group._train_run_context = SimpleNamespace(scaling_config=None, run_config=settings)
        group._callbacks = [BackendSetupCallback(MeetingConfig()), shards]
        group._replica_group_callbacks, group._execution_group_callbacks = [], []
        group._worker_group_state = group._replica_groups = None
        group._manages_replica_groups, group._world_rank_to_ongoing_poll = False, {}
        group._worker_group_start_timeout_s = 1
        group._collective_timeout_s = group._collective_warn_interval_s = 1
        group._worker_group_context = SimpleNamespace(
            num_workers=2, resources_per_worker={"CPU": 1}, train_fn_ref=None
        )
        group._create_placement_group = lambda *_: place
        group._create_workers = lambda *_, **__: [StartedWorker(0), StartedWorker(1)]
        group._init_train_context = lambda *_: None
        return group, place

    monkeypatch.setattr(WholeGroup, "deaths", 0)
    return made


PLACES = ["join_workers", "_propagate_data_context", "run_train_fn"]


@pytest.mark.parametrize("where", PLACES)
def test_a_group_whose_worker_dies_as_it_starts_keeps_no_place_and_is_tried_again(
    group_that_dies, where
):
    for _ in range(2):
        group, place = group_that_dies(where)
        with pytest.raises(WorkerGroupStartupFailedError):
            group._start()
        assert place.removed >= 1 and not group.has_started()
    group, place = group_that_dies(where)
    with pytest.raises(RunError, match="died 3 times as they were started"):
        group._start()
    assert place.removed >= 1


def test_rays_own_group_keeps_its_place(group_that_dies):
    """Where that is mended, ours can go."""
    group, place = group_that_dies("_propagate_data_context", WorkerGroup)
    with pytest.raises(WorkerGroupStartupFailedError):
        group._start()
    assert place.removed == 0


def test_a_death_that_a_peer_tells_of_first_is_a_death(monkeypatch):
    broken = RayTaskError("join_workers", "connection reset", ConnectionError())
    answers = {"peer": broken, "dead": RayActorError()}

    def get(refs, timeout=None):
        raise answers[(refs[0] if isinstance(refs, list) else refs).of]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    group = MagicMock()
    group.__len__.return_value = 2
    group.execute_single.return_value = ("127.0.0.1", 1)
    group.execute_single_async.side_effect = [Ref("peer"), Ref("dead")]
    with pytest.raises(RayActorError):
        Meeting().on_start(group, MeetingConfig())
    group.execute_single_async.side_effect = [Ref("peer"), Ref("peer")]
    with pytest.raises(RayTaskError):
        Meeting().on_start(group, MeetingConfig())
    monkeypatch.setattr(ray, "get", Mock(side_effect=GetTimeoutError))
    group.execute_single_async.side_effect = [Ref("peer"), Ref("peer")]
    with pytest.raises(RunError, match=r"not found each other within 1800 s at 127\.0\.0\.1"):
        Meeting().on_start(group, MeetingConfig())


EXITING = """
import ctypes, sys
from raystill.train.worker import fit

if hangs := sys.argv[1] == "hangs":
    fit.EXIT_S = 1
fit.SureExit().after_controller_start(None)
if hangs:  # As the process exits, after the interpreter's end.
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)
"""


@pytest.mark.parametrize(("how", "status"), [("hangs", -signal.SIGALRM), ("ends", 0)])
def test_a_controller_whose_exit_hangs_is_ended_by_the_kernel(how, status):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", EXITING, how]
    assert subprocess.run(command, env=environment, timeout=60).returncode == status
