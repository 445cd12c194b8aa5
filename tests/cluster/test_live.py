"""The live view: calm plain lines without a terminal, one panel on one; and where chatter goes."""

import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raystill.base.logs import tail
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.live import LiveView, Pace

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


BEGUN: list[str] = []
"""Phases of all tests so far: a phase's number is its place in it."""


def snapshot(phase: str, step: int = 0, **more: Any) -> Snapshot:
    progress = {"step": step, "loss": 2.5, "data_wait_s": 1.0, "student_s": 3.0} if step else {}
    counters = {
        "teacher_rows": step * 16 + 32,
        "teacher_response_tokens": (step * 16 + 32) * 10,
        "student_rows": step * 16,
        "student_tokens": step * 160,
    }
    if BEGUN[-1:] != [phase]:
        BEGUN.append(phase)
    phases = ((len(BEGUN), phase),) if phase else ()
    base: dict[str, Any] = {"phases": phases, "counters": counters, "progress": progress}
    return Snapshot(**base | {"rows_ahead": 32, "max_rows_ahead": 64} | more)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(clock: Clock) -> LiveView:
    console = Console(file=io.StringIO(), width=80)
    return LiveView(320, 20, "runs/demo", console=console, clock=clock)


def printed(view: LiveView) -> list[str]:
    assert isinstance(view.console.file, io.StringIO)
    return view.console.file.getvalue().splitlines()


def test_each_phase_is_said_once_when_it_begins(plain: LiveView, clock: Clock) -> None:
    with plain:
        for second, phase in enumerate(["loading", "loading", "training", "training", "saving"]):
            clock.now = float(second)
            plain.update(snapshot(phase))
    assert [line.split("] ")[1] for line in printed(plain)] == ["loading", "training", "saving"]


