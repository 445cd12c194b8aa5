"""A mixed run in which every kind of process is killed, on real vLLM, and each row trained once.

The sampler's replica, the teacher's, the student's worker, in an order and at moments that follow
from a seed, and at last the driver; the same command then finishes the run. The engine of a sampler
is killed in tests/system/test_on_policy.py.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.end_to_end import RunFiles, children_of, named, wait_until_gone
from tests.support.on_policy import (
    DEADLINE_S,
    NUM_STEPS,
    STALENESS,
    finish,
    oldest_age,
    proofs,
    require_trained_once_and_paid_once,
    write_run_file,
)
from tests.support.synthetic_run import started, wait_for, wait_for_step

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(1800)]

KINDS = {
    "sampler": "ray::ServeReplica:sampler-",
    "teacher": "ray::ServeReplica:teacher-",
    "worker": "ray::RayTrainWorker",
}
PATIENCE_S = 2 * DEADLINE_S


def kill(driver: subprocess.Popen[str], kind: str) -> None:
    """End a process of the kind without a word, as soon as there is one."""

    def killed() -> bool:
        pids = named(children_of(driver.pid), KINDS[kind])
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)

    wait_for(driver, f"a {kind} to kill", killed)


def kill_driver(driver: subprocess.Popen[str]) -> None:
    """End the driver without a word, and wait for its run's processes to end too."""
    family = children_of(driver.pid)
    driver.kill()
    driver.wait()
    wait_until_gone(family)


@pytest.mark.parametrize("seed", [0])
def test_every_kind_of_process_may_die_and_each_row_is_trained_once(
    tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    kinds = generator.sample(list(KINDS), len(KINDS))
    run_file = write_run_file(tmp_path, training={"checkpoint_every_steps": 2})
    files = RunFiles(tmp_path / "run")
    with started(run_file) as process:
        for step, kind in enumerate(kinds, start=1):
            wait_for_step(process, files, step, PATIENCE_S)
            time.sleep(generator.uniform(0, 1))
            kill(process, kind)
        wait_for_step(process, files, len(kinds) + 2, PATIENCE_S)
        kill_driver(process)
    assert len(files.steps()) < NUM_STEPS
    finish(run_file)
    require_trained_once_and_paid_once(files)
    assert oldest_age(files) <= STALENESS
    assert all(gap <= 1e-3 for _, gap in proofs(files))
