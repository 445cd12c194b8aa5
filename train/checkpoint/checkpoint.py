"""Checkpoints: everything needed to go on as if nothing had happened, ledger included.

A checkpoint is copied to host memory at one step, by every rank what it holds, while all ranks
stand at that step; a thread of each rank writes it; it is published at a later step, at which all
ranks report it to Ray Train. One is in flight at a time. Only a published checkpoint is ever
resumed from (``register``).

``<run>/checkpoints/step-<finished steps>/`` holds ``model-*`` (parameters and persistent buffers in
the training precision) and ``optimizer-*`` (AdamW's state), one safetensors file a rank that holds
a part of them (``pieces``: read by any number of workers, sharded or not); ``random.pt`` (tensors
and numbers, loadable with ``weights_only=True``; one random state a rank), ``ledger.json``,
``state.json`` and, where baselines are measured, ``counts.npz``. The schedule is a function of the
step.

Consumes: the ranks' states. Waits for: nothing, except ``finish``, which waits for the threads of
all ranks.
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
from raystill.train.checkpoint import tensors as pc
from raystill.train.checkpoint.ray_register import STATE_FILE
from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import is_sharded

FORMAT_VERSION = 4


KINDS = ("model", "optimizer")


@dataclass
class Snapshot:
    """The state of a run after ``step`` finished optimizer steps, its large tensors apart.

    num_files: of each of ``KINDS``; 1 unless the student is sharded.
    """

    step: int
    epoch: int
    random: list[dict[str, Any]]  # One a rank.
    ledger: dict[str, Any]
    num_files: int = 1
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # Numbers, see Progress.take_over.


@dataclass(frozen=True)
class Part:
    """What one rank writes of a checkpoint's tensors, on the host, by kind; and into which file."""

    slices: dict[str, dict[str, pc.TensorSlice]]
    file: int
    num_files: int

    @classmethod
    def copied(cls, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> "Part":
        """A copy of what this rank holds, so that training may go on."""
        tensors = pc.model_tensors(model), pc.optimizer_tensors(model, optimizer)
        copies = (pc.host_slices(of_kind, ranks.first) for of_kind in tensors)
        sharded = is_sharded(model)
        num_files = ranks.world_size if sharded else 1
        return cls(dict(zip(KINDS, copies, strict=True)), ranks.rank, num_files)

    def write(self, folder: Path) -> None:
        """Write this rank's files into ``folder``; nothing where it holds no part."""
        if self.file < self.num_files:
            for kind, held in self.slices.items():
                pc.write_slices(folder / pc.file_names(kind, self.num_files)[self.file], held)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """This process's random states: Python's, numpy's, torch's, and the device's."""
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
    """Restore what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write what rank 0 writes beside its ``Part``; ``state.json`` last."""
    torch.save(snapshot.random, folder / "random.pt")
    (folder / "ledger.json").write_text(json.dumps(snapshot.ledger))
    if snapshot.counts:
        np.savez(folder / "counts.npz", allow_pickle=False, **snapshot.counts)
    state = {
        "format_version": FORMAT_VERSION,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "num_files": snapshot.num_files,
        "world_size": len(snapshot.random),
        **snapshot.extra,
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_snapshot(folder: str | Path) -> Snapshot:
    """Read what :func:`write_snapshot` wrote."""
    folder = Path(folder)
    state = json.loads((folder / STATE_FILE).read_text())
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} holds a checkpoint of format {version}, but this version reads format "
            f"{FORMAT_VERSION}; resume with the version that wrote it, or start a new run folder"
        )
    counts = folder / "counts.npz"
    step, epoch, num_files = (state.pop(name) for name in ("step", "epoch", "num_files"))
    return Snapshot(
        step=step,
        epoch=epoch,
        random=torch.load(folder / "random.pt", weights_only=True),
        ledger=json.loads((folder / "ledger.json").read_text()),
        num_files=num_files,
        counts=dict(np.load(counts, allow_pickle=False)) if counts.exists() else {},
        extra=state,
    )


