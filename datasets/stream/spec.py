"""Settings of the stream: `StreamSpec`, and `Requester`, for whom the teacher is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raystill.base.run_folder import PROMPT_COLUMNS, TRAIN_PROMPTS
from raystill.config.stream import FiltersConfig, StreamConfig
from raystill.datasets.filters.function import read_functions
from raystill.datasets.filters.reasoning import Reasoning
from raystill.datasets.policy.plan import PolicyPlan
from raystill.datasets.rows.keys import Asked
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import name_of_teacher
from raystill.model.on_node import ModelSource
from raystill.run import Run


@dataclass(frozen=True)
class Requester:
    """For whom the teacher is asked; written into the segments of the store.

    Attributes:
        run: Id of the run.
        purpose: ``training``, ``evaluation`` or ``calibration``.
        teacher_identity: The teacher's identity, by the content of its files.
        teacher: The teacher's name, to be read by people.
    """

    run: str
    purpose: str
    teacher_identity: str
    teacher: str

    @classmethod
    def of(cls, run: Run, purpose: str) -> "Requester":
        """A run that asks for a purpose."""
        teacher = run.config.teacher
        served = teacher.api.model if teacher.engine == "api" else None
        name = name_of_teacher(teacher.model, served)
        return cls(run.id, purpose, run.teacher_identity, name)


def applications_of(run: Run, purpose: str) -> dict[str, tuple[str, Requester]]:
    """Application and requester of each of several teachers, by name; {} where there is one."""
    if not run.teachers:
        return {}
    return {name: (one.app, Requester.of(one, purpose)) for name, one in run.by_teacher().items()}


@dataclass(frozen=True)
class StreamSpec:
    """All that the stream needs to know; pickled into the controller, the source and the answer
    stage.

    Attributes:
        prompt_table: Path or URI of the prompt table, which has ``num_rows`` rows.
        order_seed: Seed of the epochs' permutations.
        signal: What is wanted for each response token.
        stream: The run file's ``stream`` section.
        max_rows_ahead: The bound of rows ahead.
        rows_per_step: Rows of one optimizer step.
        coordinator: Handle of the run's coordinator.
        app_name: The teacher's Serve application.
        groups_in_flight: Groups that the largest pool of replicas works on at once.
        store_path: Path or URI of the teacher store.
        requester: For whom the teacher is asked.
        num_ids: `Run.num_ids`.
        filters: The run file's ``filters`` section.
        teacher: The teacher's files; filters that read text need its tokenizer.
        function_texts: Texts of the Python files with functions of filters, by the setting.
        prompt_columns: Path or URI of the fields that filters read; None where they read none.
        counts_personal: Whether answers with personal data or keys are counted.
        policy: Which rows the student writes; None: none.
        sampler_name: The Serve application of the student's sampler.
        teachers: Application and requester of each of several teachers, by name; empty where there
            is one.
        reasoning: What is learned of a teacher's reasoning; None: what stands in its answers.
        judges: The teachers that judge answers, as the run has them, and what their keys share.
        duplicates: Handle of the process that finds near-duplicates among all answers of an epoch;
            None: no filter does.
    """

    prompt_table: str
    num_rows: int
    order_seed: int
    signal: Signal
    stream: StreamConfig
    max_rows_ahead: int
    rows_per_step: int
    coordinator: Any
    app_name: str
    groups_in_flight: int
    store_path: str
    requester: Requester
    num_ids: int | None = None
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    teacher: ModelSource | None = None
    prompt_columns: str | None = None
    counts_personal: bool = False
    policy: PolicyPlan | None = None
    sampler_name: str = ""
    function_texts: Mapping[str, str] = field(default_factory=dict)
    teachers: Mapping[str, tuple[str, Requester]] = field(default_factory=dict)
    reasoning: Reasoning | None = None
    judges: Mapping[str, tuple[Run, Asked]] = field(default_factory=dict)
    duplicates: Any = None

    @property
    def may_overtake(self) -> bool:
        """Whether a group may be asked before an earlier one whose teacher does not answer."""
        return bool(self.teachers) and self.stream.order == "arrival" and self.policy is None

    @property
    def groups_wait(self) -> bool:
        """Whether an answered group waits for those before it, in the answer stage."""
        return bool(self.filters.over_run) and self.stream.order == "fixed"

    @classmethod
    def of(cls, run: Run, signal: Signal) -> "StreamSpec":
        """The stream of a run's training rows."""
        config = run.config
        return cls(
            prompt_table=run.folder.join(TRAIN_PROMPTS),
            num_rows=run.num_rows,
            order_seed=config.section_seeds()["order"],
            signal=signal,
            stream=config.stream,
            max_rows_ahead=config.rows_ahead,
            rows_per_step=config.training.rows_per_step,
            coordinator=run.coordinator,
            app_name=run.app,
            groups_in_flight=config.groups_in_flight,
            store_path=run.store_path,
            requester=Requester.of(run, "training"),
            num_ids=run.num_ids,
            filters=config.filters,
            teacher=run.teacher,
            function_texts=read_functions(config.filters),
            prompt_columns=run.folder.join(PROMPT_COLUMNS) if config.filters.columns else None,
            counts_personal=config.prompts.personal_data is not None,
            policy=PolicyPlan.of(config, run.num_rows, run.id),
            sampler_name=run.sampler_app,
            teachers=applications_of(run, "training"),
            reasoning=Reasoning.of(config, run.teacher),
        )
