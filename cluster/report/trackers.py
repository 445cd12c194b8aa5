"""Experiment trackers: the run's configuration, figures and page at W&B, MLflow and Trackio.

*Consumes* the coordinator's snapshots in the driver, as TensorBoard does, and at the end the run
folder's files. A thread of its own talks to the trackers: one that is slow, away or wrong neither
stops nor delays a run, and what it misses is in the run folder. Their packages are optional
(`cluster.check.trackers`) and imported in that thread alone.
"""

import math
import os
import posixpath
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from raystill.base.formatting import one_line
from raystill.base.logs import run_name
from raystill.base.records import read_object
from raystill.base.redact import redact
from raystill.base.run_folder import CONFIG, MANIFEST, REPORT, STATUS, SUMMARY, RunFolder
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.exporters import NewFigures
from raystill.config.training import MlflowConfig, OutputConfig, TrackioConfig, WandbConfig

FINISH_S = 120.0
"""Seconds that a finished run waits for its trackers."""
MOST_WAITING = 20_000
"""Figures' records that wait for a tracker that does not answer; later ones are left out."""
FILES = (REPORT, SUMMARY, CONFIG, MANIFEST)
MLFLOW_PARAMETERS = 100  # In one request; and characters of a value, below.
MLFLOW_LONGEST = 6000
MLFLOW_LONGEST_NAME = 250
MLFLOW_REFUSED = re.compile(r"[^/\w.\- :]")
"""What a name of a metric or a parameter may not have."""


