"""A real vLLM engine and a student worker, killed under one whole run: nothing is lost.

The run goes by hidden states, with packed rows and the whole vocabulary at the worker, and its
student is its teacher: a row out of place, in stream or packed sequence, shows in the loss.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, children_of, named

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

NUM_ROWS, NUM_HELD_OUT, ROWS_PER_STEP = 48, 4, 4
MAX_TOKENS = 48
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
DEADLINE_S = 240.0
NOISE = 1e-4
"""Nats a token: bfloat16 states of the engine against the student's own (measured: 4e-6)."""


def test_a_killed_engine_and_a_killed_worker_cost_no_row(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["teacher"] |= {
        "model": str(TEACHER),
        "target_ongoing_requests": 1,
        "max_num_seqs": 1,  # Answers one by one: the run must last until both are killed.
        "sampling": config["teacher"]["sampling"] | {"max_tokens": MAX_TOKENS},
    }
    config["prompts"] |= {
        "path": str(ROOT / config["prompts"]["path"]),
        "limit": NUM_ROWS + NUM_HELD_OUT,
    }
    config["student"] = {"init": "from_teacher", "layers": [0, 1]}
    config["signal"] = {"kind": "hidden"}
    config["objective"] = {"forward_kl": 0.5, "reverse_kl": 0.5, "temperature": 2.0}
    config["training"] |= {
        "rows_per_step": ROWS_PER_STEP,
        "checkpoint_every_steps": 2,
        "packing": True,
        "compute_dtype": "float32",  # On any machine.
    }
    config["evaluation"] = {"held_out_rows": NUM_HELD_OUT, "free_running": {"rows": 0}}
    config["output"] = {"path": str(tmp_path / "run")}
    run_file = tmp_path / "tiny.yaml"
    run_file.write_text(yaml.safe_dump(config))
    files = RunFiles(tmp_path / "run")
    command = [sys.executable, str(ROOT / "driver.py"), "run", str(run_file), "--skip-probe"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        log = files.folder / "logs" / "teacher-0.log"
        kill(process, lambda: engine_of(log), lambda: len(files.steps()) >= 1)
        asked_by_then = len(TeacherStore(str(tmp_path / "teacher_store")).catalogue().keys)
        worker = partial(worker_of, process)
        kill(process, worker, lambda: len(files.steps()) >= NUM_STEPS - 4)
        code = process.wait(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
    assert code == 0, (tmp_path / "output").read_text()
    assert asked_by_then < NUM_ROWS + NUM_HELD_OUT, "the engine died after its last answer"
    summary = files.json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == NUM_ROWS
    assert summary["restarts"] >= 1
    assert files.steps() == list(range(1, NUM_STEPS + 1))
    catalogue = TeacherStore(str(tmp_path / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)
    assert (files.folder / "student" / "model.safetensors").exists()
    check_first_step(files)


def check_first_step(files: RunFiles) -> None:
    """A student that is its teacher has nothing to learn; the steps after it move by noise."""
    first = files.lines("metrics.jsonl")[0]
    assert first["rows"] == ROWS_PER_STEP
    assert 0 <= first["objective/forward_kl"] < NOISE
    assert 0 <= first["objective/reverse_kl"] < NOISE
    assert first["padding_fraction"] == 0
    assert "rows packed" in (files.folder / "logs" / "student-0.log").read_text()
    teacher_log = (files.folder / "logs" / "teacher-0.log").read_text()
    assert "run=run role=teacher-0 node=" in teacher_log


def engine_of(log: Path) -> int | None:
    """The engine core by its own lines in the teacher's log: not every system shows its title."""
    pids = re.findall(r"EngineCore pid=(\d+)", log.read_text())
    return int(pids[-1]) if pids else None


def worker_of(process: subprocess.Popen[bytes]) -> int | None:
    """The driver's one student worker."""
    pids = named(children_of(process.pid), "ray::RayTrainWorker")
    return pids[0] if pids else None


def kill(
    process: subprocess.Popen[bytes], find: Callable[[], int | None], due: Callable[[], bool]
) -> None:
    """SIGKILL a process of the driver's, once it is due."""
    deadline = time.monotonic() + DEADLINE_S
    while not due() or (pid := find()) is None:
        assert process.poll() is None, "the driver ended before the kill"
        late = time.monotonic() >= deadline
        assert not late, f"not due in {DEADLINE_S:.0f} s; {find()} of {children_of(process.pid)}"
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
