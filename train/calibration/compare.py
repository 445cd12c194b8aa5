"""Compares the gradients of poorer signals with that of the full signal, ``hidden``.

`calibrate` asks this for one student and one objective. For each signal it gives the loss, and the
cosine of the angle between the signal's gradient and the full one at the same positions. The cosine
is taken at the student's logits, which a signal acts on directly, and at its parameters, which an
optimizer step changes. Plain torch.

Several ranks compare one sharded student: the micro-batches of whole passes go round among them,
each adds up its shards of two gradients, and the three sums of a cosine are added over the ranks.
The head alone is rank 0's, which gets the hidden states of all.

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
from torch.distributed.tensor import DTensor

from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.batch import MicroBatch, dummy_micro_batch
from raystill.train.calibration.cost import Cost, cost_of
from raystill.train.calibration.positions import HIDDEN, Positions
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import TokenObjective
from raystill.train.loss.teacher_head import TeacherHead
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import gathering_passes

CROSS_ENTROPY = ObjectiveConfig(cross_entropy=1.0)
ALL_TERMS = "all terms together"
ALONE = Ranks()
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

    def over(self, ranks: Ranks) -> "CosineSums":
        """The sums over all ranks, each of which has other shards. Collective."""
        return CosineSums(**ranks.sum(vars(self)))

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
    ranks: Ranks = ALONE,
) -> dict[Signal, float | None]:
    """Return the cosine of every signal at the student's parameters, head included. Collective.

    Runs one forward and backward pass over the positions for each signal. Beside the parameters
    only the full gradient and that of one signal exist at a time, and on a GPU the full one is in
    host memory, from where one parameter's part after the other is fetched. Each rank has its
    shards of all of these.
    """
    (full,) = (signal for signal in positions.partitions if signal.kind == HIDDEN)
    inputs = (objective, teacher, ranks)
    reference = [g.to("cpu") for g in gradient_of(module, positions, full, *inputs)]
    module.zero_grad(set_to_none=True)  # Else they would still be on the device.
    cosines: dict[Signal, float | None] = {}
    for signal in positions.partitions:
        sums = CosineSums()
        gradient = reference
        if signal is not full:
            gradient = gradient_of(module, positions, signal, *inputs)
        for part, full_part in zip(gradient, reference, strict=True):
            sums.add(part, full_part.to(part.device))
        cosines[signal] = sums.over(ranks).cosine
    module.zero_grad(set_to_none=True)
    return cosines


def gradient_of(
    module: StudentModule,
    positions: Positions,
    signal: Signal,
    objective: ObjectiveConfig,
    teacher: TeacherHead,
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """Return the gradients of the summed loss, one tensor for each trainable parameter. Collective.

    A parameter on which the loss does not depend has gradient 0. Of a sharded student they are this
    rank's shards.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # To None and not to zero: the caller may still use the tensors of another signal.
    module.zero_grad(set_to_none=True)
    terms = CROSS_ENTROPY if signal.kind == "text" else objective
    head = teacher if signal.kind == HIDDEN else None
    width = teacher.hidden_size if head else 1
    dummy = dummy_micro_batch(signal.kind, width).to(positions.device)
    for batch in _share(list(positions.micro_batches(signal)), ranks):
        # By the whole forward pass, in which the head of a sharded student is whole. Its backward
        # pass divides by the number of ranks.
        (module(batch or dummy, terms, head).total * ranks.world_size).backward()
    return [_own(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]


@torch.no_grad()
def hidden_states(
    module: StudentModule, positions: Positions, ranks: Ranks = ALONE
) -> Tensor | None:
    """Return the inputs of the student's head at all positions, [N, D]. Collective.

    None on all ranks but the first.
    """
    dummy = dummy_micro_batch("text").to(positions.device)
    with gathering_passes(module) as run:
        own = [(batch, run(batch or dummy)) for batch in _share(positions.batches, ranks)]
    if ranks.world_size == 1:
        return torch.cat([states for _, states in own])
    parts = ranks.gather([states.cpu() for batch, states in own if batch is not None])
    if parts is None:
        return None
    order = range(len(positions.batches))
    states = [parts[i % ranks.world_size][i // ranks.world_size] for i in order]
    return torch.cat(states).to(positions.device)


def _share(batches: Sequence[MicroBatch], ranks: Ranks) -> list[MicroBatch | None]:
    """This rank's micro-batches: every world_size-th, and None where other ranks have one more."""
    passes = math.ceil(len(batches) / ranks.world_size)
    own: list[MicroBatch | None] = list(batches[ranks.rank :: ranks.world_size])
    return own + [None] * (passes - len(own))


def _own(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
