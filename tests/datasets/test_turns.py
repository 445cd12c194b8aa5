"""Turns: nobody beside whoever goes alone, nobody waits for ever, and nothing is left held."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.datasets.rows.turns import ALONE_IN_A_ROW, Turns


class Seen:
    """Who is in, and who was let in, in order: ``b`` beside others, ``a`` alone."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.beside, self.alone = 0, 0
        self.order: list[str] = []

    async def go_beside(self, ticks: int) -> None:
        async with self.turns.beside():
            assert not self.alone
            self.beside += 1
            self.order.append("b")
            try:
                await self.take(ticks)
            finally:
                self.beside -= 1

    async def go_alone(self, ticks: int) -> None:
        async with self.turns.alone():
            assert not self.beside and not self.alone
            self.alone += 1
            self.order.append("a")
            try:
                await self.take(ticks)
            finally:
                self.alone -= 1

    async def take(self, ticks: int) -> None:
        for _ in range(ticks):
            await asyncio.sleep(0)

    async def is_free(self) -> bool:
        """Whether nothing is held: both kinds are let in at once."""
        async with asyncio.timeout(5):
            await self.go_alone(0)
            await asyncio.gather(self.go_beside(1), self.go_beside(1))
        return not self.beside and not self.alone


def run(scenario: Callable[[Seen], Awaitable[None]]) -> Seen:
    async def play() -> Seen:
        seen = Seen()
        async with asyncio.timeout(30):
            await scenario(seen)
        assert await seen.is_free()
        return seen

    return asyncio.run(play())


@given(
    st.lists(
        st.tuples(
            st.booleans(),  # alone
            st.integers(0, 5),  # ticks it takes
            st.integers(0, 3),  # ticks until the next one comes
            st.none() | st.integers(0, 12),  # ticks until it is cancelled, and again one later
            st.booleans(),
        ),
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_whoever_comes_and_is_cancelled_when_all_have_their_turn_and_none_is_left_held(
    comers: list[tuple[bool, int, int, int | None, bool]],
) -> None:
    async def scenario(seen: Seen) -> None:
        async def cancelled(task: asyncio.Task[None], after: int, twice: bool) -> None:
            await seen.take(after)
            task.cancel()
            if twice:
                await asyncio.sleep(0)
                task.cancel()

        tasks, cancels = [], []
        for alone, ticks, pause, cancel, twice in comers:
            task = asyncio.create_task((seen.go_alone if alone else seen.go_beside)(ticks))
            tasks.append(task)
            if cancel is not None:
                cancels.append(asyncio.create_task(cancelled(task, cancel, twice)))
            await seen.take(pause)
        told = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*cancels)
        assert all(one is None or isinstance(one, asyncio.CancelledError) for one in told)
        kept = [one for one, comer in zip(told, comers, strict=True) if comer[3] is None]
        assert kept.count(None) == len(kept)

    run(scenario)


@pytest.mark.parametrize("num_alone", [1, 30])
def test_who_is_to_go_alone_waits_for_those_that_are_in_and_not_for_those_that_come(
    num_alone: int,
) -> None:
    """Others come without end; none of them is let in before it."""

    async def scenario(seen: Seen) -> None:
        over = asyncio.Event()

        async def others() -> None:
            while not over.is_set():
                await seen.go_beside(3)

        busy = [asyncio.create_task(others()) for _ in range(4)]
        await seen.take(5)
        before = len(seen.order)
        waiting = [asyncio.create_task(seen.go_alone(2)) for _ in range(num_alone)]
        await asyncio.gather(*waiting)
        assert seen.order[before] == "a"
        over.set()
        await asyncio.gather(*busy)

    run(scenario)


def test_many_that_go_alone_let_the_others_in_after_every_few() -> None:
    async def scenario(seen: Seen) -> None:
        async with seen.turns.beside():
            alone = [asyncio.create_task(seen.go_alone(1)) for _ in range(30)]
            await asyncio.sleep(0)
            beside = [asyncio.create_task(seen.go_beside(1)) for _ in range(5)]
            await asyncio.sleep(0)
        await asyncio.gather(*beside)
        assert seen.order[: ALONE_IN_A_ROW + 5] == ["a"] * ALONE_IN_A_ROW + ["b"] * 5
        again = [asyncio.create_task(seen.go_beside(1)) for _ in range(2)]
        await asyncio.gather(*alone, *again)

    order = run(scenario).order[: 30 + 5 + 2]
    counted = [(who, len(list(some))) for who, some in groupby(order)]
    assert counted == [("a", 8), ("b", 5), ("a", 8), ("b", 2), ("a", 14)]


def test_within_a_kind_who_came_first_is_first() -> None:
    async def scenario(seen: Seen) -> None:
        order: list[int] = []

        async def alone(number: int) -> None:
            async with seen.turns.alone():
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(alone(n) for n in range(20)))
        assert order == list(range(20))

    run(scenario)


def test_one_that_gives_up_waiting_to_go_alone_holds_no_other_back() -> None:
    async def scenario(seen: Seen) -> None:
        async with seen.turns.beside():
            alone = asyncio.create_task(seen.go_alone(0))
            await asyncio.sleep(0)
            beside = asyncio.create_task(seen.go_beside(0))
            await seen.take(3)
            assert not beside.done(), "who came later waits"
            alone.cancel()
            await seen.take(3)
            assert beside.done(), "and no longer than the other does"

    run(scenario)
