"""The objective over the full vocabulary, rebuilt from hidden states: dense references, properties.

Both sides have a head of their own here: student hidden [N, D] and teacher hidden [N, D_T] go
through `head_loss`, and the reference takes all logits of both at once through autograd.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.model.head import LogitTransform
from raystill.train.batch.batch import MicroBatch
from raystill.train.loss import full_vocabulary
from raystill.train.loss import head_loss as chunking
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import OutputHead, head_loss
from raystill.train.loss.teacher_head import TeacherHead
from tests.support.slow_objective import (
    ALPHA,
    BETA,
    DIVERGENCES,
    EVERYTHING,
    on,
    slow_divergence,
    teacher_partition,
)
from tests.support.tiny_student import relative_error
from tests.train.test_head_loss import LargestTensor

TOKENS, NUM_CLASSES, HIDDEN, TEACHER_HIDDEN = 7, 60, 6, 5
# Rows of the student's and of the teacher's head: padding on neither, either and both sides.
SIZES = {"equal": (60, 60), "student": (66, 60), "teacher": (60, 64), "both": (66, 64)}
TERM = {name: ObjectiveConfig(**{name: 1.0}, jsd_beta=BETA, skew_alpha=ALPHA) for name in TERMS}


@dataclass
class Case:
    """Student inputs that want gradients (hidden, weight, bias), the teacher, a micro-batch."""

    inputs: list[torch.Tensor]
    teacher: TeacherHead
    batch: MicroBatch


def make(
    sizes="equal", dtype=torch.float64, tokens=TOKENS, scale=1.0, seed=0, num_classes=NUM_CLASSES
):
    """Random heads with bias; the teacher's caps and scales its logits."""
    generator = torch.Generator().manual_seed(seed)
    student_rows, teacher_rows = SIZES[sizes] if isinstance(sizes, str) else sizes

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = ((tokens, HIDDEN), (student_rows, HIDDEN), (student_rows,))
    inputs = [draw(*shape).to(dtype).requires_grad_() for shape in shapes]
    weight, bias = draw(teacher_rows, TEACHER_HIDDEN).to(dtype), draw(teacher_rows)
    hidden = draw(tokens, TEACHER_HIDDEN).bfloat16()
    transform = LogitTransform(scale=1.3, softcap=None if scale > 1 else 6.0)
    teacher = TeacherHead(
        weight,
        bias.to(torch.float64 if dtype == torch.float64 else torch.float32),
        transform,
        dtype,
        num_classes=min(num_classes, teacher_rows),
    )
    targets = torch.randint(min(num_classes, teacher_rows), (tokens,), generator=generator)
    return Case(inputs, teacher, micro_batch(hidden, targets, torch.linspace(0.2, 1.5, tokens)))


def micro_batch(hidden, targets, weights):
    none = torch.zeros(0)
    shape = (1, len(targets), 0, 0)
    return MicroBatch(none, None, none, none, targets, weights, None, *shape, hidden)


def run(case, objective=EVERYTHING, inputs=None, dtype=torch.float64):
    hidden, weight, bias = inputs or case.inputs
    head = OutputHead(weight, bias, compute_dtype=dtype)
    return head_loss(hidden, head, HiddenObjective(objective, case.batch, case.teacher))


def teacher_logits(case):
    """[N, V_T] in float64, of the same bfloat16 states."""
    teacher = case.teacher
    z = case.batch.teacher_hidden.double() @ teacher.weight.double().T
    z = teacher.transform.scale * (z + teacher.bias.double())
    cap = teacher.transform.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def classes_of(logits, size, has_tail):
    """Probabilities [N, O] over ids below ``size``, each by itself, and maybe all others."""
    p = torch.softmax(logits, dim=1)
    inside, outside = p[:, :size], p[:, size:].sum(dim=1, keepdim=True)
    if has_tail:
        return torch.cat([inside, outside], dim=1)
    return inside / inside.sum(dim=1, keepdim=True)


