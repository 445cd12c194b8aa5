"""A run of the driver with a synthetic teacher, whose pace can be set: slow enough to be disturbed.

The same question always has the same answer; prompts, stream, workers and checkpoints are the
real ones.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.end_to_end import ROOT, TEACHER, RunFiles

NUM_ROWS = 48
NUM_HELD_OUT = 4
ROWS_PER_STEP = 4
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
SECONDS_PER_GROUP = 0.8
DEADLINE_S = 400.0


def write_run_file(folder: Path, **changes: dict[str, Any]) -> Path:
    """A synthetic run of 48 rows, held to one optimizer step in 0.8 seconds."""
    config: dict[str, dict[str, Any]] = {
        "teacher": {
            "model": str(TEACHER),
            "engine": "synthetic",
            "synthetic": {
                "vocab_size": 49152,
                "response_tokens": 8,
                "delay_s": SECONDS_PER_GROUP,
            },
            "max_model_len": 256,
            "target_ongoing_requests": 1,
            "sampling": {"max_tokens": 8},
        },
        "student": {"layers": [0]},
        "prompts": {
            "path": str(ROOT / "examples" / "prompts" / "quickstart.jsonl"),
            "limit": NUM_ROWS + NUM_HELD_OUT,
        },
        "signal": {"top_k": 8},
        "stream": {"group_rows": 4, "order": "fixed"},
        "training": {
            "rows_per_step": ROWS_PER_STEP,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 3,
            "compute_dtype": "float32",
            "export_dtype": "float32",
            "idle_teacher_cores": False,  # Weights are compared bit by bit.
        },
        "evaluation": {"held_out_rows": NUM_HELD_OUT, "top_k": 8, "free_running": {"rows": 2}},
        "cluster": {"num_cpus": 4},
        "output": {"path": str(folder / "run")},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "synthetic.yaml"
    run_file.write_text(yaml.safe_dump(config))
    return run_file


@contextmanager
def started(
    run_file: Path, *overrides: str, own_group: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """The driver on its way; killed should a test leave it behind.

    own_group: it begins a process group of its own, which bears its number.
    """
    command = [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)]
    command += [part for override in overrides for part in ("--set", override)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(
    process: subprocess.Popen[str],
    what: str,
    reached: Callable[[], bool],
    deadline_s: float = DEADLINE_S,
) -> None:
    deadline = time.monotonic() + deadline_s
    while not reached():
        assert process.poll() is None, f"the driver ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not come in {deadline_s:.0f} s"
        time.sleep(0.05)


def wait_for_step(
    process: subprocess.Popen[str], files: RunFiles, step: int, deadline_s: float = DEADLINE_S
) -> None:
    """Until this start of the run has a line of that step; an earlier start's does not count."""
    began = time.time()

    def reached() -> bool:
        return any(s["step"] >= step and s["time"] > began for s in files.lines("metrics.jsonl"))

    wait_for(process, f"step {step}", reached, deadline_s)
