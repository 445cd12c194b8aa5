"""Micro-batches on their way to the device, beside the work it is doing.

On a GPU the host is ahead of the device: when the kernels of one pass are queued, the next
micro-batch is collated, put into pinned memory and copied on a stream of its own, so the copy goes
on while the device still computes. On a CPU there is nothing to copy.
"""

import torch
from torch import Tensor

from raystill.train.batch import MicroBatch


class DeviceCopies:
    """Copies micro-batches to one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch on the device; what is queued there from now on waits for the copy."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.mapped(self._begin)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Memory of the copying stream must not be used again before the current one is done.
        moved.mapped(lambda tensor: _held(tensor, current))
        return moved

    def _begin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _held(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
