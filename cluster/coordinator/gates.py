"""What the parts of a run wait for once, as the driver and the teacher's tasks open it.

A part of the coordinator, without Ray: its event loop is the only one to touch it.
"""

import asyncio


class Gates:
    """Three gates: the stream may start, the held-out rows are there, training may begin."""

    def __init__(self) -> None:
        self._answering = asyncio.Event()
        self._held_out = asyncio.Event()
        self._may_train = asyncio.Event()
        self._may_train.set()
        self._holds = 0

    async def rows_come(self) -> None:
        """The teacher answers, or the store does: the stream may start."""
        self._answering.set()

    async def wait_rows_come(self) -> None:
        """Wait until then: starting the stream takes processors from a teacher that is loading."""
        await self._answering.wait()

    async def wait_held_out(self) -> None:
        """Wait until the held-out rows are answered."""
        await self._held_out.wait()

    async def hold_training(self) -> None:
        """No step before its ``release_training``: a teacher is still being probed."""
        self._holds += 1
        self._may_train.clear()

    async def release_training(self) -> None:
        """The probe of a teacher is content."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._may_train.set()

    async def wait_may_train(self) -> None:
        """Wait until nothing holds the first step back."""
        await self._may_train.wait()
