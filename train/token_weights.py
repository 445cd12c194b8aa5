"""How a row's weight is shared among its tokens, by what the teacher says of each.

`batch_maker` calls `share` on every micro-batch. Each row keeps the sum of its weights, so neither
the step's denominator nor the cut into micro-batches matters; a row of which all values are 0 keeps
its weights as they are.

Legend: N response tokens, B rows, K ids kept for each token, V rows of the teacher's head.
"""

from dataclasses import replace

import torch
from torch import Tensor

from raystill.train.batch import MicroBatch
from raystill.train.outcomes import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES, row_blocks
from raystill.train.teacher_head import TeacherHead


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
