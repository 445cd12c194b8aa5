"""Rows as the tensors of one forward pass.

`cut_micro_batches` groups the rows of a step under a token budget. `collate` makes one
`MicroBatch` of a group: rows padded to one length, or packed one behind the other into a single
sequence. `step.micro_batches` calls both for training, `evaluation` for measuring.

Legend: B rows, S length of a sequence, P prompt tokens and T response tokens of a row, N response
tokens of a micro-batch that have a loss, K teacher ids kept for each of them, D the teacher's
hidden size.

The shift, stated once: position j of the input predicts token j + 1. Response token t (from 0) of
a row is at place P + t, so its logits are those of position P + t - 1. The last response token
predicts nothing, so it is not part of the input. Where P = 0, token 0 has nothing before it and
therefore no loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from raystill.train.batch.beginnings import places_of
from raystill.train.batch.partition import NO_ID, Partition, sampled_partition, topk_partition
from raystill.train.batch.rows import Row

FILLER_ID = 0
"""Token id of padded positions. Any id would do: lengths say what is padding, not this id, so a
stop token that is also the tokenizer's padding token keeps its loss."""


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass: rows padded on the right, or packed into one sequence.

    Attributes:
        input_ids: int64 [B, S], packed [1, S].
        attention_mask: None: attention is causal and padding is on the right, so no token sees it.
        position_ids: int64, as input_ids. They count from 0 in each row, which is how attention
            tells packed rows apart.
        logit_index: int64 [N], the positions that predict a token with a loss, as indices into the
            flattened input.
        targets: int64 [N], the tokens predicted there.
        weights: float32 [N], the weight of each of these tokens in the loss.
        partition: The teacher's probabilities; None for the signals ``text`` and ``hidden``.
        num_rows: B; 0 for a dummy.
        num_tokens: N; 0 for a dummy.
        input_tokens: Number of positions that hold a token.
        padded_tokens: Number of all positions.
        teacher_hidden: bfloat16 [N, D], for the signal ``hidden`` only.
        row_starts: int32 [B + 1], where each row begins among the tokens of all rows, one behind
            the other (padded, with their padding), and the end.
        row_places: int64 [row_starts[-1]], the position in the input of each of these tokens, where
            what several rows begin with is there once; None: they are in order.
        row_index: int64 [N], the row of each of the N tokens, counted from 0.
        longest: Number of input tokens of the longest row.
        unweighted: Whether every weight is known to be 1; told here, since on a device it would
            have to be read from there.
        student_written: Whether the student wrote the responses, of all rows.
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
    row_places: Tensor | None = None
    row_index: Tensor | None = None
    longest: int = 0
    unweighted: bool = False
    student_written: bool = False

    @property
    def packed(self) -> bool:
        """Whether a sequence holds several rows, which only ``position_ids`` tell apart."""
        return bool(self.num_rows > len(self.input_ids))

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy of the micro-batch on ``device``."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """A copy of the micro-batch with ``change`` applied to every tensor."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {n: change(value) for n, value in parts.items() if isinstance(value, Tensor)}
        if self.partition is not None:
            kept = Partition(change(self.partition.ids), change(self.partition.log_p))
            return replace(self, partition=kept, **changed)
        return replace(self, **changed)


