"""Teacher answers as numpy arrays, the tail they leave out, and their Arrow table.

Where it sits: an engine makes one ``Answer`` a row from what it decoded; ``answers_table`` turns a
group of them into the table the stream carries. Imports neither Ray nor vLLM nor torch.

Legend: T response tokens of a row, K teacher ids kept for each token, V vocabulary.
Logprobs are nats of the teacher's raw (untempered) full vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.schema import answer_schema

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
    sampled_logprobs: Float32Array | None = None  # [T]; sampled and topk
    topk_ids: Int32Array | None = None  # [T, K]; topk
    topk_logprobs: Float32Array | None = None  # [T, K], descending; topk
    tail_logprob: Float32Array | None = None  # [T], log(1 - sum top-K p); topk
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


def answers_table(answers: Sequence[Answer], kind: str, top_k: int) -> pa.Table:
    """One row an answer, in order, as ``answer_schema``; unusable rows hold empty lists.

    Built from flat arrays: the number of Python objects goes with rows, not with tokens.

    Raises:
        ValueError: a usable answer lacks a signal of this kind, or one of another length.
    """
    lengths = [0 if a.error is not None else len(a.response_ids) for a in answers]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    usable = [a for a in answers if a.error is None]

    def lists(name: str, dtype: type, width: int | None = None) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, _flat_values(usable, name, dtype, width))

    columns = [
        lists("response_ids", np.int32),
        pa.array([a.finish_reason for a in answers], pa.string()),
        pa.array([a.error for a in answers], pa.string()),
    ]
    if kind != "text":
        columns.append(lists("sampled_logprobs", np.float32))
    if kind == "topk":
        columns.append(lists("topk_ids", np.int32, top_k))
        columns.append(lists("topk_logprobs", np.float32, top_k))
        columns.append(lists("tail_logprob", np.float32))
    schema = answer_schema(kind, top_k)
    arrays = [c.cast(f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _flat_values(answers: Sequence[Answer], name: str, dtype: type, width: int | None) -> pa.Array:
    """One field of all answers end to end; lists of ``width`` where it is given."""
    parts = []
    for answer in answers:
        values = getattr(answer, name)
        expected = (
            (len(answer.response_ids),)
            if width is None
            else (
                len(answer.response_ids),
                width,
            )
        )
        if values is None or values.shape != expected:
            found = "nothing" if values is None else f"shape {values.shape}"
            raise ValueError(f"{name} of an answer has {found}, expected shape {expected}")
        parts.append(values.reshape(-1))
    flat = pa.array(np.concatenate(parts).astype(dtype, copy=False) if parts else [], _arrow(dtype))
    return flat if width is None else pa.FixedSizeListArray.from_arrays(flat, width)


def _arrow(dtype: type) -> pa.DataType:
    return pa.int32() if dtype is np.int32 else pa.float32()
