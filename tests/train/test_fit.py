"""Placing the student: what the workers are given, and what a person is told when they fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer

from raystill.base.errors import RunError
from raystill.config.run import RunConfig, absolute_paths
from raystill.train.worker.fit import Trainer, root_cause
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
    assert parts(Trainer) == [*left, "SureExit"]


class DeadGroup:
    """A worker group, as far as the backend uses it, of which a worker dies as it joins."""

    aborted = False

    def get_resources_per_worker(self):
        return {"CPU": 1}

    def __len__(self):
        return 2

    def execute_single(self, rank, work):
        return "127.0.0.1", 1

    def execute_single_async(self, rank, work, *args):
        raise RayActorError

    def abort(self):
        self.aborted = True


def test_a_group_whose_worker_dies_as_it_joins_keeps_no_place_from_the_next_one():
    group = DeadGroup()
    with pytest.raises(RayActorError):
        Meeting().on_start(group, MeetingConfig())
    assert group.aborted


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
