"""One run on a Ray cluster: what the driver's page is made of.

The teacher and the student start side by side, each in a thread of the driver. *Waits for*: the
teacher's first replica, then ``fit`` returning. The main thread only watches (``watch.py``); it
holds no rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from threading import Thread
from typing import Any

import ray

from raystill.base.errors import Problem
from raystill.base.logs import run_name, say_where
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.cluster import check_cluster
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.cluster.coordinator.credits import parts_of
from raystill.cluster.coordinator.duplicates import start_duplicates
from raystill.cluster.job import connect
from raystill.cluster.job.driver_process import unique_actor
from raystill.cluster.job.manifest import run_id, write_folder
from raystill.cluster.job.watch import Background, threads_left
from raystill.config.run import RunConfig, absolute_paths
from raystill.datasets.stream.held_out import answer_held_out
from raystill.datasets.stream.spec import StreamSpec
from raystill.model.on_node import ModelSource
from raystill.placement.requests import teacher_bundles
from raystill.run import Run
from raystill.serve.deploy import TeacherApp, TeacherApps
from raystill.serve.pace import start_paces
from raystill.train.evaluation.probe import is_due, probe_teacher

LEAVE_S = 5.0
JOIN_S = 0.5
LOADING = "loading the teacher and the student"
ASKING = "asking the teacher the held-out prompts"
LOADING_STUDENT = "loading the student"


@contextmanager
def connected(
    config: RunConfig, folder: RunFolder, *, for_check: bool = False, trains: bool = False
) -> Iterator[None]:
    """Connect to the cluster (or start a local one), and leave it in order."""
    say_where(run=run_name(folder.path), role="driver")
    if trains:  # Ray Data and Ray Train, while Ray starts; `fit` needs them.
        Thread(target=import_module, args=("raystill.train.worker.fit",), daemon=True).start()
    connect.connect(config.cluster, None if for_check else folder.logs)
    try:
        yield
    finally:
        connect.disconnect(in_use=bool(threads_left(LEAVE_S)))


def check_on_cluster(config: RunConfig) -> list[Problem]:
    """The part of the check that needs the cluster's answer."""
    return check_cluster(config, tell=lambda line: print(line, flush=True))


def begin(config: RunConfig, folder: RunFolder, prepared: Prepared) -> Run:
    """Write the run folder's first files and start the coordinator.

    Raises RunError where another driver's coordinator of this run lives on the cluster.
    """
    write_folder(config, folder, prepared)
    teachers = {
        name: (ModelSource.of(one.config.teacher.model, one.teacher_folder), one.teacher_identity)
        for name, one in prepared.by_teacher.items()
    }
    run = Run(
        config=absolute_paths(config),
        folder=folder,
        id=run_id(folder) or "",
        teacher=ModelSource.of(config.teacher.model, prepared.teacher_folder),
        teacher_identity=prepared.teacher_identity,
        store_path=prepared.store_path,
        num_rows=prepared.num_train_rows,
        num_ids=prepared.num_ids,
        teachers=teachers if prepared.teachers else {},
    )
    start = partial(
        start_coordinator,
        f"{run_name(folder.path)}-{run.id}",
        max_rows_ahead=config.rows_ahead,
        max_drop_fraction=config.stream.max_drop_fraction,
        num_rows=run.num_rows,
        refill_rows=config.refill_rows,
        max_rejected_fraction=config.max_rejected_fraction,
        beside_held_out=groups_beside(config, prepared.num_held_out_rows),
        before_held_out=groups_before(run, prepared),
        parts=parts_of(
            config.rows_ahead,
            {
                name: one.rows_in_flight
                for name, one in config.by_teacher.items()
                if name not in config.only_judges
            },
        ),
    )
    return replace(run, coordinator=unique_actor(start, folder), paces=start_paces(config))


def groups_before(run: Run, prepared: Prepared) -> int:
    """Training groups that are answered before held-out rows are asked for: those of a step, or 0.

    A processor answers few rows sooner than many, so that the first step comes sooner. A GPU
    gains little by that, and several teachers or a sampler need not be up at the same time.
    """
    config = run.config
    alone = config.teachers is None and not config.policy.enabled
    stored = prepared.stored.held_out_rows >= prepared.num_held_out_rows
    if stored or not alone or config.teacher.engine == "api" or needs_no_teacher(run, prepared):
        return 0
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if any("GPU" in bundle for bundle in teacher_bundles(config, has_gpus)):
        return 0
    return math.ceil(config.training.rows_per_step / config.stream.group_rows)


