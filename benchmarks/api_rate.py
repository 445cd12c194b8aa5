"""Answers a second of one process that asks a service, where the service answers at once.

    python -m benchmarks.api_rate [--output benchmarks/results/api_rate.json]

The process is a teacher's replica with its own engine: requests, limits, prices, the file of what
was spent, text to ids, and Arrow. Groups of 8 rows wait for 64 requests at a time, as many as in a
run. Its counters go to the run's coordinator, an actor of a local Ray. The service is in a process
of its own (`benchmarks.instant_service`).

Answers of text, and such with the log probabilities of 20 tokens beside each of their own.
``answers_per_s`` is by the clock, ``answers_per_cpu_s`` by the replica's own processor time, which
a busy machine changes little. ``--profile FILE`` writes cProfile's statistics of the first case;
``--without-ray``: no coordinator is told.
"""

import argparse
import asyncio
import cProfile
import json
import os
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from benchmarks.instant_service import instant_service
from benchmarks.results import machine, write_result
from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.replica import BusyClock, Teacher
from raystill.serve.services import api_engine

MODEL = Path("models/SmolLM2-135M-Instruct")
PROMPTS = Path("examples/prompts/quickstart.jsonl")
IN_FLIGHT, GROUP_ROWS, TOKENS = 64, 8, 64
WARM_UP_ROWS = 256
TOP_LOGPROBS, TOP_K = 20, 16
ROWS = {"text": 4096, "topk": 1024}
WANTED = 200.0


CASES = {"text": Signal("text"), "topk": Signal("topk", TOP_K)}


def named_beside(signal: Signal) -> int | None:
    """What the service is asked for beside each token."""
    return None if signal.kind == "text" else TOP_LOGPROBS


def answer_texts(tokenizer: Tokenizer, number: int = 256) -> list[str]:
    """English of about `TOKENS` tokens each, from the words of the prompts."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["prompt"] for line in lines)
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    starts = np.linspace(0, len(ids) - TOKENS, number).astype(int)
    return [tokenizer.decode(ids[start : start + TOKENS]).strip() for start in starts]


def config_of(url: str, signal: Signal) -> RunConfig:
    """A run of that service, whose budget is never reached."""
    api = {"base_url": url, "model": "large", "api_key_env": None, "max_concurrency": IN_FLIGHT}
    api |= {"prices": {"input": 0.15, "output": 0.6}, "max_cost": 1000.0}
    api |= {"top_logprobs": named_beside(signal)}
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(MODEL), "engine": "api", "api": api},
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"path": str(PROMPTS)},
            "signal": {"kind": signal.kind, "top_k": TOP_K},
            "evaluation": {"top_k": TOP_K},
            "objective": {"cross_entropy": 1.0},
        }
    )


def write_messages(folder: RunFolder, num_rows: int) -> list[pa.Table]:
    """The chats of so many prompts, as the driver writes them; the prompts in groups."""
    prompts = [np.array([7, *divmod(row, 1000)], np.int32) for row in range(num_rows)]
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(lines[row % len(lines)])["prompt"] for row in range(num_rows)]
    chats = [json.dumps([{"role": "user", "content": one}]) for one in asked]
    digests = [prompt_digest(one) for one in prompts]
    folder.write_table(MESSAGES, pa.table({"digest": digests, "messages": chats}))
    ids = pa.table({"prompt_ids": pa.array(prompts, TOKEN_IDS)})
    return [ids.slice(start, GROUP_ROWS) for start in range(0, num_rows, GROUP_ROWS)]


def replica_of(config: RunConfig, folder: RunFolder, coordinator: Any) -> Teacher:
    """A replica without Serve around it."""
    sampling = ResolvedSampling(0.7, 0.95, 0, 0.0, max_tokens=2 * TOKENS, stop_token_ids=(2,))
    replica = object.__new__(Teacher)
    store = folder.join("store")
    replica._engine = api_engine(config, str(MODEL), sampling, folder, coordinator, store)
    replica._busy = BusyClock()
    replica._settings = SimpleNamespace(coordinator=coordinator, name="")  # type: ignore[assignment]
    return replica


async def ask(
    replica: Teacher, groups: list[pa.Table], signal: Signal, in_flight: int
) -> tuple[float, float]:
    """Seconds by the clock and of processor that all groups take; all rows must be answered."""
    slots = asyncio.Semaphore(in_flight)

    async def one(group: pa.Table) -> None:
        async with slots:
            table = await replica.sample(group, signal)
        assert table["error"].null_count == len(group), table["error"].to_pylist()

    start, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one(group) for group in groups))
    return time.perf_counter() - start, time.process_time() - cpu


def measure(signal: Signal, rows: int, coordinator: Any, profile: Path | None) -> dict[str, Any]:
    """Asks for so many rows, after some that do not count."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = answer_texts(tokenizer)
    profiler = cProfile.Profile()
    with (
        instant_service(str(MODEL / "tokenizer.json"), texts, named_beside(signal)) as url,
        tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch,
    ):
        config, folder = config_of(url, signal), RunFolder(scratch).ensure()
        groups = write_messages(folder, WARM_UP_ROWS + rows)
        replica = replica_of(config, folder, coordinator)

        async def run() -> tuple[float, float]:
            await replica._engine.start()
            in_flight = config.groups_in_flight
            warm = WARM_UP_ROWS // GROUP_ROWS
            await ask(replica, groups[:warm], signal, in_flight)
            if profile is not None:
                profiler.enable()
            measured = await ask(replica, groups[warm:], signal, in_flight)
            profiler.disable()
            return measured

        wall_s, cpu_s = asyncio.run(run())
    if profile is not None:
        profiler.dump_stats(profile)
    return {
        "rows": rows,
        "rows_in_flight": config.rows_in_flight,
        "requests_at_once": IN_FLIGHT,
        "answers_per_s": rows / wall_s,
        "answers_per_cpu_s": rows / cpu_s,
        "cpu_ms_per_answer": 1e3 * cpu_s / rows,
    }


@contextmanager
def local_coordinator() -> Any:
    """A run's coordinator on a Ray of its own."""
    import ray

    from raystill.cluster.coordinator.actor import start_coordinator

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield start_coordinator("bench", 1024, 1024, 0.0)
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/api_rate.json"))
    parser.add_argument("--profile", type=Path, help="cProfile's statistics of the first case")
    parser.add_argument("--only", choices=list(CASES), help="one case; nothing is stored")
    parser.add_argument("--rows", type=int, help="of each case")
    parser.add_argument("--without-ray", action="store_true", help="no coordinator is told")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(CASES)
    found: dict[str, Any] = {}
    with nullcontext() if arguments.without_ray else local_coordinator() as coordinator:
        for number, name in enumerate(names):
            profile = arguments.profile if number == 0 else None
            rows = arguments.rows or ROWS[name]
            found[name] = measure(CASES[name], rows, coordinator, profile)
            shown = (f"{k} {v:.4g}" for k, v in found[name].items())
            print(f"{name}:", "  ".join(shown), flush=True)
    if not arguments.only:
        settings: dict[str, Any] = {"tokens_each": TOKENS, "group_rows": GROUP_ROWS}
        settings |= {"wanted_per_s": WANTED, "load_average": os.getloadavg()[0]}
        settings |= {"coordinator": not arguments.without_ray}
        write_result(arguments.output, {"machine": machine(), **settings, "cases": found})


if __name__ == "__main__":
    main()
