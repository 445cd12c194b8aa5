"""The driver's main thread while a run goes on: it looks at all parts, and holds no rows.

Consumes the coordinator's snapshots, once a second. Waits for: the student's thread. Unblocked
by: its end, an error in any part, a signal, or a wait for resources that has lasted too long.
"""

import threading
from collections.abc import Callable
from typing import Any

import ray

from raystill.base.errors import RunError
from raystill.base.logs import run_name
from raystill.base.records import MetricsLog
from raystill.base.run_folder import TIMELINE, RunFolder
from raystill.cluster.job.autoscale import ReplicaDemand
from raystill.cluster.job.driver_process import StopSignals
from raystill.cluster.job.waiting import Waits
from raystill.cluster.report.exporters import Telemetry, TensorBoard
from raystill.cluster.report.live import LiveView
from raystill.cluster.report.timeline import Timeline
from raystill.config.run import RunConfig
from raystill.serve import deploy

POLL_S = 1.0
TELL_EVERY = 10  # looks: as often as Ray exports by default; Serve's status is dear to ask for


class Background(threading.Thread):
    """A named thread that keeps its error for the watching thread instead of printing it."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error


def threads_left(timeout_s: float = 0.0) -> list[Background]:
    """Background threads that still run after a wait of up to ``timeout_s`` for each."""
    threads = [t for t in threading.enumerate() if isinstance(t, Background)]
    for thread in threads:
        thread.join(timeout_s)
    return [thread for thread in threads if thread.is_alive()]


class Records:
    """What is kept of a run while it goes on: its timeline, Ray metrics, TensorBoard events."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._timeline = Timeline(MetricsLog(folder, TIMELINE), deploy.num_replicas)
        self._telemetry = Telemetry(run_name(folder.path))
        wanted = config.output.tensorboard
        self._board = TensorBoard(folder.logs / "tensorboard") if wanted else None
        self._looks = 0

    def look(self, snapshot: dict[str, Any]) -> None:
        """Take a snapshot."""
        self._timeline.look(snapshot)
        if self._looks % TELL_EVERY == 0:
            self._telemetry.update(snapshot, deploy.num_replicas())
        self._looks += 1
        if self._board is not None:
            self._board.update(snapshot)

    def close(self, snapshot: dict[str, Any]) -> None:
        """Take the last one."""
        self._timeline.close(snapshot)
        self._telemetry.update(snapshot, deploy.num_replicas())
        if self._board is not None:
            self._board.update(snapshot)
            self._board.close()


def watch(
    config: RunConfig,
    teacher: Background,
    student: Background,
    coordinator: Any,
    demand: ReplicaDemand,
    signals: StopSignals,
    view: LiveView,
    folder: RunFolder,
) -> dict[str, Any]:
    """Show the run until the student has ended; raise what went wrong in either thread."""
    asked_to_stop, waits = False, Waits(config)
    records = Records(config, folder)
    while student.is_alive():
        snapshot = ray.get(coordinator.snapshot.remote())
        view.update(snapshot)
        if demand.look(snapshot["counters"]):
            coordinator.let_in_flight.remote(demand.groups_in_flight)
            view.note(demand.told)
        records.look(snapshot)
        if teacher.error is not None:
            raise failure("the teacher", teacher.error, folder) from teacher.error
        if snapshot["error"]:
            raise RunError(snapshot["error"])
        for line in waits.look(teacher.is_alive()):
            view.note(line)
        if signals.received and waits.without_workers:
            view.note("stopping: no worker has a place, so no newer checkpoint can be written")
            return snapshot
        if signals.received and not asked_to_stop:
            asked_to_stop = True
            if not snapshot["progress"]:
                view.note(f"stopping: {nothing_to_keep(snapshot['from_step'])}")
                return snapshot
            coordinator.request_stop.remote(signals.received)
            view.note("stopping: finishing the step, then a checkpoint (once more to abort)")
        student.join(POLL_S)
    if student.error is not None:
        raise failure("the student", student.error, folder) from student.error
    snapshot = ray.get(coordinator.snapshot.remote())
    view.update(snapshot)
    records.close(snapshot)
    return snapshot


def nothing_to_keep(from_step: int) -> str:
    """Why no checkpoint is written before this start has made a step."""
    if from_step:
        return f"nothing was trained since the checkpoint of step {from_step}"
    return "nothing was trained yet, so there is nothing to keep"


def failure(who: str, error: BaseException, folder: RunFolder) -> RunError:
    """One sentence a person can act on, naming the log folder that holds the rest."""
    if isinstance(error, RunError):
        # Raised in a task it is also Ray's own error, whose text is the traceback from there.
        cause = getattr(error, "cause", None)
        return RunError(str(cause)) if isinstance(cause, RunError) else error
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    return RunError(f"{who} failed: {last}; the whole output is in {folder.logs}/")
