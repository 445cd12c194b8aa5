"""The driver's main thread while a run goes on: it looks at all parts, and holds no rows.

Consumes the coordinator's snapshots, once a second. Waits for: the student's thread. Unblocked
by: its end, an error in any part, a signal, or a wait for resources that has lasted too long.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from raystill.base.errors import RunError
from raystill.base.logs import run_name
from raystill.base.records import MetricsLog
from raystill.base.run_folder import TIMELINE, RunFolder
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.job.autoscale import ReplicaDemand
from raystill.cluster.job.driver_process import StopSignals
from raystill.cluster.job.waiting import Waits
from raystill.cluster.report.exporters import Telemetry, TensorBoard
from raystill.cluster.report.live import LiveView
from raystill.cluster.report.page.during import LivePage
from raystill.cluster.report.summary import RunResult
from raystill.cluster.report.timeline import Timeline
from raystill.cluster.report.trackers import Trackers
from raystill.datasets.lookup.keeping import StoreIndex
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.plan import num_steps
from raystill.run import Run
from raystill.serve.deploy import TeacherApps

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
    """What is kept of a run while it goes on: timeline, Ray metrics, TensorBoard, trackers."""

    def __init__(self, run: Run, teacher: TeacherApps, trackers: Trackers) -> None:
        self._trackers = trackers
        self._num_replicas = teacher.num_replicas
        log = MetricsLog(run.folder, TIMELINE)
        self._timeline = Timeline(log, teacher.num_replicas, samplers=samplers_of(run))
        self._telemetry = Telemetry(run_name(run.folder.path))
        wanted = run.config.output.tensorboard
        self._board = TensorBoard(run.folder.logs / "tensorboard") if wanted else None
        self._looks = 0

    def look(self, snapshot: Snapshot) -> None:
        """Take a snapshot."""
        self._timeline.look(snapshot)
        if self._looks % TELL_EVERY == 0:
            self._telemetry.update(snapshot, self._num_replicas())
        self._looks += 1
        self._trackers.update(snapshot)
        if self._board is not None:
            self._board.update(snapshot)

    def close(self, snapshot: Snapshot) -> None:
        """Take the last one."""
        self._timeline.close(snapshot)
        self._telemetry.update(snapshot, self._num_replicas())
        self._trackers.update(snapshot)
        if self._board is not None:
            self._board.update(snapshot)
            self._board.close()


def samplers_of(run: Run) -> Callable[[], int] | None:
    """What tells how many samplers of the student answer; None where it writes no rows."""
    if not run.config.policy.enabled:
        return None
    from raystill.serve.sampler_app import SamplerApp

    return SamplerApp(run).num_replicas


def watch(
    run: Run, prepared: Prepared, teacher: Background, student: Background, trackers: Trackers
) -> RunResult:
    """Start both threads and show the run until the student has ended, then end the teacher.

    Raises what went wrong in either thread, as a RunError.
    """
    started = time.time()
    app, training = TeacherApps(run), run.config.training
    steps = num_steps(run.num_rows, training.rows_per_step) * training.epochs
    with (
        StopSignals() as signals,
        LiveView(run.num_rows * training.epochs, steps, run.folder.path) as view,
    ):
        page = LivePage(run.folder, view.note)
        watcher = Watcher(run, signals, view, page, Records(run, app, trackers))
        teacher.start()
        student.start()
        try:
            snapshot = watcher.watch(teacher, student)
        finally:
            page.wait()
            run.coordinator.close.remote()
            app.shutdown()
    return RunResult(
        snapshot=snapshot,
        prepared=prepared,
        rows_requested=StoreIndex(TeacherStore(run.store_path)).look_through().requested_by(run.id),
        stopped_by=signals.received if snapshot.outcome != "completed" else 0,
        wall_s=time.time() - started,
        phases=view.phases,
    )


class Watcher:
    """Looks at all parts of a run once a second: what the main thread does while it goes on."""

    def __init__(
        self, run: Run, signals: StopSignals, view: LiveView, page: LivePage, records: Records
    ) -> None:
        app = TeacherApps(run)
        self._run = run
        self._signals = signals
        self._view = view
        self._demand = ReplicaDemand(run.config, app.num_replicas)
        self._waits = Waits(run.config, app.by_name)
        self._records = records
        self._page = page
        self._asked_to_stop = False
        run.coordinator.let_in_flight.remote(self._demand.groups_in_flight)

    def watch(self, teacher: Background, student: Background) -> Snapshot:
        """Look until the student has ended, or nothing is worth waiting for; the last snapshot."""
        folder = self._run.folder
        while student.is_alive():
            snapshot = self._look()
            if teacher.error is not None:
                raise failure("the teacher", teacher.error, folder) from teacher.error
            if snapshot.error:
                raise RunError(snapshot.error)
            for line in self._waits.look(teacher.is_alive()):
                self._view.note(line)
            if self._signals.received and not self._keeps_going(snapshot):
                return snapshot
            student.join(POLL_S)
        if student.error is not None:
            raise failure("the student", student.error, folder) from student.error
        snapshot = ray.get(self._run.coordinator.snapshot.remote())
        self._view.update(snapshot)
        self._records.close(snapshot)
        return snapshot

    def _look(self) -> Snapshot:
        """Take the newest snapshot: show it, follow the student's demand, keep the records."""
        snapshot: Snapshot = ray.get(self._run.coordinator.snapshot.remote())
        self._view.update(snapshot)
        if self._demand.look(snapshot.counters):
            self._run.coordinator.let_in_flight.remote(self._demand.groups_in_flight)
            self._view.note(self._demand.sentence)
        self._records.look(snapshot)
        self._page.look()
        return snapshot

    def _keeps_going(self, snapshot: Snapshot) -> bool:
        """After a signal: whether a checkpoint is worth waiting for. Asks for it, once."""
        if self._waits.without_workers:
            self._view.note(
                "stopping: no worker has a place, so no newer checkpoint can be written"
            )
            return False
        if not self._asked_to_stop:
            self._asked_to_stop = True
            if not snapshot.progress:
                self._view.note(f"stopping: {nothing_to_keep(snapshot.from_step)}")
                return False
            self._run.coordinator.request_stop.remote(self._signals.received)
            self._view.note("stopping: finishing the step, then a checkpoint (once more to abort)")
        return True


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