def cut_micro_batches(
    rows: Sequence[Row], tokens_budget: int, packed: bool = False
) -> list[list[Row]]:
    """Groups rows so that the input of each group has at most ``tokens_budget`` positions.

    Padded, a group has B * S positions, and rows of similar length are grouped. Packed, it has the
    sum of the rows' lengths, and each row joins the first group with enough room (first-fit
    decreasing bin packing). A row longer than the budget is a group of its own. Rows without a
    token that has a loss are left out.

    The result does not depend on the order of ``rows``: they are sorted by length, the longest
    first, and rows of equal length by position. So a step is the same whatever came in first.
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
    """Each row, the longest first, in the first group that has room for it."""
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        index = next((i for i, left in enumerate(room) if row.num_inputs <= left), len(groups))
        if index == len(groups):
            groups.append([])
            room.append(tokens_budget)
        groups[index].append(row)
        room[index] -= row.num_inputs
    return groups


def row_weight(row: Row, normalise: str, truncated_rows: float = 1.0) -> float:
    """The sum of the token weights of one row.

    normalise: ``token`` gives each token that has a loss the weight 1, ``row`` gives the whole row
    the weight 1. truncated_rows: factor for a row whose answer was cut off at the length limit.
    """
    weight = truncated_rows if row.finish_reason == "length" else 1.0
    return weight * (row.num_targets if normalise == "token" else row.num_targets > 0)


def loss_weight(rows: Sequence[Row], normalise: str, truncated_rows: float = 1.0) -> float:
    """The sum of all token weights of these rows: what they add to the step's denominator."""
    return float(sum(row_weight(row, normalise, truncated_rows) for row in rows))


def collate(
    rows: Sequence[Row],
    signal_kind: str,
    student_vocab: int,
    normalise: str = "token",
    truncated_rows: float = 1.0,
    packed: bool = False,
    shared: bool = False,
) -> MicroBatch:
    """One micro-batch of rows that each have at least one token with a loss.

    signal_kind: ``text``, ``sampled``, ``topk`` or ``hidden``. student_vocab: number of ids that
    the student has a class for, see `student.build.num_classes`. Teacher ids from there on are
    counted in the tail. normalise, truncated_rows: as in `row_weight`; the tokens of a row share
    its weight equally. packed: one sequence instead of padded rows. shared: of packed rows, what
    several begin with is there once; the attention kernel must know of it.

    Raises ValueError where an input or target id is outside the student's vocabulary, or where
    the signal of a row is incomplete or damaged.
    """
    lengths = np.array([row.num_inputs for row in rows])
    longest = int(lengths.max())
    widths = lengths if packed else np.full(len(rows), longest)
    starts = np.concatenate([[0], np.cumsum(widths)])
    texts = [_checked_ids(row, student_vocab) for row in rows]
    places, num_positions = _places([ids[:-1] for ids in texts], starts, shared and packed)
    apart = num_positions == starts[-1]
    input_ids = np.full(num_positions, FILLER_ID, dtype=np.int64)
    # Padding counts on behind its row.
    positions = np.resize(np.arange(longest), num_positions)
    index, targets, weights = [], [], []
    for place, ids, row in zip(places, texts, rows, strict=True):
        input_ids[place] = ids[:-1]
        positions[place] = np.arange(len(place))
        first = len(ids) - row.num_targets  # Place of the first token with a loss; see the shift.
        index.append(place[first - 1 :])
        targets.append(ids[first:])
        weight = row_weight(row, normalise, truncated_rows) / row.num_targets
        weights.append(np.full(row.num_targets, weight, dtype=np.float32))
    shape = (1 if packed else len(rows), -1)
    flat_targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).reshape(shape),
        attention_mask=None,
        position_ids=torch.from_numpy(positions).reshape(shape),
        logit_index=torch.from_numpy(np.concatenate(index)),
        targets=flat_targets,
        weights=torch.from_numpy(np.concatenate(weights)),
        partition=_partition(rows, signal_kind, student_vocab, flat_targets),
        num_rows=len(rows),
        num_tokens=len(flat_targets),
        input_tokens=num_positions if packed else int(lengths.sum()),
        padded_tokens=num_positions,
        teacher_hidden=_teacher_hidden(rows) if signal_kind == "hidden" else None,
        row_starts=torch.from_numpy(starts.astype(np.int32)),
        row_places=None if apart else torch.from_numpy(np.concatenate(places)),
        row_index=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(each) for each in index])),
        longest=longest,
        unweighted=all(bool((each == 1).all()) for each in weights),
    )


