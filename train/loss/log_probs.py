"""The student's log probabilities of K ids and of the tail, and the gradient of its logits.

`objective.TokenObjective` uses `gather_log_probs` and `put_gradient` on the logits of some tokens.
`partition_log_probs` is the same as one differentiable function, for measuring and for tests.

Legend: N tokens (n of a chunk), K ids kept for each token, V vocabulary, tau the tail, which is all
other ids, z logits, q = softmax(z). Logarithms are in nats.

Forward: log q_tau = logsumexp(z of the ids outside the K) - logsumexp(z). It is never computed as
log(1 - sum q), of which float32 keeps no digits where the tail is small.

Backward: let G_i, G_tau and g be the gradients of the loss with respect to log q_i, log q_tau and
log q_target, and S = sum_i G_i + G_tau + g. Then

    d loss / d z_j = G_j - S q_j                                       j among the K ids
                   = (G_tau - S q_tau) softmax(z outside the K ids)_j  j elsewhere
                     + g                                               added at j = target

Both directions work in the memory of the logits: `gather_log_probs` overwrites them with
exp(z - largest z outside the K ids), and `put_gradient` turns this into the gradient. So no second
[n, V] tensor exists, and each logit costs one exponential.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raystill.train.batch.partition import NO_ID

# A block of logits is read several times. It is so small that it stays in the cache (CPU: of each
# core) from one time to the next.
CPU_BLOCK_BYTES = 1 << 20
DEVICE_BLOCK_BYTES = 1 << 28


class PartitionLogits(NamedTuple):
    """Log probabilities of n tokens, and what `put_gradient` needs to go back from them.

    Attributes:
        log_q: [n, K + 1], nats; the last column is the tail. -inf where the slot has no id, and in
            the tail where no id is left for it.
        log_q_target: [n], nats.
        tail_sum: [n, 1], the sum of exp(z - largest z) over the ids outside the K.
        slots: The K ids of each token.
    """

    log_q: Tensor
    log_q_target: Tensor
    tail_sum: Tensor
    slots: "_Slots"


def gather_log_probs(z: Tensor, ids: Tensor, targets: Tensor) -> PartitionLogits:
    """The log probabilities of the ids, the tail and the target of each token.

    z: logits [n, V], float32 or float64; overwritten. ids: int64 [n, K], distinct within a token or
    ``NO_ID``. targets: int64 [n].
    """
    slots = _Slots(ids)
    inside, origin = slots.gather(z)
    z_target = (z.gather(1, targets[:, None]) - origin).squeeze(1)
    tail_top, tail_sum = torch.empty_like(origin), torch.empty_like(origin)
    hidden = slots.hide(z)
    for rows in _blocks(z):
        part = z[rows].scatter_(1, slots.ids[rows], hidden[rows])
        top = part.amax(dim=1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)  # No mass outside the K: -inf - -inf is NaN.
        part.sub_(top).exp_()
        tail_top[rows] = top
        tail_sum[rows] = part.sum(dim=1, keepdim=True)
    lse_out = tail_top - origin + tail_sum.log()
    lse = torch.logaddexp(torch.logsumexp(inside, dim=1, keepdim=True), lse_out)
    log_q = torch.cat([inside, lse_out], dim=1) - lse
    return PartitionLogits(log_q, z_target - lse.squeeze(1), tail_sum, slots)


def put_gradient(
    z: Tensor, log_probs: PartitionLogits, targets: Tensor, grad_log_q: Tensor, grad_target: Tensor
) -> None:
    """Overwrites z [n, V], as `gather_log_probs` left it, with the gradient of the logits.

    grad_log_q: [n, K + 1] and grad_target: [n], the gradients with respect to ``log_q`` and
    ``log_q_target``.
    """
    q, slots = log_probs.log_q.exp(), log_probs.slots
    total = (grad_log_q.sum(dim=1) + grad_target)[:, None]
    inside = grad_log_q[:, :-1] - total * q[:, :-1]
    outside = grad_log_q[:, -1:] - total * q[:, -1:]
    # The sum is 0 where no id is outside the K: all z that it would scale are overwritten below.
    scale = outside / log_probs.tail_sum.masked_fill(log_probs.tail_sum == 0, 1.0)
    inside = slots.fill(inside, z.gather(1, slots.ids) * scale)
    for rows in _blocks(z):
        part = z[rows].mul_(scale[rows])
        part.scatter_(1, slots.ids[rows], inside[rows])
        part.scatter_add_(1, targets[rows, None], grad_target[rows, None])


def partition_log_probs(
    logits: Tensor, ids: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log_q [N, K + 1] and log_q_target [N] as in `PartitionLogits`, differentiable.

    logits: [N, V] of any float dtype; not overwritten. ids: int64 [N, K], distinct within a token
    or ``NO_ID``. targets: int64 [N]; None: id 0. The results are in float32, or in float64 for
    float64 logits. Besides the logits and their gradient no [N, V] tensor exists: the backward pass
    computes each block again.
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
            log_probs = gather_log_probs(z, ids[rows], targets[rows])
            put_gradient(z, log_probs, targets[rows], grad_log_q[rows], grad_target[rows])
            grad[rows] = z
        return grad, None, None


class _Slots:
    """The K ids of each token as indices of the logits, also where a slot has no id.

    An index must exist in every slot, since gather and scatter have no mask. A slot with ``NO_ID``
    borrows an id that its token has, and writes there the value that this id gets anyway. A token
    without any id borrows id 0, whose value must then stay that of the tail.
    """

    def __init__(self, ids: Tensor) -> None:
        self.kept = ids != NO_ID
        lender, self.lender_slot = ids.max(dim=1, keepdim=True)
        self.none_kept = lender == NO_ID
        self.ids = torch.where(self.kept, ids, lender).clamp_min(0)

    def gather(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The logits at the ids minus the largest of them, [n, K], and that largest, [n, 1].

        -inf where a slot has no id. The differences are small numbers, so sums of them are not
        rounded to the precision that logits of a large magnitude have.
        """
        inside = z.gather(1, self.ids)
        origin = inside.amax(dim=1, keepdim=True)
        origin = origin.masked_fill(~torch.isfinite(origin), 0.0)  # -inf - -inf is NaN.
        return (inside - origin).masked_fill_(~self.kept, -torch.inf), origin

    def hide(self, z: Tensor) -> Tensor:
        """What to write at the ids so that only the tail is left: -inf, or the logit itself."""
        return torch.where(self.none_kept, z.gather(1, self.ids), -torch.inf)

    def fill(self, inside: Tensor, outside: Tensor) -> Tensor:
        """The gradients [n, K] to write at the ids.

        inside: the gradient of each id; a borrowed id gets its owner's. outside: the gradient as
        part of the tail, for tokens without any id.
        """
        lent = inside.gather(1, self.lender_slot)
        return torch.where(self.none_kept, outside, torch.where(self.kept, inside, lent))


def _blocks(z: Tensor) -> list[slice]:
    return row_blocks(z, CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES)


def row_blocks(z: Tensor, cpu_bytes: int, device_bytes: int) -> list[slice]:
    """Slices of the rows of z [n, V], each of about the given size in the dtype of the sums.

    On a CPU a block has ``cpu_bytes`` for each thread, and at least one row for each: torch deals
    the elements of a tensor out to its threads, and a row shared by two makes every operation wait
    for both.
    """
    on_cpu = z.device.type == "cpu"
    row_bytes = z.shape[1] * sum_dtype(z.dtype).itemsize
    rows = max(1, (cpu_bytes if on_cpu else device_bytes) // row_bytes)
    rows *= torch.get_num_threads() if on_cpu else 1
    return [slice(start, start + rows) for start in range(0, len(z), rows)]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums for logits of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