def load_tensors(
    folder: str | Path, num_files: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Fill ``model`` and ``optimizer`` (this rank's part of them) from a checkpoint's files.

    The optimizer of a run that has made no step yet stays as it is. Raises ValueError where the
    checkpoint is of another student.
    """
    model_files, optimizer_files = (
        [Path(folder) / name for name in pc.file_names(kind, num_files)] for kind in KINDS
    )
    pc.read_slices(model_files, pc.model_tensors(model))
    if not pc.are_empty(optimizer_files):
        pc.read_slices(optimizer_files, pc.optimizer_tensors(model, optimizer, create=True))


class Checkpointer:
    """Writes checkpoints of one run; every method is called by all ranks at the same step.

    ``report(path)`` registers a written folder with Ray Train: on rank 0 with the folder's path in
    the run's file system, on the others with None.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        report: Callable[[str | None], None],
        last_step: int = -1,
    ) -> None:
        self.last_step = last_step  # Finished steps in the newest checkpoint, written or begun.
        self._folder = folder
        self._ranks = ranks
        self._report = report
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._state = b""  # On rank 0, of a remote folder: what is uploaded last.

    def begin(self, step: int, part: Part, snapshot: Snapshot | None) -> None:
        """Write this rank's ``part``, and the ``snapshot`` (rank 0's), in the background."""
        self.finish()
        self.last_step = step
        assert (snapshot is not None) == self._ranks.first, "rank 0 writes the snapshot"
        self._writing = self._writer.submit(self._write, part, snapshot)

    def poll(self) -> bool:
        """Publish the checkpoint in flight if all have written; whether one was published."""
        if self._writing is None or not self._ranks.all(self._writing.done()):
            return False
        self._publish(self._writing)
        return True

    def finish(self) -> bool:
        """Wait until the checkpoint in flight is written and publish it; whether there was one."""
        if self._writing is None:
            return False
        self._publish(self._writing)
        return True

    def _publish(self, writing: Future[None]) -> None:
        """Make the folder whole and report it. Raises RunError where a rank could not write."""
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
                f"{self._folder.join(CHECKPOINTS)} ({failure}); make room or mend it, and start "
                "the run again: it goes on from the last checkpoint that was"
            )
        self._report(path)
        self._writing = None

    @staticmethod
    def _error(writing: Future[None]) -> str | None:
        """Waits for this rank's thread; what kept it from writing: no space, no permission."""
        try:
            return writing.result()
        except (OSError, RuntimeError, SafetensorError) as error:  # As its files' writers say it.
            return str(error) or type(error).__name__

    @property
    def _name(self) -> str:
        return f"step-{self.last_step:08d}"

    @property
    def _part(self) -> Path:
        """Where a local folder is written, all ranks' files, until it is whole."""
        return Path(self._folder.root, CHECKPOINTS, f".{self._name}.part")

    @property
    def _target(self) -> str:
        return f"{self._folder.root}/{CHECKPOINTS}/{self._name}"

    def _write(self, part: Part, snapshot: Snapshot | None) -> None:
        """This rank's files: under the name of a part, or in a local copy that is uploaded."""
        if self._folder.is_local:
            self._part.mkdir(parents=True, exist_ok=True)
            self._write_files(self._part, part, snapshot)
            return
        with tempfile.TemporaryDirectory() as temporary:
            self._write_files(Path(temporary), part, snapshot)
            if snapshot is not None:  # It says: whole. `_complete` adds it when all is there.
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

    def _complete(self) -> str:
        """On rank 0, when all ranks have written: the folder gets its name, or what says: whole."""
        if self._folder.is_local:
            os.replace(self._part, self._target)
        else:
            self._folder.write_bytes(f"{CHECKPOINTS}/{self._name}/{STATE_FILE}", self._state)
        return self._target
