"""Checkpoints: everything that a run needs to go on as if it had not been stopped.

A checkpoint goes through three phases. Between two steps every rank copies what it has to host
memory. A thread of each rank writes the copy, while training goes on. After a later step it is
published: all ranks report it to Ray Train. At most one checkpoint is between the first and the
last phase. A run resumes from published checkpoints only (``ray_register``).

``<run>/checkpoints/step-<finished steps>/`` has

- ``model-*.safetensors``: parameters and persistent buffers in the dtype they are trained in (with
  ``student.lora`` the adapters alone), and
- ``optimizer-*.safetensors``: the optimizer's state, both one file for each rank that has a part of
  them (``tensors``: they can be read by any number of workers, sharded or not);
- ``random.pt``: the random states of each rank, loadable with ``weights_only=True``;
- ``ledger.json``: the rows that are trained or dropped;
- ``state.json``: step, epoch, format, and the identity of the weights that adapters belong to. It
  is written last: a folder that has it is complete.

The learning rate is not in it, since it is a function of the step.

Consumes: the states of all ranks. Waits for: nothing, except ``finish``, which waits for the
threads of all ranks.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
from safetensors import SafetensorError
from torch import nn

from raystill.base.errors import RunError
from raystill.base.run_folder import CHECKPOINTS, RunFolder
from raystill.train.checkpoint.ray_register import STATE_FILE
from raystill.train.checkpoint.tensors import (
    TensorSlice,
    are_empty,
    file_names,
    host_slices,
    model_tensors,
    optimizer_tensors,
    read_slices,
    write_slices,
)
from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import num_shards

FORMAT_VERSION = 4
KINDS = ("model", "optimizer")
"""Kinds of tensors; each has files of its own."""


@dataclass
class Snapshot:
    """The state of a run without its large tensors; rank 0 writes it.

    Attributes:
        step: Number of finished optimizer steps.
        epoch: The epoch that the run is in, from 0.
        random: The random states of each rank, in rank order.
        ledger: `Ledger.to_dict` of all ranks' rows.
        num_files: Number of files of each of ``KINDS``; 1 unless the student is sharded.
        base: `lora.base_identity` of the frozen weights; empty without adapters.
        extra: Further numbers, see `Progress.take_over`.
    """

    step: int
    epoch: int
    random: list[dict[str, Any]]
    ledger: dict[str, Any]
    num_files: int = 1
    base: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """The tensors that one rank writes of a checkpoint, in host memory.

    Attributes:
        slices: By kind, then by name.
        file: Number of the rank's file of each kind, from 0; ``num_files`` or more: it has none.
        num_files: Number of files of each kind.
    """

    slices: dict[str, dict[str, TensorSlice]]
    file: int
    num_files: int

    @classmethod
    def copied(cls, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> "Part":
        """A copy of what this rank has to write, so that training can go on."""
        tensors = model_tensors(model), optimizer_tensors(model, optimizer)
        copies = (host_slices(of_kind, ranks.first) for of_kind in tensors)
        # Of several copies (HSDP) the first ranks have one, and they write it.
        num_files = num_shards(model)
        return cls(dict(zip(KINDS, copies, strict=True)), ranks.rank, num_files)

    def write(self, folder: Path) -> None:
        """Writes this rank's files into ``folder``, if it has any."""
        if self.file < self.num_files:
            for kind, slices in self.slices.items():
                write_slices(folder / file_names(kind, self.num_files)[self.file], slices)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The random states of this process: Python's, numpy's, torch's, and that of a GPU."""
    # numpy's as a tensor and numbers: `torch.load` with weights_only=True refuses numpy arrays.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), words, position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Sets the random states that ``random_state`` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Writes ``snapshot`` into ``folder``, ``state.json`` last."""
    torch.save(snapshot.random, folder / "random.pt")
    (folder / "ledger.json").write_text(json.dumps(snapshot.ledger))
    state = {
        "format_version": FORMAT_VERSION,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "num_files": snapshot.num_files,
        "world_size": len(snapshot.random),
        **({"base": snapshot.base} if snapshot.base else {}),
        **snapshot.extra,
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def sync_files(folder: Path) -> None:
    """Returns when a folder's files, and their names in it, are on the disk.

    Other ranks may be writing theirs, under names that pass; these they see to themselves.
    """
    for path in (*folder.iterdir(), folder):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_snapshot(folder: str | Path) -> Snapshot:
    """Reads what ``write_snapshot`` wrote. Raises ValueError where the format is another one."""
    folder = Path(folder)
    state = json.loads((folder / STATE_FILE).read_text())
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has a checkpoint of format {version}, but this version reads format "
            f"{FORMAT_VERSION}; resume with the version that wrote it, or start a new run folder"
        )
    step, epoch, num_files = (state.pop(name) for name in ("step", "epoch", "num_files"))
    return Snapshot(
        step=step,
        epoch=epoch,
        random=torch.load(folder / "random.pt", weights_only=True),
        ledger=json.loads((folder / "ledger.json").read_text()),
        num_files=num_files,
        base=state.pop("base", ""),
        extra=state,
    )


def require_base(snapshot: Snapshot, base: str, dtype: str) -> None:
    """Raises RunError where the snapshot's adapters belong to other weights than ``base``.

    dtype: of these, by its name.
    """
    if snapshot.base != base:
        raise RunError(
            f"the checkpoint of step {snapshot.step} has adapters of frozen weights with the "
            f"identity {snapshot.base or 'none'}, but the student starts from weights in {dtype} "
            f"with {base or 'none'}; put back the files that the run began with (student.model, or "
            "the teacher's), or, where they were read in another dtype then, name it as "
            "student.lora.base_dtype (auto chooses by the device), or start a new run folder"
        )


