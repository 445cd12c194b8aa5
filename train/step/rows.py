"""Which rows make a step: this rank's share of each optimizer step.

Sits between the stream and the global step: blocks (one group of rows each, some dropped) come in,
the rows of one step go out. Pure Python: the blocks, the function that turns one into rows, and
the function that tells the coordinator a block was taken are given.

``fixed``: step s trains the rows at positions [s * rows_per_step, (s + 1) * rows_per_step),
whichever rank holds them. Positions ascend within a rank, so a rank holds all its rows of step s
once it sees a row of a later step, or the end. A dropped row leaves a hole; nothing shifts.

``arrival``: a rank takes its share of ``rows_per_step`` as rows come. The remainder of
``rows_per_step / world_size`` moves from rank to rank with the step: the stream deals every rank
the same number of rows, so with fixed unequal shares the low ranks would starve while the blocks
of the others, never taken, used up all credits.

Consumes: blocks of the stream. Waits for: the next block. Unblocked by: the stream, or its end.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, Protocol, TypeVar


class Positioned(Protocol):
    """What is needed of a row: its place in the epoch."""

    @property
    def position(self) -> int: ...


class TrainedRows(Protocol):
    """What is needed of the ledger: whether a position is trained or dropped."""

    def done(self, position: int) -> bool: ...


R = TypeVar("R", bound=Positioned)


class StepRows(Generic[R]):
    """This rank's rows of each step; call ``take`` with ascending step indices (from 0)."""

    def __init__(
        self,
        blocks: Iterable[Any],
        *,
        order: Literal["fixed", "arrival"],
        rows_per_step: int,
        rank: int,
        world_size: int,
        ledger: TrainedRows,
        to_rows: Callable[[Any], Sequence[R]],
        taken: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self._blocks: Iterator[Any] = iter(blocks)
        self._order = order
        self._rows_per_step = rows_per_step
        self._rank = rank
        self._world_size = world_size
        self._ledger = ledger
        self._to_rows = to_rows
        self._taken = taken
        self._held: deque[R] = deque()
        self._ended = False
        self._first: Future[Any] | None = None
        self.blocked_s = 0.0  # Of the last take: waiting for the stream's next block.
        self.total_s = 0.0  # Of the last take: all of it, unpacking included.

    def start(self) -> None:
        """Ask for the first block in a thread, so that the stream runs while this rank works."""
        if self._first is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="first-block")
            self._first = pool.submit(next, self._blocks, None)
            pool.shutdown(wait=False)

    def take(self, step: int) -> list[R]:
        """This rank's rows of ``step``; [] where it holds none. Waits until they are complete."""
        start = time.perf_counter()
        self.blocked_s = 0.0
        rows = self._take_fixed(step) if self._order == "fixed" else self._take_arrival(step)
        self.total_s = time.perf_counter() - start
        return rows

    @property
    def has_more(self) -> bool:
        """Whether rows may follow; certain in ``fixed`` order, and always once it is False."""
        return bool(self._held) or not self._ended

    def share(self, step: int) -> int:
        """Rows of ``step`` that are this rank's in ``arrival`` order; sums to rows_per_step."""
        size, remainder = divmod(self._rows_per_step, self._world_size)
        return size + ((self._rank - step) % self._world_size < remainder)

    def _take_fixed(self, step: int) -> list[R]:
        end = (step + 1) * self._rows_per_step
        while not self._ended and (not self._held or self._held[-1].position < end):
            self._pull()
        rows = []
        while self._held and self._held[0].position < end:
            rows.append(self._held.popleft())
        early = [row.position for row in rows if row.position < step * self._rows_per_step]
        if early:
            raise RuntimeError(
                f"rows at positions {early[:5]} came in step {step}, after their own step; the "
                "stream's order is not the plan's: use stream.order: arrival, or report this"
            )
        return rows

    def _take_arrival(self, step: int) -> list[R]:
        share = self.share(step)
        while not self._ended and len(self._held) < share:
            self._pull()
        return [self._held.popleft() for _ in range(min(share, len(self._held)))]

    def _pull(self) -> None:
        """Take one block off the stream, or note its end."""
        start = time.perf_counter()
        if self._first is not None:
            block, self._first = self._first.result(), None
        else:
            block = next(self._blocks, None)
        self.blocked_s += time.perf_counter() - start
        if block is None:
            self._ended = True
            return
        rows = self._to_rows(block)
        if not rows:
            return
        self._taken(len(rows))
        repeated = [row.position for row in rows if self._ledger.done(row.position)]
        if repeated:
            raise RuntimeError(
                f"rows at positions {repeated[:5]} came from the stream although this run has "
                "trained on them; nothing was trained twice: start the run again to resume"
            )
        self._held.extend(rows)
