"""Objectives against slow float64 formulas, hand-worked numbers, and the sums of a step."""

import math

import pytest
import torch

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import NO_ID, Partition
from raystill.train.loss import log_probs
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import partition_metrics
from tests.support.slow_objective import (
    DIVERGENCES,
    EVERYTHING,
    TOKENS,
    TOP_K,
    VOCAB,
    assert_matches_slow,
    cross_entropy,
    forward_kl,
    gradient,
    loss_on_logits,
    on,
    random_logits,
    slow_forward_kl,
    slow_log_q,
    teacher_partition,
)


@pytest.mark.parametrize("top_k", [1, TOP_K, VOCAB])
def test_forward_kl_equals_the_slow_formula_forward_and_backward(top_k):
    partition = teacher_partition(random_logits(0), top_k)
    assert_matches_slow(random_logits(1), partition, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, TOP_K, VOCAB])
def test_forward_kl_in_float32_is_near_the_slow_formula(top_k):
    partition = teacher_partition(random_logits(0), top_k, dtype=torch.float32)
    assert_matches_slow(random_logits(1, torch.float32), partition, rtol=1e-5, atol=2e-6)


def test_cross_entropy_equals_the_slow_formula_forward_and_backward():
    logits, targets = random_logits(1), torch.arange(TOKENS) * 3
    fast = gradient(lambda z: cross_entropy(z, targets), logits)
    slow = gradient(
        lambda z: torch.nn.functional.cross_entropy(z, targets, reduction="none"), logits
    )
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)


def test_forward_kl_worked_by_hand():
    # V = 4, K = 1. Logits (ln 2, 0, 0, 0): q = (0.4, 0.2, 0.2, 0.2), q_tau = 0.6.
    # Teacher: p_0 = 0.8, p_tau = 0.2.
    # KL = 0.8 ln(0.8 / 0.4) + 0.2 ln(0.2 / 0.6) = 0.8 x 0.693147 - 0.2 x 1.098612 = 0.334795.
    # Gradient: q_0 - p_0 = -0.4; elsewhere q_j - p_tau / 3 = 0.2 - 0.066667 = 0.133333.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0, 0.0]], dtype=torch.float64)
    partition = Partition(
        torch.tensor([[0]]), torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    )
    value, grad = gradient(lambda z: forward_kl(z, partition), logits)
    assert value.item() == pytest.approx(0.334795, abs=1e-6)
    expected = torch.tensor([[-0.4, 0.4 / 3, 0.4 / 3, 0.4 / 3]], dtype=torch.float64)
    torch.testing.assert_close(grad, expected)


def test_cross_entropy_worked_by_hand():
    # Same student, target 2: -ln 0.2 = 1.609438; gradient q - onehot = (0.4, 0.2, -0.8, 0.2).
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0, 0.0]], dtype=torch.float64)
    value, grad = gradient(lambda z: cross_entropy(z, torch.tensor([2])), logits)
    assert value.item() == pytest.approx(1.609438, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[0.4, 0.2, -0.8, 0.2]], dtype=torch.float64))


@pytest.mark.parametrize("case", ["all kept", "some moved", "first moved", "all moved"])
def test_gradcheck_of_every_outcome_and_of_the_target(case):
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(3)])
    ids[1, {"some moved": [1, 3], "first moved": [0], "all moved": [0, 1, 2, 3]}.get(case, [])] = (
        NO_ID
    )
    logits = torch.randn(3, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.stack([ids[0, 1].clamp_min(0), torch.tensor(0), torch.tensor(11)])

    def finite_outcomes(z):
        log_q, log_q_target = partition_log_probs(z, ids, targets)
        return log_q[log_q > -math.inf], log_q_target

    assert torch.autograd.gradcheck(finite_outcomes, logits)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_chunks_do_not_change_a_bit(monkeypatch, rows_per_chunk):
    partition = teacher_partition(random_logits(0), TOP_K, dtype=torch.float32)
    logits = random_logits(1, torch.float32)
    expected = gradient(lambda z: forward_kl(z, partition), logits)
    monkeypatch.setattr(log_probs, "CPU_BLOCK_BYTES", rows_per_chunk * VOCAB * 4)
    got = gradient(lambda z: forward_kl(z, partition), logits)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("top_k", [1, TOP_K, VOCAB])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(top_k):
    logits = random_logits(0, torch.float32)
    partition = teacher_partition(logits, top_k, dtype=torch.float32)
    value, grad = gradient(lambda z: forward_kl(z, partition), logits)
    assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6
    metrics = partition_metrics(logits, partition, partition.ids[:, 0])
    torch.testing.assert_close(metrics["acceptance"], torch.ones(TOKENS))
    assert metrics["top1"].tolist() == [1.0] * TOKENS


def test_half_precision_logits_are_summed_in_float32():
    partition = teacher_partition(random_logits(0), TOP_K, dtype=torch.float32)
    logits = random_logits(1).bfloat16()
    value, grad = gradient(lambda z: forward_kl(z, partition), logits)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, forward_kl(logits.float(), partition))
    _, wide = gradient(lambda z: forward_kl(z, partition), logits.float())
    torch.testing.assert_close(grad.float(), wide, rtol=1e-2, atol=1e-6)