def groups_beside(config: RunConfig, held_out_rows: int) -> int | None:
    """Training groups that may be asked for while held-out rows are answered, which come first.

    As many as fit into the slots that these leave, at least one; None: there are no such rows.
    """
    if not held_out_rows:
        return None
    rows = config.stream.group_rows
    slots = sum(
        one.teacher.max_replicas * min(one.groups_per_replica, one.teacher.max_num_seqs // rows)
        for one in config.by_teacher.values()
    )
    return max(1, slots - math.ceil(held_out_rows / rows))


def serve(run: Run, prepared: Prepared, probe: bool = True) -> Background:
    """The thread that serves the teacher; not started yet.

    probe: Compare the served teacher with the plain model, where it is due.
    """
    runs = run.by_teacher()
    needed = {name for name in runs if not needs_no_teacher(run, prepared, name)}
    probed = {name for name in needed if probe and is_due(runs[name])}
    if needed:  # Answers that are new are judged, so the judges start side by side with teachers.
        needed |= run.config.filters.judges
    if needed:
        run.coordinator.hold_stream.remote()
    for _ in probed:
        run.coordinator.hold_saving.remote()
    return Background("teacher", lambda: serve_teachers(run, prepared, needed, probed))


def stream(run: Run, prepared: Prepared) -> StreamSpec:
    """The stream of the run's training rows."""
    runs, several = run.by_teacher(), prepared.by_teacher
    judges = {name: (runs[name], several[name].asked) for name in run.config.filters.judges}
    spec = replace(StreamSpec.of(run, prepared.signal), judges=judges)
    return replace(spec, duplicates=start_duplicates(spec))


def fit(run: Run, spec: StreamSpec) -> Background:
    """The thread that trains the student on the stream; not started yet."""

    def work() -> None:
        from raystill.train.worker import fit  # Begun by `connected`.

        fit.fit(run, spec)

    return Background("student", work)


def serve_teachers(run: Run, prepared: Prepared, needed: set[str], probed: set[str]) -> None:
    """Serve each teacher of the run, several side by side, until they have ended; raises the first
    error. needed: names of those that the store cannot answer for. probed: see `serve`.
    """
    run.coordinator.phase.remote(LOADING)
    held_out = [answer_held_out.remote(run)] if prepared.num_held_out_rows else []
    runs, apps, coordinator = run.by_teacher(), TeacherApps(run).by_name, run.coordinator
    for name in sorted(runs, key=lambda name: name not in needed):  # Some first, if any is needed.
        (coordinator.want_teacher if name in needed else coordinator.teacher_gone).remote(name)
    works = [
        Background(
            f"teacher {name}".strip(),
            partial(serve_teacher, one, apps[name], held_out, name in needed, name in probed),
        )
        for name, one in runs.items()
    ]
    if len(works) == 1:
        works[0].work()
        return
    for work in works:
        work.start()
    running = list(works)
    while running:
        for work in works:
            work.join(JOIN_S)
        running = [work for work in works if work.is_alive()]
        for work in works:  # After they were asked whether they run: no last error is missed.
            if work.error is not None:
                raise work.error


def serve_teacher(
    run: Run, teacher: TeacherApp, held_out: list[Any], needed: bool, probe: bool
) -> None:
    """Deploy a teacher where the store cannot answer all; have the held-out prompts answered.

    A teacher that seemed not to be needed is deployed as soon as somebody asks for it: a stored
    answer may turn out to be damaged. When every row has its answer, the teacher is ended and its
    resources are free, while the student goes on.
    """
    coordinator, config, name = run.coordinator, run.config, run.teacher_name
    if not needed and not wait_until_wanted(coordinator, held_out, name):
        return
    teacher.deploy()
    sampler = Background("sampler", partial(serve_sampler, run)) if config.policy.enabled else None
    if sampler is not None:
        sampler.start()
    teacher.wait()
    coordinator.teacher_answers.remote()
    probing = probe_teacher.remote(run) if probe else None
    asking = bool(held_out) and bool(ray.wait(held_out, num_returns=len(held_out), timeout=0)[1])
    if asking:  # Else a faster teacher has told of it.
        coordinator.phase.remote(ASKING)
    ray.get(held_out)  # Also of those that have ended: by an error, it may be.
    if asking:
        coordinator.phase.remote(LOADING_STUDENT, after=ASKING)  # Unless the worker is up.
    if probing is not None:
        ray.get(probing)
    if sampler is not None:
        sampler.join()
        if sampler.error is not None:
            raise sampler.error
        return  # The student writes to the end, and the teacher scores it.
    if config.evaluation.enabled and config.scores_student_answers:
        return  # It is to score what the finished student writes.
    while ray.get(coordinator.wait_teacher_idle.remote(config.training.epochs - 1, name)):
        teacher.end()
        ray.get(coordinator.teacher_gone.remote(name))
        if not ray.get(coordinator.wait_teacher_wanted.remote(name)):
            return
        teacher.deploy()
        teacher.wait()


def serve_sampler(run: Run) -> None:
    """Serve the student's sampler as soon as there are weights, while the teacher is still loading;
    returns when it answers, or when the run is over.
    """
    from raystill.serve.sampler_app import SamplerApp

    if ray.get(run.coordinator.newer_policy.remote(0)) is None:
        return
    sampler = SamplerApp(run)
    sampler.deploy()
    sampler.wait()


def needs_no_teacher(run: Run, prepared: Prepared, name: str = "") -> bool:
    """Whether each answer of a teacher is in the store; what the student is to write never is."""
    return name not in prepared.stored.asked and not run.config.policy.enabled


def wait_until_wanted(coordinator: Any, others: list[Any], name: str = "") -> bool:
    """Wait until something is not in the store, or the run is over: False. Raises as ``others``."""
    wanted = coordinator.wait_teacher_wanted.remote(name)
    pending = [wanted, *others]
    while wanted in pending:
        done, pending = ray.wait(pending)
        ray.get(done)
    return bool(ray.get(wanted))
