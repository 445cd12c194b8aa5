"""The run file's whole tree, and the rules that hold between its sections.

Placing the student: a Ray Train run over the stream, resumable, outside the main thread.

``fit`` blocks until the workers have ended. Ray Train keeps its registered checkpoints under
``<run>/checkpoints`` and hands the newest to the workers of the next start.
"""

import os
from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from raystill.config.base import ConfigModel, PositiveInt, identity, operational
from raystill.config.objective import ObjectiveConfig
from raystill.config.prompts import PromptsConfig
from raystill.config.stream import EvaluationConfig, SignalConfig, StoreConfig, StreamConfig
from raystill.config.student import StudentConfig
from raystill.config.teacher import TeacherConfig
from raystill.config.training import TrainingConfig


class ClusterConfig(ConfigModel):
    """The Ray cluster the run uses."""

    address: str | None = operational(
        None, description="Ray address; default: RAY_ADDRESS if set, else a local cluster."
    )
    num_cpus: PositiveInt | None = operational(
        None, description="CPUs of a local cluster; default: this machine's."
    )
    object_store_memory_gib: float | None = operational(
        None, gt=0, description="Object store of a local cluster, GiB; default: Ray's own."
    )
    shared_filesystem: bool = operational(
        False, description="Local paths mean the same folder on every node (NFS and the like)."
    )
    dashboard: bool = operational(
        False, description="Start Ray's dashboard on loopback with a local cluster."
    )


class OutputConfig(ConfigModel):
    """Where the run writes."""

    path: str | None = operational(
        None, description="Run folder or URI; default: runs/<name of the run file>."
    )
    tensorboard: bool = operational(
        False, description="Also write figures for TensorBoard, to logs/tensorboard."
    )


class RunConfig(ConfigModel):
    """One distillation run."""

    seed: int = identity(0, ge=0, description="Root seed; every other seed follows from it.")
    teacher: TeacherConfig = identity(description="The model learned from.")
    student: StudentConfig = identity(description="The model trained.")
    prompts: PromptsConfig = identity(description="What the teacher is asked.")
    signal: SignalConfig = identity(SignalConfig(), description="What the teacher says of a token.")
    objective: ObjectiveConfig = identity(
        ObjectiveConfig(forward_kl=1.0), description="What the student minimises."
    )
    stream: StreamConfig = operational(StreamConfig(), description="How rows flow.")
    training: TrainingConfig = operational(TrainingConfig(), description="The optimisation.")
    evaluation: EvaluationConfig = operational(EvaluationConfig(), description="Held-out rows.")
    store: StoreConfig = operational(StoreConfig(), description="The teacher store.")
    cluster: ClusterConfig = operational(ClusterConfig(), description="The Ray cluster.")
    output: OutputConfig = operational(OutputConfig(), description="The run folder.")

    @model_validator(mode="after")
    def _signal_fits_objective(self) -> "RunConfig":
        if reasons := list(self._unfit()):
            raise ValueError("; ".join(reasons))
        return self

    def _unfit(self) -> Iterator[str]:
        """What the objective wants and the signal cannot say, each with its remedy."""
        kind, objective = self.signal.kind, self.objective
        unfit = [f"objective.{name}" for name in objective.divergences]
        if unfit and kind == "text":
            yield (
                f"{', '.join(unfit)} needs the teacher's probabilities, but signal.kind is 'text', "
                "which has none; set signal.kind: topk, or train with objective.cross_entropy alone"
            )
        if objective.temperature != 1.0 and kind != "hidden":
            yield (
                f"objective.temperature is {objective.temperature:g}, but signal.kind is {kind!r}, "
                "which does not say how the teacher's tail would change with it; set signal.kind: "
                "hidden, or objective.temperature: 1"
            )
        by = objective.token_weights.by
        if by != "none" and kind == "text":
            yield (
                f"objective.token_weights.by is {by!r}, but signal.kind is 'text', which has no "
                "probabilities to weigh tokens by; set signal.kind: topk, or "
                "objective.token_weights.by: none"
            )

    @property
    def rows_ahead(self) -> int:
        """``stream.max_rows_ahead``, or its default: the advised bound and a second full flight.

        Answers asked at once come back at once. While the student eats such a burst its rows still
        count as ahead, and the next one must be under way at full width all the same.
        """
        if self.stream.max_rows_ahead is not None:
            return self.stream.max_rows_ahead
        return max(self.min_rows_ahead, self.advised_rows_ahead + self.rows_in_flight)

    @property
    def refill_rows(self) -> int:
        """Rows that are asked at once when the bound was reached (`cluster.credits`).

        Half a flight, by default: while they are answered the student eats the flight and a half
        that is left. Less where that would go below the advised bound, or a step's minimum.
        """
        kept = max(self.min_rows_ahead, self.advised_rows_ahead)
        return max(0, min(self.rows_in_flight // 2, self.rows_ahead - kept))

    @property
    def rows_in_flight(self) -> int:
        """Rows that the largest pool of replicas answers at once."""
        t = self.teacher
        return t.max_replicas * t.target_ongoing_requests * self.stream.group_rows

    @property
    def min_rows_ahead(self) -> int:
        """The bound under which a step could never be filled (design 6)."""
        workers = self.training.max_workers
        return self.training.rows_per_step + 2 * workers * self.stream.group_rows

    @property
    def advised_rows_ahead(self) -> int:
        """The bound at which every replica has its groups and two steps wait beside them."""
        return self.rows_in_flight + 2 * self.training.rows_per_step

    def section_seeds(self) -> dict[str, Any]:
        """Seeds of the parts, derived from the root; written into the manifest."""
        names = ("order", "engine", "student", "held_out", "evaluation", "weights")
        return {
            name: (self.seed * 1_000_003 + i * 7_919 + 17) % 2**31 for i, name in enumerate(names)
        }


def absolute_paths(config: RunConfig) -> RunConfig:
    """``config`` with a local ``student.model`` made absolute: workers run in another folder."""
    model = config.student.model
    if model is None or not os.path.isdir(model):
        return config
    student = config.student.model_copy(update={"model": os.path.abspath(model)})
    return config.model_copy(update={"student": student})