def dense_terms(case, objective, inputs=None):
    """Each term [N] by the textbook formulas from all logits, differentiable in the inputs."""
    hidden, weight, bias = (t.double() for t in inputs or case.inputs)
    z, t = hidden @ weight.T + bias, teacher_logits(case)
    size, temperature = case.teacher.num_classes, objective.temperature
    has_tail = z.shape[1] > size
    q = classes_of(z / temperature, size, has_tail)
    p = classes_of(t / temperature, size, has_tail)
    terms = {}
    for name in objective.weights:
        if name == "cross_entropy":
            target = case.batch.targets
            terms[name] = torch.nn.functional.cross_entropy(z, target, reduction="none")
        else:
            terms[name] = torch.stack(
                [slow_divergence(name, p[i], q[i], has_tail) for i in range(len(p))]
            )
    return terms


def dense_loss(case, objective, inputs=None):
    squared = objective.temperature**2 if objective.temperature_squared else 1.0
    loss = 0.0
    for name, term in dense_terms(case, objective, inputs).items():
        loss = loss + objective.weights[name] * (1 if name == "cross_entropy" else squared) * term
    return (case.batch.weights * loss).sum()


def gradients(total, inputs):
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("temperature", [(1.0, False), (2.5, False), (0.6, True)])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_gradients_are_those_of_the_dense_formulas(monkeypatch, sizes, temperature):
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", 3 * 66 * 8)
    case = make(sizes)
    settings = dict(zip(("temperature", "temperature_squared"), temperature, strict=True))
    for name, alone in {**TERM, "everything": EVERYTHING}.items():
        objective = alone.model_copy(update=settings)
        sums, expected = run(case, objective), dense_loss(case, objective)
        torch.testing.assert_close(sums.total, expected, rtol=1e-9, atol=1e-12, msg=name)
        grads, wanted = gradients(sums.total, case.inputs), gradients(expected, case.inputs)
        torch.testing.assert_close(grads, wanted, rtol=1e-8, atol=1e-10, msg=name)
        for term, values in dense_terms(case, objective).items():
            total = (case.batch.weights * values).sum()
            torch.testing.assert_close(sums.terms[term], total, rtol=1e-9, atol=1e-12)


def figures_of(objective, z):
    """Figures of all tokens; their logits z become gradients."""
    objective.begin(slice(0, len(z)))
    return objective.differentiate(z, slice(0, len(z)))


def test_worked_by_hand_at_temperature_two():
    # z = (2 ln 3, 0), z / 2 = (ln 3, 0): q = (0.75, 0.25). Teacher (0, 0): p = (0.5, 0.5).
    # KL(p || q) = 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25) = -0.202733 + 0.346574 = 0.143841.
    # Gradient (q - p) / 2 = (0.125, -0.125). At temperature 1 q is (0.9, 0.1) and -ln 0.1 =
    # 2.302585 for target 1, gradient (0.9, -0.9).
    z = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    teacher = TeacherHead(torch.zeros(2, 3).double(), compute_dtype=z.dtype, num_classes=2)
    batch = micro_batch(torch.ones(1, 3).bfloat16(), torch.tensor([1]), torch.ones(1))
    objective = ObjectiveConfig(forward_kl=1, cross_entropy=1, temperature=2)
    figures = figures_of(HiddenObjective(objective, batch, teacher), z)
    assert figures[0].tolist() == pytest.approx([0.143841, 2.302585, 0, 0, 0], abs=1e-6)
    assert z[0].tolist() == pytest.approx([1.025, -1.025], abs=1e-9)
    z = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    squared = ObjectiveConfig(forward_kl=1, temperature=2, temperature_squared=True)
    objective = HiddenObjective(squared, batch, teacher)
    figures = figures_of(objective, z)
    assert z[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-9)
    assert objective.total(figures).item() == pytest.approx(4 * 0.143841, abs=1e-5)
    assert objective.sums(None, figures).terms["forward_kl"].item() == pytest.approx(0.143841, 1e-5)


@pytest.mark.parametrize("sizes", ["equal", "both"])
@pytest.mark.parametrize("name", TERMS)
def test_finite_differences_agree_through_the_head(name, sizes):
    case = make(sizes)
    objective = TERM[name].model_copy(update={"temperature": 1.7})
    grads = gradients(run(case, objective).total, case.inputs)
    generator, step = torch.Generator().manual_seed(1), 1e-5
    for t, grad in zip(case.inputs, grads, strict=True):
        direction = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if x is t else x for x in case.inputs]
            ends.append(run(case, objective, moved).total.item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6, abs=1e-8)


