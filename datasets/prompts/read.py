"""Read prompts from the rows of files: the first step of ``check``.

A problem names its file and the line (text formats) or row (JSON, Parquet), and the problems of all
files are reported at once.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raystill.base.errors import ConfigError, Problem
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.files import (
    UNREADABLE,
    PromptFile,
    PromptSource,
    find_files,
    prompt_sources,
    why_unreadable,
)
from raystill.datasets.prompts.formats import READERS, BrokenRow, shorten
from raystill.datasets.spool.progress import Meter, Progress
from raystill.datasets.spool.spool import Spool

MAX_PROBLEMS_PER_FILE = 5
DEFAULT_SOURCE = "prompts"
TOOLS = "tools"
"""Field of the functions that a row's chat offers, by the name that data sets give it."""
ANSWERS = "assistant"
"""Role of the messages that answer."""
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class RawPrompt:
    """One prompt as it is in the file, before the chat template.

    Exactly one of ``text`` and ``messages`` is set. ``source`` is the name of its source; ``where``
    the file and line. ``response`` is the given response, which the teacher only scores; None where
    the teacher answers. ``fields`` is the whole row; None where nobody asked for it.
    ``teacher_messages``: what the teacher reads instead; None: the same as the student.
    ``teacher``: the name of the one that answers it, where there are several. ``tools``: functions
    that a chat offers, as its template takes them (JSON schemas); None where there are none.
    """

    text: str | None
    messages: list[dict[str, Any]] | None
    source: str
    where: str
    response: str | None = None
    columns: tuple[str | None, ...] = ()
    fields: dict[str, Any] | None = None
    teacher_messages: list[dict[str, Any]] | None = None
    teacher: str | None = None
    tools: list[dict[str, Any]] | None = None


def read_prompts(
    prompts: PromptsConfig,
    progress: Progress | None = None,
    columns: Sequence[str] = (),
    keep_fields: bool = False,
) -> Spool[RawPrompt]:
    """All prompts, in the order of the sources and of their files.

    ``columns``: further fields to keep; ``keep_fields``: keep all. Raises ConfigError with the
    problems of all files.
    """
    problems: list[Problem] = []
    sources = []
    for source in prompt_sources(prompts, columns):
        files, missing = find_files(source)
        problems += missing
        sources.append((source, files, not missing))
    meter = Meter(progress, "reading prompts")
    read: Spool[RawPrompt] = Spool()
    for source, files, complete in sources:
        limits = [] if prompts.limit is None else [prompts.limit - len(read)]
        limits += [] if source.limit is None else [source.limit]
        if 0 in limits:
            break
        before = len(problems), len(read)
        read.extend(_read_files(files, min(limits, default=None), problems, meter, keep_fields))
        if complete and (len(problems), len(read)) == before:
            problems.append(source.problem(f"{', '.join(source.paths)}: no prompts in there"))
    if problems:
        raise ConfigError(problems)
    return read


def _read_files(
    files: list[PromptFile],
    limit: int | None,
    problems: list[Problem],
    meter: Meter,
    keep_fields: bool,
) -> Iterator[RawPrompt]:
    """The first ``limit`` prompts of these files; adds what is wrong with them to ``problems``."""
    read = 0
    for file in files:
        before = read
        room = None if limit is None else limit - read
        if room == 0:
            break
        for batch in meter.batches(itertools.islice(_read_file(file, problems, keep_fields), room)):
            read += len(batch)
            yield from batch
        # One of several files of a glob or folder may be empty; one that is named may not.
        told = any(problem.where.startswith(file.name) for problem in problems)
        if read == before and not file.globbed and not told:
            problems.append(Problem(file.name, "holds no prompts; expected one or more rows"))


