"""This rank's rows of a step as micro-batches on its device.

`BatchMaker` has everything that is the same in every step: the kind of the signal, the student's
vocabulary, how tokens are weighed, the teacher's head, the device. `step` asks it for one
micro-batch after the other. `DeviceCopies` copies them to the device while the device still
computes the one before. `share` divides the weight of each row among its tokens, in proportion to
what the teacher's distribution says about them.

Legend: N response tokens of a micro-batch that have a loss, B rows, K teacher ids kept for each
token.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raystill.config.objective import ObjectiveConfig, TokenWeightsConfig
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
    """Makes the micro-batches of a run on one device, with the weights of their tokens.

    Attributes:
        training: How many tokens a micro-batch has, and how rows are weighed.
        objective: The loss, and how the weight of a row is divided among its tokens.
        student_written: The same for rows that the student wrote; None where it writes none.
        signal_kind: ``text``, ``sampled``, ``topk`` or ``hidden``.
        teacher: The teacher's head, with the signal ``hidden`` only.
        device: Where the micro-batches are.
    """

    def __init__(
        self,
        training: TrainingConfig,
        objective: ObjectiveConfig,
        *,
        signal_kind: str,
        student_vocab: int,
        teacher: TeacherHead | None = None,
        device: torch.device | str = "cpu",
        packed: bool = False,
        shared: bool = False,
        student_written: ObjectiveConfig | None = None,
    ) -> None:
        """signal_kind, student_vocab, packed, shared: as in `batch.collate`.

        teacher: the teacher's head, on the device; with the signal ``hidden`` only.
        """
        assert (teacher is not None) == (signal_kind == "hidden"), (
            "the teacher's head is needed with the signal hidden, and only there"
        )
        self.training = training
        self.objective = objective
        self.student_written = student_written
        self.signal_kind = signal_kind
        self.teacher = teacher
        self.device = torch.device(device)
        self._student_vocab = student_vocab
        self._copies = DeviceCopies(self.device)
        self._packed, self._shared = packed, shared
        self._checked = False

    def cut(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of each forward pass, as `batch.cut_micro_batches` groups them.

        All rows of one have the same objective: the student or the teacher wrote them.
        """
        return self._cut(rows, self.training.tokens_per_micro_batch)

    def _cut(self, rows: Sequence[Row], budget: int) -> list[list[Row]]:
        return [
            group
            for part in by_origin(rows)
            for group in cut_micro_batches(part, budget, self._packed)
        ]

    def spread(self, rows: Sequence[Row], groups: list[list[Row]], most: int) -> list[list[Row]]:
        """The rows in at most ``most`` forward passes of sizes as equal as these rows allow.

        groups: as `cut` returned them; most: no fewer. A rank whose rows need fewer passes than
        another's would have dummies to run otherwise, for which layers are gathered too. The
        largest comes first, on every rank: they wait for each other in each.
        """
        if not groups:
            return groups
        # The least budget that needs no more passes than there are.
        low, high = max(row.num_inputs for row in rows), max(map(self.positions, groups))
        while high - low > high // 64:
            middle = (low + high) // 2
            found = self._cut(rows, middle)
            if len(found) <= most:
                groups, high = found, middle
            else:
                low = middle + 1
        return sorted(groups, key=self.positions, reverse=True)

    def positions(self, group: Sequence[Row]) -> int:
        """Positions of the forward pass of a group, padding included."""
        inputs = [row.num_inputs for row in group]
        return sum(inputs) if self._packed else len(inputs) * max(inputs)

    def objective_of(self, batch: MicroBatch) -> ObjectiveConfig:
        """The objective of a micro-batch, by who wrote its responses."""
        return self._objective(batch.student_written)

    @property
    def objectives(self) -> list[ObjectiveConfig]:
        """All objectives of the run."""
        other = self.student_written
        return [self.objective] if other is None else [self.objective, other]

    def weight(self, rows: Sequence[Row]) -> float:
        """The sum of the weights of all tokens of these rows, as `batch.loss_weight`."""
        normalise, total = self.training.normalise, 0.0
        for part in by_origin(rows):
            truncated = self._token_weights(part).truncated_rows
            total += loss_weight(part, normalise, truncated)
        return total

    def make(self, rows: Sequence[Row]) -> MicroBatch:
        """The micro-batch of one group of rows that `cut` returned."""
        weights = self._token_weights(rows)
        batch = collate(
            rows,
            self.signal_kind,
            self._student_vocab,
            self.training.normalise,
            weights.truncated_rows,
            self._packed,
            self._shared,
        )
        if rows[0].student_written:
            batch = replace(batch, student_written=True)
        return share(self._copies.copy(batch), weights.by, self.teacher)

    def dummy(self) -> MicroBatch:
        """A micro-batch of one token with weight 0, for a rank with fewer rows than another."""
        width = 1 if self.teacher is None else self.teacher.hidden_size
        return self._copies.copy(dummy_micro_batch(self.signal_kind, width))

    def teacher_gap(self, groups: list[list[Row]]) -> float:
        """`TeacherHead.mean_gap` of the first rows that this rank is given, nats; later 0.

        groups: the rows of a step, as `cut` returned them. Without a head the result is 0.
        """
        if self.teacher is None or self._checked or not groups:
            return 0.0
        self._checked = True
        batch = self.make(groups[0])
        assert batch.teacher_hidden is not None
        logprobs = signal_column(groups[0], "sampled_logprobs").to(batch.targets.device)
        return self.teacher.mean_gap(batch.teacher_hidden, batch.targets, logprobs)

    def _objective(self, student_written: bool) -> ObjectiveConfig:
        if not student_written:
            return self.objective
        assert self.student_written is not None, "a row of the student's in a run without a policy"
        return self.student_written

    def _token_weights(self, rows: Sequence[Row]) -> TokenWeightsConfig:
        """How the tokens of rows of one origin are weighed."""
        return self._objective(bool(rows) and rows[0].student_written).token_weights


