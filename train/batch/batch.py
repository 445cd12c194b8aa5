"""From delivered Arrow rows to the padded tensors of one forward pass.

The stream hands a worker tables of rows; `row_views` sees them as numpy arrays without a copy,
`cut_micro_batches` groups them under a token budget, `collate` pads one group into a
`MicroBatch`, or packs it into one sequence. No Ray, no vLLM.

Legend: B rows, S length, P prompt tokens, T response tokens, N response tokens of a
micro-batch that have a context, K teacher ids kept for each, D the teacher's hidden size.

The shift, stated once: position j of the input predicts token j + 1. Response token t (from 0) of
a row stands at P + t, so its logits are those of position P + t - 1. The last response token
predicts nothing and is not put in. With P = 0 token 0 has no context; it bears no loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from raystill.train.batch.partition import Partition, sampled_partition, topk_partition
from raystill.train.batch.rows import Row

FILLER_ID = 0  # Stands in padding; masks come from lengths, so any id of the vocabulary would do.


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass; rows are padded on the right, or packed into one sequence.

    input_ids, position_ids int64 [B, S], packed [1, S]; attention_mask None: under causal
    attention no real token sees what stands to its right, and packed rows are told apart by their
    positions, each from 0. logit_index int64 [N] points into the flattened positions, targets
    int64 [N] are the tokens predicted there, weights float32 [N] their share in the loss.
    padded_tokens is how many positions there are, input_tokens how many of these are real. The
    teacher's word is ``partition``, or for a ``hidden`` signal teacher_hidden, bfloat16 [N, D].
    row_starts int32 [B + 1]: where each row begins among the flattened positions, and the end;
    longest: the most inputs of a row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    logit_index: Tensor
    targets: Tensor
    weights: Tensor
    partition: Partition | None
    num_rows: int
    num_tokens: int
    input_tokens: int
    padded_tokens: int
    teacher_hidden: Tensor | None = None
    row_starts: Tensor | None = None
    longest: int = 0

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same micro-batch with every tensor put through ``change``."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {n: change(value) for n, value in parts.items() if isinstance(value, Tensor)}
        if self.partition is not None:
            kept = Partition(change(self.partition.ids), change(self.partition.log_p))
            return replace(self, partition=kept, **changed)
        return replace(self, **changed)


def cut_micro_batches(
    rows: Sequence[Row], tokens_budget: int, packed: bool = False
) -> list[list[Row]]:
    """Groups rows so that each group's positions stay within the budget.

    Padded, rows of like length are together, and B * S is what counts; packed, each goes to the
    first group that has room for it (first-fit decreasing), and the sum of their lengths counts. A
    pure function of the rows, whatever order they came in: longest first, equal lengths by
    position. A row longer than the budget is alone. Rows without a loss-bearing token are left
    out.
    """
    usable = [row for row in rows if row.num_targets > 0]
    usable.sort(key=lambda row: (-row.num_inputs, row.position))
    if packed:
        return _first_fit(usable, tokens_budget)
    groups: list[list[Row]] = []
    for row in usable:
        if groups and (len(groups[-1]) + 1) * groups[-1][0].num_inputs <= tokens_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _first_fit(rows: Sequence[Row], tokens_budget: int) -> list[list[Row]]:
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        at = next((i for i, left in enumerate(room) if row.num_inputs <= left), len(groups))
        if at == len(groups):
            groups.append([])
            room.append(tokens_budget)
        groups[at].append(row)
        room[at] -= row.num_inputs
    return groups


def row_weight(row: Row, normalise: str, truncated_rows: float = 1.0) -> float:
    """Sum of the token weights of one row.

    normalise: each loss-bearing token weighs 1 (``token``), or the row does (``row``);
    truncated_rows: what a row cut off by its length is multiplied by.
    """
    weight = truncated_rows if row.finish_reason == "length" else 1.0
    return weight * (row.num_targets if normalise == "token" else row.num_targets > 0)


def loss_weight(rows: Sequence[Row], normalise: str, truncated_rows: float = 1.0) -> float:
    """Sum of all token weights of these rows: the rows' share of the step's denominator."""
    return float(sum(row_weight(row, normalise, truncated_rows) for row in rows))


def collate(
    rows: Sequence[Row],
    signal_kind: str,
    student_vocab: int,
    normalise: str = "token",
    truncated_rows: float = 1.0,
    packed: bool = False,
) -> MicroBatch:
    """Pads or packs rows (each with a loss-bearing token) into one micro-batch.

    student_vocab: how many ids are outcomes of the student (its head's rows, at most what the
    tokenizer names); teacher ids from there on count as tail, an input or target there is an
    error. normalise, truncated_rows: as in `row_weight`, of which every token has its share.
    """
    lengths = np.array([row.num_inputs for row in rows])
    longest = int(lengths.max())
    widths = lengths if packed else np.full(len(rows), longest)
    starts = np.concatenate([[0], np.cumsum(widths)])
    shape = (1 if packed else len(rows), -1)
    input_ids = np.full(starts[-1], FILLER_ID, dtype=np.int64)
    index, targets, weights = [], [], []
    for start, row in zip(starts[:-1], rows, strict=True):
        ids = np.concatenate([row.prompt_ids, row.response_ids])
        if ids.max() >= student_vocab or ids.min() < 0:
            raise ValueError(
                f"row {row.row} has token id {ids.max()} but the student's vocabulary ends at "
                f"{student_vocab}; use a student whose tokenizer has the teacher's ids"
            )
        input_ids[start : start + len(ids) - 1] = ids[:-1]
        first = len(ids) - row.num_targets
        index.append(start + np.arange(first - 1, len(ids) - 1))
        targets.append(ids[first:])
        weight = row_weight(row, normalise, truncated_rows) / row.num_targets
        weights.append(np.full(row.num_targets, weight, dtype=np.float32))
    flat_targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).reshape(shape),
        attention_mask=None,
        position_ids=torch.cat([torch.arange(int(width)) for width in widths]).reshape(shape),
        logit_index=torch.from_numpy(np.concatenate(index)),
        targets=flat_targets,
        weights=torch.from_numpy(np.concatenate(weights)),
        partition=_partition(rows, signal_kind, student_vocab, flat_targets),
        num_rows=len(rows),
        num_tokens=len(flat_targets),
        input_tokens=int(lengths.sum()),
        padded_tokens=int(starts[-1]),
        teacher_hidden=_teacher_hidden(rows) if signal_kind == "hidden" else None,
        row_starts=torch.from_numpy(starts.astype(np.int32)),
        longest=longest,
    )


def _partition(
    rows: Sequence[Row], signal_kind: str, student_vocab: int, targets: Tensor
) -> Partition | None:
    """The rows' signal as one partition of N tokens; None for ``text`` and ``hidden``."""
    if signal_kind in ("text", "hidden"):
        return None
    if signal_kind == "sampled":
        logprobs = signal_column(rows, "sampled_logprobs")
        return sampled_partition(targets, logprobs, student_vocab)
    if signal_kind == "topk":
        names = ("topk_ids", "topk_logprobs", "tail_logprob")
        ids, logprobs, tail = (signal_column(rows, name) for name in names)
        return topk_partition(ids, logprobs, tail, student_vocab)
    raise ValueError(f"signal {signal_kind!r} is unknown; expected text, sampled, topk or hidden")


