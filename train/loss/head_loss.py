"""The objective and its gradient from hidden states and the output head, without [N, V] logits.

`student.module` calls `head_loss` in its forward pass. The tokens are processed in chunks: the
logits of a chunk are computed, overwritten with their gradient, multiplied into the gradients of
the hidden states and of the head, and forgotten. So the gradient is ready after the forward pass,
nothing is computed twice, and there are three matrix products, as many as with full logits.
Memory beyond the inputs and their gradients is one chunk in the dtype of the products. Where
softmax and sums have a wider dtype, one block of the chunk at a time is converted to it.

A `ChunkObjective` turns the logits of some tokens into their loss and gradient: for partitions
`objective.TokenObjective`, for the full vocabulary `full_vocabulary.HiddenObjective`.

Legend: N response tokens, n of a chunk, D hidden size, V rows of the head, W the head's weight, F
figures of a token, such as the terms of its loss.
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

# Each chunk reads W and adds to its gradient once. Chunks are so large that this costs little in
# comparison with the products.
CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 512 << 20
# The number of tokens in a chunk is a multiple of this: a matrix product of another number of rows
# can take a quarter longer (bfloat16, 682 rows against 672).
ROWS_AT_ONCE = 16
# A block that is converted to the dtype of the sums: small enough for the cache, and large enough
# that the cost of launching its operations does not matter.
CPU_WIDE_BYTES = 1 << 20
DEVICE_WIDE_BYTES = 256 << 20


class ChunkObjective(Protocol):
    """An objective on the N tokens of one micro-batch, computed for slices of them.

    Attributes:
        num_figures: F, the number of figures of a token.
    """

    num_figures: int

    def begin(self, rows: slice) -> None:
        """Prepares a chunk: the next calls of `differentiate` are for parts of ``rows``."""

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """The figures [n, F] of these tokens; their logits z [n, V] become d total / d z."""

    def total(self, figures: Tensor) -> Tensor:
        """The scalar that is differentiated, from the figures [N, F] of all tokens."""

    def sums(self, total: Tensor, figures: Tensor) -> ObjectiveSums:
        """All sums of the micro-batch, with ``total`` as the differentiable one."""


@dataclass(frozen=True)
class OutputHead:
    """The last layer of a model: logits = transform(hidden weight^T + bias).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        transform: Scale and cap of the logits.
        compute_dtype: dtype of the matrix products. Softmax and sums are in float32, or in float64
            for float64; so is the gradient of the weight until all chunks are added.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = UNCHANGED
    compute_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logit_chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logits [n, V] of hidden states [N, D], one chunk after the other, without gradient.

        Yields the slice of tokens and its logits, in the dtype of softmax and sums.
        """
        weight = self.weight.to(self.compute_dtype)
        dtype = sum_dtype(self.compute_dtype)
        for rows in chunks(len(hidden), len(weight), dtype, hidden.device):
            z = (hidden[rows].to(self.compute_dtype) @ weight.T).to(dtype)
            self.apply_transform(z)
            yield rows, z

    def apply_transform(self, z: Tensor) -> Tensor | None:
        """Applies bias, scale and cap to z [n, V] in place.

        Returns tanh(z / cap) for `undo_transform`; None where there is no cap.
        """
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
        """Turns the gradient of the logits [n, V] into that of hidden weight^T + bias, in place.

        squashed: what `apply_transform` returned.
        """
        if squashed is not None:  # d (cap tanh(z / cap)) / d z = 1 - tanh(z / cap)^2
            grad.mul_(squashed.square_().neg_().add_(1.0))
        if self.transform.scale != 1.0:
            grad.mul_(self.transform.scale)


@torch.compiler.disable  # Its gradient is written by hand, in place: nothing for autograd to trace.
def head_loss(hidden: Tensor, head: OutputHead, objective: ChunkObjective) -> ObjectiveSums:
    """The sums of the objective over hidden states [N, D].

    The total is differentiable with respect to the hidden states and the head, once. No gradient is
    computed for a frozen head. A head that is tied to the embeddings gets its part of their common
    gradient here.
    """
    total, figures = _HeadLoss.apply(
        hidden, head.weight, head.bias, head, objective, torch.is_grad_enabled()
    )
    return objective.sums(total, figures)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them.

    It gives them away, so it can run only once.
    """

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
        # Nothing here keeps a reference, so autograd can make the weight's gradient the parameter's
        # .grad without a copy of [V, D].
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, (
            "the head's loss was differentiated a second time; run the forward pass again"
        )
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients]
        return *scaled, None, None, None


