"""Read prompts from JSONL, JSON, CSV, text and Parquet files: the first step of ``check``.

A problem names its file and the line (text formats) or row (JSON, Parquet), and the problems of all
files are reported at once.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raystill.base.errors import ConfigError, Problem
from raystill.base.personal import mask
from raystill.base.redact import HIDDEN, holds_part, shown_value
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.files import (
    UNREADABLE,
    PromptFile,
    PromptSource,
    find_files,
    prompt_sources,
    why_unreadable,
)
from raystill.datasets.prompts.progress import Meter, Progress
from raystill.datasets.spool.spool import Spool

MAX_PROBLEMS_PER_FILE = 5
DEFAULT_SOURCE = "prompts"
PARQUET_ROWS = 256


@dataclass(frozen=True)
class RawPrompt:
    """One prompt as it is in the file, before the chat template.

    Exactly one of ``text`` and ``messages`` is set. ``source`` is the name of its source; ``where``
    the file and line. ``response`` is the given response, which the teacher only scores; None where
    the teacher answers. ``fields`` is the whole row; None where nobody asked for it.
    ``teacher_messages``: what the teacher reads instead; None: the same as the student.
    ``teacher``: the name of the one that answers it, where there are several.
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


class BrokenRow(ValueError):
    """A row that is not a valid prompt; the message says why."""


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
        raise BrokenRow(f"is {_short(row)}; expected an object with {source.prompt_field!r}")
    response = _response(row, source)
    name = row.get(source.source_field) if source.name is None else source.name
    name = DEFAULT_SOURCE if name is None else str(name)
    columns = tuple(_as_json(row.get(column)) for column in source.columns)
    messages, text = row.get(source.messages_field), row.get(source.prompt_field)
    if isinstance(text, list):  # Chat messages under the name of the prompt.
        messages, text = messages or text, None
    more = _teacher_messages(row, source)
    if messages is not None:
        messages = as_messages(messages)
        return RawPrompt(None, messages, name, where, response, columns, None, more)
    if isinstance(text, str):
        return RawPrompt(text, None, name, where, response, columns, None, more)
    if text is None:
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise BrokenRow(
            f"has neither {source.prompt_field!r} nor {source.messages_field!r} (it has: {keys}); "
            f"set {source.where}.prompt_field or {source.where}.messages_field to the field to use"
        )
    raise BrokenRow(f"{source.prompt_field!r} is {_short(text)}; expected text")


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
        raise BrokenRow(f"{source.response_field!r} is {_short(response)}; expected text")
    return response or ""


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
        return None if row[field] is None else as_messages(row[field])
    except BrokenRow as error:
        raise BrokenRow(f"{field!r}: {error}") from None


def _teacher(row: Any, source: PromptSource) -> str | None:
    """The name of the row's teacher; None where neither it nor its source names one."""
    own = row.get(source.teacher_field) if isinstance(row, dict) and source.teacher_field else None
    if not isinstance(own, str | None):
        raise BrokenRow(f"{source.teacher_field!r} is {_short(own)}; expected a teacher's name")
    return own or source.teacher  # CSV has no null.


def as_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages with valid roles and contents, of which the last is to be answered.

    Raises BrokenRow.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BrokenRow(f"messages are {_short(messages)}; expected a list") from None
    if not isinstance(messages, list) or not messages:
        raise BrokenRow(f"messages are {_short(messages)}; expected a list with one or more")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BrokenRow(f"message {number} is {_short(message)}; expected {{role, content}}")
        if not isinstance(message.get("content"), str | list):
            content = _short(message.get("content"))
            raise BrokenRow(f"message {number} has content {content}; expected text")
        # Parquet gives each message the keys of all messages, null where it has none.
        checked.append({name: value for name, value in message.items() if value is not None})
    if all(message["role"] in ("system", "developer") for message in checked):
        raise BrokenRow(
            "has a system message alone, which asks nothing; add the user's message, or put it "
            "into prompts.system for all prompts"
        )
    if checked[-1]["role"] == "assistant":
        raise BrokenRow(
            "the last message is the assistant's, which leaves the teacher nothing to answer; "
            "remove it, put its text into a field of its own (prompts.response_field), or bring "
            "such answers into the store (raystill store import)"
        )
    return checked


def _short(value: Any) -> str:
    """The beginning of a value, masked before it is cut: a part of an address looks like none."""
    text = mask(shown_value(value, 1000))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _jsonl(file: PromptFile) -> Iterator[tuple[str, Any]]:
    with file.open_text() as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = _why_no_json(error)
                reason += f" at column {error.colno}" if hasattr(error, "colno") else ""
                told = HIDDEN if holds_part(line) else _short(line.strip())
                message = f"is not JSON ({reason}): {told}"
                yield where, BrokenRow(f"{message}; repair or remove the line")


def _why_no_json(error: Exception) -> str:
    """Why Python reads no JSON of a text, in words for who wrote it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "a number with more digits than are read"


def _json(file: PromptFile) -> Iterator[tuple[str, Any]]:
    with file.open_text() as stream:
        text = stream.read()
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            yield file.name, BrokenRow(f"is not JSON ({_why_no_json(error)}); repair the file")
            return
        where = f"{file.name}, line {error.lineno}"
        message = f"is not JSON ({error.msg} at column {error.colno}); expected one list of rows"
        if error.msg == "Extra data":
            message += f" (one object a line is JSONL: set {file.source.where}.format: jsonl)"
        yield where, BrokenRow(message)
        return
    if not isinstance(rows, list):
        yield file.name, BrokenRow(f"is {_short(rows)}; expected a list of rows")
        return
    for number, row in enumerate(rows):
        yield f"{file.name}, row {number}", row


def _csv(file: PromptFile) -> Iterator[tuple[str, Any]]:
    with file.open_text(newline="") as stream:
        # Strict: else a quote that is never closed takes in all that follows it.
        reader = csv.DictReader(stream, strict=True)
        begun = 0
        while True:
            begun = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{file.name}, line {begun}", BrokenRow(_why_no_csv(error))
                return
            where = f"{file.name}, line {reader.line_num}"
            named = [name for name in reader.fieldnames or () if name]
            if begun == 1 and len(set(named)) < len(named):
                yield file.name, BrokenRow("has two columns of one name; rename one of them")
                return
            if None in row:
                columns = len(reader.fieldnames or ())
                yield (
                    where,
                    BrokenRow(
                        f"has {columns + len(row[None])} values for {columns} columns; quote "
                        "values that hold commas"
                    ),
                )
                continue
            yield where, row


def _why_no_csv(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end" in reason:
        reason = "the quote that opens here is never closed"
    return f"is not CSV ({reason}); write a quote in a value twice, and close the one around it"


def _text(file: PromptFile) -> Iterator[tuple[str, Any]]:
    with file.open_text() as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{file.name}, line {number}", line.rstrip("\r\n")


def _parquet(file: PromptFile) -> Iterator[tuple[str, Any]]:
    with file.open_bytes() as stream:
        number = 0
        for batch in file.batches(stream, PARQUET_ROWS):
            for row in batch.to_pylist():
                yield f"{file.name}, row {number}", row
                number += 1


READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "text": _text, "parquet": _parquet}

# The csv module's own limit, 128 KiB a field, is less than a long prompt may have.
csv.field_size_limit(io.DEFAULT_BUFFER_SIZE * 4096)