class Tracker(Protocol):
    """One open tracker. All of it is called by one thread."""

    def write(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Send the figures of a step, or of an evaluation."""

    def finish(self, figures: Mapping[str, float], files: list[Path], state: str) -> None:
        """Send the final figures and files, and close. ``state``: as in ``status.json``."""


class Trackers:
    """The trackers that ``output`` names; a context within which a run goes on.

    ``tell`` is given what goes wrong, once for each tracker. Without a tracker nothing happens.
    """

    def __init__(
        self, config: OutputConfig, folder: RunFolder, tell: Callable[[str], None]
    ) -> None:
        self._wanted = makers(config)
        self._folder = folder
        self._tell = tell
        self._new = NewFigures()
        self._waiting: queue.Queue[tuple[str, Mapping[str, float], int] | None]
        self._waiting = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._left_out = False

    def __enter__(self) -> "Trackers":
        return self

    def update(self, snapshot: Snapshot) -> None:
        """Pass on what is new in a snapshot; does not wait. The first one opens the trackers."""
        if not self._wanted:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()
        try:
            for record in self._new.take(snapshot):
                self._waiting.put_nowait(record)
        except queue.Full:
            if not self._left_out:
                self._left_out = True
                self._tell("a tracker does not keep up, so it lacks some steps of metrics.jsonl")

    def __exit__(self, *_: object) -> None:
        """Send the final figures and the page, and wait for that, but not for ever."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=FINISH_S)
            self._thread.join(FINISH_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._tell(
                f"a tracker has not taken everything within {FINISH_S:.0f} s and is left; the run "
                f"is complete in {self._folder.path}"
            )

    def _work(self) -> None:
        opened = {name: self._opened(name, make) for name, make in self._wanted.items()}
        trackers = {name: tracker for name, tracker in opened.items() if tracker is not None}
        while (record := self._waiting.get()) is not None:
            for name in list(trackers):
                if not self._try(name, partial(trackers[name].write, *record)):
                    del trackers[name]
        if not trackers:
            return
        with tempfile.TemporaryDirectory(prefix="raystill-") as local:
            files = copy_files(self._folder, Path(local))
            figures, state = final_figures(self._folder), state_of(self._folder)
            for name, tracker in trackers.items():
                self._try(name, partial(tracker.finish, figures, files, state))

    def _opened(self, name: str, make: Callable[[RunFolder], Tracker]) -> Tracker | None:
        found: list[Tracker] = []
        self._try(name, lambda: found.append(make(self._folder)))
        return found[0] if found else None

    def _try(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:
            reason = one_line(redact(f"{type(error).__name__}: {error}"))
            self._tell(f"{name} is left out from here on ({reason}); the run itself goes on")
            return False
        return True


def makers(config: OutputConfig) -> dict[str, Callable[[RunFolder], Tracker]]:
    """What opens each tracker that is asked for, by its name."""
    wanted: dict[str, Callable[[RunFolder], Tracker]] = {}
    if (wandb := config.wandb) is not None:
        wanted["Weights & Biases"] = lambda folder: WandbTracker(wandb, folder)
    if (mlflow := config.mlflow) is not None:
        wanted["MLflow"] = lambda folder: MlflowTracker(mlflow, folder)
    if (trackio := config.trackio) is not None:
        wanted["Trackio"] = lambda folder: TrackioTracker(trackio, folder)
    return wanted


class WandbTracker:
    """A run at Weights & Biases; a run that is resumed goes on there under its id.

    Sent is what this module passes on, and nothing that W&B would collect by itself: neither the
    command line, which may hold a credential, nor terminal output, code, host or package list.
    """

    def __init__(self, config: WandbConfig, folder: RunFolder) -> None:
        import wandb

        self._html = wandb.Html
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            id=run_id(folder),
            name=run_name(folder.path),
            resume="allow",
            config=configuration(folder),
            dir=str(folder.logs),
            settings=wandb.Settings(
                console="off",
                silent=True,
                host="driver",
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # Steps that are trained again after a restart go backwards, which W&B's own step may not.
        for group in ("train", "held_out"):
            self._run.define_metric(f"{group}/step", hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")

    def write(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Log the figures beside their step."""
        named = {f"{group}/{name}": value for name, value in figures.items()}
        self._run.log({f"{group}/step": step, **named})

    def finish(self, figures: Mapping[str, float], files: list[Path], state: str) -> None:
        """Put the figures into the run's summary, the page on a panel, and send the files."""
        self._run.summary.update({f"final/{name}": value for name, value in figures.items()})
        self._run.summary["state"] = state
        for file in files:
            kept = Path(self._run.dir) / file.name  # In place: else W&B keeps a link to it.
            kept.write_bytes(file.read_bytes())
            self._run.save(str(kept), base_path=self._run.dir, policy="now")
            if file.name == REPORT:
                self._run.log({"report": self._html(str(kept), inject=False)})
        self._run.finish(exit_code=0 if state != "failed" else 1)


class MlflowTracker:
    """A run at MLflow; a run that is resumed goes on there, found by its id in a tag."""

    def __init__(self, config: MlflowConfig, folder: RunFolder) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, id_ = Metric, run_id(folder)
        uri = config.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
        self._client: Any = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(config.experiment, uri)
        tag = "raystill.run_id"
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{id_}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return  # MLflow's parameters cannot be changed: they stay those of the first start.
        name = run_name(folder.path)
        self._id = self._client.create_run(experiment, run_name=name, tags={tag: id_}).info.run_id
        values = {mlflow_name(name): value for name, value in flattened(configuration(folder))}
        parameters = [Param(name, str(value)[:MLFLOW_LONGEST]) for name, value in values.items()]
        for first in range(0, len(parameters), MLFLOW_PARAMETERS):
            batch = parameters[first : first + MLFLOW_PARAMETERS]
            self._client.log_batch(self._id, params=batch)

    def _experiment(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        place = None  # The server's own.
        if uri.startswith("sqlite:///"):  # Beside the database. By default: the current folder.
            beside = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow_files"
            place = (beside / name.replace("/", "_")).as_uri()
        return str(self._client.create_experiment(name, artifact_location=place))

    def write(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Log the figures in one request."""
        now = int(1000 * time.time())
        named = {mlflow_name(f"{group}/{name}"): value for name, value in figures.items()}
        metrics = [self._metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, figures: Mapping[str, float], files: list[Path], state: str) -> None:
        """Log the figures, the files as artifacts, and end the run; what fails keeps no other."""
        try:
            self.write("final", figures, 0)
        finally:
            try:
                for file in files:
                    self._client.log_artifact(self._id, str(file))
            finally:
                ended = {"completed": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED")
                self._client.set_terminated(self._id, ended)


def mlflow_name(name: str) -> str:
    """A name that MLflow takes: other characters become ``_``, and no path is written two ways."""
    plain = MLFLOW_REFUSED.sub("_", name)[:MLFLOW_LONGEST_NAME]
    return posixpath.normpath(plain).lstrip("/.") or "_"


class TrackioTracker:
    """A run at Trackio; a run that is resumed goes on there under its name, which has its id."""

    def __init__(self, config: TrackioConfig, folder: RunFolder) -> None:
        import trackio

        self._trackio = trackio
        self._run: Any = trackio.init(
            project=config.project,
            name=f"{run_name(folder.path)}-{run_id(folder)[:8]}",
            config=configuration(folder),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Log the figures at their step."""
        self._run.log({f"{group}/{name}": value for name, value in figures.items()}, step=step)

    def finish(self, figures: Mapping[str, float], files: list[Path], state: str) -> None:
        """Log the figures and the files, and close."""
        self._run.log({f"final/{name}": value for name, value in figures.items()})
        for file in files:
            self._run.log_artifact(str(file), name=file.name, type="run")
        self._run.finish()


def configuration(folder: RunFolder) -> dict[str, Any]:
    """The run folder's copy of the configuration, which holds no credentials, with the commit."""
    config: dict[str, Any] = yaml.safe_load(folder.read_text(CONFIG))
    manifest = read_object(folder, MANIFEST)
    return config | {"commit": manifest.get("commit"), "versions": manifest.get("versions")}


def run_id(folder: RunFolder) -> str:
    """The run's id, the same over all its starts."""
    return str(read_object(folder, MANIFEST)["run_id"])


def final_figures(folder: RunFolder) -> dict[str, float]:
    """The numbers of ``summary.json`` by dotted name; none of a run that failed."""
    if not folder.exists(SUMMARY):
        return {}
    numbers = flattened(read_object(folder, SUMMARY))
    return {
        name: float(value)
        for name, value in numbers
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def state_of(folder: RunFolder) -> str:
    """``completed``, ``stopped`` or ``failed``."""
    state = read_object(folder, STATUS).get("state") if folder.exists(STATUS) else "failed"
    return "failed" if state == "running" else str(state)  # Ended without a word.


def copy_files(folder: RunFolder, local: Path) -> list[Path]:
    """Copy those of `FILES` that are there into a local folder; their paths."""
    names = [name for name in FILES if folder.exists(name)]
    for name in names:
        (local / name).write_bytes(folder.read_bytes(name))
    return [local / name for name in names]


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name; a list is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
