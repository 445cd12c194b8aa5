"""A teacher whose engine dies of some rows: the real replica and places, around a made-up core.

Places, turns, what a dead engine tells, and how its replica ends are the real ones. The core takes
a row for some ticks of the event loop, and dies of those that are to kill it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayActorError

from raystill.datasets.rows.signal import Signal
from raystill.serve.ending import Ending
from raystill.serve.engine.vllm import VllmEngine
from raystill.serve.replica import BusyClock, Teacher


class EngineDeadError(Exception):
    """Named like vLLM's."""


class EngineGenerateError(Exception):
    """Named like vLLM's: it gives one request up."""


class Parameters:
    """Those of a request, which the core does not read."""

    extra_args: Any = None

    def clone(self) -> "Parameters":
        return Parameters()


class Engine(VllmEngine):
    """The engine's own places and turns; ``core`` says what becomes of a row."""

    vocab_size, hidden_size, max_model_len = 1000, 4, 64
    version, dtype = "1", "float32"

    def __init__(self, core: "Core", slots: int) -> None:
        teacher = SimpleNamespace(max_num_seqs=slots, request_timeout_s=None)
        super().__init__(SimpleNamespace(teacher=teacher))  # type: ignore[arg-type]
        self.core = core
        self._engine: Any = SimpleNamespace(check_health=core.step)
        self._takes: Any = self

    async def _generate(self, token_ids: list[int], parameters: Any) -> Any:
        await self.core.row(token_ids[0])
        return SimpleNamespace(
            token_ids=[token_ids[0], 1], finish_reason="stop", weight_versions=()
        )

    def _raise_if_dead(self) -> None:
        """There is no process; the core itself tells of its death."""

    def _parameters(self, num_logprobs: int | None, **changes: Any) -> Any:
        return Parameters()

    def _tokens(self) -> dict[str, int]:
        return {}

    async def _one_token(self) -> None:
        await self.core.step()

    async def take(self, tag: str, length: int) -> Any:
        """What was captured of a row that was scored."""
        return np.zeros((length, 4), np.uint8)

    def drop(self, tag: str) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """There is no process."""


class Core:
    """The life of one engine: rows in it, until it is dead."""

    def __init__(self, service: "Service") -> None:
        self.service = service
        self.inside: set[int] = set()
        self.is_dead = False

    def die(self) -> None:
        """All that is in it is lost."""
        if not self.is_dead:
            self.is_dead = True
            self.service.deaths.append(frozenset(self.inside))
            self.service.after_death()

    async def step(self) -> None:
        """One tick; raises where the engine is dead."""
        await asyncio.sleep(0)
        if self.is_dead:
            raise EngineDeadError

    async def row(self, number: int) -> None:
        """A row's time in the engine."""
        service = self.service
        if self.is_dead:
            raise EngineDeadError
        service.asked[number] += 1
        if service.asked[number] <= service.gives_up[number]:
            raise EngineGenerateError
        self.inside.add(number)
        service.seen(self)
        try:
            for _ in range(1 + number % 5):
                await self.step()
                if number in service.killers:
                    self.die()
                    raise EngineDeadError
        finally:
            self.inside.discard(number)


class Replica:
    """One life of the teacher's process, and the questions in it."""

    def __init__(self, service: "Service", slots: int) -> None:
        self.core = Core(service)
        self.open: set[object] = set()
        self.owed: set[object] | None = None
        self.gone = asyncio.Event()
        teacher = object.__new__(Teacher)
        teacher._engine = Engine(self.core, slots)
        teacher._busy = BusyClock()
        teacher._settings = SimpleNamespace(coordinator=None)  # type: ignore[assignment]
        teacher._sampling = SimpleNamespace(stop_token_ids=(1,))  # type: ignore[assignment]
        teacher._ending = Ending("replica")
        teacher._ending._begin = self.end  # type: ignore[method-assign]
        self.teacher = teacher

    def end(self, why: str) -> None:
        """It lives until those that ask now have their answers."""
        if self.owed is None:
            self.owed = set(self.open)


class Service:
    """What a handle of Serve's is to callers; one replica at a time.

    With ``process`` the replica goes with its engine, and tells nobody anything.
    """

    def __init__(
        self,
        killers: set[int],
        slots: int = 8,
        process: bool = False,
        seen: Callable[[Core], None] = lambda core: None,
    ) -> None:
        self.killers, self.slots, self.process, self.seen = killers, slots, process, seen
        self.asked: Counter[int] = Counter()  # how often an engine had a row
        self.gives_up: Counter[int] = Counter()  # how often on an id, before it answers
        self.deaths: list[frozenset[int]] = []  # and the rows that were in the engine
        self.replica = Replica(self, slots)
        self.sample = SimpleNamespace(remote=lambda *of: self.ask("sample", *of))
        self.score = SimpleNamespace(remote=lambda *of: self.ask("score", *of))

    def after_death(self) -> None:
        """Called when the engine of the replica has died."""
        if self.process:
            self.replica.gone.set()
            self.replica = Replica(self, self.slots)

    async def ask(self, method: str, rows: pa.Table, signal: Signal) -> pa.Table:
        """A question to the replica that is there."""
        replica, question = self.replica, object()
        replica.open.add(question)
        asked = asyncio.ensure_future(getattr(replica.teacher, method)(rows, signal))
        gone = asyncio.ensure_future(replica.gone.wait())
        try:
            await asyncio.wait([asked, gone], return_when=asyncio.FIRST_COMPLETED)
            if replica.gone.is_set():
                raise RayActorError
            told: pa.Table = asked.result()
            return told
        finally:
            asked.cancel()
            gone.cancel()
            replica.open.discard(question)
            if replica.owed is not None:
                replica.owed.discard(question)
                if not replica.owed and self.replica is replica:
                    self.replica = Replica(self, self.slots)
