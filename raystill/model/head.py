"""Finds a model's output head in its safetensors files, and how the model transforms its logits.

Reads only headers and ``config.json``, and imports no torch, so that `cluster.check.models` can
check a model before anything is started. `train.loss.teacher_head` reads the tensors found here;
`train.student.module` applies the transform.

Legend: V rows of the head, D hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystill.model.files import ModelFolder, read_object
from raystill.model.weights import INDEX, header_of

HEADS = ("lm_head", "embed_out")
"""Names of output head modules: the last part of the dotted name."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings")
"""Names of embedding modules, whose weight is also the head's if the two are tied."""
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
QUANTISED_PARTS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scales")
"""Tensors that quantised modules have beside or in place of ``weight`` (GPTQ, AWQ, FP8, ...)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file. shape and dtype are None if the file itself is not here."""

    file: Path
    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class HeadTensors:
    """The head's weight [V, D], and its bias [V] or None."""

    weight: StoredTensor
    bias: StoredTensor | None


def find_head(model: ModelFolder) -> HeadTensors:
    """Find the output head's tensors; in a tied model they may be stored as the embedding's.

    Raises ValueError, with the remedy, if there is no head, more than one, or a quantised one.
    """
    names = stored_tensors(model.path)
    heads, embeddings = _modules_named(names, HEADS), _modules_named(names, EMBEDDINGS)
    # A tied weight is stored once, under either name. An untied head is always stored itself.
    ordered = (
        [embeddings, heads] if model.config.get("tie_word_embeddings") else [heads, embeddings]
    )
    _require_plain(model, names, heads or embeddings)
    modules = ordered[0] or ordered[1]
    if len(modules) != 1:
        expected = ", ".join(f"{name}.weight" for name in (*HEADS, *EMBEDDINGS))
        raise ValueError(
            f"{model.name} has {len(modules)} output heads among its {len(names)} safetensors "
            f"{sorted(modules)[:4]}; expected one of {expected}; name a folder that has it, or set "
            "signal.kind: topk"
        )
    # The bias is the head's own, also if its weight is the embedding's.
    bias = f"{(heads or modules)[0]}.bias"
    weight = _stored_tensor(names, f"{modules[0]}.weight")
    return HeadTensors(weight, _stored_tensor(names, bias) if bias in names else None)


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor: by a sharded model's index, else by the files' headers."""
    weight_map = read_object(folder / INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        return {n: folder / file for n, file in weight_map.items() if isinstance(file, str)}
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in files for name in read_header(file)}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return `header_of` a safetensors file; {} if it is broken, which `check` reports."""
    try:
        return header_of(file)
    except ValueError:
        return {}


def _modules_named(names: Iterable[str], last_parts: tuple[str, ...]) -> list[str]:
    """Return modules that have a weight, plain or quantised, and one of these last names.

    A module inside a layer, or below ``mtp.``, is left out: it belongs to an extra head for
    multi-token prediction (DeepSeek-V3, Qwen3-Next).
    """
    modules = {name.rpartition(".")[0] for name in names if name.endswith(_WEIGHTS)}
    return sorted(
        module
        for module in modules
        if module.rpartition(".")[2] in last_parts
        and not module.startswith("mtp.")
        and "layers." not in module
    )


_WEIGHTS = (".weight", ".qweight", ".weight_packed")


def _require_plain(model: ModelFolder, names: dict[str, Path], modules: list[str]) -> None:
    """Raise ValueError if one of the modules is quantised."""
    for module in modules:
        parts = [part for part in QUANTISED_PARTS if f"{module}.{part}" in names]
        dtype = None if parts else _stored_tensor(names, f"{module}.weight").dtype
        if parts or dtype not in (None, *PLAIN_DTYPES):
            raise ValueError(
                f"{model.name} has a quantised output head ({module}.{(parts or ['weight'])[0]}"
                f"{'' if dtype is None else f' in {dtype}'}); expected weights in float32, float16 "
                "or bfloat16; name a teacher whose head is not quantised, or set signal.kind: topk"
            )


def _stored_tensor(names: dict[str, Path], name: str) -> StoredTensor:
    entry = read_header(names[name]).get(name, {})
    shape = entry.get("shape")
    return StoredTensor(
        names[name], name, None if shape is None else tuple(shape), entry.get("dtype")
    )


MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Settings by which models multiply their logits: Cohere, Falcon H1 and Muse Glimmer."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: logits = cap(scale * (hidden W^T + bias)).

    cap(z) = softcap * tanh(z / softcap), as in Gemma 2; with softcap None nothing is capped.
    """

    scale: float = 1.0
    softcap: float | None = None


UNCHANGED = LogitTransform()


def logit_transform(config: Mapping[str, Any]) -> LogitTransform:
    """Return the logit transform of a language model with this ``config.json``.

    Raises ValueError if one of its settings is not a positive number.
    """
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _positive(config, name) or 1.0
    scaling = _positive(config, "logits_scaling") or 1.0
    # HyperCLOVA X multiplies by `logits_scaling`, Granite divides by it.
    multiplies = str(config.get("model_type", "")).startswith("hyperclovax")
    scale = scale * scaling if multiplies else scale / scaling
    return LogitTransform(scale, _positive(config, "final_logit_softcapping"))


def _positive(config: Mapping[str, Any], name: str) -> float | None:
    """Return a setting that is unset or a number above 0; raise ValueError for anything else."""
    value = config.get(name)
    if value is None:
        return None
    # The bounds leave out NaN and infinity too; a bool is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(
            f"{name} is {value!r}; expected a number above 0, by which logits are scaled or capped "
            "after the head; choose another model"
        )
    return float(value)
