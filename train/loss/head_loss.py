"""The objective and its gradient from hidden states and output head, without [N, V] logits.

`student_module` calls `head_loss` inside its forward pass (so that DDP sees the head used there).
A chunk of tokens at a time, the logits are computed, differentiated in place and forgotten: the
gradient is formed in the forward pass, nothing is recomputed, and the three matrix products are
those of dense cross entropy. Memory beyond inputs and gradients is one chunk, in the precision of
the products; where softmax and sums have a wider one, a block of it is widened at a time.

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

from raystill.model.head import UNCHANGED, LogitTransform
from raystill.train.loss.log_probs import row_blocks, sum_dtype
from raystill.train.loss.objective import ObjectiveSums

# Large enough that reading W and adding to its gradient costs little beside the products.
CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 512 << 20
# Products of another number of rows can be a quarter slower (bfloat16, 682 against 672 rows).
ROWS_AT_ONCE = 16
# What is widened at a time: rows enough for small operations on them not to matter.
CPU_WIDE_BYTES = 1 << 20
DEVICE_WIDE_BYTES = 256 << 20


class ChunkObjective(Protocol):
    """An objective on the N tokens of one micro-batch, for any slice of them.

    ``num_figures``: F, how many figures it has of a token.
    """

    num_figures: int

    def begin(self, rows: slice) -> None:
        """The tokens of a chunk, all of which `differentiate` is given next, in parts."""

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
        dtype = sum_dtype(self.compute_dtype)
        for rows in chunks(len(hidden), len(weight), dtype, hidden.device):
            z = (hidden[rows].to(self.compute_dtype) @ weight.T).to(dtype)
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
    """Gradients of hidden, weight and bias (None where not wanted), added up chunk by chunk.

    The weight's is added in the precision of sums. Where the products have a narrower one, a first
    chunk stays as it is until there is a second: most micro-batches have one only.
    """

    def __init__(self, hidden: Tensor, head: OutputHead, wanted: list[bool]) -> None:
        self.dtype = sum_dtype(head.compute_dtype)
        self.inputs = (hidden, head.weight, head.bias)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.bias = torch.zeros_like(head.bias, dtype=self.dtype) if wanted[2] else None
        self.wants_weight = wanted[1]
        self.weight: Tensor | None = None
        self.product: Tensor | None = None

    @property
    def any_wanted(self) -> bool:
        return self.wants_weight or not (self.hidden is None and self.bias is None)

    def add(self, rows: slice, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """grad [n, V] of hidden W^T, with the hidden [n, D] and the weight that were multiplied."""
        if self.hidden is not None:
            self.hidden[rows] = grad @ weight
        if not self.wants_weight:
            return
        if grad.dtype == self.dtype:
            if self.weight is None:
                self.weight = torch.zeros_like(weight)
            self.weight.addmm_(grad.T, hidden)
            return
        if self.product is None:
            self.product = grad.T @ hidden
            return
        if self.weight is None:
            self.weight = self.product.to(self.dtype)
        add_widened(self.weight, torch.mm(grad.T, hidden, out=self.product))

    def finished(self) -> list[Tensor | None]:
        """In the precision of what they are gradients of."""
        gradients = (self.hidden, self._finished_weight(), self.bias)
        pairs = zip(gradients, self.inputs, strict=True)
        return [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]

    def _finished_weight(self) -> Tensor | None:
        """The sum over all chunks, in memory that is there already where that is possible."""
        wanted = self.inputs[1]
        if not self.wants_weight:
            return None
        if self.weight is None:
            return torch.zeros_like(wanted) if self.product is None else self.product
        if self.product is not None and self.product.dtype == wanted.dtype:
            return self.product.copy_(self.weight)
        return self.weight


def add_widened(total: Tensor, part: Tensor) -> None:
    """Adds a narrower part [V, D] to the total, by rows that stay in the cache once widened."""
    for rows in row_blocks(total, CPU_WIDE_BYTES, DEVICE_WIDE_BYTES):
        total[rows] += part[rows].to(total.dtype)


def _run_chunks(
    hidden: Tensor, head: OutputHead, objective: ChunkObjective, gradients: _Gradients
) -> Tensor:
    """Figures [N, F] of all tokens; their gradients are added to ``gradients``.

    Every chunk is computed in the same memory, in the compute precision.
    """
    weight = head.weight.to(head.compute_dtype)
    slices = chunks(len(hidden), len(weight), weight.dtype, hidden.device)
    length = slices[0].stop if slices else 0
    products = torch.empty(length, len(weight), dtype=weight.dtype, device=weight.device)
    # One tensor for all: small ones, kept between large ones that go, would break up the heap.
    figures = products.new_empty(len(hidden), objective.num_figures, dtype=gradients.dtype)
    for rows in slices:
        inputs = hidden[rows].to(weight.dtype)
        z = torch.mm(inputs, weight.T, out=products[: len(inputs)])
        objective.begin(rows)
        _differentiate(z, rows.start, head, objective, gradients, figures)
        if gradients.any_wanted:
            gradients.add(rows, z, inputs, weight)
    return figures


def _differentiate(
    z: Tensor,
    start: int,
    head: OutputHead,
    objective: ChunkObjective,
    gradients: _Gradients,
    figures: Tensor,
) -> None:
    """The products z [n, V] of a chunk that begins at token ``start`` become gradients.

    All at once where they have the precision of sums, else a widened block after the other. Writes
    the tokens' rows of ``figures`` [N, F].
    """
    narrow = z.dtype != gradients.dtype
    blocks = row_blocks(z, CPU_WIDE_BYTES, DEVICE_WIDE_BYTES) if narrow else [slice(0, len(z))]
    for block in blocks:
        product = z[block]
        part = product.to(gradients.dtype)
        squashed = head.apply_transform(part)
        rows = slice(start + block.start, start + block.start + len(part))
        figures[rows] = objective.differentiate(part, rows)
        if gradients.any_wanted:
            head.undo_transform(part, squashed)
            if gradients.bias is not None:
                gradients.bias += part.sum(dim=0)
            if narrow:
                product.copy_(part)


def chunks(num_tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Slices of equal length (the last may be shorter) whose logits are within the chunk size.

    From ``ROWS_AT_ONCE`` on the length is a multiple of it.
    """
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    most = max(1, limit // (vocab * dtype.itemsize))
    unit = ROWS_AT_ONCE if min(most, num_tokens) >= ROWS_AT_ONCE else 1
    most -= most % unit
    size = -(-num_tokens // max(1, -(-num_tokens // most)))
    size = min(num_tokens, size + -size % unit)
    return [slice(start, start + size) for start in range(0, num_tokens, max(1, size))]
