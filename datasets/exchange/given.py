"""Reads questions with their answers from files of others: JSONL, and Parquet data sets.

A row has ``messages``, of which the last is the assistant's; or a ``prompt`` (text or messages) and
a ``completion`` or ``response`` (text, or one assistant's message). A data set that ``store
export`` has written has ids and logprobs too. What is no such row is given as a ``BrokenRow``,
with its place; one broken line does not spoil the others.

Imports neither Ray nor torch.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, RunError
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.files import (
    UNREADABLE,
    PromptFile,
    PromptSource,
    find_files,
    why_unreadable,
)
from raystill.datasets.prompts.formats import BrokenRow, without_nulls
from raystill.datasets.prompts.read import (
    TOOLS,
    RawPrompt,
    as_messages,
    as_tools,
    responses_in_chats,
)

LONGEST_LINE = 32 << 20
"""Characters of a JSONL line; a longer one is passed over without being read whole."""
MOST_PARTS = 8
"""Times so many characters after which a line is taken to have no end."""
PARQUET_ROWS = 64
TEXT_COLUMNS = ("prompt", "messages", "completion", "response", "finish_reason")
ID_COLUMNS = ("prompt_ids", "completion_ids", "sampled_logprobs", "tail_logprob")
TOP_COLUMNS = ("logprobs", "logprob_token_ids")
REASONS = (None, "stop", "length")


@dataclass(frozen=True)
class GivenAnswer:
    """A question and its answer. ``finish_reason``: None where the row does not say.

    arrays: of an exported row, what is there of ``prompt_ids`` [P], ``completion_ids`` [T],
    ``sampled_logprobs`` [T], ``tail_logprob`` [T], ``logprobs`` and ``logprob_token_ids`` [T, K].
    """

    prompt: RawPrompt
    response: str
    finish_reason: str | None
    arrays: dict[str, NDArray[Any]]


def read_given(
    paths: tuple[str, ...], prompts: PromptsConfig
) -> Iterator[tuple[str, GivenAnswer | BrokenRow]]:
    """The rows of all files, each with its place, as they are in the files.

    prompts: names the fields. Raises ConfigError where files are missing, before any is read, and
    RunError where one cannot be read.
    """
    fields = (prompts.prompt_field, prompts.messages_field, prompts.response_field)
    source = PromptSource("FILES", None, paths, "auto", fields[0], fields[1], fields[2], "", None)
    files, problems = find_files(source)
    problems += [
        source.problem(f"{file.name!r} is {file.format}; expected .jsonl or .parquet")
        for file in files
        if file.format not in ("jsonl", "parquet")
    ]
    if problems:
        raise ConfigError(problems)
    for file in files:
        rows = _parquet_rows if file.format == "parquet" else _jsonl_rows
        try:
            for where, row, arrays in rows(file):
                yield where, _as_given(row, where, source, arrays)
        except UNREADABLE as error:
            raise RunError(
                f"{file.name} {why_unreadable(file.format, error)} and import it again: what is "
                "imported stays, and is not imported twice"
            ) from error


def _as_given(
    row: Any, where: str, source: PromptSource, arrays: dict[str, NDArray[Any]]
) -> GivenAnswer | BrokenRow:
    try:
        if isinstance(row, BrokenRow):
            raise row
        if not isinstance(row, dict):
            raise BrokenRow("is no object")
        prompt, response = _question_and_answer(row, source)
        reason = row.get("finish_reason")
        if reason not in REASONS:
            raise BrokenRow("has a finish_reason that is neither stop nor length")
        text, chat = (prompt, None) if isinstance(prompt, str) else (None, as_messages(prompt))
        tools = None if chat is None else as_tools(row.get(TOOLS))
        _refuse_surrogates(text, chat, response, tools)
        if not response.strip():
            raise BrokenRow("has an empty response")
        asked = RawPrompt(text, chat, "", where, tools=tools)
        return GivenAnswer(asked, response, reason, arrays)
    except BrokenRow as error:
        return error
    except RecursionError:
        return BrokenRow("is nested too deep")


def _question_and_answer(row: dict[str, Any], source: PromptSource) -> tuple[Any, str]:
    """The prompt (text or messages), and the answer's text."""
    prompt, messages = row.get(source.prompt_field), row.get(source.messages_field)
    own = None if responses_in_chats(source) else source.response_field
    names = [own] if own else ["completion", "response"]
    answer = next((row[name] for name in names if row.get(name)), None)
    if isinstance(messages, str):
        messages = _from_json(messages) if messages else None
    if answer is None and messages is not None:
        if not isinstance(messages, list) or len(messages) < 2:
            raise BrokenRow("has messages that are no question and answer")
        return messages[:-1], _said(messages[-1:])
    if answer is None:
        raise BrokenRow("has no completion, no response, and no messages that end with an answer")
    prompt = messages if prompt is None else prompt
    if not isinstance(prompt, str | list) or not prompt:
        raise BrokenRow("has no prompt")
    return prompt, answer if isinstance(answer, str) else _said(answer)


