"""A run whose disk fills up: a clear end, nothing harmed, and the same command goes on later."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import verify
from raystill.train.checkpoint.checkpoint import read_snapshot
from tests.support.end_to_end import RunFiles, drive
from tests.support.synthetic_run import (
    DEADLINE_S,
    NUM_HELD_OUT,
    NUM_ROWS,
    NUM_STEPS,
    started,
    wait_for_step,
    write_run_file,
)

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(900)]

DISK_MIB = 512


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing more fits."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return path


@pytest.mark.parametrize("what", ["run", "store"])
def test_a_full_disk_ends_the_run_in_words_and_room_lets_it_go_on(
    what: str, small_disk: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path / "files")
    places = {"run": tmp_path / "run", "store": tmp_path / "store", what: small_disk / what}
    overrides = [f"output.path={places['run']}", f"store.path={places['store']}"]
    files, store = RunFiles(places["run"]), TeacherStore(str(places["store"]))
    with started(run_file, *overrides) as process:
        wait_for_step(process, files, 4)  # A checkpoint is written, and the next is due soon.
        filler = fill(small_disk)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, stdout + stderr
    assert "Traceback" not in stderr
    assert "make room" in stderr and str(small_disk) in stderr
    assert verify(store) == {}
    # Ray's own list of them may be torn; the folders are whole.
    kept = [read_snapshot(path).step for path in (places["run"] / "checkpoints").glob("step-*")]
    assert 3 in kept
    os.unlink(filler)
    arguments = [part for override in overrides for part in ("--set", override)]
    again = drive("run", run_file, *arguments)
    assert again.returncode == 0, again.stderr
    assert files.steps() == list(range(1, NUM_STEPS + 1))
    summary = files.json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == NUM_ROWS
    catalogue = store.catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)
