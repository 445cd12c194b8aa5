"""The coordinator's credits, drops and attempts, without Ray."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raystill.base.errors import RunError
from raystill.cluster.coordinator.actor import Coordinator
from raystill.cluster.coordinator.credits import Credits, parts_of
from raystill.cluster.job.run import groups_before, groups_beside
from raystill.config.load import load_config
from raystill.config.run import RunConfig
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import RoutedPlan


def coordinator(max_rows_ahead=16, num_rows=100, max_drop_fraction=0.1, refill_rows=0, **more):
    return Coordinator(max_rows_ahead, num_rows, max_drop_fraction, refill_rows, **more)


async def waits(awaitable):
    """Whether it is still waiting after the loop has had its turns; then it is cancelled."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(10):
        await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    return not done


def test_credits_never_exceed_the_bound_and_return_when_a_block_is_taken():
    async def run():
        c = coordinator(max_rows_ahead=16)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire(attempt, 8, 0)
        assert await c.acquire(attempt, 8, 8)
        assert await waits(c.acquire(attempt, 1, 16))
        third = asyncio.ensure_future(c.acquire(attempt, 8, 16))
        await c.taken(attempt, 8)
        assert await third
        snapshot = await c.snapshot()
        assert (snapshot.rows_ahead, snapshot.max_rows_ahead_seen) == (16, 16)

    asyncio.run(run())


def test_a_bound_once_reached_is_left_alone_until_a_burst_has_room():
    async def run():
        c = coordinator(max_rows_ahead=32, refill_rows=16)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        for group in range(0, 32, 8):  # Nothing is held back before.
            assert await c.acquire(attempt, 8, group)
        fifth = asyncio.ensure_future(c.acquire(attempt, 8, 32))
        assert await waits(asyncio.shield(fifth))
        await c.taken(attempt, 8)
        assert await waits(asyncio.shield(fifth)), "8 rows have room, 16 are waited for"
        await c.taken(attempt, 8)
        assert await fifth and await c.acquire(attempt, 8, 40), "the whole burst at once"
        assert await waits(c.acquire(attempt, 8, 48))
        await c.taken(attempt, 24)
        assert await c.acquire(attempt, 8, 48), "a pass begins anew"
        again = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire(again, 8, 0)

    asyncio.run(run())


def test_the_last_burst_of_a_pass_waits_for_no_more_room_than_it_takes():
    credits = Credits(max_rows_ahead=32, refill_rows=16)
    credits.begin(rows_left=44)
    for group in range(0, 32, 8):
        credits.grant(group, 8)
    assert not credits.may_have(32, 8)
    credits.answer(0, 8)
    credits.give_back(8)
    assert not credits.may_have(32, 8), "12 rows are left, and 8 have room"
    credits.give_back(4)
    assert credits.may_have(32, 8)
    credits.grant(32, 8)
    assert not credits.may_have(40, 8), "never less than the group itself"
    credits.give_back(4)
    assert credits.may_have(40, 8)


def test_a_burst_is_half_a_flight_at_most_and_never_goes_below_the_advised_bound():
    teacher = {"model": "m", "target_ongoing_requests": 8}

    def refill(num_workers=1, **stream):
        sections = {"teacher": teacher, "student": {"layers": [0]}, "prompts": {"path": "p"}}
        sections |= {"stream": {"group_rows": 4, **stream}}
        sections |= {"training": {"num_workers": num_workers}}
        return RunConfig.model_validate(sections)

    default = refill()
    assert default.rows_in_flight == 32 and default.refill_rows == 16
    advised = default.advised_rows_ahead
    for bound, rows in ((advised - 8, 0), (advised, 0), (advised + 8, 8), (advised + 99, 16)):
        assert refill(max_rows_ahead=bound).refill_rows == rows
    many = refill(num_workers=64)
    assert many.rows_ahead == many.min_rows_ahead and many.refill_rows == 0


