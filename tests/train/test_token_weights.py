"""Token weights: by how a row ended, and within it by the teacher's distribution of each token."""

from dataclasses import replace

import pytest
import torch

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import collate, loss_weight
from raystill.train.batch.partition import NO_ID, Partition
from raystill.train.step.micro_batches import BatchMaker, share
from tests.support.tiny_student import VOCAB, make_hidden_row, tiny_teacher, training_config

KINDS = ["sampled", "topk", "hidden"]


def rows_of_every_kind():
    """Rows with every signal; two were cut off, one has no context for its first token."""
    rows = [make_hidden_row(number, tokens) for number, tokens in enumerate((3, 1, 6, 2, 4))]
    rows[1].finish_reason = rows[4].finish_reason = "length"
    rows[2].prompt_ids = rows[2].prompt_ids[:0]
    return rows


@pytest.mark.parametrize("kind", ["text", *KINDS])
@pytest.mark.parametrize("by", ["none", "entropy", "confidence"])
@pytest.mark.parametrize("normalise", ["token", "row"])
def test_the_denominator_is_the_sum_of_the_weights(normalise, by, kind):
    if kind == "text" and by != "none":
        return
    weights = {"truncated_rows": 0.25, "by": by}
    objective = ObjectiveConfig(cross_entropy=1, token_weights=weights)
    training = training_config(normalise=normalise)
    teacher = tiny_teacher() if kind == "hidden" else None
    maker = BatchMaker(training, objective, signal_kind=kind, student_vocab=VOCAB, teacher=teacher)
    rows = rows_of_every_kind()
    batch = maker.make(rows)
    assert batch.weights.sum().item() == pytest.approx(maker.weight(rows), rel=1e-6)
    assert (batch.weights >= 0).all() and batch.weights.dtype == torch.float32
    targets = [row.num_targets for row in rows]
    whole = [n if normalise == "token" else 1 for n in targets]
    wanted = [w * (0.25 if i in (1, 4) else 1) for i, w in enumerate(whole)]
    sums = [part.sum().item() for part in batch.weights.split(targets)]
    assert sums == pytest.approx(wanted, rel=1e-6), "each row keeps its sum"


def test_a_row_cut_off_can_weigh_nothing():
    rows = rows_of_every_kind()
    assert collate(rows, "text", VOCAB, truncated_rows=0.0).weights.tolist() == [
        *[1.0] * 3,
        0.0,
        *[1.0] * 5,
        *[1.0] * 2,
        *[0.0] * 4,
    ]
    assert loss_weight(rows, "token", 0.0) == 10 and loss_weight(rows, "row", 0.0) == 3


def partition_batch(log_p, ids=None):
    """Two rows of 2 and 1 tokens with this partition."""
    rows = [make_hidden_row(0, 2), make_hidden_row(1, 1)]
    ids = torch.tensor([[0, 1]]).expand(3, 2) if ids is None else ids
    return replace(collate(rows, "text", VOCAB), partition=Partition(ids, log_p))


def test_worked_by_hand():
    # Entropies ln 2 and 0 in the first row, mean ln 2 / 2: factors 2 and 0. The second row has 0
    # only and keeps its weight. Best ids 0.5 and 1, mean 0.75: factors 2/3 and 4/3.
    log_p = torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log()
    assert share(partition_batch(log_p), "entropy", None).weights.tolist() == [2.0, 0.0, 1.0]
    shared = share(partition_batch(log_p), "confidence", None).weights
    assert shared.tolist() == pytest.approx([2 / 3, 4 / 3, 1.0])
    moved = torch.tensor([[NO_ID, NO_ID], [0, 1], [2, 3]])
    log_p = torch.tensor([[0.0, 0.0, 1.0], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]).log()
    assert share(partition_batch(log_p, moved), "confidence", None).weights.tolist() == [0, 2, 1]


def test_a_hidden_signal_is_weighed_by_the_whole_vocabulary():
    row = make_hidden_row(3, 5)
    batch = collate([row], "hidden", VOCAB)
    p = torch.softmax(batch.teacher_hidden.float() @ tiny_teacher().weight.T, dim=1)
    for by, values in (("entropy", -(p * p.log()).sum(dim=1)), ("confidence", p.amax(dim=1))):
        shared = share(batch, by, tiny_teacher()).weights
        torch.testing.assert_close(shared, values / values.mean())
