"""The run's figures as Ray metrics, which Ray's Prometheus and Grafana find on every node.

Consumes the coordinator's snapshots in the driver. Ray exports ``raystill_x`` as
``ray_raystill_x``, a counter with ``_total`` behind it. ``cluster/grafana/raystill.json`` shows
them; a test holds the two to each other, and this list to the lines of ``metrics.jsonl``.

The run's figures as TensorBoard events, where ``output.tensorboard`` asks for them.

Consumes the coordinator's snapshots in the driver, so of steps shorter than its look (half a
second) some are left out; ``metrics.jsonl`` has them all. Shown by any TensorBoard:

    tensorboard --logdir runs/quickstart/logs/tensorboard
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raystill.cluster.coordinator.snapshot import Snapshot

PREFIX = "raystill_"


@dataclass(frozen=True)
class Figure:
    """One exported metric; ``tag`` is a label beside ``run``, or ''."""

    kind: Literal["gauge", "counter"]
    name: str
    sentence: str
    tag: str = ""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


def _gauges(**figures: tuple[str, str]) -> dict[str, Figure]:
    return {key: Figure("gauge", name, sentence) for key, (name, sentence) in figures.items()}


def _counters(**sentences: str) -> dict[str, Figure]:
    return {key: Figure("counter", key, sentence) for key, sentence in sentences.items()}


STEP = _gauges(
    step=("step", "Finished optimizer steps."),
    epoch=("epoch", "The running epoch, from 0."),
    workers=("workers", "Student workers of the newest step."),
    loss=("loss", "The newest step's loss, nats per unit of weight."),
    grad_norm=("grad_norm", "Norm of the gradient before clipping."),
    lr=("learning_rate", "Learning rate of the newest step."),
    rows=("step_rows", "Rows of the newest step, all workers."),
    tokens=("step_tokens", "Response tokens of the newest step, all workers."),
    tokens_per_s=("tokens_per_s", "Response tokens a second of the newest step, waits included."),
    student_s=("step_student_s", "Seconds the newest step computed."),
    teacher_wait_s=("step_teacher_wait_s", "Seconds rank 0 was blocked on the stream for it."),
    data_wait_s=("step_data_wait_s", "Seconds until rank 0 held its rows, unpacking included."),
    padding_fraction=("padding_fraction", "Share of the newest step's tokens that was padding."),
    idle_share=("idle_share", "Share of the newest step that workers waited for longer passes."),
    others_wait_s=("step_others_wait_s", "Seconds rank 0 waited for the others to hold theirs."),
    teacher_tail_mass=("teacher_tail_mass", "Teacher's probability outside its K ids, mean."),
    student_tail_mass=("student_tail_mass", "Student's probability outside these ids, mean."),
    floored_tokens=("step_floored_tokens", "Tokens at which reverse KL met no teacher mass."),
    total_steps=("total_steps", "Optimizer steps of the whole run."),
    rows_total=("rows_total", "Rows of all epochs."),
    rows_trained=("rows_trained", "Rows trained by the weights there are."),
    skipped_steps=("skipped_steps", "Steps that held no token to learn."),
)
"""By their names in ``metrics.jsonl`` and in what rank 0 reports beside it."""

OBJECTIVE = Figure("gauge", "objective", "A term of the newest step's objective, nats.", "term")

EVALUATION = _gauges(
    kl_nats_per_token=("held_out_kl_nats_per_token", "KL(teacher || student), held-out tokens."),
    top1_agreement=("held_out_top1_agreement", "Share of held-out tokens with the same best id."),
    acceptance=("held_out_acceptance", "Rate at which the teacher would accept a drafted token."),
    perplexity=("held_out_perplexity", "The student's perplexity of the teacher's answers."),
)

TOTALS = _counters(
    teacher_rows="Rows the teacher answered.",
    teacher_prompt_tokens="Prompt tokens the teacher read.",
    teacher_response_tokens="Response tokens the teacher gave.",
    teacher_busy_s="Seconds of all replicas with a group in flight.",
    student_rows="Rows the student trained, those of lost steps included.",
    student_tokens="Response tokens the student trained.",
    student_busy_s="Seconds of all workers in steps.",
    student_wait_s="Seconds of all workers blocked on the stream.",
    rows_asked="Rows the stream asked the teacher.",
    rows_scored="Stored answers the stream had scored.",
    rows_reused="Rows the stream read from the store.",
    rows_answered="Rows the stream passed on.",
    rows_truncated="Answers among them that max_tokens cut.",
    rows_filtered="Rows whose answers filters have rejected.",
    verdicts="Answers that a judge has looked at.",
    verdicts_asked="Questions that a judge was asked; other verdicts were in the store.",
)

BY_TEACHER = {
    name: Figure("gauge", f"of_teacher_{name}", sentence, "teacher")
    for name, sentence in {
        "rows": "Rows one of several teachers answered.",
        "rows_accepted": "Its answers that the stream passed on.",
        "rows_rejected": "Its answers that filters rejected.",
        "rows_dropped": "Its rows without a usable answer.",
        "response_tokens": "Response tokens it gave.",
        "busy_s": "Seconds of its replicas with a group in flight.",
        "api_cost": "What its service was paid.",
    }.items()
}
"""By the names of its counters; since the driver's start."""
ROWS_AHEAD = Figure("gauge", "rows_ahead", "Rows in flight: asked for, not yet with a worker.")
REPLICAS = Figure("gauge", "teacher_replicas", "Teacher replicas that answer.")
LIVES = Figure("gauge", "worker_lives", "Lives of the worker group so far.")
HIT_RATE = Figure("gauge", "store_hit_rate", "Share of the stream's rows that the store had.")
DROPPED = Figure("gauge", "rows_dropped", "Rows of this epoch that were dropped.", "reason")
REJECTED = Figure("gauge", "rows_rejected", "Rows of this epoch that a filter rejected.", "filter")

