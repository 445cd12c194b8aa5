"""Every divergence on every partition: slow formulas, hand-worked numbers, properties, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.train.batch.partition import NO_ID, Partition, sampled_partition
from raystill.train.loss import divergence
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import floored
from tests.support.slow_objective import (
    DIVERGENCES,
    FLOOR,
    TOKENS,
    TOP_K,
    VOCAB,
    gradient,
    on,
    random_logits,
    slow,
    slow_divergence,
    teacher_partition,
)

JUMPS = ("total_variation", "acceptance")  # Their gradients jump where p = q.
BOUNDED = [name for name in DIVERGENCES if name not in ("forward_kl", "reverse_kl")]


def drawn_partition(logits):
    """{drawn token, rest} in float64, of tokens that are not the teacher's best."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    drawn = log_p.topk(3, dim=1).indices[:, 2:]
    own = log_p.gather(1, drawn)
    return Partition(drawn, torch.cat([own, torch.log(-torch.expm1(own))], dim=1))


def partition_of(kind):
    return (
        drawn_partition(random_logits(0))
        if kind == "sampled"
        else teacher_partition(random_logits(0), {"topk": TOP_K, "one": 1, "all": VOCAB}[kind])
    )


@pytest.mark.parametrize("kind", ["sampled", "one", "topk", "all"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_equals_the_slow_formula_forward_and_backward(name, kind):
    partition = partition_of(kind)
    fast = gradient(lambda z: on(name, z, partition), random_logits(1))
    expected = gradient(lambda z: slow(name, z, partition), random_logits(1))
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-12)
    single = gradient(lambda z: on(name, z, partition), random_logits(1, torch.float32))
    torch.testing.assert_close(single[0].double(), expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(single[1].double(), expected[1], rtol=1e-4, atol=2e-6)


# V = 4, K = 1: q = (0.4 | 0.6), p = (0.8 | 0.2), as in the hand-worked forward KL.
@pytest.mark.parametrize(
    ("name", "value", "grad"),
    [
        # 0.8 ln 2 + 0.2 ln(1/3); q_0 - p_0
        ("forward_kl", 0.334795, -0.4),
        # 0.4 ln 0.5 + 0.6 ln 3 = 0.381908 = D; q_0 (ln 0.5 - D)
        ("reverse_kl", 0.381908, -0.430022),
        # m = (0.52, 0.48): 0.3 (0.8 ln(0.8/0.52) + 0.2 ln(0.2/0.48))
        #                 + 0.7 (0.4 ln(0.4/0.52) + 0.6 ln(0.6/0.48)) = 0.050863 + 0.020257;
        # G = 0.7 (0.4 ln(0.4/0.52), 0.6 ln(0.6/0.48)) = (-0.073462, 0.093719); G_0 - 0.4 (sum G)
        ("jsd", 0.071120, -0.081565),
        # m = (0.44, 0.56): 0.8 ln(0.8/0.44) + 0.2 ln(0.2/0.56);
        # G = 0.9 (0.4 (1 - 0.8/0.44), 0.6 (1 - 0.2/0.56)) = (-0.294545, 0.347143)
        ("skew_forward_kl", 0.272346, -0.315584),
        # m = (0.76, 0.24): 0.4 ln(0.4/0.76) + 0.6 ln(0.6/0.24);
        # G = (0.4 (ln(0.4/0.76) + 0.1 (1 - 0.4/0.76)), 0.6 (ln 2.5 + 0.1 (1 - 2.5)))
        #   = (-0.237794, 0.459774)
        ("skew_reverse_kl", 0.293033, -0.326587),
        # (0.4 + 0.4) / 2; G = (-0.2, 0.3)
        ("total_variation", 0.4, -0.24),
        # A = 0.4 + 0.2 = 0.6, -ln 0.6; G = (-0.4 / 0.6, 0), G_0 - 0.4 (sum G) = -0.24 / 0.6
        ("acceptance", 0.510826, -0.4),
    ],
)
def test_each_worked_by_hand(name, value, grad):
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0, 0.0]], dtype=torch.float64)
    log_p = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    partition = Partition(torch.tensor([[0]]), log_p)
    result, result_grad = gradient(lambda z: on(name, z, partition), logits)
    assert result.item() == pytest.approx(value, abs=2e-6)
    rest = -grad / 3  # The gradient sums to 0, and the three ids of the tail are alike.
    expected = torch.tensor([[grad, rest, rest, rest]], dtype=torch.float64)
    torch.testing.assert_close(result_grad, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["sampled", "topk"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_differences_agree(name, kind):
    partition = partition_of(kind)
    part = Partition(partition.ids[:2], partition.log_p[:2])
    logits = random_logits(1)[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: on(name, z, part), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_k", [1, TOP_K, VOCAB])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name, top_k, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    logits = random_logits(0, dtype)
    partition = teacher_partition(logits, top_k, dtype=dtype)
    value, grad = gradient(lambda z: on(name, z, partition), logits)
    assert value.abs().max() < tolerance
    if name not in JUMPS:
        assert grad.abs().max() < tolerance


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_rise_with_k_towards_the_full_one(name):
    teacher, student = random_logits(0), random_logits(1)
    values = torch.stack(
        [on(name, student, teacher_partition(teacher, k)) for k in range(1, VOCAB + 1)]
    )
    assert (values >= 0).all() and (values.diff(dim=0) >= -1e-12).all()
    p, q = torch.softmax(teacher, dim=1), torch.softmax(student, dim=1)
    full = torch.stack([slow_divergence(name, p[t], q[t]) for t in range(TOKENS)])
    torch.testing.assert_close(values[-1], full)


def test_total_variation_is_what_acceptance_leaves():
    partition = teacher_partition(random_logits(0), TOP_K)
    log_q, _ = partition_log_probs(random_logits(1), partition.ids)
    acceptance = torch.minimum(partition.log_p, log_q).exp().sum(dim=1)
    torch.testing.assert_close(on("total_variation", random_logits(1), partition), 1 - acceptance)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_what_k_ids_leave_unknown_of_the_acceptance_is_the_smaller_tail(data):
    vocab = data.draw(st.integers(2, 40), "vocabulary")
    top_k = data.draw(st.integers(1, vocab), "K")
    scales = [data.draw(st.sampled_from([0.1, 1.0, 4.0]), side) for side in ("teacher", "student")]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    teacher, student = torch.randn(2, 1, vocab, generator=generator, dtype=torch.float64)
    teacher, student = scales[0] * teacher, scales[1] * student
    partition, full = teacher_partition(teacher, top_k), teacher_partition(teacher, vocab)
    log_q = partition_log_probs(student, partition.ids)[0]
    shared = torch.minimum(partition.log_p, log_q).exp()
    upper, unknown = shared.sum().item(), shared[0, -1].item()
    results = {
        (name, kind): gradient(lambda z, n=name, k=kind: on(n, z, k), student)
        for name in JUMPS
        for kind in (partition, full)
    }
    exact = 1 - results["total_variation", full][0].item()
    assert upper - unknown - 1e-12 <= exact <= upper + 1e-12
    error = {n: (results[n, partition][1] - results[n, full][1]).abs().sum() for n in JUMPS}
    assert error["total_variation"] <= 2 * unknown + 1e-12
    assert error["acceptance"] <= 4 * unknown / upper + 1e-12


def test_with_few_ids_and_a_far_student_the_acceptance_gradient_turns_away_from_the_full_one():
    # The figures of docs/signals.md.
    generator = torch.Generator().manual_seed(0)
    teacher, noise = 4 * torch.randn(2, 50, 2000, generator=generator, dtype=torch.float64)
    student = 0.3 * teacher + 0.7 * noise
    full, cosines = teacher_partition(teacher, 2000), {}
    for name in ("acceptance", "total_variation", "forward_kl"):
        exact = gradient(lambda z, n=name: on(n, z, full), student)[1]
        for top_k in (8, 64):
            partition = teacher_partition(teacher, top_k)
            got = gradient(lambda z, n=name, k=partition: on(n, z, k), student)[1]
            cosines[name, top_k] = torch.cosine_similarity(got, exact, dim=1).mean().item()
    for name in JUMPS:
        assert cosines[name, 8] == pytest.approx(0.80, abs=0.01)
        assert cosines[name, 64] == pytest.approx(0.99, abs=0.01)
    assert cosines["forward_kl", 8] > 0.98 and cosines["forward_kl", 64] > 0.99


def test_acceptance_keeps_its_digits_at_both_ends():
    # A = e^-200 + e^-201, of which float32 has no number, and 1 - 1e-6, of which it has no digits.
    log_p = torch.tensor([[-200.0, 0.0, -201.0], [math.log(0.5), math.log(0.5), -math.inf]])
    q = torch.tensor([[0.0, 0.0, 0.0], [0.5 + 1e-6, 0.5 - 1e-6, 0.0]], dtype=torch.float64)
    log_q = q.log().float()
    log_q[0] = torch.tensor([0.0, -300.0, -math.inf])
    value, grad = divergence.acceptance(log_p, log_q, log_q.exp())
    assert value[0].item() == pytest.approx(200.0, rel=1e-6)
    # float32 rounds q itself by 6e-8, of either class.
    assert value[1].item() == pytest.approx(1e-6, abs=1e-7)
    # In the first token only the second class has min(p, q) = q, which is e^-100 of A.
    torch.testing.assert_close(grad[0], torch.zeros(3))
    torch.testing.assert_close(grad[1], torch.tensor([0.0, -0.5, 0.0]), rtol=1e-5, atol=0)


def test_acceptance_still_teaches_where_total_variation_no_longer_does():
    # The student gives 1e-6 to the teacher's only id. d(1 - q_0) / dz_0 = -q_0 (1 - q_0).
    log_p = torch.tensor([[0.0, -math.inf]])
    z = torch.tensor([[math.log(1e-6), 0.0]])
    partition = Partition(torch.tensor([[0]]), log_p)
    grads = {name: gradient(lambda z, n=name: on(n, z, partition), z)[1] for name in JUMPS}
    assert grads["total_variation"].abs().max().item() == pytest.approx(1e-6, rel=1e-3)
    expected = torch.tensor([[-1.0, 1.0]])
    torch.testing.assert_close(grads["acceptance"], expected, rtol=1e-5, atol=0)


def test_no_class_in_common_is_an_infinite_acceptance_loss_and_no_nan_gradient():
    log_p = torch.tensor([[0.0, -math.inf, -math.inf]])
    log_q = torch.tensor([[-math.inf, 0.0, -math.inf]])
    value, grad = divergence.acceptance(log_p, log_q, log_q.exp())
    assert value.item() == math.inf and (grad == 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_over_random_shapes_all_is_finite_right_and_not_negative(data):
    vocab = data.draw(st.integers(2, 24), "vocabulary")
    top_k = data.draw(st.integers(1, vocab), "K")
    tokens = data.draw(st.integers(1, 3), "tokens")
    scale = data.draw(st.sampled_from([1e-3, 1.0, 8.0, 40.0]), "scale")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), "dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    teacher, student = scale * torch.randn(2, tokens, vocab, generator=generator).double()
    partition = teacher_partition(teacher, top_k, vocab, torch.float32)
    logits = student.to(dtype)
    for name in DIVERGENCES:
        value, grad = gradient(lambda z, n=name: on(n, z, partition), logits)
        exact = gradient(lambda z, n=name: on(n, z, partition), logits.double())
        torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=2e-6)
        allowed = 1e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(grad.double(), exact[1], rtol=allowed, atol=1e-5 * (1 + scale))
        assert torch.isfinite(value).all() and torch.isfinite(grad).all(), name
        assert (value >= -1e-6).all() and (exact[0] >= -1e-14 * (1 + scale)).all(), name


@pytest.mark.parametrize("name", [*BOUNDED, "reverse_kl"])
def test_logits_of_ten_thousand_give_the_values_of_certainty(name):
    logits = torch.zeros(4, VOCAB)
    logits[0, 0] = 1e4  # All mass on an id of the teacher.
    logits[1, 5] = 1e4  # All mass in the tail.
    logits[2] = -1e4  # Uniform.
    logits[3, 1], logits[3, 2:] = 1e4, -1e4
    partition = Partition(
        torch.tensor([[0, 1]]).expand(4, 2), torch.tensor([0.6, 0.3, 0.1]).log().expand(4, 3)
    )
    value, grad = gradient(lambda z: on(name, z, partition), logits)
    torch.testing.assert_close(value.double(), slow(name, logits, partition), rtol=1e-5, atol=1e-6)
    exact = gradient(lambda z: on(name, z, partition), logits.double())[1]
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BOUNDED)
def test_classes_without_mass_on_either_side_are_finite(name):
    # p = (0.75, 0.25, 0 | 0), q = (0.5, 0, 0.5 | 0): no other id has mass.
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]], dtype=torch.float64)
    log_p = torch.tensor([[0.75, 0.25, 0.0, 0.0]], dtype=torch.float64).log()
    partition = Partition(torch.tensor([[0, 1, 2]]), log_p)
    value, grad = gradient(lambda z: on(name, z, partition), logits)
    q = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert value.item() == pytest.approx(slow_divergence(name, log_p[0].exp(), q).item())
    assert torch.isfinite(grad).all() and grad.sum().abs() < 1e-12


