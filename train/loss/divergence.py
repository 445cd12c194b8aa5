"""Divergences of the teacher's distribution p and the student's q, each with its gradient.

`objective` applies them to the K + 1 classes of a partition, `full_vocabulary` to all ids. The
functions are the same; only the number of classes differs.

Legend: N tokens, M classes of each token (K + 1, or the vocabulary), p teacher, q student, m a
mixture of both.

Every function takes log_p, log_q and q, all [N, M] of one float dtype. Logarithms are in nats, -inf
where a class has probability 0. Every function returns the divergence, [N] nats, and its gradient
d divergence / d log_q, [N, M]. q = exp(log_q) is an argument because the caller has it already. No
argument is overwritten.

    forward_kl              KL(p || q)
    reverse_kl              KL(q || p)
    jsd(beta)               beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    skew_forward_kl(alpha)  KL(p || m),  m = alpha p + (1 - alpha) q
    skew_reverse_kl(alpha)  KL(q || m),  m = alpha q + (1 - alpha) p
    total_variation         1/2 sum |p - q|
    acceptance              -log sum min(p, q)

jsd is the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649), the
skew divergences are those of DistiLLM (Ko et al. 2024, arXiv:2402.03898), acceptance is the LK loss
(Samarin et al. 2026, arXiv:2602.23881).

KL(a || b) is computed as the sum of a log(a / b) - a + b over the classes. The added - a + b sums
to 0, since a and b both sum to 1. It makes every single term at least 0, and exactly 0, with
gradient 0, where a = b. So nothing has to be clamped, and a sum that rounding left slightly beside
1 changes the value in second order only. A class with a = 0 adds b. A class with a > 0 and b = 0
makes the divergence infinite.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log_p, log_q, q) -> (divergence [N], its gradient with respect to log_q [N, M])."""


def forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); infinite where q = 0 and p > 0."""
    p = log_p.exp()
    difference = q - p
    return _times_log_ratio(p, log_p, log_q).add_(difference).sum(dim=1), difference


def reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); infinite where p = 0 and q > 0."""
    log_ratio = _times_log_ratio(q, log_q, log_p)
    return log_p.exp().sub_(q).add_(log_ratio).sum(dim=1), log_ratio


def jsd(log_p: Tensor, log_q: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with 0 < beta < 1."""
    log_m = _log_mixture(log_p, log_q, beta)
    # The terms - a + b of both KL cancel in each class: beta (m - p) + (1 - beta) (m - q) = 0.
    p = log_p.exp()
    teacher = _times_log_ratio(p, log_p, log_m).mul_(beta)
    student = _times_log_ratio(q, log_q, log_m).mul_(1 - beta)
    # (q - p) * 0 is 0, or NaN where p or q is NaN: the two terms above have lost such a NaN.
    return teacher.add_(student).add_((q - p).mul_(0.0)).sum(dim=1), student


def skew_forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p || m), m = alpha p + (1 - alpha) q; at most -log alpha."""
    log_m = _log_mixture(log_p, log_q, alpha)
    value = _kl_terms(log_p.exp(), log_p, log_m.exp(), log_m).sum(dim=1)
    return value, torch.where(q > 0, (alpha - 1) * q * torch.expm1(log_p - log_m), 0.0)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q || m), m = alpha q + (1 - alpha) p; at most -log alpha."""
    log_m = _log_mixture(log_q, log_p, alpha)
    value = _kl_terms(q, log_q, log_m.exp(), log_m).sum(dim=1)
    ratio = log_q - log_m
    return value, torch.where(q > 0, q * (ratio - alpha * torch.expm1(ratio)), 0.0)


def total_variation(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|, which is 1 - sum min(p, q). Its gradient jumps at p = q; here it is 0 there.

    sum min(p, q) is the acceptance rate of speculative decoding with the student as the draft model
    (Leviathan et al. 2023, arXiv:2211.17192).
    """
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(dim=1), 0.5 * q * difference.sign()


def acceptance(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """-log A with A = sum min(p, q) = 1 - total_variation; infinite where no class has both.

    Its gradient is that of total_variation divided by A, so it does not vanish while a student
    still agrees with its teacher on little. It jumps at p = q, where half of q counts.
    """
    shared = torch.minimum(log_p, log_q)
    log_a = torch.logsumexp(shared, dim=1, keepdim=True)
    # log A keeps all digits of a small A but not of 1 - A; total_variation keeps those.
    distance = total_variation(log_p, log_q, q)[0]
    value = torch.where(distance < 0.5, -torch.log1p(-distance), -log_a.squeeze(1))
    # A class whose min(p, q) is q gives -q / A. Taken from the logarithms: q may be 0 in a float
    # where q / A is not. The share is NaN where A is 0: no class has a q that could grow.
    share = (log_q - log_a).exp_().nan_to_num_(nan=0.0, posinf=0.0)
    # 1 where q < p, 1/2 where they are equal, 0 where q > p.
    counts = (log_q < log_p).to(q.dtype).add_(log_q <= log_p).mul_(0.5)
    return value, share.mul_(counts).neg_()


def _times_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), and 0 where a = 0, where the product would be 0 times infinity: NaN.

    So a NaN of an argument also becomes 0 here; the callers' other terms keep it.
    """
    return (log_a - log_b).mul_(a).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _kl_terms(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b) - a + b of each class."""
    return _times_log_ratio(a, log_a, log_b).sub_(a).add_(b)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b); right also where a and b are too small for a float."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
