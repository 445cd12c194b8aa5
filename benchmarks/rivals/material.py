"""What every side starts from: prompts, first weights, and the answers that the evaluator uses.

    python -m benchmarks.rivals.material WORK        (in .venv-rivals)

Plain transformers: neither Raystill nor TRL has a hand in it. Layers are chosen by block influence
(1 - cosine of a layer's input and output, mean over tokens), the lowest ones are left out. A second
start keeps as many layers evenly spaced, for those who have nothing to choose them by.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rivals.sample_hf import answer
from benchmarks.rivals.settings import (
    HELD_OUT_SOURCES,
    LOOKED_AT,
    PROMPTS,
    TEACHER,
    Folder,
    Settings,
    read_lines,
    training_prompts,
    write_json,
    write_lines,
)

JUDGED = 12
"""Held-out answers by which layers are judged."""


def split(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and held out, as the demo splits them."""
    rows = read_lines(Path(PROMPTS))[:LOOKED_AT]
    train = training_prompts(LOOKED_AT)
    held_out = [row for row in rows if row["source"] in HELD_OUT_SOURCES]
    if len(train) < settings.rows:
        raise SystemExit(f"--rows is {settings.rows}, but {len(train)} prompts are there; lower it")
    return train[: settings.rows], held_out[: settings.held_out]


@torch.no_grad()
def influence(model: Any, sequences: list[list[int]]) -> list[float]:
    """Block influence of each layer."""
    total = torch.zeros(model.config.num_hidden_layers)
    for ids in sequences:
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        pairs = itertools.pairwise(states)
        same = [torch.cosine_similarity(a[0], b[0], dim=-1).mean() for a, b in pairs]
        total += 1 - torch.stack(same)
    return (total / len(sequences)).tolist()


def cut(layers: list[int], folder: Path) -> None:
    """Store the teacher with these layers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    kept = nn.ModuleList(model.model.layers[i] for i in layers)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = kept
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)


def main() -> None:
    """Make all of it."""
    work = Path(sys.argv[1])
    settings, folder = Settings.load(work), Folder(work)
    torch.set_num_threads(settings.cores)
    train, held_out = split(settings)
    write_lines(folder.train, train)
    answered = answer([row["prompt"] for row in held_out], settings, settings.seed + 1)
    write_json(folder.held_out, answered)
    model: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    judged = influence(model, [row["prompt_ids"] + row["answer_ids"] for row in answered[:JUDGED]])
    best = sorted(range(len(judged)), key=lambda i: -judged[i])
    chosen = {str(n): sorted(best[:n]) for n in settings.layers}
    last, n = len(judged) - 1, settings.layers[0]
    chosen["even"] = [round(i * last / (n - 1)) for i in range(n)]
    for name, layers in chosen.items():
        cut(layers, folder.start(name))
    write_json(folder.chosen, {"influence": judged, "kept": chosen})


if __name__ == "__main__":
    main()