CATALOGUE = (
    *STEP.values(),
    OBJECTIVE,
    *EVALUATION.values(),
    *TOTALS.values(),
    *BY_TEACHER.values(),
    *(ROWS_AHEAD, REPLICAS, LIVES, HIT_RATE, DROPPED, REJECTED),
)


class Telemetry:
    """Records snapshots; ``make`` gives the metric of a figure (Ray's, unless a test's)."""

    def __init__(self, run: str, make: Callable[[Figure], Any] | None = None) -> None:
        self._run = run
        self._make = make or ray_metric
        self._metrics: dict[str, Any] = {}
        self._totals: dict[str, float] = {}

    def update(self, snapshot: Snapshot, replicas: int) -> None:
        """Record what a snapshot of the coordinator says. A figure without a value keeps its own.

        ``replicas``: teacher replicas that answer now.
        """
        progress = snapshot.progress
        for key, figure in STEP.items():
            self._set(figure, progress.get(key))
        for key, value in progress.items():
            if key.startswith("objective/"):
                self._set(OBJECTIVE, value, key.removeprefix("objective/"))
        evaluation = snapshot.evaluation
        for key, figure in EVALUATION.items():
            self._set(figure, evaluation.get(key))
        counters = snapshot.counters
        for key, figure in TOTALS.items():
            self._count(figure, counters.get(key, 0.0))
        for key, value in counters.items():
            of, _, name = key.rpartition("/")
            if of.startswith("teachers/") and name in BY_TEACHER:
                self._set(BY_TEACHER[name], value, of.removeprefix("teachers/"))
        self._set(ROWS_AHEAD, snapshot.rows_ahead)
        self._set(LIVES, snapshot.lives)
        self._set(REPLICAS, replicas)
        self._set(HIT_RATE, store_hit_rate(counters))
        for reason, rows in snapshot.dropped.items():
            self._set(DROPPED, rows, reason)
        for name, rows in snapshot.filtered.items():
            self._set(REJECTED, rows, name)

    def _set(self, figure: Figure, value: Any, tag: str = "") -> None:
        if value is not None and math.isfinite(value):
            self._metric(figure).set(float(value), self._tags(figure, tag))

    def _count(self, figure: Figure, total: float) -> None:
        grown = total - self._totals.get(figure.name, 0.0)
        if grown > 0:
            self._totals[figure.name] = total
            self._metric(figure).inc(grown, self._tags(figure, ""))

    def _metric(self, figure: Figure) -> Any:
        if figure.name not in self._metrics:
            self._metrics[figure.name] = self._make(figure)
        return self._metrics[figure.name]

    def _tags(self, figure: Figure, tag: str) -> dict[str, str]:
        return {"run": self._run} | ({figure.tag: tag} if figure.tag else {})


def store_hit_rate(counters: Mapping[str, float]) -> float | None:
    """Share of the rows that the stream passed on and the store had; None before the first."""
    reused = counters.get("rows_reused", 0.0)
    rows = reused + counters.get("rows_asked", 0.0) + counters.get("rows_scored", 0.0)
    return reused / rows if rows else None


def ray_metric(figure: Figure) -> Any:
    """Ray's metric of a figure; this process must be connected."""
    from ray.util.metrics import Counter, Gauge

    kind = Counter if figure.kind == "counter" else Gauge
    tags = ("run", figure.tag) if figure.tag else ("run",)
    return kind(PREFIX + figure.name, description=figure.sentence, tag_keys=tags)


class NewFigures:
    """Picks what was not seen yet out of snapshots: a step's figures, an evaluation's."""

    def __init__(self) -> None:
        self._step = self._evaluated = -1

    def take(self, snapshot: Snapshot) -> Iterator[tuple[str, dict[str, float], int]]:
        """Group (``train`` or ``held_out``), finite figures by name, and their step."""
        progress, evaluation = snapshot.progress, snapshot.evaluation
        step, evaluated = int(progress.get("step") or 0), int(evaluation.get("step") or 0)
        if progress and step != self._step:
            self._step = step
            yield "train", _finite(progress), step
        if evaluation and evaluated != self._evaluated:
            self._evaluated = evaluated
            yield "held_out", _finite({**evaluation, **_check_means(evaluation)}), evaluated


def _check_means(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """``checks/<name>/<student or teacher>`` of an evaluation: their means."""
    checks = evaluation.get("checks") or {}
    return {
        f"checks/{name}/{who}": figures[who].get("mean")
        for name, figures in checks.items()
        for who in ("student", "teacher")
    }


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if math.isfinite(value) and name not in ("step", "time")
    }


class TensorBoard:
    """Writes the newest step's figures under ``train/``, an evaluation's under ``held_out/``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new = NewFigures()
        self._step = -1
        self._writer: Any = None

    def update(self, snapshot: Snapshot) -> None:
        """Write what is new. Steps that are trained again after a restart replace the lost ones."""
        for group, figures, step in self._new.take(snapshot):
            if self._writer is None or (group == "train" and step < self._step):
                self._open(step)
            if group == "train":
                self._step = step
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=10)
