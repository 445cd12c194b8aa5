"""Folders in shared memory end with their process, however that one ends. Without Ray."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raystill.base.errors import RunError
from raystill.serve import scratch
from raystill.serve.scratch import Scratch

HOLDER = """
import sys, time
from raystill.serve import scratch
scratch.SHARED_MEMORY = sys.argv[1]
held = scratch.Scratch()
(held.path / "adapter-1").mkdir()
(held.path / "adapter-1" / "weights").write_bytes(b"w")
print(held.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(scratch, "YOUNG_S", -1.0)
    return tmp_path


def holder(shared: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", HOLDER, str(shared)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_stays(
    shared: Path,
) -> None:
    living, held = holder(shared)
    killed, left = holder(shared)
    try:
        Scratch().remove()
        assert held.exists() and left.exists()
        killed.kill()
        killed.wait()
        own = Scratch()
        assert sorted(shared.iterdir()) == sorted([held, own.path])
        assert (held / "adapter-1" / "weights").read_bytes() == b"w"
        own.remove()
        own.remove()
        assert list(shared.iterdir()) == [held]
    finally:
        living.kill()
        living.wait()


def test_one_that_was_just_made_may_not_be_held_yet(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "YOUNG_S", 60.0)
    made = shared / f"{scratch.PREFIX}abc"
    made.mkdir()
    Scratch().remove()
    assert made.exists()
    os.utime(made, (1, 1))
    Scratch().remove()
    assert not made.exists()


def test_what_only_has_such_a_name_stays(shared: Path) -> None:
    elsewhere = shared / "elsewhere"
    elsewhere.mkdir()
    (shared / f"{scratch.PREFIX}link").symlink_to(elsewhere)
    (shared / f"{scratch.PREFIX}file").write_bytes(b"")
    os.mkfifo(shared / f"{scratch.PREFIX}pipe")
    names = {path.name for path in shared.iterdir()}
    Scratch().remove()
    assert {path.name for path in shared.iterdir()} == names


def test_shared_memory_without_room_is_passed_over(
    shared: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path_factory.mktemp("disk")
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(disk))
    free = shutil.disk_usage(shared).free
    for room, place in ((0, shared), (free // 2, shared), (2 * free, disk)):
        made = Scratch(room)
        assert made.path.parent == place
        made.write("weights", memoryview(b"w"))
        assert (made.path / "weights").read_bytes() == b"w"
        made.remove()
        assert not made.path.exists()


def test_no_room_is_told_with_the_folder_and_what_to_do(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=rf"{shared} has no room for .* \(weights, 3 MiB\).*shm"):
        Scratch().write("weights", bytes(3 << 20))
