"""The teacher's distribution over the next token as K + 1 classes: K single ids and the tail.

The tail is one class for all other ids of the vocabulary. A ``topk`` signal gives the K most
likely ids; a ``sampled`` signal is the case K = 1, the drawn id. `batch.collate` builds one
`Partition` for the tokens of a micro-batch, and `loss.objective` compares the student with it.

Legend: N response tokens, K teacher ids kept for each token, V student vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_ID = -1
"""Marks a place among the K ids whose id the student does not have."""


@dataclass(frozen=True)
class Partition:
    """K + 1 classes for each of N tokens, and the teacher's probability of each class.

    Attributes:
        ids: int64 [N, K], ids of the student's vocabulary, distinct within a token, or ``NO_ID``
            where the student does not have the teacher's id, whose probability is in the tail.
        log_p: float32 [N, K + 1], nats; the last column is the tail. The probabilities of a token
            sum to 1.
    """

    ids: Tensor
    log_p: Tensor

    def __getitem__(self, tokens: slice) -> "Partition":
        """The same classes for a slice of the tokens."""
        return Partition(self.ids[tokens], self.log_p[tokens])


def topk_partition(ids: Tensor, logprobs: Tensor, tail: Tensor, student_vocab: int) -> Partition:
    """The partition of a ``topk`` signal.

    ids: integers [N, K]. logprobs: [N, K], nats, normalised over the teacher's whole vocabulary.
    tail: [N] = log(1 - sum of the K probabilities), nats, -inf where nothing is left.
    student_vocab: ids from here on are not in the student's vocabulary (padding of the teacher's
    head); their probability is added to the tail. Raises ValueError where a token has a NaN, or no
    probability above 0.
    """
    logprobs, tail = logprobs.float(), tail.float()
    kept = ids < student_vocab
    if not bool(kept.all()):
        moved = logprobs.masked_fill(kept, -torch.inf)
        tail = torch.logaddexp(tail, torch.logsumexp(moved, dim=1))
        logprobs = logprobs.masked_fill(~kept, -torch.inf)
        ids = ids.masked_fill(~kept, NO_ID)
    return Partition(ids.long(), normalise_jointly(torch.cat([logprobs, tail[:, None]], dim=1)))


def sampled_partition(drawn: Tensor, logprobs: Tensor, student_vocab: int) -> Partition:
    """The partition {drawn id, all others} of a ``sampled`` signal: a ``topk`` with K = 1.

    drawn: integers [N], the drawn ids. logprobs: [N], nats, of the drawn ids.
    """
    # float64: p is often so near 1 that 1 - p is 0 in float32. Rounding can leave log p above 0.
    logprobs = logprobs.double().clamp_max(0.0)
    rest = torch.log(-torch.expm1(logprobs))
    return topk_partition(drawn[:, None], logprobs[:, None], rest, student_vocab)


def normalise_jointly(log_p: Tensor) -> Tensor:
    """Makes the K + 1 probabilities of each token sum to 1: log_p [N, K + 1] - logsumexp(log_p).

    The stored probabilities were rounded one by one, so their sum is only about 1. Without this
    step the divergence of a student equal to its teacher could be below 0. All classes are divided
    by the same sum, the tail included: this is no renormalisation over the K ids. Raises
    ValueError where a token has a NaN, or no probability above 0.
    """
    total = torch.logsumexp(log_p, dim=1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        token = int((~torch.isfinite(total)).nonzero()[0, 0])
        raise ValueError(
            f"teacher log probabilities of token {token} are {log_p[token].tolist()[:8]}; expected "
            "at least one finite value and no NaN; the teacher's answer is damaged, ask for it "
            "again"
        )
    return log_p - total
