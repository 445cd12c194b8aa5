"""A teacher's reasoning in its answers: where it ends, and how it comes before an answer.

Models reason between two markers, ``<think>`` and ``</think>`` mostly, before they answer. Some
services send the reasoning apart from the answer. It is then stored under a key of its own, which
covers the answer that it led to: so each row of the store is what it always was.

Imports neither Ray nor torch. Legend: P prompt tokens, T response tokens.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.rows.schema import KEY_BYTES

REASONING_IDS = "reasoning_ids"
"""Column of a teacher's table of answers, where it sent reasoning apart: ids that come before those
of the answer, markers included; null or empty where there is none."""
NO_ANSWER = "no_answer"
"""Error of a row in which the teacher reasons and never answers."""
UNCLEAR = "unclear_reasoning"
"""Error of a row with a token that is part of the reasoning's end and of the answer."""
TAIL_IDS = 16
"""Of a prompt, in which its template may have begun the reasoning."""

PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
)
"""Markers of the model families that reason; the first is that of most."""
CHANNELS = "<|channel|>"
"""In templates whose reasoning is a message of its own and has no markers (gpt-oss)."""


@dataclass(frozen=True)
class Markers:
    """What a model writes before and after its reasoning; ids: where each is one added token."""

    start: str
    end: str
    ids: tuple[int, int] | None = None


def markers_of(added: Mapping[str, int], template: str | None) -> Markers | None:
    """The markers of a tokenizer with these added tokens, or of its chat template; None: neither
    has any.
    """
    for start, end in PAIRS:
        if start in added and end in added:
            return Markers(start, end, (added[start], added[end]))
    for start, end in PAIRS:
        if end in (template or ""):
            return Markers(start, end)
    return None


def ids_before(
    reasoning: str,
    prompt: str,
    markers: Markers,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    apart: bool = True,
) -> list[int] | None:
    """Ids of reasoning as it stands before an answer; None where it cannot stand there exactly.

    prompt: the end of the prompt's text: its template may have begun the reasoning, or ended it.
    encode: with which markers in a text are text. apart: with the empty line before the answer,
    which some services leave to it. The lines are those of the known templates.
    """
    ending = prompt.rstrip()
    if ending.endswith(markers.end):
        return None
    before = "\n"
    begun = ending.endswith(markers.start)
    if begun and prompt != ending:  # With the line's end.
        before = ""
    inner, after = before + reasoning.strip("\n") + "\n", "\n\n" * apart
    text = ("" if begun else markers.start) + inner + markers.end + after
    if markers.ids is None:
        if markers.start in reasoning or markers.end in reasoning:
            return None
        ids = encode(text)
    else:
        start, end = markers.ids
        ids = [*([] if begun else [start]), *encode(inner), end, *(encode(after) if after else [])]
    return ids if decode(ids) == text else None


def reasoning_keys(keys: pa.Array, response_ids: pa.Array) -> pa.Array:
    """Where the reasoning of each answer is stored: by its key, and the answer that it led to."""
    found = []
    for key, ids in zip(keys.to_pylist(), response_ids, strict=True):
        said = np.ascontiguousarray(ids.values.to_numpy(zero_copy_only=False), "<i4")
        named = blake2b(b"reasoning\0" + key + said.tobytes(), digest_size=KEY_BYTES)
        found.append(named.digest())
    return pa.array(found, pa.binary(KEY_BYTES))


def reasoning_rows(segment: pa.Table, answers: pa.Table) -> pa.Table | None:
    """Rows of a ``text`` segment with what was sent apart from answers; None where nothing was.

    segment: ``key``, ``prompt_ids`` and ``response_ids`` of the same answers [n]. One that nothing
    was sent for has an empty row: so the segment's name follows from the answers.
    """
    if REASONING_IDS not in answers.column_names:
        return None
    before = answers[REASONING_IDS].combine_chunks()
    if before.null_count == len(before):
        return None
    lengths = before.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    keys = reasoning_keys(*(segment[n].combine_chunks() for n in ("key", "response_ids")))
    rows = {
        "key": keys,
        "prompt_ids": segment["prompt_ids"],
        "response_ids": pa.ListArray.from_arrays(offsets, before.flatten()),
        "finish_reason": pa.array(["stop"] * len(keys), pa.string()),
    }
    return pa.table(rows)


