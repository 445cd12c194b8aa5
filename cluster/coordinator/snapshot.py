"""`Snapshot`: what the coordinator knows of a run at one moment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Snapshot:
    """State of a run, for the live view, the exporters and the summary.

    Attributes:
        phases: (number, name) of the newest phases; the last one is the present.
        lives: Starts of the worker group so far.
        from_step: Step of the checkpoint that the present life began with.
        counters: Sums over all processes (``teacher_rows``, ``student_busy_s``, ...).
        rows_ahead: Rows that were asked for and that no worker has taken.
        max_rows_ahead: The bound of ``rows_ahead``.
        max_rows_ahead_seen: The most rows that were ahead so far.
        progress: Metrics of the newest step, from rank 0; empty before the first.
        evaluation: Figures of the newest evaluation, from rank 0; empty before the first.
        dropped: Rows of this epoch without a usable answer, by reason.
        filtered: Rows of this epoch that filters have rejected, by the filter's name.
        filtered_by_epoch: Rows that filters have rejected, by epoch, as far as this driver knows.
        outcome: ``completed`` or ``stopped``; None while the run goes on.
        error: The first error that a part of the run stopped with; None without one.
    """

    phases: tuple[tuple[int, str], ...] = ()
    lives: int = 0
    from_step: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    rows_ahead: int = 0
    max_rows_ahead: int = 0
    max_rows_ahead_seen: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)
    filtered_by_epoch: Mapping[int, int] = field(default_factory=dict)
    outcome: str | None = None
    error: str | None = None

    @property
    def step(self) -> int:
        """Finished optimizer steps, those before a resumption included."""
        return int(self.progress.get("step", self.from_step))
