"""The beginning and the end of an engine's process, which a replica starts and ends with.

On a CPU the engine's process is a copy of its replica's (`copied_process`): vLLM starts a new one
there, and in every actor of Ray, which imports all over again what the replica has just imported.

vLLM's processes wait for requests on a socket. A replica that is killed, with its node or its
driver, closes nothing, and they would wait for ever, with all their memory: `end_with`.
"""

import contextlib
import ctypes
import gc
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

LOOK_EVERY_S = 1.0
EXIT_ALONE = 1
HUGE_BYTES = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
"""Advice of ``madvise(2)``; the second since Linux 6.1."""


@contextlib.contextmanager
def copied_process(wanted: bool = True) -> Iterator[None]:
    """vLLM's engine starts as a copy of this process (``fork``), while this is open, if wanted.

    Of this process the copy uses the modules alone, which is what it saves: a second import of
    vLLM, 8 seconds of a processor. It has none of the other threads, ends without any clean-up, and
    the cycles that this process leaves behind are not collected there, whose ends could wait for a
    lock of Ray's. Not for GPUs, of which a copy can go wrong in ways that were not tried.

    Raises:
        AttributeError: vLLM has moved what is replaced here.
    """
    if not wanted:
        yield
        return
    from vllm.v1.engine import utils

    theirs = utils.get_mp_context
    context = _CopyContext(_sockets())
    gc.collect()
    gc.freeze()
    utils.get_mp_context = lambda: context
    try:
        yield
    finally:
        utils.get_mp_context = theirs
        gc.unfreeze()


class _CopyContext(ForkContext):
    """Starts copies that leave these sockets, by file descriptor, to this process."""

    def __init__(self, sockets: Sequence[int]) -> None:
        super().__init__()
        self._sockets = sockets

    def Process(self, *arguments: Any, **more: Any) -> "_Copy":  # type: ignore[override]
        """As ``multiprocessing.Process``."""
        copy = _Copy(*arguments, **more)
        copy.sockets = self._sockets
        return copy


class _Copy(ForkProcess):
    sockets: Sequence[int] = ()
    inherited: Sequence[tuple[int, int]] = ()
    """Of a copy: memory that it shares with its parent until one of them writes to it."""

    def run(self) -> None:
        """Let go of the sockets, and work until the parent ends.

        Who is at their other ends is to see that end when it comes. The numbers stay taken: what
        knows them may still close them.
        """
        end_with(os.getppid(), socket.gethostname())
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in self.sockets:
            os.dup2(nothing, number)
        os.close(nothing)
        _write_by_itself()
        _Copy.inherited = _regions()
        super().run()


def _write_by_itself() -> None:
    """Let this process and vLLM's log in it write where its descriptors lead, as a new one does.

    In a replica Serve has put a log of its own in the place of Python's standard streams.
    """
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for handler in logging.getLogger("vllm").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.stream = sys.stdout  # Not `setStream`, which flushes the other one.


def _sockets() -> list[int]:
    """File descriptors of this process that are sockets."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # The one that lists them is closed.
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                found.append(int(entry))
    return found


def use_huge_pages() -> int:
    """Put what a copy has allocated by itself into huge pages, as far as Linux can; its bytes.

    What reads much memory for each token takes 5 to 10 % longer with small pages. Regions that are
    not written yet get such pages when they are. 0 in a process that is no copy.
    """
    if not _Copy.inherited:
        return 0
    libc, asked = ctypes.CDLL(None, use_errno=True), 0
    for begin, end in _without(_regions(), _Copy.inherited):
        begin, end = -(-begin // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if end > begin:
            asked += end - begin
            for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):  # An older Linux refuses the second.
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
    return asked


def _regions() -> list[tuple[int, int]]:
    """Addresses of this process's own memory, in their order: not of files, and not shared."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        place, access, _, _, inode, *name = line.split()
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            begin, end = place.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _without(
    regions: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What of the regions is in none of the others."""
    for begin, end in regions:
        for other_begin, other_end in others:
            if other_end <= begin or end <= other_begin:
                continue
            if begin < other_begin:
                yield begin, other_begin
            begin = other_end
        if begin < end:
            yield begin, end


def end_with(pid: int, host: str) -> None:
    """End this process within two seconds of the end of process ``pid``, without a word.

    Returns at once; a thread looks. Does nothing on another machine than ``host``, where the number
    means another process: Ray ends what it started there.
    """
    if host != socket.gethostname():
        return
    watched = psutil.Process(pid)  # Remembers when it started: a number may be given again.

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                time.sleep(LOOK_EVERY_S)
        os._exit(EXIT_ALONE)

    Thread(target=watch, name="end-with-replica", daemon=True).start()