def test_of_a_bounded_flight_half_is_refilled_at_most():
    credits = Credits(max_rows_ahead=64, refill_rows=32)
    credits.begin(rows_left=1000)
    credits.max_in_flight = 2
    for group in range(0, 64, 8):
        assert credits.may_have(group, 8)
        credits.grant(group, 8)
        credits.answer(group, 8)
    assert not credits.may_have(64, 8)
    credits.give_back(8)
    assert credits.may_have(64, 8), "half of two groups"
    credits.max_in_flight = None
    credits.grant(64, 8)
    assert not credits.may_have(72, 8)
    credits.give_back(24)
    assert not credits.may_have(72, 8)
    credits.give_back(8)
    assert credits.may_have(72, 8)


def test_groups_in_flight_are_bounded_where_it_is_asked_for_and_leave_with_their_answers():
    async def run():
        c = coordinator(max_rows_ahead=64)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.let_in_flight(2)
        assert await c.acquire(attempt, 8, 0) and await c.acquire(attempt, 8, 8)
        assert await waits(c.acquire(attempt, 8, 16))
        assert not await waits(c.acquire(attempt, 8, 8)), "the source runs again"
        await c.taken(attempt, 8)  # What a worker takes tells nothing of what is in flight.
        assert await waits(c.acquire(attempt, 8, 16))
        third = asyncio.ensure_future(c.acquire(attempt, 8, 16))
        for _ in range(2):  # A retried block is answered twice.
            await c.answered(attempt, 0, 8, {"rows_answered": 8})
        assert await third
        assert await waits(c.acquire(attempt, 8, 24))
        fourth = asyncio.ensure_future(c.acquire(attempt, 8, 24))
        await c.let_in_flight(None)
        assert await fourth
        assert (await c.snapshot()).counters == {"rows_answered": 16}
        again = await c.publish(0, 0, Ledger(100).to_dict())
        await c.let_in_flight(1)
        await c.answered(attempt, 8, 8, {})
        assert await c.acquire(again, 8, 0), "a new attempt has nothing in flight"

    asyncio.run(run())


def test_while_held_out_rows_are_answered_few_groups_are_asked_for_beside_them():
    async def run():
        c = coordinator(max_rows_ahead=64, beside_held_out=2)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.let_in_flight(6)
        assert await c.acquire(attempt, 8, 0) and await c.acquire(attempt, 8, 8)
        assert await waits(c.acquire(attempt, 8, 16)), "the smaller bound counts"
        third = asyncio.ensure_future(c.acquire(attempt, 8, 16))
        await c.answered(attempt, 0, 8, {})
        assert await third
        fourth = asyncio.ensure_future(c.acquire(attempt, 8, 24))
        assert await waits(c.acquire(attempt, 8, 24))
        await c.held_out_ready()
        assert await fourth
        for group in (32, 40, 48):
            assert await c.acquire(attempt, 8, group)
        assert await waits(c.acquire(attempt, 8, 56)), "the other bound stays"

    asyncio.run(run())


def test_held_out_rows_are_asked_for_when_the_rows_of_the_first_step_are_answered():
    async def run():
        c = coordinator(max_rows_ahead=64, beside_held_out=1, before_held_out=2)
        assert await waits(c.wait_may_ask_held_out()), "no teacher answers"
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.teacher_answers()
        asking = asyncio.ensure_future(c.wait_may_ask_held_out())
        assert await c.acquire(attempt, 8, 0) and await c.acquire(attempt, 8, 8)
        assert await waits(c.acquire(attempt, 8, 16)), "those of the first step alone"
        await c.answered(attempt, 0, 8, {})
        assert await waits(asyncio.shield(asking))
        assert await c.acquire(attempt, 8, 16)
        await c.answered(attempt, 8, 8, {})
        await asking
        assert await waits(c.acquire(attempt, 8, 24)), "the bound beside them is another"
        await c.publish(0, 0, Ledger(100).to_dict())
        assert await waits(c.wait_may_ask_held_out()), "another life asks for them anew"
        await c.finished("stopped")
        await c.wait_may_ask_held_out()

    asyncio.run(run())


