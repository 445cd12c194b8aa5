"""The load-balancing loss of a mixture of experts: by hand, against transformers', in a step."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raystill.config.objective import ObjectiveConfig
from raystill.train.loss.router import router_balance
from raystill.train.student.module import StudentModule, real_positions
from tests.support.tiny_student import VOCAB, make_row, make_step, tiny_module, training_config


def tiny_mixtral() -> StudentModule:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:  # Unbalanced to begin with.
            parameter.data.mul_(40)
    return StudentModule(model).train()


def test_two_tokens_and_two_experts_by_hand() -> None:
    # Probabilities (3/4, 1/4) and (1/2 + 1/4, ...): both tokens choose the first expert.
    logits = torch.tensor([[0.75, 0.25], [0.6, 0.4]]).log()
    # 2 * (1 * (0.75 + 0.6) / 2 + 0 * ...) = 1.35
    assert float(router_balance([logits], 1)) == pytest.approx(1.35)
    one = torch.tensor([True, False])
    assert float(router_balance([logits], 1, one)) == pytest.approx(1.5)
    assert float(router_balance([torch.zeros(4, 8)], 8)) == pytest.approx(8)


def test_one_layer_is_that_of_transformers_also_in_its_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(2, 7, 5, generator=generator).requires_grad_()
    theirs = mine.detach().flatten(0, 1).requires_grad_()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    got = router_balance([mine], 2, mask)
    expected = load_balancing_loss_func((theirs,), 5, 2, mask)
    got.backward()
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert theirs.grad is not None and mine.grad is not None
    torch.testing.assert_close(mine.grad.flatten(0, 1), theirs.grad)
    assert not mine.grad[1, 4:].any()


def test_padding_is_not_counted() -> None:
    batch = make_step(tiny_mixtral()).batches.make([make_row(i) for i in (1, 2, 5)])
    real = real_positions(batch)
    assert real is not None and int(real.sum()) == batch.input_tokens < batch.padded_tokens
    lengths = [make_row(i).num_inputs for i in (1, 2, 5)]
    assert real.sum(dim=1).tolist() == lengths
    assert all(row[:n].all() for row, n in zip(real, lengths, strict=True))


def test_a_step_balances_and_reports() -> None:
    rows = [make_row(i) for i in range(8)]
    balances = {}
    for weight in (0.0, 10.0):
        step = make_step(
            tiny_mixtral(),
            training_config(learning_rate=3e-3, tokens_per_micro_batch=10_000),
            objective=ObjectiveConfig(cross_entropy=1.0, router_balance=weight),
            total_steps=30,
        )
        for number in range(30):
            result = step.run(number, rows, has_more=True, stop=False)
            if weight:
                parts = result.objective["cross_entropy"] + 10 * result.objective["router_balance"]
                assert result.loss == pytest.approx(parts, rel=1e-5)
        measured = make_step(
            step.module, objective=ObjectiveConfig(cross_entropy=1.0, router_balance=1.0)
        )
        figures = measured.run(0, rows, has_more=True, stop=False)
        balances[weight] = figures.objective["router_balance"]
    assert balances[0.0] - 2 > 3 * (balances[10.0] - 2) >= 0, balances


def test_recomputed_layers_have_the_same_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        student = tiny_mixtral()
        if recompute:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        step = make_step(
            student, objective=ObjectiveConfig(forward_kl=1.0, router_balance=0.5), total_steps=2
        )
        step.run(0, [make_row(i) for i in range(5)], has_more=True, stop=False)
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters]))
    torch.testing.assert_close(*gradients)


def test_a_student_without_routers_is_refused_before_its_first_step() -> None:
    objective = ObjectiveConfig(cross_entropy=1.0, router_balance=0.1)
    with pytest.raises(ValueError, match="has no routers that say their logits; set it to 0"):
        make_step(tiny_module(), objective=objective)


def test_experts_that_do_not_say_their_logits_are_refused_in_the_step() -> None:
    student = tiny_module()
    student.model.config.num_experts_per_tok = 2
    step = make_step(student, objective=ObjectiveConfig(cross_entropy=1.0, router_balance=0.1))
    with pytest.raises(ValueError, match="has no routers that say their logits; set it to 0"):
        step.run(0, [make_row(1)], has_more=True, stop=False)