def own_teacher(case, dtype, rows=None):
    """A teacher that is the student: its head, the same (rounded) hidden states."""
    hidden, weight, bias = case.inputs
    hidden = hidden.detach().bfloat16()
    teacher = TeacherHead(
        weight.detach()[:rows],
        bias.detach()[:rows],
        compute_dtype=dtype,
        num_classes=case.teacher.num_classes,
    )
    inputs = [hidden.to(dtype).requires_grad_(), weight, bias]
    return Case(inputs, teacher, micro_batch(hidden, case.batch.targets, case.batch.weights))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", ["equal", "student"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name, sizes, dtype, temperature):
    case = own_teacher(make(sizes, dtype), dtype)
    objective = TERM[name].model_copy(update={"temperature": temperature})
    sums = run(case, objective, dtype=dtype)
    assert sums.total.abs() < (1e-12 if dtype == torch.float64 else 1e-5)
    if name not in ("total_variation", "acceptance"):  # Their gradients jump where p = q.
        for gradient in gradients(sums.total, case.inputs):
            assert gradient.abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_padding_of_the_teachers_head_alone_leaves_no_loss_where_the_rest_agrees():
    # The teacher has 4 rows more than the student, of some mass; given the others it is equal.
    case = own_teacher(make("equal"), torch.float64)
    head = case.teacher
    weight = torch.cat([head.weight, torch.zeros(4, HIDDEN, dtype=torch.float64)])
    bias = torch.cat([head.bias, torch.zeros(4, dtype=torch.float64)])
    padded = TeacherHead(weight, bias, compute_dtype=torch.float64, num_classes=NUM_CLASSES)
    sums = run(
        Case(case.inputs, padded, case.batch), EVERYTHING.model_copy(update={"cross_entropy": 0})
    )
    assert 0 < sums.teacher_tail_mass < case.batch.weights.sum()
    assert sums.student_tail_mass == 0 and sums.total.abs() < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_full_value_is_what_a_top_k_partition_rises_to(name):
    case = make()
    hidden, weight, bias = case.inputs
    z, teacher = (hidden @ weight.T + bias).detach(), teacher_logits(case)
    full = figures_of(HiddenObjective(TERM[name], case.batch, case.teacher), z.clone())[:, 0]
    for k in (1, 4, 20, NUM_CLASSES - 1, NUM_CLASSES):
        part = on(name, z, teacher_partition(teacher, k))
        assert (part <= full + 1e-12).all()
    torch.testing.assert_close(part, full, rtol=1e-10, atol=1e-12)


def test_a_students_padding_is_pushed_down_and_reverse_kl_counts_the_floor():
    case = make("student")
    sums = run(case, TERM["reverse_kl"])
    assert sums.floored_tokens == TOKENS and sums.teacher_tail_mass == 0
    gradient = gradients(sums.total, case.inputs)[2]
    assert sums.student_tail_mass > 0 and (gradient[NUM_CLASSES:] > 0).all()
    assert run(make("equal"), TERM["reverse_kl"]).floored_tokens == 0


