"""Configuration of the student: its first weights and what of it is trained, how it is evaluated,
what it is for, and where it goes.
"""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raystill.base.user_function import parse
from raystill.config.base import ConfigModel, PositiveInt, identity, operational


class LayerChoice(ConfigModel):
    """How many of the teacher's layers to keep, and how the run chooses them."""

    keep: PositiveInt = identity(le=10_000, description="Number of teacher layers to keep.")
    by: Literal["importance", "influence", "even"] = identity(
        "importance",
        description="importance: layers are removed one by one, each time the one without which "
        "the student stays closest to the teacher on a few prompts. influence: keep the layers "
        "that change their input most. even: evenly spaced, first and last layer included.",
    )

    @property
    def needs_model(self) -> bool:
        """Whether the choice is made with the teacher's weights, at the start of the run."""
        return self.by != "even"

    def evenly(self, num_layers: int) -> list[int]:
        """``keep`` layers, evenly spaced over ``num_layers``."""
        steps = max(1, self.keep - 1)
        return [round(i * (num_layers - 1) / steps) for i in range(self.keep)]


Names = tuple[Annotated[str, Field(min_length=1)], ...]


class LoraConfig(ConfigModel):
    """Low-rank adapters (LoRA): the student's weights are frozen, small matrices beside them learn.

    A matrix W [out, in] becomes W + alpha / rank B A, with A [rank, in] and B [out, rank] trained.
    """

    rank: PositiveInt = identity(16, description="Rank of the adapters: rows of A, columns of B.")
    alpha: float = identity(
        32.0, gt=0, description="Scale of the adapters: B A is multiplied by alpha / rank."
    )
    dropout: float = identity(
        0.0, ge=0, lt=1, description="Probability with which an adapter's input is set to 0."
    )
    target_modules: Names | Literal["all-linear"] = identity(
        "all-linear",
        description="Names of the linear modules that get an adapter, such as [q_proj, v_proj]; a "
        "dotted name picks one of several. all-linear: all of the decoder's, not the output head.",
    )
    modules_to_save: Names = identity(
        (),
        description="Names of modules that are trained whole beside the adapters, such as [norm]. "
        "Embeddings and output head only where the model does not tie them.",
    )
    base_dtype: Literal["auto", "float32", "bfloat16"] = identity(
        "auto",
        description="Precision of the frozen weights. auto: that of their files; of weights in 16 "
        "bits the precision of matrix products (training.compute_dtype), if it is another.",
    )

    @model_validator(mode="after")
    def _trains_something(self) -> "LoraConfig":
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; name linear modules such as [q_proj, v_proj], or set "
                "target_modules: all-linear"
            )
        return self


