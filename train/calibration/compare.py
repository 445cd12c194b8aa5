"""What a poorer signal costs the student's gradient: each against the whole vocabulary's.

`cluster.calibrate` asks, for one student and one objective: the loss that a signal shows, and the
angle between its gradient and that of the `hidden` signal, from which the others are worked out on
the same positions. The angle is taken twice: at the student's logits, where a signal acts, and at
its parameters, where a step follows it. Plain torch.

Legend: N sampled positions, n of a chunk, V rows of the student's head, g the gradient of the mean
loss of a signal, f that of the full one.

    cosine = sum g f / sqrt(sum g^2 sum f^2)      over all N positions and V logits together, or
                                                  over all parameters together

A `text` signal has no probabilities, so no divergence: what stands beside the others there is cross
entropy on the drawn tokens, which is what such a run would be trained with.
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


class OnLogits(NamedTuple):
    """One signal at the student's logits.

    loss: nats a token. cosine: None where a gradient is 0. student_mass: the student's mass, mean
    over positions, on the outcomes that are not the tail; None where there is none.
    """

    loss: float
    cosine: float | None
    student_mass: float | None


@dataclass
class Angle:
    """Sums from which a cosine follows, added up piece by piece."""

    product: float = 0.0
    square: float = 0.0
    full_square: float = 0.0

    def add(self, gradient: Tensor, full: Tensor) -> None:
        """Pieces of equal shape; summed in float64 over all but the last axis."""
        for name, a, b in (
            ("product", gradient, full),
            ("square", gradient, gradient),
            ("full_square", full, full),
        ):
            dots = torch.linalg.vecdot(a, b).double().sum()
            setattr(self, name, getattr(self, name) + dots.item())

    @property
    def cosine(self) -> float | None:
        """Between -1 and 1; None where one of the two is 0."""
        size = math.sqrt(self.square * self.full_square)
        return self.product / size if size > 0 else None


def signals_to_compare(vocab: int, hidden_size: int, more: Iterable[int] = ()) -> list[Signal]:
    """The ladder, poorest first: K of `SIZES` and ``more`` within a vocabulary."""
    sizes = sorted({size for size in (*SIZES, *more) if size <= vocab})
    topk = [Signal("topk", size) for size in sizes]
    return [Signal("text"), Signal("sampled"), *topk, Signal(HIDDEN, hidden_size)]


def objectives_to_compare(
    objective: ObjectiveConfig, all_divergences: bool
) -> dict[str, ObjectiveConfig]:
    """Each divergence of the run by itself (or every one there is), and then its weighted sum.

    At temperature 1, the only one that all signals know; all tokens weigh the same.
    """
    names = [name for name in TERMS if name != "cross_entropy"]
    if not all_divergences:
        names = objective.divergences
    shape = {"jsd_beta": objective.jsd_beta, "skew_alpha": objective.skew_alpha}
    found = {name: ObjectiveConfig.model_validate({name: 1.0, **shape}) for name in names}
    if len(objective.weights) > 1:
        found[ALL_TERMS] = ObjectiveConfig.model_validate({**objective.weights, **shape})
    return found or {"cross_entropy": CROSS_ENTROPY}


def objective_on(
    signal: Signal, objective: ObjectiveConfig, batch: MicroBatch, teacher: TeacherHead
) -> ChunkObjective:
    """The objective as a run with this signal would take it; ``batch`` has the signal."""
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
    """Every signal at the student's logits, a chunk of positions at a time.

    hidden [N, D]: what the student's head is given at the positions. Beside the chunk's logits, its
    full gradient and that of one signal exist.
    """
    objectives = {
        signal: objective_on(signal, objective, positions.all_tokens(signal), teacher)
        for signal in positions.partitions
    }
    (full,) = (signal for signal in objectives if signal.kind == HIDDEN)
    angles = {signal: Angle() for signal in objectives}
    figures: dict[Signal, list[Tensor]] = {signal: [] for signal in objectives}
    for rows, z in head.logit_chunks(hidden):
        for tokens in objectives.values():
            tokens.begin(rows)
        reference = z.clone()
        figures[full].append(objectives[full].differentiate(reference, rows))
        angles[full].add(reference, reference)
        for signal, tokens in objectives.items():
            if signal is not full:
                gradient = z.clone()
                figures[signal].append(tokens.differentiate(gradient, rows))
                angles[signal].add(gradient, reference)
    return {
        signal: _on_logits(signal, tokens, torch.cat(figures[signal]), angles[signal])
        for signal, tokens in objectives.items()
    }


def _on_logits(signal: Signal, tokens: ChunkObjective, figures: Tensor, angle: Angle) -> OnLogits:
    sums = tokens.sums(tokens.total(figures), figures)
    mass = None
    if signal.kind != "text" and sums.student_tail_mass is not None:
        mass = 1.0 - sums.student_tail_mass.item() / len(figures)
    return OnLogits(sums.total.item() / len(figures), angle.cosine, mass)


def compare_parameters(
    module: StudentModule,
    positions: Positions,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> dict[Signal, float | None]:
    """The cosine of every signal at the student's parameters, head and body.

    One forward and backward pass over the positions for each signal; beside the parameters only the
    full gradient and that of one signal exist.
    """
    (full,) = (signal for signal in positions.partitions if signal.kind == HIDDEN)
    reference = gradient_of(module, positions, full, objective, teacher)
    cosines: dict[Signal, float | None] = {}
    for signal in positions.partitions:
        angle = Angle()
        gradient = reference
        if signal is not full:
            gradient = gradient_of(module, positions, signal, objective, teacher)
        for mine, theirs in zip(gradient, reference, strict=True):
            angle.add(mine, theirs)
        cosines[signal] = angle.cosine
    module.zero_grad(set_to_none=True)
    return cosines


def gradient_of(
    module: StudentModule,
    positions: Positions,
    signal: Signal,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> Sequence[Tensor]:
    """Gradients of the summed loss, one for each trainable parameter, 0 where it has no part."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)  # New tensors: the caller may hold those of another signal.
    for batch in positions.micro_batches(signal):
        tokens = objective_on(signal, objective, batch, teacher)
        head_loss(module.hidden_states(batch), module.head(), tokens).total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@torch.no_grad()
def hidden_states(module: StudentModule, positions: Positions) -> Tensor:
    """What the student's head is given at all positions, [N, D]."""
    return torch.cat([module.hidden_states(batch) for batch in positions.batches])


def loss_costs(
    hidden: Tensor,
    head: OutputHead,
    positions: Positions,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
) -> dict[Signal, Cost]:
    """What the loss of each signal takes, to the gradients of hidden states [N, D] and head."""

    def loss(signal: Signal) -> Tensor:
        # Leaves of their own: the gradients are given back, and none is added to another.
        bias = None if head.bias is None else head.bias.detach().requires_grad_()
        mine = replace(head, weight=head.weight.detach().requires_grad_(), bias=bias)
        tokens = objective_on(signal, objective, positions.all_tokens(signal), teacher)
        return head_loss(hidden.detach().requires_grad_(), mine, tokens).total

    return {
        signal: cost_of(partial(loss, signal), hidden.device) for signal in positions.partitions
    }
