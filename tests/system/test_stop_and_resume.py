"""A run stopped by signals and begun again; with the faults, beside one that nobody disturbed.

Signals go to the driver only.
"""

import contextlib
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import RunFiles, children_of, drive, status_of
from tests.support.synthetic_run import (
    DEADLINE_S,
    NUM_HELD_OUT,
    NUM_ROWS,
    NUM_STEPS,
    started,
    wait_for_step,
    write_run_file,
)

pytestmark = pytest.mark.ray

# They look for their dead node for up to a minute, and do no harm.
LINGERING = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
TIMES = {"time", "tokens_per_s", "teacher_wait_s", "student_s", "data_wait_s", "others_wait_s"}


def alive(pids: set[int]) -> dict[int, str]:
    """Those of the processes that still run, with their names; Ray's node agents left out."""
    left = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            if status_of(pid)[0] != "Z" and name not in LINGERING:
                left[pid] = name
    return left


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stop_and_resume")


@dataclass(frozen=True)
class End:
    """One start of the run that a signal ended: its status, its words, the steps it got to."""

    returncode: int
    stdout: str
    stderr: str
    steps: list[int]


@dataclass(frozen=True)
class Stopped(End):
    """... in order; ``status`` is that of the run's summary."""

    status: str


@dataclass(frozen=True)
class Aborted(End):
    """... at once."""

    seconds: float
    left_behind: dict[int, str]
    registered_step: int


@dataclass(frozen=True)
class Disturbed:
    """A run that ``ends`` cut short, each in its own start, and that the last start finished."""

    files: RunFiles
    run_file: Path
    ends: list[Any]
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def stopped(place: Path) -> Disturbed:
    """Stopped in order, once, then resumed."""
    run_file = write_run_file(place / "stopped")
    files = RunFiles(place / "stopped" / "run")
    ends = [stop(run_file, files, after_step=2)]
    return Disturbed(files, run_file, ends, drive("run", run_file))


@pytest.fixture(scope="module")
def ended(place: Path) -> Disturbed:
    """Ended at once by a second signal, then killed without a word, then resumed."""
    run_file = write_run_file(place / "ended")
    files = RunFiles(place / "ended" / "run")
    ends = [abort(run_file, files, after_step=4)]
    ends.append(abort(run_file, files, ends[0].registered_step + 2, signal.SIGKILL))
    return Disturbed(files, run_file, ends, drive("run", run_file))


@pytest.fixture(params=["stopped", pytest.param("ended", marks=pytest.mark.faults)])
def disturbed(request: pytest.FixtureRequest) -> Disturbed:
    """Each kind of end, for what holds after all of them."""
    found: Disturbed = request.getfixturevalue(request.param)
    return found


def stop(run_file: Path, files: RunFiles, after_step: int) -> Stopped:
    """Start the driver, interrupt it once a step has a line of metrics, and let it end."""
    with started(run_file) as process:
        wait_for_step(process, files, after_step)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    status = files.json("summary.json")["status"]
    return Stopped(process.returncode, stdout, stderr, files.steps(), status)


def abort(run_file: Path, files: RunFiles, after_step: int, how: int = signal.SIGTERM) -> Aborted:
    """The same with two signals in a row; waits for what the driver had started to end too."""
    with started(run_file) as process:
        wait_for_step(process, files, after_step)
        family = children_of(process.pid)
        start = time.monotonic()
        process.send_signal(how)
        time.sleep(0.1)
        process.send_signal(how)
        process.wait(timeout=DEADLINE_S)
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 30
        while alive(family) and time.monotonic() < deadline:
            time.sleep(0.2)
        stdout, stderr = process.communicate()
    manager = files.json("checkpoints/checkpoint_manager_snapshot.json")
    name = manager["latest_checkpoint_result"]["checkpoint_dir_name"]
    step = int(name.removeprefix("step-"))
    code, left = process.returncode, alive(family)
    return Aborted(code, stdout, stderr, files.steps(), seconds, left, step)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> RunFiles:
    """The same run at its own pace, at once."""
    run_file = write_run_file(place / "undisturbed")
    result = drive("run", run_file, "--set", "teacher.synthetic.delay_s=0")
    assert result.returncode == 0, result.stderr
    return RunFiles(place / "undisturbed" / "run")


def test_a_stopped_run_says_how_to_resume_and_exits_as_the_signal_asks(stopped: Disturbed) -> None:
    (end,) = stopped.ends
    assert end.returncode == 128 + signal.SIGINT
    assert "stopping: finishing the step, then a checkpoint" in end.stdout
    assert f"Stopped after step {end.steps[-1]}; resume with:" in end.stdout
    assert f"  python driver.py run {stopped.run_file}\n" in end.stdout
    assert end.stderr == ""
    assert end.status == "stopped"
    assert end.steps[-1] < NUM_STEPS // 2
    assert stopped.files.lines("metrics.discarded.jsonl") == []  # An orderly stop loses no step.


@pytest.mark.faults
def test_a_second_signal_ends_the_driver_at_once_with_all_it_started(ended: Disturbed) -> None:
    aborted, killed = ended.ends
    assert aborted.returncode == 128 + signal.SIGTERM
    assert aborted.seconds < 5
    assert "Traceback" not in aborted.stderr
    assert killed.returncode == -signal.SIGKILL
    assert aborted.left_behind == killed.left_behind == {}


@pytest.mark.faults
def test_an_abort_loses_the_steps_after_its_checkpoint(ended: Disturbed) -> None:
    assert all(end.registered_step < end.steps[-1] for end in ended.ends)
    gone = [[s for s in end.steps if s > end.registered_step] for end in ended.ends]
    lost = [line["step"] for line in ended.files.lines("metrics.discarded.jsonl")]
    assert lost == gone[0] + gone[1]


def test_the_same_command_goes_on_to_the_end(disturbed: Disturbed) -> None:
    assert disturbed.last.returncode == 0, disturbed.last.stderr
    assert disturbed.files.json("summary.json")["status"] == "completed"
    assert "] measuring the student before training" not in disturbed.last.stdout


def test_nothing_is_paid_for_twice(disturbed: Disturbed) -> None:
    assert disturbed.files.json("summary.json")["rows_asked"] == NUM_ROWS
    catalogue = TeacherStore(str(disturbed.files.folder.parent / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)


def test_every_row_was_trained_once_by_the_weights_that_were_kept(disturbed: Disturbed) -> None:
    files = disturbed.files
    assert files.steps() == list(range(1, NUM_STEPS + 1))
    assert sum(line["rows"] for line in files.lines("metrics.jsonl")) == NUM_ROWS
    ledger = files.json(f"checkpoints/step-{NUM_STEPS:08d}/ledger.json")
    assert (ledger["num_rows"], ledger["num_trained"]) == (NUM_ROWS, NUM_ROWS)
    summary = files.json("summary.json")
    assert summary["rows_trained"] == NUM_ROWS
    assert summary["evaluation_rows_asked"] == NUM_HELD_OUT  # Their answers were kept.


@pytest.mark.faults
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
