"""The obvious way to the objectives, slow and in float64, and inputs to hold both ways against.

The formulas take the full softmax, sum what lies outside the ids, and are those of the textbooks.
"""

import math

import torch

from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.train.batch.partition import NO_ID, Partition, topk_partition
from raystill.train.loss.head_loss import OutputHead, head_loss
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import TokenObjective, divergences, on_partition

torch.set_num_threads(1)  # Tensors this small make two threads wait for each other.

VOCAB, TOKENS, TOP_K = 60, 7, 8
BETA, ALPHA, FLOOR = 0.3, 0.1, 1e-6
EVERYTHING = ObjectiveConfig(
    **dict.fromkeys(TERMS, 1.0),
    jsd_beta=BETA,
    skew_alpha=ALPHA,
)
DIVERGENCES = EVERYTHING.divergences


def on(name, logits, partition):
    """The divergence of that name as the project computes it, [N]."""
    return on_partition(divergences(EVERYTHING)[name], logits, partition)


def forward_kl(logits, partition):
    return on("forward_kl", logits, partition)


def cross_entropy(logits, targets):
    """-log q of the targets [N] as the project computes it, [N]."""
    return -partition_log_probs(logits, targets[:, None])[0][:, 0]


def slow_log_q(logits, ids):
    """[N, K + 1]: log softmax at the ids, and the log of the sum of all others."""
    log_q = torch.log_softmax(logits.double(), dim=1)
    outside = torch.ones_like(log_q, dtype=torch.bool)
    for token, kept in enumerate(ids):
        outside[token, kept[kept != NO_ID]] = False
    tail = torch.logsumexp(log_q.masked_fill(~outside, -math.inf), dim=1)
    inside = log_q.gather(1, ids.clamp_min(0)).masked_fill(ids == NO_ID, -math.inf)
    return torch.cat([inside, tail[:, None]], dim=1)


def loss_on_logits(objective, logits, batch):
    """The sums of a micro-batch from its logits [N, V]: hidden states of a head that is 1."""
    head = OutputHead(torch.eye(logits.shape[1], dtype=logits.dtype), compute_dtype=logits.dtype)
    return head_loss(logits, head, TokenObjective(objective, batch))


def kl(a, b):
    """KL(a || b) of two vectors of probabilities."""
    used = a > 0
    return (a[used] * (a[used] / b[used]).log()).sum()


def slow_divergence(name, p, q, has_tail=True):
    """One token's divergence of the teacher's p from the student's q, [M] probabilities each."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        lifted = p.clone()
        if has_tail:
            lifted[-1] = max(p[-1].item(), min(q[-1].item(), FLOOR))
        return kl(q, lifted) + lifted.sum() - q.sum()
    if name == "jsd":
        return BETA * kl(p, BETA * p + (1 - BETA) * q) + (1 - BETA) * kl(
            q, BETA * p + (1 - BETA) * q
        )
    if name == "skew_forward_kl":
        return kl(p, ALPHA * p + (1 - ALPHA) * q)
    if name == "skew_reverse_kl":
        return kl(q, ALPHA * q + (1 - ALPHA) * p)
    if name == "acceptance":
        return -torch.minimum(p, q).sum().log()
    assert name == "total_variation", name
    return (p - q).abs().sum() / 2


def slow(name, logits, partition):
    """The divergence of that name for every token, [N], from the whole softmax."""
    q, p = slow_log_q(logits, partition.ids).exp(), partition.log_p.double().exp()
    return torch.stack([slow_divergence(name, p[t], q[t]) for t in range(len(p))])


def slow_forward_kl(logits, partition):
    # Not through q: where all of it is in the tail, q underflows and its logarithm does not.
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
