"""A whole teacher on a device that has room for one of its layers, while it is judged.

What is outside of the layers stays on the device; a layer is copied there from host memory when it
runs, and its copy is dropped when another one runs. Nothing is computed differently. A pass over
141 GB of weights takes seconds, by what the bus to the device carries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raystill.train.start.cut import layer_list

ROOM = 1.15
"""The memory that whole weights are to find free, as a multiple of theirs."""


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Whether the device has room for all weights now; true on a CPU, where they are."""
    if device.type != "cuda":
        return True
    size = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
    return torch.cuda.mem_get_info(device)[0] > ROOM * size


@contextmanager
def whole_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device, afterwards on the host."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


@contextmanager
def one_layer_at_a_time(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device, of its layers the one that runs; afterwards all on the host.

    Weights must not be changed within it, but for as long as a layer runs.
    """
    layers = list(layer_list(model)[2])
    inside = {id(t) for layer in layers for t in _tensors(layer)}
    outside = [(t, t.data) for t in _tensors(model) if id(t) not in inside]
    here: list[nn.Module] = []
    kept: list[tuple[Tensor, Tensor]] = []

    def leave() -> None:
        for tensor, host in kept:
            tensor.data = host
        here.clear()
        kept.clear()

    def enter(layer: nn.Module, *_: Any) -> None:
        if here == [layer]:
            return  # It is run again by a hook of its own.
        leave()
        here.append(layer)
        kept.extend((tensor, tensor.data) for tensor in _tensors(layer))
        for tensor, host in kept:
            tensor.data = host.to(device, copy=True)

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    try:
        for tensor, host in outside:
            tensor.data = host.to(device)
        yield
    finally:
        leave()
        for tensor, host in outside:
            tensor.data = host
        for hook in hooks:
            hook.remove()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
