"""Teacher answers as numpy arrays, the tail they leave out, and their Arrow table.

Where it sits: an engine makes one ``Answer`` a row from what it decoded; ``answers_table`` turns a
group of them into the table the stream carries. Imports neither Ray nor vLLM nor torch.

Legend: T response tokens of a row, K teacher ids kept for each token, V vocabulary, D hidden size;
the width of a signal is K for ``topk``, D for ``hidden``.
Logprobs are nats of the teacher's raw (untempered) full vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.rows.schema import TOKEN_FLOATS, answer_schema, signal_fields
from raystill.datasets.rows.signal import Signal

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


def _no_ids() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class Answer:
    """What the teacher said to one prompt, or why it said nothing.

    Row t of every signal is the distribution that ``response_ids[t]`` was drawn from.
    """

    response_ids: Int32Array = field(default_factory=_no_ids)  # [T], its stop token included
    finish_reason: str | None = None  # "stop" or "length"; None for an unusable row
    sampled_logprobs: Float32Array | None = None  # [T]; all but text (NaN: scored for hidden)
    topk_ids: Int32Array | None = None  # [T, K]; topk
    topk_logprobs: Float32Array | None = None  # [T, K], descending; topk
    tail_logprob: Float32Array | None = None  # [T], log(1 - sum top-K p); topk
    hidden: NDArray[np.uint16] | None = None  # [T, D] bfloat16 bits, after the final norm; hidden
    error: str | None = None  # the reason an unusable row is dropped for


def refusal(prompt_ids: Int32Array, max_model_len: int, vocab_size: int) -> str | None:
    """The reason a prompt cannot be answered, or None.

    ``empty``: nothing to condition on. ``too_long``: no place for even one response token within
    ``max_model_len``. ``invalid_ids``: ids the teacher has no embedding for.
    """
    if len(prompt_ids) == 0:
        return "empty"
    if len(prompt_ids) >= max_model_len:
        return "too_long"
    if int(prompt_ids.min()) < 0 or int(prompt_ids.max()) >= vocab_size:
        return "invalid_ids"
    return None


def score_refusal(
    prompt_ids: Int32Array, response_ids: Int32Array, max_model_len: int, vocab_size: int
) -> str | None:
    """The reason a given response cannot be scored, or None; ``refusal``'s words.

    The last response token is not put in, but the engine wants room for one token more than it is
    given: P + T may be ``max_model_len``.
    """
    if len(response_ids) == 0:
        return "empty"
    reason = refusal(prompt_ids, max_model_len, vocab_size)
    if reason is not None:
        return reason
    if len(prompt_ids) + len(response_ids) > max_model_len:
        return "too_long"
    return refusal(response_ids, max_model_len + 1, vocab_size)


def tail_logprob(topk_logprobs: Float32Array, vocab_size: int) -> Float32Array:
    """log of the mass outside the K best ids: log(1 - sum_i p_i), [T, K] -> [T] float32 nats.

    Worked out in float64 as ``-expm1(log p_1) - sum_{i>1} p_i``: where the best id holds nearly
    all mass its logprob still has digits that 1 - p_1 has lost. Each of the V - K other ids has
    at most p_K, so the tail is at most log((V - K) p_K). Where K = V, or rounding left nothing,
    it is -inf.

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
    bound = np.log(vocab_size - top_k) + logprobs[:, -1]
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(mass_left, 0.0))
    return np.minimum(tail, bound).astype(np.float32)


def answers_table(answers: Sequence[Answer], signal: Signal) -> pa.Table:
    """One row an answer, in order, as ``answer_schema``; unusable rows hold empty lists.

    Built from flat arrays: the number of Python objects goes with rows, not with tokens.

    Raises:
        ValueError: a usable answer lacks a signal of this kind, or one of another length.
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
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _flat_values(answers: Sequence[Answer], column: pa.Field, width: int) -> pa.Array:
    """One list column's values of all answers end to end: a token's number, K numbers or state."""
    inner = column.type.value_type
    shape = (width,) if pa.types.is_nested(inner) or pa.types.is_fixed_size_binary(inner) else ()
    parts = []
    for answer in answers:
        values, expected = getattr(answer, column.name), (len(answer.response_ids), *shape)
        if values is None or values.shape != expected:
            found = "nothing" if values is None else f"shape {values.shape}"
            raise ValueError(f"{column.name} of an answer has {found}, expected shape {expected}")
        parts.append(values.reshape(-1))
    flat = np.concatenate(parts) if parts else np.empty(0)
    if pa.types.is_fixed_size_binary(inner):
        states = np.ascontiguousarray(flat, "<u2")
        return pa.Array.from_buffers(inner, len(states) // width, [None, pa.py_buffer(states)])
    if pa.types.is_fixed_size_list(inner):
        numbers = pa.array(flat, inner.value_type)
        return pa.FixedSizeListArray.from_arrays(numbers, type=inner)
    return pa.array(flat, inner)


def stored_columns(wanted: Signal) -> list[str]:
    """Columns of a segment that ``wish`` is made from (beside the key)."""
    names = ["response_ids", "finish_reason"]
    return names + [field.name for field in signal_fields(wanted)]


def derive_answers(rows: pa.Table, stored: Signal, wanted: Signal, vocab_size: int) -> pa.Table:
    """Rows of a segment with ``stored`` signal as the teacher's own ``answer_schema`` of ``wish``.

    The K first of K' ids are the K the teacher would have named; the tail is worked out anew from
    their logprobs, by the same arithmetic, so the result is bit for bit what asking would give.
    """
    assert stored.serves(wanted), f"{stored} is stored, {wanted} wanted"
    columns = {name: rows[name] for name in ("response_ids", "finish_reason")}
    columns["error"] = pa.nulls(len(rows), pa.string())
    if wanted.kind != "text":
        columns["sampled_logprobs"] = rows["sampled_logprobs"]
    if wanted.kind == "topk":
        ids, logprobs = rows["topk_ids"].combine_chunks(), rows["topk_logprobs"].combine_chunks()
        tail = rows["tail_logprob"]
        if stored.width != wanted.width:
            ids, _ = _first(ids, stored.width, wanted.width)
            logprobs, values = _first(logprobs, stored.width, wanted.width)
            offsets = rows["topk_ids"].combine_chunks().offsets
            tail = pa.ListArray.from_arrays(
                _from_zero(offsets), pa.array(tail_logprob(values, vocab_size)), type=TOKEN_FLOATS
            )
        columns |= {"topk_ids": ids, "topk_logprobs": logprobs, "tail_logprob": tail}
    if wanted.kind == "hidden":
        columns["hidden"] = rows["hidden"]
    schema = answer_schema(wanted)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _first(lists: pa.ListArray, stored: int, wished: int) -> tuple[pa.ListArray, np.ndarray]:
    """The first ``wished`` of every token's ``stored`` values: as lists, and as one [sum T, K]."""
    flat = lists.flatten()  # One entry a token.
    values = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, stored)
    values = np.ascontiguousarray(values[:, :wished])
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), wished)
    return pa.ListArray.from_arrays(_from_zero(lists.offsets), inner), values


def _from_zero(offsets: pa.Array) -> pa.Array:
    values = offsets.to_numpy()
    return pa.array(values - values[0], pa.int32())
