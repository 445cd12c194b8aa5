"""On which cores an engine is loaded, and to which it moves with all that its replica started."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, subprocess, sys, threading
from raystill.serve.engine.arguments import move_threads, prepare_process

def cores_of(pid):
    tasks = os.listdir(f"/proc/{pid}/task")
    return [sorted(os.sched_getaffinity(int(task))) for task in tasks]

every = sorted(os.sched_getaffinity(0))
engine, stop = every[:1], threading.Event()
threading.Thread(target=stop.wait, daemon=True).start()
prepare_process(engine, load_on=every if sys.argv[1] == "all" else None)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
loading = cores_of(os.getpid()) + cores_of(child.pid)
move_threads(engine)
moved = cores_of(os.getpid()) + cores_of(child.pid)
child.communicate(b"\\n")
print(json.dumps([loading, moved, os.environ["OMP_NUM_THREADS"]]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("load_on", ["all", "own"])
def test_an_engine_may_load_on_idle_cores_and_moves_to_its_own_with_its_children(load_on):
    command = [sys.executable, "-c", PROGRAM, load_on]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    loading, moved, threads = json.loads(ended.stdout)
    every = sorted(os.sched_getaffinity(0))
    where = every if load_on == "all" else every[:1]
    assert len(loading) >= 3 and all(cores == where for cores in loading)  # And NumPy's threads.
    assert len(moved) >= 3 and all(cores == every[:1] for cores in moved)
    assert threads == "1", "the engine computes on the cores that it moves to"
