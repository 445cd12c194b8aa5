"""The objective on the K + 1 classes of a partition, and the sums over the tokens of a micro-batch.

`head_loss` gives `TokenObjective` the logits of a micro-batch, one chunk of tokens after the other.
Evaluation calls `partition_metrics`. This module returns sums over tokens; `step` divides them by
the weight of the whole step.

Legend: N response tokens, n of a chunk, K teacher ids kept for each token, V student vocabulary, p
teacher, q student (softmax of the logits over all V ids), tau the tail, F figures of a token.
Values are in nats.

The objective of a token is the weighted sum of its terms:

    a divergence   d(p, q) over the K ids and tau, as `divergence` defines it
    cross_entropy  -log q_target

Nothing is renormalised over the K ids. The temperature is 1 on both sides; for the full vocabulary,
and for other temperatures, see `full_vocabulary`.
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
"""Nats. A teacher's tail below this is rounding noise of its engine, see `floored`."""


class ObjectiveSums(NamedTuple):
    """Sums over the tokens of one micro-batch, each token multiplied by its weight.

    Attributes:
        total: The sum of all terms, each multiplied by its factor; this is differentiated.
        terms: The sum of each term alone, without its factor and detached, by name.
        teacher_tail_mass: The teacher's probability of the tail. For a ``hidden`` signal the tail
            is the padding of the heads, mostly 0. None for ``text``.
        student_tail_mass: The student's probability of the tail.
        floored_tokens: Number of tokens with a weight above 0 that used the floor of `floored`;
            None without reverse_kl.
    """

    total: Tensor
    terms: dict[str, Tensor]
    teacher_tail_mass: Tensor | None
    student_tail_mass: Tensor | None
    floored_tokens: Tensor | None


def divergences(objective: ObjectiveConfig, has_tail: bool = True) -> dict[str, Divergence]:
    """The divergences that have a weight, by name, with their parameters filled in.

    has_tail: whether the last class is a tail; reverse_kl is then `floored`. Over a full vocabulary
    every class has a logarithm of its own, and no floor is needed.
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
    """The divergence of each token on the partition, [N] nats, differentiable.

    logits: [N, V] of any float dtype.
    """
    log_q, _ = partition_log_probs(logits, partition.ids)
    return _Differentiable.apply(log_q, partition.log_p.to(log_q.dtype), d)


def floored(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log_p [N, K + 1] with a floor for `reverse_kl`, and the tokens that needed it, bool [N].

    KL(q || p) divides by p. A teacher's tail is computed as 1 minus a sum, so below 1e-6 it is
    rounding noise, and it may be exactly 0. Such a p_tau is raised to min(q_tau, 1e-6): up to 1e-6
    the student's tail counts as equal to the teacher's, and a larger one is compared with 1e-6.

    So a student equal to its teacher still has the value 0, no value is below 0, values and
    gradients are continuous, and the result is a lower bound of the value without a floor. The K
    ids keep their own logarithms, however small; only where the teacher gave an id the probability
    0 it is raised in the same way.
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

    Subclasses compute the figures of each token, one column each: the terms in the order of
    ``names``, the teacher's and the student's tail mass, and 1 where the floor was used, else 0.

    Attributes:
        factors: The factor of each term in the total: its weight and, if configured, the squared
            temperature.
        names: The terms that have a weight.
        num_figures: F.
    """

    def __init__(self, objective: ObjectiveConfig, micro_batch: MicroBatch) -> None:
        self.targets = micro_batch.targets
        self.token_weights = micro_batch.weights
        self.factors = objective.factors
        self.names = list(self.factors)
        self.num_figures = len(self.names) + 3

    def begin(self, rows: slice) -> None:
        """Does nothing: a partition needs no preparation for a chunk of tokens."""

    def total(self, figures: Tensor) -> Tensor:
        """The sum over tokens and terms of token weight x factor x term, from figures [N, F]."""
        terms = self._weighted(figures[:, : len(self.names)]).sum(dim=0).unbind()
        # Numbers and no tensor of them, for whose copy the host would wait for the device.
        parts = [t * factor for t, factor in zip(terms, self.factors.values(), strict=True)]
        return torch.stack(parts).sum()

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """All sums of the micro-batch from figures [N, F], around the differentiable ``total``."""
        *terms, teacher, student = self._weighted(figures[:, :-1]).sum(dim=0).unbind()
        named = dict(zip(self.names, terms, strict=True))
        floored_tokens = None
        if "reverse_kl" in named:
            floored_tokens = (figures[:, -1] * (self.token_weights > 0)).sum()
        return ObjectiveSums(total, named, teacher, student, floored_tokens)

    def _weighted(self, figures: Tensor) -> Tensor:
        return figures * self.token_weights.to(figures.dtype)[:, None]


class TokenObjective(WeightedTerms):
    """The objective on the partition of one micro-batch; a `head_loss.ChunkObjective`.

    A ``text`` signal has no partition: the classes are then {target, all others}, of which only
    the target's probability is used.
    """

    def __init__(self, objective: ObjectiveConfig, micro_batch: MicroBatch) -> None:
        """Raises ValueError where a divergence has a weight and the signal is ``text``."""
        super().__init__(objective, micro_batch)
        if micro_batch.partition is None and objective.divergences:
            raise ValueError(
                f"objective gives {', '.join(objective.divergences)} a weight, but the signal is "
                "text; expected cross_entropy alone: a divergence needs the teacher's "
                "probabilities; set signal.kind: topk"
            )
        self.partition = micro_batch.partition
        self.divergences = divergences(objective)

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """The figures [n, F] of the tokens ``rows``; their logits z [n, V] become d total / d z."""
        targets, partition = self.targets[rows], self.partition
        ids = targets[:, None] if partition is None else partition.ids[rows]
        log_probs = gather_log_probs(z, ids, targets)
        log_q, q = log_probs.log_q, log_probs.log_q.exp()
        log_p = torch.zeros_like(log_q) if partition is None else partition.log_p[rows].to(z.dtype)
        grad_log_q, grad_target = torch.zeros_like(log_q), torch.zeros_like(log_probs.log_q_target)
        figures = []
        for name, weight in self.factors.items():
            if name == "cross_entropy":
                figures.append(-log_probs.log_q_target)
                grad_target -= weight
            else:
                value, grad = self.divergences[name](log_p, log_q, q)
                figures.append(value)
                grad_log_q.add_(grad, alpha=weight)
        weights = self.token_weights[rows].to(z.dtype)
        put_gradient(z, log_probs, targets, grad_log_q * weights[:, None], grad_target * weights)
        used_floor = torch.zeros_like(weights)
        if "reverse_kl" in self.divergences:
            used_floor = floored(log_p, log_q)[1].to(z.dtype)
        figures += [log_p[:, -1].exp(), q[:, -1], used_floor]
        return torch.stack(figures, dim=1)

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """As for every objective; the tail masses are None without a partition."""
        sums = super().sums(total, figures)
        if self.partition is None:
            return sums._replace(teacher_tail_mass=None, student_tail_mass=None)
        return sums


@torch.no_grad()
def partition_metrics(logits: Tensor, partition: Partition, targets: Tensor) -> dict[str, Tensor]:
    """How close the student is to the teacher on each token: four measures by name, [N] each.

    kl: KL(p || q), nats, a lower bound of the value over the full vocabulary. acceptance: the sum
    of min(p, q), an upper bound of it. top1: 1 where both have the same most likely id, else 0.
    nll: -log q of the target, nats.

    logits: [N, V]. targets: int64 [N].
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
    """A divergence [N] as a function of log_q [N, K + 1]; log_p gets no gradient."""

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
