"""What an engine holds in memory: the worker's side of `speed.SpeedBench`.

vLLM adds `Footprint` to its workers (``worker_extension_cls``), so that each tells of its own.
"""

from pathlib import Path
from typing import Any

import torch

from raystill.serve.engine.capture import Capture

EXTENSION = "raystill.serve.bench.footprint.Footprint"


class Footprint(Capture):
    """A worker that tells what it holds."""

    def raystill_footprint(self) -> dict[str, int]:
        """``peak_bytes`` and, of them, ``kv_cache_bytes``.

        On a GPU the most that torch had allocated there; on a CPU the most of this process that
        was in memory at once, Python and its libraries included.
        """
        runner: Any = self.model_runner
        kv_cache = {
            cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes()
            for cache in tensors_in(getattr(runner, "kv_caches", []))
        }
        on_gpu = runner.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(runner.device) if on_gpu else resident_peak_bytes()
        return {"peak_bytes": int(peak), "kv_cache_bytes": sum(kv_cache.values())}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors_in(part)]


def resident_peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most memory that this process had at once, by the kernel's ``VmHWM`` (KiB)."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
