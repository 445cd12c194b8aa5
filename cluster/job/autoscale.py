"""Number of teacher replicas that keep the student busy: the target for autoscaling.

Serve adds replicas for groups in flight, and a stream with an empty buffer always has as many in
flight as it may, whether or not the student keeps up. So the coordinator lets only so many be in
flight as this pool's replicas work on: one pool's worth at first, and more when the student was
seen to wait. When rows wait for the student the buffer is full, fewer groups are in flight, and
Serve drains replicas. *Consumes* the snapshots that the driver's main thread polls.
"""

import math
import time
from collections.abc import Callable, Mapping

from raystill.base import formatting
from raystill.config.run import RunConfig
from raystill.config.teacher import ReplicasConfig

NOTICEABLE = 0.10
"""Share of the student's time from which on its waiting counts."""


class ReplicaDemand:
    """Replicas worth having, from the share of its time that the student spent waiting for rows.

    A student that waits for the share w of its time behind n replicas would be kept busy by
    n / (1 - w) of them. Looked at over windows of at least one flight (the rows that those replicas
    answer at once, which come at once) and of ``upscale_delay_s``; the time up to the first step,
    when the student waits in any case, is left out.

    Of several teachers nobody knows which one the student waits for: there is no bound, and Serve
    scales each between its own ones by what is in flight at it.
    """

    def __init__(
        self,
        config: RunConfig,
        replicas: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bounds = config.teacher.num_replicas if config.teachers is None else None
        self._bounds = bounds if isinstance(bounds, ReplicasConfig) else None
        self._groups_each = config.groups_per_replica
        rows_each = self._groups_each * config.stream.group_rows
        self._rows_at_once = min(rows_each, config.teacher.slots)
        self._replicas = replicas
        self._clock = clock
        self._wanted = self._fewest
        self._since = 0.0
        self._before: Mapping[str, float] | None = None
        self.wait_share = 0.0

    @property
    def wanted(self) -> int:
        """Replicas whose groups may be in flight now."""
        return self._wanted

    @property
    def groups_in_flight(self) -> int | None:
        """What the coordinator is to allow; None: no bound, for a fixed pool or a whole one."""
        if self._bounds is None or self._wanted >= self._bounds.max:
            return None
        return self._wanted * self._groups_each

    def look(self, counters: Mapping[str, float]) -> bool:
        """Take the coordinator's counters; whether ``groups_in_flight`` is another than before."""
        if self._bounds is None or not counters.get("student_rows"):
            return False
        if self._before is None:
            self._begin(counters)
        seconds = self._clock() - self._since
        flight = self._wanted * self._rows_at_once
        if seconds < self._bounds.upscale_delay_s or self._grown(counters, "student_rows") < flight:
            return False
        waited, busy = (self._grown(counters, f"student_{n}_s") for n in ("wait", "busy"))
        self._begin(counters)
        self.wait_share = waited / (waited + busy) if waited + busy > 0 else 0.0
        before, running = self._wanted, max(1, self._replicas())
        needed = running / max(1.0 - self.wait_share, 1e-3)
        wanted = math.ceil(needed - 1e-9) if self.wait_share >= NOTICEABLE else running
        self._wanted = min(max(wanted, self._fewest), self._bounds.max)
        return self._wanted != before

    @property
    def sentence(self) -> str:
        """What was found last, for the live view."""
        return (
            f"the student waits {formatting.share(self.wait_share)} of its time: up to "
            f"{formatting.plural(self._wanted, 'teacher replica')} from now on"
        )

    @property
    def _fewest(self) -> int:
        return max(1, self._bounds.min) if self._bounds is not None else 1

    def _begin(self, counters: Mapping[str, float]) -> None:
        self._since, self._before = self._clock(), dict(counters)

    def _grown(self, counters: Mapping[str, float], name: str) -> float:
        assert self._before is not None, "no window has begun"
        return counters.get(name, 0.0) - self._before.get(name, 0.0)