def _read_file(file: PromptFile, problems: list[Problem], keep_fields: bool) -> Iterator[RawPrompt]:
    """The file's prompts; adds what is wrong with it to ``problems``."""
    broken = 0
    try:
        for where, row in READERS[file.format](file):
            try:
                if isinstance(row, BrokenRow):
                    raise row
                raw = as_prompt(row, where, file.source)
                if (teacher := _teacher(row, file.source)) is not None:
                    raw = replace(raw, teacher=teacher)
                if keep_fields:
                    raw = replace(raw, fields=row if isinstance(row, dict) else {})
                yield _encodable(raw)
            except BrokenRow as error:
                broken += 1
                if broken <= MAX_PROBLEMS_PER_FILE:
                    problems.append(Problem(where, str(error)))
    except UNREADABLE as error:
        problems.append(Problem(file.name, why_unreadable(file.format, error)))
    if broken > MAX_PROBLEMS_PER_FILE:
        problems.append(Problem(file.name, f"{broken - MAX_PROBLEMS_PER_FILE} more broken rows"))


def _encodable(prompt: RawPrompt) -> RawPrompt:
    """The prompt; BrokenRow for half of a surrogate pair, which no tokenizer and no table takes."""
    said = (
        prompt.text,
        prompt.messages,
        prompt.source,
        prompt.response,
        prompt.teacher_messages,
        prompt.tools,
    )  # All else is kept as JSON.
    try:
        "".join(_texts(said)).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise BrokenRow(
            f"has {half}, half of a character (a surrogate without its pair); correct the text"
        ) from None
    return prompt


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings, keys too."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one


def as_prompt(row: Any, where: str, source: PromptSource) -> RawPrompt:
    """A row as a prompt. Raises BrokenRow."""
    plain = source.response_field is None and source.teacher_messages_field is None
    if isinstance(row, str) and plain:
        none = (None,) * len(source.columns)
        return RawPrompt(row, None, source.name or DEFAULT_SOURCE, where, None, none)
    if not isinstance(row, dict):
        raise BrokenRow(f"is {shorten(row)}; expected an object with {source.prompt_field!r}")
    name = row.get(source.source_field) if source.name is None else source.name
    name = DEFAULT_SOURCE if name is None else str(name)
    columns = tuple(_as_json(row.get(column)) for column in source.columns)
    # CSV has no null.
    messages, text = row.get(source.messages_field) or None, row.get(source.prompt_field)
    if isinstance(text, list):  # Chat messages under the name of the prompt.
        messages, text = messages or text, None
    more = _teacher_messages(row, source)
    response: str | None
    if responses_in_chats(source):
        messages, response = _chat_and_response(messages, source)
    else:
        response = _response(row, source)
    if messages is not None:
        messages, tools = as_messages(messages, source.replace_answers), as_tools(row.get(TOOLS))
        return RawPrompt(None, messages, name, where, response, columns, None, more, tools=tools)
    if isinstance(text, str):
        return RawPrompt(text, None, name, where, response, columns, None, more)
    if text is None:
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise BrokenRow(
            f"has neither {source.prompt_field!r} nor {source.messages_field!r} (it has: {keys}); "
            f"set {source.where}.prompt_field or {source.where}.messages_field to the field to use"
        )
    raise BrokenRow(f"{source.prompt_field!r} is {shorten(text)}; expected text")


def _as_json(value: Any) -> str | None:
    """A field's value as JSON text; what JSON lacks, a date for example, as its text."""
    try:
        return None if value is None else json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:  # It contains itself, or 5,000 digits.
        raise BrokenRow(f"has a field that cannot be kept ({error})") from None


def _response(row: dict[str, Any], source: PromptSource) -> str | None:
    """The given response; empty where its field is null, None where the teacher answers."""
    if source.response_field is None:
        return None
    response = row.get(source.response_field, BrokenRow)
    if response is BrokenRow:
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise BrokenRow(
            f"has no {source.response_field!r} (it has: {keys}); set {source.where}.response_field "
            "to the field to use, or to null for the teacher to answer"
        )
    if not isinstance(response, str | None):
        raise BrokenRow(
            f"{source.response_field!r} is {shorten(response)}; expected text (the last message of "
            f"the chat is the response with {source.where}.response_field: "
            f"{source.messages_field})"
        )
    return response or ""


def responses_in_chats(source: PromptSource) -> bool:
    """Whether the last message of a chat is the given response."""
    return source.response_field in (source.messages_field, source.prompt_field)