def _teacher_hidden(rows: Sequence[Row]) -> Tensor:
    """bfloat16 [N, D]. Raises ValueError where a component is no number."""
    hidden = signal_column(rows, "hidden").view(torch.bfloat16)
    finite = torch.isfinite(hidden).all(dim=1)
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"the teacher's hidden state of token {token} has a component that is infinite or no "
            "number; expected finite ones; the teacher's answer is broken, ask it again"
        )
    return hidden


def signal_column(rows: Sequence[Row], name: str) -> Tensor:
    """One signal column of the loss-bearing tokens of all rows: [N], [N, K] or [N, D]."""
    parts = []
    for row in rows:
        values = getattr(row, name)
        if values is None or len(values) != len(row.response_ids):
            found = "missing" if values is None else f"{len(values)} long"
            raise ValueError(
                f"row {row.row}: {name} is {found}; expected one entry for each of its "
                f"{len(row.response_ids)} response tokens; the teacher's answer is incomplete"
            )
        parts.append(values[len(values) - row.num_targets :])
    return torch.from_numpy(np.concatenate(parts))


def dummy_micro_batch(signal_kind: str, width: int = 1) -> MicroBatch:
    """One token of weight 0: the forward and backward pass of a worker that has no rows left.

    width: D of a ``hidden`` signal; any K will do for ``topk``.
    """
    partition = hidden = None
    if signal_kind == "hidden":
        hidden = torch.zeros(1, width, dtype=torch.bfloat16)
    elif signal_kind != "text":
        # All mass in the tail: any K is valid, whatever the student's vocabulary.
        size = 1 if signal_kind == "sampled" else width
        log_p = torch.full((1, size + 1), -torch.inf)
        log_p[:, -1] = 0.0
        partition = Partition(torch.full((1, size), -1), log_p)
    zero = torch.zeros(1, dtype=torch.long)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    return MicroBatch(
        *(zero[None], None, zero[None], zero, zero, torch.zeros(1), partition, 0, 0, 0, 1, hidden),
        row_starts=starts,
        longest=1,
    )
