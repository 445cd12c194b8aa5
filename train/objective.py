"""What the student minimises, for each response token, and the sums a step is made of.

Called by `step` on the logits of one micro-batch; also by evaluation. Pure functions of tensors:
typed tensors in, one value a token out; the division by the step's global weight is in `step`.

Legend: N response tokens, K teacher ids kept for each, V student vocabulary, p teacher, q student
(softmax of the logits over all V), tau the tail outcome. Everything in nats.

    a divergence  d(p, q) over the K ids and tau, as `divergence` defines it
    cross_entropy -log q_target

The temperature is 1 on both sides. Nothing is renormalised over the K ids and nothing is clamped.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raystill.train import divergence
from raystill.train.batch import MicroBatch
from raystill.train.config import ObjectiveConfig
from raystill.train.divergence import Divergence
from raystill.train.partition import NO_ID, Partition

LOG_FLOOR = math.log(1e-6)
"""The teacher's tail is the engine's noise below this (nats): see `floored`."""

# A chunk of logits is read several times; on a CPU it should stay in the core's cache meanwhile.
CPU_CHUNK_BYTES = 1 << 20
DEVICE_CHUNK_BYTES = 1 << 28


class ObjectiveSums(NamedTuple):
    """Sums over one micro-batch's tokens, each token times its weight.

    total: what is differentiated, sum over terms of term weight x term. terms: each term alone,
    without its term weight, detached. The tail masses are of the partition; None without one.
    floored_tokens: how many tokens of a weight above 0 used the floor; None without reverse_kl.
    """

    total: Tensor
    terms: dict[str, Tensor]
    teacher_tail_mass: Tensor | None
    student_tail_mass: Tensor | None
    floored_tokens: Tensor | None


def divergences(objective: ObjectiveConfig) -> dict[str, Divergence]:
    """The divergences in use over a partition, by name, with their parameters."""
    parameters = {
        "jsd": {"beta": objective.jsd_beta},
        "skew_forward_kl": {"alpha": objective.skew_alpha},
        "skew_reverse_kl": {"alpha": objective.skew_alpha},
    }
    functions = {name: getattr(divergence, name) for name in objective.divergences}
    if "reverse_kl" in functions:
        functions["reverse_kl"] = _floored_reverse_kl
    return {name: partial(f, **parameters.get(name, {})) for name, f in functions.items()}


def on_partition(d: Divergence, logits: Tensor, partition: Partition) -> Tensor:
    """The divergence of each token on the partition, [N] nats: logits [N, V] of any float dtype."""
    log_q, _ = outcome_log_probs(logits, partition.ids)
    return _Differentiable.apply(log_q, partition.log_p.to(log_q.dtype), d)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q of the targets, [N] nats: logits [N, V], targets int64 [N]."""
    log_q, _ = outcome_log_probs(logits, targets[:, None])
    return -log_q[:, 0]


