"""The tail: exact however small, right with other vocabularies, and a bound of the full KL."""

import math

import pytest
import torch

from raystill.train.batch.partition import NO_ID, Partition, topk_partition
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import partition_metrics
from tests.support.slow_objective import (
    TOKENS,
    TOP_K,
    VOCAB,
    assert_matches_slow,
    forward_kl,
    gradient,
    random_logits,
    slow_log_q,
    teacher_partition,
)


@pytest.mark.parametrize("tail_mass", [1e-3, 1e-6, 1e-9, math.exp(-27)])
@pytest.mark.parametrize("whose", ["teacher", "student", "both"])
def test_small_tails_are_exact_in_float32(tail_mass, whose):
    def with_tail(seed):
        logits = random_logits(seed, scale=1.0)
        log_p = torch.log_softmax(logits[:, :TOP_K], dim=1) + math.log1p(-tail_mass)
        rest = torch.log_softmax(logits[:, TOP_K:], dim=1) + math.log(tail_mass)
        return torch.cat([log_p, rest], dim=1)

    teacher = with_tail(0) if whose != "student" else random_logits(0)
    student = (with_tail(1) if whose != "teacher" else random_logits(1)).float()
    ids = torch.arange(TOP_K).expand(TOKENS, TOP_K)
    log_p = torch.log_softmax(teacher, dim=1)
    tail = torch.logsumexp(log_p[:, TOP_K:], dim=1)
    partition = topk_partition(ids, log_p[:, :TOP_K], tail, VOCAB)

    log_q, _ = partition_log_probs(student, ids)
    expected = slow_log_q(student, ids)
    torch.testing.assert_close(log_q.double(), expected, rtol=1e-6, atol=2e-6)
    assert_matches_slow(student, partition, rtol=1e-5, atol=2e-6)

    # The tail's own gradient keeps its digits, however small: no difference of rounded ones.
    _, grad = gradient(lambda z: partition_log_probs(z, ids)[0][:, -1], student)
    _, slow = gradient(lambda z: slow_log_q(z, ids)[:, -1], student)
    torch.testing.assert_close(grad.double(), slow.double(), rtol=1e-4, atol=1e-7)


def test_extreme_logits_stay_finite_and_exact():
    ids = torch.tensor([[0, 1]]).expand(4, 2)
    logits = torch.zeros(4, VOCAB)
    logits[0, 0] = 1e4  # all mass on an id of the teacher: log q_tau near -1e4
    logits[1, 5] = 1e4  # all mass in the tail
    logits[2] = -1e4
    logits[3] = torch.linspace(-3e4, 3e4, VOCAB)
    partition = Partition(ids, torch.tensor([0.6, 0.3, 0.1]).log().expand(4, 3))
    assert_matches_slow(logits, partition, rtol=1e-6, atol=1e-6)
    value, grad = gradient(lambda z: forward_kl(z, partition), logits)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()


def test_logits_of_minus_infinity_outside_the_ids_are_an_empty_tail():
    logits = torch.full((1, 5), -math.inf)
    logits[0, :2] = 0.0
    partition = Partition(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25, 0.0]]).log())
    value, grad = gradient(lambda z: forward_kl(z, partition), logits)
    # 0.75 ln 1.5 + 0.25 ln 0.5 = 0.304099 - 0.173287 = 0.130812; gradient q - p = -0.25, +0.25.
    assert value.item() == pytest.approx(0.130812, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[-0.25, 0.25, 0.0, 0.0, 0.0]]))


def test_mass_where_the_student_has_no_id_is_infinite_not_clamped():
    partition = Partition(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3, 0.2]]).log())
    assert forward_kl(torch.zeros(1, 2), partition).item() == math.inf


def test_divergence_rises_with_k_and_is_bounded_by_the_full_one():
    teacher, student = random_logits(0), random_logits(1)
    values = torch.stack(
        [forward_kl(student, teacher_partition(teacher, k)) for k in range(1, VOCAB + 1)]
    )
    log_p, log_q = torch.log_softmax(teacher, dim=1), torch.log_softmax(student, dim=1)
    full = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    assert (values >= 0).all()
    assert (values.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(values[-1], full)


def test_gradient_on_the_k_logits_equals_the_full_one():
    teacher, student = random_logits(0), random_logits(1)
    partition = teacher_partition(teacher, TOP_K)
    _, grad = gradient(lambda z: forward_kl(z, partition), student)
    full = torch.softmax(student, dim=1) - torch.softmax(teacher, dim=1)
    on_ids = full.gather(1, partition.ids)
    torch.testing.assert_close(grad.gather(1, partition.ids), on_ids)
    tail = partition.log_p[:, -1].exp()
    assert ((grad - full).abs().sum(dim=1) <= 2 * tail + 1e-12).all()


def test_teacher_ids_beyond_the_students_vocabulary_count_as_tail():
    teacher, student = random_logits(0, vocab=VOCAB + 20), random_logits(1)
    teacher[:, VOCAB + 3] += 6.0  # a padded id among the K of every token
    log_p = torch.log_softmax(teacher, dim=1)
    top, ids = log_p.topk(TOP_K, dim=1)
    tail = torch.log1p(-top.exp().sum(dim=1))
    partition = topk_partition(ids, top, tail, student_vocab=VOCAB)

    assert (partition.ids == NO_ID).any(dim=1).all()
    assert_matches_slow(student.float(), partition, rtol=1e-5, atol=2e-6)
    mass = log_p.gather(1, ids.clamp_max(VOCAB - 1)).exp() * (ids < VOCAB)
    torch.testing.assert_close(
        partition.log_p[:, -1].exp().double(), 1 - mass.sum(dim=1), rtol=1e-5, atol=1e-6
    )
    metrics = partition_metrics(student, partition, torch.zeros(TOKENS, dtype=torch.long))
    assert all(torch.isfinite(value).all() for value in metrics.values())


def test_a_token_whose_every_id_is_foreign_teaches_nothing():
    partition = topk_partition(
        torch.tensor([[70, 71]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log(), VOCAB
    )
    value, grad = gradient(lambda z: forward_kl(z, partition), random_logits(1)[:1])
    assert value.abs().item() < 1e-6 and grad.abs().max() < 1e-6


def test_a_larger_student_vocabulary_adds_to_the_tail():
    student = random_logits(1, vocab=VOCAB + 20)
    ids = torch.arange(VOCAB).expand(TOKENS, VOCAB)
    log_p = torch.log_softmax(random_logits(0), dim=1)
    partition = topk_partition(ids, log_p, torch.full((TOKENS,), -math.inf), VOCAB)
    assert_matches_slow(student.float(), partition, rtol=1e-5, atol=2e-6)
    _, grad = gradient(lambda z: forward_kl(z, partition), student)
    padded = torch.softmax(student, dim=1)[:, VOCAB:]
    torch.testing.assert_close(grad[:, VOCAB:], padded, rtol=1e-5, atol=1e-9)
