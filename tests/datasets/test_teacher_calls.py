"""Deaths under a group, without Ray: what is kept, what is asked again, who is suspected.

The replica and the places of its engine are the real ones; see `support.mortal`. Deaths, and the
rows that an engine had, are counted.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from raystill.base.errors import RunError
from raystill.datasets.rows.schema import (
    GIVEN_UP,
    LOST,
    NOT_STARTED,
    ONE_BY_ONE,
    TOKEN_IDS,
    answer_schema,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream import teacher_calls
from raystill.datasets.stream.teacher_calls import TeacherCalls
from tests.support.mortal import Core, Service

TEXT, SAMPLED = Signal("text"), Signal("sampled")


def ask(
    service: Any,
    groups: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    processes: int = 1,
    method: str = "sample",
    in_flight: int = 1000,
) -> list[pa.Table]:
    """The answers to all groups, asked by so many processes in turn; ``in_flight`` at a time."""
    monkeypatch.setattr(teacher_calls, "PAUSE_AFTER_DEATH_S", 0)

    async def teacher() -> Any:
        return service

    async def run() -> list[pa.Table]:
        signal = SAMPLED if method == "score" else TEXT
        calls = [TeacherCalls("app", signal, 3, None) for _ in range(processes)]
        for one in calls:
            monkeypatch.setattr(one, "_teacher", teacher)
        asked, places = [], asyncio.Semaphore(in_flight)

        async def in_place(question: Awaitable[pa.Table]) -> pa.Table:
            async with places:
                return await question

        for number, group in enumerate(groups):
            columns = [pa.array([[n, 7] for n in group], TOKEN_IDS)]
            if method == "score":
                columns.append(pa.array([[n, 1] for n in group], TOKEN_IDS))
            asked.append(in_place(getattr(calls[number % processes], method)(*columns)))
        return await asyncio.gather(*asked)

    return asyncio.run(run())


def check(answers: list[pa.Table], groups: list[list[int]], killers: set[int]) -> None:
    for table, group in zip(answers, groups, strict=True):
        assert table["error"].to_pylist() == ["poison" if n in killers else None for n in group]
        assert table["response_ids"].to_pylist() == [[] if n in killers else [n, 1] for n in group]


def groups_of(size: int, rows: int = 40) -> list[list[int]]:
    return [list(range(start, min(rows, start + size))) for start in range(0, rows, size)]


def test_what_a_dead_engine_had_finished_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = [0, 5, 10, 15, 20, 25, 30, 99]
    service = Service({99}, slots=2)
    check(ask(service, [group], monkeypatch), [group], {99})
    again = [n for n in group[:-1] if service.asked[n] > 1]
    assert len(again) <= 1, "one was in the engine beside it; the others were done"
    assert len(service.deaths) == service.asked[99] == 2


@pytest.mark.parametrize("method", ["sample", "score"])
def test_one_killer_among_many_groups_costs_two_engines_and_few_questions(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    groups = groups_of(8, rows=320)
    service = Service({77}, slots=8)
    check(ask(service, groups, monkeypatch, method=method), groups, {77})
    together, alone = service.deaths
    assert 77 in together and alone == {77}
    assert sum(service.asked.values()) <= 1.1 * 320
    again = {n for n, times in service.asked.items() if times > 1}
    assert again <= together, "only what was in the engine beside it is asked again"


def test_where_the_whole_replica_goes_a_killer_costs_four_and_half_of_the_questions_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = groups_of(8, rows=320)
    service = Service({77}, slots=8, process=True)
    check(ask(service, groups, monkeypatch), groups, {77})
    assert len(service.deaths) <= 4
    assert sum(service.asked.values()) <= 1.5 * 320


@given(
    killers=st.sets(st.integers(0, 39), max_size=3),
    slots=st.integers(1, 12),
    size=st.integers(1, 9),
    processes=st.integers(1, 3),
    method=st.sampled_from(["sample", "score"]),
    in_flight=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_just_the_rows_that_kill_are_poison_at_two_engines_each_whoever_asks_beside(
    killers: set[int], slots: int, size: int, processes: int, method: str, in_flight: int
) -> None:
    groups, service = groups_of(size), Service(killers, slots)
    with pytest.MonkeyPatch.context() as patch:
        answers = ask(service, groups, patch, processes, method, in_flight)
    check(answers, groups, killers)
    # An engine dies of one in company, of which there is but one for each, and of each alone.
    assert len(service.deaths) <= 2 * len(killers)
    alone = [rows for rows in service.deaths if len(rows) == 1 and rows <= killers]
    assert len(alone) >= len(killers)
    assert max(service.asked.values()) <= 2, "a row is in an engine in company once, and once alone"
    assert sum(service.asked.values()) <= 40 + slots * len(killers)


def test_two_killers_in_an_engine_at_once_cost_three_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [[14, 21], [13, 20]]
    service = Service({20, 21}, slots=4)
    check(ask(service, groups, monkeypatch, processes=2), groups, {20, 21})
    assert [len(rows) for rows in service.deaths] == [4, 1, 1]


@given(
    killers=st.sets(st.integers(0, 39), max_size=3),
    slots=st.integers(1, 12),
    size=st.integers(1, 9),
    in_flight=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_answered_or_poison_where_the_whole_replica_goes(
    killers: set[int], slots: int, size: int, in_flight: int
) -> None:
    groups = groups_of(size)
    with pytest.MonkeyPatch.context() as patch:
        answers = ask(Service(killers, slots, process=True), groups, patch, in_flight=in_flight)
    check(answers, groups, killers)


def test_many_killers_make_no_row_poison_that_only_waited_for_their_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was asked twelve times at most; then dead engines alone made it poison."""
    groups, killers = groups_of(4), set(range(0, 40, 2))
    service = Service(killers, slots=1)
    check(ask(service, groups, monkeypatch), groups, killers)
    assert len(service.deaths) == 2 * len(killers)


