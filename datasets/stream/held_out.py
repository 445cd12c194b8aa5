"""The held-out rows: the teacher answers them once, at the beginning; every evaluation uses them.

One Ray task asks and writes, so no answer passes through the driver. *Waits for* the teacher, and
for the rows of the first step where these come first (``wait_may_ask_held_out``). *Unblocks* the
workers' first evaluation (``wait_held_out``).
"""

from hashlib import sha256

import pyarrow as pa
import ray

from raystill.base.errors import RunError
from raystill.base.run_folder import HELD_OUT, HELD_OUT_PROMPTS, RunFolder
from raystill.datasets.rows.schema import row_schema
from raystill.datasets.rows.signal import Signal, held_out_signal
from raystill.datasets.stream.answers import answer_prompts
from raystill.run import Run

EPOCH = -1
"""Held-out rows belong to no epoch; their position is their row."""

ASKED = b"rows_asked"
"""File metadata: a hash of the keys that were asked, of which the file holds the answered."""


@ray.remote(num_cpus=0)
def answer_held_out(run: Run) -> int:
    """Write held_out.parquet and tell the coordinator; returns its rows.

    They have the row_schema of `held_out_signal`.

    A complete file of an earlier start is kept. Raises RunError if the teacher answered none.
    """
    folder, signal = run.folder, held_out_signal(run.config)
    prompts = folder.read_table(HELD_OUT_PROMPTS)
    rows = read_complete(folder, prompts, signal)
    if rows is None:
        ray.get(run.coordinator.wait_may_ask_held_out.remote())
        rows = answer_prompts(run, prompts, signal, "evaluation", EPOCH)
        if len(rows) == 0:
            raise RunError(
                f"the teacher answered none of the {len(prompts)} held-out prompts, so nothing "
                "could be evaluated; choose others with evaluation.held_out_sources or "
                "evaluation.held_out_rows"
            )
        folder.write_table(HELD_OUT, rows.replace_schema_metadata({ASKED: hash_of(prompts)}))
        counters = {"evaluation_rows_dropped": len(prompts) - len(rows)}
        ray.get(run.coordinator.add.remote(counters))
    ray.get(run.coordinator.held_out_ready.remote())
    return len(rows)


def read_complete(folder: RunFolder, prompts: pa.Table, signal: Signal) -> pa.Table | None:
    """The kept rows, if they answer just these prompts with this signal; else None."""
    if not folder.exists(HELD_OUT):
        return None
    rows = folder.read_table(HELD_OUT)
    asked = (rows.schema.metadata or {}).get(ASKED)
    same = asked == hash_of(prompts) and rows.schema.equals(row_schema(signal))
    return rows if same and len(rows) else None


def hash_of(prompts: pa.Table) -> bytes:
    """Names the prompts (PROMPT_SCHEMA) and their teacher, by their keys in order."""
    return sha256(b"".join(prompts["key"].to_pylist())).hexdigest().encode()
