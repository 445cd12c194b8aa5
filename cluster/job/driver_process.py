"""The driver's process: one at a time for a run, and how signals stop it.

A second driver would take the first one's files for leftovers: it would delete unpublished
checkpoints, cut the metrics back and replace the teacher. So a local run folder is locked by the
operating system; the lock ends with its process, however that ends. On a cluster the run's
coordinator has a name that only one actor can have, and it dies with its driver.
"""

import fcntl
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raystill.base.errors import RunError, RunInUseError
from raystill.base.run_folder import RunFolder

LOCK = "driver.lock"  # In the log folder.
NAME_WAIT_S = 20.0  # A lost driver's actors end some seconds after it.
POLL_S = 0.5


@contextmanager
def hold_run_folder(folder: RunFolder) -> Iterator[None]:
    """Lock a local run folder. Raises RunInUseError where another process has it, naming that."""
    if folder.local is None:
        yield
        return
    folder.ensure()
    _refuse_links(folder.local, folder.logs)
    # By hand: the filelock package empties the file before it has the lock, and so would lose who
    # holds it.
    with (folder.logs / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunInUseError(in_use(folder, lock.read().strip() or "another process")) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def _refuse_links(*folders: Path) -> None:
    """RunError for a link in place of a file to which a run appends: it may lead anywhere.

    Folders may be links, to a larger disk for instance; ``logs/ray`` is one of ours.
    """
    for folder in folders:
        for path in folder.iterdir():
            if path.is_symlink() and not path.is_dir() and path.name != "ray":
                raise RunError(
                    f"{path} is a link to {os.readlink(path)}, and a run writes into its folder's "
                    "own files; remove it, or put the file itself there"
                )


def unique_actor(start: Callable[[], Any], folder: RunFolder) -> Any:
    """The actor that ``start`` makes under its name, as soon as no other actor has that name.

    Ray raises ValueError for a name that is taken. Raises RunInUseError where it stays taken.
    """
    deadline = time.monotonic() + NAME_WAIT_S
    while True:
        try:
            return start()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise RunInUseError(in_use(folder, "another driver on this cluster")) from error
            time.sleep(POLL_S)


def in_use(folder: RunFolder, who: str) -> str:
    """The message for the second driver."""
    return (
        f"the run in {folder.path} is under way in {who}; wait for its end, stop it (SIGINT: it "
        "writes a checkpoint), or set output.path to another folder"
    )


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag; the second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
