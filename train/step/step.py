"""One optimizer step over all workers, whatever rows each of them has.

The worker calls `GlobalStep.run` on every rank for every step, with this rank's rows, possibly
none. Apart from rounding, a step does not depend on the number of workers, nor on which of them has
a row. With w the weight of a token and d its objective, the loss is

    loss = sum over all tokens of all ranks of w d / W,    W = sum over the same tokens of w

So that ranks may have different numbers of rows, a step has three parts:

1. Rows change ranks, so that each has about as many tokens (`balance`). All ranks learn from all
   ranks: rows, tokens, weight, number of micro-batches, whether more rows follow, and whether to
   stop. With a ``hidden`` signal they also learn, once, how far the hidden states are from the log
   probabilities that the teacher gave.
2. Each rank runs as many forward and backward passes as the rank with the most micro-batches needs,
   of sizes as equal as its rows allow; where it has fewer rows than that, the last ones are dummies
   of one token with weight 0. So all ranks enter each reduction equally often.
3. The gradients of the undivided sums accumulate. DDP reduces them in the last pass, FSDP in each
   (`sharding.reduction`), and both *average* over the ranks. One multiplication by world_size / W,
   before clipping, gives the gradient of the loss.

Waits for: the other ranks, as rows are shared out, in one all-gather before the passes, in the
reductions of the gradients, and in one all-reduce of the figures. Unblocked by: every rank calling
`run`.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raystill.base.errors import RunError
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.rows import Row
from raystill.train.step.balance import idle_share, share_out
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import learning_rate
from raystill.train.step.ranks import Ranks
from raystill.train.step.result import StepResult, staleness, token_staleness
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import global_norm, is_sharded, reduction

logger = logging.getLogger(__name__)

TAIL_MASS_TO_WARN_OF = 0.1
"""The student's mean probability of the tail from which on a warning is logged."""
WARN_EVERY_STEPS = 100
NUM_FIXED_FIGURES = 6
"""Sums of a pass besides the terms: total, two tail masses, floored, input and padded tokens."""


NON_FINITE_REMEDY = (
    "start the run again with a lower training.learning_rate or a longer training.warmup_steps, "
    "which may change between starts, or with a higher training.skip_non_finite, which skips such "
    "steps; it goes on from its last checkpoint"
)


class NonFiniteLossError(RunError):
    """The loss or its gradient is not finite; the weights are still those of the step before."""


@dataclass(frozen=True)
class _Totals:
    """What all ranks learn from all ranks before a step's passes."""

    rows: int
    tokens: int
    weight: float
    num_passes: int
    any_more: bool
    any_stop: bool
    teacher_gap: float
    staleness: tuple[int, ...] = ()
    token_staleness: tuple[int, ...] = ()


