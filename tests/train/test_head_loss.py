"""The objective from hidden states and head: dense references, chunks, heads of every kind."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raystill.config.objective import ObjectiveConfig
from raystill.model.head import LogitTransform, logit_transform
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import topk_partition
from raystill.train.loss import head_loss as module
from raystill.train.loss.head_loss import OutputHead, chunks, head_loss
from raystill.train.loss.objective import TokenObjective
from tests.support.slow_objective import DIVERGENCES, EVERYTHING, TOKENS, VOCAB, random_logits, slow
from tests.support.tiny_student import relative_error

HIDDEN = 6
TEXT = ObjectiveConfig(cross_entropy=1.5)
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.3),
    "capped": LogitTransform(softcap=2.5),
    "both": LogitTransform(scale=2.0, softcap=4.0),
}


def tensors(dtype=torch.float64, num_tokens=TOKENS, size=1.0):
    """Hidden states, weight and bias that all want a gradient."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((num_tokens, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return [(size * t).to(dtype).requires_grad_() for t in made]


def signal(kind):
    """A micro-batch of random targets and weights; of K ids two are beyond the student's head."""
    teacher = random_logits(0, vocab=VOCAB + 5)
    log_p, partition = torch.log_softmax(teacher, dim=1), None
    targets = log_p[:, :VOCAB].topk(3, dim=1).indices[:, 2]
    if kind != "text":
        ids = targets[:, None] if kind == "sampled" else log_p.topk(8, dim=1).indices
        if kind == "topk":
            ids[1, 3], ids[2, :2] = VOCAB + 1, torch.tensor([VOCAB, VOCAB + 4])
        tail = torch.logsumexp(log_p.scatter(1, ids, -math.inf), dim=1)
        partition = topk_partition(ids, log_p.gather(1, ids), tail, VOCAB)
        log_p = partition.log_p.double()
        partition = replace(partition, log_p=log_p - torch.logsumexp(log_p, dim=1, keepdim=True))
    none, weights = torch.zeros(0), torch.linspace(0.0, 1.5, TOKENS)
    return MicroBatch(none, None, none, none, targets, weights, partition, 1, TOKENS, 0, 0)


def dense_loss(hidden, weight, bias, transform, objective, batch):
    """The total from all logits at once, by autograd through the textbook formulas."""
    z = hidden.double() @ weight.double().T
    z = transform.scale * (z if bias is None else z + bias.double())
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    nll = torch.nn.functional.cross_entropy(z, batch.targets, reduction="none")
    loss = objective.weights.get("cross_entropy", 0.0) * nll
    for name in objective.divergences:
        loss = loss + objective.weights[name] * slow(name, z, batch.partition)
    return (batch.weights * loss).sum()


def run(inputs, batch, objective=EVERYTHING, transform=TRANSFORMS["plain"], dtype=torch.float64):
    hidden, weight, bias = inputs
    head = OutputHead(weight, bias, transform, dtype)
    return head_loss(hidden, head, TokenObjective(objective, batch))


def gradients(total, inputs):
    return torch.autograd.grad(total, [t for t in inputs if t is not None and t.requires_grad])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", ["text", "sampled", "topk"])
def test_value_and_gradients_are_those_of_the_dense_formulas(monkeypatch, kind, transform):
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 3 * VOCAB * 8)
    objective, batch, inputs = TEXT if kind == "text" else EVERYTHING, signal(kind), tensors()
    sums = run(inputs, batch, objective, transform)
    expected = dense_loss(*inputs, transform, objective, batch)
    torch.testing.assert_close(sums.total, expected, rtol=1e-10, atol=0)
    grads, wanted = gradients(sums.total, inputs), gradients(expected, inputs)
    torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-11)
    assert set(sums.terms) == set(objective.weights)
    assert (sums.student_tail_mass is None) == (kind == "text")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_differences_agree_through_the_head(name):
    inputs, batch = tensors(), signal("topk")
    objective = ObjectiveConfig(**{name: 1.0})
    grads = gradients(run(inputs, batch, objective, TRANSFORMS["both"]).total, inputs)
    generator, step = torch.Generator().manual_seed(1), 1e-5
    for t, grad in zip(inputs, grads, strict=True):
        direction = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if x is t else x for x in inputs]
            ends.append(run(moved, batch, objective, TRANSFORMS["both"]).total.item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6, abs=1e-8)


