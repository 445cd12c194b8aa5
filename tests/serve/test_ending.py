"""An engine dies in a replica that lives: who is told what, and how the replica ends."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.schema import LOST, NOT_STARTED, ONE_BY_ONE, TIMED_OUT, TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.serve import ending
from raystill.serve.ending import EXIT_ENGINE_DEAD, Ending
from raystill.serve.engine.takes import Takes
from raystill.serve.replica import BusyClock, Teacher
from raystill.serve.sampler import Sampler
from tests.serve.test_sampler_waits import Behind
from tests.serve.test_teacher import prompt_table, run_config, synthetic
from tests.support.mortal import EngineDeadError, EngineGenerateError, Replica, Service

TEXT = Signal("text")


def rows_of(*numbers: int, one_by_one: bool = False) -> pa.Table:
    table = pa.table({"prompt_ids": pa.array([[n, 7] for n in numbers], TOKEN_IDS)})
    return table.append_column(ONE_BY_ONE, [[True] * len(table)]) if one_by_one else table


async def errors_of(replica: Replica, table: pa.Table) -> list[str | None]:
    errors: list[str | None] = (await replica.teacher.sample(table, TEXT))["error"].to_pylist()
    return errors


def test_one_by_one_names_the_row_that_the_engine_died_of_and_those_after_it_never_were_in_it() -> (
    None
):
    async def scenario() -> None:
        service = Service({2})
        told = await errors_of(service.replica, rows_of(1, 2, 3, 4, one_by_one=True))
        assert told == [None, LOST, NOT_STARTED, NOT_STARTED]
        assert service.asked == {1: 1, 2: 1}
        # What comes to a replica that ends, alone or beside others, is not begun.
        assert await errors_of(service.replica, rows_of(5)) == [NOT_STARTED]
        assert await errors_of(service.replica, rows_of(5, one_by_one=True)) == [NOT_STARTED]
        assert service.asked == {1: 1, 2: 1} and service.replica.owed is not None

    asyncio.run(scenario())


def test_a_death_that_an_earlier_row_caused_is_not_blamed_on_the_row_that_is_alone_next() -> None:
    """Its caller gave it up in the step that kills the engine; the next row never gets in."""

    async def scenario() -> None:
        service = Service(set())
        core = service.replica.core
        asked = asyncio.create_task(errors_of(service.replica, rows_of(4, one_by_one=True)))
        while 4 not in core.inside:
            await asyncio.sleep(0)
        after = asyncio.create_task(errors_of(service.replica, rows_of(9, one_by_one=True)))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        core.die()
        assert await after == [NOT_STARTED] and service.asked == {4: 1}

    asyncio.run(scenario())


def test_an_engine_that_hangs_with_no_row_in_it_ends_its_replica_and_convicts_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raystill.serve.engine.vllm.PROBE_TIMEOUT_S", 0.02)

    async def scenario() -> None:
        service = Service(set())
        service.replica.teacher._engine._one_token = asyncio.Event().wait  # type: ignore[attr-defined]
        assert await errors_of(service.replica, rows_of(1, one_by_one=True)) == [NOT_STARTED]
        assert service.replica.owed is not None and not service.asked

    asyncio.run(scenario())


@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_time_of_a_row_does_not_begin_while_another_is_alone(one_by_one: bool) -> None:
    async def scenario() -> None:
        service, begun, over = Service(set()), asyncio.Event(), asyncio.Event()
        engine: Any = service.replica.teacher._engine
        generate = engine._generate

        async def slow(ids: list[int], parameters: Any) -> Any:
            if ids[0] == 1:
                begun.set()
                await over.wait()
            return await generate(ids, parameters)

        engine._generate = slow
        alone = asyncio.create_task(errors_of(service.replica, rows_of(1, one_by_one=True)))
        await begun.wait()
        engine._settings.teacher.request_timeout_s = 0.4
        table = rows_of(*range(2, 20), one_by_one=one_by_one)
        others = asyncio.create_task(errors_of(service.replica, table))
        await asyncio.sleep(0.6)
        assert not others.done() and set(service.asked) <= {1}
        await engine.probe()  # Serve's look at its health is not held up.
        over.set()
        assert await others == [None] * 18 and await alone == [None]

    asyncio.run(scenario())


def test_a_row_that_is_slow_alone_is_given_up_and_the_next_one_is_asked() -> None:
    async def scenario() -> None:
        service = Service(set())
        engine: Any = service.replica.teacher._engine
        engine._settings.teacher.request_timeout_s = 0.05
        generate = engine._generate

        async def slow(ids: list[int], parameters: Any) -> Any:
            await asyncio.sleep(9 if ids[0] == 1 else 0)
            return await generate(ids, parameters)

        engine._generate = slow
        told = await errors_of(service.replica, rows_of(1, 2, one_by_one=True))
        assert told == [TIMED_OUT, None]

    asyncio.run(scenario())


@pytest.mark.parametrize("waits", [False, True])
def test_a_caller_that_goes_away_holds_nobody_back(waits: bool) -> None:
    async def scenario() -> None:
        service = Service(set())
        first = asyncio.create_task(errors_of(service.replica, rows_of(4, 9, one_by_one=True)))
        gone = asyncio.create_task(errors_of(service.replica, rows_of(14, 19, one_by_one=True)))
        while not service.asked:
            await asyncio.sleep(0)
        (gone if waits else first).cancel()
        assert await errors_of(service.replica, rows_of(*range(20, 40))) == [None] * 20
        told = await asyncio.gather(first, gone, return_exceptions=True)
        assert sorted(isinstance(one, asyncio.CancelledError) for one in told) == [False, True]

    asyncio.run(scenario())


def test_new_weights_wait_for_a_row_that_is_alone() -> None:
    """An engine that dies of its weights would be blamed on the row."""

    async def scenario() -> None:
        service, order = Service(set()), []
        engine: Any = service.replica.teacher._engine

        async def noted(*_: Any, **__: Any) -> bool:
            order.append(set(service.replica.core.inside))
            return True

        for name in ("pause_generation", "collective_rpc", "reset_prefix_cache"):
            setattr(engine._engine, name, noted)
        for name in ("update_weight_version", "resume_generation"):
            setattr(engine._engine, name, noted)
        alone = asyncio.create_task(errors_of(service.replica, rows_of(4, one_by_one=True)))
        while not service.asked:
            await asyncio.sleep(0)
        await engine.reload("weights", 2)
        assert order and not any(order)
        assert await alone == [None]

    asyncio.run(scenario())


def test_an_engine_without_rows_that_kill_answers_one_by_one_as_ever() -> None:
    replica = object.__new__(Teacher)
    replica._engine, replica._busy = synthetic(run_config()), BusyClock()
    replica._settings = SimpleNamespace(coordinator=None)  # type: ignore[assignment]
    replica._sampling = SimpleNamespace(stop_token_ids=(1,))  # type: ignore[assignment]
    plain = prompt_table([[1, 2], [3]])
    marked = plain.append_column(ONE_BY_ONE, [[True, True]])

    async def both(rows: pa.Table) -> list[pa.Table]:
        sampled = await replica.sample(rows, TEXT)
        given = rows.append_column("response_ids", sampled["response_ids"])
        return [sampled, await replica.score(given, TEXT)]

    assert asyncio.run(both(marked)) == asyncio.run(both(plain))


def test_a_row_that_was_being_taken_when_the_engine_died_is_told_of_it() -> None:
    """vLLM leaves a call of a dead engine waiting: such rows, and their groups, hung with it."""

    async def scenario() -> None:
        dead = asyncio.Event()

        async def call(method: str, args: tuple[Any, ...]) -> list[Any]:
            await asyncio.Event().wait()
            raise AssertionError("nobody answers")

        def raise_if_dead() -> None:
            if dead.is_set():
                raise EngineDeadError

        takes = Takes(call, raise_if_dead)
        asked = [asyncio.create_task(takes.take(f"row-{n}", 3)) for n in range(2)]
        await asyncio.sleep(0.25)
        assert not any(one.done() for one in asked)
        dead.set()
        async with asyncio.timeout(5):
            told = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in told] == [EngineDeadError] * 2

    asyncio.run(scenario())


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ended the process, instead of its end."""
    told: list[Any] = []
    monkeypatch.setattr(ending.os, "_exit", told.append)
    monkeypatch.setattr(ending, "HAND_OVER_S", 0.3)
    return told


