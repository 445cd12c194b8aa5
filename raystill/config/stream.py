"""Configuration of the prompts and of the stream that carries rows from teacher to student."""

from typing import Literal

from raystill.config.base import ConfigModel, PositiveInt, identity, operational


class SignalConfig(ConfigModel):
    """What the teacher says about each response token."""

    kind: Literal["text", "sampled", "topk", "hidden"] = identity(
        "topk",
        description="text: tokens only; sampled: their logprobs; topk: K best and the tail; "
        "hidden: the teacher's last hidden state, from which the whole vocabulary follows.",
    )
    top_k: PositiveInt = identity(
        64, description="K: ids and logprobs kept for each token, with kind topk."
    )


class StreamConfig(ConfigModel):
    """How rows flow: groups, credits, order, and what is dropped."""

    group_rows: PositiveInt = identity(
        8, description="Rows that travel together: one Serve call, one block, one credit."
    )
    max_rows_ahead: PositiveInt | None = operational(
        None,
        description="Most rows asked for and not yet taken by a worker; default: twice "
        "what all replicas answer at once, and two steps.",
    )
    order: Literal["fixed", "arrival"] = identity(
        "fixed",
        description="fixed: every step trains the same rows at any number of workers; "
        "arrival: rows are trained as they come.",
    )
    on_truncated: Literal["keep", "drop"] = identity(
        "keep", description="What to do with answers cut off by max_tokens."
    )
    max_drop_fraction: float = operational(
        0.0, ge=0, le=1, description="Share of rows that may be dropped before the run stops."
    )
    max_attempts: PositiveInt = operational(
        4, description="Times a group is asked for when replicas fail, before the run stops."
    )


class StoreConfig(ConfigModel):
    """Where the teacher's answers are kept for later epochs, runs and students."""

    path: str | None = operational(
        None,
        description="Folder or URI of the teacher store; default: teacher_store beside the run "
        "folder, shared by the runs there.",
    )


class FreeRunningConfig(ConfigModel):
    """How the student's own answers are drawn and judged."""

    rows: int = operational(16, ge=0, description="Held-out prompts the student answers; 0: none.")
    max_tokens: PositiveInt | None = operational(
        None, description="Longest answer, tokens; default: the teacher's max_tokens."
    )
    during: bool = operational(
        False, description="Also at the evaluations during training, not only before and after."
    )
    teacher_scores: bool = operational(
        False,
        description="Have the teacher score what the student wrote: kl_on_student_answers. It must "
        "run for that, also where all other answers are in the store.",
    )


class EvaluationConfig(ConfigModel):
    """Which rows are held out, and how often the student is measured on them."""

    held_out_sources: tuple[str, ...] = identity(
        (),
        description="Sources kept whole from training and used for evaluation; no other source is "
        "trained on a prompt of theirs.",
    )
    held_out_rows: int = identity(
        0,
        ge=0,
        description="Rows drawn by seed and kept from training, beside held_out_sources; of a "
        "prompt with several responses all are.",
    )
    max_rows: PositiveInt = identity(
        128, description="Most held-out rows that are measured (drawn by seed)."
    )
    top_k: PositiveInt = identity(64, description="K of the held-out rows' signal.")
    every_steps: int = operational(
        0, ge=0, description="Optimizer steps between evaluations; 0: only before and after."
    )
    baselines: bool = operational(
        True, description="Also measure uniform, unigram and bigram models of the training answers."
    )
    free_running: FreeRunningConfig = operational(
        FreeRunningConfig(), description="Judging what the student writes by itself."
    )

    @property
    def enabled(self) -> bool:
        """Whether anything is held out."""
        return bool(self.held_out_sources) or self.held_out_rows > 0
