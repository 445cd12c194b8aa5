"""The micro-batches of a run: this rank's rows as one forward pass after the other.

`step` asks for them. Everything that is the same in every step (signal, vocabulary, weights, the
teacher's head, the device) is said once, here.
"""

from collections.abc import Sequence

import torch

from raystill.train.batch import (
    MicroBatch,
    Row,
    collate,
    cut_micro_batches,
    dummy_micro_batch,
    loss_weight,
    signal_column,
)
from raystill.train.config import ObjectiveConfig, TrainingConfig
from raystill.train.device_copies import DeviceCopies
from raystill.train.teacher_head import TeacherHead
from raystill.train.token_weights import share


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