def _chat_and_response(messages: Any, source: PromptSource) -> tuple[list[Any], str]:
    """The messages before the last one, and the text of that one, which is the assistant's."""
    chat = _listed(messages)
    last = chat[-1] if isinstance(chat[-1], dict) else {}
    if last.get("role") != ANSWERS or not isinstance(last.get("content"), str):
        raise BrokenRow(
            f"the last message is {shorten(chat[-1])}; expected the assistant's with its text, "
            f"which is the response since {source.where}.response_field is "
            f"{source.response_field!r}; set that to null for the teacher to answer"
        )
    return chat[:-1], last["content"]


def _teacher_messages(row: dict[str, Any], source: PromptSource) -> list[dict[str, Any]] | None:
    """The chat that the teacher reads; None where it reads the student's prompt."""
    field = source.teacher_messages_field
    if field is None:
        return None
    if field not in row:
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise BrokenRow(
            f"has no {field!r} (it has: {keys}); set {source.where}.teacher_messages_field to the "
            "field to use, or the row's to null for the teacher to read the student's prompt"
        )
    try:
        return as_messages(row[field]) if row[field] else None  # CSV has no null.
    except BrokenRow as error:
        raise BrokenRow(f"{field!r}: {error}") from None


def _teacher(row: Any, source: PromptSource) -> str | None:
    """The name of the row's teacher; None where neither it nor its source names one."""
    own = row.get(source.teacher_field) if isinstance(row, dict) and source.teacher_field else None
    if not isinstance(own, str | None):
        raise BrokenRow(f"{source.teacher_field!r} is {shorten(own)}; expected a teacher's name")
    return own or source.teacher  # CSV has no null.


def _listed(messages: Any) -> list[Any]:
    """The messages of a chat, one or more of any kind, which may be written as JSON."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BrokenRow(f"messages are {shorten(messages)}; expected a list") from None
    if not isinstance(messages, list) or not messages:
        raise BrokenRow(f"messages are {shorten(messages)}; expected a list with one or more")
    return messages


def _calls(message: dict[str, Any]) -> bool:
    """Whether an assistant's message calls tools, beside which it may say nothing."""
    return message["role"] == ANSWERS and bool(message.get("tool_calls"))


def _require_json(value: Any, what: str) -> None:
    """BrokenRow for what no chat template writes as JSON and no service is sent, such as a date."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokenRow(
            f"{what} has a value that is not JSON ({error}); write it as text"
        ) from None


def as_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The functions that a chat offers, which may be written as JSON. Raises BrokenRow."""
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BrokenRow(f"{TOOLS!r} are {shorten(tools)}; expected a list") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BrokenRow(
            f"{TOOLS!r} are {shorten(tools)}; expected the functions that the chat offers, a list "
            "of JSON schemas; give the field another name if it is something else"
        )
    _require_json(tools, TOOLS)
    return tools


def as_messages(messages: Any, replace_answer: bool = False) -> list[dict[str, Any]]:
    """Chat messages with valid roles and contents, of which the last is to be answered.

    replace_answer: an assistant's message at the end is left out. Raises BrokenRow.
    """
    messages, checked = _listed(messages), []
    if replace_answer and isinstance(messages[-1], dict) and messages[-1].get("role") == ANSWERS:
        messages = _listed(messages[:-1])
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BrokenRow(f"message {number} is {shorten(message)}; expected {{role, content}}")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and _calls(message)):
            raise BrokenRow(f"message {number} has content {shorten(content)}; expected text")
        if not all(isinstance(value, str) for value in message.values()):
            _require_json(message, f"message {number}")
        # Parquet gives each message the keys of all messages, null where it has none.
        checked.append({n: value for n, value in message.items() if value is not None})
        checked[-1].setdefault("content", None)
    if all(message["role"] in SYSTEM_ROLES for message in checked):
        raise BrokenRow(
            "has a system message alone, which asks nothing; add the user's message, or put it "
            "into prompts.system for all prompts"
        )
    if checked[-1]["role"] == ANSWERS:
        raise BrokenRow(
            "the last message is the assistant's, which leaves the teacher nothing to answer; set "
            "prompts.replace_answers for the teacher to answer in its place, or "
            "prompts.response_field to the field of the messages for the teacher to score it"
        )
    return checked