@pytest.mark.parametrize("rows", [0, 8])
def test_held_out_rows_wait_for_no_more_groups_than_there_are(rows):
    async def run():
        c = coordinator(max_rows_ahead=64, beside_held_out=1, before_held_out=2)
        attempt = await c.publish(0, 0, Ledger(rows).to_dict())
        await c.teacher_answers()
        if rows:
            assert await waits(c.wait_may_ask_held_out())
            assert await c.acquire(attempt, 8, 0)
            await c.answered(attempt, 0, 8, {})
        await c.wait_may_ask_held_out()

    asyncio.run(run())


def test_held_out_rows_wait_for_no_student_that_is_not_there_yet():
    async def run():
        c = coordinator(max_rows_ahead=64, beside_held_out=1, before_held_out=2)
        await c.teacher_answers()
        await c.wait_may_stream()
        await c.wait_may_ask_held_out()
        ready = coordinator(max_rows_ahead=64, beside_held_out=1)
        await ready.wait_may_ask_held_out()

    asyncio.run(run())


def test_a_source_that_runs_again_gets_its_old_credits_back():
    async def run():
        c = coordinator(max_rows_ahead=16)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire(attempt, 8, 0)
        assert await c.acquire(attempt, 8, 0)
        assert (await c.snapshot()).rows_ahead == 8

    asyncio.run(run())


def test_a_source_that_runs_again_while_its_first_call_waits_takes_no_credits_twice():
    async def run():
        c = coordinator(max_rows_ahead=16)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire(attempt, 16, 0)
        waiting = [asyncio.ensure_future(c.acquire(attempt, 8, 16)) for _ in range(2)]
        assert await waits(asyncio.shield(waiting[0]))
        await c.taken(attempt, 16)
        assert await waiting[0] and await waiting[1]
        assert (await c.snapshot()).rows_ahead == 8

    asyncio.run(run())


PARTS = {"slow": 16, "fast": 16}


def test_a_teachers_part_of_the_bound_is_what_its_replicas_can_use():
    assert parts_of(240, {"large": 100, "small": 10, "other": 10}) == {
        "large": 200,
        "small": 20,
        "other": 20,
    }
    credits = Credits(64, parts={"small": 4, "large": 60})
    assert credits.first_of([(0, 8, "small")]), "a group above the part goes alone"
    credits.grant(0, 8, "small")
    assert credits.first_of([(8, 8, "small")]) is None


OFFERS = [(0, 8, "slow"), (8, 8, "fast")]


def test_a_teacher_with_its_part_in_flight_is_overtaken_and_the_bound_is_one():
    async def run():
        c = Coordinator(32, 100, 0.1, parts=PARTS)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire_one(attempt, 0, OFFERS) == 0
        assert await c.acquire_one(attempt, 1, [(16, 8, "slow"), (8, 8, "fast")]) == 16
        both = [(24, 8, "slow"), (8, 8, "fast")]  # Half of the bound is the slow one's.
        assert await c.acquire_one(attempt, 2, both) == 8
        assert await waits(c.acquire_one(attempt, 3, both[:1]))
        await c.answered(attempt, 0, 8, {})
        assert await c.acquire_one(attempt, 3, both[:1]) == 24
        more = [(32, 8, "slow"), (40, 8, "fast")]
        assert await waits(c.acquire_one(attempt, 4, more)), "32 rows are ahead"
        await c.taken(attempt, 8)
        assert await c.acquire_one(attempt, 4, more) == 40
        assert (await c.snapshot()).max_rows_ahead_seen == 32
        await c.answered(attempt, 0, 8, {})  # A retried block is answered twice.
        await c.taken(attempt, 32)
        assert await waits(c.acquire_one(attempt, 5, [(32, 8, "slow")]))

    asyncio.run(run())