def by_origin(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that the teacher wrote and those that the student wrote; without empty lists."""
    parts = [[row for row in rows if row.student_written is origin] for origin in (False, True)]
    return [part for part in parts if part]


class DeviceCopies:
    """Copies micro-batches to one device.

    The host is ahead of a GPU: once the kernels of one pass are queued, it collates the next
    micro-batch, puts it into pinned memory, and copies it on a CUDA stream of its own. So the copy
    runs while the GPU still computes. On a CPU nothing has to be copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch on the device; kernels that are queued after this wait for the copy."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.mapped(self._begin)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # The memory belongs to the copying stream, which knows nothing of the current one: without
        # this it could use the memory again before the kernels of the pass have read it.
        moved.mapped(lambda tensor: _record_use(tensor, current))
        return moved

    def _begin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _record_use(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


@torch.no_grad()
def share(batch: MicroBatch, by: str, teacher: TeacherHead | None) -> MicroBatch:
    """The micro-batch with the weight of each row divided anew among its tokens.

    by: ``none`` changes nothing; ``entropy`` and ``confidence`` give each token a weight in
    proportion to the entropy of the teacher's distribution, or to the probability of its most
    likely id. teacher: the teacher's head, with the signal ``hidden`` only.

    The weights of a row keep their sum, so neither the step's denominator nor the cut into
    micro-batches changes. A row in which all values are 0 keeps its weights.
    """
    if by == "none":
        return batch
    # float64: the step's denominator is computed from the rows, so each row must keep its sum.
    values = _values(batch, by, teacher).double()
    assert batch.row_index is not None, "a collated micro-batch knows the rows of its tokens"
    row = batch.row_index
    sums, counts = (
        values.new_zeros(batch.num_rows).index_add_(0, row, each)
        for each in (values, torch.ones_like(values))
    )
    mean = (sums / counts)[row]
    factor = torch.where(mean > 0, values / mean, 1.0)
    return replace(batch, weights=(batch.weights * factor).float(), unweighted=False)


def _values(batch: MicroBatch, by: str, teacher: TeacherHead | None) -> Tensor:
    """For each token the teacher's entropy, nats, or the probability of its most likely id, [N].

    Both are over the K + 1 classes of a partition, or over the whole vocabulary of the head.
    """
    if batch.partition is not None:
        log_p = batch.partition.log_p
        return _entropy(log_p) if by == "entropy" else log_p[:, :-1].amax(dim=1).exp()
    assert teacher is not None and batch.teacher_hidden is not None, (
        "a text signal has no teacher's distribution to weigh tokens by"
    )
    parts = []
    for _, z in teacher.logit_chunks(batch.teacher_hidden):
        for block in row_blocks(z, CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES):
            log_p = torch.log_softmax(z[block], dim=1)
            parts.append(_entropy(log_p) if by == "entropy" else log_p.amax(dim=1).exp())
    return torch.cat(parts)


def _entropy(log_p: Tensor) -> Tensor:
    """-sum p log p of each token, [N] nats; a p of 0 adds 0."""
    return torch.special.entr(log_p.exp()).sum(dim=1)
