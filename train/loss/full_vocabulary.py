"""The objective over the full vocabulary, from the teacher's hidden states and output head.

`head_loss` calls `HiddenObjective` with the student's logits of some tokens: it rebuilds the
teacher's logits of the same tokens, compares the two, and forgets them. No [N, V] tensor exists.

Legend: n tokens of a chunk, b of a block, V rows of the student's head, O outcomes, T temperature,
z student logits, p teacher, q student = softmax(z / T). Everything in nats.

**Classes** are the ids below `TeacherHead.num_classes`, each for itself. Where the student's head
has further rows (padding) they are one outcome more, the tail, on each side. A student without
further rows cannot give them any mass: then the teacher is taken as p given an id below, for a
divergence from mass that no student can have would be infinite, or a constant.

With G_j = d divergence / d log q_j, and S the sum of all G:

    d / d z_j = (G_j - S q_j) / T                               j an outcome of its own
              = (G_tau - S q_tau) softmax(z / T in the tail)_j / T     j in the tail

``objective.temperature`` divides both sides' logits in every divergence, never in cross entropy.
The gradient of a divergence falls as 1 / T^2; ``temperature_squared`` multiplies it by T^2.
"""

import torch
from torch import Tensor

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.loss.log_probs import row_blocks
from raystill.train.loss.objective import WeightedTerms, divergences, floored
from raystill.train.loss.teacher_head import TeacherHead

# Half a dozen arrays of a block's size are in use at a time: together they stay in the cache.
CPU_BLOCK_BYTES = 1 << 18
DEVICE_BLOCK_BYTES = 1 << 26


class HiddenObjective(WeightedTerms):
    """The objective on the tokens of one micro-batch (a `head_loss.ChunkObjective`).

    Figures of a token as in `objective.TokenObjective`; the tail masses are of the padding, which
    is all that the outcomes leave out: 0 where neither head has any.
    """

    def __init__(
        self, objective: ObjectiveConfig, micro_batch: MicroBatch, teacher: TeacherHead
    ) -> None:
        super().__init__(objective, micro_batch)
        assert micro_batch.teacher_hidden is not None, "a hidden signal has hidden states"
        self.teacher = teacher
        self.hidden = micro_batch.teacher_hidden
        self.temperature = objective.temperature
        self.cross_entropy = self.factors.get("cross_entropy", 0.0)
        self.needs_plain = self.temperature != 1.0 and self.cross_entropy > 0
        self.divergences = {
            has_tail: divergences(objective, has_tail=has_tail) for has_tail in (False, True)
        }
        # Asked once: a token's weight is mostly 1, and each pass over the logits counts.
        self.unweighted = self.temperature == 1.0 and bool((self.token_weights == 1.0).all())
        self._memory = self.teacher.weight.new_empty(0, 0)
        self._first = 0
        self._unused = range(0)

    def begin(self, rows: slice) -> None:
        """The teacher's products for the tokens of a chunk, in memory that all chunks share."""
        hidden, weight = self.hidden[rows], self.teacher.weight
        if len(self._memory) < len(hidden):
            self._memory = weight.new_empty(len(hidden), len(weight))
        self.teacher.products(hidden, self._memory[: len(hidden)])
        self._first, self._unused = rows.start, range(rows.start, rows.start + len(hidden))

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """Figures [n, F] of some tokens; their logits z [n, V] become d total / d z.

        Tokens of no chunk that was begun, or that were differentiated in it, begin one.
        """
        figures = z.new_empty(len(z), self.num_figures)
        stop = rows.start + len(z)  # A last slice may go beyond the last token.
        if len(z) and not (rows.start in self._unused and stop - 1 in self._unused):
            self.begin(rows)
        products = self._memory[rows.start - self._first : stop - self._first]
        self._unused = range(stop, max(stop, self._unused.stop))
        targets, weights = self.targets[rows], self.token_weights[rows].to(z.dtype)
        for block in row_blocks(z, CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES):
            t = products[block].to(z.dtype)
            self.teacher.apply_transform(t)
            figures[block] = self._block(z[block], t, targets[block, None], weights[block, None])
        return figures

    def _block(self, z: Tensor, t: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Figures [b, F]; z [b, V] becomes the gradient. targets, weights [b, 1]; t is spent."""
        size = self.teacher.num_classes
        has_tail = z.shape[1] > size
        plain = torch.log_softmax(z, dim=1) if self.needs_plain else None
        log_q = torch.log_softmax(z if self.temperature == 1.0 else z / self.temperature, dim=1)
        nll = -(log_q if plain is None else plain).gather(1, targets)
        log_p, beyond = self._teacher(t, has_tail)
        log_q, shape = fold_tail(log_q, size) if has_tail else (log_q, None)
        q = log_q.exp()
        values, grad = self._terms(log_p, log_q, q, nll, has_tail)
        masses = [beyond, q[:, size:] if has_tail else torch.zeros_like(beyond)]
        used = torch.zeros_like(beyond)
        if has_tail and "reverse_kl" in self.names:
            used = floored(log_p[:, size:], log_q[:, size:])[1][:, None].to(z.dtype)
        total = grad.sum(dim=1, keepdim=True)
        if plain is None:  # Cross entropy is one more G, at the target.
            total -= self.cross_entropy
        if shape is not None:
            torch.mul(shape, grad[:, size:] - total * q[:, size:], out=z[:, size:])
        torch.addcmul(grad[:, :size], q[:, :size], total, value=-1, out=z[:, :size])
        if not self.unweighted:
            z.mul_(weights / self.temperature)
        if plain is not None:
            z.addcmul_(plain.exp_(), weights, value=self.cross_entropy)
        if self.cross_entropy:
            z.scatter_add_(1, targets, -self.cross_entropy * weights)
        return torch.cat([*values, *masses, used], dim=1)

    def _teacher(self, t: Tensor, has_tail: bool) -> tuple[Tensor, Tensor]:
        """log p [b, O], and the mass [b, 1] of rows that are no outcome of their own."""
        size = self.teacher.num_classes
        if self.temperature != 1.0:
            t.div_(self.temperature)
        log_p = torch.log_softmax(t, dim=1)
        if t.shape[1] == size:
            if has_tail:
                log_p = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)
            return log_p, t.new_zeros(len(t), 1)
        if has_tail:
            log_p = fold_tail(log_p, size)[0]
            return log_p, log_p[:, -1:].exp()
        beyond = torch.logsumexp(log_p[:, size:], dim=1, keepdim=True).exp()
        return torch.log_softmax(t[:, :size], dim=1), beyond

    def _terms(
        self, log_p: Tensor, log_q: Tensor, q: Tensor, nll: Tensor, has_tail: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Values [b, 1] of all terms, and the sum of the divergences' G [b, O]."""
        values, grad = [], None
        for name, factor in self.factors.items():
            if name == "cross_entropy":
                values.append(nll)
                continue
            value, part = self.divergences[has_tail][name](log_p, log_q, q)
            values.append(value[:, None])
            part = part if factor == 1.0 else part.mul_(factor)
            grad = part if grad is None else grad.add_(part)
        return values, torch.zeros_like(log_q) if grad is None else grad


def fold_tail(log_probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Log probabilities [b, V] with all from ``size`` on as one outcome: [b, size + 1], in place.

    Also how the tail's mass is shared among its ids, [b, V - size], summing to 1.
    """
    inside = log_probs[:, size:]
    tail = torch.logsumexp(inside, dim=1, keepdim=True)
    shape = (inside - tail).exp_()
    inside[:, :1] = tail
    return log_probs[:, : size + 1], shape
