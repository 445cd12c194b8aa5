"""Which layers of the teacher a student keeps: block influence, and a greedy search by KL.

Block influence of a layer is 1 - cos(its input, its output), averaged over tokens (ShortGPT,
arXiv 2403.03853). A layer that hardly turns the residual stream is hardly missed. The search then
removes one layer at a time: of the layers with the least influence it removes the one without which
the student is closest to its teacher on a few texts, by KL(teacher || student).

Legend: L layers, V vocabulary. KL is in nats a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raystill.train.start.cut import (
    LAYER_NUMBER_FIELDS,
    PER_LAYER_FIELDS,
    keep_layers,
    layer_list,
)
from raystill.train.start.texts import Texts

CANDIDATES = 3
"""Layers of least influence that the search tries at each removal."""
LEAST_NORM = 1e-8


@dataclass(frozen=True)
class ChosenLayers:
    """The choice and its reasons.

    layers: numbers of the kept layers, ascending. influence: of every layer, [L]. kl: nats a token
    of the student that keeps these layers, before training.
    """

    layers: list[int]
    influence: list[float]
    kl: float


def choose_layers(model: nn.Module, texts: Texts, keep: int, search: bool = True) -> ChosenLayers:
    """The ``keep`` layers of ``model``, a whole teacher, that make the closest student.

    search: False takes the layers of most influence, without the search.
    """
    with torch.no_grad():
        influence = block_influence(model, texts)
        by_influence = sorted(range(len(influence)), key=lambda layer: influence[layer])
        log_p = judged_log_probs(model, texts)
        kept = sorted(by_influence[len(influence) - keep :])
        kl = _kl_without(model, texts, kept, log_p)
        if search:
            found, found_kl = _search(model, texts, by_influence, keep, log_p)
            if found_kl < kl:
                kept, kl = found, found_kl
    return ChosenLayers(kept, influence, kl)


def block_influence(model: nn.Module, texts: Texts) -> list[float]:
    """1 - cos(input, output) of each layer, mean over the tokens of the texts, [L]."""
    _, _, layers = layer_list(model)
    scores = [0.0] * len(layers)
    present, count = texts.present, texts.count[texts.present]

    def note(index: int) -> Any:
        @torch.no_grad()
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            a, b = before[present].float(), after[present].float()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=LEAST_NORM)
            scores[index] = float(1 - (cosine * count).sum() / count.sum())

        return hook

    hooks = [
        layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        model(**texts.inputs(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return scores


def judged_log_probs(model: nn.Module, texts: Texts) -> Tensor:
    """Log probabilities [N, V] of the next token at the judged positions, float32."""
    output = model(**texts.inputs(model), use_cache=False)
    return torch.log_softmax(output.logits[texts.judged].float(), dim=-1)


def _search(
    model: nn.Module, texts: Texts, by_influence: Sequence[int], keep: int, log_p: Tensor
) -> tuple[list[int], float]:
    """Remove layers one by one, always the one that costs the least KL; what is left, its KL."""
    kept, kl = sorted(by_influence), 0.0
    while len(kept) > keep:
        tried = [layer for layer in by_influence if layer in kept][:CANDIDATES]
        costs = {
            layer: _kl_without(model, texts, [k for k in kept if k != layer], log_p)
            for layer in tried
        }
        cheapest = min(costs, key=lambda layer: costs[layer])
        kept.remove(cheapest)
        kl = costs[cheapest]
    return kept, kl


def _kl_without(model: nn.Module, texts: Texts, kept: list[int], log_p: Tensor) -> float:
    """KL(teacher || student with the kept layers), mean over the judged tokens, nats."""
    with only_layers(model, kept):
        log_q = judged_log_probs(model, texts)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@contextmanager
def only_layers(model: nn.Module, layers: list[int]) -> Iterator[None]:
    """The model with some of its layers; afterwards it is whole again."""
    text: Any = model.config.get_text_config()
    owner, name, whole = layer_list(model)
    fields = ("num_hidden_layers", *PER_LAYER_FIELDS, *LAYER_NUMBER_FIELDS)
    before = {field: getattr(text, field) for field in fields if hasattr(text, field)}
    numbers = [
        (part, part.layer_idx)
        for layer in whole
        for part in layer.modules()
        if hasattr(part, "layer_idx")
    ]
    try:
        keep_layers(model, layers)
        yield
    finally:
        setattr(owner, name, whole)
        for field, value in before.items():
            with suppress(AttributeError):  # What is worked out from the others has no setter.
                setattr(text, field, value)
        for part, number in numbers:
            part.layer_idx = number
