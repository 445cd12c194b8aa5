"""Arrow types of prompts, answers and streamed rows: the one place that names their columns.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token, D the teacher's
hidden size. The width of a signal is K (``topk``), D (``hidden``) or 0.

A group's answers: from the store what it has, from the teacher the rest, which is then stored.

The promise: no published answer is ever asked for again. So an answer is published before it is
passed on, and before anything is asked the name that its segment would get is looked for, since an
earlier try of this very group may have published it. An answer that is stored with a poorer signal
than is wished is *scored*: the teacher reads it and says the signal of just these tokens. So is a
response that came with its prompt.

Blocking work runs in threads; one object serves many groups at a time.
"""

import pyarrow as pa

from raystill.datasets.rows.signal import Signal

SCHEMA_VERSION = 1
KEY_BYTES = 16

TOKEN_IDS = pa.list_(pa.int32())
TOKEN_FLOATS = pa.list_(pa.float32())

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("response_ids", TOKEN_IDS),
    ]
)
"""``response_ids`` is null unless the prompt came with a response, which the teacher scores."""


def signal_fields(signal: Signal) -> list[pa.Field]:
    """Columns that a signal adds to an answer; each list has T entries a row.

    ``sampled_logprobs``: nats, raw full vocabulary. ``topk_ids``/``topk_logprobs``: [T][K], nats
    of the full vocabulary, never renormalised, descending. ``tail_logprob``: log(1 - sum top-K p).
    ``hidden``: [T] of 2 D bytes, the bfloat16 bits (little endian) of the state after the final
    norm, at the position the response token was drawn from. A number a component would have Parquet
    write a level for each.
    """
    if signal.kind == "text":
        return []
    fields = [pa.field("sampled_logprobs", TOKEN_FLOATS)]
    if signal.kind == "topk":
        fields += [
            pa.field("topk_ids", pa.list_(pa.list_(pa.int32(), signal.width))),
            pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32(), signal.width))),
            pa.field("tail_logprob", TOKEN_FLOATS),
        ]
    if signal.kind == "hidden":
        fields.append(pa.field("hidden", pa.list_(pa.binary(2 * signal.width))))
    return fields


def answer_schema(signal: Signal) -> pa.Schema:
    """What ``sample`` and ``score`` return, one row a prompt, in the order asked.

    ``error`` is null for a usable row, else the reason it is dropped for (the lists are empty).
    ``response_ids`` ends with the stop token that ended it; a row cut by ``length`` has none.
    """
    return pa.schema(
        [
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            pa.field("error", pa.string()),
            *signal_fields(signal),
        ]
    )


def row_schema(signal: Signal) -> pa.Schema:
    """What the stream delivers to a worker: plan columns, the prompt, the answer."""
    return pa.schema(
        [
            pa.field("row", pa.int64()),
            pa.field("position", pa.int64()),
            pa.field("epoch", pa.int32()),
            pa.field("source", pa.string()),
            pa.field("prompt_ids", TOKEN_IDS),
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            *signal_fields(signal),
        ]
    )


ENGINE = b"raystill.engine"
"""Metadata of the teacher's answers: JSON with engine, version, dtype, vocab_size."""
