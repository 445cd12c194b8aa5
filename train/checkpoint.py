"""Checkpoints: everything needed to go on as if nothing had happened, ledger included.

A checkpoint is copied to host memory at one step, on rank 0, while all ranks stand at that step;
a thread writes it; it is published at a later step, at which all ranks report it to Ray Train. One
is in flight at a time. Only a published checkpoint is ever resumed from (``register``).

``<run>/checkpoints/step-<finished steps>/`` holds ``model.safetensors`` (parameters and persistent
buffers in the training precision), ``optimizer.pt`` and ``random.pt`` (plain tensors and numbers,
loadable with ``weights_only=True``; one random state a rank), ``ledger.json``, ``state.json`` and,
where baselines are measured, ``counts.npz``. The schedule is a function of the step.

Consumes: the ranks' states. Waits for: nothing, except ``finish``, which waits for the thread.
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
from safetensors.torch import load_file, save_file
from torch import nn

from raystill.cluster.problems import RunError
from raystill.cluster.run_folder import CHECKPOINTS, RunFolder
from raystill.train.register import STATE_FILE

FORMAT_VERSION = 3


@dataclass
class Snapshot:
    """The state of a run after ``step`` finished optimizer steps, on the host."""

    step: int
    epoch: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: list[dict[str, Any]]  # One a rank.
    ledger: dict[str, Any]
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # Numbers, see Progress.take_over.


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a tied one once, under its first name."""
    tensors: dict[str, torch.Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    kept = set(model.state_dict().keys())
    tensors.update({n: b for n, b in model.named_buffers() if n in kept and n not in tensors})
    return tensors


def host_copy(value: Any) -> Any:
    """``value`` with every tensor copied to host memory, so that training may go on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value


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
    """Write the files of ``snapshot`` into ``folder``, which is made; ``state.json`` last."""
    folder.mkdir(parents=True)
    save_file(snapshot.model, folder / "model.safetensors")
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    torch.save(snapshot.random, folder / "random.pt")
    (folder / "ledger.json").write_text(json.dumps(snapshot.ledger))
    if snapshot.counts:
        np.savez(folder / "counts.npz", allow_pickle=False, **snapshot.counts)
    state = {
        "format_version": FORMAT_VERSION,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "world_size": len(snapshot.random),
        **snapshot.extra,
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_snapshot(folder: str | Path) -> Snapshot:
    """Read what :func:`write_snapshot` wrote, into host memory."""
    folder = Path(folder)
    state = json.loads((folder / STATE_FILE).read_text())
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} holds a checkpoint of format {version}, but this version reads format "
            f"{FORMAT_VERSION}; resume with the version that wrote it, or start a new run folder"
        )
    counts = folder / "counts.npz"
    step, epoch = state.pop("step"), state.pop("epoch")
    return Snapshot(
        step=step,
        epoch=epoch,
        model=load_file(folder / "model.safetensors"),
        optimizer=torch.load(folder / "optimizer.pt", weights_only=True),
        random=torch.load(folder / "random.pt", weights_only=True),
        ledger=json.loads((folder / "ledger.json").read_text()),
        counts=dict(np.load(counts, allow_pickle=False)) if counts.exists() else {},
        extra=state,
    )


@torch.no_grad()
def load_model(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy checkpointed ``tensors`` into ``model``; names and shapes must be the same."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())
        raise ValueError(
            f"the checkpoint's model is not this student: {len(differing)} tensors differ, first "
            f"{differing[0]}; resume with the configuration it was written with"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


class Checkpointer:
    """Writes checkpoints of one run; every method is called by all ranks at the same step.

    ``report(path)`` registers a written folder with Ray Train: on rank 0 with the folder's path in
    the run's file system, on the others with None. ``agree(flag)`` gives every rank rank 0's flag.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        first: bool,
        agree: Callable[[bool], bool],
        report: Callable[[str | None], None],
        last_step: int = -1,
    ) -> None:
        self.last_step = last_step  # Finished steps in the newest checkpoint, written or begun.
        self._folder = folder
        self._first = first
        self._agree = agree
        self._report = report
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None
        self._in_flight = False

    def begin(self, step: int, snapshot: Snapshot | None) -> None:
        """Write ``snapshot`` (rank 0's; None elsewhere) of ``step`` in the background."""
        self.finish()
        self.last_step = step
        self._in_flight = True
        if self._first:
            assert snapshot is not None, "rank 0 writes the checkpoint and needs its state"
            self._writing = self._writer.submit(self._write, snapshot)

    def poll(self) -> bool:
        """Publish the checkpoint in flight if it is written; whether one was published."""
        if not self._in_flight:
            return False
        written = self._writing is not None and self._writing.done()
        if not self._agree(written):
            return False
        self._publish()
        return True

    def finish(self) -> bool:
        """Wait until the checkpoint in flight is written and publish it; whether there was one."""
        if not self._in_flight:
            return False
        self._publish()
        return True

    def _publish(self) -> None:
        path = self._writing.result() if self._writing is not None else None
        self._report(path)
        self._writing, self._in_flight = None, False

    def _write(self, snapshot: Snapshot) -> str:
        """Write the folder whole. Raises RunError where it cannot be: no space, no permission."""
        name = f"step-{snapshot.step:08d}"
        try:
            return self._write_whole(name, snapshot)
        except (OSError, RuntimeError, SafetensorError) as error:  # As its files' writers say it.
            if self._folder.is_local:
                shutil.rmtree(self._part(name), ignore_errors=True)
            raise RunError(
                f"the checkpoint of step {snapshot.step} could not be written to "
                f"{self._folder.join(CHECKPOINTS)} ({error}); make room or mend it, and start the "
                "run again: it goes on from the last checkpoint that was"
            ) from error

    def _part(self, name: str) -> Path:
        return Path(self._folder.root, CHECKPOINTS, f".{name}.part")

    def _write_whole(self, name: str, snapshot: Snapshot) -> str:
        """Under a name of its own first, or in a local copy."""
        filesystem, target = self._folder.filesystem(), f"{self._folder.root}/{CHECKPOINTS}/{name}"
        if self._folder.is_local:
            part = self._part(name)
            shutil.rmtree(part, ignore_errors=True)
            write_snapshot(part, snapshot)
            os.replace(part, target)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                local = Path(temporary) / name
                write_snapshot(local, snapshot)
                os.rename(local / STATE_FILE, Path(temporary) / STATE_FILE)
                filesystem.create_dir(target, recursive=True)
                for source in (
                    str(local),
                    temporary,
                ):  # Last what says: whole.
                    pafs.copy_files(source, target, destination_filesystem=filesystem)
                    shutil.rmtree(local, ignore_errors=True)
        return target
