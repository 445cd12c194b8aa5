"""How far a rebuilt vocabulary is from the plain model's: `hidden` against the engine's precision.

    python -m benchmarks.parity [--dtype float32 bfloat16] [--output benchmarks/results/parity.json]

An engine of each precision answers the quickstart's first prompts with their hidden states. From
these and the output head (float32) the log probabilities of the whole vocabulary are rebuilt and
held against Hugging Face's model in float32 on the same tokens; beside it stands what Hugging
Face's own bfloat16 differs from its float32 by. In nats, over all ids of all response tokens; the
KL is KL(Hugging Face float32 || the other), the mean over tokens.
"""

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.results import machine, write_result
from benchmarks.teacher_signals import MODEL, prompts
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.vllm import VllmEngine

Pair = tuple[np.ndarray, Answer]


async def answer(dtype: str, asked: list[np.ndarray]) -> list[Pair]:
    """The prompts with answers of an engine of this precision."""
    teacher = TeacherConfig.model_validate(
        {
            "model": str(MODEL),
            "dtype": dtype,
            "max_model_len": 256,
            "kv_cache_gib": 0.5,
            "sampling": {"temperature": 0.7, "min_p": 0.05, "max_tokens": 24},
        }
    )
    core = sorted(os.sched_getaffinity(0))[0]
    prepare_process([core])
    sampling = resolve_sampling(teacher, str(MODEL))
    engine = VllmEngine(EngineSettings(teacher, str(MODEL), sampling, 1, 1, (core,)))
    await engine.start()
    try:
        answers = await engine.sample(asked, Signal("hidden", engine.hidden_size))
    finally:
        engine.close()
    return list(zip(asked, answers, strict=True))


@torch.no_grad()
def plain(model: Any, pair: Pair) -> Tensor:
    """Log probabilities [T, V] of the response tokens by a Hugging Face model, float64."""
    prompt, said = pair
    ids = torch.tensor(np.concatenate([prompt, said.response_ids]))[None]
    return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)


def rebuilt(head: Tensor, pair: Pair) -> Tensor:
    """The same from the answer's hidden states."""
    bits = torch.from_numpy(pair[1].hidden.view(np.int16).copy())
    return (bits.view(torch.bfloat16).float() @ head.T).double().log_softmax(dim=-1)


def differences(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of others from the reference (first of each pair)."""
    errors = torch.cat([(other - reference).abs() for reference, other in pairs])
    kl = torch.cat([(r.exp() * (r - other)).sum(dim=1) for r, other in pairs])
    return {"max": float(errors.max()), "mean": float(errors.mean()), "kl": float(kl.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parity.json"))
    arguments = parser.parse_args()
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    head = reference.get_output_embeddings().weight.detach().float()
    found = {}
    for dtype in arguments.dtype:
        pairs = asyncio.run(answer(dtype, prompts(arguments.rows)))
        exact = [plain(reference, pair) for pair in pairs]
        others = {
            f"hidden, {dtype} engine": [rebuilt(head, pair) for pair in pairs],
            "Hugging Face bfloat16": [plain(half, pair) for pair in pairs],
        }
        for name, theirs in others.items():
            found[name] = differences(list(zip(exact, theirs, strict=True)))
    for name, told in found.items():
        print(f"{name:<24}" + "  ".join(f"{key} {value:.5f}" for key, value in told.items()))
    settings = {"rows": arguments.rows, "max_tokens": 24}
    write_result(
        arguments.output, {"machine": machine(), "settings": settings, "differences": found}
    )


if __name__ == "__main__":
    main()