class GlobalStep:
    """Runs the optimizer steps of one student on this rank, each together with all other ranks."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: BatchMaker,
        *,
        total_steps: int,
        world_size: int = 1,
        num_ages: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        """module: a `StudentModule`; with world_size > 1 in DDP or sharded.

        batches: makes the micro-batches, and has the settings that they and the step share.
        total_steps: steps of the whole run, the length of the learning-rate schedule.
        num_ages: length of `StepResult.staleness`; 0 where the student writes no rows.
        ranks: the group of all ranks; None: it is made when it is needed.
        """
        parallel = isinstance(module, DistributedDataParallel) or is_sharded(module)
        assert world_size == 1 or parallel, "several workers need the student in DDP or sharded"
        self.module = module
        self.optimizer = optimizer
        self.batches = batches
        self.training = batches.training
        self.objective = batches.objective
        self.signal_kind = batches.signal_kind
        self.device = batches.device
        self.teacher = batches.teacher
        self.total_steps = total_steps
        self.world_size = world_size
        self.num_ages = num_ages
        self._ranks = ranks
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._warned_at = -WARN_EVERY_STEPS
        names = {name for one in batches.objectives for name in one.weights}
        if any(one.router_balance for one in batches.objectives):
            names.add("router_balance")
            student = next(part for part in module.modules() if isinstance(part, StudentModule))
            for one in batches.objectives:
                student.require_routers(one)
        self._term_names = sorted(names)
        self._divergences = {name for one in batches.objectives for name in one.divergences}

    def run(self, step: int, rows: Sequence[Row], has_more: bool, stop: bool) -> StepResult:
        """Trains on this rank's ``rows`` of ``step`` (from 0). All ranks must call this.

        has_more: whether this rank may have rows of later steps. stop: whether this rank was asked
        to stop. Raises NonFiniteLossError where the loss or its gradient is not finite and no such
        step may be skipped, and RunError where the hidden states and the teacher's head do not give
        the log probabilities that the teacher gave: both on every rank, and before the weights
        change.
        """
        arrived = time.perf_counter()
        rows = self._share_out(rows)
        groups = self.batches.cut(rows)
        totals = self._gather_totals(step, rows, groups, has_more, stop)
        if self.teacher is not None:
            self.teacher.require_agreement(totals.teacher_gap)
        lr = learning_rate(step, self.total_steps, self.training)
        common: dict[str, Any] = {
            "step": step,
            "rows": totals.rows,
            "tokens": totals.tokens,
            "lr": lr,
            "any_more": totals.any_more,
            "any_stop": totals.any_stop,
            "staleness": totals.staleness,
            "token_staleness": totals.token_staleness,
            "others_wait_s": time.perf_counter() - arrived if self.world_size > 1 else 0.0,
        }
        if totals.weight == 0:  # Of all ranks, so all of them return here.
            return StepResult(trained=False, **common)
        started = time.perf_counter()
        if self.world_size > 1:
            groups = self.batches.spread(rows, groups, totals.num_passes)
        sums = self._accumulate(groups, totals.num_passes)
        figures = self._reduce_figures(sums, totals.weight, self._tokens(groups, totals.num_passes))
        # The reduced loss and the norm of reduced gradients are the same on every rank, and each is
        # read from the device anyway: so all ranks skip a step, or none, without another message.
        grad_norm = self._update(totals.weight, lr) if math.isfinite(figures["loss"]) else None
        seconds = time.perf_counter() - started
        not_finite = _what_is_not_finite(step, figures, grad_norm)
        if not_finite is None:
            self._warn_of_tail(step, figures["student_tail_mass"] or 0.0)
            return StepResult(
                trained=True, grad_norm=grad_norm, student_s=seconds, **common, **figures
            )
        if self.training.skip_non_finite == 0:
            raise NonFiniteLossError(f"{not_finite}; {NON_FINITE_REMEDY}")
        common |= {name: figures[name] for name in ("padding_fraction", "idle_share")}
        return StepResult(trained=False, student_s=seconds, not_finite=not_finite, **common)

    def _share_out(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This rank's rows of the step, once rows have changed ranks."""
        if self.world_size == 1:
            return rows
        if self._ranks is None:
            self._ranks = Ranks(dist.get_rank(), self.world_size)
        return share_out(rows, self._ranks)

    def _gather_totals(
        self, step: int, rows: Sequence[Row], groups: list[list[Row]], has_more: bool, stop: bool
    ) -> _Totals:
        """Part 1: one all-gather, after which every rank has the same totals."""
        tokens = sum(row.num_targets for row in rows)
        weight, gap = self.batches.weight(rows), self.batches.teacher_gap(groups)
        ages = staleness(step, rows, self.num_ages)
        ages += token_staleness(step, rows, self.num_ages)
        mine = [len(rows), tokens, weight, len(groups), has_more, stop, gap, *ages]
        # float64 holds every count exactly.
        local = torch.tensor(mine, dtype=torch.float64, device=self.device)
        gathered = [local]
        if self.world_size > 1:
            gathered = [torch.empty_like(local) for _ in range(self.world_size)]
            dist.all_gather(gathered, local)
        table = torch.stack(gathered).cpu()
        num_rows, num_tokens, weight = table[:, :3].sum(dim=0).tolist()
        # The maximum of a flag is whether any rank has set it.
        passes, more, stopped, gap = table[:, 3:7].amax(dim=0).tolist()
        counts = tuple(int(count) for count in table[:, 7:].sum(dim=0).tolist())
        return _Totals(
            int(num_rows),
            int(num_tokens),
            weight,
            int(passes),
            bool(more),
            bool(stopped),
            gap,
            counts[: self.num_ages],
            counts[self.num_ages :],
        )

    def _accumulate(self, groups: list[list[Row]], num_passes: int) -> Tensor:
        """Part 2: accumulates the gradients of the undivided sums over ``num_passes`` passes.

        Returns the sums of this rank's figures, float64, in the order of `_forward_backward`, and
        its input and padded tokens.
        """
        # None instead of zeros: the first pass then writes its gradients without an addition. Not
        # in DDP: passes before the last would write them beside the buckets, and hold them twice.
        in_buckets = isinstance(self.module, DistributedDataParallel)
        self.optimizer.zero_grad(set_to_none=not in_buckets)
        sums = torch.zeros(
            len(self._term_names) + NUM_FIXED_FIGURES, dtype=torch.float64, device=self.device
        )
        input_tokens = padded_tokens = 0
        for i in range(num_passes):
            batch = self.batches.make(groups[i]) if i < len(groups) else self.batches.dummy()
            input_tokens += batch.input_tokens
            padded_tokens += batch.padded_tokens
            with self._reduction(is_last=i == num_passes - 1):
                sums[:-2] += self._forward_backward(batch)
        # Known on the host: one copy a step, for which it does not wait.
        sums[-2:] = torch.tensor([input_tokens, padded_tokens]).to(sums, non_blocking=True)
        return sums

    def _reduction(self, is_last: bool) -> Any:
        """A context in which DDP reduces gradients in the last pass only; FSDP as configured."""
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if is_last else self.module.no_sync()
        return reduction(self.module, is_last, self.training.reduce_gradients == "once")

    def _forward_backward(self, batch: MicroBatch) -> Tensor:
        """One pass; returns its figures, float64: total, each term, the teacher's and the student's
        tail mass, floored tokens.
        """
        sums = self.module(batch, self.batches.objective_of(batch), self.teacher)
        sums.total.backward()
        zero = sums.total.new_zeros(())
        others = [
            zero if value is None else value
            for value in (sums.teacher_tail_mass, sums.student_tail_mass, sums.floored_tokens)
        ]
        terms = [sums.terms.get(name, zero) for name in self._term_names]
        # float64, since these are summed over passes and ranks.
        return torch.stack([f.double() for f in (sums.total.detach(), *terms, *others)])

    def _tokens(self, groups: list[list[Row]], num_passes: int) -> Tensor:
        """Positions of each pass, [ranks, passes]: this rank's, and 0 for the others."""
        table = torch.zeros(self.world_size, num_passes, dtype=torch.float64)
        mine = [float(self.batches.positions(group)) for group in groups]
        rank = dist.get_rank() if self.world_size > 1 else 0
        table[rank, : len(mine)] = torch.tensor(mine, dtype=torch.float64)
        return table

    def _reduce_figures(self, sums: Tensor, weight: float, tokens: Tensor) -> dict[str, Any]:
        """Sums the figures over all ranks and divides them by ``weight``: fields of `StepResult`.

        Every rank has the same sums. tokens: as `_tokens` gives them.
        """
        sums = torch.cat([sums, tokens.flatten().to(sums, non_blocking=True)])
        if self.world_size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        passes = sums[-tokens.numel() :].view_as(tokens).tolist()
        total, *rest = sums[: -tokens.numel()].tolist()
        terms, (teacher_tail, student_tail, floored, inputs, padded) = rest[:-5], rest[-5:]
        has_tail = self.signal_kind != "text"
        return {
            "loss": total / weight,
            "objective": {n: s / weight for n, s in zip(self._term_names, terms, strict=True)},
            "padding_fraction": 1.0 - inputs / padded,
            "idle_share": idle_share(passes, together=is_sharded(self.module)),
            "teacher_tail_mass": teacher_tail / weight if has_tail else None,
            "student_tail_mass": student_tail / weight if has_tail else None,
            "floored_tokens": int(floored) if "reverse_kl" in self._term_names else None,
        }

    def _warn_of_tail(self, step: int, student_tail: float) -> None:
        """Warns where the student gives much probability to ids that the signal does not have.

        The error of forward KL's gradient is bounded by the teacher's tail, and is small beside the
        gradient. That of the others is not: docs/signals.md has the bounds.
        """
        others = sorted(self._divergences - {"forward_kl"})
        if not others or self.signal_kind != "topk" or student_tail <= TAIL_MASS_TO_WARN_OF:
            return
        first = self.world_size == 1 or dist.get_rank() == 0
        if first and step - self._warned_at >= WARN_EVERY_STEPS:
            self._warned_at = step
            logger.warning(
                "step %d: %.2f of the student's probability is outside the teacher's top K, where "
                "the teacher's distribution is unknown: the gradient of %s is inexact; raise "
                "signal.top_k, or train with objective.forward_kl until student_tail_mass is "
                "below %s",
                step,
                student_tail,
                ", ".join(others),
                TAIL_MASS_TO_WARN_OF,
            )

    def _update(self, weight: float, lr: float) -> float:
        """Part 3: the division by the step's weight, clipping, the optimizer's step.

        Returns the norm of the gradient before clipping. One that is not finite leaves the weights
        and the optimizer as they are.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # Before clipping: max_grad_norm is about the gradient of the loss, not of undivided sums.
        torch._foreach_mul_(gradients, self.world_size / weight)
        bound = self.training.max_grad_norm
        norm = global_norm(gradients, self.device)
        if bound is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, bound, norm)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            return grad_norm
        # Set in every step, so a checkpoint needs no state of the schedule.
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return grad_norm


def _what_is_not_finite(step: int, figures: dict[str, Any], grad_norm: float | None) -> str | None:
    """The loss, or else the gradient norm, that is not finite, in words; None: both are finite."""
    if not math.isfinite(figures["loss"]):
        terms = ", ".join(f"{name} {value:.4g}" for name, value in figures["objective"].items())
        return f"the loss of step {step} is {figures['loss']} ({terms}); expected a finite number"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return f"the gradient norm of step {step} is {grad_norm}; expected a finite number"
    return None
