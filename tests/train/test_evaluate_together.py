"""A sharded student is measured as it trains, one layer at a time: two gloo ranks find what one
does, whatever rows each has, and train on from there as one does.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.train.evaluation import measure
from raystill.train.evaluation.free_running import FreeRunning, write_free
from raystill.train.evaluation.measure import LocalStudent, Measurer
from raystill.train.evaluation.own_contexts import measure_own_contexts
from raystill.train.evaluation.teacher_forced import TokenKl, evaluate
from raystill.train.start.cut import layer_list
from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import gathering_passes
from tests.support.runs import run_of
from tests.support.tiny_student import (
    STOP_ID,
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
SAMPLING = SimpleNamespace(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, stop_token_ids=(STOP_ID, *range(3, VOCAB, 3))
)
# Rows, the budget of a pass, and how many answers are written at a time. Of 5 rows rank 0 has 3; of
# 1 row it has all; with a budget of 1 each row has a pass of its own.
CASES = {"five": (5, 1, 2), "one": (1, 64, 4), "eleven": (11, 64, 2), "two": (2, 1, 1)}


def layers_are_shards(module):
    parameters = [p for layer in layer_list(module.model)[2] for p in layer.parameters()]
    return all(isinstance(parameter, DTensor) for parameter in parameters)


def measured(module, ranks, sharded):
    """Figures, tokens and answers of all cases."""
    found = {}
    for name, (count, budget, at_once) in CASES.items():
        rows, kept, own = [make_row(i) for i in range(count)], TokenKl(frozenset([0])), TokenKl()
        settings = dict(tokens_budget=budget, student_vocab=VOCAB, device=CPU, ranks=ranks)
        figures = evaluate(module, rows, **settings, tokens=kept)
        contexts = measure_own_contexts(module, rows, **settings, tokens=own)
        free = FreeRunning(count, 9, SAMPLING, seed=1, rows_per_batch=at_once)
        with gathering_passes(module):
            answers = write_free(module.model, rows, free, CPU, ranks, together=sharded)
        assert module.training and (not sharded or layers_are_shards(module))
        found[name] = {
            "figures": {n: v for n, v in figures.items() if n != "bound"},
            "contexts": {n: v for n, v in contexts.items() if n != "student_answers_by_position"},
            "tokens": kept.nats,
            "answers": answers,
        }
    return found


def run(rank=None):
    """Measure, train a step, measure again, train another: so what is left of measuring shows."""
    sharded = rank is not None
    inner = tiny_module(torch.float64).train()
    module = parallel(inner, "fsdp") if sharded else inner
    config = training_config(max_grad_norm=None)
    step = make_step(module, config, 2 if sharded else 1)
    ranks = Ranks(rank or 0, 2 if sharded else 1)
    found = {}
    for number in range(2):
        found[f"before {number}"] = measured(inner, ranks, sharded)
        rows = [make_row(20 + i + 9 * number) for i in range(9)]
        step.run(number, rows[rank::2] if sharded else rows, has_more=True, stop=False)
    return found | {"parameters": flat(inner.parameters())}


def decided(rank, folder):
    """What the Measurer does where rank 1 alone has no room for all weights."""
    inner = tiny_module(torch.float64).train()
    parallel(inner, "fsdp")
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "unused", "sampling": {"max_tokens": 5}},
            "student": {"init": "model", "model": "unused"},
            "prompts": {"path": "unused"},
            "evaluation": {"free_running": {"rows": 4}},
        }
    )
    student = LocalStudent(inner, VOCAB, CPU, Ranks(rank, 2), "nowhere", SAMPLING)
    measurer = Measurer(run_of(config, RunFolder(str(folder))), student)
    rows, told = [make_row(i) for i in range(4)], {}
    write, room = measure.write_free, measure.room_for_whole

    def watched(*arguments):
        told["together"] = arguments[-1]
        return write(*arguments)

    measure.write_free = watched
    try:
        whole = measurer._write(rows)
        told["whole"] = not told["together"]
        measure.room_for_whole = lambda module, device: rank == 0
        return told | {"same": measurer._write(rows) == whole and bool(told["together"])}
    finally:
        measure.write_free, measure.room_for_whole = write, room


def worker_main(rank, folder):
    return run(rank) | {"decided": decided(rank, folder)}


def test_two_ranks_measure_a_sharded_student_as_one_measures_it(tmp_path):
    both, alone = run_workers(worker_main, tmp_path), run()
    for number in range(2):
        for name in CASES:
            expected = alone[f"before {number}"][name]
            for rank in both:
                got = rank[f"before {number}"][name]
                for kind in ("figures", "contexts"):
                    assert got[kind] == pytest.approx(expected[kind], rel=1e-9)
            parts = [rank[f"before {number}"][name] for rank in both]
            assert parts[0]["answers"] | parts[1]["answers"] == expected["answers"]
            assert not parts[0]["answers"].keys() & parts[1]["answers"].keys()
            assert parts[0]["tokens"][0] == pytest.approx(expected["tokens"][0], rel=1e-6)
    lengths = {len(answer) for answer in alone["before 0"]["eleven"]["answers"].values()}
    assert len(lengths) > 1, "some stop before others, and go on with them"
    for rank in both:
        assert relative_error(rank["parameters"], alone["parameters"]) < 1e-10
        assert rank["decided"] == {"together": True, "whole": True, "same": True}
