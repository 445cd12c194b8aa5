"""The share of an engine's slots that are filled, by the lengths of the answers.

    python -m benchmarks.slots [--rows 8000] [--set KEY=VALUE ...]

The run's own bookkeeping, in virtual time and without a model: the credits of the coordinator, the
bounds that the configuration gives, the rows' places in the engine (`VllmEngine`), and the order in
which groups are passed on. Only a token is made up: each takes one unit of time in every slot. The
student takes a block as soon as it may, so that nothing but the scheduling can leave a slot empty.
The share is taken over the middle of the run, from a fifth to four fifths of its rows.
"""

import argparse
import asyncio
import selectors
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import machine, write_result
from raystill.cluster.coordinator.credits import Credits
from raystill.config.run import RunConfig
from raystill.serve.engine.vllm import VllmEngine

RESULT = Path(__file__).parent / "results" / "slots.json"
LONGEST = 4096
Lengths = NDArray[np.int64]

LENGTHS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "equal": lambda _, n: np.full(n, 256),
    "uniform 1-512": lambda draw, n: draw.integers(1, 513, n),
    "exponential": lambda draw, n: np.ceil(draw.exponential(256, n)).astype(np.int64),
    "lognormal, cut at 4096": lambda draw, n: np.clip(
        np.ceil(draw.lognormal(5.5, 1.2, n)), 1, LONGEST
    ).astype(np.int64),
}
"""Response lengths in tokens, drawn for n rows."""


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is to do."""

    def __init__(self) -> None:
        self._now = 0.0
        loop = self

        class Jumps(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                if timeout is not None and timeout > 0:
                    loop._now += timeout
                return super().select(0)

        super().__init__(Jumps())

    def time(self) -> float:
        """Tokens since the loop began."""
        return self._now


class CountedEngine(VllmEngine):
    """The real engine's places, and rows that take as long as their first id says."""

    def __init__(self, max_num_seqs: int) -> None:
        teacher = SimpleNamespace(request_timeout_s=None, max_num_seqs=max_num_seqs)
        super().__init__(SimpleNamespace(teacher=teacher))  # type: ignore[arg-type]
        self.active, self.filled, self._since = 0, 0.0, 0.0

    def count(self, change: int = 0) -> float:
        """Slot-tokens filled until now, after which ``change`` more are."""
        now = asyncio.get_running_loop().time()
        self.filled += self.active * (now - self._since)
        self._since = now
        self.active += change
        return self.filled

    async def _generate(self, token_ids: list[int], parameters: Any) -> Any:
        self.count(+1)
        await asyncio.sleep(token_ids[0])
        self.count(-1)
        return SimpleNamespace(finish_reason="stop")


class Simulation:
    """One pass of the stream over rows of these lengths, with one replica."""

    def __init__(self, config: RunConfig, lengths: Lengths) -> None:
        self._lengths = lengths
        self._group_rows = config.stream.group_rows
        self._fixed = config.stream.order == "fixed"
        self._slots = config.teacher.max_num_seqs
        self._calls = asyncio.Semaphore(config.rows_in_flight // config.stream.group_rows)
        self.engine = CountedEngine(self._slots)
        self.credits = Credits(config.rows_ahead, config.refill_rows)
        self.credits.begin(len(lengths))
        self._returned = asyncio.Event()
        self.delivered: list[int] = []
        self._waiting: set[int] = set()
        self._marks: list[tuple[float, float]] = []

    async def run(self) -> float:
        """Share of slots filled in the middle of the run."""
        async with asyncio.TaskGroup() as group:
            for start in range(0, len(self._lengths), self._group_rows):
                rows = len(self._lengths[start : start + self._group_rows])
                while not self.credits.may_have(start, rows):
                    self._returned.clear()
                    await self._returned.wait()
                self.credits.grant(start, rows)
                if start >= len(self._lengths) * (1 + 3 * len(self._marks)) / 5:
                    self._mark()
                group.create_task(self._answer(start, rows))
        (since, before), (until, after) = self._marks
        return (after - before) / (self._slots * (until - since))

    def _mark(self) -> None:
        if len(self._marks) < 2:
            now = asyncio.get_running_loop().time()
            self._marks.append((now, self.engine.count()))

    async def _answer(self, start: int, rows: int) -> None:
        async with self._calls:
            ids = [np.array([n], np.int32) for n in self._lengths[start : start + rows]]
            await self.engine._run(ids, [None] * rows, [None] * rows, None)  # type: ignore[arg-type]
        self.credits.answer(start, rows)
        self._waiting.add(start)
        while self._waiting:
            due = len(self.delivered) * self._group_rows if self._fixed else min(self._waiting)
            if due not in self._waiting:
                break
            self._waiting.discard(due)
            self.delivered.append(due)
            self.credits.give_back(len(self._lengths[due : due + self._group_rows]))
            self._returned.set()


def simulate(config: RunConfig, lengths: Lengths) -> tuple[float, Simulation]:
    """Share of slots filled, and what was simulated."""

    async def run() -> tuple[float, Simulation]:
        simulation = Simulation(config, lengths)
        return await simulation.run(), simulation

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(run())


def config_of(**sections: Any) -> RunConfig:
    """The defaults but for these sections."""
    needed: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"layers": [0]}}
    needed["prompts"] = {"path": "p"}
    for name, section in sections.items():
        needed[name] = {**needed.get(name, {}), **section}
    return RunConfig.model_validate(needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8000, help="rows of each simulated pass")
    parser.add_argument("--group-rows", type=int, default=8, help="stream.group_rows")
    parser.add_argument("--groups", type=int, help="teacher.target_ongoing_requests")
    parser.add_argument("--ahead", type=int, help="stream.max_rows_ahead")
    arguments = parser.parse_args()
    table: dict[str, Any] = {}
    for order in ("fixed", "arrival"):
        stream = {"order": order, "group_rows": arguments.group_rows}
        stream |= {} if arguments.ahead is None else {"max_rows_ahead": arguments.ahead}
        groups = arguments.groups
        teacher = {} if groups is None else {"target_ongoing_requests": groups}
        config = config_of(stream=stream, teacher=teacher)
        for name, draw in LENGTHS.items():
            lengths = draw(np.random.default_rng(0), arguments.rows)
            share, simulation = simulate(config, lengths)
            ahead = simulation.credits.max_ahead_seen
            table[f"{order}, {name}"] = {"filled": round(share, 3), "most_rows_ahead": ahead}
            print(f"{order:8} {name:24} {share:.3f} filled, {ahead} rows ahead", flush=True)
    settings = {
        "rows": arguments.rows,
        "group_rows": arguments.group_rows,
        "rows_in_flight": config.rows_in_flight,
        "max_rows_ahead": config.rows_ahead,
    }
    write_result(RESULT, {"machine": machine(), "settings": settings, "slots": table})


if __name__ == "__main__":
    main()
