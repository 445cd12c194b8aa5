"""The untrained student is measured after its first steps as it was before them, and trains on as
if nothing had been measured: in one process, and on two ranks with its weights in shards or not.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raystill.train.evaluation.free_running import FreeRunning, write_free
from raystill.train.evaluation.teacher_forced import evaluate
from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import whole_weights
from raystill.train.worker import untrained as untrained_module
from raystill.train.worker.untrained import Untrained
from tests.support.tiny_student import (
    VOCAB,
    flat,
    make_row,
    make_step,
    parallel,
    relative_error,
    tiny_module,
    training_config,
)
from tests.support.workers import run_workers

CPU = torch.device("cpu")
SAMPLING: Any = SimpleNamespace(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, stop_token_ids=())
FREE = FreeRunning(rows=3, max_tokens=4, sampling=SAMPLING, seed=1)


class Answers:
    """Ray, as far as the module uses it: the held-out rows are there or not."""

    def __init__(self) -> None:
        self.there = False
        self.got: list[str] = []

    def wait(self, refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert timeout == 0
        return (refs, []) if self.there else ([], refs)

    def get(self, ref: str) -> None:
        self.got.append(ref)


def run(rank: int | None = None, strategy: str = "fsdp", measures: bool = True) -> dict[str, Any]:
    """Three steps; the untrained student's figures before them and after the second."""
    sharded = rank is not None
    inner = tiny_module(torch.float64).train()
    module = parallel(inner, strategy) if sharded else inner
    step = make_step(module, training_config(max_grad_norm=None), 2 if sharded else 1)
    ranks, rows = Ranks(rank or 0, 2 if sharded else 1), [make_row(i) for i in range(5)]
    settings: dict[str, Any] = dict(student_vocab=VOCAB, device=CPU, ranks=ranks)
    found: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []

    def measure() -> None:
        found.append(evaluate(inner, rows, tokens_budget=64, **settings))

    untrained_module.ray = answers = Answers()  # type: ignore[assignment]

    def write() -> None:
        with whole_weights(inner):
            write_free(inner.model, rows, FREE, CPU, ranks)
        written.append(evaluate(inner, rows, tokens_budget=64, **settings))

    untrained = Untrained(ranks, "held-out rows", write, measure)
    measure()
    untrained.keep(inner)
    kept = sum(one.nbytes for _, one in untrained._kept)
    taken = []
    for number in range(3):
        mine = [make_row(20 + i + 9 * number) for i in range(9)]
        step.run(number, mine[rank::2] if sharded else mine, has_more=True, stop=False)
        if measures and len(taken) < 2:
            before = flat(inner.parameters())
            answers.there = number == 1 and ranks.first  # Rank 1 has not heard of it.
            taken.append(untrained.take())
            untrained.write()
            assert torch.equal(before, flat(inner.parameters()))
    if measures:
        assert (taken, answers.got) == ([False, True], ["held-out rows"])
        assert written == found[:1] == found[1:], "of the weights of before, each once"
    measure()
    assert found[-1] != found[0]
    return {"parameters": flat(inner.parameters()), "kept": kept}


@pytest.fixture(autouse=True)
def ray_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained_module, "ray", None)


def test_figures_of_before_are_taken_later_and_leave_no_trace():
    measured, plain = run(), run(measures=False)
    assert torch.equal(measured["parameters"], plain["parameters"])


def fsdp(rank: int, _: Any) -> dict[str, Any]:
    return run(rank)


def ddp(rank: int, _: Any) -> dict[str, Any]:
    return run(rank, "ddp")


@pytest.mark.parametrize("worker", [fsdp, ddp])
def test_two_ranks_take_them_together(worker, tmp_path):
    alone, both = run(), run_workers(worker, tmp_path)
    share = 1 if worker is ddp else 2
    for one in both:
        assert relative_error(one["parameters"], alone["parameters"]) < 1e-12
        assert one["kept"] < 1.2 * alone["kept"] / share


def test_only_what_training_changes_is_kept():
    module = tiny_module(torch.float64)
    changing = next(module.parameters())
    for parameter in module.parameters():
        parameter.requires_grad = parameter is changing
    untrained = Untrained(Ranks(), None, lambda: None, lambda: None)
    untrained.keep(module)
    assert sum(kept.numel() for _, kept in untrained._kept) == changing.numel()


def test_weights_are_put_back_where_measuring_fails():
    module = tiny_module(torch.float64)

    def fail() -> None:
        raise RuntimeError("no room")

    untrained_module.ray = Answers()  # type: ignore[assignment]
    untrained = Untrained(Ranks(), None, fail, fail)
    untrained.keep(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    before = flat(module.parameters())
    for call in (partial(untrained.take, wait=True), untrained.write):
        with pytest.raises(RuntimeError, match="no room"):
            call()
        assert torch.equal(before, flat(module.parameters()))
