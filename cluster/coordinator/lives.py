"""The lives of one teacher: deployed when somebody needs it, ended when nobody does any more."""

import asyncio


class TeacherLives:
    """What is known of one teacher of the run; see the methods of `Coordinator` that name it.

    served: whether it has replicas that answer, or is about to have them. let_go_in: the last
    attempt in which it was let go.
    """

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.settled = asyncio.Event()  # Not on its way out.
        self.settled.set()
        self.number = 1
        self.served = True
        self.let_go_in = 0

    async def want(self) -> int:
        """It is needed. The number of the life that will answer."""
        await self.settled.wait()
        self.wanted.set()
        self.served = True
        return self.number

    def let_go(self, attempt: int) -> None:
        """It is about to end; wishes wait until it is `gone`. Its cores are free from now on."""
        self.let_go_in = attempt
        self.served = False
        self.settled.clear()
        self.wanted.clear()
        self.number += 1

    def gone(self) -> None:
        """It has no replicas (any more)."""
        self.served = self.wanted.is_set()
        self.settled.set()

    def close(self) -> None:
        """The run is over: nobody waits any longer."""
        self.settled.set()
        self.wanted.set()
