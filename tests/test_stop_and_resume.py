"""A run stopped by signals and begun again, beside one that nobody disturbed.

The teacher is synthetic, so that its pace can be set and the same question always has the same
answer; prompts, stream, workers and checkpoints are the real ones. Signals go to the driver only.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end import ROOT, TEACHER, RunFiles, drive

pytestmark = pytest.mark.ray

NUM_ROWS = 48
ROWS_PER_STEP = 4
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
SECONDS_PER_GROUP = 0.8
DEADLINE_S = 200.0
TIMES = {"time", "tokens_per_s", "teacher_wait_s", "student_s", "data_wait_s"}


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
            "limit": NUM_ROWS + 4,
        },
        "signal": {"top_k": 8},
        "stream": {"group_rows": 4, "order": "fixed"},
        "training": {
            "rows_per_step": ROWS_PER_STEP,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 3,
            "compute_dtype": "float32",
            "export_dtype": "float32",
        },
        "evaluation": {"held_out_rows": 4, "top_k": 8, "free_running": {"rows": 2}},
        "cluster": {"num_cpus": 4},
        "output": {"path": str(folder / "run")},
    }
    for section, values in changes.items():
        config[section] |= values
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "synthetic.yaml"
    run_file.write_text(yaml.safe_dump(config))
    return run_file


@contextmanager
def started(run_file: Path) -> Iterator[subprocess.Popen[str]]:
    """The driver on its way; killed should a test leave it behind."""
    command = [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, f"the driver ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not come in {DEADLINE_S:.0f} s"
        time.sleep(0.05)


@dataclass(frozen=True)
class Stopped:
    """One start of the run that a signal ended: its status, its words, the steps it got to."""

    returncode: int
    stdout: str
    stderr: str
    step: int
    status: str


def run_until(run_file: Path, step: int, number: signal.Signals) -> Stopped:
    """Start the driver, send it a signal once ``step`` has a line of metrics, wait for its end."""
    files = RunFiles(run_file.parent / "run")
    with started(run_file) as process:
        wait_for(process, f"step {step}", lambda: files.steps()[-1:] >= [step])
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    status = files.json("summary.json")["status"]
    return Stopped(process.returncode, stdout, stderr, files.steps()[-1], status)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stop_and_resume")


@dataclass(frozen=True)
class Disturbed:
    """A run that took three starts of the same command."""

    files: RunFiles
    run_file: Path
    interrupted: Stopped
    terminated: Stopped
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def disturbed(place: Path) -> Disturbed:
    run_file = write_run_file(place / "disturbed")
    interrupted = run_until(run_file, 2, signal.SIGINT)
    terminated = run_until(run_file, interrupted.step + 2, signal.SIGTERM)
    last = drive("run", run_file, cwd=ROOT)
    return Disturbed(RunFiles(place / "disturbed" / "run"), run_file, interrupted, terminated, last)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> RunFiles:
    """The same run at its own pace, at once."""
    run_file = write_run_file(place / "undisturbed")
    result = drive("run", run_file, "--set", "teacher.synthetic.delay_s=0", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return RunFiles(place / "undisturbed" / "run")


def test_a_stopped_run_says_how_to_resume_and_exits_as_the_signal_asks(
    disturbed: Disturbed,
) -> None:
    for stopped, number in (
        (disturbed.interrupted, signal.SIGINT),
        (disturbed.terminated, signal.SIGTERM),
    ):
        assert stopped.returncode == 128 + number
        assert "stopping: finishing the step, then a checkpoint" in stopped.stdout
        assert f"Stopped after step {stopped.step}; resume with:" in stopped.stdout
        assert f"  python driver.py run {disturbed.run_file}\n" in stopped.stdout
        assert stopped.stderr == ""
        assert stopped.status == "stopped"
    assert 2 <= disturbed.interrupted.step < disturbed.terminated.step < NUM_STEPS


def test_the_same_command_goes_on_to_the_end(disturbed: Disturbed) -> None:
    assert disturbed.last.returncode == 0, disturbed.last.stderr
    summary = disturbed.files.json("summary.json")
    assert summary["status"] == "completed"
    assert summary["restarts"] == 2
    assert "] measuring the student before training" not in disturbed.last.stdout


def test_every_row_was_trained_once_over_the_three_starts(disturbed: Disturbed) -> None:
    files = disturbed.files
    assert files.steps() == list(range(1, NUM_STEPS + 1))
    assert sum(line["rows"] for line in files.lines("metrics.jsonl")) == NUM_ROWS
    assert not (files.folder / "metrics.discarded.jsonl").exists()  # Orderly stops lose no step.
    ledger = files.json(f"checkpoints/step-{NUM_STEPS:08d}/ledger.json")
    assert (ledger["num_rows"], ledger["num_trained"]) == (NUM_ROWS, NUM_ROWS)
    summary = files.json("summary.json")
    assert summary["rows_trained"] == NUM_ROWS
    assert summary["evaluation_rows_asked"] == 4  # They were kept.
    # Without a store, rows that were on their way at a stop are asked for again.
    assert NUM_ROWS <= summary["rows_asked"] <= NUM_ROWS + 2 * summary["max_rows_ahead_seen"]


def test_no_trace_of_the_stops_is_left_in_figures_or_weights(
    disturbed: Disturbed, undisturbed: RunFiles
) -> None:
    def figures(files: RunFiles, name: str) -> list[dict[str, Any]]:
        lines = files.lines(name)
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    for name in ("metrics.jsonl", "evaluation.jsonl", "answers.jsonl"):
        assert figures(disturbed.files, name) == figures(undisturbed, name)
    mine, other = (
        (files.folder / "student" / "model.safetensors").read_bytes()
        for files in (disturbed.files, undisturbed)
    )
    assert mine == other


# Two workers, and the harder stop


def children_of(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    found, front = set(), {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that still run."""
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)}


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@dataclass(frozen=True)
class Aborted:
    """A run of 161 rows on two workers, ended by a second signal, and begun again."""

    files: RunFiles
    returncode: int
    seconds: float
    left_behind: set[int]
    steps: list[int]
    registered: int
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def aborted(place: Path) -> Aborted:
    run_file = write_run_file(
        place / "aborted",
        teacher={"target_ongoing_requests": 2},
        prompts={"limit": 161},
        stream={"group_rows": 8},
        training={"rows_per_step": 16, "num_workers": 2, "checkpoint_every_steps": 2},
        evaluation={"held_out_rows": 0},
    )
    files = RunFiles(place / "aborted" / "run")
    with started(run_file) as process:
        snapshot = files.folder / "checkpoints" / "checkpoint_manager_snapshot.json"
        wait_for(process, "a checkpoint", lambda: snapshot.exists() and len(files.steps()) > 3)
        family = children_of(process.pid)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=DEADLINE_S)
        seconds = time.monotonic() - start
    deadline = time.monotonic() + 30
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.2)
    steps = files.steps()
    registered = json.loads(snapshot.read_text())["latest_checkpoint_result"]
    step = int(registered["checkpoint_dir_name"].removeprefix("step-"))
    last = drive("run", run_file)
    return Aborted(files, process.returncode, seconds, alive(family), steps, step, last)


