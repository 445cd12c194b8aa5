"""From what is stored to what is wished: a poorer signal follows exactly from a richer one.

Legend: T response tokens, K' stored ids of a token, K wished.
"""

import numpy as np
import pyarrow as pa

from raystill.datasets.schema import TOKEN_FLOATS, answer_schema, signal_fields
from raystill.datasets.signal import Signal
from raystill.serve.answers import tail_logprob


def stored_columns(wish: Signal) -> list[str]:
    """Columns of a segment that ``wish`` is made from (beside the key)."""
    names = ["response_ids", "finish_reason"]
    return names + [field.name for field in signal_fields(wish.kind, wish.width)]


def as_wished(rows: pa.Table, stored: Signal, wish: Signal, vocab_size: int) -> pa.Table:
    """Rows of a segment with ``stored`` signal as the teacher's own ``answer_schema`` of ``wish``.

    The K first of K' ids are the K the teacher would have named; the tail is worked out anew from
    their logprobs, by the same arithmetic, so the result is bit for bit what asking would give.
    """
    assert stored.serves(wish), f"{stored} is stored, {wish} wished"
    columns = {name: rows[name] for name in ("response_ids", "finish_reason")}
    columns["error"] = pa.nulls(len(rows), pa.string())
    if wish.kind != "text":
        columns["sampled_logprobs"] = rows["sampled_logprobs"]
    if wish.kind == "topk":
        ids, logprobs = rows["topk_ids"].combine_chunks(), rows["topk_logprobs"].combine_chunks()
        tail = rows["tail_logprob"]
        if stored.width != wish.width:
            ids, _ = _first(ids, stored.width, wish.width)
            logprobs, values = _first(logprobs, stored.width, wish.width)
            offsets = rows["topk_ids"].combine_chunks().offsets
            tail = pa.ListArray.from_arrays(
                _from_zero(offsets), pa.array(tail_logprob(values, vocab_size)), type=TOKEN_FLOATS
            )
        columns |= {"topk_ids": ids, "topk_logprobs": logprobs, "tail_logprob": tail}
    if wish.kind == "hidden":
        columns["hidden"] = rows["hidden"]
    schema = answer_schema(wish.kind, wish.width)
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
