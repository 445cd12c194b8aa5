"""The held-out rows: the teacher answers them once, before training; every evaluation uses them.

One Ray task asks and writes, so no answer passes through the driver. *Waits for* the teacher.
*Unblocks* the workers' first evaluation (``wait_held_out``).
"""

import asyncio
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from raystill.base.errors import RunError
from raystill.base.run_folder import HELD_OUT, HELD_OUT_PROMPTS, RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import row_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answers import StoredAnswers
from raystill.datasets.stream.spec import Requester
from raystill.datasets.stream.teacher_calls import TeacherCalls

EPOCH = -1
"""Held-out rows belong to no epoch; their position is their row."""

ASKED = b"rows_asked"
"""File metadata: a hash of the keys that were asked, of which the file holds the answered."""


@ray.remote(num_cpus=0)
def answer_held_out(
    folder: RunFolder,
    config: RunConfig,
    store_path: str,
    requester: Requester,
    app_name: str,
    coordinator: Any,
) -> int:
    """Write held_out.parquet (row_schema of ``topk``) and tell the coordinator; returns its rows.

    A complete file of an earlier start is kept. RunError if the teacher answered none of them.
    """
    prompts = folder.read_table(HELD_OUT_PROMPTS)
    top_k, teacher, stream = config.evaluation.top_k, config.teacher, config.stream
    rows = read_complete(folder, prompts, top_k)
    if rows is None:
        wanted = Signal("topk", top_k)
        calls = TeacherCalls(app_name, wanted, stream.max_attempts, coordinator)
        answers = StoredAnswers(TeacherStore(store_path), prompts["key"], wanted, requester, calls)
        groups_in_flight = teacher.max_replicas * teacher.target_ongoing_requests
        rows = asyncio.run(_answer(answers, prompts, top_k, stream.group_rows, groups_in_flight))
        if len(rows) == 0:
            raise RunError(
                f"the teacher answered none of the {len(prompts)} held-out prompts, so nothing "
                "could be evaluated; choose others with evaluation.held_out_sources or "
                "evaluation.held_out_rows"
            )
        folder.write_table(HELD_OUT, rows)
        counters = {"evaluation_rows_dropped": len(prompts) - len(rows)}
        ray.get(coordinator.add.remote(counters))
    ray.get(coordinator.held_out_ready.remote())
    return len(rows)


def read_complete(folder: RunFolder, prompts: pa.Table, top_k: int) -> pa.Table | None:
    """The kept rows, if they answer just these prompts with this K; else None."""
    if not folder.exists(HELD_OUT):
        return None
    rows = folder.read_table(HELD_OUT)
    asked = (rows.schema.metadata or {}).get(ASKED)
    same = asked == hash_of(prompts) and rows.schema.equals(row_schema(Signal("topk", top_k)))
    return rows if same and len(rows) else None


def hash_of(prompts: pa.Table) -> bytes:
    """Names the prompts (PROMPT_SCHEMA) and their teacher, by their keys in order."""
    return sha256(b"".join(prompts["key"].to_pylist())).hexdigest().encode()


async def _answer(
    answers: StoredAnswers, prompts: pa.Table, top_k: int, group_rows: int, groups_in_flight: int
) -> pa.Table:
    slots = asyncio.Semaphore(groups_in_flight)

    async def ask(start: int) -> pa.Table:
        async with slots:
            group = prompts.slice(start, group_rows).combine_chunks()
            ids, given = (group[n].combine_chunks() for n in ("prompt_ids", "response_ids"))
            said, _ = await answers.get(group["row"].to_numpy(), ids, given)
            return _join(group, said, top_k)

    groups = await asyncio.gather(*(ask(i) for i in range(0, len(prompts), group_rows)))
    schema = row_schema(Signal("topk", top_k)).with_metadata({ASKED: hash_of(prompts)})
    return pa.concat_tables(groups).cast(schema) if groups else schema.empty_table()


def _join(prompts: pa.Table, answers: pa.Table, top_k: int) -> pa.Table:
    columns = {
        "row": prompts["row"],
        "position": prompts["row"],
        "epoch": pa.array([EPOCH] * len(prompts), pa.int32()),
        "source": prompts["source"],
        "prompt_ids": prompts["prompt_ids"],
    }
    schema = row_schema(Signal("topk", top_k))
    values = [columns[n] if n in columns else answers[n] for n in schema.names]
    rows = pa.table(values, schema=schema)
    return rows.filter(pc.is_null(answers["error"]))
