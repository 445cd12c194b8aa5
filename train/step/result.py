"""What one optimizer step did, and how old the rows were that it trained. Pure Python and numpy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raystill.train.batch.rows import Row


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank, except the seconds.

    Attributes:
        step: Number of the step, from 0.
        trained: False for a step that leaves the student as it is: one without weight (no rows, or
            no token with a loss), or one that is not finite.
        rows: Rows of all ranks.
        tokens: Tokens with a loss, of all ranks.
        any_more: Whether a rank has, or expects, rows of later steps.
        any_stop: Whether a rank was asked to stop.
        lr: The learning rate.
        loss: Nats per unit of weight, the weighted sum of the terms.
        objective: Each term alone, nats per unit of weight.
        grad_norm: Norm of the gradient before clipping.
        padding_fraction: Share of the input positions that are padding or dummies.
        teacher_tail_mass: The teacher's mean probability of the tail; None for ``text``.
        student_tail_mass: The student's mean probability of the tail; None for ``text``.
        floored_tokens: As in `objective.ObjectiveSums`, of all ranks.
        idle_share: Share of the ranks' time in the passes for which they wait for one with more
            tokens, by `balance.idle_share`.
        others_wait_s: Seconds that this rank had its rows and waited for the others to have theirs.
        student_s: Seconds from the moment that all ranks had their rows.
        not_finite: What is not finite, for a step that is skipped because of it; else None.
        staleness: Of the rows that the student wrote, how many were written by weights 0, 1, 2, ...
            steps old; the last number counts all older ones. Empty where it writes none.
        token_staleness: The same of the tokens of these rows, each by the weights that wrote it.
    """

    step: int
    trained: bool
    rows: int
    tokens: int
    any_more: bool
    any_stop: bool
    lr: float
    loss: float | None = None
    objective: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    padding_fraction: float = 0.0
    teacher_tail_mass: float | None = None
    student_tail_mass: float | None = None
    floored_tokens: int | None = None
    idle_share: float = 0.0
    others_wait_s: float = 0.0
    student_s: float = 0.0
    not_finite: str | None = None
    staleness: tuple[int, ...] = ()
    token_staleness: tuple[int, ...] = ()

    def metrics(self) -> dict[str, Any]:
        """The fields of this step's line of metrics.jsonl; terms are named ``objective/<term>``."""
        names = ["step", "loss", "grad_norm", "lr", "rows", "tokens", "student_s"]
        names += ["padding_fraction", "idle_share", "others_wait_s"]
        names += ["teacher_tail_mass", "student_tail_mass"]
        names += [n for n in ("floored_tokens", "not_finite") if getattr(self, n) is not None]
        terms = {f"objective/{name}": value for name, value in self.objective.items()}
        ages = {f"staleness/{age}": rows for age, rows in enumerate(self.staleness) if rows}
        ages |= {f"token_staleness/{age}": n for age, n in enumerate(self.token_staleness) if n}
        written = {"student_written_rows": sum(self.staleness)} if self.staleness else {}
        return {name: getattr(self, name) for name in names} | terms | written | ages


def staleness(step: int, rows: Sequence[Row], num_ages: int) -> list[int]:
    """Rows by the age of the weights that wrote them, in steps, [num_ages]; the last is "or more".

    Rows that later weights wrote (those of lost steps, from the store) count as of age 0.
    """
    ages = [0] * num_ages
    for row in rows:
        if row.policy_version is not None and num_ages:
            ages[min(max(0, step - row.policy_version), num_ages - 1)] += 1
    return ages


def token_staleness(step: int, rows: Sequence[Row], num_ages: int) -> list[int]:
    """As `staleness`, of the response tokens: each by the weights that wrote it."""
    ages = np.zeros(num_ages, np.int64)
    for row in rows:
        if row.token_versions is not None and num_ages:
            old = np.clip(step - row.token_versions.astype(np.int64), 0, num_ages - 1)
            ages += np.bincount(old, minlength=num_ages)
    return ages.tolist()