def test_a_source_that_runs_again_emits_in_the_same_order():
    """Ray takes what it emits by its place: another order would lose rows and repeat others."""

    async def run():
        c = Coordinator(32, 100, 0.1, parts=PARTS)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        groups = [np.arange(g, g + 8) for g in range(0, 96, 8)]
        names = ["slow", "slow", "slow", "fast"] * 3

        async def emit(number_of_groups):
            plan, emitted = RoutedPlan(groups, names, 64), []
            for number in range(number_of_groups):
                emitted.append(await c.acquire_one(attempt, number, plan.offers()))
                plan.take(emitted[-1])
            return emitted, plan.offers()

        first, offers = await emit(3)
        assert first == [0, 8, 24]
        for group in (0, 8):
            await c.answered(attempt, group, 8, {})
        ahead = (await c.snapshot()).rows_ahead
        again, _ = await emit(3)
        assert again == first and (await c.snapshot()).rows_ahead == ahead
        assert await c.acquire_one(attempt, 3, offers) == 16
        await c.taken(attempt, 16)
        later = RoutedPlan(groups, names, 64)
        for group in (*first, 16):
            later.take(group)
        calls = [asyncio.ensure_future(c.acquire_one(attempt, 4, later.offers())) for _ in range(2)]
        assert await calls[0] == await calls[1]
        assert (await c.snapshot()).rows_ahead == 24
        second = await c.publish(0, 0, Ledger(100).to_dict())
        assert await c.acquire_one(attempt, 5, later.offers()) is None
        assert await c.acquire_one(second, 0, OFFERS) == 0, "a new attempt begins anew"

    asyncio.run(run())


def test_a_dropped_row_returns_its_credit_once():
    async def run():
        c = coordinator()
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.acquire(attempt, 8, 0)
        await c.dropped(attempt, [3, 5], ["empty", "too_long"])
        await c.dropped(attempt, [3, 5], ["empty", "too_long"])
        snapshot = await c.snapshot()
        assert snapshot.rows_ahead == 6
        assert snapshot.dropped == {"empty": 1, "too_long": 1}
        assert await c.dropped_positions() == {3: "empty", 5: "too_long"}

    asyncio.run(run())


def test_too_many_drops_stop_the_run_and_name_the_reasons():
    async def run():
        c = coordinator(max_drop_fraction=0.02)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.acquire(attempt, 8, 0)
        await c.dropped(attempt, [0, 1], ["empty", "too_long"])
        with pytest.raises(RunError, match=r"3 of 100 rows .*2 too_long, 1 empty.* 2 that"):
            await c.dropped(attempt, [2], ["too_long"])

    asyncio.run(run())


def test_rows_that_filters_reject_have_a_quota_of_their_own_and_are_in_the_ledger():
    async def run():
        c = Coordinator(64, 100, max_drop_fraction=0.01, max_rejected_fraction=0.03)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.acquire(attempt, 64, 0)
        reasons = ["filtered: length", "filtered: length", "empty", "filtered: regex"]
        await c.dropped(attempt, [0, 1, 2, 3], reasons)
        snapshot = await c.snapshot()
        assert snapshot.filtered == {"length": 2, "regex": 1}
        assert snapshot.dropped == {"empty": 1}
        assert snapshot.rows_ahead == 60
        with pytest.raises(RunError, match=r"4 of 100 rows were rejected by filters .*2 length"):
            await c.dropped(attempt, [4], ["filtered: regex"])
        ledger = Ledger(100)
        ledger.mark_dropped(await c.dropped_positions())
        await c.publish(0, 1, Ledger.from_dict(ledger.to_dict()).to_dict())
        assert (await c.snapshot()).filtered == {"length": 2, "regex": 2}

    asyncio.run(run())


