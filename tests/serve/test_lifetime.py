"""An engine's process ends with its replica, however that one ends."""

import contextlib
import subprocess
import sys
import time

import psutil

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


def orphan(host_suffix: str) -> psutil.Process:
    """The child of a process that was killed."""
    command = [sys.executable, "-c", PARENT, host_suffix]
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


def test_it_ends_when_who_started_it_was_killed() -> None:
    assert ends(orphan(""), within_s=30)


def test_it_stays_on_another_machine_where_the_number_means_another_process() -> None:
    child = orphan("-another")
    try:
        assert not ends(child, within_s=2.5)
    finally:
        child.kill()
