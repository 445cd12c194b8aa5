"""The student's log probabilities on a partition, exact in the tail, and their gradient.

`objective` and, chunk by chunk, `head_loss` call it. Nothing goes through 1 - sum q.

Legend: N tokens (n of a block), K ids kept for each, V vocabulary, tau the tail: all other ids.
z logits, q their softmax. Everything in nats.

Forward: log q_tau = logsumexp(z outside the ids) - logsumexp(z), never log(1 - sum q), which in
float32 has lost its digits. Backward, for gradients G_i of log q_i, G_tau of log q_tau and g of
log q_target, with S = sum_i G_i + G_tau + g:

    d / d z_j = G_j - S q_j                                    j among the K ids
              = (G_tau - S q_tau) softmax(z outside the ids)_j j elsewhere
                + g                                            at j = target

Both work in the logits' own memory: `gather_log_probs` leaves exp(z - the largest outside) there,
which `put_gradient` turns into the gradient. So each logit costs one exponential.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raystill.train.batch.partition import NO_ID

# A block of logits is read several times: on a CPU each core's share stays in its cache meanwhile.
CPU_BLOCK_BYTES = 1 << 20
DEVICE_BLOCK_BYTES = 1 << 28


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of softmax and sums for logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class PartitionLogits(NamedTuple):
    """What `gather_log_probs` found, and what `put_gradient` needs of it.

    log_q [n, K + 1] (last column the tail; -inf at ``NO_ID`` slots and where no id is left for the
    tail), log_q_target [n]; tail_sum [n, 1] = sum of exp(z - the largest outside).
    """

    log_q: Tensor
    log_q_target: Tensor
    tail_sum: Tensor
    slots: "_Slots"


def gather_log_probs(z: Tensor, ids: Tensor, targets: Tensor) -> PartitionLogits:
    """PartitionLogits of the logits z [n, V], float32 or float64, whose memory is overwritten.

    ids int64 [n, K], distinct or ``NO_ID``; targets int64 [n].
    """
    slots = _Slots(ids)
    inside, origin = slots.gather(z)
    z_target = (z.gather(1, targets[:, None]) - origin).squeeze(1)
    tail_top, tail_sum = torch.empty_like(origin), torch.empty_like(origin)
    hidden = slots.hide(z)
    for rows in _blocks(z):
        part = z[rows].scatter_(1, slots.ids[rows], hidden[rows])
        top = part.amax(dim=1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        part.sub_(top).exp_()
        tail_top[rows] = top
        tail_sum[rows] = part.sum(dim=1, keepdim=True)
    lse_out = tail_top - origin + tail_sum.log()
    lse = torch.logaddexp(torch.logsumexp(inside, dim=1, keepdim=True), lse_out)
    log_q = torch.cat([inside, lse_out], dim=1) - lse
    return PartitionLogits(log_q, z_target - lse.squeeze(1), tail_sum, slots)


def put_gradient(
    z: Tensor, outcomes: PartitionLogits, targets: Tensor, grad_log_q: Tensor, grad_target: Tensor
) -> None:
    """Overwrites what `gather_log_probs` left in z [n, V] with the gradient of the logits."""
    q, slots = outcomes.log_q.exp(), outcomes.slots
    total = (grad_log_q.sum(dim=1) + grad_target)[:, None]
    inside = grad_log_q[:, :-1] - total * q[:, :-1]
    outside = grad_log_q[:, -1:] - total * q[:, -1:]
    # Where nothing is outside the ids there is nothing to scale.
    scale = outside / outcomes.tail_sum.masked_fill(outcomes.tail_sum == 0, 1.0)
    inside = slots.fill(inside, z.gather(1, slots.ids) * scale)
    for rows in _blocks(z):
        part = z[rows].mul_(scale[rows])
        part.scatter_(1, slots.ids[rows], inside[rows])
        part.scatter_add_(1, targets[rows, None], grad_target[rows, None])


def partition_log_probs(
    logits: Tensor, ids: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log_q [N, K + 1] and log_q_target [N] of logits [N, V], as in `PartitionLogits`.

    The logits may have any float dtype.

    Both float32, or float64 for float64 logits, and differentiable. ids int64 [N, K], distinct or
    ``NO_ID``; targets int64 [N] (default: id 0). Beside the logits and their gradient no [N, V]
    tensor exists.
    """
    if targets is None:
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return _PartitionLogProbs.apply(logits, ids, targets)


class _PartitionLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, ids, targets)
        dtype = sum_dtype(logits.dtype)
        log_q = logits.new_empty(len(logits), ids.shape[1] + 1, dtype=dtype)
        log_q_target = logits.new_empty(len(logits), dtype=dtype)
        for rows in _blocks(logits):
            z = logits[rows].to(dtype, copy=True)
            log_q[rows], log_q_target[rows], *_ = gather_log_probs(z, ids[rows], targets[rows])
        return log_q, log_q_target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_q: Tensor, grad_target: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, targets = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            z = logits[rows].to(grad_log_q.dtype, copy=True)
            outcomes = gather_log_probs(z, ids[rows], targets[rows])
            put_gradient(z, outcomes, targets[rows], grad_log_q[rows], grad_target[rows])
            grad[rows] = z
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

    def gather(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, K] at the ids, relative to the largest of them, and that origin [n, 1].

        -inf where a slot has no id. Sums of logits taken from a near origin are not rounded at
        the logits' own magnitude.
        """
        inside = z.gather(1, self.ids)
        origin = inside.amax(dim=1, keepdim=True)
        origin = origin.masked_fill(~torch.isfinite(origin), 0.0)
        return (inside - origin).masked_fill_(~self.kept, -torch.inf), origin

    def hide(self, z: Tensor) -> Tensor:
        """What replaces the logits at the ids so that only the tail is left: -inf."""
        return torch.where(self.none_kept, z.gather(1, self.ids), -torch.inf)

    def fill(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Gradients [n, K] to write at the ids: the kept slots' own, the tail's where none is."""
        lent = inside.gather(1, self.lender_slot)
        return torch.where(self.none_kept, outside, torch.where(self.kept, inside, lent))


def _blocks(z: Tensor) -> list[slice]:
    return row_blocks(z, CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES)


def row_blocks(z: Tensor, cpu_bytes: int, device_bytes: int) -> list[slice]:
    """Row slices of z [n, V] that have about the given size in the precision of the sums.

    ``cpu_bytes`` is the share of each core, a row at least: torch deals the elements of a block out
    to its threads, and a row that is cut makes each operation wait for another core.
    """
    on_cpu = z.device.type == "cpu"
    row_bytes = z.shape[1] * sum_dtype(z.dtype).itemsize
    rows = max(1, (cpu_bytes if on_cpu else device_bytes) // row_bytes)
    rows *= torch.get_num_threads() if on_cpu else 1
    return [slice(start, start + rows) for start in range(0, len(z), rows)]
