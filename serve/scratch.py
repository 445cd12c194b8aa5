"""A folder in a node's shared memory, or on its disk, for as long as a process lives.

A process that is killed removes nothing, and a student's weights stay in memory. Therefore whoever
makes such a folder holds a lock on it, which ends with the process, and first removes those of this
user that nobody holds any more.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raystill.base.errors import RunError

SHARED_MEMORY = "/dev/shm"
PREFIX = "raystill-weights-"
YOUNG_S = 60.0
"""Age below which a folder that nobody holds may be one that was just made."""


class Scratch:
    """A folder, ``path``, that is held until `remove`.

    room: bytes that it must have. Where the shared memory has fewer (64 MiB in a container whose
    starter set nothing), it is a temporary folder of the disk.
    """

    def __init__(self, room: int = 0) -> None:
        usable = os.access(SHARED_MEMORY, os.W_OK)
        usable = usable and shutil.disk_usage(SHARED_MEMORY).free >= room
        shared = SHARED_MEMORY if usable else tempfile.gettempdir()
        for left in Path(shared).glob(f"{PREFIX}*"):
            _remove_if_left(left)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=shared))
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def write(self, name: str, content: Any) -> None:
        """Write a file of the folder. RunError where there is no room."""
        try:
            (self.path / name).write_bytes(memoryview(content))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RunError(
                f"{self.path.parent} has no room for the student's weights ({name}, "
                f"{memoryview(content).nbytes / 2**20:.0f} MiB); give the node more shared memory "
                "(--shm-size of a container, an emptyDir of medium Memory on Kubernetes), or set "
                "TMPDIR to a folder with room"
            ) from error

    def remove(self) -> None:
        """Remove the folder with all that is in it, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _remove_if_left(path: Path) -> None:
    """Remove a folder whose process has ended."""
    with suppress(OSError), _opened(path) as descriptor:  # A link, another user's, or held.
        known = os.fstat(descriptor)
        if known.st_uid == os.geteuid() and time.time() - known.st_mtime > YOUNG_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
