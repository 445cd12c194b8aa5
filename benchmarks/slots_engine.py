"""The share of a real vLLM engine's slots that are filled, by the engine's own statistics.

    python -m benchmarks.slots_engine [--rows 1500] [--set teacher.target_ongoing_requests=8 ...]

`benchmarks.slots` with vLLM in place of the made-up tokens: a model of two layers with random
weights, each row cut at a length drawn from the same distributions, a quarter as long. vLLM
counts the requests it runs in each of its steps (``SchedulerStats.num_running_reqs``); the share is
the mean over the steps from a fifth to four fifths of the rows finished.
"""

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import machine, write_result
from benchmarks.slots import LENGTHS, Simulation, config_of
from raystill.config.run import RunConfig
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.vllm import VllmEngine

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tiny-teacher"
RESULT = Path(__file__).parent / "results" / "slots_engine.json"
SHORTER = 4
CORES = (min(os.sched_getaffinity(0)),)
TEACHER = [
    f"teacher.model={MODEL}",
    "teacher.dtype=float32",
    "teacher.max_model_len=1040",
    "teacher.kv_cache_gib=0.25",
]


class CountedVllm(VllmEngine):
    """The engine of a replica; each row ends after as many tokens as its first id says."""

    steps: list[int]
    """Requests that vLLM ran in each of its steps."""
    finished: list[int]
    """Steps until each row was finished."""
    tokens = 0

    async def start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self.steps, self.finished = [], []
        build = AsyncLLM.from_engine_args

        def with_statistics(arguments: Any) -> Any:
            arguments.disable_log_stats = False
            return build(arguments, stat_loggers=[_logger_into(self.steps)])

        AsyncLLM.from_engine_args = with_statistics
        try:
            await super().start()
        finally:
            AsyncLLM.from_engine_args = build

    def count(self, change: int = 0) -> float:
        """Nothing: vLLM counts."""
        return 0.0

    async def _generate(self, token_ids: list[int], parameters: Any) -> Any:
        row = self._parameters(None, max_tokens=token_ids[0], stop_token_ids=[])
        output = await super()._generate([token_ids[0] % 1000 + 10] * 4, row)
        self.tokens += len(output.token_ids)
        self.finished.append(len(self.steps))
        return output


def _logger_into(steps: list[int]) -> Any:
    """A factory of vLLM's loggers that notes how many requests each step ran."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Steps(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *others: Any, **more: Any) -> None:
            if scheduler_stats is not None:
                steps.append(scheduler_stats.num_running_reqs)

        def log_engine_initialized(self) -> None:
            pass

    return Steps


async def measure(engine: CountedVllm, config: RunConfig, rows: int, store: Any) -> None:
    """Share of slots filled and tokens a second; ``store`` is given each distribution's."""
    for name, draw in LENGTHS.items():
        lengths = np.maximum(1, draw(np.random.default_rng(0), rows) // SHORTER)
        simulation = Simulation(config, lengths, engine)
        engine.steps.clear()
        engine.finished.clear()
        engine.tokens, began = 0, time.monotonic()
        await simulation.run()
        seconds = time.monotonic() - began
        first, last = (engine.finished[part * rows // 5] for part in (1, 4))
        share = float(np.mean(engine.steps[first:last])) / config.teacher.slots
        rate = engine.tokens / seconds
        print(f"    {name:24} {share:.3f} filled, {rate:.0f} tokens/s", flush=True)
        store(name, {"filled": round(share, 3), "tokens_per_s": round(rate)})


async def run(overrides: list[str], rows: int) -> None:
    """Measure one setting and add it to the stored result."""
    config = config_of([*TEACHER, *overrides])
    groups = f"{config.groups_per_replica} groups of {config.stream.group_rows} in flight"
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    measured = result.get("measured", {})
    measured[groups] = {}

    def store(name: str, figures: dict[str, float]) -> None:
        measured[groups][name] = figures
        write_result(RESULT, {"machine": machine(), "rows": rows, "measured": measured})

    sampling = resolve_sampling(config.teacher, str(MODEL))
    engine = CountedVllm(EngineSettings(config.teacher, str(MODEL), sampling, 1, 64, CORES))
    await engine.start()
    print(groups, flush=True)
    try:
        await measure(engine, config, rows, store)
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500, help="rows of each pass")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    arguments = parser.parse_args()
    prepare_process(CORES)
    os.environ["HF_HUB_OFFLINE"] = "1"
    asyncio.run(run(arguments.settings, arguments.rows))


if __name__ == "__main__":
    main()
