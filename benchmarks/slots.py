"""The share of an engine's slots that are filled, by the lengths of the answers.

    python -m benchmarks.slots [--rows 4000] [--set teacher.target_ongoing_requests=8 ...]

The run's own bookkeeping, in virtual time and without a model: the credits of the coordinator, the
bounds that the configuration gives, the rows' places in the engine (`VllmEngine`), and the order in
which groups are passed on. Only a token is made up: each takes one unit of time in every slot. The
student takes a block as soon as it may, so that nothing but the scheduling can leave a slot empty.
The share is taken over the middle of the run, from a fifth to four fifths of its rows.

Without ``--set`` the defaults are compared with one row in flight for each slot, and stored.
"""

import argparse
import asyncio
import selectors
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import machine, write_result
from raystill.cluster.coordinator.credits import Credits
from raystill.config.load import apply_override, validate_leniently
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

    def _raise_if_dead(self) -> None:
        """There is no process that could end."""


class Simulation:
    """One pass of the stream over rows of these lengths, with one replica."""

    def __init__(self, config: RunConfig, lengths: Lengths, engine: Any = None) -> None:
        self._lengths = lengths
        self._group_rows = config.stream.group_rows
        self._fixed = config.stream.order == "fixed"
        self._slots = config.teacher.max_num_seqs
        self._calls = asyncio.Semaphore(config.groups_in_flight)
        self.engine: Any = engine or CountedEngine(self._slots)
        self.credits = Credits(config.rows_ahead, config.refill_rows)
        self.credits.begin(len(lengths))
        self._returned = asyncio.Event()
        self.delivered: list[int] = []
        self._waiting: set[int] = set()
        self.marks: list[tuple[float, float]] = []
        """(time, slot-tokens until then) at the begin and end of what is measured."""

    async def run(self) -> float:
        """Share of slots filled in the middle of the run."""
        async with asyncio.TaskGroup() as group:
            for start in range(0, len(self._lengths), self._group_rows):
                rows = len(self._lengths[start : start + self._group_rows])
                while not self.credits.may_have(start, rows):
                    self._returned.clear()
                    await self._returned.wait()
                self.credits.grant(start, rows)
                if start >= len(self._lengths) * (1 + 3 * len(self.marks)) / 5:
                    self._mark()
                group.create_task(self._answer(start, rows))
        (since, before), (until, after) = self.marks
        return (after - before) / (self._slots * (until - since))

    def _mark(self) -> None:
        if len(self.marks) < 2:
            now = asyncio.get_running_loop().time()
            self.marks.append((now, self.engine.count()))

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


def config_of(overrides: Sequence[str] = ()) -> RunConfig:
    """The defaults but for these ``a.b=c``. SystemExit for what is no setting."""
    settings: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"layers": [0]}}
    settings["prompts"] = {"path": "p"}
    problems = [problem for text in overrides for problem in apply_override(settings, text)]
    loaded = validate_leniently(settings, problems)
    if loaded.problems or loaded.config is None:
        raise SystemExit("\n".join(map(str, loaded.problems)))
    return loaded.config


def shares(config: RunConfig, rows: int) -> dict[str, float]:
    """Share of slots filled, by the distribution of lengths; prints each."""
    stream, found = config.stream, {}
    print(
        f"{stream.order} order, {config.groups_per_replica} groups of {stream.group_rows} in "
        f"flight, {config.teacher.slots} slots, at most {config.rows_ahead} rows ahead"
    )
    for name, draw in LENGTHS.items():
        share, simulation = simulate(config, draw(np.random.default_rng(0), rows))
        assert sorted(simulation.delivered) == list(range(0, rows, stream.group_rows))
        assert simulation.credits.max_ahead_seen <= config.rows_ahead
        found[name] = round(share, 3)
        print(f"    {name:24} {share:.3f} of the slots filled", flush=True)
    return found


ONE_ROW_A_SLOT = "teacher.target_ongoing_requests=8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000, help="rows of each simulated pass")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    arguments = parser.parse_args()
    if arguments.settings:
        shares(config_of(arguments.settings), arguments.rows)
        return
    table = []
    for order in ("fixed", "arrival"):
        for changes in ([ONE_ROW_A_SLOT], []):
            config = config_of([f"stream.order={order}", *changes])
            settings = {
                "order": order,
                "group_rows": config.stream.group_rows,
                "slots": config.teacher.slots,
                "groups_in_flight": config.groups_per_replica,
                "max_rows_ahead": config.rows_ahead,
            }
            table.append({**settings, "filled": shares(config, arguments.rows)})
    write_result(RESULT, {"machine": machine(), "rows": arguments.rows, "simulated": table})


if __name__ == "__main__":
    main()