class _Gradients:
    """The gradients of hidden states, weight and bias, added up over the chunks.

    wanted: for which of the three a gradient is computed. The gradient of the weight is added up in
    the dtype of the sums. Where the products have a narrower dtype, the first chunk's is converted
    only when there is a second chunk: most micro-batches have just one.
    """

    def __init__(self, hidden: Tensor, head: OutputHead, wanted: list[bool]) -> None:
        self.dtype = sum_dtype(head.compute_dtype)
        self.inputs = (hidden, head.weight, head.bias)
        # Uninitialised: each chunk writes its own rows. The others are sums over all chunks.
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.bias = torch.zeros_like(head.bias, dtype=self.dtype) if wanted[2] else None
        self.wants_weight = wanted[1]
        self.weight: Tensor | None = None
        self.product: Tensor | None = None

    @property
    def any_wanted(self) -> bool:
        return self.wants_weight or not (self.hidden is None and self.bias is None)

    def add(self, rows: slice, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds a chunk: grad [n, V] of the product hidden W^T, and its factors hidden and weight.

        rows: the slice of tokens. hidden: [n, D]. weight: [V, D], in the dtype of the products.
        """
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
        """The three gradients, each in the dtype of its tensor; None where it is not wanted."""
        gradients = (self.hidden, self._finished_weight(), self.bias)
        pairs = zip(gradients, self.inputs, strict=True)
        return [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]

    def _finished_weight(self) -> Tensor | None:
        """The sum over all chunks, in memory that is already allocated where its dtype fits."""
        wanted = self.inputs[1]
        if not self.wants_weight:
            return None
        if self.weight is None:
            return torch.zeros_like(wanted) if self.product is None else self.product
        if self.product is not None and self.product.dtype == wanted.dtype:
            return self.product.copy_(self.weight)
        return self.weight


def add_widened(total: Tensor, part: Tensor) -> None:
    """Adds a part [V, D] of a narrower dtype to the total, in blocks of rows that fit the cache."""
    for rows in row_blocks(total, CPU_WIDE_BYTES, DEVICE_WIDE_BYTES):
        total[rows] += part[rows].to(total.dtype)


def _run_chunks(
    hidden: Tensor, head: OutputHead, objective: ChunkObjective, gradients: _Gradients
) -> Tensor:
    """The figures [N, F] of all tokens; adds the gradients of each chunk to ``gradients``.

    All chunks use the same memory for their logits.
    """
    weight = head.weight.to(head.compute_dtype)
    slices = chunks(len(hidden), len(weight), weight.dtype, hidden.device)
    length = slices[0].stop if slices else 0
    products = torch.empty(length, len(weight), dtype=weight.dtype, device=weight.device)
    # One tensor for all chunks: small tensors that stay, allocated between large ones that are
    # freed, would fragment the memory.
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
    """Turns the products z [n, V] = hidden W^T of a chunk into their gradient, in place.

    start: the first token of the chunk. Also writes the chunk's rows of ``figures`` [N, F] and adds
    to the gradient of the bias. Where z has a narrower dtype than the sums, one block of it after
    the other is converted.
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
    """Slices of the tokens whose logits [n, vocab] have at most the chunk size of the device.

    They have the same length, except the last, which may be shorter. A length of ``ROWS_AT_ONCE``
    or more is a multiple of it.
    """
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    most = max(1, limit // (vocab * dtype.itemsize))
    unit = ROWS_AT_ONCE if min(most, num_tokens) >= ROWS_AT_ONCE else 1
    most -= most % unit
    num_chunks = max(1, -(-num_tokens // most))  # -(-a // b) is a / b rounded up.
    size = -(-num_tokens // num_chunks)
    size = min(num_tokens, size + -size % unit)
    return [slice(start, start + size) for start in range(0, num_tokens, max(1, size))]
