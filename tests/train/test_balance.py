"""Rows that change workers: the same step, each row once, tokens within a bound, less waiting."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from raystill.train.step import balance
from raystill.train.step.balance import NEAR, idle_share, plan_moves
from tests.support.tiny_student import (
    flat,
    make_row,
    make_step,
    parallel,
    relative_error,
    tiny_module,
    training_config,
)
from tests.support.workers import run_workers

WORKERS, BUDGET = 8, 4096


def shares_of(generator, workers, rows, spread=0.8, most=4096):
    """Lengths of the rows of each worker, lognormal, and now and then a worker without any."""
    lengths = np.minimum(generator.lognormal(6.0, spread, (workers, rows)).astype(int) + 1, most)
    counts = generator.integers(0, rows + 1, workers)
    return [share[:count].tolist() for share, count in zip(lengths, counts, strict=True)]


def moved(shares, moves):
    """The lengths by worker after the moves; a row is taken once, or this fails."""
    left = [dict(enumerate(share)) for share in shares]
    came = [[] for _ in shares]
    for move in moves:
        came[move.target].append(left[move.source].pop(move.row))
    return [[*kept.values(), *more] for kept, more in zip(left, came, strict=True)]


@pytest.mark.parametrize("seed", range(200))
def test_every_row_is_somewhere_once_and_tokens_are_within_the_bound(seed):
    generator = np.random.default_rng(seed)
    workers, rows = int(generator.integers(1, 17)), int(generator.integers(1, 40))
    shares = shares_of(generator, workers, rows, spread=float(generator.uniform(0, 2)))
    moves = plan_moves(shares)
    after = moved(shares, moves)
    assert Counter(chain.from_iterable(after)) == Counter(chain.from_iterable(shares))
    assert all(move.source != move.target for move in moves)
    assert len({(move.source, move.row) for move in moves}) == len(moves), "none goes twice"
    loads = [sum(share) for share in after]
    mean, highest = sum(loads) / workers, loads.index(max(loads))
    shortest = min(after[highest], default=0)
    assert max(loads) <= (1 + NEAR) * mean or max(loads) - min(loads) <= shortest
    assert max(loads) <= max(map(sum, shares)), "no worker gets more than one had"
    assert plan_moves(shares) == moves


def test_what_is_even_stays_where_it_is():
    assert plan_moves([[5, 5], [10], [3, 7]]) == []
    assert plan_moves([[100], [], []]) == [], "a single row cannot be divided"
    assert plan_moves([]) == [] and plan_moves([[], []]) == []
    assert plan_moves([[0, 0, 8, 8], []]) == [(0, 2, 1)], "rows without a loss do not move"


def test_the_idle_share_by_hand():
    # Two workers, passes of 10 and 4 against 6 and 6: together 16 long, of 26 busy.
    assert idle_share([[10, 4], [6, 6]], together=True) == pytest.approx(1 - 26 / 32)
    assert idle_share([[10, 4], [6, 6]], together=False) == pytest.approx(1 - 26 / 28)
    assert idle_share([[7.0, 2.0]], together=True) == 0
    assert idle_share([[0.0], [0.0]], together=True) == 0


SHARES = [range(0, 12), range(12, 14)]


def train(rank=None, strategy="alone", dtype=torch.float64):
    """One step on rows of which worker 0 brings most: figures, gradients, where rows were."""
    inner = tiny_module(dtype)
    module = inner if rank is None else parallel(inner, strategy)
    world = 1 if rank is None else 2
    step = make_step(module, training_config(max_grad_norm=None), world)
    numbers = [n for share in SHARES for n in share] if rank is None else SHARES[rank]
    made = []
    make, step.batches.make = step.batches.make, lambda rows: made.extend(rows) or make(rows)
    result = step.run(0, [make_row(n) for n in numbers], has_more=True, stop=False)
    return {
        "grads": flat(p.grad for p in inner.parameters()),
        "rows": [row.position for row in made],
        "tokens": sum(row.num_inputs for row in made),
        "loss": result.loss,
        "idle": result.idle_share,
        "counts": (result.rows, result.tokens),
        "waited": result.others_wait_s,
    }


def worker_main(rank, folder):
    balanced = {name: train(rank, name) for name in ("ddp", "fsdp")}
    before, balance.plan_moves = balance.plan_moves, lambda shares: []
    try:
        return balanced | {"as they came": train(rank, "fsdp")}
    finally:
        balance.plan_moves = before


def test_two_workers_train_the_same_step_as_rows_that_stayed_and_as_one(tmp_path):
    ranks = run_workers(worker_main, tmp_path)
    alone = train()
    for case in ("ddp", "fsdp", "as they came"):
        for rank in ranks:
            assert rank[case]["loss"] == pytest.approx(alone["loss"], rel=1e-12)
            assert rank[case]["counts"] == alone["counts"]
            assert relative_error(rank[case]["grads"], alone["grads"]) < 1e-12
            assert rank[case]["waited"] > 0
        both = ranks[0][case]["rows"] + ranks[1][case]["rows"]
        assert sorted(both) == list(range(14)), "every row once"
    assert ranks[0]["as they came"]["rows"] != ranks[0]["fsdp"]["rows"]
    one, other = (rank["fsdp"]["tokens"] for rank in ranks)
    assert abs(one - other) <= 14 + 19
    assert ranks[0]["fsdp"]["idle"] == ranks[1]["fsdp"]["idle"]
    assert ranks[0]["fsdp"]["idle"] < 0.5 * ranks[0]["as they came"]["idle"]
    assert alone["idle"] == 0 and alone["waited"] == 0
