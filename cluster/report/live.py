"""The live view: what the run does now, on a terminal as one panel, elsewhere as plain lines.

Consumes the coordinator's snapshots, which the driver's main thread polls; it asks nobody itself.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raystill.base import formatting
from raystill.cluster.coordinator.snapshot import Snapshot

PLAIN_EVERY_S = 10.0
WINDOW_S = 60.0
LEAST_S = 10.0
LONGEST_WINDOW_S = 180.0
PANEL_WIDTH = 78


class Pace:
    """Rates over the last seconds, from counters that only grow."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def add(self, now: float, totals: dict[str, float]) -> None:
        """Take the totals known at ``now`` (seconds of any steady clock)."""
        self._seen.append((now, totals))
        while self._seen and self._seen[0][0] < now - LONGEST_WINDOW_S:
            self._seen.popleft()

    def per_second(self, name: str) -> float | None:
        """Growth of one total over the last minute; None before it has grown for ten seconds.

        Totals jump by groups and steps, so the minute counts from its first jump; what came with
        that jump was made earlier.
        """
        now = self._seen[-1][0] if self._seen else 0.0
        jumps = [jump for jump in self._jumps(name) if jump[0] >= now - WINDOW_S]
        if not jumps:
            return 0.0 if self._jumps(name) else None
        start, before = jumps[0]
        if now - start < LEAST_S:
            return None
        return (self._seen[-1][1].get(name, 0.0) - before) / (now - start)

    def between_jumps(self, name: str) -> float | None:
        """Growth a second from the first to the newest jump known: steadier, slow to notice."""
        jumps = self._jumps(name)
        if len(jumps) < 2:
            return None
        (start, before), (newest, value) = jumps[0], jumps[-1]
        return (value - before) / (newest - start) if newest > start else None

    def _jumps(self, name: str) -> list[tuple[float, float]]:
        """When the total grew, and to what; oldest first."""
        jumps: list[tuple[float, float]] = []
        for moment, totals in self._seen:
            value = totals.get(name, 0.0)
            if not jumps or value != jumps[-1][1]:
                jumps.append((moment, value))
        return jumps[1:]  # The first is where the looking began, not a jump.


