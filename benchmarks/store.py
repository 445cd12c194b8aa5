"""The teacher store: MB/s written and read, bytes a token on disk, and the time a plan takes.

    python -m benchmarks.store [--output benchmarks/results/store.json]
    python -m benchmarks.store --rows 1000000  (`benchmarks.store_scale`, store_scale.json; other
        numbers of rows: store_scale_10m.json)

1. Segments of 8 rows of real-looking answers (64 tokens, K = 64): for float32 and float16
   logprobs and some codecs, the bytes of a response token on disk and MB/s on one core, of Arrow
   bytes; then the store itself, checksums, fsync and all.
2. The plan of one and four million rows against a compacted store that holds them all: finding
   each row, permuting an epoch, and the memory it takes.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import machine, write_result
from benchmarks.store_scale import measure_scale, parts_of, stages
from raystill.datasets.rows.answers import Answer, answers_table, tail_logprob
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance, segment_schema
from raystill.datasets.store.segment import encode, segment_name
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, remaining_groups

ROWS, TOKENS, TOP_K, VOCAB = 8, 64, 64, 49_152
NUM_GROUPS = 40
CODECS: dict[str, dict[str, Any]] = {
    "none": {"compression": "none"},
    "snappy": {"compression": "snappy"},
    "zstd 1": {"compression": "zstd", "compression_level": 1},
    "zstd 6": {"compression": "zstd", "compression_level": 6},
}
COMPACT_ROWS = 8192
TOPK = Signal("topk", TOP_K)


def group(seed: int) -> pa.Table:
    """A group's answers: ids drawn by frequency, logprobs as a language model's fall off."""
    generator = np.random.default_rng(seed)
    answers = []
    for _ in range(ROWS):
        gaps = generator.exponential(0.35, (TOKENS, TOP_K)).cumsum(-1)
        logprobs = (-generator.exponential(0.5, (TOKENS, 1)) - gaps - 0.2).astype(np.float32)
        ids = (VOCAB * generator.random((TOKENS, TOP_K)) ** 3).astype(np.int32)
        tail = tail_logprob(logprobs, VOCAB)
        answers.append(Answer(ids[:, 0], "length", logprobs[:, 0], ids, logprobs, tail))
    told = answers_table(answers, Signal("topk", TOP_K))
    keys = pa.array([generator.bytes(KEY_BYTES) for _ in range(ROWS)], pa.binary(KEY_BYTES))
    prompts = pa.array([[1, 2, 3]] * ROWS, pa.list_(pa.int32()))
    columns = {name: told[name] for name in told.column_names if name != "error"}
    return pa.table({"key": keys, "prompt_ids": prompts, **columns})


def measure_formats() -> list[dict[str, Any]]:
    """Bytes a token and MB/s of Arrow bytes, by precision and codec."""
    found = []
    tables = [group(seed) for seed in range(NUM_GROUPS)]
    tokens = NUM_GROUPS * ROWS * TOKENS
    for precision in ("float32", "float16"):
        if precision == "float16":
            half = pa.list_(pa.list_(pa.float16(), TOP_K))
            place = tables[0].column_names.index("topk_logprobs")
            tables = [
                t.set_column(place, "topk_logprobs", t["topk_logprobs"].cast(half)) for t in tables
            ]
        arrow = sum(table.nbytes for table in tables)
        for codec, options in CODECS.items():
            written, write_s = timed(partial(write_all, tables, options))
            _, read_s = timed(partial(read_all, written))
            found.append(
                {
                    "precision": precision,
                    "codec": codec,
                    "bytes_per_token": sum(map(len, written)) / tokens,
                    "write_mb_per_s": arrow / write_s / 1e6,
                    "read_mb_per_s": arrow / read_s / 1e6,
                }
            )
    return found


def write_all(tables: list[pa.Table], options: dict[str, Any]) -> list[bytes]:
    return [written_bytes(table, options) for table in tables]


def read_all(written: list[bytes]) -> list[pa.Table]:
    return [pq.read_table(pa.BufferReader(data)) for data in written]


def written_bytes(table: pa.Table, options: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=["finish_reason"], write_statistics=False, **options)
    return bytes(sink.getvalue())


def timed(work: Any) -> tuple[Any, float]:
    """The best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return result, best