def test_a_second_signal_ends_the_driver_at_once_with_all_it_started(aborted: Aborted) -> None:
    assert aborted.returncode == 128 + signal.SIGINT
    assert aborted.seconds < 5
    assert aborted.left_behind == set()


def test_steps_beyond_the_checkpoint_are_trained_again_and_their_records_kept_apart(
    aborted: Aborted,
) -> None:
    assert aborted.last.returncode == 0, aborted.last.stderr
    assert 0 < aborted.registered < aborted.steps[-1]
    discarded = [line["step"] for line in aborted.files.lines("metrics.discarded.jsonl")]
    assert discarded == [step for step in aborted.steps if step > aborted.registered]


def test_all_of_161_rows_are_trained_on_two_workers(aborted: Aborted) -> None:
    files = aborted.files
    assert files.steps() == list(range(1, 12))
    rows = [line["rows"] for line in files.lines("metrics.jsonl")]
    assert rows == [16] * 10 + [1]
    ledger = files.json("checkpoints/step-00000011/ledger.json")
    assert (ledger["num_rows"], ledger["num_trained"]) == (161, 161)
    assert files.json("checkpoints/step-00000011/state.json")["world_size"] == 2
    assert files.json("summary.json")["rows_trained"] == 161
    assert files.lines("evaluation.jsonl") == []
    assert (files.folder / "student" / "model.safetensors").exists()