def floored(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log_p [N, K + 1] as `reverse_kl`, which divides by p, takes it; and where that differs, [N].

    A teacher's tail is 1 minus a sum, or what float32 left of it: below 1e-6 its logarithm says
    nothing, and it can be exactly 0. There any mass of the student up to the floor counts as
    agreement, and mass above it is compared with the floor: p_tau is raised to min(q_tau, 1e-6).
    So a student equal to its teacher still has 0, no value falls below 0, values and gradients are
    continuous, and what is reported is a lower bound of what it would be without a floor. The K
    ids keep their own logarithms, however small, except where the teacher gave one no mass at all.
    """
    floor = log_q.clamp_max(LOG_FLOOR)
    noise = log_p == -torch.inf
    noise[:, -1] = True
    raised = noise & (log_p < floor)
    return torch.where(raised, floor, log_p), raised.any(dim=1)


def _floored_reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return divergence.reverse_kl(floored(log_p, log_q)[0], log_q)


def objective_sums(
    objective: ObjectiveConfig, logits: Tensor, micro_batch: MicroBatch
) -> ObjectiveSums:
    """All terms of the objective from one pass over the logits [N, V]; see `ObjectiveSums`."""
    partition, targets, weights = micro_batch.partition, micro_batch.targets, objective.weights
    if partition is None:
        require_partition(objective)
        per_token = {"cross_entropy": cross_entropy(logits, targets)}
        return _weighted_sums(objective, per_token, micro_batch.weights)
    log_q, log_q_target = outcome_log_probs(logits, partition.ids, targets)
    log_p = partition.log_p.to(log_q.dtype)
    per_token = {"cross_entropy": -log_q_target}
    for name, d in divergences(objective).items():
        per_token[name] = _Differentiable.apply(log_q, log_p, d)
    per_token = {name: per_token[name] for name in weights}
    sums = _weighted_sums(objective, per_token, micro_batch.weights)
    token_weights, log_q = micro_batch.weights.to(log_q.dtype), log_q.detach()
    num_floored = None
    if "reverse_kl" in weights:
        num_floored = (floored(log_p, log_q)[1] & (token_weights > 0)).sum()
    return sums._replace(
        teacher_tail_mass=(token_weights * log_p[:, -1].exp()).sum(),
        student_tail_mass=(token_weights * log_q[:, -1].exp()).sum(),
        floored_tokens=num_floored,
    )


def require_partition(objective: ObjectiveConfig) -> None:
    """Raises ValueError where the objective has a term that a `text` signal cannot serve."""
    if objective.divergences:
        raise ValueError(
            f"objective {objective.divergences} does not fit the signal; expected cross_entropy "
            "alone: a divergence needs the teacher's probabilities; set signal.kind: topk"
        )


def _weighted_sums(
    objective: ObjectiveConfig, per_token: dict[str, Tensor], weights: Tensor
) -> ObjectiveSums:
    sums = {name: (weights.to(value.dtype) * value).sum() for name, value in per_token.items()}
    total = torch.stack([objective.weights[name] * value for name, value in sums.items()]).sum()
    terms = {name: value.detach() for name, value in sums.items()}
    return ObjectiveSums(total, terms, None, None, None)


@torch.no_grad()
def partition_metrics(logits: Tensor, partition: Partition, targets: Tensor) -> dict[str, Tensor]:
    """How near the student is on each token, [N] each: ``kl acceptance top1 nll``.

    kl is a lower and acceptance, sum of min(p, q), an upper bound of the full vocabulary's value;
    top1 is 1 where the student's best id is the teacher's best id; nll is -log q of the target.
    """
    log_q, log_q_target = outcome_log_probs(logits, partition.ids, targets)
    log_p = partition.log_p.to(log_q.dtype)
    best = log_p[:, :-1].argmax(dim=1, keepdim=True)
    teacher_best = partition.ids.gather(1, best).squeeze(1)
    return {
        "kl": divergence.forward_kl(log_p, log_q)[0],
        "acceptance": torch.minimum(log_p, log_q).exp().sum(dim=1),
        "top1": (logits.argmax(dim=1) == teacher_best).to(log_q.dtype),
        "nll": -log_q_target,
    }


class _Differentiable(torch.autograd.Function):
    """A divergence [N] whose gradient reaches log_q [N, K + 1]; log_p is data."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, d: Divergence) -> Tensor:
        value, grad = d(log_p, log_q)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None], None, None