def measure_store(folder: str) -> dict[str, float]:
    """The store as the answer stage uses it."""
    store, tables = TeacherStore(folder), [group(seed) for seed in range(NUM_GROUPS)]
    arrow = sum(table.nbytes for table in tables) / 1e6
    start = time.perf_counter()
    for table in tables:
        store.publish(origin(TOPK), Provenance("run", "training"), table)
    write_s = time.perf_counter() - start
    catalogue = store.catalogue()
    start = time.perf_counter()
    for table in tables:
        where = catalogue.locate(table["key"].combine_chunks())
        store.read(catalogue, where, segment_schema(TOPK).names)
    read_s = time.perf_counter() - start
    size = sum(store.size(name) for name in store.names())
    return {
        "write_mb_per_s": arrow / write_s,
        "read_mb_per_s": arrow / read_s,
        "rows_per_s_written": NUM_GROUPS * ROWS / write_s,
        "rows_per_s_read": NUM_GROUPS * ROWS / read_s,
        "bytes_per_token": size / (NUM_GROUPS * ROWS * TOKENS),
    }


def origin(signal: Signal) -> Origin:
    return Origin("identity", "teacher", "benchmark", "1", "float32", VOCAB, signal)


def measure_plan(folder: str, num_rows: int) -> dict[str, float]:
    """Finding all rows of an epoch in a compacted store, and their order."""
    store, text = TeacherStore(folder), Signal("text")
    generator = np.random.default_rng(num_rows)
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), num_rows, [None, pa.py_buffer(generator.bytes(num_rows * KEY_BYTES))]
    )
    for start in range(0, num_rows, COMPACT_ROWS):
        mine = keys.slice(start, COMPACT_ROWS)
        ids = pa.array([[7]] * len(mine), pa.list_(pa.int32()))
        reasons = pa.array(["stop"] * len(mine))
        columns = {"key": mine, "prompt_ids": ids, "response_ids": ids, "finish_reason": reasons}
        data = encode(origin(text), [(Provenance("run", "training"), pa.table(columns))])
        store.folder.write_bytes(f"{SEGMENTS}/{segment_name(mine.to_pylist(), text)}", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    where = store.catalogue().locate(keys)
    located = time.perf_counter()
    epoch_order(num_rows, 7, 0, 8)
    groups = sum(1 for _ in remaining_groups(num_rows, 8, Ledger(num_rows)))
    done = time.perf_counter()
    assert (where >= 0).all() and groups == -(-num_rows // 8)
    return {
        "rows": num_rows,
        "locate_s": located - start,
        "order_and_groups_s": done - located,
        "plan_s": done - start,
        "extra_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def measure_rows(arguments: argparse.Namespace) -> None:
    """A store of so many rows, as `benchmarks.store_scale` measures it."""
    rows = arguments.rows
    ending = "" if rows == 1_000_000 else f"_{rows / 1e6:g}m"
    output = arguments.output.with_name(f"store_scale{ending}.json")
    if arguments.stage and not arguments.folder:
        raise SystemExit("--stage goes on in a store that is there: name its folder by --folder")
    before: dict[str, Any] = {}
    if arguments.stage and output.exists():
        before = json.loads(output.read_text())
        for told in before.values():
            if isinstance(told, dict) and "seconds" in told:
                told.setdefault("date", before["date"])
    before |= {"machine": machine(), "rows": rows, "tokens": arguments.tokens}
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        folder = arguments.folder or f"{scratch}/store"
        seconds = None if arguments.minutes is None else 60 * arguments.minutes
        chosen = arguments.stage or list(stages(rows, arguments.tokens, seconds))
        parts = parts_of(folder, chosen, rows, arguments.tokens, seconds)
        for found in measure_scale(folder, parts, before):
            stamps = ("date", "commit")
            write_result(output, {n: told for n, told in found.items() if n not in stamps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/store.json"))
    parser.add_argument("--rows", type=int, help="only a store of so many rows, as runs write it")
    parser.add_argument(
        "--tokens", type=int, default=2, help="response tokens of each, with --rows"
    )
    parser.add_argument(
        "--folder", help="with --rows, where the store is written and stays, or is already"
    )
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=list(stages(0, 0, None)),
        help="with --rows and --folder, only these parts; the figures of the others stay",
    )
    parser.add_argument("--minutes", type=float, help="with --rows, the longest compaction")
    arguments = parser.parse_args()
    if arguments.rows:
        measure_rows(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        result = {
            "machine": machine(),
            "formats": measure_formats(),
            "store": measure_store(f"{scratch}/store"),
            "plans": [measure_plan(f"{scratch}/{n}", n) for n in (1_000_000, 4_000_000)],
        }
    for line in [*result["formats"], result["store"], *result["plans"]]:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print("  ".join(shown), flush=True)
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
