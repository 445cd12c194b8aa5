"""The global step with the hidden signal: cuts, ranks, temperature, weights, another teacher."""

import numpy as np
import pytest
import torch

from raystill.base.errors import RunError
from raystill.config.objective import ObjectiveConfig
from tests.support.tiny_student import (
    VOCAB,
    flat,
    gradients_of_first_step,
    make_hidden_row,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    tiny_teacher,
    training_config,
)
from tests.support.workers import run_workers

OBJECTIVE = ObjectiveConfig(
    forward_kl=1.0,
    jsd=0.5,
    cross_entropy=0.3,
    temperature=1.5,
    token_weights={"truncated_rows": 0.5, "by": "entropy"},
)
# Rows of each step held by rank 0 and rank 1: uneven, rank 1 empty at step 0, rank 0 at step 1.
SHARES = [(range(0, 9), ()), ((), range(9, 12)), (range(12, 17), range(17, 20))]


def make_rows(numbers):
    """Hidden rows, every third of them cut off by its length."""
    rows = [make_hidden_row(number) for number in numbers]
    for row in rows[::3]:
        row.finish_reason = "length"
    return rows


def hidden_step(module, dtype=torch.float64, training=None, world_size=1, objective=OBJECTIVE):
    return make_step(
        module,
        training or training_config(max_grad_norm=None),
        world_size,
        objective=objective,
        signal_kind="hidden",
        teacher=tiny_teacher(dtype),
    )


@pytest.mark.parametrize("normalise", ["token", "row"])
def test_the_gradient_is_that_of_the_weighted_mean_over_all_tokens(normalise):
    rows = make_rows(range(6))
    module = tiny_module(torch.float64)
    step = hidden_step(module, training=training_config(max_grad_norm=None, normalise=normalise))
    grads, result = gradients_of_first_step(module, step, rows)

    slow, losses, weights = tiny_module(torch.float64), [], []
    for row in rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids])).long()
        first = len(row.prompt_ids) - 1
        z = slow.model(input_ids=ids[None]).logits[0][first:-1]
        t = (
            torch.from_numpy(row.hidden).view(torch.bfloat16).double()
            @ tiny_teacher().weight.T.double()
        )
        nll = torch.nn.functional.cross_entropy(z, ids[first + 1 :], reduction="none")
        q = torch.softmax(z / 1.5, dim=1)  # The student's head has no padding, the teacher's has.
        p = torch.softmax(t[:, :VOCAB] / 1.5, dim=1)
        m = (p + q) / 2
        kl = (p * (p / q).log()).sum(dim=1)
        jsd = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(dim=1)
        losses.append(kl + 0.5 * jsd + 0.3 * nll)
        whole = torch.softmax(t, dim=1)
        entropy = -(whole * whole.log()).sum(dim=1)
        weight = 0.5 if row.finish_reason == "length" else 1.0
        weight *= 1.0 if normalise == "token" else 1 / len(nll)
        weights.append(weight * entropy / entropy.mean())
    weights, losses = torch.cat(weights), torch.cat(losses)
    loss = (weights * losses).sum() / weights.sum()
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(grads, flat(p.grad for p in slow.parameters())) < 1e-6
    assert result.student_tail_mass == 0 and 0 < result.teacher_tail_mass < 1


def test_micro_batches_sum_to_the_batch():
    rows, results = make_rows(range(12)), []
    for budget in (40, 100_000):
        module = tiny_module(torch.float64)
        training = training_config(tokens_per_micro_batch=budget, max_grad_norm=None)
        step = hidden_step(module, training=training)
        results.append(gradients_of_first_step(module, step, rows))
    # Weights are float32, and their entropies come from other chunks of tokens.
    assert relative_error(results[0][0], results[1][0]) < 1e-7
    assert results[0][1].loss == pytest.approx(results[1][1].loss, rel=1e-7)


def test_a_row_without_a_token_of_the_response_changes_nothing():
    empty, results = make_hidden_row(9), []
    for name in ("response_ids", "hidden", "sampled_logprobs"):
        setattr(empty, name, getattr(empty, name)[:0])
    for rows in (make_rows(range(4)), [*make_rows(range(4)), empty]):
        module = tiny_module(torch.float64)
        results.append(gradients_of_first_step(module, hidden_step(module), rows)[0])
    assert torch.equal(*results)


def broken(number):
    """A row whose log probabilities are of another teacher than its hidden states."""
    row = make_hidden_row(number, tokens=16)
    row.sampled_logprobs = row.sampled_logprobs - 1
    return row


def test_another_teacher_is_noticed_before_the_weights_change():
    module = tiny_module()
    before = flat(module.parameters()).clone()
    with pytest.raises(RunError, match=r"by 1 nats on average; expected at most 0\.02"):
        hidden_step(module, torch.float32).run(0, [broken(1)], has_more=True, stop=False)
    assert torch.equal(flat(module.parameters()), before)


def test_the_first_rows_are_compared_and_no_later_ones():
    step = hidden_step(tiny_module(), torch.float32)
    assert not step.run(0, [], has_more=True, stop=False).trained
    assert step.run(1, [make_hidden_row(1)], has_more=True, stop=False).trained
    assert step.run(2, [broken(2)], has_more=True, stop=False).trained


def test_a_head_and_the_hidden_signal_come_together():
    with pytest.raises(AssertionError, match="teacher's head is needed with the signal hidden"):
        make_step(tiny_module(), teacher=tiny_teacher())
    with pytest.raises(ValueError, match="hidden is missing"):
        hidden_step(tiny_module()).run(0, [make_row(1)], has_more=True, stop=False)


def train(dtype, rank=0, world_size=1):
    """All of SHARES on one worker, or this rank's part of it in DDP."""
    inner = tiny_module(dtype)
    module = torch.nn.parallel.DistributedDataParallel(inner) if world_size > 1 else inner
    step = hidden_step(module, dtype, world_size=world_size)
    figures, first = [], None
    for number, shares in enumerate(SHARES):
        made = [make_rows(share) for share in shares]
        mine = made[rank] if world_size > 1 else [*made[0], *made[1]]
        result = step.run(number, mine, number + 1 < len(SHARES), stop=False)
        figures.append((result.loss, result.rows, result.tokens, result.teacher_tail_mass))
        if first is None:
            first = flat(p.grad for p in inner.parameters())
    return {"grads": first, "parameters": flat(inner.parameters()), "figures": figures}


def test_two_workers_with_uneven_and_empty_shares_train_as_one(tmp_path):
    ranks = run_workers(worker_main, tmp_path)
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        alone = train(dtype)
        for rank in ranks:
            assert relative_error(rank[name]["grads"], alone["grads"]) < 1e-6
            for got, expected in zip(rank[name]["figures"], alone["figures"], strict=True):
                assert got == pytest.approx(expected, rel=1e-5)
        assert torch.equal(ranks[0][name]["parameters"], ranks[1][name]["parameters"])
    difference = (ranks[0]["float64"]["parameters"] - alone["parameters"]).abs().max()
    assert difference < 1e-7
    for rank in ranks:
        assert rank["refused"], "another teacher's states on one rank must stop every rank"


def worker_main(rank, folder):
    results = {"float32": train(torch.float32, rank, 2), "float64": train(torch.float64, rank, 2)}
    module = torch.nn.parallel.DistributedDataParallel(tiny_module())
    rows = [make_hidden_row(1), broken(2)] if rank == 1 else [make_hidden_row(3)]
    try:
        hidden_step(module, torch.float32, world_size=2).run(0, rows, has_more=False, stop=False)
        results["refused"] = False
    except RunError:
        results["refused"] = True
    return results
