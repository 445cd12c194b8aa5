"""The global step on a tiny model: cuts, ranks, masks, and what stops it."""

import numpy as np
import pytest
import torch

from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.train.batch.batch import collate, cut_micro_batches, dummy_micro_batch
from raystill.train.step.step import NonFiniteLossError
from tests.support.slow_objective import loss_on_logits
from tests.support.tiny_student import (
    OBJECTIVE,
    STOP_ID,
    TOP_K,
    VOCAB,
    flat,
    gradients_of_first_step,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    training_config,
)
from tests.support.workers import run_workers

# Rows of each step held by rank 0 and rank 1: uneven, rank 1 empty at step 1, rank 0 at step 2.
SHARES = [(range(0, 9), range(9, 12)), (range(12, 17), ()), ((), range(17, 20)), ([20], [21, 22])]


def test_the_gradient_is_that_of_the_weighted_mean_over_all_tokens():
    rows = [make_row(i) for i in range(6)]
    module = tiny_module(torch.float64)
    step = make_step(module, training_config(max_grad_norm=None))
    grads, result = gradients_of_first_step(module, step, rows)

    slow = tiny_module(torch.float64)
    losses = []
    for row in rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids])).long()
        logits = slow.model(input_ids=ids[None]).logits[0]
        for t in range(len(row.response_ids)):
            log_q = torch.log_softmax(logits[len(row.prompt_ids) + t - 1], dim=0)
            top = torch.from_numpy(row.topk_ids[t]).long()
            log_p = np.append(row.topk_logprobs[t], row.tail_logprob[t])
            log_p = torch.log_softmax(torch.from_numpy(log_p), dim=0).double()
            rest = torch.ones(VOCAB, dtype=torch.bool)
            rest[top] = False
            log_q_classes = torch.cat([log_q[top], torch.logsumexp(log_q[rest], dim=0)[None]])
            kl = (log_p.exp() * (log_p - log_q_classes)).sum()
            losses.append(kl - 0.3 * log_q[row.response_ids[t]])
    loss = torch.stack(losses).mean()
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(grads, flat(p.grad for p in slow.parameters())) < 1e-6
    assert result.tokens == len(losses) and result.rows == 6
    assert set(result.metrics()) >= {"objective/forward_kl", "objective/cross_entropy", "loss"}
    assert 0 < result.padding_fraction < 1


@pytest.mark.parametrize("normalise", ["token", "row"])
def test_micro_batches_sum_to_the_batch(normalise):
    rows = [make_row(i) for i in range(12)]
    results = []
    for budget in (40, 100_000):
        module = tiny_module(torch.float64)
        training = training_config(tokens_per_micro_batch=budget, normalise=normalise)
        results.append(gradients_of_first_step(module, make_step(module, training), rows))
    assert len(cut_micro_batches(rows, 40)) > 3
    assert relative_error(results[0][0], results[1][0]) < 1e-12
    assert results[0][1].loss == pytest.approx(results[1][1].loss, rel=1e-12)
    assert results[0][1].student_tail_mass == pytest.approx(
        results[1][1].student_tail_mass, rel=1e-12
    )


def test_the_same_cut_is_bitwise_the_same():
    rows = [make_row(i) for i in range(12)]
    results = []
    for order in (1, -1):
        module = tiny_module()
        results.append(gradients_of_first_step(module, make_step(module), rows[::order])[0])
    assert torch.equal(*results)