def test_reverse_kl_keeps_the_logarithm_of_an_id_however_small():
    # p_1 = e^-10000 is 0 in any float, its logarithm is not. q = (0.5, 0.5 | 0):
    # KL(q || p) = 0.5 ln 0.5 + 0.5 (ln 0.5 + 10000) = 5000 - ln 2.
    logits = torch.zeros(1, 2)
    partition = Partition(torch.tensor([[0, 1]]), torch.tensor([[0.0, -1e4, -math.inf]]))
    value, grad = gradient(lambda z: on("reverse_kl", z, partition), logits)
    assert value.item() == pytest.approx(5000 - math.log(2), rel=1e-6)
    # q_0 (ln q_0 - D) = 0.5 (-0.6931 - 4999.3069) = -2500.
    torch.testing.assert_close(grad, torch.tensor([[-2500.0, 2500.0]]))


def test_mass_that_the_teacher_cannot_have_is_infinite_without_a_floor():
    log_p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.4, 0.4, 0.2]])
    value, _ = divergence.reverse_kl(log_p, q.log(), q)
    assert value.item() == math.inf


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_nan_on_either_side_is_a_nan_of_the_loss(name, side):
    logits, partition = random_logits(1), teacher_partition(random_logits(0), TOP_K)
    (logits if side == "student" else partition.log_p)[0] = math.nan
    value = on(name, logits, partition)
    assert value[0].isnan() and value[1:].isfinite().all()


