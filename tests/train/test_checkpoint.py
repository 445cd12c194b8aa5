"""Checkpoints: a resumed run goes on bit for bit; only registered folders survive a start."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from torch import nn

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.training import TrainingConfig
from raystill.datasets.stream.ledger import Ledger
from raystill.train.checkpoint import checkpoint as checkpoint_module
from raystill.train.checkpoint.checkpoint import (
    Checkpointer,
    Part,
    Snapshot,
    load_tensors,
    random_state,
    read_snapshot,
    set_random_state,
    sync_files,
    write_snapshot,
)
from raystill.train.checkpoint.ray_register import (
    SNAPSHOT_FILE,
    registered_names,
    remove_unregistered,
    repair_register,
)
from raystill.train.checkpoint.tensors import (
    TensorSlice,
    file_names,
    model_tensors,
    read_slices,
    write_slices,
)
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks


class TiedModel(nn.Module):
    """Embedding tied to its head, a persistent and a derived buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, ids):
        noise = torch.rand(6) + random.random() + np.random.rand()
        return self.head(self.mix(self.embed(ids) * noise))


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).backward()
        optimizer.step()
        model.seen += 1


def part_of(model, optimizer):
    return Part.copied(model, optimizer, Ranks())


def snapshot_of(step, ledger):
    return Snapshot(
        step=step,
        epoch=0,
        random=[random_state()],
        ledger=ledger.to_dict(),
        extra={"rows_trained": 7, "skipped_steps": 1},
    )


def write(folder, model, optimizer, step, ledger):
    """All files of a checkpoint, at once."""
    folder.mkdir(parents=True)
    part_of(model, optimizer).write(folder)
    write_snapshot(folder, snapshot_of(step, ledger))


def new_run(seed):
    model = TiedModel(seed)
    config = TrainingConfig(weight_decay=0.1)
    return model, build_optimizer(model, config)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    ledger = Ledger(20)
    ledger.mark_trained([3, 4])
    ledger.mark_dropped({9: "empty"})
    model, optimizer = new_run(seed=1)
    train(model, optimizer, steps=3)
    write(tmp_path / "c", model, optimizer, 3, ledger)
    train(model, optimizer, steps=3)

    restored, fresh = new_run(seed=2)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    snapshot = read_snapshot(tmp_path / "c")
    load_tensors(tmp_path / "c", snapshot.num_files, restored, fresh)
    set_random_state(snapshot.random[0])
    train(restored, fresh, steps=3)

    for name, tensor in model_tensors(model).items():
        assert torch.equal(tensor, model_tensors(restored)[name]), name
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, fresh.state_dict()["state"][index][name]), name
    assert Ledger.from_dict(snapshot.ledger) == ledger
    assert (snapshot.step, snapshot.epoch) == (3, 0)
    assert snapshot.extra == {"rows_trained": 7, "skipped_steps": 1, "world_size": 1}


def test_a_tied_weight_is_written_once_and_derived_buffers_not_at_all():
    model, _ = new_run(seed=1)
    names = set(model_tensors(model))
    assert names == {"embed.weight", "mix.weight", "mix.bias", "seen"}


def test_what_is_to_be_written_does_not_change_with_the_model():
    model, optimizer = new_run(seed=1)
    train(model, optimizer, steps=1)
    slices = part_of(model, optimizer).slices
    kept = [slices["model"]["mix.weight"], slices["optimizer"]["exp_avg.mix.weight"]]
    before = [piece.tensor.clone() for piece in kept]
    train(model, optimizer, steps=1)
    for piece, value in zip(kept, before, strict=True):
        assert torch.equal(piece.tensor, value)


def test_a_run_without_a_step_has_no_optimizer_state_and_is_restored_so(tmp_path):
    write(tmp_path / "c", *new_run(seed=1), 0, Ledger(1))
    model, optimizer = new_run(seed=2)
    load_tensors(tmp_path / "c", 1, model, optimizer)
    assert torch.equal(model.mix.bias, new_run(seed=1)[0].mix.bias)
    assert not optimizer.state


