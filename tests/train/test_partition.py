"""The teacher's K ids and tail as one distribution: rounding, foreign ids, the sampled case."""

import math

import pytest
import torch

from raystill.train.batch.partition import NO_ID, sampled_partition, topk_partition


def test_the_classes_of_a_token_sum_to_one_after_rounding():
    torch.manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(200, 50) * 4, dim=1)
    top, ids = logprobs.topk(8, dim=1)
    tail = torch.log1p(-top.exp().sum(dim=1))

    partition = topk_partition(ids, top.half(), tail, student_vocab=50)

    assert partition.ids.dtype == torch.int64 and partition.log_p.dtype == torch.float32
    mass = partition.log_p.double().exp().sum(dim=1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_joint_normalisation_keeps_the_tails_share():
    # p = (0.5, 0.3), tail 0.2, all stored 1 % too high: the ratios stay, 0.2 of the mass is tail.
    scaled = torch.tensor([[0.5, 0.3]]).mul(1.01).log()
    partition = topk_partition(torch.tensor([[4, 2]]), scaled, torch.tensor([0.202]).log(), 10)
    torch.testing.assert_close(partition.log_p.exp(), torch.tensor([[0.5, 0.3, 0.2]]))


def test_ids_beyond_the_students_vocabulary_move_to_the_tail():
    # Ids 11 and 10 do not exist among 10 ids: 0.3 + 0.1 + tail 0.2 = 0.6.
    ids = torch.tensor([[7, 11, 10], [1, 2, 3]])
    probs = torch.tensor([[0.4, 0.3, 0.1], [0.4, 0.3, 0.1]])
    partition = topk_partition(ids, probs.log(), torch.tensor([0.2, 0.2]).log(), student_vocab=10)

    assert partition.ids.tolist() == [[7, NO_ID, NO_ID], [1, 2, 3]]
    expected = torch.tensor([[0.4, 0.0, 0.0, 0.6], [0.4, 0.3, 0.1, 0.2]])
    torch.testing.assert_close(partition.log_p.exp(), expected)


def test_nothing_left_beside_the_ids_is_a_tail_of_zero():
    ids = torch.tensor([[0, 1]])
    partition = topk_partition(
        ids, torch.tensor([[0.25, 0.75]]).log(), torch.tensor([-math.inf]), 2
    )
    assert partition.log_p[0, -1] == -math.inf
    torch.testing.assert_close(partition.log_p[:, :2].exp(), torch.tensor([[0.25, 0.75]]))


@pytest.mark.parametrize("log_p", [-0.1, -1e-6, -1e-12, 0.0, 1e-7])
def test_sampled_is_the_drawn_token_and_the_rest(log_p):
    partition = sampled_partition(torch.tensor([3]), torch.tensor([log_p], dtype=torch.float64), 10)
    rest = math.log(-math.expm1(log_p)) if log_p < 0 else -math.inf
    assert partition.ids.tolist() == [[3]]
    torch.testing.assert_close(partition.log_p, torch.tensor([[min(log_p, 0.0), rest]]))


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_token_without_probabilities_is_refused(broken):
    logprobs = torch.full((1, 2), broken)
    with pytest.raises(ValueError, match=r"token 0 .* expected at least one finite value"):
        topk_partition(torch.tensor([[0, 1]]), logprobs, torch.tensor([-math.inf]), 10)
