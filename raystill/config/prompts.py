"""Configuration of the prompts: their files, fields, chat template, and weighted sources."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from raystill.base.personal import is_kind
from raystill.base.user_function import parse
from raystill.config.base import ConfigModel, PositiveInt, day_of, identity, operational

MOST_SAMPLES = 100_000
"""Answers to one prompt that a run may want; above, the rows would not be listed in any time."""
Phrase = Annotated[str, Field(min_length=1)]
FileFormat = Literal["auto", "jsonl", "json", "csv", "text", "parquet"]
PersonalDataAction = Literal["count", "mask", "drop"]
PersonalKind = Annotated[str, AfterValidator(is_kind)]


class OverlapConfig(ConfigModel):
    """How much of the held-out prompts, and of benchmarks, stands in training prompts."""

    path: str | tuple[str, ...] = operational(
        (),
        description="Files of benchmarks that must not be trained on, in the formats of prompts: "
        "a path, a glob, a URI, or a list of them. Every text of their rows is compared. Default: "
        "the held-out prompts alone.",
    )
    format: FileFormat = operational(
        "auto", description="Format of the files. auto: by the ending of the file's name."
    )
    ngram: PositiveInt = operational(8, le=64, description="Words n of an n-gram.")
    min_share: float = operational(
        0.7,
        gt=0,
        le=1,
        description="Least share of a text's words that are in n-grams of a training prompt, for "
        "it to count as contained in the training prompts.",
    )
    max_fraction: float | None = operational(
        None,
        ge=0,
        le=1,
        description="Largest share of the held-out prompts, and of each file of benchmarks, that "
        "may be contained in training prompts; with more the run is refused. Default: no limit.",
    )


class FunctionConfig(ConfigModel):
    """A Python function of your own that scores an answer."""

    path: str = identity(
        description="file.py:function, whose text travels with the run, or "
        "package.module:function, which every node can import. It is called with a dict (response, "
        "finish_reason, source, columns) and returns true or false, or a score.",
    )
    columns: tuple[Phrase, ...] = identity(
        (), description="Fields of the prompt files that it is given, null where a row has none."
    )
    min_score: float = identity(
        0.5, description="Least score of an answer that passes; true is 1 and false is 0."
    )
    timeout_s: float = identity(
        10.0,
        gt=0,
        le=3600,
        description="Seconds that one call may take. Then its process is ended and the row is "
        "rejected.",
    )

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, path: str) -> str:
        parse(path)
        return path

    @property
    def name(self) -> str:
        """Name of the function."""
        return parse(self.path)[1]

    @property
    def place(self) -> str:
        """Path of its file, or name of its module."""
        return parse(self.path)[0]

    @property
    def is_file(self) -> bool:
        """Whether it is in a file, whose text travels with the run."""
        return self.place.endswith(".py")


class PersonalFilterConfig(ConfigModel):
    """Looks for personal data and keys in answers, and rejects or masks what holds them."""

    action: Literal["reject", "mask"] = identity(
        "reject",
        description="reject: the row is not trained on. mask: the student gets the answer with "
        "[EMAIL] and the like in their places; with signal.kind text only, since no signal of the "
        "teacher's is of the masked text. Filters of other kinds read what was written.",
    )
    kinds: tuple[PersonalKind, ...] | None = identity(
        None, min_length=1, description="Kinds that count, as check names them. Default: all."
    )


class SourceConfig(ConfigModel):
    """One of several prompt sources. Unset fields take the value of the prompts section."""

    name: str = identity(
        description="Name of the source, different from all others. It replaces what the rows' "
        "source_field says."
    )
    path: str | tuple[str, ...] = identity(
        description="Prompt files: a path, a glob, a URI, or a list of them, as in prompts.path."
    )
    weight: float = identity(
        1.0,
        gt=0,
        le=MOST_SAMPLES,
        allow_inf_nan=False,
        description="How often a training prompt of this source is used in one epoch; multiplied "
        "by samples_per_prompt. 2: two sampled answers for each prompt. 0.25: one answer for a "
        "quarter of the prompts, chosen by seed.",
    )
    format: FileFormat | None = identity(
        None, description="Format of the files. Default: prompts.format."
    )
    prompt_field: str | None = identity(
        None, description="Field with the prompt as plain text. Default: prompts.prompt_field."
    )
    messages_field: str | None = identity(
        None, description="Field with the prompt as chat messages. Default: prompts.messages_field."
    )
    response_field: str | None = identity(
        None, description="Field with a given response. Default: prompts.response_field."
    )
    teacher_messages_field: str | None = identity(
        None,
        description="Field with the chat that the teacher reads. Default: "
        "prompts.teacher_messages_field.",
    )
    limit: PositiveInt | None = identity(
        None,
        description="Number of prompts to use, the first of this source's files. Default: all.",
    )
    licence: str | None = operational(
        None, description="Licence id of the source's data. Default: prompts.licence."
    )
    teacher: str | None = identity(
        None,
        description="Name of the teacher, of teachers, that answers this source's prompts, unless "
        "a row names another (prompts.teacher_field).",
    )

    @field_validator("name")
    @classmethod
    def _has_a_name(cls, name: str) -> str:
        if not name.strip():
            raise ValueError(f"is {name!r}, which is blank; set it to a name for these rows")
        return name


class PromptsConfig(ConfigModel):
    """The prompts that the teacher answers. A bare list is short for ``{sources: [...]}``."""

    path: str | tuple[str, ...] | None = identity(
        None,
        description="Prompt files: a path, a glob, a URI, or a list of them. Formats: .jsonl, "
        ".json, .csv, .txt, .parquet. Required unless sources is set.",
    )
    format: FileFormat = identity(
        "auto", description="Format of the files. auto: by the ending of the file's name."
    )
    prompt_field: str = identity("prompt", description="Field with the prompt as plain text.")
    messages_field: str = identity(
        "messages", description="Field with the prompt as chat messages, [{role, content}, ...]."
    )
    response_field: str | None = identity(
        None,
        description="Field with a given response to the prompt, as text; the messages_field, for "
        "chats whose last message is the response. The teacher scores that response instead of "
        "writing one. Default: the teacher writes the responses.",
    )
    replace_answers: bool = identity(
        False,
        description="Whether the last message of a chat is left out where it is the assistant's, "
        "and the teacher answers instead; false: such a chat is refused.",
    )
    licence: str | None = operational(
        None,
        description="Licence id of the prompts' data, as the cards of data sets write it, e.g. "
        "cc-by-4.0, for the check of terms. Default: not stated, and then nothing is said of it.",
    )
    source_field: str = identity(
        "source",
        description="Field with the name of a row's source, which evaluation.held_out_sources "
        "refers to.",
    )
    teacher_field: str | None = identity(
        None,
        description="Field with the name of the teacher, of teachers, that answers a row. Default: "
        "the sources name their teachers.",
    )
    system: str | None = identity(
        None,
        description="System message for rows that have none. Needs a chat template. Default: no "
        "message is added.",
    )
    teacher_system: str | None = identity(
        None,
        description="System message that the teacher alone reads, in place of the prompt's own; "
        "the student learns to answer as if it had read it. Needs a chat template. Default: the "
        "teacher reads what the student reads.",
    )
    teacher_messages_field: str | None = identity(
        None,
        description="Field with the chat messages that the teacher reads in place of the "
        "student's prompt, for instance with documents or the solution in them. Where it is null "
        "in a row, the teacher reads the student's prompt. Needs a chat template. Default: none.",
    )
    chat_template: bool = identity(
        True,
        description="Whether to format prompts with the teacher's chat template. false: the "
        "prompt's text is used as it is.",
    )
    chat_template_kwargs: dict[str, Any] = identity(
        {}, description="Variables for the chat template, e.g. {enable_thinking: false}."
    )
    template_date: Annotated[str | None, BeforeValidator(day_of)] = operational(
        None,
        description="Date, YYYY-MM-DD, that the chat template prints as today's, if it prints one. "
        "Default: the day on which the run starts, so that a start on another day has other "
        "prompts and asks the teacher again.",
    )
    max_prompt_tokens: PositiveInt | None = identity(
        None,
        description="Longest prompt, in tokens; longer ones are dropped and counted as far as "
        "stream.max_drop_fraction allows, else refused. Default: the teacher's context less one "
        "token.",
    )
    limit: PositiveInt | None = identity(
        None, description="Number of prompts to use, the first of the files. Default: all."
    )
    personal_data: PersonalDataAction | None = identity(
        "count",
        description="What is done with personal data and keys in prompts. count: say how many "
        "prompts hold them. mask: put [EMAIL] and the like in their places, which makes other "
        "prompts with other answers. drop: leave such prompts out. null: do not look. Unless null, "
        "the answers that hold them are counted too; see filters.personal_data.",
    )
    overlap: OverlapConfig = operational(
        OverlapConfig(),
        description="How much of held-out prompts and benchmarks stands in training prompts.",
    )
    samples_per_prompt: PositiveInt = identity(
        1,
        le=MOST_SAMPLES,
        description="Answers to sample for each training prompt; each is a row of its own.",
    )
    reasoning: Literal["keep", "drop"] | None = identity(
        None,
        description="What the student learns of a teacher's reasoning. keep: the reasoning, "
        "between the markers of the chat template (<think>...</think>), and the answer. drop: the "
        "answer alone. Default: reasoning that stands in the answer itself is kept, and what a "
        "service sends apart from the answer is left out.",
    )
    sources: tuple[SourceConfig, ...] | None = identity(
        None, description="List of named sources, each with a weight, in place of path."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, section: Any) -> Any:
        return spell_out_prompts(section)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_the_prompt(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if wrong := sorted({"messages", "add_generation_prompt"} & variables.keys()):
            raise ValueError(f"sets {', '.join(wrong)}, which are the prompt's; leave them out")
        return variables

    @field_validator("sources")
    @classmethod
    def _can_be_told_apart(
        cls, sources: tuple[SourceConfig, ...] | None
    ) -> tuple[SourceConfig, ...] | None:
        if sources is None:
            return None
        if not sources:
            raise ValueError("is an empty list; name one or more sources, or set prompts.path")
        name, count = Counter(source.name for source in sources).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"has the name {name!r} {count} times, but each source needs a name of its own; "
                "rename the others, or list their files under one path"
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
                f"has path ({self.path!r}) and sources ({names}), but only one of them can name "
                "the prompts; remove the other, or set it to null"
            )
        return self

    @model_validator(mode="after")
    def _given_responses_come_once(self) -> "PromptsConfig":
        if self.replace_answers and self.response_field is not None:
            raise ValueError(
                f"has replace_answers and response_field ({self.response_field!r}), but the "
                "teacher either writes the answers or scores the given ones; remove one of them"
            )
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
                    f"response_field ({field!r}) gives one response for each prompt; lower them "
                    "to 1, or set response_field to null"
                )
        return self

    @model_validator(mode="after")
    def _a_teacher_that_sees_more_needs_a_chat(self) -> "PromptsConfig":
        if self.teacher_sees_more and not self.chat_template:
            name = "teacher_messages_field" if self.teacher_system is None else "teacher_system"
            raise ValueError(
                f"has {name}, which needs a chat template, but chat_template is false; set it to "
                f"true, or remove {name}"
            )
        return self

    @property
    def teacher_sees_more(self) -> bool:
        """Whether the teacher reads another prompt than the student."""
        fields = [source.teacher_messages_field for source in self.sources or ()]
        return self.teacher_system is not None or any([self.teacher_messages_field, *fields])

    def named_teachers(self, teachers: Collection[str] | None) -> frozenset[str | None]:
        """Teachers that may answer a row: with a field of the prompt files any of them."""
        if self.teacher_field is not None:
            return frozenset(teachers or ())
        return frozenset(source.teacher for source in self.sources or ())

    def wrong_teachers(self, teachers: Collection[str] | None) -> Iterator[str]:
        """Why the teachers that these prompts name are not those of the run."""
        of_sources = {one.name: one.teacher for one in self.sources or ()}
        if teachers is None:
            if self.teacher_field is not None or any(of_sources.values()):
                yield (
                    "prompts name teachers (teacher_field, or teacher of a source), but the run "
                    "file has no teachers; name them there, or leave these out"
                )
            return
        listed = ", ".join(teachers)
        for source, teacher in of_sources.items():
            if teacher is not None and teacher not in teachers:
                yield (
                    f"prompts.sources: {source!r} is to be answered by {teacher!r}, which is none "
                    f"of the teachers ({listed}); name one of them"
                )
        if self.teacher_field is None and not all(of_sources.values() or [None]):
            without = next((name for name, teacher in of_sources.items() if not teacher), None)
            what = "prompts.path" if without is None else f"the source {without!r}"
            yield (
                f"{what} has no teacher, and there are several ({listed}); list the prompts as "
                "prompts.sources with teacher: NAME each, or set prompts.teacher_field"
            )

    def licences(self) -> list[tuple[str, str]]:
        """The data whose licence is stated, in words, and its licence."""
        found = [(f"the data of {s.name}", s.licence or self.licence) for s in self.sources or ()]
        found = found or [("the prompts' data", self.licence)]
        return [(what, licence) for what, licence in found if licence is not None]

    @property
    def files_setting(self) -> str:
        """Name of the setting that lists the files, for messages."""
        return "prompts.path" if self.sources is None else "prompts.sources"


def spell_out_prompts(section: Any) -> Any:
    """The long form of a prompts section; a bare list becomes ``{sources: [...]}``."""
    return {"sources": section} if isinstance(section, list | tuple) else section
