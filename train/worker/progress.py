"""What a run has learned so far, as one rank knows it: steps, ledger, records.

Each rank notes its own rows; at a checkpoint the others' notes are moved into rank 0's, whose
ledger then covers all ranks. Imports no Ray; ``coordinator`` is an actor's handle.
"""

import logging
import time
from typing import Any

from raystill.base.errors import RunError
from raystill.base.records import MetricsLog
from raystill.base.run_folder import METRICS
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import num_steps
from raystill.run import Run
from raystill.train.batch.rows import Row
from raystill.train.step.ranks import Ranks
from raystill.train.step.result import StepResult
from raystill.train.step.rows import StepRows
from raystill.train.step.step import NON_FINITE_REMEDY, NonFiniteLossError

logger = logging.getLogger(__name__)


class Progress:
    """Finished steps and trained rows of one rank.

    Attributes:
        step: Finished optimizer steps, and so the index of the next one.
        epoch_step: Those of the running epoch.
        total_steps: Steps of the whole run.
        ledger: Positions of the running epoch that are trained or dropped.
        skipped_steps: Steps that left the student as it is, also those of ``non_finite_steps``.
        non_finite_steps: Steps skipped because their loss or gradient norm was not finite.
        metrics: Rank 0's metrics.jsonl; None on the others.
    """

    def __init__(self, run: Run, ranks: Ranks) -> None:
        config, folder = run.config, run.folder
        training = config.training
        self.step = self.epoch = self.epoch_step = self.rows_trained = 0
        self.skipped_steps = self.non_finite_steps = 0
        self.ledger = Ledger(run.num_rows)
        self.metrics = MetricsLog(folder, METRICS) if ranks.first else None
        self._steps_each = num_steps(run.num_rows, training.rows_per_step)
        self.total_steps = self._steps_each * training.epochs
        self._first = ranks.first
        self._world_size = ranks.world_size
        self._epochs = training.epochs
        self._most_non_finite = training.skip_non_finite
        self._coordinator = run.coordinator
        self._fixed_order = config.stream.order == "fixed"
        self._newly_trained: list[int] = []

    @property
    def in_last_epoch(self) -> bool:
        """Whether no epoch follows this one."""
        return self.epoch + 1 >= self._epochs

    def account(self, result: StepResult, mine: list[Row], rows: StepRows[Row]) -> None:
        """Note one step: ``mine`` are this rank's rows of it, ``rows`` knows how long they took.

        The rows of a skipped step count as trained: they are not asked for again. Raises
        NonFiniteLossError, on every rank, where more steps were not finite than may be skipped.
        """
        positions = [row.position for row in mine]
        self.ledger.mark_trained(positions)
        self._newly_trained += positions
        self.rows_trained += result.rows
        self.skipped_steps += not result.trained
        if result.rows or self._fixed_order:
            self.step += 1  # In arrival order an empty round is no step: no row was due in it.
            self.epoch_step += 1
        counters = {"student_busy_s": result.student_s, "student_wait_s": rows.blocked_s}
        idle_s = result.others_wait_s + result.idle_share * result.student_s
        counters["student_idle_s"] = idle_s
        if self.metrics is not None:
            counters |= {"student_rows": result.rows, "student_tokens": result.tokens}
            self._record(self.metrics, result, rows)
        self._coordinator.add.remote(counters)
        if result.not_finite is not None:
            self._skip_non_finite(result.not_finite)

    def _skip_non_finite(self, what: str) -> None:
        """Count a step that was not finite. All ranks have the same count."""
        self.non_finite_steps += 1
        if self.non_finite_steps > self._most_non_finite:
            raise NonFiniteLossError(
                f"{what}; training.skip_non_finite is {self._most_non_finite}, and so many steps "
                f"were skipped before; {NON_FINITE_REMEDY}"
            )
        if self._first:
            logger.warning(
                "%s: the step was skipped (%d of at most %d, training.skip_non_finite)",
                what,
                self.non_finite_steps,
                self._most_non_finite,
            )

    def _record(self, metrics: MetricsLog, result: StepResult, rows: StepRows[Row]) -> None:
        """Rank 0's line of metrics.jsonl; the waits in it are rank 0's own.

        ``data_wait_s``: seconds until this rank had its rows. ``teacher_wait_s``: the part of it
        that was spent waiting for the stream; the rest is unpacking.
        """
        seconds = rows.total_s + result.student_s
        line = result.metrics() | {
            "step": self.step,
            "epoch": self.epoch,
            "time": time.time(),
            "workers": self._world_size,
            "tokens_per_s": result.tokens / seconds if seconds else 0.0,
            "teacher_wait_s": rows.blocked_s,
            "data_wait_s": rows.total_s,
        }
        metrics.append(line)  # A skipped step has one too; its loss is null.
        totals = {
            "total_steps": self.total_steps,
            "rows_total": self.ledger.num_rows * self._epochs,
            "rows_trained": self.rows_trained,
            "skipped_steps": self.skipped_steps,
        }
        self._coordinator.progress.remote(line | totals)

    def hand_over(self) -> dict[str, Any]:
        """What this rank has noted since the last call, for rank 0."""
        part: dict[str, Any] = {"trained": self._newly_trained}
        self._newly_trained = []
        return part

    def take_over(self, parts: list[dict[str, Any]], dropped: dict[int, str]) -> dict[str, Any]:
        """On rank 0: add the other ranks' ``hand_over`` and the dropped positions.

        Returns the ``Snapshot`` fields that are this object's to fill.
        """
        for part in parts[1:]:
            self.ledger.mark_trained(part["trained"])
        self.ledger.mark_dropped(dropped)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "ledger": self.ledger.to_dict(),
            "extra": {
                "epoch_step": self.epoch_step,
                "rows_trained": self.rows_trained,
                "skipped_steps": self.skipped_steps,
                "non_finite_steps": self.non_finite_steps,
            },
        }

    def begin_epoch(self, epoch: int) -> None:
        """Start an epoch of which nothing is trained."""
        self.epoch, self.epoch_step = epoch, 0
        self._follow_plan()
        self.ledger = Ledger(self.ledger.num_rows)
        self._newly_trained = []

    def restore(self, step: int, epoch: int, ledger: dict[str, Any], extra: dict[str, Any]) -> None:
        """Go on from a checkpoint's fields."""
        self.step, self.epoch = step, epoch
        self.ledger = Ledger.from_dict(ledger)
        self.epoch_step = extra["epoch_step"]
        self.rows_trained = extra["rows_trained"]
        self.skipped_steps = extra["skipped_steps"]
        self.non_finite_steps = extra.get("non_finite_steps", 0)  # Earlier versions had none.
        self._follow_plan()

    def _follow_plan(self) -> None:
        """Count the steps that had no row at an epoch's end, as the plan does.

        By it the source of rows knows how new the weights can be that a row may need.
        """
        if self._fixed_order:
            self.step = max(self.step, self.epoch * self._steps_each + self.epoch_step)

    def discard_later_records(self) -> None:
        """Move aside the metrics of steps that will be trained again."""
        if self.metrics is not None:
            self.metrics.discard_beyond(self.step)

    def require_all_done(self) -> None:
        """RunError where the stream ended before every row was trained or dropped (rank 0)."""
        left = self.ledger.missing()
        if len(left):
            raise RunError(
                f"the stream ended, but {len(left)} of {self.ledger.num_rows} rows were neither "
                f"trained nor dropped (first positions {left[:5].tolist()}); the student was not "
                "written; start the run again to train them"
            )
