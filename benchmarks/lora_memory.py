"""Bytes that a student holds with all weights trained, and with adapters alone, after a step.

Measured on the tensors themselves, on one worker and on the CPU, for the model of a run file:

    python benchmarks/lora_memory.py models/SmolLM2-135M-Instruct --rank 16

Prints one JSON line for each way. ``weights`` are all that the model holds, ``gradients`` and
``moments`` those after one step of AdamW, ``checkpoint`` what a checkpoint writes of model and
optimizer. Activations are not in it: they are those of the batch, and nearly the same.
"""

import argparse
import json
from collections.abc import Iterable

import torch
from transformers import AutoModelForCausalLM

from raystill.config.student import LoraConfig
from raystill.config.training import TrainingConfig
from raystill.train.checkpoint.tensors import model_tensors, optimizer_tensors
from raystill.train.step.optimizer import build_optimizer
from raystill.train.student import lora


def size(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of these tensors, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors if t is not None}.values())


def measure(folder: str, settings: LoraConfig | None, base: torch.dtype) -> dict[str, object]:
    """The bytes of one way to train the model in ``folder``, whose frozen weights are ``base``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=base)
    if settings is not None:
        lora.inject(model, settings, torch.float32)
    optimizer = build_optimizer(model, TrainingConfig())
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    states = optimizer_tensors(model, optimizer)
    return {
        "trained": "all" if settings is None else f"adapters of rank {settings.rank}",
        "weights in": str(base).removeprefix("torch."),
        "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": size(parameters),
        "gradients": size(p.grad for p in parameters),
        "moments": size(states.values()),
        "checkpoint": size(model_tensors(model).values()) + size(states.values()),
    }


def main() -> None:
    """Measures full training, and adapters beside weights in 32 and in 16 bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    adapters = LoraConfig(rank=given.rank)
    ways = [(None, torch.float32), (adapters, torch.float32), (adapters, torch.bfloat16)]
    for settings, base in ways:
        print(json.dumps(measure(given.model, settings, base)), flush=True)


if __name__ == "__main__":
    main()
