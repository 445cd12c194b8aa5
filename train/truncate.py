"""Poorer signals of given positions, exactly, from the teacher's full distribution.

A `hidden` signal holds all that a `topk` or `sampled` one would say of the same tokens. So several
signals can be compared on the very same positions (`calibrate`, `benchmarks/signals.py`), where
asking the teacher again would give other answers. Plain torch.

Legend: N response tokens, n of a chunk, K teacher ids kept for each, V rows of the teacher's head,
D its hidden size. Everything in nats, of the full vocabulary.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from raystill.train.teacher_head import TeacherHead


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