def _said(messages: Any) -> str:
    """The text of a list of one assistant's message."""
    last = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise BrokenRow("does not end with one message of the assistant")
    if not isinstance(last.get("content"), str):
        raise BrokenRow("has an answer that is no text")
    return str(last["content"])


def _refuse_surrogates(*texts: Any) -> None:
    """BrokenRow where bytes were not UTF-8, or half a character was escaped."""
    try:
        json.dumps(texts, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, ValueError):
        raise BrokenRow("has text that is not UTF-8") from None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # Also a number of too many digits.
        raise BrokenRow("is not JSON") from None


def _jsonl_rows(file: PromptFile) -> Iterator[tuple[str, Any, dict[str, NDArray[Any]]]]:
    # A byte that is not UTF-8 becomes half a character, by which its row is refused.
    with file.open_text(errors="surrogateescape") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            where = f"{file.name}, line {number}"
            if len(line) == LONGEST_LINE and not line.endswith("\n"):
                _pass_over(stream, number)
                yield where, BrokenRow(f"is longer than {LONGEST_LINE} characters"), {}
            elif line.strip():
                try:
                    yield where, _from_json(line), {}
                except BrokenRow as error:
                    yield where, error, {}


def _pass_over(stream: io.TextIOWrapper, number: int) -> None:
    """Read the rest of a line. OSError where it has no end in sight."""
    for _ in range(MOST_PARTS):
        rest = stream.readline(LONGEST_LINE)
        if not rest or rest.endswith("\n"):
            return
    raise OSError(f"line {number} has more than {MOST_PARTS * LONGEST_LINE:,} characters")


def _parquet_rows(file: PromptFile) -> Iterator[tuple[str, Any, dict[str, NDArray[Any]]]]:
    number = 0
    source = file.source
    fields = (source.prompt_field, source.messages_field, source.response_field, TOOLS)
    texts = {*TEXT_COLUMNS, *fields}
    with file.open_bytes() as stream:
        for batch in file.batches(stream, PARQUET_ROWS, {*texts, *ID_COLUMNS, *TOP_COLUMNS}):
            names = batch.schema.names
            plain = batch.select([n for n in names if n in texts]).to_pylist()
            for i in range(len(batch)):
                arrays = {n: batch[n][i] for n in names if n not in texts}
                row = without_nulls(plain[i]) if plain else {}
                yield f"{file.name}, row {number}", row, _arrays(arrays)
                number += 1


def _arrays(columns: dict[str, pa.Scalar]) -> dict[str, NDArray[Any]]:
    """Lists [T] and [T, K] of numbers as arrays; what has another shape is left out."""
    found = {}
    for name, scalar in columns.items():
        values = getattr(scalar, "values", None)
        if values is None:  # Null, or no list.
            continue
        try:
            if name in TOP_COLUMNS:
                inner = values.flatten()
                found[name] = _numbers(inner).reshape(len(values), -1)
                if (values.value_lengths().to_numpy() != found[name].shape[1]).any():
                    del found[name]
            else:
                found[name] = _numbers(values)
        except (AttributeError, TypeError, ValueError, pa.ArrowException):
            found.pop(name, None)
    return found


def _numbers(values: pa.Array) -> NDArray[Any]:
    """Numbers without nulls, as integers that fit into 32 bits or as float32."""
    if values.null_count or not (
        pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    ):
        raise ValueError(f"{values.type} with {values.null_count} nulls; expected numbers")
    kind = pa.int32() if pa.types.is_integer(values.type) else pa.float32()
    return np.asarray(values.cast(kind).to_numpy(zero_copy_only=False))
