"""The plan of an epoch: which row is at which position, and which positions are left.

Pure arithmetic, imports no Ray. A position is a row's place in its epoch; ``group_rows``
consecutive positions are a group, the unit of shuffle, credit, Serve call and Ray Data block.

Legend: N rows of the epoch, G rows of a group.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


class Done(Protocol):
    """What the plan asks of a ledger."""

    def missing(self) -> Positions:
        """Positions neither trained nor dropped, ascending."""
        ...


def epoch_order(num_rows: int, seed: int, epoch: int, group_rows: int) -> Positions:
    """Row at each position of an epoch: int64 [N], a permutation that depends on the seed only.

    Groups of consecutive rows are permuted, and the rows within each group. Where G does not
    divide N the short group stays last, so that groups of positions are groups of rows: reading
    one touches one place of the prompt table.
    """
    if num_rows < 0 or group_rows <= 0:
        raise ValueError(
            f"num_rows ({num_rows}) must be 0 or more and group_rows ({group_rows}) above 0"
        )
    generator = np.random.default_rng([seed, epoch])
    num_full = num_rows // group_rows
    starts = generator.permutation(num_full).astype(np.int64) * group_rows
    within = np.tile(np.arange(group_rows, dtype=np.int64), (num_full, 1))
    within = generator.permuted(within, axis=1)
    short = generator.permutation(np.arange(num_full * group_rows, num_rows, dtype=np.int64))
    return np.concatenate([(starts[:, None] + within).reshape(-1), short])


def remaining_groups(num_rows: int, group_rows: int, ledger: Done) -> Iterator[Positions]:
    """Positions still to do, group by group in plan order; a finished group is left out.

    A group keeps its boundaries: what is done leaves a hole and nothing shifts.
    """
    missing = ledger.missing()
    if missing.size == 0:
        return
    assert missing[-1] < num_rows, f"position {missing[-1]} lies outside an epoch of {num_rows}"
    edges = np.flatnonzero(np.diff(missing // group_rows)) + 1
    # One after the other: the first of a million groups is not to wait for the others.
    start = 0
    for stop in edges:
        yield missing[start:stop]
        start = stop
    yield missing[start:]


class RoutedPlan:
    """The groups of several teachers, of which one may be asked before an earlier one of another.

    Each teacher's own groups stay in plan order, and none goes more than ``window`` rows beyond the
    first that still waits: so a teacher that is slow or away holds no other back for that long, and
    the student's mix is that of the prompts but for so many rows. What is offered depends on the
    groups that were taken before, and on nothing else: a source that runs again offers the same.
    """

    def __init__(self, groups: Sequence[Positions], teachers: Sequence[str], window: int) -> None:
        """teachers: of each group."""
        self._groups = groups
        self._window = window
        self._waiting: dict[str, deque[int]] = {}
        for number, name in enumerate(teachers):
            self._waiting.setdefault(name, deque()).append(number)

    def offers(self) -> list[tuple[int, int, str]]:
        """First position, rows and teacher of each group that may be the next, in plan order."""
        heads = sorted((queue[0], name) for name, queue in self._waiting.items() if queue)
        found = [(int(self._groups[n][0]), len(self._groups[n]), name) for n, name in heads]
        return [one for one in found if one[0] <= found[0][0] + self._window]

    def take(self, group: int) -> Positions:
        """The positions of an offered group, by its first one; it waits no longer."""
        for queue in self._waiting.values():
            if queue and self._groups[queue[0]][0] == group:
                return self._groups[queue.popleft()]
        raise AssertionError(f"no group that begins at {group} is offered")


def num_steps(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of one epoch; the last may be short."""
    return -(-num_rows // rows_per_step)


def step_of(position: int, rows_per_step: int) -> int:
    """Step that trains a position, from 0 within the epoch (``fixed`` order)."""
    return position // rows_per_step
