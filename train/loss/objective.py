"""What the student minimises, for each response token, and the sums a step is made of.

`head_loss` calls `TokenObjective` on the logits of a micro-batch, chunk by chunk; evaluation calls
`partition_metrics`. Pure functions of tensors: typed tensors in, one value a token out; the
division by the step's global weight is in `step`.

Legend: N response tokens, K teacher ids kept for each, V student vocabulary, p teacher, q student
(softmax of the logits over all V), tau the tail outcome. Everything in nats.

    a divergence  d(p, q) over the K ids and tau, as `divergence` defines it
    cross_entropy -log q_target

The temperature is 1 on both sides; `hidden_objective` has the full vocabulary, and the temperature.
Nothing is renormalised over the K ids and nothing is clamped.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import Partition
from raystill.train.loss import divergence
from raystill.train.loss.divergence import Divergence
from raystill.train.loss.log_probs import gather_log_probs, partition_log_probs, put_gradient

LOG_FLOOR = math.log(1e-6)
"""The teacher's tail is the engine's noise below this (nats): see `floored`."""


class ObjectiveSums(NamedTuple):
    """Sums over one micro-batch's tokens, each token times its weight.

    total: what is differentiated, sum over terms of term weight x term. terms: each term alone,
    without its term weight, detached. The tail masses are of the outcome that holds all ids without
    one of their own (for a `hidden` signal the padding, mostly 0); None for the `text` signal.
    floored_tokens: how many tokens of a weight above 0 used the floor; None without reverse_kl.
    """

    total: Tensor
    terms: dict[str, Tensor]
    teacher_tail_mass: Tensor | None
    student_tail_mass: Tensor | None
    floored_tokens: Tensor | None


def divergences(objective: ObjectiveConfig, has_tail: bool = True) -> dict[str, Divergence]:
    """The divergences in use, by name, with their parameters.

    has_tail: the last outcome is the tail of a partition, so that `reverse_kl` is `floored`; over
    a full vocabulary, where every outcome has a logarithm of its own, it is not.
    """
    parameters = {
        "jsd": {"beta": objective.jsd_beta},
        "skew_forward_kl": {"alpha": objective.skew_alpha},
        "skew_reverse_kl": {"alpha": objective.skew_alpha},
    }
    functions = {name: getattr(divergence, name) for name in objective.divergences}
    if has_tail and "reverse_kl" in functions:
        functions["reverse_kl"] = _floored_reverse_kl
    return {name: partial(f, **parameters.get(name, {})) for name, f in functions.items()}


def on_partition(d: Divergence, logits: Tensor, partition: Partition) -> Tensor:
    """The divergence of each token on the partition, [N] nats: logits [N, V] of any float dtype."""
    log_q, _ = partition_log_probs(logits, partition.ids)
    return _Differentiable.apply(log_q, partition.log_p.to(log_q.dtype), d)


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


def _floored_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return divergence.reverse_kl(floored(log_p, log_q)[0], log_q, q)


class WeightedTerms:
    """The terms of an objective on one micro-batch, and their sums over its tokens.

    Figures of a token, one column each: the terms in the order of ``names``, the teacher's and the
    student's tail mass, and 1 where the floor was used. ``factors``: what each term is multiplied
    by in the total, its weight and, if asked for, the squared temperature.
    """

    def __init__(self, objective: ObjectiveConfig, micro_batch: MicroBatch) -> None:
        self.targets = micro_batch.targets
        self.token_weights = micro_batch.weights
        self.factors = objective.factors
        self.names = list(self.factors)
        self.num_figures = len(self.names) + 3

    def begin(self, rows: slice) -> None:
        """Nothing is to be got ready for a chunk."""

    def total(self, figures: Tensor) -> Tensor:
        """Sum over tokens and terms of token weight x factor x term."""
        factors = figures.new_tensor(list(self.factors.values()))
        return (self._weighted(figures[:, : len(self.names)]).sum(dim=0) * factors).sum()

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """All sums of the micro-batch; ``total`` is the one that is differentiable."""
        *terms, teacher, student = self._weighted(figures[:, :-1]).sum(dim=0).unbind()
        named = dict(zip(self.names, terms, strict=True))
        used = None
        if "reverse_kl" in named:
            used = (figures[:, -1] * (self.token_weights > 0)).sum()
        return ObjectiveSums(total, named, teacher, student, used)

    def _weighted(self, figures: Tensor) -> Tensor:
        return figures * self.token_weights.to(figures.dtype)[:, None]


class TokenObjective(WeightedTerms):
    """The objective on the tokens of one micro-batch (a `head_loss.ChunkObjective`).

    A `text` signal is the partition {target, rest} of which only the target's probability is used;
    its tail masses mean nothing.
    """

    def __init__(self, objective: ObjectiveConfig, micro_batch: MicroBatch) -> None:
        """Raises ValueError where the objective has a term that a `text` signal cannot serve."""
        super().__init__(objective, micro_batch)
        if micro_batch.partition is None and objective.divergences:
            raise ValueError(
                f"objective {objective.divergences} does not fit the signal; expected "
                "cross_entropy alone: a divergence needs the teacher's probabilities; set "
                "signal.kind: topk"
            )
        self.partition = micro_batch.partition
        self.divergences = divergences(objective)

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """Figures [n, F] of some tokens; their logits z [n, V] become d total / d z."""
        targets, partition = self.targets[rows], self.partition
        ids = targets[:, None] if partition is None else partition.ids[rows]
        outcomes = gather_log_probs(z, ids, targets)
        log_q, q = outcomes.log_q, outcomes.log_q.exp()
        log_p = torch.zeros_like(log_q) if partition is None else partition.log_p[rows].to(z.dtype)
        grad_log_q, grad_target = torch.zeros_like(log_q), torch.zeros_like(outcomes.log_q_target)
        figures = []
        for name, weight in self.factors.items():
            if name == "cross_entropy":
                figures.append(-outcomes.log_q_target)
                grad_target -= weight
            else:
                value, grad = self.divergences[name](log_p, log_q, q)
                figures.append(value)
                grad_log_q.add_(grad, alpha=weight)
        weights = self.token_weights[rows].to(z.dtype)
        put_gradient(z, outcomes, targets, grad_log_q * weights[:, None], grad_target * weights)
        used_floor = torch.zeros_like(weights)
        if "reverse_kl" in self.divergences:
            used_floor = floored(log_p, log_q)[1].to(z.dtype)
        figures += [log_p[:, -1].exp(), q[:, -1], used_floor]
        return torch.stack(figures, dim=1)

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """As of every objective; without a partition there are no tails."""
        sums = super().sums(total, figures)
        if self.partition is None:
            return sums._replace(teacher_tail_mass=None, student_tail_mass=None)
        return sums


@torch.no_grad()
def partition_metrics(logits: Tensor, partition: Partition, targets: Tensor) -> dict[str, Tensor]:
    """How near the student is on each token, [N] each: ``kl acceptance top1 nll``.

    kl is a lower and acceptance, sum of min(p, q), an upper bound of the full vocabulary's value;
    top1 is 1 where the student's best id is the teacher's best id; nll is -log q of the target.
    """
    log_q, log_q_target = partition_log_probs(logits, partition.ids, targets)
    log_p = partition.log_p.to(log_q.dtype)
    best = log_p[:, :-1].argmax(dim=1, keepdim=True)
    teacher_best = partition.ids.gather(1, best).squeeze(1)
    return {
        "kl": divergence.forward_kl(log_p, log_q, log_q.exp())[0],
        "acceptance": torch.minimum(log_p, log_q).exp().sum(dim=1),
        "top1": (logits.argmax(dim=1) == teacher_best).to(log_q.dtype),
        "nll": -log_q_target,
    }


class _Differentiable(torch.autograd.Function):
    """A divergence [N] whose gradient reaches log_q [N, K + 1]; log_p is data."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, d: Divergence) -> Tensor:
        value, grad = d(log_p, log_q, log_q.exp())
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None], None, None