class StudentConfig(ConfigModel):
    """The student, the model that is trained, and where its first weights come from."""

    init: Literal["model", "from_teacher"] = identity(
        "from_teacher",
        description="Where the first weights come from. from_teacher: a copy of the teacher with "
        "some of its layers. model: the model named by student.model.",
    )
    model: str | None = identity(
        None,
        description="Local folder or Hugging Face id of the student. Required with init: model.",
    )
    revision: str | None = identity(
        None,
        description="Branch, tag or commit of student.model on the Hub. Default: its main branch.",
    )
    trust_remote_code: bool = identity(
        False, description="Whether to run Python code that comes with student.model."
    )
    layers: tuple[int, ...] | LayerChoice | None = identity(
        None,
        description="Teacher layers to keep, counted from 0, in this order; or how many, and how "
        "the run chooses them: {keep: 22, by: importance}. With init: from_teacher, set either "
        "layers or layer_stride.",
    )
    layer_stride: PositiveInt | None = identity(
        None,
        description="Keep every n-th teacher layer, from layer 0 on: 2 keeps layers 0, 2, 4, and "
        "so on. With init: from_teacher, set either layers or layer_stride.",
    )

    hidden_size: PositiveInt | None = identity(
        None,
        description="Width of the residual stream: so many of the teacher's hidden units, those "
        "with the largest activations on a few prompts. With init: from_teacher.",
    )
    ffn_size: PositiveInt | None = identity(
        None,
        description="Feed-forward neurons of each layer to keep, chosen so too (from_teacher).",
    )
    num_heads: PositiveInt | None = identity(
        None,
        description="Attention heads of each layer to keep, chosen so too (from_teacher): a "
        "multiple of the number of key-value heads, or whole groups that share one.",
    )
    refit: bool = identity(
        False,
        description="Fit the feed-forward output weights before left-out layers, and of narrower "
        "ones, by least squares to the teacher's residual stream on a few prompts.",
    )
    lora: LoraConfig | None = identity(
        None,
        description="Low-rank adapters (LoRA): they alone are trained, the student's own weights "
        "are frozen. Default: all weights are trained.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "StudentConfig":
        if self.init == "model":
            if self.model is None:
                raise ValueError("init is 'model' but model is unset; name the student's model")
            parts = self.layers is not None or self.layer_stride is not None or self.narrowed
            if parts or self.refit:
                names = "layers, layer_stride, hidden_size, ffn_size, num_heads and refit"
                raise ValueError(f"{names} belong to init: from_teacher; remove them")
        else:
            if self.model is not None:
                told = f"model ({self.model!r}) is set but init is 'from_teacher'"
                raise ValueError(f"{told}; set init: model to train that model, or remove it")
            both = self.layers is not None and self.layer_stride is not None
            neither = self.layers is None and self.layer_stride is None
            if both or (neither and not self.narrowed):
                raise ValueError(
                    "init: from_teacher needs exactly one of layers (a list) and layer_stride, or "
                    "a width (hidden_size, ffn_size, num_heads) with all layers"
                )
            if self.layers == ():
                raise ValueError("layers is empty; name at least one teacher layer")
        return self

    @property
    def narrowed(self) -> bool:
        """Whether the student has fewer units, neurons or heads than its teacher."""
        return any(size is not None for size in (self.hidden_size, self.ffn_size, self.num_heads))

    @property
    def chosen_by_run(self) -> bool:
        """Whether what is kept of the teacher is chosen with its weights, at the run's start."""
        by_layers = isinstance(self.layers, LayerChoice) and self.layers.needs_model
        return by_layers or self.narrowed or self.refit

    def kept_layers(self, num_layers: int) -> list[int]:
        """Teacher layers that the student keeps, in order, of ``num_layers`` (from_teacher).

        Of a choice that needs the teacher's weights: as many layers, evenly spaced, which stand
        in for it wherever only their number matters.
        """
        if isinstance(self.layers, LayerChoice):
            return self.layers.evenly(num_layers)
        if self.layers is not None:
            return list(self.layers)
        return list(range(0, num_layers, self.layer_stride or 1))


class FreeRunningConfig(ConfigModel):
    """Free-running evaluation: the student answers held-out prompts by itself."""

    rows: int = operational(
        16, ge=0, description="Number of held-out prompts that the student answers. 0: none."
    )
    max_tokens: PositiveInt | None = operational(
        None, description="Longest answer, in tokens. Default: teacher.sampling.max_tokens."
    )
    during: bool = operational(
        False, description="Whether it answers during training too, not only before and after."
    )
    teacher_scores: bool | None = operational(
        None,
        description="Whether the teacher scores the student's answers, which gives the KL on them "
        "in both directions, by position. The teacher is then started even if the store has all "
        "other answers. Default: in runs whose student writes rows.",
    )


class CheckConfig(ConfigModel):
    """One check: a function of the user's that says how good an answer is."""

    function: str = operational(
        description="folder/file.py:function or package.module:function. Called with the prompt, "
        "the answer and the fields of the prompt's row; it returns true or false, or a number."
    )
    name: str | None = operational(
        None,
        pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$",
        description="Name under which it is reported. Default: the function's.",
    )
    timeout_s: float = operational(
        5.0,
        gt=0,
        le=600,
        description="Longest time for one answer, in seconds; it then has no figure.",
    )

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        parse(function)
        return function

    @property
    def label(self) -> str:
        """The name under which it is reported."""
        return self.name or parse(self.function)[1]


class TasksConfig(ConfigModel):
    """Tasks of lm-evaluation-harness, at which the run has its models scored at its end."""

    names: Names = operational(
        description="Names of tasks, groups or tags of the harness, or of the files in include."
    )
    include: str | None = operational(
        None,
        description="Folder of task files; they name their data relative to it. Default: the "
        "harness's own tasks alone.",
    )
    limit: PositiveInt | None = operational(
        None, description="Most documents of a task, the first ones. Default: all."
    )
    backend: Literal["hf", "vllm"] = operational(
        "hf", description="What runs the models: transformers (hf) or vLLM."
    )
    batch: PositiveInt = operational(8, description="Rows that are asked at once.")
    chat: bool = operational(
        False, description="Whether documents go through the models' chat templates."
    )
    before: bool = operational(
        True, description="Whether the student as it was before training is asked too."
    )
    timeout_s: float = operational(
        21_600.0, gt=0, description="Most seconds with one model; what was answered then is kept."
    )

    @model_validator(mode="after")
    def _names_tasks(self) -> "TasksConfig":
        if not self.names:
            raise ValueError("names is empty; name at least one task, or remove tasks")
        if bad := [name for name in self.names if "," in name or name != name.strip()]:
            raise ValueError(f"names has {bad[0]!r}; name one task in each entry")
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"names has {twice[0]!r} twice; name it once")
        return self


