"""A sampler answers with no older weights than it is asked for. Without Serve and vLLM."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.schema import AT_LEAST, TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.serve.ending import Ending
from raystill.serve.engine.vllm import VllmEngine
from raystill.serve.replica import BusyClock
from raystill.serve.sampler import Sampler


class Behind(Sampler):
    """A replica that has the weights of step 3, in front of an engine that answers at once."""

    def __init__(self, limit_s: float | None = None) -> None:
        teacher = SimpleNamespace(request_timeout_s=limit_s)
        self._settings: Any = SimpleNamespace(config=SimpleNamespace(teacher=teacher))
        self._number, self._version = 1, 3
        self._changed = asyncio.Condition()
        self._busy = BusyClock()
        self._ending = Ending("sampler")
        self.told: list[dict[str, float]] = []
        self._coordinator: Any = SimpleNamespace(add=SimpleNamespace(remote=self.told.append))
        self._engine: Any = self
        self._following = asyncio.get_running_loop().create_future()

    async def get(self, version: int) -> None:
        """New weights, as `_prove` notes them."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    async def ask(self, at_least: int | None) -> list[str]:
        """The finish reasons of one group."""
        columns = {"prompt_ids": pa.array([[1], [2]], TOKEN_IDS)}
        if at_least is not None:
            columns[AT_LEAST] = pa.array([at_least] * 2, pa.int64())
        return (await Sampler.sample(self, pa.table(columns), Signal("text")))[
            "finish_reason"
        ].to_pylist()


class Engine:
    """Says with which weights it answers, and gives up every second prompt."""

    def __init__(self, replica: Behind) -> None:
        self.replica = replica

    async def sample(
        self, groups: list[np.ndarray], signal: Signal, one_by_one: bool = False
    ) -> list[Answer]:
        spans = ((0, self.replica._version),)
        given = Answer(np.array([7, 8], np.int32), "length", spans=spans)
        return [given if i % 2 == 0 else Answer(error="timed_out") for i in range(len(groups))]

    def close(self) -> None:
        pass


def replica(limit_s: float | None = None) -> Behind:
    made = Behind(limit_s)
    made._engine = Engine(made)
    return made


def test_it_waits_for_the_weights_that_a_row_needs_and_for_no_others() -> None:
    async def scenario() -> None:
        behind = replica()
        assert await behind.ask(None) == ["length/3", None]
        assert await behind.ask(-2) == await behind.ask(3) == ["length/3", None]
        asked = asyncio.ensure_future(behind.ask(5))
        await asyncio.sleep(0)
        await behind.get(4)
        assert await behind.ask(4) == ["length/4", None]
        assert not asked.done()
        await behind.get(6)
        assert await asked == ["length/6", None]

    asyncio.run(scenario())


def test_it_reports_what_it_wrote_and_is_not_busy_while_it_waits_for_weights() -> None:
    async def scenario() -> None:
        behind = replica()
        asked = asyncio.ensure_future(behind.ask(4))
        await asyncio.sleep(0)
        assert behind._busy._in_flight == 0
        await behind.get(4)
        await asked
        (told,) = behind.told
        assert (told["sampler_rows"], told["sampler_response_tokens"]) == (1, 2)
        assert told["sampler_busy_s"] >= 0.0

    asyncio.run(scenario())


def test_weights_that_never_come_end_the_run_with_both_versions() -> None:
    async def ask() -> None:
        await replica(limit_s=0.05).ask(9)

    with pytest.raises(RunError, match=r"sampler 1 has .* step 3, and those of step 9 have not"):
        asyncio.run(ask())


def test_what_an_engine_with_half_of_its_weights_writes_is_no_answer() -> None:
    async def scenario() -> None:
        behind = replica()

        async def lost(*_: Any) -> list[Answer]:
            behind._following.set_exception(ValueError("no memory for layer 17"))
            return await Engine(behind).sample([np.array([1])], Signal("text"))

        behind._engine.sample = lost
        for _ in range(2):  # While the answer was written, and from then on.
            with pytest.raises(RuntimeError, match=r"could not be taken: .*layer 17"):
                await behind.ask(None)
        with pytest.raises(RuntimeError, match="could not be taken"):
            await behind.check_health()

    asyncio.run(scenario())


def test_a_proof_waits_for_no_row_that_waits_for_a_place() -> None:
    async def scenario() -> None:
        settings: Any = SimpleNamespace(teacher=SimpleNamespace(max_num_seqs=2))
        engine = VllmEngine(settings)
        order: list[str] = []
        done = asyncio.Event()

        async def row(name: str, ahead: bool) -> None:
            async with engine._place(False, ahead):
                order.append(name)
                if not ahead:
                    await done.wait()

        rows = [asyncio.ensure_future(row(str(number), False)) for number in range(4)]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(row("proof", True), 5)
        assert order == ["0", "1", "proof"]
        done.set()
        await asyncio.gather(*rows)
        assert order[3:] == ["2", "3"]

    asyncio.run(scenario())