def micro_batch(partition, targets, weights):
    none = torch.zeros(0)
    return MicroBatch(none, None, none, none, targets, weights, partition, 1, TOKENS, 0, 0)


@pytest.mark.parametrize("target_in_ids", [True, False])
def test_sums_are_the_weighted_terms_from_one_pass(target_in_ids):
    partition = teacher_partition(random_logits(0), TOP_K)
    targets = partition.ids[:, 2] if target_in_ids else random_logits(0).argmin(dim=1)
    weights = torch.linspace(0.0, 1.5, TOKENS)
    batch = micro_batch(partition, targets, weights)
    terms = ObjectiveConfig(forward_kl=0.7, cross_entropy=0.2)

    sums = loss_on_logits(terms, random_logits(1), batch)
    _, grad = gradient(lambda z: loss_on_logits(terms, z, batch).total, random_logits(1))

    def apart(z):
        return weights * (0.7 * slow_forward_kl(z, partition) + 0.2 * cross_entropy(z, targets))

    value, slow_grad = gradient(apart, random_logits(1))
    torch.testing.assert_close(sums.total, value.sum())
    torch.testing.assert_close(grad, slow_grad)
    assert (grad[0] == 0).all(), "a token of weight 0 has no gradient"
    kl = (weights * slow_forward_kl(random_logits(1), partition)).sum()
    torch.testing.assert_close(sums.terms["forward_kl"], kl)
    q_tail = slow_log_q(random_logits(1), partition.ids)[:, -1].exp()
    torch.testing.assert_close(sums.student_tail_mass, (weights * q_tail).sum())
    torch.testing.assert_close(
        sums.teacher_tail_mass, (weights * partition.log_p[:, -1].exp()).sum()
    )


def test_the_sum_of_all_terms_is_that_of_the_terms_apart():
    partition = teacher_partition(random_logits(0), TOP_K)
    partition.log_p[2, -1] = -30.0
    targets, weights = random_logits(0).argmin(dim=1), torch.linspace(0.0, 1.5, TOKENS)
    sums = loss_on_logits(EVERYTHING, random_logits(1), micro_batch(partition, targets, weights))
    for name in DIVERGENCES:
        alone = (weights * on(name, random_logits(1), partition)).sum()
        torch.testing.assert_close(sums.terms[name], alone)
    torch.testing.assert_close(sums.total, torch.stack(list(sums.terms.values())).sum())
    assert sums.floored_tokens == 1


def test_a_text_signal_has_cross_entropy_only():
    targets = torch.arange(TOKENS)
    batch = micro_batch(None, targets, torch.ones(TOKENS))
    sums = loss_on_logits(ObjectiveConfig(cross_entropy=2), random_logits(1), batch)
    torch.testing.assert_close(sums.total, 2 * cross_entropy(random_logits(1), targets).sum())
    assert sums.student_tail_mass is None
    with pytest.raises(ValueError, match=r"forward_kl.*needs the teacher's probabilities"):
        loss_on_logits(ObjectiveConfig(forward_kl=1), random_logits(1), batch)


def test_metrics_worked_by_hand():
    # q = (0.4, 0.2, 0.2, 0.2); ids (1, 0) with p = (0.5, 0.3), tail 0.2 against q_tau 0.4.
    # acceptance = min(.5,.2) + min(.3,.4) + min(.2,.4) = 0.7; the bests are 1 and 0: no agreement.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0, 0.0]])
    partition = Partition(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.3, 0.2]]).log())
    metrics = partition_metrics(logits, partition, torch.tensor([3]))
    assert metrics["acceptance"].item() == pytest.approx(0.7)
    assert metrics["top1"].item() == 0.0
    assert metrics["nll"].item() == pytest.approx(-math.log(0.2))
    kl = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.4)
    assert metrics["kl"].item() == pytest.approx(kl)


def test_a_block_of_logits_has_a_share_for_each_core():
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            blocks = log_probs.row_blocks(torch.empty(9, VOCAB), 2 * VOCAB * 4, VOCAB)
            assert blocks[0] == slice(0, 2 * number) and blocks[-1].stop >= 9
    finally:
        torch.set_num_threads(threads)
