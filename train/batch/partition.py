"""The teacher's word on each token as a partition of the vocabulary: K ids and one tail.

Sits between the delivered rows and the objective: `batch.collate` builds one `Partition` for the
tokens of a micro-batch, `objective` compares the student with it. No Ray, no vLLM.

Legend: N response tokens, K teacher ids kept for each, V student vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_ID = -1


@dataclass(frozen=True)
class Partition:
    """K + 1 outcomes for each of N tokens; each token's probabilities sum to 1.

    ids: int64 [N, K], student vocabulary ids, distinct within a token; ``NO_ID`` marks a slot
    whose teacher id is no outcome of the student (its mass is in the tail).
    log_p: float32 [N, K + 1], nats, the last column the tail: everything that is not in ``ids``.
    """

    ids: Tensor
    log_p: Tensor

    def __getitem__(self, tokens: slice) -> "Partition":
        """The partition of some of the tokens."""
        return Partition(self.ids[tokens], self.log_p[tokens])


def topk_partition(ids: Tensor, logprobs: Tensor, tail: Tensor, student_vocab: int) -> Partition:
    """The partition of a ``topk`` signal.

    ids int [N, K] and logprobs [N, K] nats of the full teacher vocabulary, tail [N] =
    log(1 - sum of the K probabilities), -inf where nothing is left. Ids from ``student_vocab`` on
    are outcomes the student cannot name (padded rows of the teacher's head): their mass moves to
    the tail. Raises ValueError where a token has a NaN or no probability at all.
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
    """The partition {drawn token, rest} of a ``sampled`` signal: a ``topk`` with K = 1.

    drawn int [N], logprobs [N] nats. The rest is log(1 - p), taken in float64 because p is often
    so near 1 that float32 has lost it.
    """
    logprobs = logprobs.double().clamp_max(0.0)
    rest = torch.log(-torch.expm1(logprobs))
    return topk_partition(drawn[:, None], logprobs[:, None], rest, student_vocab)


def normalise_jointly(log_p: Tensor) -> Tensor:
    """Closes the rounded partition: log_p [N, K + 1] minus its own logsumexp.

    All K + 1 outcomes together, so the teacher's tail keeps its share: this is not a
    renormalisation over the K ids. Without it a student equal to its teacher can get a negative
    divergence, since the stored probabilities were rounded one by one.
    """
    total = torch.logsumexp(log_p, dim=1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        token = int((~torch.isfinite(total)).nonzero()[0, 0])
        raise ValueError(
            f"teacher log probabilities of token {token} are {log_p[token].tolist()[:8]}; expected "
            "at least one finite value and no NaN; the teacher's answer is broken, ask it again"
        )
    return log_p - total
