"""One run on a Ray cluster: start teacher and student side by side, watch them, end in order.

Waits for: the teacher's first replica, then ``fit`` returning. Unblocked by: the coordinator's
outcome, a failure in either thread, or a signal. The main thread only watches; it holds no rows.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray

from raystill.base.errors import Problem
from raystill.base.logs import run_name, say_where
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.cluster import check_cluster
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.cluster.job import connect
from raystill.cluster.job.autoscale import ReplicaDemand
from raystill.cluster.job.driver_process import StopSignals, unique_actor
from raystill.cluster.job.manifest import run_id
from raystill.cluster.job.watch import Background, threads_left, watch
from raystill.cluster.report.live import LiveView
from raystill.config.run import RunConfig
from raystill.datasets.store.store import RowCounts, TeacherStore, rows_requested_by
from raystill.datasets.stream.held_out import answer_held_out
from raystill.datasets.stream.plan import num_steps
from raystill.datasets.stream.spec import Requester, StreamSpec
from raystill.model.on_node import ModelSource
from raystill.serve import deploy
from raystill.train.evaluation.probe import is_due, probe_teacher
from raystill.train.worker.fit import fit

LEAVE_S = 5.0
LOADING = "loading the teacher and the student"
ASKING = "asking the teacher the held-out prompts"
LOADING_STUDENT = "loading the student"


@dataclass
class RunResult:
    """How a run ended: what the summary is written from."""

    snapshot: dict[str, Any]
    stopped_by: int = 0
    step: int = 0
    wall_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    prepared: Prepared | None = None
    paid: dict[str, RowCounts] = field(default_factory=dict)


@contextmanager
def connected(config: RunConfig, folder: RunFolder, *, for_check: bool = False) -> Iterator[None]:
    """Connect to the cluster (or start a local one), and leave it in order."""
    say_where(run=run_name(folder.path), role="driver")
    connect.connect(config.cluster, None if for_check else folder.logs)
    try:
        yield
    finally:
        connect.disconnect(in_use=bool(threads_left(LEAVE_S)))


def check_on_cluster(config: RunConfig) -> list[Problem]:
    """The part of the check that needs the cluster's answer."""
    return check_cluster(config, tell=lambda line: print(line, flush=True))


def distil(
    config: RunConfig, folder: RunFolder, prepared: Prepared, probe: bool = True
) -> RunResult:
    """Serve the teacher, stream its answers, fit the student; returns when all is written.

    probe: compare the served teacher with the plain model before the first step, where it is due.
    """
    started = time.time()
    rows = prepared.num_train_rows
    start = partial(
        start_coordinator,
        f"{run_name(folder.path)}-{run_id(folder)}",
        max_rows_ahead=config.rows_ahead,
        max_drop_fraction=config.stream.max_drop_fraction,
        num_rows=rows,
        refill_rows=config.refill_rows,
    )
    coordinator = unique_actor(start, folder)
    spec = stream_spec(config, folder, prepared, coordinator)
    deploy.use_app(spec.app_name)
    demand = ReplicaDemand(config.teacher, config.stream.group_rows, deploy.num_replicas)
    coordinator.let_in_flight.remote(demand.groups_in_flight)
    served = not prepared.stored.covers_all
    probe = probe and served and is_due(config, folder, prepared.teacher_folder)
    if probe:
        coordinator.hold_training.remote()
    teacher = Background("teacher", lambda: serve_teacher(config, folder, prepared, spec, probe))
    student = Background(
        "student",
        lambda: fit(config, folder, spec, coordinator, prepared.teacher_folder),
    )
    epochs = config.training.epochs
    steps = num_steps(rows, config.training.rows_per_step) * epochs
    with StopSignals() as signals, LiveView(rows * epochs, steps, folder.path) as view:
        teacher.start()
        student.start()
        try:
            parts = (teacher, student, coordinator, demand)
            snapshot = watch(config, *parts, signals, view, folder)
        finally:
            coordinator.close.remote()
            deploy.shutdown_teacher()
    return RunResult(
        snapshot=snapshot,
        stopped_by=signals.received if snapshot["outcome"] != "completed" else 0,
        step=int(snapshot["progress"].get("step", snapshot["from_step"])),
        wall_s=time.time() - started,
        phases=view.phases,
        prepared=prepared,
        paid=rows_requested_by(TeacherStore(spec.store_path).catalogue(), spec.requester.run),
    )


def stream_spec(
    config: RunConfig, folder: RunFolder, prepared: Prepared, coordinator: Any
) -> StreamSpec:
    """The run's stream. Its id is what answers are paid for by, and in the application's name."""
    requester = Requester(
        run=run_id(folder) or "",
        purpose="training",
        teacher_identity=prepared.teacher_identity,
        teacher=config.teacher.model,
    )
    return StreamSpec.from_config(
        config,
        folder.join("prompts/train.parquet"),
        prepared.num_train_rows,
        coordinator,
        deploy.app_name(requester.run),
        prepared.store_path,
        requester,
        prepared.signal,
    )


def serve_teacher(
    config: RunConfig, folder: RunFolder, prepared: Prepared, spec: StreamSpec, probe: bool
) -> None:
    """Deploy the teacher if the store cannot answer all; held-out prompts answered; the probe.

    A teacher that seemed not to be needed is deployed when somebody asks for it: a stored answer
    may turn out to be damaged. When every row has its answer it is let go, and its resources with
    it, while the student goes on.
    """
    coordinator = spec.coordinator
    coordinator.phase.remote(LOADING)
    held_out = []
    requester = replace(spec.requester, purpose="evaluation")
    if prepared.num_held_out_rows:
        ask = (folder, config, spec.store_path, requester, spec.app_name, coordinator)
        held_out = [answer_held_out.remote(*ask)]
    if prepared.stored.covers_all and not wait_until_wanted(coordinator, held_out):
        return
    deploy.deploy_teacher(config, prepared.teacher_folder, coordinator, folder.logs)
    deploy.wait_for_teacher(config.teacher.startup_timeout_s)
    if held_out:
        coordinator.phase.remote(ASKING)
        ray.get(held_out)
        coordinator.phase.remote(LOADING_STUDENT, after=ASKING)  # Unless the worker is up.
    if probe:
        source = ModelSource.of(config.teacher.model, prepared.teacher_folder)
        ray.get(probe_teacher.remote(folder, config, source, coordinator))
    if config.evaluation.enabled and config.evaluation.free_running.teacher_scores:
        return  # It is to score what the finished student writes.
    while ray.get(coordinator.wait_teacher_idle.remote(config.training.epochs - 1)):
        deploy.end_teacher()
        ray.get(coordinator.teacher_gone.remote())
        if not ray.get(coordinator.wait_teacher_wanted.remote()):
            return
        deploy.deploy_teacher(config, prepared.teacher_folder, coordinator, folder.logs)
        deploy.wait_for_teacher(config.teacher.startup_timeout_s)


def wait_until_wanted(coordinator: Any, others: list[Any]) -> bool:
    """Wait until something is not in the store, or the run is over: False. Raises as ``others``."""
    wanted = coordinator.wait_teacher_wanted.remote()
    pending = [wanted, *others]
    while wanted in pending:
        done, pending = ray.wait(pending)
        ray.get(done)
    return bool(ray.get(wanted))
