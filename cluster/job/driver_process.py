"""One driver at a time for a run: a second would take the first one's files for leftovers.

It would delete unpublished checkpoints, cut the metrics back and replace the teacher. A local run
folder is held by a lock of the operating system, which ends with its process, however that ends. On
a cluster the run's coordinator has a name that only one actor can have; it dies with its driver.

Signals that ask a run to end: the first is a wish, the second an order.
"""

import fcntl
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder

LOCK = "driver.lock"  # In the log folder.
NAME_WAIT_S = 20.0  # A lost driver's actors end some seconds after it.
POLL_S = 0.5


@contextmanager
def hold_run_folder(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder where it is local. RunError where another process has it."""
    if folder.local is None:
        yield
        return
    folder.ensure()
    with (folder.logs / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunError(in_use(folder, lock.read().strip() or "another process")) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def unique_actor(start: Callable[[], Any], folder: RunFolder) -> Any:
    """What ``start`` returns: an actor with a name, once nobody else has it. RunError if it stays.

    Ray raises ValueError for a name that is taken.
    """
    deadline = time.monotonic() + NAME_WAIT_S
    while True:
        try:
            return start()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise RunError(in_use(folder, "another driver on this cluster")) from error
            time.sleep(POLL_S)


def in_use(folder: RunFolder, who: str) -> str:
    """What to tell the second driver."""
    return (
        f"the run in {folder.path} is under way in {who}; wait for its end, stop it (SIGINT: it "
        "writes a checkpoint), or set output.path to another folder"
    )


class StopSignals:
    """Turns the first SIGINT/SIGTERM into a flag, and lets the second end the process."""

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