def test_a_process_ends_once_and_only_when_others_have_had_time_to_be_told(
    exits: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        end = Ending("replica", lambda: exits.append("cleaned"))
        end.after([Answer(np.array([1], np.int32), "stop"), Answer(error="too_long")])
        assert not end.after_error(EngineGenerateError())
        await asyncio.sleep(0.4)
        assert not exits
        end.after([Answer(error=LOST)])
        end.after([Answer(error=NOT_STARTED)])
        assert end.after_error(EngineDeadError())
        assert not exits
        await asyncio.sleep(0.7)

    asyncio.run(scenario())
    assert exits == ["cleaned", EXIT_ENGINE_DEAD]


def test_a_clean_up_that_fails_does_not_keep_the_process(exits: list[Any]) -> None:
    def fail() -> None:
        raise OSError("no")

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        Ending("sampler", fail).after([Answer(error=LOST)])
        await asyncio.sleep(0.7)

    asyncio.run(scenario())
    assert exits == [EXIT_ENGINE_DEAD]


def test_a_look_at_the_health_of_a_dead_engine_leaves_time_to_hand_over_what_was_finished(
    exits: list[Any],
) -> None:
    """It ended the process at once, and what the engine had finished was lost."""

    async def scenario() -> None:
        service = Service(set())
        replica = service.replica
        replica.teacher._ending = Ending("replica")
        asked = asyncio.create_task(errors_of(replica, rows_of(4, 9)))
        while not service.asked:
            await asyncio.sleep(0)
        replica.core.die()
        with pytest.raises(EngineDeadError):
            await replica.teacher.check_health()
        assert await asked == [LOST, LOST] and not exits
        await asyncio.sleep(0.7)
        assert exits == [EXIT_ENGINE_DEAD]

    asyncio.run(scenario())


def test_what_comes_after_a_look_found_the_engine_dead_is_not_suspected(exits: list[Any]) -> None:
    async def scenario() -> None:
        replica = Service(set()).replica
        replica.core.die()
        with pytest.raises(EngineDeadError):
            await replica.teacher.check_health()
        assert await errors_of(replica, rows_of(5, 6)) == [NOT_STARTED] * 2
        assert replica.owed is not None and not exits

    asyncio.run(scenario())


def test_a_sampler_asks_one_by_one_and_ends_when_its_engine_has_died(exits: list[Any]) -> None:
    """It lived on until Serve looked at it, and rows that only waited were poison by then."""

    async def scenario() -> None:
        service, sampler = Service({2}), Behind()
        sampler._engine = service.replica.teacher._engine
        sampler._ending = Ending("sampler")
        for answer in (rows_of(2, 3, one_by_one=True), rows_of(5)):
            told = (await Sampler.sample(sampler, answer, TEXT))["error"].to_pylist()
            assert told in ([LOST, NOT_STARTED], [NOT_STARTED])
        assert service.asked == {2: 1} and not exits
        await asyncio.sleep(0.7)
        assert exits == [EXIT_ENGINE_DEAD]

    asyncio.run(scenario())