def test_reverse_kl_counts_the_tokens_whose_tail_is_below_the_floor():
    # Teacher tails 0, 0, 1e-9, 1e-9, 1e-3; student tails 0.2, 1e-8, 1e-9, 1e-12, 1e-8.
    tails_p = torch.tensor([0.0, 0.0, 1e-9, 1e-9, 1e-3], dtype=torch.float64)
    tails_q = torch.tensor([0.2, 1e-8, 1e-9, 1e-12, 1e-8], dtype=torch.float64)
    log_p = torch.stack([1 - tails_p, tails_p], dim=1).log()
    log_q = torch.stack([1 - tails_q, tails_q], dim=1).log()
    raised, tokens = floored(log_p, log_q)
    assert tokens.tolist() == [True, True, False, False, False]
    expected = [FLOOR, 1e-8, 1e-9, 1e-9, 1e-3]
    assert raised[:, 1].exp().tolist() == pytest.approx(expected, rel=1e-9)
    value, grad = divergence.reverse_kl(raised, log_q, log_q.exp())
    # 0.8 ln 0.8 + 0.2 ln(0.2 / 1e-6), and + (1 + 1e-6) - 1 for the masses that do not sum to 1.
    by_hand = 0.8 * math.log(0.8) + 0.2 * math.log(0.2e6) + 1e-6
    assert value[0].item() == pytest.approx(by_hand, abs=1e-9)
    # Agreement within the noise costs next to nothing, and equality nothing.
    assert 0 <= value[1] < 1e-8 and grad[1, 1] == 0
    assert value[2] == 0 and (grad[2] == 0).all()
    assert log_p[0, 1] == -math.inf, "the partition itself is left as it is"


