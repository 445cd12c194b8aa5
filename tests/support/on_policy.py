"""A run of which the student writes half, on real vLLM and the tiny models, and what it leaves."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT, TEACHER, RunFiles
from tests.support.synthetic_run import started

NUM_ROWS, NUM_HELD_OUT, ROWS_PER_STEP = 64, 8, 8
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
STALENESS = 1
DEADLINE_S = 800.0
WEIGHTS = re.compile(r"weights of step (\d+): (\S+) nats from the student's")
ENGINE = re.compile(r"EngineCore pid=(\d+)")


def write_run_file(place: Path, **changes: dict[str, Any]) -> Path:
    """configs/on_policy.yaml with twice the rows, none of which may be older than one step.

    changes: settings by section.
    """
    config = yaml.safe_load((ROOT / "configs" / "on_policy.yaml").read_text())
    config["teacher"]["model"] = str(TEACHER)
    config["prompts"]["path"] = str(ROOT / config["prompts"]["path"])
    config["prompts"]["limit"] = NUM_ROWS + NUM_HELD_OUT
    config["stream"]["group_rows"] = 2
    config["policy"]["max_staleness_steps"] = STALENESS
    config["training"] |= {"rows_per_step": ROWS_PER_STEP, "compute_dtype": "float32"}
    config["output"] = {"path": str(place / "run")}
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    place.mkdir(exist_ok=True)
    run_file = place / "on_policy.yaml"
    run_file.write_text(yaml.safe_dump(config))
    return run_file


def finish(run_file: Path) -> None:
    """Run it to its end, from wherever an earlier start has left it."""
    with started(run_file) as process:
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stdout + stderr


def sampler_log(files: RunFiles, number: int = 0) -> Path:
    """The log of one replica of the student's sampler."""
    return files.folder / "logs" / f"sampler-{number}.log"


def proofs(files: RunFiles, number: int = 0) -> list[tuple[int, float]]:
    """Version and difference (nats) of each proof of a sampler, in order."""
    text = sampler_log(files, number).read_text()
    return [(int(version), float(gap)) for version, gap in WEIGHTS.findall(text)]


def kill_engine(log: Path) -> None:
    """End the newest engine that wrote to a log, without a word."""
    os.kill(int(ENGINE.findall(log.read_text())[-1]), signal.SIGKILL)


def require_trained_once_and_paid_once(files: RunFiles) -> None:
    """Each row was trained once, by rows of either origin, and nothing stored was paid again."""
    steps = files.lines("metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert [line["rows"] for line in steps] == [ROWS_PER_STEP] * NUM_STEPS
    written = sum(line.get("student_written_rows", 0) for line in steps)
    assert NUM_ROWS // 4 <= written <= NUM_ROWS * 3 // 4
    catalogue = TeacherStore(str(files.folder.parent / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)


def oldest_age(files: RunFiles) -> int:
    """The largest staleness that any row had when it was trained, in steps."""
    ages = [
        int(name.partition("/")[2])
        for line in files.lines("metrics.jsonl")
        for name, rows in line.items()
        if name.startswith("staleness/") and rows
    ]
    return max(ages)
