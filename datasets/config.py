"""Configuration of the prompts and of the stream that carries rows from teacher to student."""

from typing import Any, Literal

from raystill.cluster.model import ConfigModel, PositiveInt, identity, operational


class PromptsConfig(ConfigModel):
    """What the teacher is asked."""

    path: str | tuple[str, ...] = identity(
        description="File, glob, list of them, or URI: .jsonl .json .csv .txt .parquet."
    )
    format: Literal["auto", "jsonl", "json", "csv", "text", "parquet"] = identity(
        "auto", description="Format of the files; auto goes by the file name's ending."
    )
    prompt_field: str = identity("prompt", description="Field that holds plain prompt text.")
    messages_field: str = identity(
        "messages", description="Field that holds chat messages [{role, content}, ...]."
    )
    source_field: str = identity("source", description="Field that names a row's source.")
    system: str | None = identity(
        None, description="System message put before rows that bring none; needs a chat template."
    )
    chat_template: bool = identity(
        True, description="Put prompts through the teacher's chat template; off: raw text."
    )
    chat_template_kwargs: dict[str, Any] = identity(
        {}, description="Variables for the chat template, e.g. {enable_thinking: false}."
    )
    max_prompt_tokens: PositiveInt | None = identity(
        None,
        description="Longer prompts are dropped and counted; default: the context.",
    )
    limit: PositiveInt | None = identity(None, description="Use only the first so many prompts.")
    samples_per_prompt: PositiveInt = identity(
        1, description="Answers asked for each training prompt; each is a row of its own."
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The path setting as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path


class SignalConfig(ConfigModel):
    """What the teacher says about each response token."""

    kind: Literal["text", "sampled", "topk"] = identity(
        "topk", description="text: tokens only; sampled: their logprobs; topk: K best and the tail."
    )
    top_k: PositiveInt = identity(64, description="K: ids and logprobs kept for each token.")


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


class EvaluationConfig(ConfigModel):
    """Which rows are held out, and how often the student is measured on them."""

    held_out_sources: tuple[str, ...] = identity(
        (), description="Sources kept whole from training and used for evaluation."
    )
    held_out_rows: int = identity(
        0, ge=0, description="Rows drawn by seed and kept from training, beside held_out_sources."
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
