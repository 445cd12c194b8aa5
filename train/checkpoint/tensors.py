"""The tensors of a checkpoint, each in one piece or in one for each rank that holds a part of it.

A rank writes what it holds: a sharded tensor's rows, and on the first rank whatever every rank has
whole. It reads what it will hold, whatever the files were cut into: row ranges are intersected. So
a checkpoint of N workers is read by M, of ddp by fsdp and the other way round, and nobody ever has
more in memory than its own part.

Files are safetensors (numbers only, nothing that is executed), named ``<kind>-<rank + 1>-of-<n>``.
Their header says where each piece begins as PyTorch's distributed checkpoints (DCP) do, so that
`torch.distributed.checkpoint.HuggingFaceStorageReader` reads them too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class TensorSlice:
    """Rows of a tensor, on the host; ``start`` is the first one's place in the whole tensor."""

    tensor: Tensor
    start: int = 0


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied one once, under its first name."""
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    kept = set(model.state_dict().keys())
    tensors.update({n: b for n, b in model.named_buffers() if n in kept and n not in tensors})
    return tensors


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, create: bool = False
) -> dict[str, Tensor]:
    """AdamW's state by ``<what>.<parameter>``; the rest of it is the configuration's.

    create: give a parameter that was never stepped a state of zeros first.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter] if create else optimizer.state.get(parameter, {})
        if create and not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        tensors.update({f"{what}.{name}": value for what, value in state.items()})
    return tensors


def host_slices(tensors: Mapping[str, Tensor], first: bool) -> dict[str, TensorSlice]:
    """Copies, in host memory, of what this rank writes; ``first``: this is rank 0."""
    slices = {}
    for name, tensor in tensors.items():
        local, start = _local(tensor)
        if isinstance(tensor, DTensor) or first:
            copied = local.detach().to("cpu", copy=True).contiguous()
            slices[name] = TensorSlice(copied, start)
    return slices


def file_names(kind: str, num_files: int) -> list[str]:
    """The files of one kind of tensors, by the rank that writes them."""
    return [f"{kind}-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)]


def write_slices(path: Path, slices: Mapping[str, TensorSlice]) -> None:
    """Write one rank's file. A rank may hold no row of a short tensor."""
    held = {name: piece for name, piece in slices.items() if piece.tensor.numel()}
    offsets = {
        name: {"saved_offsets": [piece.start, *[0] * (piece.tensor.ndim - 1)][: piece.tensor.ndim]}
        for name, piece in held.items()
    }
    metadata = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    save_file({name: piece.tensor for name, piece in held.items()}, path, metadata=metadata)


def are_empty(paths: Sequence[Path]) -> bool:
    """Whether no file of all ranks holds a tensor."""
    for path in paths:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()):
                return False
    return True


@torch.no_grad()
def read_slices(paths: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of ``tensors`` from the files of all ranks.

    Raises ValueError where names or shapes are others than theirs, or rows are missing.
    """
    missing = {name: _local(tensor)[0].numel() for name, tensor in tensors.items()}
    found: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()[OFFSETS])
            names = set(file.keys())
            found |= names
            for name in names & tensors.keys():
                start = (offsets[name]["saved_offsets"] or [0])[0]
                missing[name] -= _fill(name, tensors[name], file, start)
    absent = {name for name, tensor in tensors.items() if tensor.numel() and name not in found}
    if differing := sorted(found - tensors.keys() | absent):
        raise ValueError(
            f"the checkpoint's model is not this student: {len(differing)} tensors differ, first "
            f"{differing[0]}; resume with the configuration it was written with"
        )
    if torn := sorted(name for name, count in missing.items() if count != 0):
        raise ValueError(
            f"the checkpoint lacks rows of {len(torn)} tensors, first {torn[0]}, in "
            f"{paths[0].name} and the files beside it; delete its folder to resume from the one "
            "before"
        )


def _fill(name: str, tensor: Tensor, file: Any, start: int) -> int:
    """Copy the rows that both have; how many numbers that were. The file's begin at ``start``."""
    stored = file.get_slice(name)
    shape = list(stored.get_shape())
    if shape[1:] != list(tensor.shape[1:]) or len(shape) != tensor.ndim:
        raise ValueError(
            f"the checkpoint's model is not this student: {name} is {list(tensor.shape)} here and "
            f"stored in rows of {shape[1:]}; resume with the configuration it was written with"
        )
    local, own_start = _local(tensor)
    if tensor.ndim == 0:
        local.copy_(file.get_tensor(name))
        return 1
    first, last = max(start, own_start), min(start + shape[0], own_start + len(local))
    if start + shape[0] > len(tensor):
        raise ValueError(
            f"the checkpoint's model is not this student: {name} has {len(tensor)} rows here and "
            f"at least {start + shape[0]} there; resume with the configuration it was written with"
        )
    if first >= last:
        return 0
    target = local[first - own_start : last - own_start]
    target.copy_(stored[first - start : last - start])
    return target.numel()


def _local(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows and the first one's place; of a tensor that is not sharded, all."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    assert tuple(tensor.placements) == (Shard(0),), "parameters are cut by rows over one mesh axis"
    mesh = tensor.device_mesh
    size = -(-len(tensor) // mesh.size())
    start = min(mesh.get_local_rank() * size, len(tensor))
    local = tensor.to_local()
    assert len(local) == max(0, min(size, len(tensor) - start)), "FSDP cuts as torch.chunk does"
    return local, start
