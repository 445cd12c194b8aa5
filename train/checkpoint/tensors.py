"""The tensors of a checkpoint, each as one slice, or as one slice for each rank that has a shard.

A rank writes its own rows of every sharded tensor; rank 0 also writes the tensors that are not
sharded. When a rank reads, it looks in all files for the rows that it needs, however the tensors
were cut when they were written. So a checkpoint of N workers can be read by M workers, one written
with ddp by fsdp and the other way round, and no rank needs memory for more than its own rows.

Files are safetensors, which hold numbers only and execute nothing, named
``<kind>-<rank + 1>-of-<n>.safetensors``. Their header says where each slice begins, in the form of
PyTorch's distributed checkpoints (DCP), so `torch.distributed.checkpoint.HuggingFaceStorageReader`
can read them too.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raystill.train.student.lora import has_adapters, trained_tensors
from raystill.train.student.sharding import own_rows

OFFSETS = "DCP_SHARDING_INFO"
"""Key of the slices' first rows in a file's header; the name is DCP's."""


@dataclass(frozen=True)
class TensorSlice:
    """Some rows of a tensor, on the host.

    Attributes:
        tensor: The rows.
        start: Number of the first of them in the whole tensor.
    """

    tensor: Tensor
    start: int = 0


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied parameter once, under its first name.

    Of a model with adapters what is trained alone: all else is read again from its files.
    """
    if has_adapters(model):
        return trained_tensors(model)
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    persistent = set(model.state_dict().keys())
    buffers = {n: b for n, b in model.named_buffers() if n in persistent and n not in tensors}
    tensors.update(buffers)
    return tensors


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, create: bool = False
) -> dict[str, Tensor]:
    """The optimizer's state by ``<state>.<parameter>``, for example ``exp_avg.head.weight``.

    Its settings are not state: they come from the configuration. create: first give a state of
    zeros to each parameter that has none, so that it can be filled.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter] if create else optimizer.state.get(parameter, {})
        if create and not state:
            own = getattr(optimizer, "new_state", None)  # PyTorch's has no such method.
            state.update(new_state(parameter) if own is None else own(parameter))
        tensors.update({f"{key}.{name}": value for key, value in state.items()})
    return tensors


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of PyTorch's AdamW for a parameter before the first step."""
    zeros = (torch.zeros_like(parameter.detach()) for _ in range(2))
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))


def host_slices(tensors: Mapping[str, Tensor], first: bool) -> dict[str, TensorSlice]:
    """Copies in host memory of what this rank writes, by name.

    first: whether this is rank 0, which also writes the tensors that are not sharded.
    """
    slices = {}
    for name, tensor in tensors.items():
        local, start = own_rows(tensor)
        if isinstance(tensor, DTensor) or first:
            # A copy also where the tensor is on the CPU: training goes on while it is written.
            copied = local.detach().to("cpu", copy=True).contiguous()
            slices[name] = TensorSlice(copied, start)
    return slices


def file_names(kind: str, num_files: int) -> list[str]:
    """The names of all files of one kind of tensors, in the order of the ranks that write them."""
    return [f"{kind}-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)]


def write_slices(path: Path, slices: Mapping[str, TensorSlice]) -> None:
    """Writes one rank's file, without empty slices: some ranks have no row of a short tensor."""
    present = {name: part for name, part in slices.items() if part.tensor.numel()}
    offsets = {
        name: {"saved_offsets": [part.start, *[0] * (part.tensor.ndim - 1)][: part.tensor.ndim]}
        for name, part in present.items()
    }
    metadata = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    save_file({name: part.tensor for name, part in present.items()}, path, metadata=metadata)


def are_empty(paths: Sequence[Path]) -> bool:
    """Whether none of the files has a tensor."""
    for path in paths:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()):
                return False
    return True


@torch.no_grad()
def read_slices(
    paths: Sequence[Path], tensors: Mapping[str, Tensor], may_lack: Collection[str] = ()
) -> None:
    """Fills this rank's rows of ``tensors`` from the files of all ranks.

    may_lack: tensors that stay as they are where no file has them. Raises ValueError where the
    files have other names or shapes, or lack rows.
    """
    missing = {name: own_rows(tensor)[0].numel() for name, tensor in tensors.items()}
    stored: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()[OFFSETS])
            names = set(file.keys())
            stored |= names
            for name in names & tensors.keys():
                start = (offsets[name]["saved_offsets"] or [0])[0]  # A scalar has none.
                missing[name] -= _fill(name, tensors[name], file, start)
    absent = {name for name, tensor in tensors.items() if tensor.numel() and name not in stored}
    for name in absent & set(may_lack):
        absent.remove(name)
        del missing[name]
    if differing := sorted(stored - tensors.keys() | absent):
        raise ValueError(
            f"the checkpoint's model is not this student: {len(differing)} tensors differ, first "
            f"{differing[0]}; resume with the configuration that it was written with"
        )
    if incomplete := sorted(name for name, count in missing.items() if count != 0):
        raise ValueError(
            f"the checkpoint lacks rows of {len(incomplete)} tensors, first {incomplete[0]}, in "
            f"{paths[0].name} and the other files of its folder; delete the folder to resume from "
            "the checkpoint before it"
        )


def _fill(name: str, tensor: Tensor, file: Any, start: int) -> int:
    """Copies the rows that the file and this rank both have; returns the number of their elements.

    start: number of the file's first row in the whole tensor.
    """
    stored = file.get_slice(name)
    shape = list(stored.get_shape())
    if shape[1:] != list(tensor.shape[1:]) or len(shape) != tensor.ndim:
        raise ValueError(
            f"the checkpoint's model is not this student: {name} is {list(tensor.shape)} here and "
            f"stored in rows of {shape[1:]}; resume with the configuration that it was written with"
        )
    local, own_start = own_rows(tensor)
    if tensor.ndim == 0:
        local.copy_(file.get_tensor(name))
        return 1
    first, last = max(start, own_start), min(start + shape[0], own_start + len(local))
    if start + shape[0] > len(tensor):
        raise ValueError(
            f"the checkpoint's model is not this student: {name} has {len(tensor)} rows here and "
            f"at least {start + shape[0]} there; resume with the configuration that it was written "
            "with"
        )
    if first >= last:
        return 0
    target = local[first - own_start : last - own_start]
    target.copy_(stored[first - start : last - start])
    return target.numel()
