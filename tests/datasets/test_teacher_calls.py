"""Deaths under a group, without Ray: what is kept, what is asked again, who is suspected.

Replicas are doubles that hold rows in a few places and die as real ones do, so that deaths and
questions can be counted.
"""

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from raystill.datasets.rows.schema import GIVEN_UP, LOST, NOT_STARTED, TOKEN_IDS, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream import teacher_calls
from raystill.datasets.stream.teacher_calls import TeacherCalls

TEXT = Signal("text")


class Replica:
    """Answers rows in ``slots`` places, ``rounds`` turns each; some ids kill the engine.

    An engine that dies keeps what it had finished; with ``process`` its replica goes at once.
    """

    def __init__(self, killers: set[int], slots: int = 8, process: bool = False) -> None:
        self.killers, self.process = killers, process
        self.slots = asyncio.Semaphore(slots)
        self.asked: Counter[int] = Counter()
        self.gives_up: Counter[int] = Counter()  # how often on an id, before it answers
        self.deaths = 0
        self.life = 0
        self.sample = self

    def remote(self, rows: pa.Table, signal: Signal) -> Any:
        return self.answer(rows["prompt_ids"].to_pylist(), signal)

    async def answer(self, rows: list[list[int]], signal: Signal) -> pa.Table:
        life = self.life
        answers = await asyncio.gather(*(self.row(ids[0], life) for ids in rows))
        if self.process and LOST in answers:
            raise RayActorError
        columns = {
            "response_ids": [
                [] if a else [ids[0], 1] for a, ids in zip(answers, rows, strict=True)
            ],
            "finish_reason": [None if a else "stop" for a in answers],
            "error": answers,
        }
        return pa.table([columns[n] for n in answer_schema(signal).names], answer_schema(signal))

    async def row(self, number: int, life: int) -> str | None:
        async with self.slots:
            if life != self.life:
                return NOT_STARTED
            self.asked[number] += 1
            if self.asked[number] <= self.gives_up[number]:
                return GIVEN_UP
            if number in self.killers:
                self.deaths += 1
                self.life += 1
                return LOST
            for _ in range(1 + number % 5):
                await asyncio.sleep(0)
                if life != self.life:
                    return LOST
            return None


