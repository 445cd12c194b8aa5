"""A step whose loss or gradient is not finite: skipped by all ranks, bounded; its remedy."""

import json
from types import SimpleNamespace

import pytest
import torch

from raystill.base.run_folder import METRICS, RunFolder
from raystill.config.load import compare_identity
from raystill.config.run import RunConfig
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import NonFiniteLossError
from raystill.train.worker.progress import Progress
from tests.support.runs import run_of
from tests.support.tiny_student import (
    flat,
    make_row,
    make_step,
    tiny_module,
    training_config,
)
from tests.support.workers import run_workers

SMALL = {"teacher": {"model": "x"}, "student": {"layers": [0]}, "prompts": {"path": "x"}}


def state_of(step):
    """Weights, moments and step counts, copied."""
    moments = [v.clone() for s in step.optimizer.state.values() for v in s.values()]
    return [flat(step.parameters).clone(), *moments]


def overflow(step, value=torch.inf):
    """Make the next gradient of one norm's weight not finite, with the loss as it is."""
    weight = (getattr(step.module, "module", step.module)).model.model.norm.weight
    return weight.register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_trains(what):
    module = tiny_module()
    step = make_step(module, training_config(skip_non_finite=1))
    step.run(0, [make_row(0)], True, False)
    before = state_of(step)
    if what == "loss":
        good = module.model.model.norm.weight.data.clone()
        module.model.model.norm.weight.data[0] = float("nan")
        skipped = step.run(1, [make_row(1)], True, False)
        module.model.model.norm.weight.data.copy_(good)
    else:
        hook = overflow(step)
        skipped = step.run(1, [make_row(1)], True, False)
        hook.remove()
    assert not skipped.trained and skipped.rows == 1 and skipped.loss is None
    assert f"the {what} of step 1 is" in skipped.not_finite
    json.dumps(skipped.metrics(), allow_nan=False)
    assert all(torch.equal(*pair) for pair in zip(before, state_of(step), strict=True))

    # The step after it is bitwise that of a student which never saw the skipped rows.
    other = tiny_module()
    clean = make_step(other, training_config())
    clean.run(0, [make_row(0)], True, False)
    for each in (step, clean):
        assert each.run(2, [make_row(2)], True, False).trained
    assert torch.equal(flat(module.parameters()), flat(other.parameters()))


def test_without_leave_to_skip_the_error_says_what_may_be_changed():
    step = make_step(tiny_module())
    overflow(step, torch.nan)
    before = state_of(step)
    with pytest.raises(NonFiniteLossError, match="gradient norm of step 3 is nan") as caught:
        step.run(3, [make_row(1)], True, False)
    assert "which may change between starts" in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip(before, state_of(step), strict=True))


def test_the_remedy_is_not_another_run():
    old = RunConfig.model_validate(SMALL)
    remedy = {"learning_rate": 1e-6, "warmup_steps": 9, "min_learning_rate_ratio": 0.5}
    new = RunConfig.model_validate({**SMALL, "training": remedy | {"skip_non_finite": 3}})
    assert compare_identity(old, new) == []
    other = RunConfig.model_validate({**SMALL, "training": {"schedule": "constant"}})
    assert compare_identity(old, other)


def progress_of(folder, most):
    actor = SimpleNamespace(
        add=SimpleNamespace(remote=lambda _: None), progress=SimpleNamespace(remote=lambda _: None)
    )
    config = RunConfig.model_validate({**SMALL, "training": {"skip_non_finite": most}})
    run = run_of(config, RunFolder(str(folder)).ensure(), coordinator=actor, num_rows=64)
    return Progress(run, Ranks())


def test_skipped_steps_are_recorded_and_bounded_over_restarts(tmp_path):
    waits = SimpleNamespace(blocked_s=0.0, total_s=0.0)
    step = make_step(tiny_module(), training_config(skip_non_finite=2))
    overflow(step)
    progress = progress_of(tmp_path, most=2)
    progress.account(step.run(0, [make_row(0)], True, False), [make_row(0)], waits)
    (line,) = [json.loads(each) for each in (tmp_path / METRICS).read_text().splitlines()]
    assert line["loss"] is None and "gradient norm of step 0 is inf" in line["not_finite"]
    assert progress.ledger.missing()[0] == 1, "the skipped row would be asked for again"

    saved = progress.take_over([{}], {})
    assert saved["extra"]["non_finite_steps"] == saved["extra"]["skipped_steps"] == 1
    resumed = progress_of(tmp_path, most=2)
    resumed.restore(**saved)
    resumed.account(step.run(1, [make_row(1)], True, False), [make_row(1)], waits)
    with pytest.raises(NonFiniteLossError, match="skip_non_finite is 2, and so many"):
        resumed.account(step.run(2, [make_row(2)], True, False), [make_row(2)], waits)

    del saved["extra"]["non_finite_steps"]  # As an earlier version wrote it.
    progress_of(tmp_path, most=2).restore(**saved)


def test_all_ranks_skip_what_is_not_finite_on_one(tmp_path):
    ranks = run_workers(worker_main, tmp_path)
    for rank in ranks:
        assert rank["trained"] == [True, False, False, True]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert ranks[0]["parameters"].isfinite().all()


def worker_main(rank, folder):
    inner = tiny_module()
    module = torch.nn.parallel.DistributedDataParallel(inner)
    step = make_step(module, training_config(skip_non_finite=5), world_size=2)
    trained = []
    for number in range(4):
        rows = [make_row(2 * number + rank)]
        norm = inner.model.model.norm.weight
        good = norm.data.clone()
        if number == 1 and rank == 1:  # The loss of one rank only.
            norm.data[0] = float("nan")
        if number == 2 and rank == 0:  # The gradient of one rank only.
            hook = norm.register_hook(lambda gradient: gradient * torch.inf)
        trained.append(step.run(number, rows, number < 3, stop=False).trained)
        norm.data.copy_(good if number in (1, 2) else norm.data)
        if number == 2 and rank == 0:
            hook.remove()
    return {"trained": trained, "parameters": flat(inner.parameters())}
