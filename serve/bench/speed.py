"""How fast one engine is, and what it holds: the teacher or the student.

Where it sits: ``cluster/worth/speed.py`` starts a `SpeedBench` of either model in alternation. Both
do the same work: the same prompts, and answers of one length, none of which ends early.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.serve.bench.engine import BenchSettings, EngineBench, Ids
from raystill.serve.bench.footprint import EXTENSION
from raystill.serve.engine.arguments import EngineSettings
from raystill.serve.engine.vllm import VllmEngine


class SpeedBench(EngineBench):
    """An actor that runs one engine. ``num_tokens``: length of every answer."""

    def __init__(self, settings: BenchSettings, model: str, num_tokens: int) -> None:
        super().__init__(settings, model)
        self._num_tokens = num_tokens

    def _engine_of(self, settings: EngineSettings) -> VllmEngine:
        sampling = replace(settings.sampling, max_tokens=self._num_tokens, stop_token_ids=())
        return VllmEngine(replace(settings, sampling=sampling, extension=EXTENSION))

    async def measure(
        self, streams: Sequence[Ids], full: Sequence[Ids], passes: int
    ) -> dict[str, Any]:
        """Figures of each pass, and the memory after the last one.

        streams: prompts that are answered one after the other. full: prompts that are answered all
        at once. A pass before the first is not counted: it warms the engine up.
        """
        await self._pass(streams[:1], full)
        figures = [await self._pass(streams, full) for _ in range(passes)]
        workers = await self._engine._engine.collective_rpc("raystill_footprint")
        memory = {name: sum(of[name] for of in workers) for name in workers[0]}
        return {"passes": figures, **memory}

    async def _pass(self, streams: Sequence[Ids], full: Sequence[Ids]) -> dict[str, float]:
        """``first_token_s`` and ``stream_tokens_per_s``, medians over ``streams``; tokens/s."""
        first, rates = [], []
        for prompt in streams:
            began = time.perf_counter()
            times = await self._engine.token_times(prompt, self._num_tokens)
            first.append(times[0] - began)
            rates.append((len(times) - 1) / (times[-1] - times[0]))
        began = time.perf_counter()
        answers = await self._engine.sample(full, Signal("text"))
        seconds = time.perf_counter() - began
        return {
            "first_token_s": statistics.median(first),
            "stream_tokens_per_s": statistics.median(rates),
            "tokens_per_s": written(answers, self._num_tokens) / seconds,
        }


def written(answers: Sequence[Answer], num_tokens: int) -> int:
    """Tokens of the answers. Raises RunError where one is missing or of another length."""
    if failed := [answer.error for answer in answers if answer.error]:
        raise RunError(f"{len(failed)} prompts were not answered: {failed[0]}")
    lengths = {len(answer.response_ids) for answer in answers}
    if lengths != {num_tokens}:
        raise RunError(f"answers have {sorted(lengths)} tokens, each was to have {num_tokens}")
    return num_tokens * len(answers)
