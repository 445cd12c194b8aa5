"""The driver's prompt tables: seconds and peak memory from a file of prompts to keyed tables.

    python -m benchmarks.prompts [--rows 1000000] [--model models/SmolLM2-135M-Instruct]

Each number of rows is built in a process of its own. Memory is what the process takes above what it
had before it read the first prompt: its peak, and what stays with the tables.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import machine, write_result
from raystill.config.run import RunConfig
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser

WARM_ROWS = 5000
WORDS = ("how", "why", "when", "what", "does", "a", "the", "red", "river", "stone", "engine", "of")


def write_prompts(path: Path, rows: int) -> None:
    """Prompts of 8 to 20 words, each with a number of its own, so that none is a duplicate."""
    generator = np.random.default_rng(1)
    with path.open("w") as file:
        for row in range(rows):
            words = generator.integers(0, len(WORDS), generator.integers(8, 21))
            text = " ".join([*(WORDS[word] for word in words), str(row)])
            file.write(json.dumps({"prompt": text}) + "\n")


def build(path: str, model: str) -> dict[str, Any]:
    """The tables of all prompts of a file, with keys."""
    tables_of(path, model, WARM_ROWS)  # What is loaded once, whatever the rows.
    before, start = resident(), time.perf_counter()
    tables = tables_of(path, model, None)
    built = time.perf_counter()
    tables = tables.with_keys("identity", "float32", None, {"temperature": 1.0})
    rows, keyed = tables.num_read, time.perf_counter()
    return {
        "rows": rows,
        "tokens_a_row": round(mean_length(tables), 1),
        "build_s": round(built - start, 2),
        "keys_s": round(keyed - built, 2),
        "peak_bytes_a_row": round((peak() - before) / rows),
        "held_bytes_a_row": round((resident() - before) / rows),
    }


def tables_of(path: str, model: str, limit: int | None) -> PromptTables:
    """The tables of the first ``limit`` prompts of a file."""
    config = RunConfig.model_validate(
        {
            "teacher": {"model": model},
            "student": {"layers": [0]},
            "prompts": {"path": path, "limit": limit},
            "evaluation": {"held_out_rows": 64},
        }
    )
    return build_prompt_tables(config, PromptTokeniser(model, config.prompts), 2048)


def mean_length(tables: PromptTables) -> float:
    """Prompt tokens a row."""
    return sum(len(chunk.values) for chunk in tables.train["prompt_ids"].chunks) / len(tables.train)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prompts.json"))
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    found = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
            path = Path(scratch) / "prompts.jsonl"
            write_prompts(path, rows)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found.append(pool.submit(build, str(path), arguments.model).result())
        print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    write_result(arguments.output, {"machine": machine(), "tables": found})


if __name__ == "__main__":
    main()
