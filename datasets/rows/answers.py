"""The teacher's answers as numpy arrays, as Arrow tables, and derived from richer stored ones.

Where it sits: an engine makes one ``Answer`` a row; ``answers_table`` turns a group of them into
the table that the stream carries; ``derive_answers`` makes such a table from rows of the teacher
store. Imports neither Ray nor vLLM nor torch.

Legend: T response tokens of a row, K teacher ids kept for each token, V vocabulary, D the teacher's
hidden size. Logprobs are nats of the teacher's full vocabulary, at temperature 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.datasets.rows.reasoning import REASONING_IDS
from raystill.datasets.rows.schema import (
    FATAL,
    TOKEN_FLOATS,
    TOKEN_IDS,
    answer_schema,
    signal_fields,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import Spans

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

NO_LOGPROBS = "no_logprobs"
"""Error of a stored row that was scored for ``hidden``, where ``sampled`` is wanted."""


def _no_ids() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class Answer:
    """The teacher's answer to one prompt, or the reason why there is none.

    Entry t of every array describes the distribution that ``response_ids[t]`` was drawn from.
    Arrays that the signal does not have are None.
    """

    response_ids: Int32Array = field(default_factory=_no_ids)  # [T], with its stop token
    finish_reason: str | None = None  # "stop" or "length"; None for an unusable row
    # [T]; all kinds but text. NaN where a response was scored for hidden: no logprobs are computed.
    sampled_logprobs: Float32Array | None = None
    topk_ids: Int32Array | None = None  # [T, K]; topk
    topk_logprobs: Float32Array | None = None  # [T, K], descending; topk
    tail_logprob: Float32Array | None = None  # [T], log(1 - sum top-K p); topk
    hidden: NDArray[np.uint16] | None = None  # [T, D], bfloat16 bits, after the final norm; hidden
    error: str | None = None  # why an unusable row is dropped; None for a usable one
    # Of an answer of the student's, the weights that wrote its tokens; in no table.
    spans: Spans = ()
    # Of a service's that sent reasoning apart: the ids that come before the answer's.
    reasoning_ids: Int32Array | None = None


def why_unanswerable(prompt_ids: Int32Array, max_model_len: int, vocab_size: int) -> str | None:
    """The reason why the teacher cannot answer a prompt; None if it can.

    ``empty``: the prompt has no tokens. ``too_long``: ``max_model_len`` leaves no room for one
    response token. ``invalid_ids``: an id is negative, or not below ``vocab_size``.
    """
    if len(prompt_ids) == 0:
        return "empty"
    if len(prompt_ids) >= max_model_len:
        return "too_long"
    if int(prompt_ids.min()) < 0 or int(prompt_ids.max()) >= vocab_size:
        return "invalid_ids"
    return None


def why_unscorable(
    prompt_ids: Int32Array, response_ids: Int32Array, max_model_len: int, vocab_size: int
) -> str | None:
    """The reason why the teacher cannot score a given response; None if it can.

    Prompt and response together may have ``max_model_len`` tokens: the engine reads all but the
    last response token, and needs room for one token that it generates. The reasons are those of
    ``why_unanswerable``.
    """
    if len(response_ids) == 0:
        return "empty"
    reason = why_unanswerable(prompt_ids, max_model_len, vocab_size)
    if reason is not None:
        return reason
    if len(prompt_ids) + len(response_ids) > max_model_len:
        return "too_long"
    return why_unanswerable(response_ids, max_model_len + 1, vocab_size)


def tail_logprob(
    topk_logprobs: Float32Array, vocab_size: int, most: NDArray[np.float64] | None = None
) -> Float32Array:
    """Log of the probability outside the K best ids: log(1 - sum_i p_i), [T, K] -> [T] float32.

    The mass is computed in float64 as ``-expm1(log p_1) - sum_{i>1} p_i``: where p_1 is nearly 1,
    ``log p_1`` still has the digits that ``1 - p_1`` has lost. The result is at most
    log((V - K) p_K), since none of the V - K other ids is more probable than the K-th; or at most
    ``most`` [T], where the K are not the best ones. It is -inf where K = V, and where rounding
    leaves no mass.

    Raises:
        ValueError: K is more than V.
    """
    num_tokens, top_k = topk_logprobs.shape
    if top_k > vocab_size:
        raise ValueError(
            f"K ({top_k}) is more than the vocabulary ({vocab_size}); "
            f"set signal.top_k to {vocab_size} or less"
        )
    if num_tokens == 0 or top_k == vocab_size:
        return np.full(num_tokens, -np.inf, np.float32)
    logprobs = np.minimum(topk_logprobs.astype(np.float64), 0.0)
    mass_left = -np.expm1(logprobs[:, 0]) - np.exp(logprobs[:, 1:]).sum(axis=1)
    bound = np.log(vocab_size - top_k) + logprobs[:, -1] if most is None else most
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(mass_left, 0.0))
    return np.minimum(tail, bound).astype(np.float32)


def answers_table(answers: Sequence[Answer], signal: Signal) -> pa.Table:
    """An ``answer_schema`` table with one row an answer, in order; unusable rows have empty lists.

    Where a service sent reasoning apart it has the column `REASONING_IDS` too. It is built from
    flat arrays: the number of Python objects grows with rows, not with tokens.

    Raises:
        ValueError: an array of a usable answer is missing, or has an unexpected shape.
    """
    lengths = [0 if a.error is not None else len(a.response_ids) for a in answers]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    usable = [a for a in answers if a.error is None]
    columns = {
        "finish_reason": pa.array([a.finish_reason for a in answers], pa.string()),
        "error": pa.array([a.error for a in answers], pa.string()),
    }
    schema = answer_schema(signal)
    for column in schema:
        if column.name not in columns:
            values = _flat_values(usable, column, signal.width)
            columns[column.name] = pa.ListArray.from_arrays(offsets, values, type=column.type)
    table = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
    if all(answer.reasoning_ids is None for answer in usable):
        return table
    before = [None if answer.error else answer.reasoning_ids for answer in answers]
    return table.append_column(REASONING_IDS, pa.array(before, TOKEN_IDS))


def _flat_values(answers: Sequence[Answer], column: pa.Field, width: int) -> pa.Array:
    """A list column's values, one answer after another: a number, K numbers or a state a token."""
    inner = column.type.value_type
    shape = (width,) if pa.types.is_nested(inner) or pa.types.is_fixed_size_binary(inner) else ()
    parts = []
    for answer in answers:
        values, expected = getattr(answer, column.name), (len(answer.response_ids), *shape)
        if values is None or values.shape != expected:
            actual = "nothing" if values is None else f"shape {values.shape}"
            raise ValueError(f"{column.name} of an answer has {actual}, expected shape {expected}")
        parts.append(values.reshape(-1))
    flat = np.concatenate(parts) if parts else np.empty(0)
    if pa.types.is_fixed_size_binary(inner):
        states = np.ascontiguousarray(flat, "<u2")
        return pa.Array.from_buffers(inner, len(states) // width, [None, pa.py_buffer(states)])
    if pa.types.is_fixed_size_list(inner):
        numbers = pa.array(flat, inner.value_type)
        return pa.FixedSizeListArray.from_arrays(numbers, type=inner)
    return pa.array(flat, inner)


class Parts:
    """Answers of some rows of a group, until all are there."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._tables: list[pa.Table] = []

    def add(self, places: NDArray[np.int64], answers: pa.Table) -> None:
        """Take the answers of the rows at these places."""
        if len(places):
            self._places.append(places)
            self._tables.append(answers)

    @property
    def places(self) -> NDArray[np.int64]:
        """Where there are answers, in the order in which they came."""
        return np.concatenate([np.empty(0, np.int64), *self._places])

    @property
    def told_by_engine(self) -> dict[bytes, bytes] | None:
        """What an engine told of itself; None where none has answered."""
        return next((t.schema.metadata for t in self._tables if t.schema.metadata), None)

    def joined(self) -> pa.Table:
        """All answers, in the order of the rows; with what an engine told of itself."""
        tables = [t.replace_schema_metadata(self.told_by_engine) for t in self._tables]
        whole = pa.concat_tables(tables, promote_options="default")  # Some have reasoning.
        return whole.take(pa.array(np.argsort(self.places))).combine_chunks()


def unusable_answers(rows: int, reason: str, signal: Signal) -> pa.Table:
    """``rows`` answers (answer_schema) that are not there, for one reason."""
    schema = answer_schema(signal)
    given = {"finish_reason": None, "error": reason}
    return pa.table({n: [given.get(n, [])] * rows for n in schema.names}, schema=schema)


def require_none_fatal(answers: pa.Table) -> None:
    """RunError where a row's error is to end the run; its group is stored by then."""
    for error in answers["error"].drop_null().to_pylist():
        if error.startswith(FATAL):
            raise RunError(error.removeprefix(FATAL))


def with_foreign_ids(ids: pa.Array, num_ids: int) -> NDArray[np.bool_]:
    """Which rows of ``ids`` (lists of int32) hold an id that is not below ``num_ids``, bool [N]."""
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    outside = ids.flatten().to_numpy() >= num_ids
    found = np.zeros(len(ids), bool)
    found[pc.list_parent_indices(ids).to_numpy()[outside]] = True
    return found


def stored_columns(wanted: Signal) -> list[str]:
    """Columns of a stored segment that ``derive_answers`` needs for the ``wanted`` signal."""
    names = ["response_ids", "finish_reason"]
    return names + [field.name for field in signal_fields(wanted)]


def derive_answers(rows: pa.Table, stored: Signal, wanted: Signal, vocab_size: int) -> pa.Table:
    """Stored ``rows`` as ``answer_schema`` of the ``wanted`` signal, which ``stored`` must serve.

    rows: ``stored_columns(wanted)`` of a segment. The result equals bit for bit what the teacher
    would have returned if asked for ``wanted``: its K best ids are the first K of the stored ones,
    and the tail is computed from their logprobs by the same function as in the engine.

    A row whose logprobs are wanted but were not computed (see ``Answer.sampled_logprobs``) has the
    error NO_LOGPROBS. It is therefore dropped and counted, and never trained on.
    """
    assert stored.serves(wanted), f"{stored} is stored, {wanted} wanted"
    columns = {name: rows[name] for name in ("response_ids", "finish_reason")}
    columns["error"] = pa.nulls(len(rows), pa.string())
    if wanted.kind != "text":
        columns["sampled_logprobs"] = rows["sampled_logprobs"]
    if wanted.kind == "sampled":  # The other kinds have a loss without them.
        columns["error"] = _why_no_logprobs(rows["sampled_logprobs"].combine_chunks())
    if wanted.kind == "topk":
        ids, logprobs = rows["topk_ids"].combine_chunks(), rows["topk_logprobs"].combine_chunks()
        tail = rows["tail_logprob"]
        if stored.width != wanted.width:
            offsets = _offsets_from_zero(ids.offsets)
            ids, _ = _first_of_each_token(ids, stored.width, wanted.width)
            logprobs, values = _first_of_each_token(logprobs, stored.width, wanted.width)
            tails = _wider_tail(values, rows["tail_logprob"], vocab_size)
            tail = pa.ListArray.from_arrays(offsets, pa.array(tails), type=TOKEN_FLOATS)
        columns |= {"topk_ids": ids, "topk_logprobs": logprobs, "tail_logprob": tail}
    if wanted.kind == "hidden":
        columns["hidden"] = rows["hidden"]
    schema = answer_schema(wanted)
    return pa.table([columns[name] for name in schema.names], schema=schema)


TAIL_ROUNDING_NATS = 1e-3


def _wider_tail(logprobs: Float32Array, stored: pa.ChunkedArray, vocab_size: int) -> Float32Array:
    """Log of the probability outside the first K of more ids: logprobs [T, K], stored [T] lists.

    A tail that is less than the stored one, of fewer tokens, was bounded by the K-th id. That is
    wrong where the ids are not the teacher's best, as of a service that names tokens in words.
    """
    tail = tail_logprob(logprobs, vocab_size)
    before = stored.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    wrong = before > tail + TAIL_ROUNDING_NATS
    if wrong.any():
        all_of_it = np.zeros(int(wrong.sum()))
        tail[wrong] = tail_logprob(logprobs[wrong], vocab_size, all_of_it)
    return tail


def _has_any(
    lists: pa.ListArray, test: Callable[[np.ndarray], NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Whether a row has a value that passes a test. lists: [T] numbers for each row."""
    passed = test(lists.flatten().to_numpy(zero_copy_only=False))
    before = np.concatenate([[0], np.cumsum(passed)])  # Number of passing ones before each token.
    return np.diff(before[_offsets_from_zero(lists.offsets).to_numpy()]) > 0


def _why_no_logprobs(logprobs: pa.ListArray) -> pa.Array:
    """NO_LOGPROBS for each row of logprobs [T] that has a NaN; null for the others."""
    unknown = _has_any(logprobs, np.isnan)
    return pa.array([NO_LOGPROBS if row else None for row in unknown], pa.string())


def _first_of_each_token(
    lists: pa.ListArray, stored: int, wanted: int
) -> tuple[pa.ListArray, np.ndarray]:
    """The first ``wanted`` of each token's ``stored`` values: as lists [T][K], and [sum T, K]."""
    per_token = lists.flatten()
    values = per_token.flatten().to_numpy(zero_copy_only=False).reshape(-1, stored)
    values = np.ascontiguousarray(values[:, :wanted])
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), wanted)
    return pa.ListArray.from_arrays(_offsets_from_zero(lists.offsets), inner), values


def _offsets_from_zero(offsets: pa.Array) -> pa.Array:
    """List offsets for values that start at 0; those of a sliced array start later."""
    values = offsets.to_numpy()
    return pa.array(values - values[0], pa.int32())
