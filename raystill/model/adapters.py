"""Checks ``student.lora`` against the modules of a model, by the headers of its weight files.

Imports no torch, so that `cluster.check.models` can check a model before anything is started.
`train.student.lora` makes the adapters and checks the loaded model by the same rules.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping

from raystill.config.run import RunConfig
from raystill.config.student import LoraConfig
from raystill.model.files import ModelFolder
from raystill.model.head import EMBEDDINGS, HEADS, read_header, stored_tensors
from raystill.model.weights import layer_of

MOST_NAMES = 40
"""Names that an error lists."""
ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter in PEFT's format."""
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 can be told as the largest rank of the adapters that it serves."""


def served_rank(config: RunConfig) -> int | None:
    """The rank of which the student's sampler must take adapters, as vLLM counts it.

    None: it gets whole weights. So it is without adapters, where modules are trained whole beside
    them, where vLLM knows no such rank, and with ``policy.merge_adapters``.
    """
    lora = config.student.lora
    if lora is None or lora.modules_to_save or config.policy.merge_adapters:
        return None
    return next((rank for rank in SERVED_RANKS if rank >= lora.rank), None)


def adapted_modules(settings: bytes) -> tuple[str, ...]:
    """The last names of the modules that an adapter belongs to; settings: `ADAPTER_SETTINGS`."""
    return tuple(sorted({last(module) for module in json.loads(settings)["target_modules"]}))


def adapter_problems(model: ModelFolder, lora: LoraConfig) -> Iterator[tuple[str, str]]:
    """Fields of ``student.lora`` that do not fit the model, each with what is wrong and the remedy.

    Nothing where the model's weights are still to be fetched: the worker checks it then.
    """
    weights = _shapes(model)
    if all(shape is None for shape in weights.values()):
        return
    linear = _linear(weights)
    # A head that is tied to the embedding is not stored beside it.
    tied = bool(model.config.get("tie_word_embeddings")) or not any(
        last(module) in HEADS for module in weights
    )
    yield from lora_problems(model.name, lora, linear, set(weights), tied)


def trained_numbers(
    model: ModelFolder, lora: LoraConfig, layers: Collection[int] | None = None
) -> int | None:
    """Number of trained parameters, of some layers; None where the weights are not here.

    layers: numbers of the layers that the student has; None: all of them.
    """
    weights = _shapes(model)
    if all(shape is None for shape in weights.values()):
        return None
    linear, total = _linear(weights), 0
    targets = [""] if lora.target_modules == "all-linear" else lora.target_modules
    for module, shape in weights.items():
        layer = layer_of(module)
        if layers is not None and layer is not None and layer not in layers:
            continue
        if any(names(saved, module) for saved in lora.modules_to_save):
            total += math.prod(shape or ())
        elif module in linear and any(not t or names(t, module) for t in targets):
            total += lora.rank * sum(linear[module])
    return total


def _shapes(model: ModelFolder) -> dict[str, tuple[int, ...] | None]:
    """The shape of each module's weight by the module's name; None where its file is not here."""
    stored = stored_tensors(model.path)
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(stored)
    for file in set(stored.values()):
        shapes |= {n: tuple(e["shape"]) for n, e in read_header(file).items() if n in stored}
    return {n.removesuffix(".weight"): shapes[n] for n in stored if n.endswith(".weight")}


def _linear(weights: Mapping[str, tuple[int, ...] | None]) -> dict[str, tuple[int, int]]:
    """Those that may be linear modules: with two sizes, and neither embedding nor output head."""
    return {
        module: (shape[0], shape[1])
        for module, shape in weights.items()
        if shape is not None and len(shape) == 2 and last(module) not in (*HEADS, *EMBEDDINGS)
    }


def lora_problems(
    name: str,
    lora: LoraConfig,
    linear: Mapping[str, tuple[int, int]],
    modules: set[str],
    tied: bool,
) -> Iterator[tuple[str, str]]:
    """Fields of ``student.lora`` that do not fit a model, each with what is wrong and the remedy.

    name: of the model. linear: its linear modules that may have an adapter, with the two sizes of
    their weights. modules: all its modules with weights. tied: whether embeddings and output head
    are one weight.
    """
    has = f"the linear modules of {name} are {listed(linear)}"
    targets = [] if lora.target_modules == "all-linear" else list(lora.target_modules)
    if heads := [target for target in targets if last(target) in (*HEADS, *EMBEDDINGS)]:
        yield (
            "target_modules",
            f"names {', '.join(heads)}, but embeddings and output head get no adapter; name them "
            f"in modules_to_save, or leave them out ({has})",
        )
    unknown = [t for t in targets if t not in heads and not any(names(t, m) for m in linear)]
    if unknown:
        yield (
            "target_modules",
            f"names {', '.join(unknown)}, which no module is called; {has}; name some of them, or "
            "set target_modules: all-linear",
        )
    chosen = {m: s for m, s in linear.items() if not targets or any(names(t, m) for t in targets)}
    if not linear:
        yield "target_modules", f"has nothing to choose from: {name} has no linear modules"
    smallest = min(chosen, key=lambda module: min(chosen[module]), default=None)
    if smallest is not None and lora.rank > min(chosen[smallest]):
        most = min(chosen[smallest])
        yield (
            "rank",
            f"is {lora.rank}, but {smallest} is {list(chosen[smallest])}, whose rank is at most "
            f"{most}; set rank: {most} or less, or leave it out of target_modules",
        )
    yield from _saved_problems(name, lora, modules, tied)


def _saved_problems(
    name: str, lora: LoraConfig, modules: set[str], tied: bool
) -> Iterator[tuple[str, str]]:
    saved = lora.modules_to_save
    if tied and (both := [m for m in saved if last(m) in (*HEADS, *EMBEDDINGS)]):
        yield (
            "modules_to_save",
            f"names {', '.join(both)}, but {name} ties its embeddings to its output head: a "
            "trained copy of one would no longer be the other; leave it out",
        )
        saved = tuple(m for m in saved if m not in both)
    if unknown := [m for m in saved if not any(names(m, module) for module in modules)]:
        yield (
            "modules_to_save",
            f"names {', '.join(unknown)}, which no module is called; the modules of {name} with "
            f"weights are {listed(modules)}; name some of them",
        )
    targets = () if lora.target_modules == "all-linear" else lora.target_modules
    if twice := sorted(set(saved) & set(targets)):
        yield (
            "modules_to_save",
            f"names {', '.join(twice)}, which target_modules has too; train a module whole, or "
            "give it an adapter",
        )


def names(target: str, module: str) -> bool:
    """Whether a name of the run file is that of a module: all of its dotted name, or the end."""
    return module == target or module.endswith(f".{target}")


def last(module: str) -> str:
    """The last part of a dotted name."""
    return module.rpartition(".")[2]


def listed(modules: Mapping[str, object] | set[str]) -> str:
    """The last names of the modules, each once."""
    found = sorted({last(module) for module in modules})
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more