def test_a_death_that_is_nobodys_fault_makes_poison_of_the_row_that_is_alone_then_and_of_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The price of two deaths, as docs/decisions.md has it."""

    def seen(core: Core) -> None:
        if core.service.asked[3] == len(core.service.deaths) + 1 and 3 in core.inside:
            core.die()

    groups = groups_of(4, rows=8)
    service = Service(set(), slots=4, seen=seen)
    check(ask(service, groups, monkeypatch), groups, {3})
    assert len(service.deaths) == 2 and service.deaths[1] == {3}


def test_in_company_such_a_death_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(core: Core) -> None:
        if len(core.inside) == 4 and not core.service.deaths:
            core.die()

    groups = groups_of(4, rows=24)
    service = Service(set(), slots=4, seen=seen)
    check(ask(service, groups, monkeypatch, processes=2), groups, set())
    assert len(service.deaths) == 1
    assert sum(service.asked.values()) == 24 + 4


def test_a_suspect_is_alone_in_its_engine_whoever_asks_and_others_go_on_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together: list[frozenset[int]] = []

    def seen(core: Core) -> None:
        if core.service.deaths:
            together.append(frozenset(core.inside))

    groups = groups_of(8, rows=160)
    service = Service({17}, slots=8, seen=seen)
    check(ask(service, groups, monkeypatch, processes=3), groups, {17})
    suspects = service.deaths[0]
    assert 17 in suspects and len(suspects) > 1
    assert all(rows <= suspects and len(rows) == 1 for rows in together if rows & suspects)
    assert max(len(rows) for rows in together) == 8, "the others fill the engine again"


@pytest.mark.parametrize("times", [1, 3, 4])
def test_a_row_that_an_engine_gave_up_is_asked_again_four_times_at_most(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    group = [0, 5, 9, 10]
    service = Service(set(), slots=2)
    service.gives_up[9] = times
    check(ask(service, [group], monkeypatch), [group], {9} if times == 4 else set())
    assert service.asked == {0: 1, 5: 1, 9: min(times + 1, 4), 10: 1} and not service.deaths


class Told:
    """Answers each question with what the list says: an error of all its rows, or a death."""

    def __init__(self, *told: str | None) -> None:
        self.told, self.one_by_one = list(told), list[bool]()
        self.sample = self

    async def remote(self, rows: pa.Table, signal: Signal) -> pa.Table:
        self.one_by_one.append(ONE_BY_ONE in rows.column_names)
        error = self.told.pop(0) if len(self.told) > 1 else self.told[0]
        if error == "process":
            raise RayActorError
        ids = [[] if error else [row[0], 1] for row in rows["prompt_ids"].to_pylist()]
        columns = [ids, [None if error else "stop"] * len(ids), [error] * len(ids)]
        return pa.table(columns, schema=answer_schema(signal))


@pytest.mark.parametrize(
    ("told", "poison", "one_by_one"),
    [
        ((LOST, None), False, [False, True]),
        ((LOST, LOST), True, [False, True]),
        ((LOST, NOT_STARTED, NOT_STARTED, None), False, [False, True, True, True]),
        # A replica that goes with a suspect tells nothing of it, nor convicts it.
        ((LOST, "process", None), False, [False, True, True]),
        ((LOST, "process", LOST), True, [False, True, True]),
        ((LOST, "process", "process", None), False, [False, True, True, True]),
        ((LOST, *["process"] * 4), True, [False, True, True, True, True]),
        (("process", LOST, None), False, [False, False, True]),
        (("process", "process", "process", None), False, [False, False, True, True]),
        (("process",) * 4, True, [False, False, True, True]),
        (("process", "process", LOST), True, [False, False, True]),
        (("process", "process", *[NOT_STARTED] * 20, None), False, None),
        (("process", "process", GIVEN_UP, None), False, [False, False, True, True]),
    ],
)
def test_what_is_asked_after_each_kind_of_death(
    monkeypatch: pytest.MonkeyPatch,
    told: tuple[str | None, ...],
    poison: bool,
    one_by_one: list[bool] | None,
) -> None:
    teacher = Told(*told)
    check(ask(teacher, [[5]], monkeypatch), [[5]], {5} if poison else set())
    assert one_by_one is None or teacher.one_by_one == one_by_one


class Beside:
    """Loses its replica three times with each of some rows, and notes what was asked beside it."""

    def __init__(self, lost: set[int]) -> None:
        self.lost, self.times = lost, dict.fromkeys(lost, 0)
        self.open: list[set[int]] = []
        self.beside: dict[tuple[int, int], list[set[int]]] = {}
        self.sample = self

    async def remote(self, rows: pa.Table, signal: Signal) -> pa.Table:
        asked = {row[0] for row in rows["prompt_ids"].to_pylist()}
        for row in self.lost & asked:
            self.times[row] += 1
        self.open.append(asked)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
                for row in self.lost & asked:
                    others = [one for one in self.open if one is not asked]
                    self.beside.setdefault((row, self.times[row]), []).extend(others)
            if any(self.times[row] < 4 for row in self.lost & asked):
                raise RayActorError
        finally:
            self.open.remove(asked)
        ids = [[row[0], 1] for row in rows["prompt_ids"].to_pylist()]
        columns = [ids, ["stop"] * len(ids), [None] * len(ids)]
        return pa.table(columns, schema=answer_schema(signal))


def test_the_last_question_of_a_suspect_of_replicas_goes_alone_and_no_two_suspects_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else another killer's deaths could be counted against it."""
    groups = [[5], [6], *groups_of(4, rows=400)[2:]]
    teacher = Beside({5, 6})
    check(ask(teacher, groups, monkeypatch, in_flight=6), groups, set())
    assert teacher.times == {5: 4, 6: 4}
    assert not teacher.beside.get((5, 4)) and not teacher.beside.get((6, 4))
    third = teacher.beside[5, 3] + teacher.beside[6, 3]
    assert third and {5} not in third and {6} not in third


@pytest.mark.parametrize("first", [(), ("process", "process")])
def test_engines_that_die_before_they_begin_end_the_run_and_make_no_poison(
    monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...]
) -> None:
    with pytest.raises(RunError, match="100 times in a row the teacher's engine died before"):
        ask(Told(*first, NOT_STARTED), [[5]], monkeypatch)


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
