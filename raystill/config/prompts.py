"""Configuration of the prompts and of the stream that carries rows from teacher to student."""

from collections import Counter
from datetime import date
from typing import Any, Literal

from pydantic import field_validator, model_validator

from raystill.config.base import ConfigModel, PositiveInt, identity, operational

FileFormat = Literal["auto", "jsonl", "json", "csv", "text", "parquet"]


class SourceConfig(ConfigModel):
    """One of several sources of prompts; what it leaves unset is that of the prompts section."""

    name: str = identity(
        description="Fills the rows' source, whatever the file says; unlike every other name."
    )
    path: str | tuple[str, ...] = identity(
        description="File, glob, list of them, or URI, as in prompts.path."
    )
    weight: float = identity(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Rows of an epoch for each training prompt, times samples_per_prompt: 2 asks "
        "for two samples of each, 0.25 for one of a quarter of them, chosen by seed.",
    )
    format: FileFormat | None = identity(
        None, description="Format of the files; default: prompts.format."
    )
    prompt_field: str | None = identity(
        None, description="Field that holds plain prompt text; default: prompts.prompt_field."
    )
    messages_field: str | None = identity(
        None, description="Field that holds chat messages; default: prompts.messages_field."
    )
    response_field: str | None = identity(
        None, description="Field that holds the response; default: prompts.response_field."
    )
    limit: PositiveInt | None = identity(
        None, description="Use only the first so many prompts of this source."
    )

    @field_validator("name")
    @classmethod
    def _has_a_name(cls, name: str) -> str:
        if not name.strip():
            raise ValueError(f"is {name!r}, which is blank; set it to a name for these rows")
        return name


class PromptsConfig(ConfigModel):
    """What the teacher is asked; a bare list stands for its sources."""

    path: str | tuple[str, ...] | None = identity(
        None,
        description="File, glob, list of them, or URI: .jsonl .json .csv .txt .parquet. "
        "Needed, unless there are sources.",
    )
    format: FileFormat = identity(
        "auto", description="Format of the files; auto goes by the file name's ending."
    )
    prompt_field: str = identity("prompt", description="Field that holds plain prompt text.")
    messages_field: str = identity(
        "messages", description="Field that holds chat messages [{role, content}, ...]."
    )
    response_field: str | None = identity(
        None,
        description="Field that holds the response to the prompt, text of whoever wrote it: the "
        "teacher scores it and writes none. Default: the teacher answers.",
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
    template_date: str | None = operational(
        None,
        description="Day that the chat template takes for today, YYYY-MM-DD, if it prints the "
        "date. Default: the day of each start, which makes every prompt another one.",
    )
    max_prompt_tokens: PositiveInt | None = identity(
        None,
        description="Longer prompts are dropped and counted; default: the context.",
    )
    limit: PositiveInt | None = identity(None, description="Use only the first so many prompts.")
    samples_per_prompt: PositiveInt = identity(
        1, description="Answers asked for each training prompt; each is a row of its own."
    )
    sources: tuple[SourceConfig, ...] | None = identity(
        None, description="In place of path: a list of named sources, each with a weight."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, section: Any) -> Any:
        return spell_out_prompts(section)

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_day(cls, value: Any) -> Any:
        if value is None:
            return None
        try:  # YAML makes a date of it by itself.
            return date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(f"is {value!r}; expected a day as YYYY-MM-DD, or null") from None

    @field_validator("sources")
    @classmethod
    def _can_be_told_apart(
        cls, sources: tuple[SourceConfig, ...] | None
    ) -> tuple[SourceConfig, ...] | None:
        if sources is None:
            return None
        if not sources:
            raise ValueError("is an empty list; name one or more sources, or set prompts.path")
        counts = Counter(source.name for source in sources)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(
                f"has the name {twice[0]!r} {counts[twice[0]]} times, but a name stands for one "
                "source; rename the others, or list their files under one path"
            )
        return sources

    @model_validator(mode="after")
    def _path_or_sources(self) -> "PromptsConfig":
        if self.path is None and self.sources is None:
            raise ValueError(
                "has neither path nor sources; set prompts.path to the prompts' files, or "
                "prompts.sources to a list of {name, path, weight}"
            )
        if self.path is not None and self.sources is not None:
            names = ", ".join(source.name for source in self.sources)
            raise ValueError(
                f"has path ({self.path!r}) and sources ({names}), of which just one can say what "
                "is asked; remove the other, or set it to null"
            )
        return self

    @model_validator(mode="after")
    def _given_responses_come_once(self) -> "PromptsConfig":
        own: list[tuple[str, str | None, float]] = [
            (f"sources.{number}.", source.response_field, source.weight)
            for number, source in enumerate(self.sources or ())
        ]
        for where, field, weight in own or [("", None, 1.0)]:
            field = field or self.response_field
            if field is not None and weight * self.samples_per_prompt > 1:
                weighed = f"{where}weight ({weight:g}) times " if where else ""
                raise ValueError(
                    f"has {weighed}samples_per_prompt ({self.samples_per_prompt}) above 1, but "
                    f"response_field ({field!r}) gives each prompt its one response; lower them "
                    "to 1, or set response_field to null"
                )
        return self

    @property
    def files_setting(self) -> str:
        """The setting that names the files."""
        return "prompts.path" if self.sources is None else "prompts.sources"


def spell_out_prompts(section: Any) -> Any:
    """The long form of a prompts section: a bare list is short for ``{sources: [...]}``."""
    return {"sources": section} if isinstance(section, list | tuple) else section
