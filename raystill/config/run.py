"""Configuration of a whole run: all sections, the rules between them, and what follows from them.

`load` reads a run file into a `RunConfig`; every stage takes its settings from it.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from pydantic import field_validator, model_serializer, model_validator

from raystill.base.redact import SECRETS
from raystill.config.base import ConfigModel, PositiveInt, identity, operational
from raystill.config.objective import ObjectiveConfig, PolicyConfig, SignalConfig
from raystill.config.prompts import PromptsConfig
from raystill.config.stream import FiltersConfig, StreamConfig
from raystill.config.student import EvaluationConfig, StudentConfig, TermsConfig
from raystill.config.teacher import TeacherConfig, Teachers, require_names, wrong_judges
from raystill.config.training import OutputConfig, StoreConfig, TrainingConfig

ROWS_PER_SLOT = 6
"""Rows in flight for each slot of an engine. A group is answered when its slowest row is; until
then its other rows are in flight without a slot. With 6, and groups of 8 rows or fewer, 0.99 of the
slots and more were filled, for all distributions of lengths tried (``benchmarks/slots.py``)."""


class ClusterConfig(ConfigModel):
    """Settings of the Ray cluster: an existing one, or one that is started on this machine."""

    address: str | None = operational(
        None,
        description="Address of a Ray cluster. Default: RAY_ADDRESS if set, else a local cluster "
        "is started.",
    )
    num_cpus: PositiveInt | None = operational(
        None,
        description="Number of CPUs of a local cluster. Default: the cores that this process may "
        "use, at least 2.",
    )
    object_store_memory_gib: float | None = operational(
        None,
        gt=0,
        description="Object store memory of a local cluster, in GiB. Default: Ray's choice.",
    )
    shared_filesystem: bool = operational(
        False,
        description="Whether a local path means the same folder on every node, as with NFS. Needed "
        "on several machines for local paths of models and outputs.",
    )
    dashboard: bool = operational(
        False,
        description="Whether to start Ray's dashboard with a local cluster, on this machine's "
        "loopback interface.",
    )


class RunConfig(ConfigModel):
    """One distillation run: the content of a run file."""

    seed: int = identity(
        0, ge=0, description="Seed of the run; all other random seeds are derived from it."
    )
    teacher: TeacherConfig = identity(
        description="The teacher: its model, its engine and its replicas. Not with teachers."
    )
    teachers: dict[str, TeacherConfig] | None = identity(
        None,
        description="Several teachers in place of teacher, by names of your choice, each with the "
        "settings of teacher. prompts.sources (teacher: NAME) or prompts.teacher_field say which "
        "one answers a row. The first one's tokenizer, and with student.init: from_teacher its "
        "layers, are the student's.",
    )
    student: StudentConfig = identity(description="The student: the model that is trained.")
    prompts: PromptsConfig = identity(description="The prompts that the teacher answers.")
    signal: SignalConfig = identity(
        SignalConfig(), description="What the teacher gives for each response token."
    )
    objective: ObjectiveConfig = identity(
        ObjectiveConfig(forward_kl=1.0),
        description="The loss that the student minimises, a weighted sum of terms.",
    )
    policy: PolicyConfig = identity(
        PolicyConfig(), description="Rows that the student writes (on-policy distillation)."
    )
    stream: StreamConfig = operational(
        StreamConfig(), description="The stream of rows from the teacher to the student."
    )
    filters: FiltersConfig = operational(
        FiltersConfig(), description="Filters of the answers that the student learns from."
    )
    training: TrainingConfig = operational(
        TrainingConfig(), description="Training: steps, optimizer, workers, precision, checkpoints."
    )
    evaluation: EvaluationConfig = operational(
        EvaluationConfig(), description="Evaluation of the student on held-out rows."
    )
    store: StoreConfig = operational(
        StoreConfig(), description="The teacher store, which keeps the teacher's answers."
    )
    cluster: ClusterConfig = operational(
        ClusterConfig(), description="The Ray cluster that the run uses."
    )
    output: OutputConfig = operational(
        OutputConfig(), description="The run folder, where the run writes."
    )
    terms: TermsConfig = operational(
        TermsConfig(), description="What the student is for, and the terms of its sources."
    )

    @model_validator(mode="before")
    @classmethod
    def _secrets_are_learnt(cls, data: Any) -> Any:
        SECRETS.learn(data)  # Before any message is made of a value.
        return first_of_several(data)

    @model_serializer(mode="wrap")
    def _without_copy(self, dump: Any) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        if self.teachers is not None:
            data.pop("teacher", None)  # Of `first_of_several`.
        return data

    @field_validator("teachers")
    @classmethod
    def _have_names(cls, teachers: Teachers) -> Teachers:
        require_names(teachers)
        return teachers

    @model_validator(mode="after")
    def _signal_fits_objective(self) -> "RunConfig":
        reasons = [*self._missing_from_signal(), *self._missing_for_policy()]
        reasons += [*self._wrong_with_several(), *self.prompts.wrong_teachers(self.teachers)]
        reasons += self.terms.wrong_teachers(self.teachers)
        reasons += wrong_judges(self.teachers, self.filters.judges, self.only_judges)
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    def _missing_from_signal(self) -> Iterator[str]:
        """What the objective needs and the signal does not have, each with its remedy."""
        kind, objective = self.signal.kind, self.objective
        divergences = [f"objective.{name}" for name in objective.divergences]
        if divergences and kind == "text":
            yield (
                f"{', '.join(divergences)} needs the teacher's probabilities, but signal.kind is "
                "'text', which has none; set signal.kind: topk, or train with "
                "objective.cross_entropy alone"
            )
        if objective.temperature != 1.0 and kind != "hidden":
            yield (
                f"objective.temperature is {objective.temperature:g}, but signal.kind is {kind!r}, "
                "from which the teacher's tail at another temperature cannot be computed; set "
                "signal.kind: hidden, or objective.temperature: 1"
            )
        by = objective.token_weights.by
        if by != "none" and kind == "text":
            yield (
                f"objective.token_weights.by is {by!r}, but signal.kind is 'text', which has no "
                "probabilities to weigh tokens by; set signal.kind: topk, or "
                "objective.token_weights.by: none"
            )
        lora = self.student.lora
        if lora and lora.base_dtype == "bfloat16" and self.training.compute_dtype == "float32":
            yield (
                "student.lora.base_dtype is bfloat16, but training.compute_dtype is float32; set "
                "base_dtype: float32, or compute_dtype: bfloat16"
            )

    def _wrong_with_several(self) -> Iterator[str]:
        """What a run of several teachers cannot have, each with its remedy."""
        if self.teachers is None:
            return
        if self.signal.kind == "hidden":
            yield (
                "signal.kind is 'hidden', which is read by the head of one teacher, but there are "
                f"several ({', '.join(self.teachers)}); set signal.kind: topk"
            )
        if self.policy.enabled:
            yield (
                "policy.student_share needs one teacher, but there are several "
                f"({', '.join(self.teachers)}); set policy.student_share: 0, or name one as teacher"
            )
        if self.evaluation.free_running.teacher_scores:
            yield (
                "evaluation.free_running.teacher_scores is true, which needs one teacher, but "
                f"there are several ({', '.join(self.teachers)}); set it to false"
            )

    @property
    def only_judges(self) -> frozenset[str]:
        """Judges that answer no row."""
        return self.filters.judges - self.prompts.named_teachers(self.teachers)

    def _missing_for_policy(self) -> Iterator[str]:
        """What rows that the student writes need and the run file does not give."""
        policy = self.policy
        if not policy.enabled:
            return
        if self.teacher.engine == "synthetic" or not self.teacher.scores:
            yield (
                "policy.student_share needs a teacher that scores the student's answers, but "
                f"teacher.engine is {self.teacher.engine!r}; set teacher.engine: vllm, or "
                "teacher.api.ids: true at a vLLM server, or policy.student_share: 0"
            )
        if self.signal.kind == "text":
            yield (
                "policy.student_share needs the teacher's probabilities, but signal.kind is "
                "'text'; set signal.kind: topk, or policy.student_share: 0"
            )
        if policy.objective.temperature != 1.0 and self.signal.kind != "hidden":
            yield (
                f"policy.objective.temperature is {policy.objective.temperature:g}, but "
                f"signal.kind is {self.signal.kind!r}; set signal.kind: hidden, or temperature: 1"
            )
        if self.stream.order != "fixed":
            yield (
                "policy.student_share needs stream.order: fixed, in which the step that trains a "
                "row is known when its answer is asked for; set stream.order: fixed"
            )
        if policy.staleness_bound < self.min_staleness_steps:
            yield (
                f"policy.max_staleness_steps ({policy.staleness_bound}) is less than "
                f"{self.min_staleness_steps}, with which a step can always be filled "
                "(policy.sync_every_steps - 1, and the steps that the workers read ahead); set "
                f"policy.max_staleness_steps: {self.min_staleness_steps} or more, or lower "
                "policy.sync_every_steps or stream.group_rows"
            )

    @property
    def min_staleness_steps(self) -> int:
        """Least bound on staleness with which a step can always be filled.

        In step s the newest weights are those of step s - sync_every_steps + 1 or later, and rows
        up to `min_rows_ahead` beyond the first one of step s must have their credits.
        """
        ahead = (self.min_rows_ahead - 1) // self.training.rows_per_step
        return self.policy.sync_every_steps - 1 + ahead

    @property
    def scores_student_answers(self) -> bool:
        """Whether the teacher scores what the student writes to held-out prompts."""
        wished = self.evaluation.free_running.teacher_scores
        return self.policy.enabled if wished is None else wished

    @property
    def rows_ahead(self) -> int:
        """``stream.max_rows_ahead``, or its default: the advised bound plus `rows_in_flight`.

        Groups that are requested together are answered at about the same time. While the student
        trains on such a burst, its rows still count as ahead, and every replica must be working on
        the next burst already.
        """
        if self.stream.max_rows_ahead is not None:
            return self.stream.max_rows_ahead
        return max(self.min_rows_ahead, self.advised_rows_ahead + self.rows_in_flight)

    @property
    def refill_rows(self) -> int:
        """Rows requested together after the bound was reached (`cluster.coordinator.credits`).

        By default half of `rows_in_flight`: while they are answered, the student trains on the one
        and a half times as many that are left. Fewer if else less than the advised bound, or than
        a step needs, would be left.
        """
        kept = max(self.min_rows_ahead, self.advised_rows_ahead)
        return max(0, min(self.rows_in_flight // 2, self.rows_ahead - kept))

    @property
    def groups_per_replica(self) -> int:
        """``teacher.target_ongoing_requests``, or its default: `full_groups`.

        Where ``stream.max_rows_ahead`` is set, it keeps room for two steps first, and the default
        is as many groups as fit into the rest.
        """
        if self.teacher.target_ongoing_requests is not None:
            return self.teacher.target_ongoing_requests
        if self.stream.max_rows_ahead is None:
            return self.full_groups
        room = self.stream.max_rows_ahead - 2 * self.training.rows_per_step
        fitting = room // (self.teacher.max_replicas * self.stream.group_rows)
        return max(1, min(self.full_groups, fitting))

    @property
    def full_groups(self) -> int:
        """Groups that keep the slots of one engine filled: `ROWS_PER_SLOT` rows for each.

        One row a slot with ``hidden``: an engine keeps the states of a whole group until its last
        row ends, 33 MB for a row of 4,096 tokens and as many components.
        """
        rows = 1 if self.signal.kind == "hidden" else ROWS_PER_SLOT
        return math.ceil(rows * self.teacher.slots / self.stream.group_rows)

    @property
    def by_teacher(self) -> "dict[str, RunConfig]":
        """The run as each of its teachers has it, by name; "" for that of ``teacher`` alone.

        Each has its part of ``stream.max_rows_ahead`` beyond the rows of two steps.
        """
        if self.teachers is None:
            return {"": self}
        stream, terms, kept = self.stream, self.terms, 2 * self.training.rows_per_step
        if stream.max_rows_ahead is not None:
            part = max(0, stream.max_rows_ahead - kept) // len(self.teachers)
            stream = stream.model_copy(update={"max_rows_ahead": kept + part})
        own = {"teachers": None, "stream": stream}
        views = {
            name: self.model_copy(update={**own, "teacher": one, "terms": terms.of_teacher(name)})
            for name, one in self.teachers.items()
        }
        for name in self.only_judges & views.keys():
            if views[name].teacher.gives_text_only:
                views[name] = views[name].model_copy(update={"signal": SignalConfig(kind="text")})
        return views

    @property
    def max_response_tokens(self) -> int:
        """The most tokens of any teacher's answer."""
        return max(one.teacher.sampling.max_tokens for one in self.by_teacher.values())

    @property
    def asks_in_words(self) -> bool:
        """Whether a teacher is a service, which is asked in words, or judges words."""
        engines = [one.teacher.engine for one in self.by_teacher.values()]
        return "api" in engines or bool(self.filters.judges)

    @property
    def groups_in_flight(self) -> int:
        """Groups that the largest pools of replicas work on at a time."""
        views = self.by_teacher.values()
        return sum(one.teacher.max_replicas * one.groups_per_replica for one in views)

    @property
    def rows_in_flight(self) -> int:
        """Rows of these groups: in an engine, waiting for a slot, or for the rest of a group."""
        return self.groups_in_flight * self.stream.group_rows

    @property
    def min_rows_ahead(self) -> int:
        """Least bound on rows ahead with which a step can always be filled.

        A step's rows, and for each worker two groups: one that it has taken in part, and the next
        one, which Ray Data fetches in advance.
        """
        workers = self.training.max_workers
        return self.training.rows_per_step + 2 * workers * self.stream.group_rows

    @property
    def advised_rows_ahead(self) -> int:
        """Bound on rows ahead with which all replicas are busy while the rows of two steps wait."""
        return self.rows_in_flight + 2 * self.training.rows_per_step

    @property
    def max_rejected_fraction(self) -> float:
        """Share of an epoch's rows that filters may reject, with those that ``best`` must reject.

        Of n answers to a prompt ``best`` keeps k; ``filters.max_rejected_fraction`` is of these.
        """
        share, best = self.filters.max_rejected_fraction, self.filters.best
        if best is None:
            return share
        return 1 - (1 - share) * min(1.0, best.keep / self.prompts.samples_per_prompt)

    def section_seeds(self) -> dict[str, Any]:
        """Seeds of the run's parts, derived from ``seed``. The manifest records them."""
        # The order of the names is part of the seeds: a new name belongs at the end. Below 2**31,
        # which every library accepts as a seed.
        names = ("order", "engine", "student", "held_out", "evaluation", "weights", "policy")
        return {
            name: (self.seed * 1_000_003 + i * 7_919 + 17) % 2**31 for i, name in enumerate(names)
        }


def first_of_several(data: Any) -> Any:
    """A run file's data; with ``teachers``, and with the first of them as ``teacher`` too.

    Raises ValueError where it has both.
    """
    if not isinstance(data, dict) or (several := data.get("teachers")) is None:
        return data
    if data.get("teacher") is not None:
        raise ValueError(
            "has both teacher and teachers; keep teacher for a single one, or move it into "
            "teachers under a name"
        )
    first = next(iter(several.values()), None) if isinstance(several, dict) else None
    try:
        first = TeacherConfig.model_validate(first)
    except ValueError:  # Told of under its own name.
        first = TeacherConfig(model="-")
    return {**data, "teacher": first}


def absolute_paths(config: RunConfig) -> RunConfig:
    """Make a local ``student.model`` an absolute path, since workers run in another folder."""
    model = config.student.model
    if model is None or not os.path.isdir(model):
        return config
    student = config.student.model_copy(update={"model": os.path.abspath(model)})
    return config.model_copy(update={"student": student})
