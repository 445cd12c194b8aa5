"""The store with many rows: looks through it, groups read from it, and its compaction.

    python -m benchmarks.store --rows 1000000 [--tokens 2] [--folder FOLDER]
    python -m benchmarks.store --rows 10000000 --folder FOLDER --stage publish  (then look, groups,
        compact and compacted; `--minutes 30` ends a compaction after as long)

Segments of 8 rows of a few tokens (K = 64) as runs publish them, which note them for the index,
before and after a compaction. Some of them are looked through without any index too ("bare"). With
a folder the store is written there and stays; one that is there already is not written again. Each
stage goes on where it was broken off, and puts its figures beside those of the others. Each part
runs in a process of its own: its seconds, those of the processor, the peak memory of the process
(``peak_mb``), and how much of that is above what its imports take (``extra_peak_mb``). Groups are
read at random places, each opened anew; the median counts.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.store_rows import GROUP_ROWS, TOPK, publish_rows
from raystill.datasets.lookup.files import part_files
from raystill.datasets.lookup.keeping import Notes, StoreIndex
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.answers import stored_columns
from raystill.datasets.rows.prompt_table import PromptReader
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.store import MERGED, SEGMENTS, TeacherStore
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, remaining_groups

GROUPS_READ = 100
BARE_ROWS = 32_000
TABLE_ROWS = 8192

Work = Callable[..., dict[str, Any]]


class OutOfTime(Exception):
    """A part has had the time that it was given."""


def look_through(folder: str) -> dict[str, Any]:
    """What a process does with a store before its first row."""
    store = TeacherStore(folder)
    files = len(part_files(store))
    index = StoreIndex(store).look_through()
    parts = {"files_before": files, "parts": len(index.parts)}
    return {"rows": index.rows, "segments": index.num_segments, **parts}


def look_through_bare(folder: str) -> dict[str, Any]:
    """As `look_through`, of the first BARE_ROWS of a store, without its index."""
    names = sorted(os.listdir(f"{folder}/{SEGMENTS}"))[: BARE_ROWS // GROUP_ROWS]
    with tempfile.TemporaryDirectory(dir=folder) as bare:
        os.makedirs(f"{bare}/{SEGMENTS}")
        for name in names:
            os.link(f"{folder}/{SEGMENTS}/{name}", f"{bare}/{SEGMENTS}/{name}")
        start = time.process_time()
        told = look_through(bare)
        return {**told, "segment_ms": 1e3 * (time.process_time() - start) / len(names)}


def find_all(folder: str) -> dict[str, Any]:
    """All keys of a store, a million at a time, as the driver looks for those of its prompts."""
    index = StoreIndex(TeacherStore(folder)).look_through()
    found = 0
    for part, live in zip(index.parts, index.live, strict=True):
        rows = part.where.all()
        rows = rows[live[part.segment[rows["group"]]]]
        words = np.stack([rows["high"], rows["low"]], axis=1).astype(">u8")
        buffers = [None, pa.py_buffer(words)]
        keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(words), buffers)
        found += int(index.find_many(pa.chunked_array([keys]), TOPK)[1].sum())
    assert found == index.rows
    return {"found": found}


def read_groups(folder: str) -> dict[str, Any]:
    """Milliseconds of the processor for a group of 8 rows, all columns.

    The groups' own segments are kept beside the store. Once it is compacted they are read in
    alternation with it, so that other work on the machine slows both.
    """
    kept = TeacherStore(f"{folder}.own")
    store, generator = TeacherStore(folder), np.random.default_rng(1)
    names = store.names()
    times: tuple[list[float], list[float]] = ([], [])
    own = [names[number] for number in generator.integers(0, len(names), GROUPS_READ)]
    if not os.path.exists(kept.path):
        os.makedirs(f"{kept.path}/{SEGMENTS}")
        for name in set(own):
            os.link(f"{folder}/{SEGMENTS}/{name}", f"{kept.path}/{SEGMENTS}/{name}")
    pairs = list(zip(own, generator.choice(kept.names(), GROUPS_READ), strict=True))
    for merged, alone in pairs:
        groups = len(store.open(merged).footer.groups)
        chosen = ((store, merged, int(generator.integers(groups))), (kept, str(alone), 0))
        for of, (where, name, group) in zip(times, chosen, strict=True):
            start = time.process_time()
            where.read_group(name, group, ["key", *stored_columns(TOPK)], {})
            of.append(time.process_time() - start)
    group_s, own_s = (float(np.median(of)) for of in times)
    return {"group_ms": 1e3 * group_s, "own_ms": 1e3 * own_s, "ratio": group_s / own_s}


def first_group(folder: str, rows: int) -> dict[str, Any]:
    """Seconds from a prompt table of as many rows to the first group of an epoch, without Ray."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = f"{scratch}/prompts.parquet"
        schema = pa.schema([("row", pa.int64()), ("prompt_ids", pa.list_(pa.int32()))])
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(0, rows, TABLE_ROWS):
                numbers = pa.array(range(first, min(first + TABLE_ROWS, rows)), pa.int64())
                prompts = pa.array([[1, 2, 3]] * len(numbers), schema.field("prompt_ids").type)
                writer.write_table(pa.table([numbers, prompts], schema=schema))
        start, cpu = time.perf_counter(), time.process_time()
        prompts = PromptReader(path)
        order = epoch_order(rows, 7, 0, GROUP_ROWS)
        positions = next(remaining_groups(rows, GROUP_ROWS, Ledger(rows)))
        taken = prompts.take(order[positions])
        assert len(taken) == GROUP_ROWS
        first_s, first_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return {"first_group_s": first_s, "first_group_cpu_s": first_cpu_s}


