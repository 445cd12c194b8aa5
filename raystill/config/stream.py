"""Configuration of the signal, the stream of rows, the teacher store and the evaluation."""

from typing import Literal

from raystill.config.base import ConfigModel, PositiveInt, identity, operational


class SignalConfig(ConfigModel):
    """The signal: what the teacher gives for each response token."""

    kind: Literal["text", "sampled", "topk", "hidden"] = identity(
        "topk",
        description="What the teacher gives for each response token. text: the token id only. "
        "sampled: also the logprob of that id. topk: the top_k most probable ids with logprobs, "
        "and the probability of all others together (the tail). hidden: the last hidden state, "
        "from which the student's workers compute the teacher's whole distribution.",
    )
    top_k: PositiveInt = identity(
        64, description="Number K of ids and logprobs for each token. Used with kind topk only."
    )


class StreamConfig(ConfigModel):
    """The stream of rows from teacher to student: group size, back-pressure, order, drops."""

    group_rows: PositiveInt = identity(
        8,
        description="Rows of a group: one request to a replica and one block of Ray Data. Larger "
        "groups have less overhead; smaller ones wait less for their longest answer.",
    )
    max_rows_ahead: PositiveInt | None = operational(
        None,
        description="Most rows requested from the teacher and not yet taken by a student worker. "
        "It bounds the memory for rows that wait. Default: twice the rows that all replicas answer "
        "at a time, and two steps.",
    )
    order: Literal["fixed", "arrival"] = identity(
        "fixed",
        description="Order of training. fixed: a step trains the same rows at any number of "
        "workers and in any run with the same seed. arrival: rows are trained in the order in "
        "which their answers arrive.",
    )
    on_truncated: Literal["keep", "drop"] = identity(
        "keep",
        description="Whether to train on answers that were cut off by teacher.sampling.max_tokens.",
    )
    max_drop_fraction: float = operational(
        0.0,
        ge=0,
        le=1,
        description="Share of an epoch's rows that may be dropped; the run stops if more are.",
    )
    max_attempts: PositiveInt = operational(
        4,
        description="Attempts to have a group answered, if replicas fail. The run stops after the "
        "last.",
    )


class StoreConfig(ConfigModel):
    """The teacher store, which keeps answers for later epochs, runs and students."""

    path: str | None = operational(
        None,
        description="Folder or URI of the teacher store. Default: teacher_store beside the run "
        "folder; runs in the same parent folder share it.",
    )


class FreeRunningConfig(ConfigModel):
    """Free-running evaluation: the student answers held-out prompts by itself."""

    rows: int = operational(
        16, ge=0, description="Number of held-out prompts that the student answers. 0: none."
    )
    max_tokens: PositiveInt | None = operational(
        None,
        description="Longest answer of the student, in tokens. Default: "
        "teacher.sampling.max_tokens.",
    )
    during: bool = operational(
        False,
        description="Whether the student also answers at the evaluations during training, and not "
        "only before and after it.",
    )
    teacher_scores: bool = operational(
        False,
        description="Whether the teacher scores the student's answers, which gives the figure "
        "kl_on_student_answers. The teacher is then started even if the store has all other "
        "answers.",
    )


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

    @property
    def enabled(self) -> bool:
        """Whether anything is held out."""
        return bool(self.held_out_sources) or self.held_out_rows > 0
