"""The obvious way to the objectives, slow and in float64, and inputs to hold both ways against.

The formulas take the full softmax and sum what lies outside the ids.
"""

import math

import torch

from raystill.train.objective import forward_kl
from raystill.train.partition import NO_ID, Partition, topk_partition

torch.set_num_threads(1)  # Tensors this small make two threads wait for each other.

VOCAB, TOKENS, TOP_K = 60, 7, 8


def slow_log_q(logits, ids):
    """[N, K + 1]: log softmax at the ids, and the log of the sum of all others."""
    log_q = torch.log_softmax(logits.double(), dim=1)
    outside = torch.ones_like(log_q, dtype=torch.bool)
    for token, kept in enumerate(ids):
        outside[token, kept[kept != NO_ID]] = False
    tail = torch.logsumexp(log_q.masked_fill(~outside, -math.inf), dim=1)
    inside = log_q.gather(1, ids.clamp_min(0)).masked_fill(ids == NO_ID, -math.inf)
    return torch.cat([inside, tail[:, None]], dim=1)


def slow_forward_kl(logits, partition):
    log_q, p = slow_log_q(logits, partition.ids), partition.log_p.double().exp()
    terms = []
    for token in range(len(p)):
        used = p[token] > 0
        terms.append((p[token, used] * (p[token, used].log() - log_q[token, used])).sum())
    return torch.stack(terms)


def teacher_partition(logits, top_k, student_vocab=VOCAB, dtype=torch.float64):
    """The top-k partition of a teacher with these logits, the tail taken in float64."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    top, ids = log_p.topk(top_k, dim=1)
    rest = log_p.scatter(1, ids, -math.inf)
    tail = torch.logsumexp(rest, dim=1)
    if dtype == torch.float64:
        return Partition(ids, torch.cat([top, tail[:, None]], dim=1))
    return topk_partition(ids, top, tail, student_vocab)


def random_logits(seed, dtype=torch.float64, scale=2.0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64).to(dtype)


def gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def assert_matches_slow(logits, partition, **tolerance):
    fast = gradient(lambda z: forward_kl(z, partition), logits)
    slow = gradient(lambda z: slow_forward_kl(z, partition), logits)
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), **tolerance)