class Cutter:
    """Finds where an answer begins after its reasoning.

    bytes_of: what each id stands for. control: ids that are no part of a text.
    """

    def __init__(
        self, bytes_of: Mapping[int, bytes], markers: Markers, control: Collection[int]
    ) -> None:
        self._bytes_of = bytes_of
        self._start, self._end = markers.start.encode(), markers.end.encode()
        self._control = frozenset(control)
        # A template of the service's own may have begun it: then the end stands on its own line.
        self._alone = re.compile(rb"(?:^|\n)[ \t]*" + re.escape(self._end))

    def first(self, prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32]) -> int | str:
        """Number of ids [T] that are reasoning; else why the row cannot be used.

        The ids are looked at by their bytes, so that a marker may be several tokens.
        """
        parts = [self._bytes_of.get(index, b"") for index in response_ids.tolist()]
        text = b"".join(parts)
        end = self._end_in(text, prompt_ids)
        if end == 0:
            return 0
        if end < 0:
            return NO_ANSWER
        while text[end : end + 1].isspace():
            end += 1
        places = np.cumsum([len(part) for part in parts])
        first = int(np.searchsorted(places, end, side="right"))
        if self._control.issuperset(response_ids[first:].tolist()):
            return NO_ANSWER
        after = int(places[first - 1])
        return first if text[:after].rstrip().endswith(self._end) else UNCLEAR

    def _end_in(self, text: bytes, prompt_ids: NDArray[np.int32]) -> int:
        """Byte after the reasoning; 0: there is none, -1: it does not end."""
        end = text.find(self._end)
        if not text.lstrip().startswith(self._start) and not self._is_begun(prompt_ids):
            alone = self._alone.search(text)
            if (
                alone is None
                or self._start in text[: alone.end()]
                or alone.end() > end + len(self._end)
            ):
                return 0
        return -1 if end < 0 else end + len(self._end)

    def _is_begun(self, prompt_ids: NDArray[np.int32]) -> bool:
        tail = prompt_ids[-TAIL_IDS:].tolist()
        text = b"".join(self._bytes_of.get(index, b"") for index in tail)
        return text.rstrip().endswith(self._start)


def without_reasoning(
    answers: pa.Table, prompt_ids: pa.Array, cutter: Cutter, among: NDArray[np.bool_]
) -> pa.Table:
    """The answers [n] without their reasoning: each id goes with its rows of the signal.

    answers: ``answer_schema``. among [n]: those to look at.
    """
    ids = answers["response_ids"].combine_chunks()
    usable = pc.is_null(answers["error"]).to_numpy(zero_copy_only=False) & among
    starts, errors = np.zeros(len(answers), np.int64), answers["error"].to_pylist()
    for row in np.flatnonzero(usable).tolist():
        response = ids[row].values.to_numpy(zero_copy_only=False)
        first = cutter.first(prompt_ids[row].values.to_numpy(zero_copy_only=False), response)
        if isinstance(first, str):
            starts[row], errors[row] = len(response), first
        else:
            starts[row] = first
    if not starts.any():
        return answers
    gone = np.array([error is not None for error in errors])
    columns: dict[str, Any] = {"error": pa.array(errors, pa.string())}
    for name in answers.column_names:
        column = answers[name].combine_chunks()
        if pa.types.is_list(column.type):
            columns[name] = _from(column, starts)
        elif name == "finish_reason":
            columns[name] = pc.if_else(pa.array(gone), pa.scalar(None, pa.string()), column)
    return pa.table([columns[n] for n in answers.column_names], schema=answers.schema)


def _from(lists: pa.ListArray, starts: NDArray[np.int64]) -> pa.ListArray:
    """Each list from one of its places on; those of length 0 stay so."""
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    kept = np.maximum(lengths - starts, 0)
    ends = np.cumsum(lengths)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    taken = np.arange(offsets[-1]) + np.repeat(ends - kept - offsets[:-1], kept)
    values = lists.flatten().take(pa.array(taken, pa.int64()))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=lists.type)


def with_reasoning(
    answers: pa.Table, before: Sequence[NDArray[np.int32] | None], most: int
) -> pa.Table:
    """The answers [n] of signal ``text``, each after the ids of its reasoning, in ``most`` tokens.

    One that is cut there has no end.
    """
    ids, ends = answers["response_ids"].combine_chunks(), answers["finish_reason"].to_pylist()
    joined: list[NDArray[np.int32]] = []
    for row, first in enumerate(before):
        response = ids[row].values.to_numpy(zero_copy_only=False)
        if first is None or not len(first) or not len(response):
            joined.append(response)
            continue
        whole = np.concatenate([first, response])
        ends[row] = "length" if len(whole) > most else ends[row]
        joined.append(whole[:most])
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in joined])]).astype(np.int32)
    values = pa.array(np.concatenate([*joined, np.empty(0, np.int32)]), pa.int32())
    columns = {
        "response_ids": pa.ListArray.from_arrays(pa.array(offsets), values),
        "finish_reason": pa.array(ends, pa.string()),
    }
    for name, column in columns.items():
        place = answers.schema.get_field_index(name)
        answers = answers.set_column(place, answers.schema.field(place), column)
    return answers
