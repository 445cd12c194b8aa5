"""What each signal costs the teacher: sampling with it, and scoring given responses.

    python -m benchmarks.teacher_signals [--rounds 3] [--rows 48] [--output PATH]

One engine on one core, as a replica starts it, answers the quickstart's prompts (64 tokens each,
none stops early); then the same prompts with their answers are scored. All ways take turns; the
median of the rounds' ratios to the first way of the same round counts, so that a busy moment of the
machine falls on neighbours alike.

Sampling, against ``text``: ``sampled``, ``topk`` (K = 64, as arrays, and as vLLM's own flat lists
with its ranks), ``hidden``. Scoring, against ``prefill`` (the same tokens put in, nothing kept):
``hidden``, ``sampled``, ``topk``, ``topk at ids`` (64 ids that the caller names), ``topk, vLLM's
lists`` (its prompt_logprobs). ``head`` is what the head's product, softmax and choice of K cost
alone, in tokens a second, on the same core: no way that gives logprobs of all positions can do
without it.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import machine, write_result
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.vllm import VllmEngine

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPTS = ROOT / "examples" / "prompts" / "quickstart.jsonl"
TOP_K, RESPONSE_TOKENS, GROUP_ROWS = 64, 64, 8
NEVER = 11  # A special id of this model that it does not write: all answers are of one length.

Way = Callable[[], Awaitable[Any]]


def prompts(count: int) -> list[np.ndarray]:
    """Token ids of the first prompts, in the teacher's chat form."""
    import json

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = []
    for line in PROMPTS.read_text().splitlines()[:count]:
        text = f"<|im_start|>user\n{json.loads(line)['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids.append(np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32))
    return ids


