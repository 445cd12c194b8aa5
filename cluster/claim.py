"""One driver at a time for a run: a second would take the first one's files for leftovers.

It would delete unpublished checkpoints, cut the metrics back and replace the teacher. A local run
folder is held by a lock of the operating system, which ends with its process, however that ends. On
a cluster the run's coordinator has a name that only one actor can have; it dies with its driver.
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raystill.cluster.problems import RunError
from raystill.cluster.run_folder import RunFolder

LOCK = "driver.lock"  # In the log folder.
NAME_WAIT_S = 20.0  # A lost driver's actors end some seconds after it.
POLL_S = 0.5


@contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
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


def only_one(start: Callable[[], Any], folder: RunFolder) -> Any:
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
