"""What capturing hidden states costs an engine: memory, time a step, and time it stands still.

    python -m benchmarks.capture [--hidden 4096] [--slots 64] [--long 8192] [--short 128]

A worker without a model runs steps of one long answer beside answers that end early and are
replaced, as vLLM's model runner would; each ended answer is taken as a replica takes it. Measured
are the bytes of this process at their most above the beginning (capture memory; the arrays of one
answer at a time are read), and milliseconds of processor that capturing takes of a step and that
the call which takes an answer stops the engine: neither waits for anything.
"""

import argparse
import asyncio
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.results import machine, write_result
from raystill.serve.engine import capture
from raystill.serve.engine.capture import Capture, CaptureRequest
from raystill.serve.engine.takes import Takes

RESULT = Path(__file__).parent / "results" / "capture.json"
PROMPT = 32


def resident_bytes() -> int:
    """Memory of this process, with what it shares."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Steps:
    """A model runner's batch of ``slots`` answers, the first of them long."""

    def __init__(self, worker: Any, arguments: argparse.Namespace) -> None:
        self.worker, self.arguments = worker, arguments
        self.output = torch.zeros(arguments.slots, arguments.hidden, dtype=torch.bfloat16)
        self.left = np.zeros(arguments.slots, np.int64)
        self.computed = np.zeros(arguments.slots, np.int64)
        self.names = [""] * arguments.slots
        self.runner = worker.model_runner
        self.runner.query_start_loc = SimpleNamespace(np=np.arange(arguments.slots + 1))
        self.number = 0
        for slot in range(arguments.slots):
            self.begin(slot, arguments.long if slot == 0 else 1 + slot * arguments.short // 64)

    def begin(self, slot: int, tokens: int) -> None:
        """Let a new answer of so many tokens have the place."""
        self.runner.requests.pop(self.names[slot], None)
        self.number += 1
        self.names[slot] = name = str(self.number)
        wanted = CaptureRequest(name, PROMPT - 1, self.arguments.long, "hidden")
        parameters = SimpleNamespace(extra_args=wanted.extra_args())
        self.runner.requests[name] = SimpleNamespace(sampling_params=parameters)
        self.left[slot], self.computed[slot] = tokens, PROMPT - 1

    def step(self) -> float:
        """One token of each answer; seconds of processor that capturing took."""
        self.runner.input_batch.req_ids = list(self.names)
        self.runner.input_batch.num_computed_tokens_cpu = self.computed
        start = time.thread_time()
        self.worker._raystill.record(self.output)
        took = time.thread_time() - start
        self.computed += 1
        self.left -= 1
        return took


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run until the long answer has ended."""
    capture._is_last_stage = capture._is_first_rank = lambda: True
    capture.end_with = lambda *_: None
    worker: Any = Capture()
    batch = SimpleNamespace(vocab_size=1)
    runner = SimpleNamespace(input_batch=batch, requests={}, model=None, _model_forward=None)
    runner.sampler, runner.query_start_loc = SimpleNamespace(gather_logprobs=None), None
    worker.model_runner = runner
    stops, steps = list[float](), list[float]()

    async def call(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        start = time.thread_time()
        result = getattr(worker, method)(*args)
        if method == "raystill_take":
            stops.append(time.thread_time() - start)
        return [result]

    takes = Takes(call, lambda: None)
    await takes.start()
    engine, before, most = Steps(worker, arguments), resident_bytes(), 0
    while engine.left[0] > 0:
        steps.append(engine.step())
        if len(steps) % 64 == 0:
            most = max(most, resident_bytes() - before)
        for slot in np.flatnonzero(engine.left == 0):
            length = int(engine.computed[slot]) - PROMPT + 1
            await takes.take(engine.names[slot], length)
            if slot:
                engine.begin(int(slot), arguments.short)
    takes.close()
    return {
        "most_mb": round(most / 1e6, 1),
        "step_ms": {"median": _ms(steps, 50), "p99": _ms(steps, 99)},
        "take_ms": {"median": _ms(stops, 50), "most": _ms(stops, 100)},
        "answers": len(stops),
    }


def _ms(seconds: list[float], percentile: float) -> float:
    return round(1e3 * float(np.percentile(seconds, percentile)), 3)


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("hidden", 4096), ("slots", 64), ("long", 8192), ("short", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = asyncio.run(measure(arguments))
    print(figures)
    write_result(RESULT, {"machine": machine(), **vars(arguments), "figures": figures})


if __name__ == "__main__":
    main()