def logit_gradients(batch):
    """Gradients of the objective on all [B * S, V] logits of a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch.padded_tokens, VOCAB, generator=generator, requires_grad=True)
    loss_on_logits(OBJECTIVE, logits[batch.logit_index], batch).total.backward()
    return logits.grad


def test_prompt_padding_and_dummy_tokens_get_zero_gradient():
    rows = [make_row(i) for i in range(5)]
    batch = collate(rows, "topk", VOCAB)
    bearing = torch.zeros(batch.padded_tokens, dtype=torch.bool)
    width = batch.padded_tokens // len(rows)
    for b, row in enumerate(rows):
        first = b * width + len(row.prompt_ids) - 1
        bearing[first : first + len(row.response_ids)] = True

    touched = (logit_gradients(batch) != 0).any(dim=1)
    assert torch.equal(touched, bearing)
    assert (logit_gradients(dummy_micro_batch("topk", TOP_K)) == 0).all()


def test_the_stop_token_bears_loss_though_it_is_the_padding_token_too():
    # Trained on the teacher's text alone, the student comes to end where the teacher ended.
    row = make_row(3, tokens=4)
    batch = collate([row], "topk", VOCAB)
    module = tiny_module()
    assert module.model.config.pad_token_id == STOP_ID and batch.targets[-1] == STOP_ID
    step = make_step(module, objective=ObjectiveConfig(cross_entropy=1), total_steps=60)

    def stop_probability():
        with torch.no_grad():
            return torch.softmax(module.logits(batch), dim=1)[-1, STOP_ID].item()

    before = stop_probability()
    for number in range(60):
        step.run(number, [row], has_more=True, stop=False)
    assert before < 0.1 and stop_probability() > 0.9


def test_a_step_without_weight_is_skipped_and_leaves_the_weights():
    module = tiny_module()
    before = flat(module.parameters()).clone()
    step = make_step(module)
    result = step.run(0, [], has_more=True, stop=True)
    assert not result.trained and result.rows == 0 and result.loss is None
    assert result.any_more and result.any_stop
    without_context = make_row(1, tokens=1)
    without_context.prompt_ids = without_context.prompt_ids[:0]
    result = step.run(1, [without_context], has_more=False, stop=False)
    assert not result.trained and result.rows == 1 and not result.any_more
    assert torch.equal(flat(module.parameters()), before)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change():
    module = tiny_module()
    module.model.model.norm.weight.data[0] = float("nan")
    before = flat(module.parameters()).clone()
    with pytest.raises(NonFiniteLossError, match=r"loss of step 3 is nan.*training.learning_rate"):
        make_step(module).run(3, [make_row(1)], has_more=True, stop=False)
    assert torch.equal(flat(module.parameters()).nan_to_num(), before.nan_to_num())


def test_gradients_are_clipped_after_the_division():
    module = tiny_module()
    step = make_step(module, training_config(max_grad_norm=1e-3))
    grads, result = gradients_of_first_step(module, step, [make_row(1), make_row(2)])
    assert result.grad_norm > 1e-3
    assert grads.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_every_objective_is_reported_and_the_floor_counted():
    rows = [make_row(i) for i in range(4)]
    rows[1].tail_logprob = np.full_like(rows[1].tail_logprob, -30.0)
    terms = dict.fromkeys(TERMS, 1.0)
    result = make_step(tiny_module(), objective=ObjectiveConfig(**terms)).run(0, rows, True, False)
    assert set(result.objective) == set(TERMS)
    assert result.loss == pytest.approx(sum(result.objective.values()), rel=1e-6)
    assert result.metrics()["floored_tokens"] == len(rows[1].response_ids)
    plain = make_step(tiny_module()).run(0, rows, True, False)
    assert "floored_tokens" not in plain.metrics()


@pytest.mark.parametrize(("name", "warned"), [("forward_kl", False), ("jsd", True)])
def test_mass_outside_the_top_k_is_warned_of_once_in_a_while(caplog, name, warned):
    step = make_step(tiny_module(), objective=ObjectiveConfig(**{name: 1.0}), total_steps=300)
    for number in (0, 1, 150):
        result = step.run(number, [make_row(1)], has_more=True, stop=False)
        assert result.student_tail_mass > 0.1
    logged = [record.getMessage() for record in caplog.records]
    messages = [message for message in logged if "outside the teacher's top K" in message]
    assert len(messages) == (2 if warned else 0)
    assert all("jsd" in message and "signal.top_k" in message for message in messages)


def run_all_steps(module, step, shares):
    """Trains every step on its share; returns the first step's gradients and all results."""
    first, results = None, []
    for number, numbers in enumerate(shares):
        rows = [make_row(i) for i in numbers]
        results.append(step.run(number, rows, number + 1 < len(shares), stop=False))
        if first is None:
            first = flat(p.grad for p in module.parameters())
    return first, results


def train(dtype, rank=0, world_size=1):
    """All of SHARES on one worker, or this rank's part of it in DDP."""
    inner = tiny_module(dtype)
    module = torch.nn.parallel.DistributedDataParallel(inner) if world_size > 1 else inner
    step = make_step(module, training_config(max_grad_norm=None), world_size)
    shares = [share[rank] if world_size > 1 else [*share[0], *share[1]] for share in SHARES]
    grads, results = run_all_steps(inner, step, shares)
    figures = [(r.loss, r.rows, r.tokens, r.any_more, r.student_tail_mass) for r in results]
    return {"grads": grads, "parameters": flat(inner.parameters()), "figures": figures}


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
    assert difference < 1e-10
    assert (alone["parameters"] - flat(tiny_module(torch.float64).parameters())).abs().max() > 1e-3
    for rank in ranks:
        assert rank["nan"], "a loss that is not finite on one rank must stop every rank"


def storages_of_gradients():
    """After each pass of three steps in DDP, in how many storages its gradients are."""
    module = torch.nn.parallel.DistributedDataParallel(
        tiny_module(), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    step = make_step(module, world_size=2)
    counts, forward_backward = [], step._forward_backward

    def watched(batch):
        sums = forward_backward(batch)
        counts.append(len({p.grad.untyped_storage()._cdata for p in module.parameters()}))
        return sums

    step._forward_backward = watched
    for number in range(3):
        step.run(number, [make_row(i, tokens=13) for i in range(12)], has_more=True, stop=False)
    return counts


def test_gradients_of_ddp_are_in_its_buckets_alone_from_the_second_step_on(tmp_path):
    """Passes before the last would hold them a second time: 4 bytes a parameter."""
    for rank in run_workers(storages_main, tmp_path):
        passes = len(rank["counts"]) // 3
        assert passes > 1
        assert rank["counts"][: passes - 1] == [20] * (passes - 1), "beside the buckets"
        assert rank["counts"][passes - 1 :] == [1] * (2 * passes + 1)


def storages_main(rank, folder):
    return {"counts": storages_of_gradients()}


def worker_main(rank, folder):
    results = {"float32": train(torch.float32, rank, 2), "float64": train(torch.float64, rank, 2)}
    module = torch.nn.parallel.DistributedDataParallel(tiny_module())
    if rank == 1:
        module.module.model.model.norm.weight.data[0] = float("nan")
    try:
        make_step(module, world_size=2).run(0, [make_row(1)], has_more=False, stop=False)
        results["nan"] = False
    except NonFiniteLossError:
        results["nan"] = True
    return results
