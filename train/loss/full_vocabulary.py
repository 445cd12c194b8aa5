"""The objective over the full vocabulary, from the teacher's hidden states and output head.

`head_loss` gives `HiddenObjective` the student's logits of some tokens. It computes the teacher's
logits of the same tokens from their hidden states, compares the two, and forgets them. No [N, V]
tensor exists.

Legend: N response tokens, n of a chunk, b of a block of a chunk, V rows of the student's head, M
classes, F figures of a token, T temperature, z the student's logits, t the teacher's, p =
softmax(t / T), q = softmax(z / T), tau the tail. Values are in nats.

**Classes.** Each id below `TeacherHead.num_classes` is a class. Heads may have further rows, which
are padding. If the student's head has such rows, there is one more class, the tail, for the padding
of both heads. If it has none, the student cannot give padding any probability, and a divergence
from a teacher that does would be infinite or never reach 0. Then p is conditioned on the ids below
``num_classes``, and no class is added.

**Gradient.** With G_j = d divergence / d log q_j and S the sum of all G:

    d divergence / d z_j = (G_j - S q_j) / T                                j a class of its own
                         = (G_tau - S q_tau) softmax(z / T in the tail)_j / T     j in the tail

**Temperature.** ``objective.temperature`` divides the logits of both sides in every divergence, not
in cross entropy. The gradient of a divergence falls as 1 / T^2 for large T (Hinton et al. 2015,
arXiv:1503.02531); ``temperature_squared`` multiplies divergences by T^2.
"""

import torch
from torch import Tensor

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.loss.log_probs import row_blocks
from raystill.train.loss.objective import WeightedTerms, divergences, floored
from raystill.train.loss.teacher_head import TeacherHead

# About six arrays of the size of a block are in use at a time: together they stay in the cache.
CPU_BLOCK_BYTES = 1 << 18
DEVICE_BLOCK_BYTES = 1 << 26


class HiddenObjective(WeightedTerms):
    """The objective on the full vocabulary of one micro-batch; a `head_loss.ChunkObjective`.

    The figures of a token are those of `objective.WeightedTerms`. The tail masses are the
    probabilities of the padding: 0 where the head has none.
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
        # Cross entropy is at temperature 1, so it then needs a log-softmax of its own.
        self.needs_plain = self.temperature != 1.0 and self.cross_entropy > 0
        self.divergences = {
            has_tail: divergences(objective, has_tail=has_tail) for has_tail in (False, True)
        }
        # Most micro-batches have only weights of 1: this saves a pass over the logits.
        self.unweighted = self.temperature == 1.0 and micro_batch.unweighted
        self._memory = self.teacher.weight.new_empty(0, 0)
        self._first = 0
        self._unused = range(0)

    def begin(self, rows: slice) -> None:
        """Computes the teacher's products hidden W^T of a chunk, in memory that all chunks share.

        One product for the chunk is faster than one for each of the parts that `differentiate` is
        called with.
        """
        hidden, weight = self.hidden[rows], self.teacher.weight
        if len(self._memory) < len(hidden):
            self._memory = weight.new_empty(len(hidden), len(weight))
        self.teacher.products(hidden, self._memory[: len(hidden)])
        self._first, self._unused = rows.start, range(rows.start, rows.start + len(hidden))

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """The figures [n, F] of the tokens ``rows``; their logits z [n, V] become d total / d z.

        The products of a token are used up by this. Tokens whose products are not there, since
        `begin` was not called for them, become a chunk of their own.
        """
        figures = z.new_empty(len(z), self.num_figures)
        stop = rows.start + len(z)  # rows.stop can be beyond the last token.
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
        """The figures [b, F] of a block; its logits z [b, V] become d total / d z.

        t: the teacher's logits [b, rows of its head]; overwritten. targets, weights: [b, 1].
        """
        size = self.teacher.num_classes
        has_tail = z.shape[1] > size
        plain = torch.log_softmax(z, dim=1) if self.needs_plain else None
        log_q = torch.log_softmax(z if self.temperature == 1.0 else z / self.temperature, dim=1)
        nll = -(log_q if plain is None else plain).gather(1, targets)
        log_p, padding = self._log_p(t, has_tail)
        log_q, within_tail = fold_tail(log_q, size) if has_tail else (log_q, None)
        q = log_q.exp()
        values, grad = self._terms(log_p, log_q, q, nll, has_tail)
        masses = [padding, q[:, size:] if has_tail else torch.zeros_like(padding)]
        used_floor = torch.zeros_like(padding)
        if has_tail and "reverse_kl" in self.names:
            used_floor = floored(log_p[:, size:], log_q[:, size:])[1][:, None].to(z.dtype)
        total = grad.sum(dim=1, keepdim=True)
        if plain is None:  # At temperature 1 cross entropy is one more G, -factor at the target.
            total -= self.cross_entropy
        if within_tail is not None:
            torch.mul(within_tail, grad[:, size:] - total * q[:, size:], out=z[:, size:])
        torch.addcmul(grad[:, :size], q[:, :size], total, value=-1, out=z[:, :size])
        if not self.unweighted:
            z.mul_(weights / self.temperature)
        if plain is not None:
            z.addcmul_(plain.exp_(), weights, value=self.cross_entropy)
        if self.cross_entropy:
            z.scatter_add_(1, targets, -self.cross_entropy * weights)
        return torch.cat([*values, *masses, used_floor], dim=1)

    def _log_p(self, t: Tensor, has_tail: bool) -> tuple[Tensor, Tensor]:
        """log p [b, M] of the teacher's logits t, and the probability [b, 1] of its padding."""
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
        padding = torch.logsumexp(log_p[:, size:], dim=1, keepdim=True).exp()
        return torch.log_softmax(t[:, :size], dim=1), padding

    def _terms(
        self, log_p: Tensor, log_q: Tensor, q: Tensor, nll: Tensor, has_tail: bool
    ) -> tuple[list[Tensor], Tensor]:
        """The values [b, 1] of all terms, and the sum [b, M] of factor x G over the divergences."""
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
    """Merges the ids from ``size`` on into one class, the tail, in place.

    log_probs: [b, V], overwritten. Returns the log probabilities [b, size + 1], and the probability
    of each id of the tail given the tail, [b, V - size], which sums to 1.
    """
    inside = log_probs[:, size:]
    tail = torch.logsumexp(inside, dim=1, keepdim=True)
    within_tail = (inside - tail).exp_()
    inside[:, :1] = tail
    return log_probs[:, : size + 1], within_tail