def miss_groups(folder: str) -> dict[str, Any]:
    """Milliseconds of the processor to find that a group of 8 rows is not in the store."""
    generator = np.random.default_rng(2)
    data = generator.bytes(GROUPS_READ * GROUP_ROWS * KEY_BYTES)
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), GROUPS_READ * GROUP_ROWS, [None, pa.py_buffer(data)]
    )
    view = StoreView(TeacherStore(folder), pa.chunked_array([keys]), TOPK)
    nothing = pa.nulls(GROUP_ROWS, pa.list_(pa.int32()))
    times = []
    for first in range(0, len(keys), GROUP_ROWS):
        start = time.process_time()
        lookup = view.look_up(np.arange(first, first + GROUP_ROWS), nothing)
        times.append(time.process_time() - start)
        assert len(lookup.to_ask) == GROUP_ROWS
    return {"miss_ms": 1e3 * float(np.median(times)), "most_ms": 1e3 * max(times)}


def compact_all(folder: str, seconds: float | None = None) -> dict[str, Any]:
    """One compaction, with the index that it leaves; of ``seconds`` at most, if so many are given.

    planned_s, planned_peak_mb: when the first segments were merged.
    """
    store, start = TeacherStore(folder), time.perf_counter()
    notes, told = Notes(store), {"segments": num_segments(folder), "batches": 0, "done": 0}

    def progress(done: int, total: int) -> None:
        told.update(batches=total, done=done)
        if done == 1:
            planned_s = round(time.perf_counter() - start, 2)
            told.update(planned_s=planned_s, planned_peak_mb=peak_mb())
        if seconds is not None and time.perf_counter() - start > seconds:
            raise OutOfTime

    with suppress(OutOfTime):
        done = compact(store, progress, notes.add)
        told.update(merged=done.merged, into=done.into)
    notes.write()
    told.update(compacted_peak_mb=peak_mb(), left=num_segments(folder))
    StoreIndex(store).look_through()
    return told


def num_segments(folder: str) -> int:
    """Number of segments in a store."""
    with os.scandir(f"{folder}/{SEGMENTS}") as entries:
        return sum(entry.name.endswith(".parquet") for entry in entries)


def peak_mb() -> float:
    """Peak memory of this process. (That of `resource` begins with that of the one before it.)"""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)


def measured(work: Work, *arguments: Any) -> dict[str, Any]:
    """What the work says, its seconds and its peak memory, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Work, *arguments: Any) -> dict[str, Any]:
    pa.array([""])  # pyarrow imports pandas with the first one.
    before = peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    told = work(*arguments)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    times = {"seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2)}
    peak = peak_mb()
    return {**told, **times, "peak_mb": peak, "extra_peak_mb": round(peak - before, 1)}


def stages(rows: int, tokens: int, seconds: float | None) -> dict[str, dict[str, tuple[Any, ...]]]:
    """The parts of each stage by name: what does it, and its arguments after the folder."""
    return {
        "publish": {"publish": (publish_rows, rows, tokens)},
        "look": {
            "look through, bare": (look_through_bare,),
            "look through": (look_through,),
            "look through, again": (look_through,),
            "find all": (find_all,),
        },
        "groups": {
            "first group": (first_group, rows),
            "miss groups": (miss_groups,),
            "read groups": (read_groups,),
        },
        "compact": {"compact": (compact_all, seconds)},
        "compacted": {
            "look through, compacted": (look_through,),
            "find all, compacted": (find_all,),
            "miss groups, compacted": (miss_groups,),
            "read groups, compacted": (read_groups,),
        },
    }


def measure_scale(
    folder: str,
    parts: dict[str, tuple[Any, ...]],
    before: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """What was measured so far, after each part, with what was there ``before``; prints each."""
    found = dict(before)
    for name, (work, *arguments) in parts.items():
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found[name] = {"date": now, **measured(work, folder, *arguments)}
        print(f"{name:24} {found[name]}", flush=True)
        yield found


def parts_of(
    folder: str, chosen: Sequence[str], rows: int, tokens: int, seconds: float | None
) -> dict[str, tuple[Any, ...]]:
    """The parts of these stages; a store that was compacted is not published again."""
    told = stages(rows, tokens, seconds)
    if os.path.exists(f"{folder}/{MERGED}"):
        told["publish"] = {}
    return {name: part for stage in chosen for name, part in told[stage].items()}
