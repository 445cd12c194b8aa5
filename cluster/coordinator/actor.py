"""The run's coordinator: an actor with the row credits, dropped rows, counters and stop flag.

It carries no rows. *Consumes*: the source asks it for credits, the answer stage reports drops, the
teacher and the workers report counters, rank 0 publishes what the restored weights have learned.
*Waits for it*: the source (credits), the driver (held-out rows, snapshots), the workers (stop).

Credits bound the rows ahead and the groups in flight (``cluster/credits.py``). An attempt is one
pass of a life of the worker group: ``publish`` starts it, and calls that name an older one change
nothing.
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Any

from raystill.cluster.coordinator.credits import Credits, Drops, RejectedByEpoch
from raystill.cluster.coordinator.gates import Gates
from raystill.cluster.coordinator.lives import TeacherLives
from raystill.cluster.coordinator.policy import PolicyVersions
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.datasets.stream.ledger import Ledger

PHASES_KEPT = 16  # More than can begin between two looks of the driver.


class Coordinator(Gates):
    """State of one run, as an async actor (see ``start_coordinator``); plain to test without Ray.

    ``refill_rows`` and ``bounds`` are those of `Credits`; of ``num_rows`` (one epoch) a share of
    ``max_drop_fraction`` may be dropped, and ``max_rejected_fraction`` rejected by filters.
    """

    def __init__(
        self,
        max_rows_ahead: int,
        num_rows: int,
        max_drop_fraction: float,
        refill_rows: int = 0,
        max_rejected_fraction: float = 1.0,
        **bounds: Any,
    ) -> None:
        super().__init__()
        self._credits = Credits(max_rows_ahead, refill_rows, **bounds)
        self._emitted: list[int] = []
        self._drops = Drops(num_rows, max_drop_fraction, max_rejected_fraction)
        self._rejected = RejectedByEpoch()
        self._policy = PolicyVersions()
        self._changed = asyncio.Condition()
        self._teachers: defaultdict[str, TeacherLives] = defaultdict(TeacherLives)
        self._poison: set[int] = set()
        self._lives = 0
        self._published: dict[str, Any] | None = None
        self._attempt = 0
        self._begun = bytearray()
        """A bit for each position: whether a group that begins there was asked for already."""
        self._counters: Counter[str] = Counter()
        self._progress: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}
        self._phases: deque[tuple[int, str]] = deque(maxlen=PHASES_KEPT)
        self._outcome: str | None = None
        self._error: str | None = None
        self._stop = 0
        self._closed = False

    # What rank 0 says before anybody iterates

    async def publish(
        self, epoch: int, step: int, ledger: dict[str, Any], restored: bool = True
    ) -> int:
        """Start an attempt: a pass of the stream over what ``ledger`` lacks; returns its number.

        ``restored``: the worker group begins a life, from a checkpoint or from nothing; else it
        goes on to the next epoch. Credits start afresh. Drops since the checkpoint are forgotten:
        their rows are asked again.
        """
        async with self._changed:
            self._attempt += 1
            self._lives += restored
            self._rejected.begin(epoch, self._drops.by_filter().total())
            learned = {"epoch": epoch, "step": step, "ledger": ledger}
            self._published = {"attempt": self._attempt, **learned}
            self._emitted = []
            left = Ledger.from_dict(ledger)
            self._begun = bytearray(left.num_rows // 8 + 1)
            self._credits.begin(rows_left=len(left.missing()))
            self._drops.begin(ledger)
            self._changed.notify_all()
            return self._attempt

    async def published(self) -> dict[str, Any] | None:
        """``{attempt, epoch, step, ledger}`` of the newest attempt; None before the first."""
        return self._published

    # Credits

    async def acquire(
        self, attempt: int, rows: int, group: int, oldest_version: int | None = None
    ) -> bool:
        """Credits for the rows of a group; waits for room. False: stop emitting.

        ``oldest_version``: the student writes some of its rows, with such weights or newer ones,
        for which it waits too. ``group`` names the group by its first position, so that a source
        that Ray runs again gets its old credits back, also where the earlier call still waits.
        """
        self._credits.require_fit(rows)
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    not self._current(attempt)
                    or (
                        self._policy.may_write(oldest_version)
                        and self._credits.may_have(group, rows)
                    )
                )
            )
            if not self._current(attempt):
                return False
            self._credits.grant(group, rows)
            return True

    async def acquire_one(
        self, attempt: int, number: int, offers: list[tuple[int, int, str]]
    ) -> int | None:
        """As ``acquire``, for the first of several groups that may have its credits; which one.

        offers: first position, rows and teacher of each, in plan order. number: how many groups
        this source has emitted in the attempt. One that Ray runs again emits them in the same
        order, since Ray takes what it emits by its place. None: stop emitting.
        """
        for _, rows, _ in offers:
            self._credits.require_fit(rows)
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    not self._current(attempt)
                    or number < len(self._emitted)
                    or self._credits.first_of(offers) is not None
                )
            )
            if not self._current(attempt):
                return None
            if number == len(self._emitted):
                chosen = self._credits.first_of(offers)
                assert chosen is not None, "a credit was there, and nothing ran since"
                self._credits.grant(*chosen)
                self._emitted.append(chosen[0])
            return self._emitted[number]

    async def let_in_flight(self, groups: int | None) -> None:
        """From now on at most so many groups in flight; None: as many as there are credits for."""
        async with self._changed:
            self._credits.max_in_flight = groups
            self._changed.notify_all()

    async def answered(
        self, attempt: int, group: int, rows: int, counters: dict[str, float]
    ) -> None:
        """All of a group's ``rows`` have their answers or were dropped; counts as ``add``."""
        self._counters.update(counters)
        async with self._changed:
            if self._current(attempt):
                self._credits.answer(group, rows)
                self._changed.notify_all()

    async def taken(self, attempt: int, rows: int) -> None:
        """A worker took a block of so many rows off its iterator: they are no longer ahead."""
        await self._give_back(attempt, rows)

    async def dropped(
        self, attempt: int, positions: list[int], reasons: list[str], poison: Sequence[int] = ()
    ) -> None:
        """Rows that will not come. Their credits return, once; RunError beyond the limit.

        ``poison``: the rows among them that are never asked again in this run.
        """
        self._poison.update(poison)
        if not self._current(attempt):
            return
        new = self._drops.add(dict(zip(positions, reasons, strict=True)))
        await self._give_back(attempt, new)
        self._drops.require_few()

    async def dropped_positions(self) -> dict[int, str]:
        """Reason of each position dropped in this epoch."""
        return dict(self._drops.reasons)

    async def begins(self, attempt: int, position: int) -> bool:
        """Note that a group is looked for, by its first position; whether an earlier try was."""
        if not self._current(attempt):
            return False
        byte, bit = position // 8, 1 << position % 8
        before = bool(self._begun[byte] & bit)
        self._begun[byte] |= bit
        return before

    async def dropped_of(self, attempt: int, positions: list[int]) -> list[int]:
        """Those of a group's positions that were dropped in this attempt, by an earlier try of it.

        Their credits have returned: were they answered after all, they would be returned twice.
        """
        return self._drops.among(positions) if self._current(attempt) else []

    async def poison_rows(self) -> list[int]:
        """Rows that cost replicas each time they were asked."""
        return sorted(self._poison)

    # The teachers, by the names that they have among several

    async def want_teacher(self, name: str = "") -> int:
        """Something is not in the store: the teacher is needed. Which of its lives will answer."""
        return await self._teachers[name].want()

    async def wait_teacher_wanted(self, name: str = "") -> bool:
        """Wait until the teacher is needed (True), or will not be any more."""
        if not self._closed:
            await self._teachers[name].wanted.wait()
        return not self._closed

    async def wait_teacher_idle(self, last_epoch: int, name: str = "") -> bool:
        """Until all rows have answers: True, and wishes wait for ``teacher_gone``. False: over.

        Dropped rows are asked again in the next epoch. A teacher that came back (an answer was
        damaged) stays for the rest of the attempt.
        """
        teacher = self._teachers[name]
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._over
                    or (teacher.let_go_in != self._attempt and self._all_answered(last_epoch))
                )
            )
            if self._over:
                return False
            teacher.let_go(self._attempt)
            return True

    async def teacher_gone(self, name: str = "") -> None:
        """It has no replicas (any more); another life begins when it is wanted."""
        self._teachers[name].gone()

    async def teacher_served(self) -> bool:
        """Whether a teacher has replicas that answer, or is about to have them."""
        return any(one.served for one in self._teachers.values()) or not self._teachers

    async def close(self) -> None:
        """The driver is about to leave: end every wait for the teacher to be needed."""
        async with self._changed:
            self._closed = True
            for teacher in self._teachers.values():
                teacher.close()
            self._changed.notify_all()

    # The student's sampler

    async def publish_policy(self, version: int, weights: dict[str, Any], restored: bool) -> None:
        """Rank 0's newest weights (`PolicyVersions`): references in lists, so that none is read."""
        async with self._changed:
            self._policy.publish(version, weights, restored)
            self._changed.notify_all()

    async def hold(self, value: Any) -> list[Any]:
        """A reference to ``value`` in Ray's object store, of which this actor is the owner.

        Owned by the worker that made it, the value would be lost with the worker.
        """
        import ray

        return [await asyncio.to_thread(ray.put, value)]

    async def newer_policy(self, serial: int) -> dict[str, Any] | None:
        """The newest weights, as soon as they are newer than ``serial``; None: the run is over."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or self._policy.is_newer(serial))
            return None if self._over else self._policy.newest

    async def policy_loaded(self, serial: int, version: int) -> None:
        """A sampler answers with these weights, and proved them on the probe."""
        async with self._changed:
            self._policy.loaded(serial, version)
            self._changed.notify_all()

    # What the parts report, and the driver reads

    async def add(self, counters: dict[str, float]) -> None:
        """Add to the run's counters (rows asked, teacher tokens, busy seconds, ...)."""
        self._counters.update(counters)

    async def progress(self, metrics: dict[str, Any]) -> None:
        """The newest step's metrics, from rank 0."""
        self._progress = dict(metrics)

    async def evaluated(self, figures: dict[str, Any]) -> None:
        """The newest evaluation's figures, from rank 0."""
        self._evaluation = dict(figures)

    async def phase(self, name: str, after: str | None = None) -> None:
        """What the run is doing from now on, in a few words; with ``after``: if it did that."""
        number, present = self._phases[-1] if self._phases else (0, "")
        if name != present and after in (None, present):
            self._phases.append((number + 1, name))

    async def wait_may_ask_held_out(self) -> None:
        """Until the rows that come first are answered, or nobody asks as the teacher comes up."""
        if self._credits.before_held_out:
            await self._teacher_answers.wait()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._over or self._published is None or self._credits.may_ask_held_out
            )

    async def held_out_ready(self) -> None:
        """The held-out rows are answered and written, and others have their places."""
        self._held_out.set()
        async with self._changed:
            self._credits.beside_held_out = None
            self._changed.notify_all()

    async def request_stop(self, signum: int) -> None:
        """Ask the workers to finish their step, checkpoint and return."""
        self._stop = int(signum)

    async def stop_requested(self) -> int:
        """Number of the signal that asked for a stop; 0: none."""
        return self._stop

    async def finished(self, outcome: str) -> None:
        """The run is over (``completed`` or ``stopped``): nobody gets further credits."""
        async with self._changed:
            self._outcome = outcome
            self._changed.notify_all()

    async def failed(self, message: str) -> None:
        """Keep the first error a part of a running run stopped with, for the driver to print."""
        if self._outcome is None:
            self._error = self._error or message

    async def snapshot(self) -> Snapshot:
        """All that a view or a summary needs."""
        return Snapshot(
            phases=tuple(self._phases),
            lives=self._lives,
            from_step=self._published["step"] if self._published else 0,
            counters=dict(self._counters),
            rows_ahead=self._credits.ahead,
            max_rows_ahead=self._credits.max_rows_ahead,
            max_rows_ahead_seen=self._credits.max_ahead_seen,
            progress=dict(self._progress),
            evaluation=dict(self._evaluation),
            dropped=dict(self._drops.by_reason()),
            filtered=dict(self._drops.by_filter()),
            filtered_by_epoch=self._rejected.with_running(self._drops.by_filter().total()),
            outcome=self._outcome,
            error=self._error,
        )

    @property
    def _over(self) -> bool:
        return self._closed or self._outcome is not None

    def _all_answered(self, last_epoch: int) -> bool:
        if self._published is None:
            return False
        # What a filter has rejected is in the store.
        asks_again = self._drops.by_reason() and self._published["epoch"] < last_epoch
        return self._credits.rows_left <= 0 and not asks_again

    def _current(self, attempt: int) -> bool:
        return attempt == self._attempt and self._outcome is None

    async def _give_back(self, attempt: int, rows: int) -> None:
        async with self._changed:
            if attempt == self._attempt:
                try:
                    self._credits.give_back(rows)
                finally:
                    self._changed.notify_all()


def start_coordinator(name: str, *bounds: Any, **more_bounds: Any) -> Any:
    """Start the actor on this node and return its handle; it dies with the driver.

    The bounds are those of `Coordinator`. A new driver makes a new one: a dead driver's counters
    mean nothing. ValueError: ``name`` lives.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Coordinator).options(
        name=f"coordinator-{name}",
        namespace="raystill",
        num_cpus=0,
        max_restarts=0,
        scheduling_strategy=here,
    )
    return actor.remote(*bounds, **more_bounds)