def test_a_teacher_id_without_mass_uses_the_floor_and_a_moved_one_does_not():
    log_p = torch.tensor([[0.9, 0.0, 0.1], [0.9, 0.0, 0.1]]).log()
    log_q = torch.tensor([[0.8, 0.1, 0.1], [0.9, 0.0, 0.1]]).log()  # Second: NO_ID, no mass.
    raised, tokens = floored(log_p, log_q)
    assert tokens.tolist() == [True, False]
    assert raised[0, 1].item() == pytest.approx(math.log(FLOOR))
    partition = Partition(torch.tensor([[0, NO_ID]]), log_p[:1])
    value, grad = gradient(lambda z: on("reverse_kl", z, partition), torch.zeros(1, 4))
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_sampled_signal_is_a_partition_of_two(name):
    # Drawn with p = 1 - 1e-9: float32 cannot hold the rest as 1 - p; its logarithm is kept.
    partition = sampled_partition(torch.tensor([3]), torch.tensor([-1e-9], dtype=torch.float64), 5)
    assert partition.log_p[0, 1].item() == pytest.approx(math.log(1e-9), rel=1e-6)
    value, grad = gradient(lambda z: on(name, z, partition), torch.zeros(1, 5))
    expected = slow(name, torch.zeros(1, 5), partition)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert grad[0, 3] < 0
