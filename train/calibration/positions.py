"""Poorer signals of given positions, exactly, from the teacher's full distribution.

A `hidden` signal holds all that a `topk` or `sampled` one would say of the same tokens. So several
signals can be compared on the very same positions (`calibrate`, `benchmarks/signals.py`), where
asking the teacher again would give other answers. Plain torch.

Legend: N response tokens, n of a chunk, K teacher ids kept for each, V rows of the teacher's head,
D its hidden size. Everything in nats, of the full vocabulary.

Sampled response positions, with every signal that could be kept of them.

`calibrate` compares the gradients of several signals: all of them must speak of the same tokens, so
the poorer ones are worked out from the teacher's hidden states (`truncate`). Plain torch.

Legend: N sampled positions, T response tokens of a row, K teacher ids kept for each, D the
teacher's hidden size.
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


class TopK(NamedTuple):
    """A ``topk`` signal: ids int64 [N, K], logprobs [N, K] descending, tail [N]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def first(self, size: int) -> "TopK":
        """The signal of the ``size`` best ids; the others' mass goes to the tail."""
        rest = torch.logsumexp(self.logprobs[:, size:], dim=1)
        return TopK(self.ids[:, :size], self.logprobs[:, :size], torch.logaddexp(self.tail, rest))


class Truncated(NamedTuple):
    """``drawn``: logprobs [N] of the drawn tokens; ``topk``: a signal for each K asked for."""

    drawn: Tensor
    topk: dict[int, TopK]


@torch.no_grad()
def truncate(
    teacher: TeacherHead, hidden: Tensor, drawn: Tensor, sizes: Collection[int]
) -> Truncated:
    """What the teacher would have said of each token with a poorer signal.

    hidden bfloat16 [N, D]; drawn int64 [N] token ids; sizes: the K, each from 1 to V. The tail is
    the logarithm of the sum of what is outside, never of 1 minus a sum; -inf where nothing is.
    """
    vocab, most = len(teacher.weight), max(sizes, default=1)
    if not 1 <= min(sizes, default=1) <= most <= vocab:
        raise ValueError(f"K is {sorted(sizes)}; expected 1 to {vocab}, the teacher's vocabulary")
    parts, drawn_parts = [], []
    for rows, z in teacher.logit_chunks(hidden):
        log_p = torch.log_softmax(z, dim=1)
        drawn_parts.append(log_p.gather(1, drawn[rows, None]).squeeze(1))
        logprobs, ids = log_p.topk(most, dim=1)
        tail = torch.logsumexp(log_p.scatter_(1, ids, -torch.inf), dim=1)
        parts.append(TopK(ids, logprobs, tail))
    if not parts:
        raise ValueError("there is no token to truncate the signal of; expected one or more")
    richest = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Truncated(torch.cat(drawn_parts), {size: richest.first(size) for size in sizes})


HIDDEN = "hidden"


@dataclass(frozen=True)
class Picked:
    """A row and which of its response tokens are sampled: places [n] in 0..T, ascending."""

    row: Row
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Positions:
    """N sampled positions of a ``hidden`` signal, each of weight 1.

    batches: the micro-batches of the student's body. tokens: all N tokens in the same order, as a
    micro-batch for the head alone (nothing is put in). lengths: how many of them each row has.
    truncated: what poorer signals say; partitions: the same as outcomes of the student.
    """

    batches: list[MicroBatch]
    tokens: MicroBatch
    lengths: list[int]
    truncated: Truncated
    partitions: dict[Signal, Partition | None]

    def all_tokens(self, signal: Signal) -> MicroBatch:
        """``tokens`` as if just this signal had been kept."""
        return _as_signal(self.tokens, signal, self.partitions[signal])

    def micro_batches(self, signal: Signal) -> Iterator[MicroBatch]:
        """``batches`` as if just this signal had been kept."""
        partition, start = self.partitions[signal], 0
        for batch in self.batches:
            end = start + batch.num_tokens
            mine = None if partition is None else partition[start:end]
            yield _as_signal(batch, signal, mine)
            start = end

    def answers(self, signal: Signal) -> list[Answer]:
        """What a teacher store would hold of these tokens: an answer a row, of its sampled ones."""
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


def pick(rows: Sequence[Row], count: int, per_row: int, seed: int) -> list[Picked]:
    """``count`` positions of rows in random order, at most ``per_row`` of each; fewer where the
    rows have no more. ValueError where they have none.
    """
    random = np.random.default_rng(seed)
    found: list[Picked] = []
    for index in random.permutation(len(rows)):
        row, left = rows[index], count - sum(len(p.places) for p in found)
        first = len(row.response_ids) - row.num_targets
        places = np.sort(random.permutation(row.num_targets)[: min(per_row, left)]) + first
        if len(places):
            found.append(Picked(row, places))
    if not found:
        raise ValueError(
            f"none of the {len(rows)} rows has a response token to compare signals on; expected "
            "one or more; raise teacher.sampling.max_tokens, or choose other prompts"
        )
    return found


def read_positions(
    picked: Sequence[Picked],
    teacher: TeacherHead,
    signals: Sequence[Signal],
    tokens_budget: int,
    student_vocab: int,
) -> Positions:
    """The picked positions on the teacher head's device; what they are, in all ``signals``.

    tokens_budget: of one forward pass, as ``training.tokens_per_micro_batch``; student_vocab as in
    `batch.collate`.
    """
    rows = [_up_to_last(p) for p in picked]
    places = {id(row): p.places for row, p in zip(rows, picked, strict=True)}
    device, batches, lengths = teacher.weight.device, [], []
    for group in cut_micro_batches(rows, tokens_budget):
        batch = collate(group, HIDDEN, student_vocab)
        index, start = [], 0
        for row in group:
            mine = places[id(row)] - (len(row.response_ids) - row.num_targets)
            index.append(torch.from_numpy(start + mine))
            lengths.append(len(mine))
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


def _up_to_last(picked: Picked) -> Row:
    """The row without what follows its last sampled token."""
    row, end = picked.row, int(picked.places[-1]) + 1
    assert row.hidden is not None, "positions are sampled from rows with hidden states"
    return replace(row, response_ids=row.response_ids[:end], hidden=row.hidden[:end])


def _tokens_of(batch: MicroBatch, index: Tensor) -> MicroBatch:
    """The micro-batch with only some of its tokens bearing loss, each of weight 1."""
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
    """The tokens of all micro-batches as one, without inputs."""
    columns = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("targets", "weights", "teacher_hidden")
    }
    none = torch.zeros(0, dtype=torch.long)
    count = len(columns["targets"])
    return replace(
        batches[0],
        input_ids=none,
        position_ids=none,
        logit_index=none,
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
