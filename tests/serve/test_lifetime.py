"""An engine's process begins as a copy of its replica, and ends with it, however that one ends."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raystill.serve.engine.lifetime import _without

CHILD = """
import os, socket, sys, time
from raystill.serve.engine.lifetime import end_with
end_with(int(sys.argv[1]), socket.gethostname() + sys.argv[2])
print(os.getpid(), flush=True)
time.sleep(600)
"""
# Dies without waiting for its child, and nobody tells the child.
PARENT = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid()), *sys.argv[1:]])
time.sleep(600)
"""
COPIED = """
import os, time
from raystill.serve.engine.lifetime import _CopyContext
def work():
    print(os.getpid(), flush=True)
    time.sleep(600)
_CopyContext([]).Process(target=work).start()
time.sleep(600)
"""


def orphan(host_suffix: str, program: str = PARENT) -> psutil.Process:
    """The child of a process that was killed."""
    command = [sys.executable, "-c", program, host_suffix]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    return child


def ends(process: psutil.Process, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
    return False


@pytest.mark.parametrize("program", [PARENT, COPIED], ids=["its own", "a copy"])
def test_it_ends_when_who_started_it_was_killed(program: str) -> None:
    assert ends(orphan("", program), within_s=30)


def test_it_stays_on_another_machine_where_the_number_means_another_process() -> None:
    child = orphan("-another")
    try:
        assert not ends(child, within_s=2.5)
    finally:
        child.kill()


def test_memory_that_a_copy_shares_is_left_out() -> None:
    shared = [(10, 20), (30, 40), (90, 99)]
    new = [(0, 5), (8, 33), (35, 38), (39, 41), (50, 60), (85, 100)]
    assert list(_without(new, shared)) == [
        *[(0, 5), (8, 10), (20, 30), (40, 41), (50, 60), (85, 90), (99, 100)]
    ]
    assert list(_without(new, [])) == new


@pytest.mark.vllm
def test_an_engine_process_is_a_copy_without_sockets(tmp_path: Path) -> None:
    from vllm.v1.engine import utils

    from raystill.serve.engine import lifetime

    theirs, here = utils.get_mp_context, {"known": "in this process alone"}
    ours, other = socket.socketpair()
    told = tmp_path / "told"

    def work() -> None:
        with contextlib.suppress(OSError):
            ours.sendall(b"from the copy")
        held = bytearray(8 << 20)
        pages = lifetime.use_huge_pages()
        assert not any(held)
        told.write_text(f"{here['known']} {os.getppid()} {pages > 0} {len(lifetime._sockets())}")

    with lifetime.copied_process():
        copy = utils.get_mp_context().Process(target=work)
        copy.start()
    ours.close()
    assert other.recv(99) == b"", "its end is closed, and the copy holds it no more"
    copy.join(60)
    assert copy.exitcode == 0
    assert told.read_text() == f"in this process alone {os.getpid()} True 0"
    assert utils.get_mp_context is theirs and lifetime.use_huge_pages() == 0
