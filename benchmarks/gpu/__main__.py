"""The student on one GPU: numbers right, losses fast, a step busy, a checkpoint whole.

    python -m benchmarks.gpu [--output benchmarks/results/gpu.json] [--only PART ...]

Needs torch, transformers, pyarrow, pydantic and PyYAML (Python 3.11 and 3.12), no Ray and no vLLM,
and ends within eight minutes on one GPU. Without a GPU it runs small, to show that all of it runs;
bars of speed are then printed and not held. The parts:

- ``numerics``: every term of the objective, by both chunked losses, in bfloat16 against float64;
- ``loss``: time and peak memory of the chunked losses, dense cross entropy, PyTorch's
  ``linear_cross_entropy`` and, where it is installed, Liger's, at V = 151,936, D = 4,096;
- ``step``: a student of 1B parameters padded, packed, with recomputed layers, compiled, and with
  each optimizer: tokens/s, model FLOPs utilisation, bytes a parameter, how often the host waits;
- ``sharded``: one rank of FSDP2 trains as no sharding does;
- ``checkpoint``: written and read again, bit for bit.

It exits with 1 where a bar fails, after all parts have run and the result is written.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.head import loss, numerics
from benchmarks.gpu.setting import GPU, Bars
from benchmarks.gpu.student import checkpoint, sharded, step
from benchmarks.results import machine, write_result

PARTS: dict[str, Callable[[Bars], dict[str, Any]]] = {
    "numerics": numerics,
    "loss": loss,
    "step": step,
    "sharded": sharded,
    "checkpoint": checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    bars, found, started = Bars(), {}, time.perf_counter()
    for name in arguments.only:
        print(f"{name}:", flush=True)
        found[name] = PARTS[name](bars)
        if GPU:
            torch.cuda.empty_cache()
    software = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if GPU else None}
    result = {"machine": machine() | software, "seconds": time.perf_counter() - started}
    write_result(arguments.output, result | {"bars": bars.lines, "measured": found})
    if bars.failed:
        sys.exit(f"{len(bars.failed)} bars fail: {'; '.join(bars.failed)}")


if __name__ == "__main__":
    main()
