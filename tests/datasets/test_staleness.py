"""Staleness and throughput with a slow student, sampler or teacher, on a clock of its own.

The credits, the plan and the published versions are those of a run (`Coordinator`, `PolicyPlan`);
student, sampler and teacher are synthetic: they take a time, and do nothing. Time is virtual: the
event loop jumps to the next thing that happens, so figures are exact on a machine of any load.
"""

import asyncio
import selectors
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from raystill.cluster.coordinator.actor import Coordinator
from raystill.config.run import RunConfig
from raystill.datasets.policy.plan import PolicyPlan
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import remaining_groups

NUM_ROWS, ROWS_PER_STEP, GROUP_ROWS = 480, 8, 4
NUM_STEPS, NUM_GROUPS = NUM_ROWS // ROWS_PER_STEP, NUM_ROWS // GROUP_ROWS


class Jumping(selectors.SelectSelector):
    """A selector that waits for no time: it moves the loop's clock instead."""

    now = 0.0

    def select(self, timeout=None):
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        assert found or timeout is not None, "everybody waits for each other"
        return found


def run_on_own_clock(coroutine):
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    try:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 10_000))
    finally:
        loop.close()


class Engine:
    """Answers so many groups at once, each in ``seconds``; ``stop`` holds back what begins."""

    def __init__(self, seconds, slots):
        self._seconds, self._slots = seconds, asyncio.Semaphore(slots)
        self.going = asyncio.Event()
        self.going.set()

    async def answer(self, begun=None):
        async with self._slots:
            await self.going.wait()
            told = begun() if begun else None
            await asyncio.sleep(self._seconds)
            return told


