"""Where a model's output head is among its safetensors, by their headers alone.

`cluster.check_models` asks before anything is started, `teacher_head` when it reads the tensors.
Imports no torch.

Legend: V rows of the head, D hidden size.

What a model does to its logits after the output head, by its configuration.

`cluster.check_models` asks before anything is started, `student_module` when the student is built.
Imports no torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystill.model.files import ModelFolder, read_object

INDEX = "model.safetensors.index.json"
HEADS = ("lm_head", "embed_out")
"""Modules that are an output head of their own, by the last part of their name."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings")
"""Modules whose weight is the head's where the two are tied."""
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
QUANTISED_PARTS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scales")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file; shape and dtype None where only the index is here."""

    file: Path
    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class HeadTensors:
    """The head's weight [V, D], and its bias [V] where it has one."""

    weight: StoredTensor
    bias: StoredTensor | None


def find_head(model: ModelFolder) -> HeadTensors:
    """The tensors that make the logits: those of the head, or the embedding they are tied to.

    Raises ValueError, with the remedy, where there is none, several, or a quantised one.
    """
    names = stored_tensors(model.path)
    heads, embeddings = _named(names, HEADS), _named(names, EMBEDDINGS)
    # What is tied is stored once, as either; an untied head is always stored.
    ordered = (
        [embeddings, heads] if model.config.get("tie_word_embeddings") else [heads, embeddings]
    )
    _require_plain(model, names, heads or embeddings)
    found = ordered[0] or ordered[1]
    if len(found) != 1:
        wanted = ", ".join(f"{name}.weight" for name in (*HEADS, *EMBEDDINGS))
        raise ValueError(
            f"{model.name} has {len(found)} output heads among its {len(names)} safetensors "
            f"{sorted(found)[:4]}; expected one of {wanted}; name a folder that holds it, or set "
            "signal.kind: topk"
        )
    bias = f"{(heads or found)[0]}.bias"
    weight = _described(names, f"{found[0]}.weight")
    return HeadTensors(weight, _described(names, bias) if bias in names else None)


def stored_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by the index of a sharded model or by the files' own headers."""
    weight_map = read_object(folder / INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        return {name: folder / file for name, file in weight_map.items()}
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in files for name in read_header(file)}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """``{name: {dtype, shape, ...}}`` of a safetensors file; empty where it cannot be read."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, MemoryError):
        return {}
    entries = header.items() if isinstance(header, dict) else ()
    return {name: entry for name, entry in entries if name != "__metadata__"}


def _named(names: Iterable[str], modules: tuple[str, ...]) -> list[str]:
    """Modules with one of these last names and a weight (also a quantised one), each once.

    Those inside a layer are of extra heads that predict further tokens.
    """
    found = {name.rpartition(".")[0] for name in names if name.endswith(_WEIGHTS)}
    return sorted(
        module
        for module in found
        if module.rpartition(".")[2] in modules
        and not module.startswith("mtp.")
        and "layers." not in module
    )


_WEIGHTS = (".weight", ".qweight", ".weight_packed")


def _require_plain(model: ModelFolder, names: dict[str, Path], modules: list[str]) -> None:
    for module in modules:
        parts = [part for part in QUANTISED_PARTS if f"{module}.{part}" in names]
        dtype = None if parts else _described(names, f"{module}.weight").dtype
        if parts or dtype not in (None, *PLAIN_DTYPES):
            raise ValueError(
                f"{model.name} has a quantised output head ({module}.{(parts or ['weight'])[0]}"
                f"{'' if dtype is None else f' in {dtype}'}); expected weights in float32, float16 "
                "or bfloat16; name a teacher whose head is not quantised, or set signal.kind: topk"
            )


def _described(names: dict[str, Path], name: str) -> StoredTensor:
    entry = read_header(names[name]).get(name, {})
    shape = entry.get("shape")
    return StoredTensor(
        names[name], name, None if shape is None else tuple(shape), entry.get("dtype")
    )


MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Cohere, Falcon H1 and Muse Glimmer multiply the logits by theirs."""


@dataclass(frozen=True)
class LogitTransform:
    """logits = cap(scale x (hidden W^T + bias)), where cap(z) = softcap tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


UNCHANGED = LogitTransform()


def logit_transform(config: Mapping[str, Any]) -> LogitTransform:
    """The transform of a (text) model with this ``config.json``.

    Raises ValueError where a setting is none that logits can be transformed by.
    """
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _positive(config, name) or 1.0
    scaling = _positive(config, "logits_scaling") or 1.0
    # Granite divides by what HyperCLOVA X multiplies by.
    multiplies = str(config.get("model_type", "")).startswith("hyperclovax")
    scale = scale * scaling if multiplies else scale / scaling
    return LogitTransform(scale, _positive(config, "final_logit_softcapping"))


def _positive(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(
            f"{name} is {value!r}; expected a number above 0, by which logits are scaled or capped "
            "after the head; choose another model"
        )
    return float(value)