def test_rows_rejected_in_each_epoch_are_known_over_restarts():
    """A life that restores an earlier checkpoint forgets what came after it."""

    async def run():
        c = Coordinator(64, 8, 1.0)

        async def epoch(number, rejected, restored=False):
            attempt = await c.publish(number, 0, Ledger(8).to_dict(), restored)
            await c.acquire(attempt, 8, 0)
            await c.dropped(attempt, rejected, ["filtered: length"] * len(rejected))
            return (await c.snapshot()).filtered_by_epoch

        assert (await c.snapshot()).filtered_by_epoch == {}
        assert await epoch(0, [0, 1, 2], restored=True) == {0: 3}
        assert await epoch(0, [0, 1], restored=True) == {0: 2}
        assert await epoch(1, [0, 1, 2]) == {0: 2, 1: 3}
        assert await epoch(2, []) == {0: 2, 1: 3, 2: 0}
        assert await epoch(1, [0], restored=True) == {0: 2, 1: 1}

    asyncio.run(run())


def test_rejected_rows_keep_no_teacher_for_the_next_epoch():
    """Their answers are stored; only what has no answer is asked again."""

    async def run(reason, goes):
        c = Coordinator(16, 8, 1.0)
        attempt = await c.publish(0, 0, Ledger(8).to_dict())
        await c.acquire(attempt, 8, 0)
        await c.dropped(attempt, [3], [reason])
        await c.answered(attempt, 0, 8, {})
        assert await waits(c.wait_teacher_idle(2)) != goes

    asyncio.run(run("filtered: length", goes=True))
    asyncio.run(run("empty", goes=False))


def test_a_new_attempt_starts_with_fresh_credits_and_the_ledgers_drops():
    async def run():
        c = coordinator(max_rows_ahead=16)
        ledger = Ledger(100)
        first = await c.publish(0, 0, ledger.to_dict())
        await c.acquire(first, 16, 0)
        await c.dropped(first, [7], ["empty"])
        waiting = asyncio.ensure_future(c.acquire(first, 8, 16))
        await asyncio.sleep(0)
        ledger.mark_dropped({50: "too_long"})
        second = await c.publish(0, 3, ledger.to_dict())
        assert await waiting is False
        assert second == first + 1
        assert await c.dropped_positions() == {50: "too_long"}
        assert await c.acquire(first, 8, 16) is False
        await c.taken(first, 16)
        await c.dropped(first, [9], ["empty"])
        snapshot = await c.snapshot()
        assert snapshot.rows_ahead == 0
        assert snapshot.dropped == {"too_long": 1}
        assert (await c.published())["step"] == 3
        assert await c.acquire(second, 8, 0)

    asyncio.run(run())


def test_a_finished_run_hands_out_no_credits():
    async def run():
        c = coordinator(max_rows_ahead=8)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        await c.acquire(attempt, 8, 0)
        waiting = asyncio.ensure_future(c.acquire(attempt, 8, 8))
        await asyncio.sleep(0)
        await c.finished("stopped")
        assert await waiting is False
        assert (await c.snapshot()).outcome == "stopped"

    asyncio.run(run())


def test_a_group_larger_than_the_bound_is_refused_instead_of_waiting_for_ever():
    async def run():
        c = coordinator(max_rows_ahead=4)
        attempt = await c.publish(0, 0, Ledger(100).to_dict())
        with pytest.raises(RunError, match=r"8 rows .* max_rows_ahead \(4\)"):
            await c.acquire(attempt, 8, 0)

    asyncio.run(run())