def _places(
    inputs: Sequence[np.ndarray], starts: np.ndarray, shared: bool
) -> tuple[list[np.ndarray], int]:
    """The position of each token of each row, int64 [L] each, and the number of positions.

    inputs: token ids [L] of each row. starts: where rows begin that share nothing, and the end.
    """
    if shared:
        places = places_of(inputs)
        most = 1 + max(int(each[-1]) for each in places)
        if most < starts[-1]:  # Otherwise they stay in the order of the rows.
            return places, most
    places = [start + np.arange(len(ids)) for start, ids in zip(starts[:-1], inputs, strict=True)]
    return places, int(starts[-1])


def _checked_ids(row: Row, student_vocab: int) -> np.ndarray:
    """Prompt and response; ValueError where an id is outside the student's vocabulary.

    Checked here: on a GPU an id outside the embedding is an error without a row or a value.
    """
    ids = np.concatenate([row.prompt_ids, row.response_ids])
    if ids.max() >= student_vocab or ids.min() < 0:
        raise ValueError(
            f"row {row.row} has token id {ids.max()} but the student's vocabulary ends at "
            f"{student_vocab}; use a student whose tokenizer has the teacher's ids"
        )
    return ids


def _partition(
    rows: Sequence[Row], signal_kind: str, student_vocab: int, targets: Tensor
) -> Partition | None:
    """The signal of all rows as one partition of N tokens; None for ``text`` and ``hidden``."""
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
    """The teacher's hidden states, bfloat16 [N, D]; ValueError where one is not finite."""
    hidden = signal_column(rows, "hidden").view(torch.bfloat16)
    finite = torch.isfinite(hidden).all(dim=1)
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"the teacher's hidden state of token {token} has a component that is infinite or NaN; "
            "expected finite numbers; the teacher's answer is damaged, ask for it again"
        )
    return hidden


def signal_column(rows: Sequence[Row], name: str) -> Tensor:
    """One signal column of all tokens that have a loss: [N], [N, K] or [N, D].

    name: a field of `Row`. Raises ValueError where a row does not have one entry for each response
    token.
    """
    parts = []
    for row in rows:
        values = getattr(row, name)
        if values is None or len(values) != len(row.response_ids):
            state = "missing" if values is None else f"{len(values)} long"
            raise ValueError(
                f"row {row.row}: {name} is {state}; expected one entry for each of its "
                f"{len(row.response_ids)} response tokens; the teacher's answer is incomplete"
            )
        parts.append(values[len(values) - row.num_targets :])
    return torch.from_numpy(np.concatenate(parts))


def dummy_micro_batch(signal_kind: str, width: int = 1) -> MicroBatch:
    """A micro-batch of one token with weight 0, for a rank that has fewer rows than another.

    All ranks must run equally many forward and backward passes, since each pass waits for the
    others. width: D for a ``hidden`` signal, K for ``topk``; without effect for the other kinds.
    """
    partition = hidden = None
    if signal_kind == "hidden":
        hidden = torch.zeros(1, width, dtype=torch.bfloat16)
    elif signal_kind != "text":
        # All probability in the tail, and no id: right for any K and any student's vocabulary.
        size = 1 if signal_kind == "sampled" else width
        log_p = torch.full((1, size + 1), -torch.inf)
        log_p[:, -1] = 0.0
        partition = Partition(torch.full((1, size), NO_ID), log_p)
    zero = torch.zeros(1, dtype=torch.long)
    return MicroBatch(
        input_ids=zero[None],
        attention_mask=None,
        position_ids=zero[None],
        logit_index=zero,
        targets=zero,
        weights=torch.zeros(1),
        partition=partition,
        num_rows=0,
        num_tokens=0,
        input_tokens=0,
        padded_tokens=1,
        teacher_hidden=hidden,
        row_starts=torch.tensor([0, 1], dtype=torch.int32),
        longest=1,
    )
