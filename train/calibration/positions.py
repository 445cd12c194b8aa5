"""Sampled response positions, with every signal that a teacher could give for them.

`calibrate` compares the gradients of several signals, and all of them must be of the same tokens;
asking the teacher again would give other answers. So the poorer signals are computed from a
``hidden`` one, which holds the teacher's whole distribution: `truncate` gives exactly the
``sampled`` and ``topk`` signals of the same tokens. `benchmarks/signals.py` uses it too. Plain
torch.

Legend: N sampled positions, n of one chunk or row, T response tokens of a row, K teacher ids kept
for each, V rows of the teacher's head, D the teacher's hidden size. Log probabilities are in nats,
of the whole vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.batch import MicroBatch, collate, cut_micro_batches
from raystill.train.batch.partition import Partition, sampled_partition, topk_partition
from raystill.train.batch.rows import Row
from raystill.train.loss.teacher_head import TeacherHead

HIDDEN = "hidden"


class TopK(NamedTuple):
    """A ``topk`` signal: ids int64 [N, K]; logprobs [N, K], descending, and tail [N] in nats."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def first(self, size: int) -> "TopK":
        """Keep the ``size`` most probable ids; the mass of the others is added to the tail."""
        rest = torch.logsumexp(self.logprobs[:, size:], dim=1)
        return TopK(self.ids[:, :size], self.logprobs[:, :size], torch.logaddexp(self.tail, rest))


class Truncated(NamedTuple):
    """The signals `truncate` gives. drawn: logprobs [N] of the drawn ids; topk: a signal by K."""

    drawn: Tensor
    topk: dict[int, TopK]


@torch.no_grad()
def truncate(
    teacher: TeacherHead, hidden: Tensor, drawn: Tensor, sizes: Collection[int]
) -> Truncated:
    """Compute the ``sampled`` signal, and a ``topk`` signal for each of ``sizes``.

    hidden: bfloat16 [N, D]. drawn: token ids, int64 [N]. sizes: values of K, each from 1 to V.
    Raises ValueError for another K, and if there is no token.
    """
    vocab, largest = len(teacher.weight), max(sizes, default=1)
    if not 1 <= min(sizes, default=1) <= largest <= vocab:
        raise ValueError(f"K is {sorted(sizes)}; expected 1 to {vocab}, the teacher's vocabulary")
    parts, drawn_parts = [], []
    for rows, z in teacher.logit_chunks(hidden):
        log_p = torch.log_softmax(z, dim=1)
        drawn_parts.append(log_p.gather(1, drawn[rows, None]).squeeze(1))
        logprobs, ids = log_p.topk(largest, dim=1)
        # The sum over the ids outside, and not 1 minus the sum inside: a small tail keeps its
        # digits. With K = V nothing is outside, and the tail is -inf.
        tail = torch.logsumexp(log_p.scatter_(1, ids, -torch.inf), dim=1)
        parts.append(TopK(ids, logprobs, tail))
    if not parts:
        raise ValueError("there is no token to truncate the signal of; expected one or more")
    richest = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Truncated(torch.cat(drawn_parts), {size: richest.first(size) for size in sizes})


@dataclass(frozen=True)
class RowPositions:
    """Sampled positions of one row: indices [n] of its response tokens, 0 to T - 1, ascending."""

    row: Row
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class Positions:
    """N sampled positions with a ``hidden`` signal, each with weight 1.

    Attributes:
        batches: Micro-batches for the whole student.
        tokens: All N tokens in the same order, as one micro-batch for the head alone, without
            inputs.
        lengths: Number of sampled positions of each row.
        truncated: The poorer signals of the tokens.
        partitions: The same signals as partitions of the student's vocabulary; None for ``text``
            and ``hidden``.
    """

    batches: list[MicroBatch]
    tokens: MicroBatch
    lengths: list[int]
    truncated: Truncated
    partitions: dict[Signal, Partition | None]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.tokens.targets.device

    def all_tokens(self, signal: Signal) -> MicroBatch:
        """Return ``tokens`` as a run with this signal would have them."""
        return _as_signal(self.tokens, signal, self.partitions[signal])

    def micro_batches(self, signal: Signal) -> Iterator[MicroBatch]:
        """Yield ``batches`` as a run with this signal would have them."""
        partition, start = self.partitions[signal], 0
        for batch in self.batches:
            end = start + batch.num_tokens
            part = None if partition is None else partition[start:end]
            yield _as_signal(batch, signal, part)
            start = end

    def answers(self, signal: Signal) -> list[Answer]:
        """Return answers as a teacher store would keep them: of each row, its sampled tokens."""
        columns: dict[str, Tensor] = {"response_ids": self.tokens.targets.int()}
        if signal.kind != "text":
            columns["sampled_logprobs"] = self.truncated.drawn.float()
        if signal.kind == "topk":
            kept = self.truncated.topk[signal.width]
            columns |= {"topk_ids": kept.ids.int(), "topk_logprobs": kept.logprobs.float()}
            columns["tail_logprob"] = kept.tail.float()
        if signal.kind == HIDDEN:
            assert self.tokens.teacher_hidden is not None
            columns["hidden"] = self.tokens.teacher_hidden.view(torch.uint16)
        split = {
            name: [part.cpu().numpy() for part in column.split(self.lengths)]
            for name, column in columns.items()
        }
        return [
            Answer(finish_reason="stop", **{name: parts[row] for name, parts in split.items()})
            for row in range(len(self.lengths))
        ]


