"""The objective and its gradient from hidden states and output head, without [N, V] logits.

`student_module` calls `head_loss` inside its forward pass (so that DDP sees the head used there).
A chunk of tokens at a time, the logits are computed, differentiated in place and forgotten: the
gradient is formed in the forward pass, nothing is recomputed, and the three matrix products are
those of dense cross entropy. Memory beyond inputs and gradients is one chunk.

Legend: N response tokens, n of a chunk, D hidden size, V rows of the head, W the head's weight.

What a signal is compared with is not known here: a `ChunkObjective` turns the logits of some tokens
into their values and gradient. `objective.TokenObjective` does so for partitions; one that rebuilds
the teacher's logits from its hidden states chunk by chunk fits in the same place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raystill.train.logit_transform import UNCHANGED, LogitTransform
from raystill.train.objective import ObjectiveSums
from raystill.train.outcomes import sum_dtype

# Large enough that reading W and adding to its gradient costs little beside the products.
CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 512 << 20


class ChunkObjective(Protocol):
    """An objective on the N tokens of one micro-batch, for any slice of them."""

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """Figures [n, F] of these tokens; their logits z [n, V] become d total / d z."""

    def total(self, figures: Tensor) -> Tensor:
        """What is differentiated, a scalar, from the figures [N, F] of all tokens."""

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """The sums of the micro-batch around the differentiable total."""


@dataclass(frozen=True)
class OutputHead:
    """logits = transform(hidden weight^T + bias): weight [V, D], bias [V] or None.

    compute_dtype: precision of the matrix products; softmax and sums are in float32 (float64 for
    float64), and so is the gradient of the weight until all chunks are added.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = UNCHANGED
    compute_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logit_chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] in the precision of sums, chunk by chunk, for measuring; hidden [N, D]."""
        weight = self.weight.to(self.compute_dtype)
        for rows in chunks(len(hidden), len(weight), self.compute_dtype, hidden.device):
            z = (hidden[rows].to(self.compute_dtype) @ weight.T).to(sum_dtype(self.compute_dtype))
            self.apply_transform(z)
            yield rows, z

    def apply_transform(self, z: Tensor) -> Tensor | None:
        """Bias, scale and cap on z [n, V] in place; returns tanh(z / cap) where there is a cap."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.transform.scale != 1.0:
            z.mul_(self.transform.scale)
        if self.transform.softcap is None:
            return None
        squashed = z.div_(self.transform.softcap).tanh_().clone()
        z.mul_(self.transform.softcap)
        return squashed

    def undo_transform(self, grad: Tensor, squashed: Tensor | None) -> None:
        """The gradient of the logits [n, V] to that of hidden weight^T + bias, in place."""
        if squashed is not None:  # d cap / d z = 1 - tanh^2
            grad.mul_(squashed.square_().neg_().add_(1.0))
        if self.transform.scale != 1.0:
            grad.mul_(self.transform.scale)


@torch.compiler.disable
def head_loss(hidden: Tensor, head: OutputHead, objective: ChunkObjective) -> ObjectiveSums:
    """The sums of the objective over hidden states [N, D], differentiable in hidden and the head.

    A frozen head costs no weight gradient. A head that is tied to the embeddings gets this part of
    its gradient here and the other from them.
    """
    total, figures = _HeadLoss.apply(
        hidden, head.weight, head.bias, head, objective, torch.is_grad_enabled()
    )
    return objective.sums(total, figures)


class _HeadLoss(torch.autograd.Function):
    """Keeps the finished gradients for the backward pass, which can therefore run once only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        objective: ChunkObjective,
        enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [enabled and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, head, wanted)
        figures = _run_chunks(hidden, head, objective, gradients)
        ctx.gradients = gradients.finished()
        ctx.mark_non_differentiable(figures)
        return objective.total(figures), figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # Given away, not lent: the weight's gradient can become .grad itself, without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the head's loss was differentiated before: run it again"
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients]
        return *scaled, None, None, None


class _Gradients:
    """Gradients of hidden, weight and bias (None where not wanted), added up chunk by chunk."""

    def __init__(self, hidden: Tensor, head: OutputHead, wanted: list[bool]) -> None:
        dtype = sum_dtype(head.compute_dtype)
        self.inputs = (hidden, head.weight, head.bias)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=dtype) if wanted[2] else None

    @property
    def any_wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, rows: slice, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """grad [n, V] of hidden W^T, with the hidden [n, D] and the weight that were multiplied."""
        if self.hidden is not None:
            self.hidden[rows] = grad @ weight
        if self.weight is not None and grad.dtype == self.weight.dtype:
            self.weight.addmm_(grad.T, hidden)
        elif self.weight is not None:
            self.weight += grad.T @ hidden

    def finished(self) -> list[Tensor | None]:
        """In the precision of what they are gradients of."""
        pairs = zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        return [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]


def _run_chunks(
    hidden: Tensor, head: OutputHead, objective: ChunkObjective, gradients: _Gradients
) -> Tensor:
    """Figures [N, F] of all tokens; their gradients are added to ``gradients``.

    Every chunk is computed in the same memory: the products in the compute precision, and, where
    that is narrower, a copy in the precision of sums.
    """
    dtype, weight = sum_dtype(head.compute_dtype), head.weight.to(head.compute_dtype)
    slices = chunks(len(hidden), len(weight), head.compute_dtype, hidden.device)
    length = slices[0].stop if slices else 0
    products = torch.empty(length, len(weight), dtype=weight.dtype, device=weight.device)
    wide = products if weight.dtype == dtype else torch.empty_like(products, dtype=dtype)
    figures = []
    for rows in slices:
        inputs = hidden[rows].to(weight.dtype)
        product, z = products[: len(inputs)], wide[: len(inputs)]
        torch.mm(inputs, weight.T, out=product)
        z.copy_(product)  # Nothing where both are one.
        squashed = head.apply_transform(z)
        figures.append(objective.differentiate(z, rows))
        if not gradients.any_wanted:
            continue
        head.undo_transform(z, squashed)
        if gradients.bias is not None:
            gradients.bias += z.sum(dim=0)
        gradients.add(rows, product.copy_(z), inputs, weight)
    if not figures:  # No token: how many figures there are is known all the same.
        return objective.differentiate(wide, slice(0, 0))
    return torch.cat(figures)


def chunks(
    num_tokens: int, vocab: int, compute_dtype: torch.dtype, device: torch.device
) -> list[slice]:
    """Slices of equal length (the last may be shorter) whose logits are within the chunk size."""
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    most = max(1, limit // (vocab * sum_dtype(compute_dtype).itemsize))
    size = -(-num_tokens // max(1, -(-num_tokens // most)))
    return [slice(start, start + size) for start in range(0, num_tokens, max(1, size))]
