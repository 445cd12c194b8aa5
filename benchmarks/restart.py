"""What a killed driver costs: from SIGKILL to the first new step, and what is asked again.

    python -m benchmarks.restart [--run-file configs/quickstart.yaml] [--kill-at-step 12]

The driver of a real run is killed in the middle of training and the same command is given again at
once. Reported: the phases of the new start up to its first step, the steps that are trained a
second time, and the rows whose answers were being written when the driver died, which are the only
ones the teacher is asked again for.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import machine, write_result
from raystill.config.load import load_config
from raystill.datasets.store.store import TeacherStore

POLL_S = 0.05
PHASE_LINE = re.compile(r"^\[ *(?:(\d+):)?(\d+):(\d\d)\] ([a-z ]+)$")


def start(run_file: str, folder: Path, log: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """The driver, its output in ``log``."""
    command = [sys.executable, "-u", "driver.py", "run", run_file]
    for override in (f"output.path={folder}", f"store.path={folder}-store", *overrides):
        command += ["--set", override]
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int, since: float) -> float:
    """When this start's line of ``step`` or a later one was written (seconds of ``time.time``)."""
    metrics = folder / "metrics.jsonl"
    while True:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        for line in lines:
            told = json.loads(line) if line.endswith("}") else {}
            if told.get("time", 0.0) > since and told["step"] >= step:
                return float(told["time"])
        if process.poll() is not None:
            raise SystemExit(f"the driver ended with {process.returncode} before step {step}")
        time.sleep(POLL_S)


def phases(log: Path) -> dict[str, float]:
    """Seconds at which each phase of a start was first shown, by its plain lines."""
    begun: dict[str, float] = {}
    for line in log.read_text().splitlines():
        if match := PHASE_LINE.match(line):
            hours, minutes, seconds, name = match.groups()
            begun.setdefault(name, int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds))
    return begun


def measure(run_file: str, kill_at: int, overrides: list[str], scratch: Path) -> dict[str, Any]:
    """Kill once, start again, wait for the first new step, and end that too."""
    folder, log = scratch / "run", scratch / "log"
    began = time.time()
    process = start(run_file, folder, log, overrides)
    first_step = wait_for_step(process, folder, 1, began) - began
    wait_for_step(process, folder, kill_at, began)
    killed = time.time()
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = TeacherStore(f"{folder}-store").catalogue().rows
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    again = start(run_file, folder, log, overrides)
    new_step = wait_for_step(again, folder, 1, killed)
    repeated = len((folder / "metrics.discarded.jsonl").read_text().splitlines())
    os.kill(again.pid, signal.SIGINT)
    again.wait()
    config = load_config(run_file, overrides)
    return {
        "first_step_after_s": first_step,
        "killed_at_step": steps,
        "first_new_step_after_s": new_step - killed,
        "phases_begin_s": phases(log),
        "steps_trained_again": repeated,
        "rows_stored_when_killed": stored,
        "rows_asked_again_at_most": config.rows_in_flight,
        "tokens_spent_again_at_most": config.rows_in_flight * config.teacher.sampling.max_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-file", default="configs/quickstart.yaml")
    parser.add_argument("--kill-at-step", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/restart.json"))
    arguments = parser.parse_args()
    overrides = ["training.checkpoint_every_steps=5", *arguments.set]
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        told = measure(arguments.run_file, arguments.kill_at_step, overrides, Path(scratch))
    print(f"first step of the run            {told['first_step_after_s']:6.1f} s")
    print(f"killed; first new step           {told['first_new_step_after_s']:6.1f} s")
    for name, second in told["phases_begin_s"].items():
        print(f"  {second:4.0f} s  {name}")
    print(
        f"steps trained again: {told['steps_trained_again']} of {told['killed_at_step']}; rows "
        f"asked again: at most {told['rows_asked_again_at_most']} (in flight), stored "
        f"{told['rows_stored_when_killed']}"
    )
    settings = {"run_file": arguments.run_file, "overrides": overrides}
    write_result(arguments.output, {"machine": machine(), "settings": settings, **told})


if __name__ == "__main__":
    main()
