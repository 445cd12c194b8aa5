"""Near-duplicates of a run: answers a second on one core, and the memory of the index.

    python -m benchmarks.near_duplicates [--rows 200000] [--tokens 300]

Times are of the processor. The index is filled with answers that all pass, which costs most; then
answers near to one of them are looked up.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import machine, write_result
from raystill.datasets.filters.minhash import HASHES, NearIndex, bytes_of_row, signatures

SIGNED = 2000
RESULT = Path(__file__).parent / "results" / "near_duplicates.json"


def signed_per_s(tokens: int, ngram: int) -> float:
    """Signatures a second of answers of so many tokens."""
    generator = np.random.default_rng(1)
    answers = [generator.integers(0, 49_152, tokens).astype(np.int32) for _ in range(SIGNED)]
    start = time.process_time()
    signatures(answers, ngram)
    return SIGNED / (time.process_time() - start)


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def indexed(rows: int, limit: float) -> dict[str, Any]:
    """An index of ``rows`` that all pass: rows a second by tenths, memory, near answers found."""
    generator = np.random.default_rng(2)
    made = generator.integers(0, 2**16, (rows, HASHES)).astype(np.uint16)
    before = resident_bytes()
    index, tenths = NearIndex(rows, limit), []
    for part in np.array_split(np.arange(rows), 10):
        start = time.process_time()
        for row in part:
            index.take(made[row], int(row), in_order=True)
        tenths.append(round(len(part) / (time.process_time() - start)))
    grown = resident_bytes() - before
    found = {}
    for agreeing in (0.7, 0.75, 0.8, 0.9):
        near = made[generator.integers(0, rows, 1000)]
        changed = generator.random(near.shape) >= agreeing
        near = np.where(changed, generator.integers(0, 2**16, near.shape), near).astype(np.uint16)
        found[str(agreeing)] = float(np.mean([index.has_near(one) for one in near]))
    return {
        "rows": rows,
        "passed": len(index),
        "rows_per_s_by_tenth": tenths,
        "bytes_of_row": round(grown / rows),
        "bytes_of_row_told": round(bytes_of_row(limit)),
        "found_at_similarity": found,
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--max-similarity", type=float, default=0.7)
    wanted = parser.parse_args()
    result = {
        "machine": machine(),
        "signatures_per_s": round(signed_per_s(wanted.tokens, 3)),
        "tokens": wanted.tokens,
        "index": indexed(wanted.rows, wanted.max_similarity),
    }
    print(result)
    write_result(RESULT, result)


if __name__ == "__main__":
    main()
