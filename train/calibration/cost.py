"""What one loss takes, forward and backward: time, and memory at its peak.

On a GPU the memory is the allocator's, on a CPU the kernel's: the peak of the resident set
(VmHWM, reset through /proc/self/clear_refs) over what was resident before. It includes the
gradients of hidden states and head.

How many bytes a response token takes in the teacher store, by its signal.

Measured, not worked out: answers are encoded as a segment, compression and all, and the columns
that hold tokens and their signal are counted. What a row has once (key, prompt, footer) is not.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raystill.datasets.rows.schema import KEY_BYTES, TOKEN_IDS, signal_fields
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.segment import Origin, Provenance, encode

ROUNDS = 2


class Cost(NamedTuple):
    """``peak_bytes`` is None where the kernel does not tell."""

    seconds: float
    peak_bytes: int | None


def cost_of(loss: Callable[[], Tensor], device: torch.device) -> Cost:
    """``loss`` gives a scalar, which is differentiated; the first round's memory, the best time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        before = _resident_before()
    loss().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
        after: int | None = torch.cuda.max_memory_allocated()
    else:
        after = resident("VmHWM")
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return Cost(best, None if before is None or after is None else max(0, after - before))


def resident(name: str) -> int | None:
    """Bytes of this process by a line of /proc/self/status, e.g. VmRSS; None without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _resident_before() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def bytes_per_token(answers: pa.Table, signal: Signal) -> float:
    """answers: ``answer_schema`` of the signal, with one response token or more."""
    keys = [number.to_bytes(KEY_BYTES, "little") for number in range(len(answers))]
    rows = answers.drop_columns("error").append_column("key", pa.array(keys, pa.binary(KEY_BYTES)))
    prompts = pa.array([[]] * len(answers), TOKEN_IDS)
    origin = Origin("", "", "", "", "", 1, signal)
    segment = encode(
        origin, [(Provenance("", "training"), rows.append_column("prompt_ids", prompts))]
    )
    counted = {"response_ids", *(field.name for field in signal_fields(signal))}
    group = pq.ParquetFile(io.BytesIO(segment)).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    stored = sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in counted
    )
    tokens = len(answers["response_ids"].combine_chunks().flatten())
    return stored / tokens