def outcome_log_probs(
    logits: Tensor, ids: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The student's log probability of K ids and of everything else, and of the targets.

    logits [N, V]; ids int64 [N, K], distinct or ``NO_ID``; targets int64 [N] (default: id 0).
    Returns log_q [N, K + 1] (last column the tail; -inf at ``NO_ID`` slots and where no id is
    left for the tail) and log_q_target [N], both float32, or float64 for float64 logits.
    """
    if targets is None:
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return _OutcomeLogProbs.apply(logits, ids, targets)


class _OutcomeLogProbs(torch.autograd.Function):
    """log q on a partition, exact in the tail, with the backward pass written by hand.

    Forward: log q_tau = logsumexp(z outside the ids) - logsumexp(z), never log(1 - sum q), which
    in float32 has lost its digits. Backward, for upstream gradients G_i of log q_i, G_tau of
    log q_tau and g of log q_target, with S = sum_i G_i + G_tau + g:

        d / d z_j = G_j - S q_j                                    j among the K ids
                  = (G_tau - S q_tau) softmax(z outside the ids)_j j elsewhere
                    + g                                            at j = target

    For forward KL (G = -p) these are q_j - p_j and (q_tau - p_tau) softmax(z outside)_j. Beside
    the logits and their gradient no [N, V] tensor exists: both passes work chunk by chunk, on
    logits relative to the largest among the ids.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _sum_dtype(logits)
        slots = _Slots(ids)
        z, origin = slots.gather(logits, dtype)
        hidden = slots.hide(z)
        lse_out = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for rows in _chunks(logits, dtype):
            outside = logits[rows] - origin[rows]
            outside.scatter_(1, slots.ids[rows], hidden[rows])
            torch.logsumexp(outside, dim=1, out=lse_out[rows])
        inside = z.masked_fill(~slots.kept, -torch.inf)
        lse = torch.logaddexp(torch.logsumexp(inside, dim=1), lse_out)
        log_q = torch.cat([inside, lse_out[:, None]], dim=1) - lse[:, None]
        log_q_target = (logits.gather(1, targets[:, None]) - origin).squeeze(1) - lse
        ctx.save_for_backward(logits, ids, targets, log_q, lse_out)
        return log_q, log_q_target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_q: Tensor, grad_target: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, targets, log_q, lse_out = ctx.saved_tensors
        slots, dtype = _Slots(ids), log_q.dtype
        total = grad_log_q.sum(dim=1) + grad_target
        q = log_q.exp()
        outside_scale = (grad_log_q[:, -1] - total * q[:, -1])[:, None]
        inside = grad_log_q[:, :-1] - total[:, None] * q[:, :-1]
        z, origin = slots.gather(logits, dtype)
        lse_out = lse_out.masked_fill(lse_out == -torch.inf, 0.0)[:, None]
        inside = slots.fill(inside, (z - lse_out).exp() * outside_scale)
        grad = torch.empty_like(logits)
        for rows in _chunks(logits, dtype):
            # At the K ids this overflows where the tail is tiny; the scatter overwrites them.
            part = grad[rows] if grad.dtype == dtype else None
            part = torch.sub(logits[rows], origin[rows], out=part)
            part.sub_(lse_out[rows]).exp_().mul_(outside_scale[rows])
            part.scatter_(1, slots.ids[rows], inside[rows])
            part.scatter_add_(1, targets[rows, None], grad_target[rows, None])
            if grad.dtype != dtype:
                grad[rows] = part
        return grad, None, None


class _Slots:
    """Ids that can index the logits, also where a slot has no id.

    A slot without an id borrows one that its token keeps, so that what is written there is
    written anyway; a token that keeps none borrows id 0, and there nothing may change.
    """

    def __init__(self, ids: Tensor) -> None:
        self.kept = ids != NO_ID
        lender, self.lender_slot = ids.max(dim=1, keepdim=True)
        self.none_kept = lender == NO_ID
        self.ids = torch.where(self.kept, ids, lender).clamp_min(0)

    def gather(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits [N, K] at the ids, relative to the largest of them, and that origin [N, 1].

        Sums of logits taken from a near origin are not rounded at the logits' own magnitude.
        """
        z = logits.gather(1, self.ids).to(dtype)
        origin = z.amax(dim=1, keepdim=True)
        origin = origin.masked_fill(~torch.isfinite(origin), 0.0)
        return z - origin, origin

    def hide(self, z: Tensor) -> Tensor:
        """What replaces the logits z [N, K] so that only the tail is left: -inf."""
        return torch.where(self.none_kept, z, -torch.inf)

    def fill(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Gradients [N, K] to write at the ids: the kept slots' own, the tail's where none is."""
        lent = inside.gather(1, self.lender_slot)
        return torch.where(self.none_kept, outside, torch.where(self.kept, inside, lent))


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor, dtype: torch.dtype) -> list[slice]:
    """Row slices of the logits whose copies in ``dtype`` have about the chunk size."""
    limit = CPU_CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, limit // (logits.shape[1] * dtype.itemsize))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