def test_within_a_phase_a_line_comes_every_ten_seconds(plain: LiveView, clock: Clock) -> None:
    with plain:
        for tick in range(100):
            clock.now = tick * 0.5
            plain.update(snapshot("training", step=1 + tick // 10))
    lines = printed(plain)
    assert len(lines) == 5
    assert "step  3/20" in lines[1]
    assert "loss 2.500" in lines[1]


def test_lines_are_never_wrapped(plain: LiveView, clock: Clock) -> None:
    with plain:
        plain.update(snapshot("training", step=1))
        clock.now = 30.0
        evaluation = {"step": 0, "kl_nats_per_token": 9.0}
        plain.update(snapshot("training", step=5, evaluation=evaluation))
    assert len(printed(plain)) == 2
    assert "held-out KL 9.000" in printed(plain)[1]


def test_held_out_kl_is_shown_from_the_first_to_the_newest(plain: LiveView) -> None:
    first = {"step": 0, "kl_nats_per_token": 9.0}
    plain.update(snapshot("measuring", evaluation=first))
    plain.update(snapshot("training", 11, evaluation=first))
    plain.update(snapshot("training", 12, evaluation={"step": 12, "kl_nats_per_token": 4.0}))
    assert "9.000 → 4.000" in plain.line()


def test_time_left_follows_the_pace_of_steps(plain: LiveView, clock: Clock) -> None:
    for tick in range(21):
        clock.now = 60.0 + tick  # A minute of loading does not count.
        plain.update(snapshot("training", step=tick // 2))
    assert plain.left_s == pytest.approx(20.0)
    plain.update(snapshot("training", step=20))
    assert plain.left_s is None


def test_a_first_step_makes_no_pace_yet(plain: LiveView, clock: Clock) -> None:
    plain.update(snapshot("training"))
    clock.now = 5.0
    plain.update(snapshot("training", step=1))
    assert plain.left_s is None
    assert "left" not in plain.line()


def test_rates_are_of_the_last_minute_and_fall_when_nothing_comes() -> None:
    pace = Pace()
    for second in range(41):
        pace.add(float(second), {"rows": 8.0 * (second // 4)})
    assert pace.per_second("rows") == pytest.approx(2.0)
    assert pace.per_second("never") is None
    for second in range(41, 90):
        pace.add(float(second), {"rows": 80.0})
    slower = pace.per_second("rows")
    assert slower is not None
    assert 0 < slower < 1
    pace.add(150.0, {"rows": 80.0})
    assert pace.per_second("rows") == 0


def test_a_burst_at_the_start_is_no_rate() -> None:
    pace = Pace()
    pace.add(0.0, {})
    for tick in range(8):
        pace.add(20.0 + tick * 0.1, {"rows": 8.0 * (tick + 1)})
    assert pace.per_second("rows") is None


def test_a_phase_without_steps_shows_its_time_and_no_old_rates(
    plain: LiveView, clock: Clock
) -> None:
    plain.update(snapshot("training", step=5))
    clock.now = 10.0
    plain.update(snapshot("measuring", step=5))
    clock.now = 20.0
    assert plain.line() == "measuring (0:10)  112 rows answered"


def test_phases_tell_how_long_each_took(plain: LiveView, clock: Clock) -> None:
    with plain:
        for moment, phase in ((0.0, "loading"), (7.0, "training"), (20.0, "measuring")):
            clock.now = moment
            plain.update(snapshot(phase))
        clock.now = 22.0
        plain.update(snapshot("training", step=2))
        clock.now = 30.0
        assert plain.phases["training"] == pytest.approx(21.0)
    assert plain.phases == {"loading": 7.0, "training": 21.0, "measuring": 2.0}


def test_a_note_is_printed_at_once(plain: LiveView) -> None:
    plain.note("stopping: finishing the step")
    assert "stopping: finishing the step" in printed(plain)[0]


def test_square_brackets_are_printed_as_they_are(plain: LiveView) -> None:
    plain.note("[bold] is no markup")
    assert "[bold] is no markup" in printed(plain)[0]


def test_the_panel_fits_its_width_and_names_what_matters(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    view = LiveView(320, 20, "runs/demo", console=console, clock=clock)
    for step in range(12):
        clock.now = step * 5.0
        view.update(snapshot("training", step, dropped={"too_long": 2}))
    with console.capture() as captured:
        console.print(view.panel())
    lines = captured.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for words in ("training", "step 11 of 20", "teacher", "student", "32 of 64", "2.500"):
        assert words in text
    assert "2 (too_long 2)" in text
    assert "25 % of the last step" in text


def test_an_empty_snapshot_can_be_shown(plain: LiveView) -> None:
    with plain:
        plain.update(Snapshot())
        plain.console.print(plain.panel())
    assert plain.phases == {}


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )


def test_redirected_output_goes_to_the_file_children_included(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "teacher-0.log"
    done = in_a_process(
        "import os, subprocess, sys\n"
        "from raystill.base.logs import redirect_output\n"
        "print('before', flush=True)\n"
        f"redirect_output({str(file)!r})\n"
        "print('from python')\n"
        "os.write(2, b'from native code\\n')\n"
        "subprocess.run(['echo', 'from a child'], check=True)\n"
    )
    assert done.stdout == "before\n"
    assert done.stderr == ""
    for words in ("from python", "from native code", "from a child"):
        assert words in file.read_text()


def test_every_line_of_a_worker_says_run_role_node_and_step() -> None:
    done = in_a_process(
        "import logging\n"
        "from raystill.base.logs import log_labelled, run_name, say_where\n"
        "log_labelled(run_name('s3://bucket/runs/mine/'), 'student-1')\n"
        "logging.getLogger('raystill.train').info('loading')\n"
        "say_where(step=12)\n"
        "logging.getLogger('transformers').warning('old name')\n"
    )
    first, second = done.stderr.splitlines()
    where = f"run=mine role=student-1 node={socket.gethostname()}"
    assert first.endswith(f" INFO {where} raystill.train: loading")
    assert second.endswith(f" WARNING {where} step=12 transformers: old name")


def test_a_quiet_driver_keeps_the_terminal_for_people(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "driver.log"
    done = in_a_process(
        "import logging, os, sys, warnings\n"
        "from raystill.base.logs import quiet_driver\n"
        f"restore = quiet_driver({str(file)!r})\n"
        "logging.getLogger('ray.serve').warning('chatter of serve')\n"
        "warnings.warn('an old name is used', FutureWarning)\n"
        "os.write(2, b'native chatter\\n')\n"
        "print('for people')\n"
        "print('an error', file=sys.stderr)\n"
        "restore()\n"
        "os.write(2, b'native again\\n')\n"
        "print('still there', file=sys.stderr)\n"
    )
    assert done.stdout == "for people\n"
    assert done.stderr == "an error\nnative again\nstill there\n"
    for words in ("chatter of serve", "an old name is used", "native chatter"):
        assert words in file.read_text()
    assert "for people" not in file.read_text()


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("\n".join(str(i) for i in range(100)))
    assert tail(file, 2) == "98\n99"
    assert tail(tmp_path / "missing.log") == ""
