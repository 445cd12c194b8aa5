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

from raystill.datasets.rows.schema import answer_schema

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


def answers_table(answers: Sequence[Answer], kind: str, width: int) -> pa.Table:
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
    schema = answer_schema(kind, width)
    for column in schema:
        if column.name not in columns:
            values = _flat_values(usable, column, width)
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