def test_pieces_of_any_cut_are_put_together_and_missing_or_strange_ones_named(tmp_path):
    whole = {"a": torch.arange(14.0).view(7, 2), "b": torch.arange(3), "count": torch.tensor(5.0)}
    paths = [tmp_path / name for name in file_names("model", 3)]
    for path, start, end in zip(paths, (0, 3, 6), (3, 6, 7), strict=True):
        slices = {"a": TensorSlice(whole["a"][start:end].clone(), start)}
        slices["b"] = TensorSlice(
            whole["b"][start:end].clone(), start
        )  # The others have none of it.
        if start == 0:
            slices["count"] = TensorSlice(whole["count"])
        write_slices(path, slices)
    read = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    read_slices(paths, read)
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="lacks rows of 1 tensors, first a, in model-00001"):
        read_slices(paths[:2], read)
    with pytest.raises(ValueError, match="1 tensors differ, first count"):
        read_slices(paths[1:], {**read, "b": torch.zeros(0)})
    with pytest.raises(ValueError, match=r"a is \[7, 3\] here and stored in rows of \[2\]"):
        read_slices(paths, {**read, "a": torch.zeros(7, 3)})
    with pytest.raises(ValueError, match="a has 5 rows here and at least 6 there"):
        read_slices(paths, {**read, "a": torch.zeros(5, 2)})


def test_pytorchs_own_reader_of_distributed_checkpoints_reads_the_pieces(tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = torch.arange(14.0).view(7, 2)
    for name, rows in zip(file_names("model", 2), (slice(0, 4), slice(4, 7)), strict=True):
        write_slices(tmp_path / name, {"a": TensorSlice(whole[rows].clone(), rows.start)})
    read = {"a": torch.zeros(7, 2)}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(read["a"], whole)


def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path):
    model, optimizer = new_run(seed=1)
    write(tmp_path / "c", model, optimizer, 0, Ledger(1))
    with pytest.raises(ValueError, match=r"not this student: 5 tensors differ, first embed.weight"):
        load_tensors(tmp_path / "c", 1, nn.Linear(6, 6, bias=False), optimizer)
    state = json.loads((tmp_path / "c" / "state.json").read_text()) | {"format_version": 99}
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="format 99"):
        read_snapshot(tmp_path / "c")


def register(folder, names):
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    state = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    folder.write_text(f"checkpoints/{SNAPSHOT_FILE}", json.dumps(state))


