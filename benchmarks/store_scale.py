"""The store with many rows: one look through it, a group read from it, and its compaction.

    python -m benchmarks.store --rows 1000000 [--tokens 2] [--folder FOLDER]

Segments of 8 rows of a few tokens (K = 64) as runs publish them, which note them for the index,
before and after a compaction. Some of them are looked through without any index too ("bare"). With
a folder the store is written there and stays; one that is there already is not written again.
Each part runs in a process of its own: its seconds, those of the processor, and its peak memory
above what the imports take. Groups are read at random places, each opened anew; the median counts.
"""

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raystill.datasets.lookup.keeping import NOTED, Notes, StoreIndex
from raystill.datasets.rows.answers import Answer, answers_table, stored_columns, tail_logprob
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.segment import (
    Group,
    Origin,
    Provenance,
    encode,
    segment_name,
    segment_schema,
)
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.values import checksum

GROUP_ROWS, TOP_K, VOCAB = 8, 64, 49_152
TOPK = Signal("topk", TOP_K)
ORIGIN = Origin("identity", "teacher", "benchmark", "1", "float32", VOCAB, TOPK)
ASKED = Provenance("run", "training")
GROUPS_READ = 100
BARE_ROWS = 32_000


def publish_rows(
    folder: str, rows: int, tokens: int, first: int = 0, every: int = 1
) -> dict[str, Any]:
    """Segments as a run publishes and notes them, without waiting for the disk.

    They come in blocks, each from its own seed. A block that is there already is passed over, so
    what was broken off goes on. ``first``, ``every``: of blocks, where several processes write.
    """
    os.makedirs(f"{folder}/{SEGMENTS}", exist_ok=True)
    notes, columns = Notes(TeacherStore(folder)), columns_of(tokens)
    sums = {name: checksum(columns[name].combine_chunks()) for name in columns}
    segments = rows // GROUP_ROWS
    for block in range(first, -(-segments // NOTED), every):
        number = min(NOTED, segments - block * NOTED)
        keys = np.frombuffer(
            np.random.default_rng([rows, block]).bytes(number * GROUP_ROWS * KEY_BYTES), "V16"
        ).reshape(number, GROUP_ROWS)
        if os.path.exists(f"{folder}/{SEGMENTS}/{segment_name(keys[-1].tolist(), TOPK)}"):
            continue
        for of_group in keys:
            table = pa.table({"key": pa.array(of_group.tolist(), pa.binary(KEY_BYTES)), **columns})
            # The answers are alike, and so are their checksums.
            mine = {"key": checksum(table["key"].combine_chunks()), **sums}
            group = Group(ASKED.run, ASKED.purpose, GROUP_ROWS, mine)
            data, name = encode(ORIGIN, [(group, table)]), segment_name(of_group.tolist(), TOPK)
            with open(f"{folder}/{SEGMENTS}/{name}", "wb") as file:
                file.write(data)
            notes.add(name, ORIGIN, [(ASKED, table["key"].combine_chunks())])
    notes.write()
    return {"segments": segments}


def columns_of(tokens: int) -> dict[str, pa.ChunkedArray]:
    """The columns of a group, but for its keys."""
    generator = np.random.default_rng(tokens)
    logprobs = np.sort(-generator.exponential(6, (tokens, TOP_K)) - 5)[:, ::-1].astype(np.float32)
    ids = generator.integers(0, VOCAB, (tokens, TOP_K), dtype=np.int32)
    tail = tail_logprob(logprobs, VOCAB)
    answer = Answer(ids[:, 0], "stop", logprobs[:, 0], ids, logprobs, tail)
    prompts = pa.array([[1, 2, 3]] * GROUP_ROWS, pa.list_(pa.int32()))
    told = answers_table([answer] * GROUP_ROWS, TOPK).append_column("prompt_ids", prompts)
    schema = segment_schema(TOPK)
    return {f.name: told[f.name].cast(f.type) for f in schema if f.name != "key"}


def look_through(folder: str) -> dict[str, Any]:
    """What a process does with a store before its first row."""
    index = StoreIndex(TeacherStore(folder)).look_through()
    return {"rows": index.rows, "segments": index.num_segments, "parts": len(index.parts)}


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


def compact_all(folder: str) -> dict[str, Any]:
    """One compaction, with the index that it leaves."""
    store = TeacherStore(folder)
    notes = Notes(store)
    done = compact(store, None, notes.add)
    notes.write()
    StoreIndex(store).look_through()
    return {"merged": done.merged, "into": done.into}


def measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the work says, its seconds and its peak memory, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    pa.array([""])  # pyarrow imports pandas with the first one.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    told = work(*arguments)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = {"seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2)}
    return {**told, **times, "extra_peak_mb": round(peak / 1024, 1)}


def measure_scale(folder: str, rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """What was measured so far, after each part; prints each."""
    found: dict[str, Any] = {"rows": rows, "tokens": tokens}
    parts: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "publish": (publish_rows, (rows, tokens)),
        "look through, bare": (look_through_bare, ()),
        "look through": (look_through, ()),
        "look through, again": (look_through, ()),
        "read groups": (read_groups, ()),
        "compact": (compact_all, ()),
        "look through, compacted": (look_through, ()),
        "find all, compacted": (find_all, ()),
        "read groups, compacted": (read_groups, ()),
    }
    if os.path.exists(f"{folder}/{SEGMENTS}"):
        del parts["publish"]
    for name, (work, arguments) in parts.items():
        found[name] = measured(work, folder, *arguments)
        print(f"{name:24} {found[name]}", flush=True)
        yield found
