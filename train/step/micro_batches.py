"""The micro-batches of a run: this rank's rows as one forward pass after the other.

`step` asks for them. Everything that is the same in every step (signal, vocabulary, weights, the
teacher's head, the device) is said once, here.

Micro-batches on their way to the device, beside the work it is doing.

On a GPU the host is ahead of the device: when the kernels of one pass are queued, the next
micro-batch is collated, put into pinned memory and copied on a stream of its own, so the copy goes
on while the device still computes. On a CPU there is nothing to copy.

How a row's weight is shared among its tokens, by what the teacher says of each.

`batch_maker` calls `share` on every micro-batch. Each row keeps the sum of its weights, so neither
the step's denominator nor the cut into micro-batches matters; a row of which all values are 0 keeps
its weights as they are.

Legend: N response tokens, B rows, K ids kept for each token, V rows of the teacher's head.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.batch import (
    MicroBatch,
    collate,
    cut_micro_batches,
    dummy_micro_batch,
    loss_weight,
    signal_column,
)
from raystill.train.batch.rows import Row
from raystill.train.loss.log_probs import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES, row_blocks
from raystill.train.loss.teacher_head import TeacherHead


class BatchMaker:
    """Makes micro-batches on one device, their tokens weighed."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        training: TrainingConfig,
        signal_kind: str,
        student_vocab: int,
        teacher: TeacherHead | None,
        device: torch.device,
        packed: bool = False,
    ) -> None:
        """student_vocab, packed as in `batch.collate`; teacher: with the ``hidden`` signal only."""
        assert (teacher is not None) == (signal_kind == "hidden"), "hidden states need their head"
        self._token_weights = objective.token_weights
        self._training = training
        self._signal_kind = signal_kind
        self._student_vocab = student_vocab
        self._teacher = teacher
        self._copies = DeviceCopies(device)
        self._packed = packed
        self._compared = False

    def cut(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of each forward pass."""
        budget = self._training.tokens_per_micro_batch
        return cut_micro_batches(rows, budget, self._packed)

    def weight(self, rows: Sequence[Row]) -> float:
        """Sum of the weights of all tokens of these rows."""
        truncated = self._token_weights.truncated_rows
        return loss_weight(rows, self._training.normalise, truncated)

    def make(self, rows: Sequence[Row]) -> MicroBatch:
        """One forward pass of the rows that `cut` put together."""
        batch = collate(
            rows,
            self._signal_kind,
            self._student_vocab,
            self._training.normalise,
            self._token_weights.truncated_rows,
            self._packed,
        )
        return share(self._copies.copy(batch), self._token_weights.by, self._teacher)

    def dummy(self) -> MicroBatch:
        """A pass without weight, for a rank that has fewer rows than another."""
        width = 1 if self._teacher is None else self._teacher.hidden_size
        return self._copies.copy(dummy_micro_batch(self._signal_kind, width))

    def teacher_gap(self, groups: list[list[Row]]) -> float:
        """`TeacherHead.mean_gap` of the first micro-batch this rank is given; from then on 0."""
        if self._teacher is None or self._compared or not groups:
            return 0.0
        self._compared = True
        batch = self.make(groups[0])
        assert batch.teacher_hidden is not None
        logprobs = signal_column(groups[0], "sampled_logprobs").to(batch.targets.device)
        return self._teacher.mean_gap(batch.teacher_hidden, batch.targets, logprobs)


class DeviceCopies:
    """Copies micro-batches to one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch on the device; what is queued there from now on waits for the copy."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.mapped(self._begin)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Memory of the copying stream must not be used again before the current one is done.
        moved.mapped(lambda tensor: _held(tensor, current))
        return moved

    def _begin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _held(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


@torch.no_grad()
def share(batch: MicroBatch, by: str, teacher: TeacherHead | None) -> MicroBatch:
    """The micro-batch with weights in proportion to ``by`` (none, entropy or confidence).

    teacher: the head of a ``hidden`` signal.
    """
    if by == "none":
        return batch
    values = _values(batch, by, teacher).double()
    assert batch.row_starts is not None, "collated"
    row = torch.searchsorted(batch.row_starts[1:].long(), batch.logit_index, right=True)
    sums, counts = (
        values.new_zeros(batch.num_rows).index_add_(0, row, each)
        for each in (values, torch.ones_like(values))
    )
    mean = (sums / counts)[row]
    factor = torch.where(mean > 0, values / mean, 1.0)
    return replace(batch, weights=(batch.weights * factor).float())


def _values(batch: MicroBatch, by: str, teacher: TeacherHead | None) -> Tensor:
    """[N]: the entropy of the teacher's outcomes, nats, or the probability of its best id."""
    if batch.partition is not None:
        log_p = batch.partition.log_p
        return _entropy(log_p) if by == "entropy" else log_p[:, :-1].amax(dim=1).exp()
    assert teacher is not None and batch.teacher_hidden is not None, "a text signal says nothing"
    parts = []
    for _, z in teacher.logit_chunks(batch.teacher_hidden):
        for block in row_blocks(z, CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES):
            log_p = torch.log_softmax(z[block], dim=1)
            parts.append(_entropy(log_p) if by == "entropy" else log_p.amax(dim=1).exp())
    return torch.cat(parts)


def _entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(dim=1)