class Ways:
    """The ways to ask one engine for the signals of the same rows."""

    def __init__(self, engine: VllmEngine, asked: list[np.ndarray]) -> None:
        self.engine, self.asked = engine, asked
        self.given: list[np.ndarray] = []

    def sampling(self) -> dict[str, Way]:
        """Ways to sample, the one that all are held against first."""
        return {
            "text": lambda: self._groups("sample", "text"),
            "sampled": lambda: self._groups("sample", "sampled"),
            "topk": lambda: self._groups("sample", "topk"),
            "topk, vLLM's lists": lambda: self._plainly(None, TOP_K, RESPONSE_TOKENS),
            "hidden": lambda: self._groups("sample", "hidden"),
        }

    def scoring(self) -> dict[str, Way]:
        """Ways to score what ``sample`` gave, the plain prefill first."""
        return {
            "prefill": lambda: self._plainly(None, None, 1),
            "hidden": lambda: self._groups("score", "hidden"),
            "sampled": lambda: self._groups("score", "sampled"),
            "topk": lambda: self._groups("score", "topk"),
            "topk at ids": lambda: self._groups("score", "at"),
            "topk, vLLM's lists": lambda: self._plainly(TOP_K, None, 1),
        }

    async def _groups(self, method: str, kind: str) -> list[Any]:
        """All rows in groups, as the stream asks."""
        width = self.engine.hidden_size if kind == "hidden" else TOP_K
        signal = Signal("topk" if kind == "at" else kind, width)
        calls = []
        for start in range(0, len(self.asked), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            if method == "sample":
                calls.append(self.engine.sample(self.asked[rows], signal))
                continue
            at = None
            if kind == "at":
                generator = np.random.default_rng(start)
                draws = [generator.permuted(np.arange(TOP_K) * 700) for _ in range(RESPONSE_TOKENS)]
                at = [np.stack(draws[: len(r)]).astype(np.int32) for r in self.given[rows]]
            calls.append(self.engine.score(self.asked[rows], self.given[rows], signal, at))
        groups = await asyncio.gather(*calls)
        return [answer for group in groups for answer in group]

    async def _plainly(self, prompt_logprobs: int | None, logprobs: int | None, new: int) -> None:
        """The rows as plain requests, with vLLM's own containers."""
        from vllm.v1.engine import logprobs as module

        parameters = self.engine._parameters(logprobs, max_tokens=new)
        parameters.prompt_logprobs = prompt_logprobs
        parameters.skip_reading_prefix_cache = True
        inputs = self.asked
        if new == 1:
            pairs = zip(self.asked, self.given, strict=True)
            inputs = [np.concatenate([prompt, given[:-1]]) for prompt, given in pairs]
        ours, module.create_sample_logprobs = module.create_sample_logprobs, _flat
        ranks = self.engine._engine.collective_rpc
        await ranks("raystill_count_ranks", args=(True,))
        try:
            await asyncio.gather(*(self.engine._generate(i.tolist(), parameters) for i in inputs))
        finally:
            module.create_sample_logprobs = ours
            await ranks("raystill_count_ranks", args=(False,))


def _flat(_: bool) -> Any:
    from vllm.logprobs import FlatLogprobs

    return FlatLogprobs()


async def compare(ways: dict[str, Way], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of every way, and its share of the first way's; medians over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        for name in names if number % 2 == 0 else reversed(names):
            started = time.perf_counter()
            await ways[name]()
            seconds[name].append(time.perf_counter() - started)
    base = next(iter(seconds.values()))
    return {
        name: {
            "tokens_per_s": tokens / statistics.median(took),
            "share": statistics.median(b / t for b, t in zip(base, took, strict=True)),
        }
        for name, took in seconds.items()
    }


def head_alone(tokens: int) -> float:
    """Tokens a second of the head's product, log softmax and the K best, on this core."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 576, generator=generator)
    weight = torch.randn(49_152, 576, generator=generator)
    took = []
    for _ in range(3):
        started = time.perf_counter()
        for rows in hidden.split(128):
            (rows @ weight.T).log_softmax(dim=-1).topk(TOP_K)
        took.append(time.perf_counter() - started)
    return tokens / min(took)


async def measure(rows: int, rounds: int) -> dict[str, Any]:
    """All figures, from one engine."""
    teacher = TeacherConfig.model_validate(
        {
            "model": str(MODEL),
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 64,
            "kv_cache_gib": 2,
            "sampling": {
                "temperature": 0.7,
                "min_p": 0.05,
                "max_tokens": RESPONSE_TOKENS,
                "stop_token_ids": [NEVER],
            },
        }
    )
    core = sorted(os.sched_getaffinity(0))[0]
    prepare_process([core])
    sampling = resolve_sampling(teacher, str(MODEL))
    engine = VllmEngine(EngineSettings(teacher, str(MODEL), sampling, 1, TOP_K, (core,)))
    await engine.start()
    try:
        ways = Ways(engine, prompts(rows))
        answers = await ways.sampling()["text"]()  # Warm-up as well.
        ways.given = [answer.response_ids for answer in answers]
        response = sum(map(len, ways.given))
        whole = response + sum(map(len, ways.asked))
        await ways.scoring()["topk"]()
        sampled = await compare(ways.sampling(), response, rounds)
        scored = await compare(ways.scoring(), whole, rounds)
    finally:
        engine.close()
    return {
        "sampling": sampled,
        "scoring": scored,
        "head_tokens_per_s": head_alone(1024),
        "response_tokens": response,
        "tokens": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48, help="prompts of a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every way")
    parser.add_argument("--output", default="benchmarks/results/teacher_signals.json")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.rows, arguments.rounds))
    for what in ("sampling", "scoring"):
        print(what)
        for name, told in figures[what].items():
            print(f"  {name:<20} {told['tokens_per_s']:8.1f} tokens/s  {told['share']:.3f}")
    print(f"head alone {figures['head_tokens_per_s']:.1f} tokens/s")
    settings = {"rows": arguments.rows, "rounds": arguments.rounds, "top_k": TOP_K}
    write_result(Path(arguments.output), {"machine": machine(), "settings": settings, **figures})


if __name__ == "__main__":
    main()