def test_the_size_of_chunks_and_of_blocks_changes_nothing(monkeypatch):
    results = []
    for chunk_rows, block_rows in ((1, 1), (2, 1), (3, 2), (100, 3), (100, 100)):
        monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", chunk_rows * 66 * 8)
        monkeypatch.setattr(full_vocabulary, "CPU_BLOCK_BYTES", block_rows * 66 * 8)
        case = make("both")
        objective = EVERYTHING.model_copy(update={"temperature": 1.5})
        sums = run(case, objective)
        results.append((sums.total.detach(), *gradients(sums.total, case.inputs)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-14)


def test_tokens_may_be_differentiated_in_any_parts_and_more_than_once():
    case = make("both")
    hidden, weight, bias = case.inputs
    z = (hidden @ weight.T + bias).detach()
    once = z.clone()
    objective = HiddenObjective(
        TERM["jsd"].model_copy(update={"temperature": 2}), case.batch, case.teacher
    )
    figures = figures_of(objective, once)
    for parts in ([(0, TOKENS)], [(2, 4), (0, 2), (4, TOKENS + 5)], [(1, 5), (1, 3)]):
        for start, stop in parts:
            part = z[start:stop].clone()
            part_figures = objective.differentiate(part, slice(start, stop))
            torch.testing.assert_close(part_figures, figures[start:stop], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(part, once[start:stop], rtol=1e-12, atol=1e-14)


def test_micro_batches_sum_to_the_batch():
    case = make("both")
    whole = gradients(run(case).total, case.inputs)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, TOKENS)):
        hidden, weight, bias = case.inputs
        batch = case.batch
        part = micro_batch(batch.teacher_hidden[rows], batch.targets[rows], batch.weights[rows])
        inputs = [hidden[rows], weight, bias]
        total = run(Case(inputs, case.teacher, part), inputs=inputs).total
        parts.append(gradients(total, case.inputs))
    added = [sum(gradient) for gradient in zip(*parts, strict=True)]
    torch.testing.assert_close(added, list(whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_exists_forward_or_backward(monkeypatch, dtype):
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", 2 * 66 * 4)
    monkeypatch.setattr(full_vocabulary, "CPU_BLOCK_BYTES", 66 * 4)
    monkeypatch.setattr(chunking, "CPU_WIDE_BYTES", 66 * 4)
    case = make("both", dtype, tokens=20)
    with LargestTensor() as largest:
        run(case, dtype=dtype).total.backward()
    assert largest.num_numbers == 66 * HIDDEN < 20 * 64


def test_no_token_is_a_loss_of_zero():
    case = make(tokens=0)
    sums = run(case)
    assert sums.total.item() == 0 and set(sums.terms) == set(EVERYTHING.weights)
    assert all((g == 0).all() for g in gradients(sums.total, case.inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", TERMS)
def test_logits_of_ten_thousand_stay_finite(name, sizes, dtype):
    case = make(sizes, dtype, scale=70.0)
    assert case.inputs[0].detach().float().mm(case.inputs[1].detach().float().T).abs().max() > 1e4
    assert teacher_logits(case).abs().max() > 1e4
    for temperature in (1.0, 0.5, 4.0):
        objective = TERM[name].model_copy(update={"temperature": temperature})
        sums = run(case, objective, dtype=dtype)
        grads = gradients(sums.total, case.inputs)
        assert math.isfinite(sums.total.item())
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_bfloat16_is_right_to_its_own_precision(monkeypatch, chunk_rows):
    # The same rounded inputs in float64; each product is off by up to 2^-9 of itself.
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", chunk_rows * 66 * 2)
    monkeypatch.setattr(chunking, "CPU_WIDE_BYTES", 66 * 4)
    case = make("both", torch.bfloat16)
    sums, exact = run(case, dtype=torch.bfloat16), dense_loss(case, EVERYTHING)
    assert sums.total.dtype == torch.float32
    assert sums.total.item() == pytest.approx(exact.item(), rel=2e-2)
    grads, wanted = gradients(sums.total, case.inputs), gradients(exact, case.inputs)
    for got, expected in zip(grads, wanted, strict=True):
        assert relative_error(got.double(), expected.double()) < 3e-2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_over_random_shapes_all_is_finite_right_and_not_negative(data):
    num_classes = data.draw(st.integers(2, 24), "num_classes")
    sizes = tuple(
        num_classes + data.draw(st.integers(0, 3), side) for side in ("student", "teacher")
    )
    tokens = data.draw(st.integers(1, 4), "tokens")
    scale = data.draw(st.sampled_from([1e-3, 0.5, 1.5]), "scale")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    temperature = data.draw(st.sampled_from([1.0, 0.5, 4.0]), "temperature")
    seed = data.draw(st.integers(0, 2**31), "seed")
    case = make(sizes, dtype, tokens, scale, seed, num_classes)
    for name in DIVERGENCES:
        objective = TERM[name].model_copy(update={"temperature": temperature})
        sums, exact = run(case, objective, dtype=dtype), dense_loss(case, objective)
        value, expected = sums.total.double(), exact.double()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.isfinite(value) and value > -1e-5, name
        grads, wanted = gradients(sums.total, case.inputs), gradients(exact, case.inputs)
        for got, right in zip(grads, wanted, strict=True):
            allowed = 1e-9 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                got.double(), right.double(), rtol=allowed, atol=10 * allowed, msg=name
            )