def test_the_size_of_chunks_changes_nothing(monkeypatch):
    results = []
    for tokens_per_chunk in (1, 2, 3, 100):
        monkeypatch.setattr(module, "CPU_CHUNK_BYTES", tokens_per_chunk * VOCAB * 8)
        inputs = tensors()
        sums = run(inputs, signal("topk"), transform=TRANSFORMS["both"])
        results.append((sums.total.detach(), *gradients(sums.total, inputs)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("num_tokens", "lengths"), [(0, []), (1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])]
)
def test_chunks_are_of_equal_length(monkeypatch, num_tokens, lengths):
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 4 * VOCAB * 2)
    parts = chunks(num_tokens, VOCAB, torch.bfloat16, torch.device("cpu"))
    assert [len(range(num_tokens)[rows]) for rows in parts] == lengths


@pytest.mark.parametrize(
    ("num_tokens", "lengths"), [(16, [16]), (40, [40]), (50, [32, 18]), (100, [48, 48, 4])]
)
def test_long_chunks_have_a_length_that_products_like(monkeypatch, num_tokens, lengths):
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 50 * VOCAB * 4)
    parts = chunks(num_tokens, VOCAB, torch.float32, torch.device("cpu"))
    assert [len(range(num_tokens)[rows]) for rows in parts] == lengths


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any tensor made under it holds."""

    num_numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else [made]:
            if isinstance(t, torch.Tensor):
                self.num_numbers = max(self.num_numbers, t.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_exists_forward_or_backward(monkeypatch, dtype):
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 2 * VOCAB * 4)
    monkeypatch.setattr("raystill.train.loss.log_probs.CPU_BLOCK_BYTES", 2 * VOCAB * 4)
    inputs, batch = tensors(dtype), signal("topk")
    with LargestTensor() as largest:
        sums = run(inputs, batch, transform=TRANSFORMS["capped"], dtype=dtype)
        sums.total.backward()
    assert largest.num_numbers == VOCAB * HIDDEN < TOKENS * VOCAB


def test_a_frozen_head_costs_no_gradient_and_changes_no_other():
    inputs, batch = tensors(), signal("topk")
    (expected, *_) = gradients(run(inputs, batch).total, inputs)
    hidden, weight, bias = inputs[0], inputs[1].detach(), inputs[2].detach()
    grads = gradients(run((hidden, weight, bias), batch).total, [hidden])
    assert torch.equal(grads[0], expected)
    kept = module._Gradients(hidden, OutputHead(weight, bias), [True, False, False])
    kept.add(slice(0, 2), torch.ones(2, VOCAB).double(), hidden[:2], weight)
    assert kept.finished()[1:] == [None, None] and kept.weight is None


def test_a_frozen_body_still_gives_the_head_its_gradient_and_no_grad_gives_none():
    inputs, batch = tensors(), signal("topk")
    expected = gradients(run(inputs, batch).total, inputs)[1:]
    grads = gradients(run((inputs[0].detach(), *inputs[1:]), batch).total, inputs[1:])
    torch.testing.assert_close(grads, expected)
    with torch.no_grad():
        sums = run(inputs, batch)
    assert not sums.total.requires_grad


def test_a_head_without_bias_that_is_also_the_embedding_gets_both_gradients():
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    batch, tokens = signal("topk"), torch.arange(TOKENS)
    plain = TRANSFORMS["plain"]
    total = run((torch.tanh(table[tokens]), table, None), batch).total
    expected = dense_loss(torch.tanh(table[tokens]), table, None, plain, EVERYTHING, batch)
    torch.testing.assert_close(
        gradients(total, [table]), gradients(expected, [table]), rtol=1e-9, atol=1e-11
    )


def test_the_gradient_is_scaled_by_what_comes_in_and_can_be_taken_once():
    inputs, batch = tensors(), signal("topk")
    once = gradients(run(inputs, batch).total, inputs)
    total = run(inputs, batch).total
    (0.25 * total).backward(retain_graph=True)
    torch.testing.assert_close([t.grad for t in inputs], [0.25 * g for g in once])
    with pytest.raises(AssertionError, match="run the forward pass again"):
        total.backward()


@pytest.mark.parametrize("kind", ["text", "topk"])
def test_no_token_is_a_loss_of_zero(kind):
    full, inputs = signal(kind), tensors(num_tokens=0)
    part = None if full.partition is None else full.partition[:0]
    batch = replace(full, targets=full.targets[:0], weights=full.weights[:0], partition=part)
    objective = TEXT if kind == "text" else EVERYTHING
    sums = run(inputs, batch, objective)
    assert sums.total.item() == 0 and set(sums.terms) == set(objective.weights)
    assert all((g == 0).all() for g in gradients(sums.total, inputs))


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize("transform", ["plain", "both"])
def test_bfloat16_is_right_to_its_own_precision(monkeypatch, transform, chunk_rows):
    # The same rounded inputs in float64; bfloat16 has 8 bits, so each product is off by up to 2^-9.
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", chunk_rows * VOCAB * 2)
    monkeypatch.setattr(module, "CPU_WIDE_BYTES", VOCAB * 4)
    inputs, batch = tensors(torch.bfloat16), signal("topk")
    sums = run(inputs, batch, transform=TRANSFORMS[transform], dtype=torch.bfloat16)
    exact = dense_loss(*inputs, TRANSFORMS[transform], EVERYTHING, batch)
    assert sums.total.dtype == torch.float32
    assert sums.total.item() == pytest.approx(exact.item(), rel=1e-2)
    for got, wanted in zip(gradients(sums.total, inputs), gradients(exact, inputs), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got.double(), wanted.double()) < 2e-2


def test_products_in_bfloat16_add_the_heads_gradient_in_float32(monkeypatch):
    # Chunks of one token: added in bfloat16, late tokens would be lost.
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", VOCAB * 4)
    inputs, batch = tensors(torch.float32), signal("topk")
    grads = gradients(run(inputs, batch, dtype=torch.bfloat16).total, inputs)
    exact = gradients(run(inputs, batch, dtype=torch.float32).total, inputs)
    for got, wanted in zip(grads, exact, strict=True):
        assert got.dtype == torch.float32 and relative_error(got, wanted) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_of_ten_thousand_stay_finite(name, dtype):
    inputs, batch = tensors(dtype, size=60.0), signal("topk")
    assert (inputs[0] @ inputs[1].T).abs().max() > 1e4
    sums = run(inputs, batch, ObjectiveConfig(**{name: 1.0}), dtype=dtype)
    grads = gradients(sums.total, inputs)
    assert math.isfinite(sums.total.item()) and all(torch.isfinite(g).all() for g in grads)


def test_the_transform_follows_the_configuration():
    assert logit_transform({"logit_scale": 1, "final_logit_softcapping": None}) == LogitTransform()
    assert logit_transform({"model_type": "granite", "logits_scaling": 4}).scale == 0.25
    assert logit_transform({"model_type": "hyperclovax", "logits_scaling": 4}).scale == 4
    assert logit_transform({"final_logit_softcapping": 30.0}).softcap == 30
    with pytest.raises(ValueError, match="logit_scale is True; expected a number above 0"):
        logit_transform({"logit_scale": True})
