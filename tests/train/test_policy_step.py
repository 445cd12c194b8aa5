"""The objective by origin, staleness in the step's figures, and what the sampler is sent."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.result import staleness, token_staleness
from raystill.train.step.step import GlobalStep
from tests.support import tiny_student

TEACHER_WRITTEN = ObjectiveConfig(forward_kl=1.0, cross_entropy=0.3)
STUDENT_WRITTEN = ObjectiveConfig(forward_kl=0.5, reverse_kl=0.5)


def rows_of_both(num=6):
    rows = [tiny_student.make_row(number) for number in range(num)]
    return [replace(row, policy_version=3 if i % 2 else None) for i, row in enumerate(rows)]


def step_with(module, student_written=STUDENT_WRITTEN, budget=64, num_ages=4):
    training = TrainingConfig(
        tokens_per_micro_batch=budget, max_grad_norm=None, learning_rate=1e-12
    )
    batches = BatchMaker(
        training,
        TEACHER_WRITTEN,
        signal_kind="topk",
        student_vocab=tiny_student.VOCAB,
        student_written=student_written,
    )
    optimizer = build_optimizer(module, training)
    return GlobalStep(module, optimizer, batches, total_steps=4, num_ages=num_ages)


def dense_loss(module, rows):
    """The mean over tokens of each row's own objective, from whole logits, in float64."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))
        logits = module.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        log_q = torch.log_softmax(logits[len(row.prompt_ids) - 1 :].double(), dim=1)
        top = log_q.gather(1, torch.from_numpy(row.topk_ids.astype(np.int64)))
        tail = torch.log1p(-top.exp().sum(dim=1, keepdim=True))
        classes = torch.cat([top, tail], dim=1)
        teacher = torch.from_numpy(np.column_stack([row.topk_logprobs, row.tail_logprob])).double()
        forward = (teacher.exp() * (teacher - classes)).sum(dim=1)
        reverse = (classes.exp() * (classes - teacher)).sum(dim=1)
        target = log_q.gather(1, torch.from_numpy(row.response_ids.astype(np.int64))[:, None])
        if row.policy_version is None:
            total = total + (forward - 0.3 * target.squeeze(1)).sum()
        else:
            total = total + (0.5 * forward + 0.5 * reverse).sum()
        tokens += len(row.response_ids)
    return total / tokens


@pytest.mark.parametrize("budget", [16, 4096])
def test_each_row_has_the_objective_of_who_wrote_it(budget):
    module, rows = tiny_student.tiny_module(torch.float64), rows_of_both()
    result = step_with(module, budget=budget).run(3, rows, has_more=False, stop=False)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    expected = dense_loss(module, rows)
    expected.backward()
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_student_written_rows_add_nothing_to_the_cross_entropy():
    module = tiny_student.tiny_module(torch.float64)
    rows = [replace(row, policy_version=0) for row in rows_of_both()]
    result = step_with(module).run(0, rows, has_more=False, stop=False)
    assert result.objective["cross_entropy"] == 0
    assert result.objective["reverse_kl"] > 0


def test_a_step_without_students_rows_is_bitwise_what_it_was():
    rows = [replace(row, policy_version=None) for row in rows_of_both()]
    results = []
    for student_written, num_ages in ((None, 0), (STUDENT_WRITTEN, 4)):
        module = tiny_student.tiny_module()
        step = step_with(module, student_written, num_ages=num_ages)
        result = step.run(0, rows, has_more=False, stop=False)
        results.append((result, [p.grad.clone() for p in module.parameters()]))
    (plain, before), (mixed, after) = results
    assert plain.loss == mixed.loss and plain.grad_norm == mixed.grad_norm
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "student_written_rows" not in plain.metrics()


def test_staleness_is_counted_at_the_step_that_trains():
    rows = rows_of_both()
    assert staleness(5, rows, 4) == [0, 0, 3, 0]
    assert staleness(50, rows, 4) == [0, 0, 0, 3], "the last is: or more"
    assert staleness(1, rows, 4) == [3, 0, 0, 0], "written by weights of lost steps"
    module = tiny_student.tiny_module(torch.float64)
    metrics = step_with(module).run(5, rows, has_more=False, stop=False).metrics()
    assert metrics["student_written_rows"] == 3
    assert metrics["staleness/2"] == 3


def test_staleness_is_counted_by_the_token_too():
    versions = [[3, 3, 4], [], [4, 5]]
    rows = [
        replace(row, policy_version=v[0] if v else None, token_versions=np.array(v, np.int32))
        for row, v in zip(rows_of_both(3), versions, strict=True)
    ]
    assert token_staleness(5, rows, 4) == [1, 2, 2, 0]
    assert token_staleness(9, rows, 4) == [0, 0, 0, 5], "the last is: or more"
    assert token_staleness(3, rows, 4) == [5, 0, 0, 0], "written by weights of lost steps"
    module = tiny_student.tiny_module(torch.float64)
    metrics = step_with(module).run(5, rows, has_more=False, stop=False).metrics()
    told = {n: v for n, v in metrics.items() if "staleness" in n}
    assert told == {
        "staleness/1": 1,
        "staleness/2": 1,
        "token_staleness/0": 1,
        "token_staleness/1": 2,
        "token_staleness/2": 2,
    }


def test_a_tied_head_is_sent_once_and_loads_back():
    from raystill.train.student.export import exported_state
    from raystill.train.worker.policy import without_ties

    module = tiny_student.tiny_module(tied=True)
    state = exported_state(module.model, torch.float32, keep=True)
    sent = load(save(without_ties(state)))
    assert sent.keys() ^ state.keys() == {"lm_head.weight"}
    fresh = tiny_student.tiny_module(tied=True).model
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    missing = fresh.load_state_dict(sent, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    ids = torch.arange(6)[None]
    torch.testing.assert_close(fresh(ids).logits, module.model(ids).logits)
