"""A real vLLM engine and a student worker killed in one run of the driver; nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raystill.datasets.store import TeacherStore
from tests.end_to_end import ROOT, TEACHER, RunFiles, children_of, named

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

NUM_ROWS, NUM_HELD_OUT, ROWS_PER_STEP = 64, 4, 4
MAX_TOKENS = 48
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
DEADLINE_S = 240.0


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
    config["training"] |= {"rows_per_step": ROWS_PER_STEP, "checkpoint_every_steps": 2}
    config["evaluation"] = {"held_out_rows": NUM_HELD_OUT, "free_running": {"rows": 0}}
    config["output"] = {"path": str(tmp_path / "run")}
    run_file = tmp_path / "tiny.yaml"
    run_file.write_text(yaml.safe_dump(config))
    files = RunFiles(tmp_path / "run")
    command = [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        kill(process, "VLLM::EngineCore", lambda: len(files.steps()) >= 1)
        asked_by_then = len(TeacherStore(str(tmp_path / "teacher_store")).catalogue().keys)
        kill(process, "ray::RayTrainWorker", lambda: len(files.steps()) >= NUM_STEPS - 4)
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


def kill(process: subprocess.Popen[bytes], title: str, due: Callable[[], bool]) -> None:
    """SIGKILL the driver's one process of that title, once it is due."""
    deadline = time.monotonic() + DEADLINE_S
    while not due() or not (pids := named(children_of(process.pid), title)):
        assert process.poll() is None, f"the driver ended before {title} was killed"
        assert time.monotonic() < deadline, f"{title} was not due in {DEADLINE_S:.0f} s"
        time.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)