def test_folders_that_are_not_registered_are_deleted_and_nothing_else(tmp_path):
    folder = RunFolder(str(tmp_path)).ensure()
    for name in ("step-00000002", "step-00000004", "step-00000006", ".step-00000008.part", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000009").write_text("a file is nobody's checkpoint")
    register(folder, ["step-00000002", "step-00000004"])
    assert registered_names(folder) == {"step-00000002", "step-00000004"}
    assert remove_unregistered(folder) == [".step-00000008.part", "step-00000006"]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-00000002", "step-00000004", "step-00000009", "best", SNAPSHOT_FILE}


def test_without_a_snapshot_every_checkpoint_folder_goes(tmp_path):
    folder = RunFolder(str(tmp_path)).ensure()
    assert remove_unregistered(folder) == []
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert remove_unregistered(folder) == ["step-00000002"]


class Reports(list):
    """Stands for Ray Train's registration; on one rank, so everybody agrees with it."""


def checkpointer(folder, reports, **kwargs):
    return Checkpointer(folder, Ranks(), reports.append, **kwargs)


def begin(writer, step):
    writer.begin(step, part_of(*new_run(seed=1)), snapshot_of(step, Ledger(1)))


def test_one_checkpoint_is_in_flight_and_each_is_published_once(tmp_path):
    folder, reports = RunFolder(str(tmp_path)).ensure(), Reports()
    writer = checkpointer(folder, reports)
    assert writer.last_step == -1
    assert not writer.poll()
    assert not writer.finish()
    begin(writer, 2)
    begin(writer, 4)
    assert [path.rsplit("/", 1)[1] for path in reports] == ["step-00000002"]
    assert writer.finish()
    assert not writer.finish()
    assert [path.rsplit("/", 1)[1] for path in reports] == ["step-00000002", "step-00000004"]
    assert read_snapshot(reports[-1]).step == writer.last_step == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


class Elsewhere(RunFolder):
    """A folder that is treated as an object store: no renaming, whole files only."""

    is_local = property(lambda self: False)


def test_where_nothing_can_be_renamed_the_file_that_says_whole_comes_last(tmp_path):
    folder, reports = Elsewhere(str(tmp_path)), Reports()
    writer = checkpointer(folder, reports)
    begin(writer, 2)
    writer._writing.result()
    target = tmp_path / "checkpoints" / "step-00000002"
    assert {path.suffix for path in target.iterdir()} == {".safetensors", ".pt", ".json"}
    assert not (target / "state.json").exists()
    assert writer.poll() and reports == [str(target)]
    assert read_snapshot(target).step == 2
    load_tensors(target, 1, *new_run(seed=2))


def test_polling_publishes_only_what_is_written(tmp_path):
    folder, reports = RunFolder(str(tmp_path)).ensure(), Reports()
    writer = checkpointer(folder, reports)
    begin(writer, 2)
    writer._writing.result()
    assert writer.poll()
    assert not writer.poll()
    assert len(reports) == 1


@pytest.mark.parametrize("torn", ["", '{"ray_version": "2.60', '{"ray_version": "1.0"}'])
def test_a_list_of_checkpoints_that_ray_would_refuse_is_made_anew(tmp_path, torn):
    """A full disk leaves an empty or half list; an upgrade leaves another version's."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
    )

    folder = RunFolder(str(tmp_path / "run")).ensure()
    model, optimizer = new_run(seed=1)
    for step in (2, 4):
        write(folder.local / "checkpoints" / f"step-{step:08d}", model, optimizer, step, Ledger(1))
    (folder.local / "checkpoints" / "step-00000006").mkdir()  # Not whole.
    folder.write_text(f"checkpoints/{SNAPSHOT_FILE}", torn)
    assert repair_register(folder) is not None
    assert registered_names(folder) == {"step-00000002", "step-00000004"}
    state = json.loads(folder.read_text(f"checkpoints/{SNAPSHOT_FILE}"))
    parsed = _CheckpointManagerState.parse_obj(state)
    assert parsed.latest_checkpoint_result.checkpoint_dir_name == "step-00000004"
    assert parsed.json() == folder.read_text(f"checkpoints/{SNAPSHOT_FILE}").replace(" ", "")
    assert repair_register(folder) is None


@pytest.mark.parametrize("removed", ["step-00000004", SNAPSHOT_FILE, "step-00000004/state.json"])
def test_a_person_may_remove_the_newest_checkpoint_or_the_list(tmp_path, removed):
    """As our own message advises where a checkpoint is broken."""
    folder = RunFolder(str(tmp_path / "run")).ensure()
    for name in ("step-00000002", "step-00000004"):
        (tmp_path / "run/checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run/checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "run/checkpoints" / SNAPSHOT_FILE).write_text("torn")
    assert repair_register(folder) is not None
    gone = tmp_path / "run/checkpoints" / removed
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert repair_register(folder) is not None and repair_register(folder) is None
    left = {"step-00000002"} if "step" in removed else {"step-00000002", "step-00000004"}
    assert registered_names(folder) == left
    remove_unregistered(folder)
    assert all((tmp_path / "run/checkpoints" / name).is_dir() for name in left)
    storage = StorageContext(storage_path=str(tmp_path / "run"), experiment_dir_name="checkpoints")
    newest = CheckpointManager(CheckpointConfig(num_to_keep=2), storage).latest_checkpoint_result
    assert newest.checkpoint.path.endswith(max(left))


def test_files_are_synced_while_another_rank_writes_its_own_under_passing_names(
    tmp_path, monkeypatch
):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "passing").write_text("another rank's")
    opened, real = [], os.open

    def open_after_it_was_renamed(path, flags):
        if Path(path).name == "passing":
            Path(path).rename(tmp_path / "theirs")
        opened.append(Path(path).name)
        return real(path, flags)

    monkeypatch.setattr(checkpoint_module.os, "open", open_after_it_was_renamed)
    sync_files(tmp_path)
    assert {"mine", tmp_path.name} < set(opened)


def test_a_first_start_has_no_list_to_mend(tmp_path):
    assert repair_register(RunFolder(str(tmp_path / "run")).ensure()) is None


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_is_not_published(tmp_path):
    folder, reports = RunFolder(str(tmp_path / "run")).ensure(), Reports()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder was")
    writer = checkpointer(folder, reports)
    begin(writer, 2)
    with pytest.raises(RunError, match=r"checkpoint of step 2 could not be written.*make room"):
        writer.finish()
    assert reports == []
