"""Compares the gradients of poorer signals with that of the full signal, ``hidden``.

`calibrate` asks this for one student and one objective. For each signal it gives the loss, and the
cosine of the angle between the signal's gradient and the full one at the same positions. The cosine
is taken at the student's logits, which a signal acts on directly, and at its parameters, which an
optimizer step changes. Plain torch.

Legend: N sampled positions, n of one chunk, V rows of the student's head, D the student's hidden
size, g the gradient of the mean loss of a signal, f that of the full signal.

    cosine = sum(g f) / sqrt(sum(g^2) sum(f^2))    over all N positions and V logits together, or
                                                   over all parameters together

A ``text`` signal has no probabilities, so there is no divergence for it. It is compared by the
cross entropy on the drawn tokens, with which such a run would train.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.batch import MicroBatch
from raystill.train.calibration.cost import Cost, cost_of
from raystill.train.calibration.positions import HIDDEN, Positions
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import TokenObjective
from raystill.train.loss.teacher_head import TeacherHead
from raystill.train.student.module import StudentModule

CROSS_ENTROPY = ObjectiveConfig(cross_entropy=1.0)
ALL_TERMS = "all terms together"
SIZES = (1, 8, 16, 64, 256, 1024)
"""Values of K for which a ``topk`` signal is compared."""


class OnLogits(NamedTuple):
    """Figures of one signal at the student's logits.

    loss: nats per token. cosine: None if a gradient is 0. student_mass: the student's probability
    of the ids that the signal names, mean over positions; None for ``text``.
    """

    loss: float
    cosine: float | None
    student_mass: float | None


@dataclass
class CosineSums:
    """Sums from which a cosine is computed, added up piece by piece."""

    product: float = 0.0
    square: float = 0.0
    full_square: float = 0.0

    def add(self, gradient: Tensor, full: Tensor) -> None:
        """Add two pieces of equal shape, one of each gradient.

        The last axis is summed in the pieces' precision, the others in float64.
        """
        for name, a, b in (
            ("product", gradient, full),
            ("square", gradient, gradient),
            ("full_square", full, full),
        ):
            dots = torch.linalg.vecdot(a, b).double().sum()
            setattr(self, name, getattr(self, name) + dots.item())

    @property
    def cosine(self) -> float | None:
        """The cosine, between -1 and 1; None if one of the gradients is 0."""
        size = math.sqrt(self.square * self.full_square)
        return self.product / size if size > 0 else None


def signals_to_compare(vocab: int, hidden_size: int, more: Iterable[int] = ()) -> list[Signal]:
    """Return the signals to compare, poorest first; K from `SIZES` and ``more``, at most vocab."""
    sizes = sorted({size for size in (*SIZES, *more) if size <= vocab})
    topk = [Signal("topk", size) for size in sizes]
    return [Signal("text"), Signal("sampled"), *topk, Signal(HIDDEN, hidden_size)]


def objectives_to_compare(
    objective: ObjectiveConfig, all_divergences: bool
) -> dict[str, ObjectiveConfig]:
    """Return the objectives to compare by name: each divergence by itself, then the weighted sum.

    The divergences are those of the run, or all that exist. The temperature is 1, since only
    ``hidden`` allows another one, and all tokens have the same weight.
    """
    names = [name for name in TERMS if name != "cross_entropy"]
    if not all_divergences:
        names = objective.divergences
    shape = {"jsd_beta": objective.jsd_beta, "skew_alpha": objective.skew_alpha}
    objectives = {name: ObjectiveConfig.model_validate({name: 1.0, **shape}) for name in names}
    if len(objective.weights) > 1:
        objectives[ALL_TERMS] = ObjectiveConfig.model_validate({**objective.weights, **shape})
    return objectives or {"cross_entropy": CROSS_ENTROPY}


def objective_on(
    signal: Signal, objective: ObjectiveConfig, batch: MicroBatch, teacher: TeacherHead
) -> ChunkObjective:
    """Return the objective as a run with this signal computes it; ``batch`` has the signal."""
    if signal.kind == HIDDEN:
        return HiddenObjective(objective, batch, teacher)
    return TokenObjective(CROSS_ENTROPY if signal.kind == "text" else objective, batch)


@torch.no_grad()
def compare_logits(
    hidden: Tensor,
    head: OutputHead,
    positions: Positions,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> dict[Signal, OnLogits]:
    """Compare all signals at the student's logits, a chunk of positions at a time.

    hidden [N, D]: the inputs of the student's head at the positions. At most three tensors [n, V]
    exist at a time: the chunk's logits, the full gradient, and the gradient of one signal.
    """
    objectives = {
        signal: objective_on(signal, objective, positions.all_tokens(signal), teacher)
        for signal in positions.partitions
    }
    (full,) = (signal for signal in objectives if signal.kind == HIDDEN)
    cosines = {signal: CosineSums() for signal in objectives}
    figures: dict[Signal, list[Tensor]] = {signal: [] for signal in objectives}
    for rows, z in head.logit_chunks(hidden):
        for tokens in objectives.values():
            tokens.begin(rows)
        # `differentiate` overwrites the logits by their gradient, so each signal gets a copy.
        reference = z.clone()
        figures[full].append(objectives[full].differentiate(reference, rows))
        cosines[full].add(reference, reference)
        for signal, tokens in objectives.items():
            if signal is not full:
                gradient = z.clone()
                figures[signal].append(tokens.differentiate(gradient, rows))
                cosines[signal].add(gradient, reference)
    return {
        signal: _on_logits(signal, tokens, torch.cat(figures[signal]), cosines[signal])
        for signal, tokens in objectives.items()
    }


def _on_logits(
    signal: Signal, tokens: ChunkObjective, figures: Tensor, cosine: CosineSums
) -> OnLogits:
    sums = tokens.sums(tokens.total(figures), figures)
    mass = None
    if signal.kind != "text" and sums.student_tail_mass is not None:
        mass = 1.0 - sums.student_tail_mass.item() / len(figures)
    return OnLogits(sums.total.item() / len(figures), cosine.cosine, mass)


def compare_parameters(
    module: StudentModule,
    positions: Positions,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> dict[Signal, float | None]:
    """Return the cosine of every signal at the student's parameters, head included.

    Runs one forward and backward pass over the positions for each signal. Beside the parameters
    only the full gradient and that of one signal exist at a time, and on a GPU the full one is in
    host memory, from where one parameter's part after the other is fetched.
    """
    (full,) = (signal for signal in positions.partitions if signal.kind == HIDDEN)
    reference = [g.to("cpu") for g in gradient_of(module, positions, full, objective, teacher)]
    module.zero_grad(set_to_none=True)  # Else they would still be on the device.
    cosines: dict[Signal, float | None] = {}
    for signal in positions.partitions:
        sums = CosineSums()
        gradient: Sequence[Tensor] = reference
        if signal is not full:
            gradient = gradient_of(module, positions, signal, objective, teacher)
        for part, full_part in zip(gradient, reference, strict=True):
            sums.add(part, full_part.to(part.device))
        cosines[signal] = sums.cosine
    module.zero_grad(set_to_none=True)
    return cosines


def gradient_of(
    module: StudentModule,
    positions: Positions,
    signal: Signal,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> Sequence[Tensor]:
    """Return the gradients of the summed loss, one tensor for each trainable parameter.

    A parameter on which the loss does not depend has gradient 0.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # To None and not to zero: the caller may still use the tensors of another signal.
    module.zero_grad(set_to_none=True)
    for batch in positions.micro_batches(signal):
        tokens = objective_on(signal, objective, batch, teacher)
        head_loss(module.hidden_states(batch), module.head(), tokens).total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@torch.no_grad()
def hidden_states(module: StudentModule, positions: Positions) -> Tensor:
    """Return the inputs of the student's head at all positions, [N, D]."""
    return torch.cat([module.hidden_states(batch) for batch in positions.batches])


def loss_costs(
    hidden: Tensor,
    head: OutputHead,
    positions: Positions,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> dict[Signal, Cost]:
    """Measure the loss of each signal, with the gradients of hidden states [N, D] and head."""

    def loss(signal: Signal) -> Tensor:
        # New leaves each time: their gradients are freed with them, and are not added to the
        # student's.
        bias = None if head.bias is None else head.bias.detach().requires_grad_()
        new_head = replace(head, weight=head.weight.detach().requires_grad_(), bias=bias)
        tokens = objective_on(signal, objective, positions.all_tokens(signal), teacher)
        return head_loss(hidden.detach().requires_grad_(), new_head, tokens).total

    return {
        signal: cost_of(partial(loss, signal), hidden.device) for signal in positions.partitions
    }
