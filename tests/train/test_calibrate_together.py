"""A calibration by two processes, which share one student, finds what one process finds."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from raystill.config.objective import ObjectiveConfig
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import row_schema
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.train.calibration.calibrator import Calibrator
from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import is_sharded
from tests.support.workers import run_workers

VOCAB, HIDDEN = 67, 32  # A head that two ranks cannot share evenly.
SIGNAL = Signal("hidden", HIDDEN)
OBJECTIVE = ObjectiveConfig(forward_kl=1.0, cross_entropy=0.5)
BUDGETS = {"three passes, and a dummy": 24, "one pass, and a rank of dummies": 1000}


def write_model(folder: Path, seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def answers_of(teacher: LlamaForCausalLM) -> pa.Table:
    """Five answers, the fourth of which is short, with the teacher's hidden states."""
    random, answers, prompts = np.random.default_rng(0), [], []
    for tokens in (9, 7, 8, 2, 9):
        ids = random.integers(3, VOCAB, 3 + tokens).astype(np.int32)
        output = teacher.model(torch.from_numpy(ids).long()[None])
        states = output.last_hidden_state[0, 2:-1].bfloat16()
        log_p = torch.log_softmax(teacher.lm_head(states.float()), dim=1)
        drawn = torch.from_numpy(ids[3:]).long()[:, None]
        answers.append(
            Answer(
                finish_reason="stop",
                response_ids=ids[3:],
                sampled_logprobs=log_p.gather(1, drawn).squeeze(1).numpy(),
                hidden=states.view(torch.uint16).numpy(),
            )
        )
        prompts.append(ids[:3])
    told = answers_table(answers, SIGNAL)
    count = len(answers)
    columns = {
        "row": pa.array(range(count), pa.int64()),
        "position": pa.array(range(count), pa.int64()),
        "epoch": pa.array([0] * count, pa.int32()),
        "source": pa.array(["own"] * count),
        "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
    }
    schema = row_schema(SIGNAL)
    values = [columns[n] if n in columns else told[n] for n in schema.names]
    return pa.table(values, schema=schema)


def config_of(folder: Path, budget: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(folder / "teacher"), "sampling": {"max_tokens": 9}},
            "student": {"init": "from_teacher", "layers": [0, 2]},
            "prompts": {"path": "p.jsonl"},
            # Two workers of a run without shards: a calibration has them all the same.
            "training": {"tokens_per_micro_batch": budget, "num_workers": 2},
        }
    )


def found_by(folder: Path, budget: int, trained: bool, ranks: Ranks | None = None) -> Any:
    """All figures of one comparison, and this rank's share of the student."""
    config = config_of(folder, budget)
    rows = pa.ipc.open_file(folder / "rows.arrow").read_all()
    source = ModelSource.of("teacher", folder / "teacher")
    calibrator = Calibrator(config, source, rows, 24, ranks)
    parameters = calibrator.load(str(folder / "trained") if trained else None)
    described = calibrator.describe()
    compared = calibrator.compare(OBJECTIVE)
    costs = calibrator.costs(OBJECTIVE)
    again = calibrator.compare(OBJECTIVE)  # What was whole for a while is as it was.
    weights = list(calibrator._module.parameters())
    own = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights]
    return {
        "parameters": parameters,
        "described": described,
        "compared": compared,
        "again": again,
        "costs": sorted(costs),
        "sharded": is_sharded(calibrator._module),
        "share": sum(own) / parameters,
    }


def both(rank: int, folder: Path) -> dict[str, Any]:
    ranks = Ranks(rank, dist.get_world_size())
    return {
        f"{name}, {trained}": found_by(folder, budget, trained, ranks)
        for name, budget in BUDGETS.items()
        for trained in (False, True)
    }


def write_teacher(folder: Path) -> pa.Table:
    """A teacher and its answers, in files; the answers."""
    rows = answers_of(write_model(folder / "teacher", 0, 3))
    with pa.ipc.new_file(folder / "rows.arrow", rows.schema) as file:
        file.write_table(rows)
    return rows


@contextmanager
def one_core() -> Iterator[None]:
    """So that a `Calibrator` has one thread, as each of two has: two would wait for each other."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def numbers(found: Any) -> Any:
    """Every number of nested figures by its place; nan where there is none."""
    if isinstance(found, dict):
        return {f"{k}/{j}": v for k, one in found.items() for j, v in numbers(one).items()}
    return {"": math.nan if found is None else found}


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = tmp_path
    write_teacher(folder)
    write_model(folder / "trained", 1, 2)
    first, second = run_workers(both, folder)
    for name, budget in BUDGETS.items():
        for trained in (False, True):
            with one_core():
                alone = found_by(folder, budget, trained)
            one, other = (rank[f"{name}, {trained}"] for rank in (first, second))
            assert not alone["sharded"] and one["sharded"] and other["sharded"]
            assert one["share"] + other["share"] == pytest.approx(1)
            assert one["share"] == pytest.approx(0.5, abs=0.02)
            assert one["parameters"] == alone["parameters"]
            assert one["costs"] == alone["costs"] and len(alone["costs"]) > 5
            assert one["described"] == alone["described"]
            expected = numbers(alone["compared"])
            expected = pytest.approx(expected, abs=1e-6, rel=1e-6, nan_ok=True)
            assert numbers(one["compared"]) == expected
            assert numbers(one["again"]) == expected
            cosines = [f["cosine_parameters"] for f in alone["compared"]["signals"].values()]
            assert min(cosines) < 0.9, "the figures can tell signals apart"
            assert other["compared"] == {} and other["costs"] == []