class EvaluationConfig(ConfigModel):
    """Evaluation: which rows are held out, and how often the student is measured on them."""

    held_out_sources: tuple[str, ...] = identity(
        (),
        description="Names of sources that are used for evaluation only. A prompt that such a "
        "source shares with another one is not trained on.",
    )
    held_out_rows: int = identity(
        0,
        ge=0,
        description="Number of rows of the other sources to hold out, chosen by seed. If a prompt "
        "has several responses, all its rows are held out.",
    )
    max_rows: PositiveInt = identity(
        128, description="Most held-out rows to measure on; chosen by seed if there are more."
    )
    top_k: PositiveInt = identity(
        64, description="Number K of ids and logprobs in the signal of held-out rows."
    )
    every_steps: int = operational(
        0,
        ge=0,
        description="Optimizer steps between evaluations during training. 0: only before and after "
        "it.",
    )
    baselines: bool = operational(
        True,
        description="Whether to measure uniform, unigram and bigram models too, counted from the "
        "training answers.",
    )
    free_running: FreeRunningConfig = operational(
        FreeRunningConfig(), description="Evaluation of answers that the student writes by itself."
    )
    checks: tuple[CheckConfig, ...] = operational(
        (),
        description="List of functions that say how good an answer is, for the free-running "
        "answers of the student and for the teacher's to the same prompts.",
    )

    tasks: TasksConfig | None = operational(
        None,
        description="Tasks of lm-evaluation-harness at the end of the run: teacher, student before "
        "and after. Needs the extra raystill[tasks]. Default: none.",
    )

    @field_validator("checks")
    @classmethod
    def _can_be_told_apart(cls, checks: tuple[CheckConfig, ...]) -> tuple[CheckConfig, ...]:
        names = [check.label for check in checks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"has two named {twice[0]!r}; give each a name of its own")
        return checks

    @model_validator(mode="after")
    def _checks_have_answers(self) -> "EvaluationConfig":
        if self.checks and not (self.enabled and self.free_running.rows):
            raise ValueError(
                "has checks, but no answers to check; hold rows out (held_out_rows or "
                "held_out_sources) and set free_running.rows to 1 or more"
            )
        return self

    @property
    def enabled(self) -> bool:
        """Whether anything is held out."""
        return bool(self.held_out_sources) or self.held_out_rows > 0


class PermissionConfig(ConfigModel):
    """A letter by which the owner of a model or service allows what its terms forbid."""

    file: str = operational(description="Path of the letter; the manifest keeps its sha256.")
    rule: str = operational(
        description="Id of the reading that the letter answers, as check prints it."
    )
    reason: str = operational(
        pattern=r"\S", description="What it allows, in a sentence; kept in the manifest."
    )


class TermsConfig(ConfigModel):
    """What the student is for, and under which terms its sources are. Readings, never advice."""

    purpose: Literal["research", "internal", "commercial"] = operational(
        "research", description="What the student is for."
    )
    distributed: bool = operational(
        False, description="Whether the student will be handed on to others, sold or for free."
    )
    teacher_licence: str | None = operational(
        None,
        description="Licence id of the teacher, as model cards write it, e.g. apache-2.0. Default: "
        "what its folder says.",
    )
    teacher_licences: dict[str, str] = operational(
        {},
        description="As teacher_licence, of several teachers by name, e.g. {code: apache-2.0}.",
    )
    base_licence: str | None = operational(
        None, description="Licence id of student.model. Default: what its folder says."
    )
    student_licence: str | None = operational(
        None, description="Licence id under which the student will be handed on. Default: open."
    )
    permission: PermissionConfig | None = operational(
        None, description="A letter that allows what the terms forbid. Default: none."
    )

    def of_teacher(self, name: str) -> "TermsConfig":
        """The terms of a run of one of several teachers."""
        licence = self.teacher_licences.get(name)
        return self.model_copy(update={"teacher_licence": licence, "teacher_licences": {}})

    def wrong_teachers(self, teachers: Collection[str] | None) -> Iterator[str]:
        """Why the licences are not those of the run's teachers; None: it has one, unnamed."""
        if teachers is not None and self.teacher_licence is not None:
            yield (
                f"terms.teacher_licence ({self.teacher_licence!r}) is of one teacher, but there "
                f"are several; state it as terms.teacher_licences: {{NAME: {self.teacher_licence}}}"
            )
        for name in self.teacher_licences:
            if name not in (teachers or ()):
                known = ", ".join(teachers or ()) or "none has a name"
                yield (
                    f"terms.teacher_licences names {name!r}, which is none of the teachers "
                    f"({known}); name one of them, or set terms.teacher_licence for a single one"
                )
