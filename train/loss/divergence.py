"""Divergences of two discrete distributions, each defined once, for every signal.

`objective` applies them to a partition of K ids and a tail (a `sampled` signal is one with K = 1);
over a full vocabulary they are the same functions of wider arrays. Plain torch.

Legend: N tokens, M outcomes of each (K + 1, or a vocabulary), p teacher, q student, m a mixture.

Every function takes log_p, log_q and q, [N, M] of one float dtype, nats, -inf where an outcome has
no mass, and returns the divergence [N], nats, with its gradient d value / d log_q [N, M]. The
caller has q = exp(log_q), which its own gradient needs as well. No argument is overwritten.

    forward_kl              KL(p || q)
    reverse_kl              KL(q || p)
    jsd(beta)               beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    skew_forward_kl(alpha)  KL(p || m),  m = alpha p + (1 - alpha) q
    skew_reverse_kl(alpha)  KL(q || m),  m = alpha q + (1 - alpha) p
    total_variation         1/2 sum |p - q|

KL(a || b) is summed as a log(a / b) - a + b: what is added cancels over all outcomes, and every
single term is then at least 0, and 0 with its gradient where a = b. So nothing needs clamping, and
what rounding left of "sums to 1" counts in second order only. An outcome with a = 0 adds b; one
with a > 0 and b = 0 is infinite.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): infinite where the student has no mass and the teacher has some."""
    p = log_p.exp()
    difference = q - p
    return _times_log_ratio(p, log_p, log_q).add_(difference).sum(dim=1), difference


def reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): infinite where the teacher has no mass and the student has some."""
    log_ratio = _times_log_ratio(q, log_q, log_p)
    return log_p.exp().sub_(q).add_(log_ratio).sum(dim=1), log_ratio


def jsd(log_p: Tensor, log_q: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with 0 < beta < 1."""
    log_m = _log_mixture(log_p, log_q, beta)
    # No more terms: beta (m - p) + (1 - beta) (m - q) is 0 for each outcome.
    p = log_p.exp()
    teacher = _times_log_ratio(p, log_p, log_m).mul_(beta)
    student = _times_log_ratio(q, log_q, log_m).mul_(1 - beta)
    # Adds nothing, or the NaN that either side has.
    return teacher.add_(student).add_((q - p).mul_(0.0)).sum(dim=1), student


def skew_forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p || m), m = alpha p + (1 - alpha) q: at most -log alpha."""
    log_m = _log_mixture(log_p, log_q, alpha)
    value = _kl_terms(log_p.exp(), log_p, log_m.exp(), log_m).sum(dim=1)
    return value, torch.where(q > 0, (alpha - 1) * q * torch.expm1(log_p - log_m), 0.0)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q || m), m = alpha q + (1 - alpha) p: at most -log alpha."""
    log_m = _log_mixture(log_q, log_p, alpha)
    value = _kl_terms(q, log_q, log_m.exp(), log_m).sum(dim=1)
    ratio = log_q - log_m
    return value, torch.where(q > 0, q * (ratio - alpha * torch.expm1(ratio)), 0.0)


def total_variation(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Half of sum |p - q|: 1 - acceptance. Its gradient jumps at p = q; there it is 0."""
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(dim=1), 0.5 * q * difference.sign()


def _times_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), and 0 where a = 0: only there 0 is multiplied by an infinity.

    0 also where an operand is NaN: the caller's other terms are NaN then.
    """
    return (log_a - log_b).mul_(a).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _kl_terms(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
    return _times_log_ratio(a, log_a, log_b).sub_(a).add_(b)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), also where a and b are too small to be represented."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
