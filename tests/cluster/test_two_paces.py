"""Credits with two teachers of different pace: what one of them costs the other, in events.

A simulation without clock, Ray or threads: the stream asks for groups in the order of a plan, as
`emit_plan` does, under the bounds that a run file has; each teacher answers so many groups at a
time; the student takes groups as they are answered, or in the plan's order.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from raystill.cluster.coordinator.credits import Credits
from raystill.config.run import RunConfig

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
    credits = Credits(bound * CONFIG.rows_ahead, CONFIG.refill_rows)
    credits.begin(len(plan) * ROWS)
    events: list[tuple[float, int]] = []
    answered: set[int] = set()
    position = taken = 0
    now = 0.0
    while len(answered) < len(plan):
        while position < len(plan) and credits.may_have(position, ROWS):
            credits.grant(position, ROWS)
            teachers[plan[position]].queue.append(position)
            position += 1
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
        credits.answer(group, ROWS)
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


def test_a_teacher_that_is_away_leaves_the_other_its_share_of_the_bound() -> None:
    """While one is away its groups fill the bound; until then the other answers."""
    for seed in range(20):
        teachers = {"slow": Teacher(0.1, away_until=1000.0), "fast": Teacher(0.1)}
        simulate(plan_of(200, 200, seed), teachers)
        meanwhile = ROWS * sum(end < 1000.0 for end in teachers["fast"].done)
        assert meanwhile >= CONFIG.rows_ahead // 4
        assert len(teachers["fast"].done) == 200
