"""One driver a run: the second is told who has it, and what was lost frees the run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.job import driver_process

HOLDER = """
import sys, time
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.base.run_folder import RunFolder
with hold_run_folder(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_driver_until_that_ends_however_it_ends(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    with driver_process.hold_run_folder(folder):
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=f"under way in process {holder.pid} on .*SIGINT"),
            driver_process.hold_run_folder(folder),
        ):
            raise AssertionError("two drivers on one folder")
    finally:
        holder.kill()
        holder.wait()
    with driver_process.hold_run_folder(folder):
        assert "under way" not in (folder.logs / driver_process.LOCK).read_text()


def test_a_name_that_is_taken_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_process, "POLL_S", 0.0)
    tries = []

    def start() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError("the name is taken")
        return "coordinator"

    folder = RunFolder(str(tmp_path))
    assert driver_process.unique_actor(start, folder) == "coordinator"
    monkeypatch.setattr(driver_process, "NAME_WAIT_S", -1.0)
    tries.clear()
    with pytest.raises(RunError, match="another driver on this cluster"):
        driver_process.unique_actor(start, folder)


@pytest.mark.ray
def test_the_coordinator_of_a_run_is_the_only_one_until_it_is_gone(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    from raystill.cluster.coordinator.actor import start_coordinator

    def start() -> Any:
        return start_coordinator("claimed-twice", 8, 8, 0.0)

    first = driver_process.unique_actor(start, RunFolder(str(tmp_path)))
    assert ray.get(first.snapshot.remote()).from_step == 0
    with pytest.raises(ValueError, match="claimed-twice"):
        start()
    ray.kill(first)
    second = driver_process.unique_actor(start, RunFolder(str(tmp_path)))
    assert ray.get(second.snapshot.remote()).rows_ahead == 0
    ray.kill(second)
