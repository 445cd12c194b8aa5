"""What is kept of each response token, and which signal another follows from.

Imports neither Ray nor torch.

Legend: K teacher ids kept for each token, D the teacher's hidden size.

From what is stored to what is wished: a poorer signal follows exactly from a richer one.

Legend: T response tokens, K' stored ids of a token, K wished.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raystill.config.stream import SignalConfig
from raystill.datasets.rows.answers import tail_logprob
from raystill.datasets.rows.schema import TOKEN_FLOATS, answer_schema, signal_fields

KINDS = ("text", "sampled", "topk", "hidden")
WIDE = ("topk", "hidden")
HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Signal:
    """``kind``, and its ``width``: K of ``topk``, D of ``hidden``, 0 of ``text`` and ``sampled``.

    What serves what is a partial order: everything serves ``text``; all but ``text`` serve
    ``sampled``; ``topk`` serves fewer ids; ``hidden`` serves itself. It does not serve ``topk``:
    logprobs worked out from rounded states are not those the teacher would have named.
    """

    kind: str
    width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"signal kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        width = int(self.width) if self.kind in WIDE else 0
        if width < 1 and self.kind in WIDE:
            raise ValueError(f"the width of a {self.kind} signal is {width}; expected 1 or more")
        object.__setattr__(self, "width", width)

    @property
    def richness(self) -> tuple[int, int]:
        """A total order that holds the partial one: what serves another is as rich, or richer."""
        return KINDS.index(self.kind), self.width

    def serves(self, wanted: "Signal") -> bool:
        """Whether ``wish`` follows from this signal without asking the teacher."""
        if wanted.kind in ("text", "sampled"):
            return self.richness >= wanted.richness
        narrower = (
            self.width == wanted.width if wanted.kind == "hidden" else self.width >= wanted.width
        )
        return self.kind == wanted.kind and narrower

    def __str__(self) -> str:
        return f"{self.kind} {self.width}" if self.kind in WIDE else self.kind


def signal_of(signal: SignalConfig, teacher_config: Mapping[str, Any]) -> Signal:
    """The signal a run file asks for; D is what the teacher's ``config.json`` says it is.

    Raises ValueError where the kind is ``hidden`` and the configuration names no hidden size.
    """
    if signal.kind == "topk":
        return Signal("topk", signal.top_k)
    if signal.kind == "hidden":
        return Signal("hidden", hidden_size(teacher_config))
    return Signal(signal.kind)


def hidden_size(teacher_config: Mapping[str, Any]) -> int:
    """D of a model's configuration; of its language part where it has several."""
    told = {**teacher_config, **(teacher_config.get("text_config") or {})}
    for name in HIDDEN_SIZES:
        if told.get(name):
            return int(told[name])
    raise ValueError(
        "signal.kind is 'hidden', but the teacher's config.json names no "
        f"{', '.join(HIDDEN_SIZES)}; set signal.kind: topk"
    )


def stored_columns(wanted: Signal) -> list[str]:
    """Columns of a segment that ``wish`` is made from (beside the key)."""
    names = ["response_ids", "finish_reason"]
    return names + [field.name for field in signal_fields(wanted.kind, wanted.width)]


def as_wished(rows: pa.Table, stored: Signal, wanted: Signal, vocab_size: int) -> pa.Table:
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
    schema = answer_schema(wanted.kind, wanted.width)
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
