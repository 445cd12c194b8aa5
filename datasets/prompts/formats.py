"""Rows of prompt files as their formats have them: JSONL, JSON, CSV, text and Parquet.

Each row comes with its place, the line (text formats) or the row (JSON, Parquet), for messages.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from raystill.base.personal import mask
from raystill.base.redact import HIDDEN, holds_part, shown_value
from raystill.datasets.prompts.files import PromptFile

PARQUET_ROWS = 256


class BrokenRow(ValueError):
    """A row that is not a valid prompt; the message says why."""


def shorten(value: Any) -> str:
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
                told = HIDDEN if holds_part(line) else shorten(line.strip())
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
        yield file.name, BrokenRow(f"is {shorten(rows)}; expected a list of rows")
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
    source = file.source
    chats = (source.messages_field, source.prompt_field, source.teacher_messages_field, "tools")
    with file.open_bytes() as stream:
        number = 0
        for batch in file.batches(stream, PARQUET_ROWS):
            for row in as_written(batch).to_pylist():
                row |= {name: without_nulls(row[name]) for name in chats if name in row}
                yield f"{file.name}, row {number}", row
                number += 1


def as_written(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with its float32 columns as the numbers that somebody wrote: 0.1 is 0.1, and not
    0.10000000149, as a reference or a check's field would be told.
    """
    for place, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type):
            written = batch.column(place).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(place, field.name, written)
    return batch


def without_nulls(value: Any) -> Any:
    """The value without the nulls of its mappings: a column's structs all have all its fields."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "text": _text, "parquet": _parquet}

# The csv module's own limit, 128 KiB a field, is less than a long prompt may have.
csv.field_size_limit(io.DEFAULT_BUFFER_SIZE * 4096)