class LiveView:
    """Shows a run; a context manager. ``phases`` tells afterwards how long each phase took."""

    def __init__(
        self,
        total_rows: int,
        total_steps: int,
        run_path: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_rows = total_rows
        self.total_steps = total_steps
        self.run_path = formatting.path(run_path)
        self.console = console or Console(markup=False, emoji=False)
        self.pace = Pace()
        self.snapshot = Snapshot()
        self.first_evaluation: dict[str, Any] = {}
        self._clock = clock
        self._started = clock()
        self._phase, self._phase_began = "", self._started
        self._phase_first_step = 0
        self._phases_seen = 0
        self._phase_seconds: dict[str, float] = {}
        self._last_line = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> "LiveView":
        self._started = self._phase_began = self._clock()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self.panel)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._enter_phase("")

    def update(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot, and show it."""
        now = self._clock()
        self.snapshot = snapshot
        if snapshot.evaluation and not self.first_evaluation:
            self.first_evaluation = dict(snapshot.evaluation)
        self.pace.add(now, {**snapshot.counters, "steps": float(self.step)})
        begun = [p for p in snapshot.phases if p[0] > self._phases_seen]
        for number, phase in begun:  # Short ones begin and end between two snapshots.
            self._phases_seen = number
            self._enter_phase(phase)
            if self._live is None:
                self._print(phase)
        if self._live is None and self._phase and now - self._last_line >= PLAIN_EVERY_S:
            self._print(self.line())

    def note(self, text: str) -> None:
        """Say something once: a line of its own, above the panel on a terminal."""
        self._print(text)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds in each phase so far, in the order they began."""
        seconds = dict(self._phase_seconds)
        if self._phase:
            spent = self._clock() - self._phase_began
            seconds[self._phase] = seconds.get(self._phase, 0.0) + spent
        return seconds

    @property
    def step(self) -> int:
        """Finished optimizer steps, those before a resumption included."""
        return int(self.snapshot.progress.get("step") or 0)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the view was entered."""
        return self._clock() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds the remaining steps will take at the pace of the last minutes."""
        pace = self.pace.between_jumps("steps")
        if not pace or self.step >= self.total_steps:
            return None
        return (self.total_steps - self.step) / pace

    def line(self) -> str:
        """The state in one plain line."""
        progress = self.snapshot.progress
        if self.step == self._phase_first_step:  # No steps in this phase, or none yet.
            spent = formatting.duration(self._clock() - self._phase_began)
            answered = int(self._counter("teacher_rows"))
            rows = f"  {formatting.plural(answered, 'row')} answered" if answered else ""
            return f"{self._phase} ({spent}){rows}"
        width = len(str(self.total_steps))
        parts = [
            f"{self._phase}  step {self.step:>{width}}/{self.total_steps}",
            f"loss {formatting.figure(progress.get('loss'))}",
            f"teacher {self._rates('teacher_rows', 'teacher_response_tokens')}",
            f"student {self._rates('student_rows', 'student_tokens')}",
            f"in flight {self._in_flight()}",
        ]
        if self.first_evaluation:
            parts.append(f"held-out KL {self._held_out('kl_nats_per_token')}")
        if self.left_s is not None:
            parts.append(f"left {formatting.duration(self.left_s)}")
        return "  ".join(parts)

    def panel(self) -> RenderableType:
        """The state as the terminal's panel."""
        progress = self.snapshot.progress
        top = Table.grid(expand=True)
        top.add_column()
        top.add_column(justify="right")
        phase = self._phase or "starting"
        spent = formatting.duration(self._clock() - self._phase_began)
        top.add_row(Text(phase, style="bold"), Text(spent, style="dim"))
        parts: list[RenderableType] = [top, self._bar(), Text(""), self._roles(), Text("")]
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", width=16)
        facts.add_column()
        facts.add_row("rows in flight", self._in_flight(" of "))
        facts.add_row("waiting for rows", self._waiting())
        facts.add_row("loss", formatting.figure(progress.get("loss")))
        facts.add_row("held-out KL", self._held_out("kl_nats_per_token", " nats/token"))
        facts.add_row("held-out top-1", self._held_out("top1_agreement"))
        if self.snapshot.dropped:
            dropped = formatting.reasons(self.snapshot.dropped)
            facts.add_row("rows dropped", Text(dropped, style="yellow"))
        if self.snapshot.filtered:
            facts.add_row("rows filtered", formatting.reasons(self.snapshot.filtered))
        parts.append(facts)
        return Panel(
            Group(*parts),
            title=Text(f"Raystill  {self.run_path}", overflow="ellipsis", no_wrap=True),
            title_align="left",
            subtitle=Text(f"{formatting.duration(self.elapsed_s)} so far"),
            subtitle_align="right",
            border_style="dim",
            padding=(0, 1),
            width=min(PANEL_WIDTH, self.console.width),
        )

    def _bar(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(width=15)
        grid.add_column(ratio=1)
        grid.add_column(width=18, justify="right")
        left = "" if self.left_s is None else f"about {formatting.duration(self.left_s)} left"
        grid.add_row(
            f"step {self.step} of {self.total_steps}",
            ProgressBar(
                total=max(1, self.total_steps),
                completed=self.step,
                complete_style="cyan",
                finished_style="green",
            ),
            Text(left, style="dim"),
        )
        return grid

    def _roles(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", width=16, style="dim")
        for heading in ("rows", "rows/s", "tokens/s"):
            table.add_column(heading, justify="right", width=10)
        for role, rows, tokens in (
            ("teacher", "teacher_rows", "teacher_response_tokens"),
            ("student", "student_rows", "student_tokens"),
        ):
            table.add_row(
                role,
                formatting.count(self._counter(rows)),
                formatting.rate(self.pace.per_second(rows)),
                formatting.rate(self.pace.per_second(tokens)),
            )
        return table

    def _counter(self, name: str) -> float:
        return self.snapshot.counters.get(name, 0.0)

    def _rates(self, rows: str, tokens: str) -> str:
        return (
            f"{formatting.rate(self.pace.per_second(rows)):>4} rows/s "
            f"{formatting.rate(self.pace.per_second(tokens)):>5} tokens/s"
        )

    def _in_flight(self, of: str = "/") -> str:
        ahead, bound = self.snapshot.rows_ahead, self.snapshot.max_rows_ahead
        return f"{formatting.count(ahead)}{of}{formatting.count(bound)}"

    def _waiting(self) -> str:
        """The share of the newest step that the student spent waiting for rows."""
        progress = self.snapshot.progress
        waited, worked = progress.get("data_wait_s"), progress.get("student_s")
        if waited is None or worked is None or waited + worked <= 0:
            return formatting.NOTHING
        return f"{formatting.share(waited / (waited + worked))} of the last step"

    def _held_out(self, name: str, unit: str = "") -> str:
        """First and newest value of a held-out figure."""
        latest = self.snapshot.evaluation
        before, now = self.first_evaluation.get(name), latest.get(name)
        if before is None and now is None:
            return formatting.NOTHING
        if before is None or latest.get("step") == self.first_evaluation.get("step"):
            return f"{formatting.figure(now if before is None else before)}{unit}"
        return f"{formatting.figure(before)} → {formatting.figure(now)}{unit}"

    def _enter_phase(self, phase: str) -> None:
        self._phase_seconds = self.phases
        self._phase, self._phase_began = phase, self._clock()
        self._phase_first_step = self.step

    def _print(self, text: str) -> None:
        self._last_line = self._clock()
        line = Text(f"[{formatting.duration(self.elapsed_s):>7}] {text}")
        self.console.print(line, soft_wrap=True, highlight=False)