def test_counters_add_up_and_a_snapshot_tells_all():
    async def run():
        c = coordinator()
        await c.add({"rows_asked": 8, "teacher_busy_s": 0.5})
        await c.add({"rows_asked": 8, "teacher_busy_s": 0.25})
        await c.progress({"step": 2, "loss": 1.5})
        await c.evaluated({"kl_nats_per_token": 2.0})
        for name in ("loading", "training", "training"):
            await c.phase(name)
        await c.phase("loading again", after="loading")
        await c.request_stop(15)
        await c.failed("first")
        await c.failed("second")
        snapshot = await c.snapshot()
        assert snapshot.counters == {"rows_asked": 16, "teacher_busy_s": 0.75}
        assert snapshot.progress["step"] == 2
        assert snapshot.evaluation == {"kl_nats_per_token": 2.0}
        assert await c.stop_requested() == 15
        assert snapshot.error == "first"
        assert snapshot.phases == ((1, "loading"), (2, "training"))
        assert await c.stop_requested() == 15
        assert await waits(c.wait_held_out())
        await c.held_out_ready()
        assert not await waits(c.wait_held_out())

    asyncio.run(run())


@pytest.mark.parametrize("wanted", [True, False])
def test_who_waits_for_a_wish_for_the_teacher_is_let_go_when_the_driver_leaves(wanted):
    async def run():
        c = coordinator()
        waiting = asyncio.ensure_future(c.wait_teacher_wanted())
        assert await waits(asyncio.shield(waiting))
        await (c.want_teacher() if wanted else c.close())
        assert await waiting == wanted

    asyncio.run(run())


def all_answered(last_epoch, epoch=0, dropped=()):
    """A coordinator of 16 rows, both groups answered, and who waits for that."""

    async def begin():
        c = coordinator(num_rows=16, max_drop_fraction=1.0)
        idle = asyncio.ensure_future(c.wait_teacher_idle(last_epoch))
        attempt = await c.publish(epoch, 0, Ledger(16).to_dict())
        for group in (0, 8):
            assert await c.acquire(attempt, 8, group)
            assert await waits(asyncio.shield(idle))
            gone = [p for p in dropped if group <= p < group + 8]
            await c.dropped(attempt, gone, ["empty"] * len(gone))
            await c.answered(attempt, group, 8, {})
        return c, attempt, idle

    return begin()


def test_the_teacher_may_go_when_every_row_has_its_answer():
    async def run():
        c, attempt, idle = await all_answered(last_epoch=2)
        assert await idle
        assert await waits(c.wait_teacher_idle(2)), "once an attempt"
        assert await waits(c.want_teacher()), "it is on its way out"
        assert not await c.teacher_served(), "nobody waits for it: a student may have its cores"
        await c.teacher_gone()
        assert not await c.teacher_served()
        assert await c.want_teacher() == 2
        assert await c.teacher_served(), "its cores are its own again"
        assert await c.wait_teacher_wanted()
        assert await c.publish(1, 2, Ledger(16).to_dict()) == attempt + 1
        assert await waits(c.wait_teacher_idle(2)), "the next epoch has no answers yet"
        await c.finished("completed")
        assert not await c.wait_teacher_idle(2)

    asyncio.run(run())


def test_rows_that_come_back_twice_are_told_and_leave_nobody_waiting():
    async def run():
        c = coordinator()
        attempt = await c.publish(0, 0, Ledger(64).to_dict())
        while not await waits(c.acquire(attempt, 8, 8 * len(c._credits._granted))):
            pass
        ahead = c._credits.ahead
        waiting = asyncio.ensure_future(c.acquire(attempt, 8, 56))
        assert await waits(asyncio.shield(waiting))
        with pytest.raises(AssertionError, match="3 more rows came back"):
            await c.taken(attempt, ahead + 3)
        assert await asyncio.wait_for(waiting, 1), "who waits for room has it"
        assert c._credits.ahead == 8

    asyncio.run(run())


def test_a_group_that_was_looked_for_is_known_in_its_attempt_alone():
    async def run():
        c = coordinator(num_rows=64)
        assert not await c.begins(1, 0), "nothing has begun"
        for _ in range(2):
            attempt = await c.publish(0, 0, Ledger(64).to_dict())
            for position in range(64):
                assert not await c.begins(attempt, position)
                assert await c.begins(attempt, position)
            assert not await c.begins(attempt - 1, 0)

    asyncio.run(run())


