"""Waits for resources: what is awaited, since when, what there is, and the limit that ends it.

Ray Train asks for its workers' places for ever, and Serve for its replicas'. The driver's watching
thread looks here; a teacher's own limit is kept by `TeacherApp.wait`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.config.teacher import section_of, who_is
from raystill.placement.requests import describe, student_resources
from raystill.serve.deploy import TeacherApp, first_replicas

LOOK_EVERY_S = 5.0
TELL_AFTER_S = 30.0


@dataclass
class Wait:
    """One thing that waits for resources; shown once, when the wait has lasted half a minute.

    ``what``: the thing with its resources, in words. ``setting`` holds ``limit_s``.
    """

    what: str
    setting: str
    limit_s: float
    since: float | None = None
    shown: bool = False

    def look(self, absent: bool, now: float, there: Callable[[], str]) -> str | None:
        """The line to show, if it is time for one. ``there``: what the cluster has, in words.

        Raises RunError when the wait has reached its limit.
        """
        if not absent:
            self.since, self.shown = None, False
            return None
        if self.since is None:
            self.since = now
        waited = now - self.since
        if waited >= self.limit_s:
            raise RunError(
                f"{self.what} had no place for {formatting.duration(waited)}, which is "
                f"{self.setting} ({self.limit_s:.0f} s); {there()}; free or add resources, ask for "
                "less, or raise the limit; the same command goes on from the last checkpoint"
            )
        if waited < TELL_AFTER_S or self.shown:
            return None
        self.shown = True
        return (
            f"waiting for {self.what}, {formatting.duration(waited)} so far, at most "
            f"{formatting.duration(self.limit_s)} ({self.setting}); {there()}"
        )


class Waits:
    """What a run's driver looks after: the workers' places, and those of the first replicas."""

    def __init__(self, config: RunConfig, teachers: Mapping[str, TeacherApp]) -> None:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self._bundle = student_resources(config, has_gpus)
        training = config.training
        self._workers = Wait(
            f"{formatting.plural(training.min_workers, 'student worker')} of "
            f"{describe(self._bundle)} each",
            "training.startup_timeout_s",
            training.startup_timeout_s,
        )
        self._replicas = [
            (
                teachers[name],
                Wait(
                    f"{who_is(name)}, {first_replicas(one, has_gpus)}",
                    f"{section_of(name)}.startup_timeout_s",
                    one.teacher.startup_timeout_s,
                ),
            )
            for name, one in config.by_teacher.items()
        ]
        scores = config.evaluation.enabled and config.scores_student_answers
        self._kept = config.policy.enabled or scores
        """Whether a teacher is needed to the end: its replicas may lose their nodes until then."""
        self._next_look = 0.0

    def look(self, teacher_is_starting: bool) -> list[str]:
        """Lines to show now; mostly none. RunError where a wait is over its limit."""
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + LOOK_EVERY_S
        lines = [self._workers.look(not has_worker_group(self._bundle), now, what_there_is)]
        if teacher_is_starting or self._kept:
            lines += [
                wait.look(app.waits_for_resources(), now, what_there_is)
                for app, wait in self._replicas
            ]
        return [line for line in lines if line is not None]

    @property
    def without_workers(self) -> bool:
        """Whether the workers have waited so long that it was shown."""
        return self._workers.shown


def what_there_is() -> str:
    """The cluster's resources and what is free of them, in words."""
    return (
        f"the cluster has {describe(ray.cluster_resources())}, of which free "
        f"{describe(ray.available_resources())}"
    )


def has_worker_group(bundle: dict[str, float]) -> bool:
    """Whether this driver's Ray Train run has its places: a placement group of such bundles.

    Ray Train makes a new one for each life of the workers, without a name; Serve names its own.
    """
    from ray.core.generated import gcs_pb2

    mine = bytes.fromhex(ray.get_runtime_context().get_job_id())
    table: list[bytes] = (
        ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    )
    for entry in table:
        group: Any = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.creator_job_id != mine or group.name or not group.bundles:
            continue
        placed = group.state == gcs_pb2.PlacementGroupTableData.CREATED
        asked = group.bundles[0].unit_resources
        if placed and all(asked.get(name) == amount for name, amount in bundle.items()):
            return True
    return False
