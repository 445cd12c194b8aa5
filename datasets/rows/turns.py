"""Turns: rows or questions that go beside each other, and such as go alone.

Where it sits: an engine lets its rows in by it (``serve/engine/vllm.py``), and an asking process
its questions (``stream/teacher_calls.py``). *Waits for* those that were let in before. *Unblocked
by* their end, or by their being cancelled.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

ALONE_IN_A_ROW = 8
"""How many go alone, one after another, before those that wait to go beside each other are let in.

To go alone an engine has to be empty, and emptying it leaves half of its places empty for as long
as a row takes. One at a time would cost that for each.
"""

Turn = asyncio.Future[None]


class Turns:
    """Lets in what goes beside each other, and what goes alone, fairly.

    Whoever is to go alone waits for those that are in, and nobody else is let in before. When
    `ALONE_IN_A_ROW` have gone alone, all that wait to go beside each other are let in, and then
    the next ones alone. So neither kind waits for ever, however many come of the other; within a
    kind, who came first is first. Nothing is awaited to leave, so a caller may be cancelled at any
    point, also twice.
    """

    def __init__(self) -> None:
        self._num_beside = 0
        self._is_alone = False
        self._left = ALONE_IN_A_ROW
        self._beside = deque[Turn]()
        self._alone = deque[Turn]()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """A turn that others may share."""
        await self._wait(self._beside, self._leave_others)
        try:
            yield
        finally:
            self._leave_others()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A turn that nobody shares."""
        await self._wait(self._alone, self._leave)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, line: deque[Turn], leave: Callable[[], None]) -> None:
        turn: Turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in line:
                    line.remove(turn)
                self._let_in()  # Others may have waited for this one to have its turn.
            else:  # It came in the same moment.
                leave()
            raise

    def _leave_others(self) -> None:
        self._num_beside -= 1
        self._let_in()

    def _leave(self) -> None:
        self._is_alone = False
        self._let_in()

    def _let_in(self) -> None:
        """Give their turns to those that may go now."""
        for line in (self._alone, self._beside):
            while line and line[0].cancelled():
                line.popleft()
        if self._is_alone:
            return
        if self._alone and (self._left > 0 or not self._beside):
            if not self._num_beside:
                self._is_alone = True
                self._left -= 1
                self._alone.popleft().set_result(None)
            return
        self._left = ALONE_IN_A_ROW
        while self._beside:
            turn = self._beside.popleft()
            if not turn.cancelled():
                self._num_beside += 1
                turn.set_result(None)
