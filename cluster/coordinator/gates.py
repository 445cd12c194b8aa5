"""What the parts of a run wait for once, as the driver and the teacher's tasks open it.

A part of the coordinator, without Ray: its event loop is the only one to touch it.
"""

import asyncio


class Gates:
    """Three gates: the stream may start, the held-out rows are there, the student may be saved.

    The first and the last are open until they are held.
    """

    def __init__(self) -> None:
        self._may_stream = asyncio.Event()
        self._may_stream.set()
        self._teacher_answers = asyncio.Event()
        self._held_out = asyncio.Event()
        self._may_save = asyncio.Event()
        self._may_save.set()
        self._holds = 0

    async def hold_stream(self) -> None:
        """No stream before a ``release_stream``: its processes would take processors from a teacher
        and a student that are both loading, for answers that are not there yet.
        """
        self._may_stream.clear()

    async def release_stream(self) -> None:
        """A student is loaded, and leaves its processors to the stream."""
        self._may_stream.set()

    async def teacher_answers(self) -> None:
        """A teacher is up: whatever waits for one may go on."""
        self._teacher_answers.set()
        self._may_stream.set()

    async def wait_may_stream(self) -> None:
        """Wait until nothing holds the stream back."""
        await self._may_stream.wait()

    async def wait_held_out(self) -> None:
        """Wait until the held-out rows are answered."""
        await self._held_out.wait()

    async def hold_saving(self) -> None:
        """No checkpoint before its ``release_saving``: a teacher is still being probed."""
        self._holds += 1
        self._may_save.clear()

    async def release_saving(self) -> None:
        """The probe of a teacher is content."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._may_save.set()

    async def wait_may_save(self) -> None:
        """Wait until nothing holds the first checkpoint back."""
        await self._may_save.wait()
