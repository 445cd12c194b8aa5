"""The rows of each optimizer step that this rank trains on.

Between the stream and the step: blocks of rows come in, the rows of one step go out. Some rows of a
block may have been dropped. Pure Python: it knows blocks, ledger and coordinator only by what it is
given.

``stream.order: fixed``: step s trains the rows at positions [s * rows_per_step,
(s + 1) * rows_per_step), on whichever rank they are. The positions that a rank gets ascend, so it
has all its rows of step s when it sees the last of them, a row of a later step, or the end. The
last step of an epoch takes the stream to its end. A dropped row is missing from its step; no
other row takes its place.

``stream.order: arrival``: a rank takes its share of ``rows_per_step`` as rows come. If
``rows_per_step`` is not a multiple of the number of ranks, the ranks with one row more change with
the step. The stream gives every rank the same number of rows. If the same ranks always took more,
they would run out of rows, while the blocks that the other ranks never take would use up the
credits of the stream, by which it may be ahead of training.

Consumes: blocks of the stream. Waits for: the next block. Unblocked by: the stream, or its end.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, Protocol, TypeVar


class Positioned(Protocol):
    """A row, as far as this module uses it: its place in the order of the epoch, from 0."""

    @property
    def position(self) -> int: ...


class TrainedRows(Protocol):
    """The ledger, as far as this module uses it: the number of positions of the epoch, and whether
    one is trained or dropped.
    """

    @property
    def num_rows(self) -> int: ...

    def done(self, position: int) -> bool: ...


R = TypeVar("R", bound=Positioned)


class StepRows(Generic[R]):
    """This rank's rows of each step. ``take`` is called with ascending steps, from 0 in each epoch.

    Attributes:
        blocked_s: Seconds that the last ``take`` waited for the stream's next block.
        total_s: Seconds of the last ``take``, with the unpacking of blocks.
    """

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
        """blocks: the stream, as this rank gets it. to_rows: unpacks a block. taken: is called with
        the number of rows of each block that was taken, so that the stream may deliver more.
        """
        self._blocks: Iterator[Any] = iter(blocks)
        self._order = order
        self._rows_per_step = rows_per_step
        self._rank = rank
        self._world_size = world_size
        self._ledger = ledger
        self._to_rows = to_rows
        self._taken = taken
        self._waiting: deque[R] = deque()  # Taken off the stream, and not yet given to a step.
        self._ended = False
        self._first: Future[Any] | None = None
        self.blocked_s = 0.0
        self.total_s = 0.0

    def start(self, ready: Callable[[], object] = lambda: None) -> None:
        """Asks for the first block in a thread, so that the stream starts while this rank works.

        ready: returns as soon as it may.
        """

        def first_block() -> Any:
            ready()
            return next(self._blocks, None)

        if self._first is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="first-block")
            self._first = pool.submit(first_block)
            pool.shutdown(wait=False)  # The thread ends after its only task.

    @property
    def begun(self) -> bool:
        """Whether the first block is there, so that ``take`` has something to begin with."""
        return self._first is None or self._first.done()

    def take(self, step: int) -> list[R]:
        """This rank's rows of ``step``, possibly none. Waits until it has all of them.

        Raises RuntimeError where a row is in the wrong place, or was trained already.
        """
        start = time.perf_counter()
        self.blocked_s = 0.0
        rows = self._take_fixed(step) if self._order == "fixed" else self._take_arrival(step)
        self.total_s = time.perf_counter() - start
        return rows

    @property
    def has_more(self) -> bool:
        """Whether this rank may have rows of later steps.

        False is certain. Where it is True, the stream may turn out to have ended, or to have
        dropped all that was left.
        """
        return bool(self._waiting) or not self._ended

    def share(self, step: int) -> int:
        """Number of rows that this rank takes for ``step`` in ``arrival`` order.

        Over all ranks these sum to ``rows_per_step``.
        """
        size, remainder = divmod(self._rows_per_step, self._world_size)
        return size + ((self._rank - step) % self._world_size < remainder)

    def _take_fixed(self, step: int) -> list[R]:
        end = (step + 1) * self._rows_per_step
        last = end - 1 if end < self._ledger.num_rows else end  # Of the last step: until the end.
        while not self._ended and (not self._waiting or self._waiting[-1].position < last):
            self._pull()
        rows = []
        while self._waiting and self._waiting[0].position < end:
            rows.append(self._waiting.popleft())
        late = [row.position for row in rows if row.position < step * self._rows_per_step]
        if late:
            raise RuntimeError(
                f"rows at positions {late[:5]} came in step {step}, after their own step: the "
                "stream did not keep the order of the plan; set stream.order: arrival, or report "
                "this"
            )
        return rows

    def _take_arrival(self, step: int) -> list[R]:
        share = self.share(step)
        while not self._ended and len(self._waiting) < share:
            self._pull()
        return [self._waiting.popleft() for _ in range(min(share, len(self._waiting)))]

    def _pull(self) -> None:
        """Takes one block off the stream, or notes the stream's end."""
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
        self._waiting.extend(rows)
