"""Measures what a signal costs: time and memory of its loss, and bytes in the teacher store.

The loss is measured forward and backward. On a GPU its memory is the allocator's peak. On a CPU it
is the peak of the resident set (VmHWM, reset through /proc/self/clear_refs) over what was resident
before. Both include the gradients of hidden states and head.

The bytes are measured and not calculated: answers are encoded and compressed as a segment of the
store, and the columns of tokens and signal are counted. What a row has once (key, prompt, footer)
is left out.
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
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.segment import encode

ROUNDS = 2
"""Timed repetitions, after one that warms up and whose memory is measured."""


class Cost(NamedTuple):
    """Seconds of the fastest round; peak_bytes is None if the kernel does not report it."""

    seconds: float
    peak_bytes: int | None


def cost_of(loss: Callable[[], Tensor], device: torch.device) -> Cost:
    """Measure ``loss``, which returns a scalar, and its backward pass on ``device``.

    The memory is that of the first round, the time that of the fastest of the others.
    """
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
            torch.cuda.synchronize()  # Else only the start of the kernels would be timed.
        best = min(best, time.perf_counter() - started)
    return Cost(best, None if before is None or after is None else max(0, after - before))


def resident(name: str) -> int | None:
    """Return a field of /proc/self/status in bytes, e.g. VmRSS; None if there is no such file.

    By hand: psutil has no peak that can be reset, and getrusage's includes what the process was
    before it was this program.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def _resident_before() -> int | None:
    """Reset the peak of the resident set; return its size now, or None if that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def bytes_per_token(answers: pa.Table, signal: Signal) -> float:
    """Return the stored bytes of a response token and its signal, compressed, on average.

    answers: a table of ``answer_schema`` with this signal and at least one response token.
    """
    # Keys and prompts are not counted; the segment only needs some.
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