def ask(
    replica: Replica, groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> list[pa.Table]:
    monkeypatch.setattr(teacher_calls, "PAUSE_AFTER_DEATH_S", 0)

    async def run() -> list[pa.Table]:
        calls = TeacherCalls("app", TEXT, 3, None)

        async def teacher() -> Replica:
            return replica

        monkeypatch.setattr(calls, "_teacher", teacher)
        return await asyncio.gather(
            *(calls.sample(pa.array([[n, 7] for n in group], TOKEN_IDS)) for group in groups)
        )

    return asyncio.run(run())


def check(answers: list[pa.Table], groups: list[list[int]], killers: set[int]) -> None:
    for table, group in zip(answers, groups, strict=True):
        assert table["error"].to_pylist() == ["poison" if n in killers else None for n in group]
        assert table["response_ids"].to_pylist() == [[] if n in killers else [n, 1] for n in group]


def test_what_a_dead_engine_had_finished_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = [0, 5, 10, 15, 20, 25, 30, 99]
    replica = Replica({99}, slots=2)
    check(ask(replica, [group], monkeypatch), [group], {99})
    again = [n for n in group[:-1] if replica.asked[n] > 1]
    assert len(again) <= 1, "one was in the engine beside it; the others were done"
    assert replica.deaths == replica.asked[99] == 4


@pytest.mark.parametrize("process", [False, True])
def test_one_killer_among_many_groups_costs_few_questions(
    monkeypatch: pytest.MonkeyPatch, process: bool
) -> None:
    groups = [list(range(8 * g, 8 * g + 8)) for g in range(40)]
    replica = Replica({77}, slots=8, process=process)
    check(ask(replica, groups, monkeypatch), groups, {77})
    assert replica.deaths <= 4
    more = sum(replica.asked.values()) - 320
    assert more <= (0.5 if process else 0.1) * 320


@given(
    killers=st.sets(st.integers(0, 39), max_size=3),
    slots=st.integers(1, 12),
    size=st.integers(1, 9),
    process=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_answered_or_poison_whoever_kills(
    killers: set[int], slots: int, size: int, process: bool
) -> None:
    groups = [list(range(start, min(40, start + size))) for start in range(0, 40, size)]
    with pytest.MonkeyPatch.context() as patch:
        answers = ask(Replica(killers, slots, process), groups, patch)
    poison = {
        n
        for table, group in zip(answers, groups, strict=True)
        for n, e in zip(group, table["error"].to_pylist(), strict=True)
        if e
    }
    assert poison == killers, "a bystander was taken for poison, or a killer for a bystander"
    check(answers, groups, killers)


@pytest.mark.parametrize("times", [1, 3, 4])
def test_a_row_that_an_engine_gave_up_is_asked_again_four_times_at_most(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    group = [0, 5, 9, 10]
    replica = Replica(set(), slots=2)
    replica.gives_up[9] = times
    check(ask(replica, [group], monkeypatch), [group], {9} if times == 4 else set())
    assert replica.asked == {0: 1, 5: 1, 9: min(times + 1, 4), 10: 1} and not replica.deaths


def test_a_long_row_is_given_up_alone_by_its_engine() -> None:
    from types import SimpleNamespace

    from raystill.serve.engine.vllm import VllmEngine

    settings_of = SimpleNamespace(teacher=SimpleNamespace(max_num_seqs=4, request_timeout_s=0.2))
    engine = VllmEngine(settings_of)  # type: ignore[arg-type]
    done = SimpleNamespace(finish_reason="stop")

    async def generate(ids: list[int], parameters: Any) -> Any:
        await asyncio.sleep(5 if ids == [9] else 0.01)
        return done

    engine._generate = generate  # type: ignore[method-assign]
    rows = [np.array([i], np.int32) for i in (1, 9, 2)]
    found, _ = asyncio.run(engine._run(rows, [None] * 3, [None] * 3, None))  # type: ignore[arg-type]
    assert found == [done, "timed_out", done]


def test_an_engine_that_dies_hands_over_what_it_had_finished() -> None:
    from types import SimpleNamespace

    from raystill.serve.engine.vllm import VllmEngine

    class EngineDeadError(Exception):
        pass

    settings_of = SimpleNamespace(teacher=SimpleNamespace(max_num_seqs=2, request_timeout_s=None))
    engine = VllmEngine(settings_of)  # type: ignore[arg-type]
    done = SimpleNamespace(finish_reason="length")

    async def generate(ids: list[int], parameters: Any) -> Any:
        await asyncio.sleep(0.01 * ids[0])
        if ids[0] == 5:
            raise EngineDeadError
        return done

    engine._generate = generate  # type: ignore[method-assign]
    rows = [np.array([i], np.int32) for i in (1, 5, 1, 5, 1)]
    found, _ = asyncio.run(engine._run(rows, [None] * 5, [None] * 5, None))  # type: ignore[arg-type]
    assert found == [done, LOST, done, LOST, NOT_STARTED] or found.count(LOST) >= 1
    assert found[0] is done and found[1] == LOST and found[4] in (NOT_STARTED, done)


def test_a_row_that_the_engine_gives_up_is_asked_again_and_takes_no_other_with_it() -> None:
    """vLLM calls it recoverable: the engine goes on. It ended the run, and its group was lost."""
    from types import SimpleNamespace

    from vllm.v1.engine.exceptions import EngineGenerateError

    from raystill.serve.engine.vllm import VllmEngine

    settings_of = SimpleNamespace(teacher=SimpleNamespace(max_num_seqs=2, request_timeout_s=None))
    engine = VllmEngine(settings_of)  # type: ignore[arg-type]
    done = SimpleNamespace(finish_reason="stop")

    async def generate(ids: list[int], parameters: Any) -> Any:
        await asyncio.sleep(0)
        if ids[0] == 5:
            raise EngineGenerateError from ValueError("of this request alone")
        return done

    engine._generate = generate  # type: ignore[method-assign]
    rows = [np.array([i], np.int32) for i in (1, 5, 1, 5, 1)]
    found, _ = asyncio.run(engine._run(rows, [None] * 5, [None] * 5, None))  # type: ignore[arg-type]
    assert found == [done, GIVEN_UP, done, GIVEN_UP, done] and not engine.died