def sample_positions(
    rows: Sequence[Row], count: int, per_row: int, seed: int
) -> list[RowPositions]:
    """Sample ``count`` positions, at most ``per_row`` of a row; rows come in random order.

    Gives fewer if the rows have no more. Raises ValueError if they have none.
    """
    random = np.random.default_rng(seed)
    sampled: list[RowPositions] = []
    for number in random.permutation(len(rows)):
        row, left = rows[number], count - sum(len(p.indices) for p in sampled)
        # The first token of a row without a prompt has no context, and so no loss.
        first = len(row.response_ids) - row.num_targets
        indices = np.sort(random.permutation(row.num_targets)[: min(per_row, left)]) + first
        if len(indices):
            sampled.append(RowPositions(row, indices))
    if not sampled:
        raise ValueError(
            f"none of the {len(rows)} rows has a response token to compare signals on; expected "
            "one or more; raise teacher.sampling.max_tokens, or choose other prompts"
        )
    return sampled


def read_positions(
    sampled: Sequence[RowPositions],
    teacher: TeacherHead,
    signals: Sequence[Signal],
    tokens_budget: int,
    student_vocab: int,
) -> Positions:
    """Put the sampled positions into micro-batches, and compute all ``signals`` of them.

    tokens_budget: most tokens of a forward pass, as ``training.tokens_per_micro_batch``.
    student_vocab: as for `batch.collate`. The result is on the device of the teacher's head.
    """
    rows = [_up_to_last(p) for p in sampled]
    # By identity: cut_micro_batches brings the rows into another order.
    indices = {id(row): p.indices for row, p in zip(rows, sampled, strict=True)}
    device, batches, lengths = teacher.weight.device, [], []
    for group in cut_micro_batches(rows, tokens_budget):
        batch = collate(group, HIDDEN, student_vocab)
        index, start = [], 0
        for row in group:
            # From response tokens to targets: the first response token may not be a target.
            targets = indices[id(row)] - (len(row.response_ids) - row.num_targets)
            index.append(torch.from_numpy(start + targets))
            lengths.append(len(targets))
            start += row.num_targets
        batches.append(_tokens_of(batch, torch.cat(index)).to(device))
    tokens = _together(batches)
    sizes = [signal.width for signal in signals if signal.kind == "topk"]
    assert tokens.teacher_hidden is not None
    truncated = truncate(teacher, tokens.teacher_hidden, tokens.targets, sizes)
    partitions = {s: _partition(s, truncated, tokens.targets, student_vocab) for s in signals}
    return Positions(batches, tokens, lengths, truncated, partitions)


def _as_signal(batch: MicroBatch, signal: Signal, partition: Partition | None) -> MicroBatch:
    if signal.kind == HIDDEN:
        return batch
    return replace(batch, partition=partition, teacher_hidden=None)


def _up_to_last(positions: RowPositions) -> Row:
    """Cut the row after its last sampled token; later tokens cannot change what is measured."""
    row, end = positions.row, int(positions.indices[-1]) + 1
    assert row.hidden is not None, "positions are sampled from rows with hidden states"
    return replace(row, response_ids=row.response_ids[:end], hidden=row.hidden[:end])


def _tokens_of(batch: MicroBatch, index: Tensor) -> MicroBatch:
    """Keep the loss of the tokens at ``index`` only, each with weight 1."""
    assert batch.teacher_hidden is not None
    return replace(
        batch,
        logit_index=batch.logit_index[index],
        targets=batch.targets[index],
        weights=torch.ones(len(index)),
        num_tokens=len(index),
        teacher_hidden=batch.teacher_hidden[index],
    )


def _together(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Join the tokens of all micro-batches into one, without inputs."""
    columns = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("targets", "weights", "teacher_hidden")
    }
    empty = torch.zeros(0, dtype=torch.long)
    count = len(columns["targets"])
    return replace(
        batches[0],
        input_ids=empty,
        position_ids=empty,
        logit_index=empty,
        num_tokens=count,
        **columns,
    )


def _partition(
    signal: Signal, truncated: Truncated, targets: Tensor, student_vocab: int
) -> Partition | None:
    if signal.kind == "sampled":
        return sampled_partition(targets, truncated.drawn, student_vocab)
    if signal.kind == "topk":
        return topk_partition(*truncated.topk[signal.width], student_vocab)
    return None
