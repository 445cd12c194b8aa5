"""Two ranks at a first start: one reads the whole teacher and chooses, the other what is kept."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from raystill.base.run_folder import RunFolder
from raystill.model.on_node import ModelSource
from raystill.train.step.ranks import Ranks
from raystill.train.worker.shape import read_student
from tests.support.runs import run_of
from tests.support.workers import run_workers
from tests.train.test_importance import run_config, teacher

STRATEGIES = ("ddp", "fsdp")


def first_start(rank: int, folder: Path) -> dict[str, Any]:
    """The student that this rank has read; rank 1 has the files of all layers but one."""
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        place = folder / f"teacher-{rank}"
        config = run_config(place, False, keep=3)
        training = config.training.model_copy(update={"strategy": strategy, "num_workers": 2})
        config = config.model_copy(update={"training": training})
        source = replace(ModelSource.of("teacher", folder / "teacher-0"), folder=str(place))
        run = replace(run_of(config, RunFolder(str(folder / strategy))), teacher=source)
        ranks = Ranks(rank, dist.get_world_size())
        model, there = read_student(run, ranks, torch.device("cpu"))
        assert there == str(place)
        if model is not None:
            found[strategy] = dict(model.state_dict())
    return found


def test_one_rank_reads_the_whole_teacher(tmp_path: Path) -> None:
    places = [tmp_path / f"teacher-{rank}" for rank in (0, 1)]
    for place in places:
        teacher().save_pretrained(place, max_shard_size="1KB")
    prompts = pa.table({"prompt_ids": pa.array([[3, 4, 5], [6, 7]], pa.list_(pa.int32()))})
    for strategy in STRATEGIES:
        run_folder = RunFolder(str(tmp_path / strategy)).ensure()
        run_folder.write_table("prompts/train.parquet", prompts)
    index = json.loads((places[1] / "model.safetensors.index.json").read_text())["weight_map"]
    idle = {file for name, file in index.items() if ".layers.1." in name}
    idle -= {file for name, file in index.items() if ".layers.1." not in name}
    assert len(idle) > 4
    for file in idle:  # Of a layer that does nothing, which no choice keeps.
        os.remove(places[1] / file)
    first, second = run_workers(first_start, tmp_path)
    assert 1 not in json.loads((tmp_path / "ddp" / "layers.json").read_text())["layers"]
    assert first.keys() == {"ddp", "fsdp"} and second.keys() == {"ddp"}
    for name, tensor in first["ddp"].items():
        assert torch.equal(tensor, second["ddp"][name]), name
        assert torch.equal(tensor, first["fsdp"][name]), name
