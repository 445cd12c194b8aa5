"""Credits with two teachers of different pace: what one of them costs the other, in events.

A simulation without clock, Ray or threads: the stream asks for groups as `emit_plan` does, under
the bounds that a run file has; each teacher answers so many groups at a time; the student takes
groups as they are answered, or in the plan's order.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from raystill.cluster.coordinator.credits import Credits, parts_of
from raystill.config.run import RunConfig
from raystill.datasets.stream.plan import RoutedPlan
from raystill.datasets.stream.source import OVERTAKEN

ROWS = 4  # of a group
SLOTS = 3  # Groups that a teacher answers at a time.
CONFIG = RunConfig.model_validate(
    {
        "teachers": {
            name: {"model": "m", "engine": "synthetic", "target_ongoing_requests": SLOTS}
            for name in ("slow", "fast")
        },
        "student": {"layers": [0]},
        "prompts": {
            "sources": [{"name": n, "path": "p.jsonl", "teacher": n} for n in ("slow", "fast")]
        },
        "stream": {"group_rows": ROWS},
        "training": {"rows_per_step": 8},
    }
)


@dataclass
class Teacher:
    """Seconds for a group, and when it comes back where it is away."""

    seconds: float
    away_until: float = 0.0
    queue: deque[int] = field(default_factory=deque)
    busy: int = 0
    done: list[float] = field(default_factory=list)


def simulate(
    plan: list[str], teachers: dict[str, Teacher], in_order: bool = False, bound: int = 1
) -> float:
    """The time at which the last group is answered; ``done`` of the teachers has the others.

    bound: of rows ahead, in multiples of the default.
    """
    rows = bound * CONFIG.rows_ahead
    credits = Credits(rows, CONFIG.refill_rows, parts_of(rows, dict.fromkeys(teachers, SLOTS)))
    credits.begin(len(plan) * ROWS)
    positions = [np.arange(g * ROWS, (g + 1) * ROWS) for g in range(len(plan))]
    routed = RoutedPlan(positions, plan, OVERTAKEN * credits.max_rows_ahead)
    events: list[tuple[float, int]] = []
    answered: set[int] = set()
    position = taken = 0
    now = 0.0
    while len(answered) < len(plan):
        while in_order and position < len(plan) and credits.may_have(position, ROWS):
            credits.grant(position, ROWS)
            teachers[plan[position]].queue.append(position)
            position += 1
        while not in_order and (chosen := credits.first_of(routed.offers())):
            credits.grant(*chosen)
            group = int(routed.take(chosen[0])[0]) // ROWS
            teachers[plan[group]].queue.append(group)
        assert credits.ahead <= credits.max_rows_ahead
        for one in teachers.values():
            while one.queue and one.busy < SLOTS:
                one.busy += 1
                ends = max(now, one.away_until) + one.seconds
                heapq.heappush(events, (ends, one.queue.popleft()))
        assert events, "nobody works, and the stream waits for ever"
        now, group = heapq.heappop(events)
        teachers[plan[group]].busy -= 1
        teachers[plan[group]].done.append(now)
        answered.add(group)
        credits.answer(group if in_order else group * ROWS, ROWS)
        if not in_order:
            credits.give_back(ROWS)
        while in_order and taken in answered:
            credits.give_back(ROWS)
            taken += 1
    return now


def plan_of(slow: int, fast: int, seed: int) -> list[str]:
    plan = ["slow"] * slow + ["fast"] * fast
    random.Random(seed).shuffle(plan)
    return plan


@pytest.mark.parametrize(("slow", "fast"), [(200, 200), (60, 340), (340, 60)])
@pytest.mark.parametrize("times", [2, 10, 100])
def test_a_run_takes_as_long_as_its_busiest_teacher_alone(slow: int, fast: int, times: int) -> None:
    """So neither waits for the other. In a fixed order it may take a fourth longer: a group of the
    slow one holds those behind it back, and a larger bound is all that helps.
    """
    alone = max(slow, fast / times) / SLOTS
    for seed in range(3):
        for in_order, bound, most in ((False, 1, 1.05), (True, 1, 1.3), (True, 4, 1.05)):
            teachers = {"slow": Teacher(1.0), "fast": Teacher(1.0 / times)}
            whole = simulate(plan_of(slow, fast, seed), teachers, in_order, bound)
            assert whole <= most * alone + 1, (seed, in_order, bound)


@pytest.mark.parametrize(("slow", "fast"), [(60, 340), (200, 200)])
def test_the_busiest_teacher_does_not_stand_idle_while_another_is_away(
    slow: int, fast: int
) -> None:
    """It goes on for four bounds of rows beyond the first that waits, here 384 rows at least."""
    away_s = 12.0
    alone = max(slow, fast) / SLOTS
    for seed in range(5):
        teachers = {"slow": Teacher(1.0, away_until=away_s), "fast": Teacher(1.0)}
        whole = simulate(plan_of(slow, fast, seed), teachers)
        first = sum(end <= away_s for end in teachers["fast"].done)
        assert first == away_s * SLOTS, "its places are taken all the time"
        assert whole <= max(1.05 * alone, away_s + slow / SLOTS) + 1


def test_one_that_stays_away_leaves_the_other_its_window_and_the_mix_is_the_plans_beyond() -> None:
    window = OVERTAKEN * CONFIG.rows_ahead
    for seed in range(20):
        plan = plan_of(400, 400, seed)
        teachers = {"slow": Teacher(0.1, away_until=1000.0), "fast": Teacher(0.1)}
        simulate(plan, teachers)
        meanwhile = sum(end < 1000.0 for end in teachers["fast"].done)
        waits = [number for number, name in enumerate(plan) if name == "slow"]
        first = waits[CONFIG.rows_ahead // 2 // ROWS]  # Its part of the bound is in flight.
        reached = plan[: first + window // ROWS + 1].count("fast")
        assert abs(meanwhile - reached) <= 1
        assert len(teachers["fast"].done) == 400


def test_each_teachers_groups_are_asked_in_the_order_of_the_plan() -> None:
    plan = plan_of(50, 50, 1)
    groups = [np.arange(g * ROWS, (g + 1) * ROWS) for g in range(len(plan))]
    routed, random_ = RoutedPlan(groups, plan, 40), random.Random(2)
    asked: list[int] = []
    while offers := routed.offers():
        assert offers == sorted(offers) and len({name for _, _, name in offers}) == len(offers)
        assert offers[-1][0] - offers[0][0] <= 40
        group, rows, name = random_.choice(offers)
        assert plan[group // ROWS] == name and rows == ROWS
        routed.take(group)
        asked.append(group // ROWS)
    for name in ("slow", "fast"):
        assert [g for g in asked if plan[g] == name] == [g for g in range(100) if plan[g] == name]
    with pytest.raises(AssertionError, match="no group that begins at 0"):
        routed.take(0)