def test_a_row_that_was_dropped_stays_dropped_for_a_later_try_of_its_group():
    async def run():
        c = coordinator(num_rows=64, max_drop_fraction=1.0)
        attempt = await c.publish(0, 0, Ledger(64).to_dict())
        await c.acquire(attempt, 8, 0)
        await c.dropped(attempt, [3, 5], ["timed_out", "empty"])
        assert await c.dropped_of(attempt, [2, 3, 4, 5]) == [3, 5]
        assert await c.dropped_of(attempt - 1, [3]) == []
        await c.taken(attempt, 6)
        assert c._credits.ahead == 0
        again = await c.publish(0, 0, Ledger(64).to_dict())
        assert await c.dropped_of(again, [3]) == [], "another attempt asks them again"

    asyncio.run(run())


def test_a_run_that_begins_without_a_teacher_says_so_unless_it_is_wanted_by_then():
    async def run(wanted):
        c = coordinator()
        if wanted:
            await c.want_teacher()
        await c.teacher_gone()
        return await c.teacher_served()

    assert not asyncio.run(run(wanted=False))
    assert asyncio.run(run(wanted=True))


@pytest.mark.parametrize(("last_epoch", "goes"), [(1, False), (0, True)])
def test_the_teacher_stays_while_dropped_rows_will_be_asked_again(last_epoch, goes):
    async def run():
        c, _, idle = await all_answered(last_epoch, dropped=[3])
        assert await waits(asyncio.shield(idle)) != goes
        await c.close()
        assert await idle == goes

    asyncio.run(run())


def test_what_the_weights_have_learned_needs_no_answer():
    async def run():
        ledger = Ledger(16)
        ledger.mark_trained(range(12))
        c = coordinator(num_rows=16)
        attempt = await c.publish(0, 3, ledger.to_dict())
        assert await waits(c.wait_teacher_idle(0))
        await c.acquire(attempt, 4, 12)
        await c.answered(attempt, 12, 4, {})
        assert await c.wait_teacher_idle(0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("held_out", "changed", "groups"),
    [
        (0, {}, None),
        (48, {}, 2),
        (41, {}, 2),
        (64, {}, 1),
        (500, {}, 1),
        (48, {"teacher.num_replicas": 2}, 10),
        (48, {"teacher.target_ongoing_requests": 7}, 1),
        (48, {"teacher.target_ongoing_requests": 99}, 2),
        (8, {"stream.group_rows": 16}, 3),
    ],
)
def test_training_rows_have_the_slots_that_held_out_ones_leave(held_out, changed, groups):
    changed = {"teacher.max_num_seqs": 64} | changed
    overrides = [f"{name}={value}" for name, value in changed.items()]
    config = load_config(Path("configs/quickstart.yaml"), overrides)
    assert groups_beside(config, held_out) == groups


@pytest.mark.parametrize(
    ("changed", "gpus", "asked", "groups"),
    [
        ({}, 0, True, 1),
        ({"training.rows_per_step": 20}, 0, True, 3),
        ({}, 0, False, 0),
        ({}, 2, True, 0),
        ({"teacher.gpus_per_replica": 1}, 0, True, 0),
        ({"policy.student_share": 0.5}, 0, True, 0),
    ],
)
def test_the_first_step_comes_before_held_out_rows_where_a_cpu_answers(
    monkeypatch, changed, gpus, asked, groups
):
    overrides = [f"{name}={value}" for name, value in changed.items()]
    config = load_config(Path("configs/quickstart.yaml"), overrides)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2, "GPU": gpus})
    stored = SimpleNamespace(asked={""} if asked else set(), held_out_rows=47)
    prepared = SimpleNamespace(stored=stored, num_held_out_rows=48)
    run = SimpleNamespace(config=config)
    assert groups_before(run, prepared) == groups
    stored.held_out_rows = 48
    assert groups_before(run, prepared) == 0, "they come from the store, at once"