@dataclass
class Rig:
    """One epoch of a run whose parts take ``student_s`` a step, the others their time a group."""

    config: RunConfig
    student_s: float = 0.1
    sampler_s: float = 0.1
    teacher_s: float = 0.1
    load_s: float = 0.01
    slots: int = 4
    staleness: Counter = field(default_factory=Counter)
    trained: list = field(default_factory=list)
    version = 0

    async def run(self):
        self.coordinator = Coordinator(
            self.config.rows_ahead, NUM_ROWS, 0.0, self.config.refill_rows
        )
        self.plan = PolicyPlan.of(self.config, NUM_ROWS, "run")
        self.sampler = Engine(self.sampler_s, self.slots)
        self.teacher = Engine(self.teacher_s, self.slots)
        self.answers = [asyncio.Future() for _ in range(NUM_GROUPS)]
        await self.coordinator.publish_policy(0, {"files": ["f"]}, True)
        self.attempt = await self.coordinator.publish(0, 0, Ledger(NUM_ROWS).to_dict())
        loop = asyncio.get_running_loop()
        began = loop.time()
        helpers = [asyncio.ensure_future(part()) for part in (self.emit, self.follow)]
        await self.train()
        took = loop.time() - began
        await self.coordinator.close()
        await asyncio.gather(*helpers)
        return took

    async def emit(self):
        """As ``source.emit_plan`` does."""
        tasks = []
        for positions in remaining_groups(NUM_ROWS, GROUP_ROWS, Ledger(NUM_ROWS)):
            oldest = self.plan.oldest_version(0, positions)
            first = int(positions[0])
            if not await self.coordinator.acquire(self.attempt, GROUP_ROWS, first, oldest):
                break
            tasks.append(asyncio.ensure_future(self.answer(positions)))
        await asyncio.gather(*tasks)

    async def answer(self, positions):
        version = None
        if self.plan.by_student(0, positions).any():
            version = await self.sampler.answer(begun=lambda: self.version)
        await self.teacher.answer()
        first = int(positions[0])
        self.answers[first // GROUP_ROWS].set_result((positions, version))
        await self.coordinator.answered(self.attempt, first, GROUP_ROWS, {})

    async def follow(self):
        """The sampler pulls each newest version, and begins nothing while it loads."""
        serial = 0
        while (newest := await self.coordinator.newer_policy(serial)) is not None:
            self.sampler.going.clear()
            await asyncio.sleep(self.load_s)
            serial, self.version = newest["serial"], newest["version"]
            self.sampler.going.set()
            await self.coordinator.policy_loaded(serial, self.version)

    async def train(self):
        every = self.config.policy.sync_every_steps
        for step in range(NUM_STEPS):
            first = step * ROWS_PER_STEP // GROUP_ROWS
            for group in range(first, first + ROWS_PER_STEP // GROUP_ROWS):
                positions, version = await self.answers[group]
                await self.coordinator.taken(self.attempt, GROUP_ROWS)
                self.trained += positions.tolist()
                for position in positions[self.plan.by_student(0, positions)]:
                    self.staleness[self.plan.step_of(0, int(position)) - version] += 1
            await asyncio.sleep(self.student_s)
            if (step + 1) % every == 0:
                await self.coordinator.publish_policy(step + 1, {}, False)

    @property
    def slowest_s(self):
        """What the slowest part needs for its own work, never waiting."""
        by_student = self.plan.by_student(0, np.arange(NUM_ROWS)).reshape(-1, GROUP_ROWS)
        groups = int(by_student.any(axis=1).sum())
        return max(
            self.student_s * NUM_STEPS,
            self.sampler_s * groups / self.slots,
            self.teacher_s * NUM_GROUPS / self.slots,
        )


def config(**policy):
    return RunConfig.model_validate(
        {
            "teacher": {"model": "t", "target_ongoing_requests": 4},
            "student": {"layers": [0]},
            "prompts": {"path": "p.jsonl"},
            "policy": {"student_share": 1.0, **policy},
            "stream": {"group_rows": GROUP_ROWS, "order": "fixed"},
            "training": {"rows_per_step": ROWS_PER_STEP},
        }
    )


SLOW = {"student": {"student_s": 1.0}, "sampler": {"sampler_s": 1.0}, "teacher": {"teacher_s": 1.0}}


@pytest.mark.parametrize("share", [1.0, 0.5, {"from": 0.0, "to": 1.0, "over_steps": 40}])
@pytest.mark.parametrize("slow", SLOW)
def test_no_row_is_too_stale_and_the_slowest_part_never_waits(slow, share):
    rig = Rig(config(student_share=share, max_staleness_steps=4), **SLOW[slow])
    took = run_on_own_clock(rig.run())
    assert sorted(rig.trained) == list(range(NUM_ROWS))
    assert min(rig.staleness) >= 0 and max(rig.staleness) <= 4
    assert took <= 1.1 * rig.slowest_s, f"{took:.1f} s, the slowest part {rig.slowest_s:.1f} s"


def test_three_parts_of_one_speed_work_at_the_same_time():
    rig = Rig(config(max_staleness_steps=4), student_s=1.0, sampler_s=2.0, teacher_s=2.0)
    took = run_on_own_clock(rig.run())
    assert max(rig.staleness) <= 4
    assert took <= 1.1 * rig.slowest_s, f"{took:.1f} s, each part alone {rig.slowest_s:.1f} s"


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize(("bound", "every"), [(2, 1), (4, 2), (5, 4), (8, 3)])
def test_the_bound_holds_however_seldom_weights_are_published(slow, bound, every):
    rig = Rig(config(max_staleness_steps=bound, sync_every_steps=every), **SLOW[slow], load_s=0.3)
    run_on_own_clock(rig.run())
    assert sorted(rig.trained) == list(range(NUM_ROWS))
    assert min(rig.staleness) >= 0 and max(rig.staleness) <= bound


def test_a_sampler_that_loads_slowly_delays_the_run_and_not_the_bound():
    rig = Rig(config(max_staleness_steps=2), load_s=3.0)
    took = run_on_own_clock(rig.run())
    assert max(rig.staleness) <= 2
    assert took > NUM_STEPS, "every third version at least had to be loaded"