def load_tensors(
    folder: str | Path, num_files: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Fills this rank's part of ``model`` and ``optimizer`` from the files of a checkpoint.

    num_files: `Snapshot.num_files`. The optimizer keeps its state if the run that wrote the
    checkpoint had made no step. Raises ValueError where the checkpoint is of another student, or
    incomplete.
    """
    model_files, optimizer_files = (
        [Path(folder) / name for name in file_names(kind, num_files)] for kind in KINDS
    )
    read_slices(model_files, model_tensors(model))
    if not are_empty(optimizer_files):
        state = optimizer_tensors(model, optimizer, create=True)
        # A parameter that never had a gradient has no moments: zeros, as it would begin with.
        read_slices(optimizer_files, state, may_lack=state)


class Checkpointer:
    """Writes the checkpoints of one run. All ranks must call each method, after the same step.

    Attributes:
        last_step: Finished steps in the newest checkpoint, be it published or still being written;
            -1 before the first.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        report: Callable[[str | None], None],
        last_step: int = -1,
    ) -> None:
        """report: registers a written checkpoint with Ray Train. Rank 0 calls it with the path of
        the folder in the run's file system, the others with None.
        """
        self.last_step = last_step
        self._folder = folder
        self._ranks = ranks
        self._report = report
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._state = b""  # On rank 0 and in an object store: state.json, which is uploaded last.

    def begin(self, step: int, part: Part, snapshot: Snapshot | None) -> None:
        """Starts to write a checkpoint in the background.

        step: finished steps. part: this rank's tensors. snapshot: on rank 0, else None. Waits for a
        checkpoint that is still being written.
        """
        self.finish()
        self.last_step = step
        assert (snapshot is not None) == self._ranks.first, "rank 0 writes the snapshot"
        self._writing = self._writer.submit(self._write, part, snapshot)

    def poll(self) -> bool:
        """Publishes a checkpoint if all ranks have written it; returns whether they had.

        Raises RunError where a rank could not write.
        """
        # Publishing is collective: no rank may begin it just because its own thread is done.
        if self._writing is None or not self._ranks.all(self._writing.done()):
            return False
        self._publish(self._writing)
        return True

    def finish(self) -> bool:
        """Waits for a checkpoint that is being written and publishes it; returns whether one was.

        Raises RunError where a rank could not write.
        """
        if self._writing is None:
            return False
        self._publish(self._writing)
        return True

    def _publish(self, writing: Future[None]) -> None:
        """Completes the folder and reports it.

        Raises RunError, on all ranks, where one of them could not write.
        """
        errors = [error for error in self._ranks.gather(self._error(writing)) or [] if error]
        path = None
        if self._ranks.first and not errors:
            try:
                path = self._complete()
            except (OSError, RuntimeError) as error:
                errors = [str(error)]
        if failure := self._ranks.from_first(errors[0] if errors else None):
            if self._ranks.first and self._folder.is_local:
                shutil.rmtree(self._part, ignore_errors=True)
            raise RunError(
                f"the checkpoint of step {self.last_step} could not be written to "
                f"{self._folder.join(CHECKPOINTS)} ({failure}); make room or correct the cause, "
                "and start the run again: it resumes from the checkpoint before"
            )
        self._report(path)
        self._writing = None

    @staticmethod
    def _error(writing: Future[None]) -> str | None:
        """Waits for this rank's thread; returns why it could not write, None if it could."""
        try:
            return writing.result()
        # A full disk raises each of these, depending on what writes the file.
        except (OSError, RuntimeError, SafetensorError) as error:
            return str(error) or type(error).__name__

    @property
    def _name(self) -> str:
        return f"step-{self.last_step:08d}"

    @property
    def _part(self) -> Path:
        """The hidden folder that all ranks write to, until it is complete; local folders only."""
        return Path(self._folder.root, CHECKPOINTS, f".{self._name}.part")

    @property
    def _target(self) -> str:
        """The path of the complete folder in the run's file system."""
        return f"{self._folder.root}/{CHECKPOINTS}/{self._name}"

    def _write(self, part: Part, snapshot: Snapshot | None) -> None:
        """Writes this rank's files; for an object store to a temporary folder that is uploaded."""
        if self._folder.is_local:
            self._part.mkdir(parents=True, exist_ok=True)
            self._write_files(self._part, part, snapshot)
            return
        with tempfile.TemporaryDirectory() as temporary:
            self._write_files(Path(temporary), part, snapshot)
            # state.json says that the folder is complete, so `_complete` uploads it at the end.
            if snapshot is not None:
                self._state = (Path(temporary) / STATE_FILE).read_bytes()
                (Path(temporary) / STATE_FILE).unlink()
            filesystem = self._folder.filesystem()
            filesystem.create_dir(self._target, recursive=True)
            pafs.copy_files(temporary, self._target, destination_filesystem=filesystem)

    @staticmethod
    def _write_files(folder: Path, part: Part, snapshot: Snapshot | None) -> None:
        part.write(folder)
        if snapshot is not None:
            write_snapshot(folder, snapshot)
        sync_files(folder)

    def _complete(self) -> str:
        """On rank 0, when all ranks have written: makes the folder a complete one.

        A local folder gets its final name; in an object store, which cannot rename, it gets
        state.json. Returns the folder's path.
        """
        if self._folder.is_local:
            sync_files(self._part)  # Else a power cut can leave the new name with empty files.
            os.replace(self._part, self._target)  # Atomic: the name means that it is complete.
        else:
            self._folder.write_bytes(f"{CHECKPOINTS}/{self._name}/{STATE_FILE}", self._state)
        return self._target
