"""Checks that a model's folder holds what it says: settings that can be used, weights that are
whole and fit them, an architecture that can be served or trained.

Reads configuration files, and the headers and sizes of weight files: no weights, no torch, no
transformers.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from raystill.base.errors import ConfigError, Problem
from raystill.base.redact import shown_value
from raystill.model.files import CONTEXT_KEYS, ModelFolder, read_object
from raystill.model.head import EMBEDDINGS, read_header
from raystill.model.known import decoder_types, is_known_type, vllm_knows, words_of_code
from raystill.model.weights import weight_problems

COUNTS = ("vocab_size", "num_hidden_layers", "n_layer", "hidden_size")
MAPPINGS = ("text_config", "rope_scaling", "rope_parameters", "auto_map")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
NO_DECODERS = (
    *("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"),
    *("ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining"),
)
"""How the names of models end that do not predict the next token."""
AGAIN = "fetch or save the model again"


def check_settings(where: str, model: ModelFolder) -> list[Problem]:
    """Problems of ``config.json`` and ``generation_config.json``, which all that follows reads."""
    problems: list[Problem] = []
    read: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "generation_config.json"):
        try:
            read[name] = read_object(model.path / name, strict=True)
        except ConfigError as error:
            problems += [Problem(where, f"{one.where} {one.message}") for one in error.problems]
    config, path = read.get("config.json", {}), model.path / "config.json"
    flat = {**config, **(model.config if not problems else {})}
    for wrong in _wrong_settings(flat):
        problems.append(Problem(where, f"{path}: {wrong}; {AGAIN}"))
    path = model.path / "generation_config.json"
    for wrong in _wrong_sampling(read.get("generation_config.json", {})):
        problems.append(Problem(where, f"{path}: {wrong}; {AGAIN}"))
    return problems


def check_weights(where: str, model: ModelFolder, *, fetched: bool) -> list[Problem]:
    """Are the files of weights whole, and of the shapes and the architecture of config.json?

    ``fetched``: the folder is all there will be; what it lacks is not fetched by the run.
    """
    found = weight_problems(model.path, fetched=fetched)
    broken = [Problem(where, f"{file} {why}") for file, why in found]
    return broken or [Problem(where, text) for text in _misfits(model)]


def check_architecture(where: str, model: ModelFolder, *, trusted: bool, served: bool) -> list[str]:
    """Problems with what the model is. ``served``: by vLLM; else it is to be trained.

    ``trusted``: the run file lets the folder's own Python code run. Each text has the remedy.
    """
    config = model.config
    whole = read_object(model.path / "config.json")
    names = _architectures(whole)
    if whole.get("is_encoder_decoder"):
        kind = ", ".join(names) or whole.get("model_type")
        return [
            f"{model.name} is an encoder and a decoder ({kind}); expected a decoder alone; choose "
            "another model"
        ]
    if names and all(name.endswith(NO_DECODERS) for name in names):
        return [
            f"{model.name} is a {names[0]}, which does not predict the next token; choose a model "
            "...ForCausalLM"
        ]
    kind = whole.get("model_type", config.get("model_type"))
    known = is_known_type(kind) if isinstance(kind, str) else None
    if served and isinstance(kind, str) and vllm_knows(kind):
        known = True
    setting = f"{where.partition('.')[0]}.trust_remote_code"
    if known is False and not trusted:
        if whole.get("auto_map"):
            return [
                f"{model.name} is of the type {kind!r}, which runs by Python code in its folder "
                f"alone; read that code and set {setting}: true, or choose another model"
            ]
        return [
            f"{model.name} is of the type {shown_value(kind, 80)}, which the installed "
            "transformers does not know; correct model_type in config.json, or choose another model"
        ]
    if kind is None and not trusted and not served and decoder_types():
        return [f"{model.path / 'config.json'} has no model_type; {AGAIN}"]
    decoders = decoder_types()
    if known and not served and not trusted and decoders and kind not in decoders:
        return [f"{model.name} is of the type {kind!r}, which is no decoder; choose another model"]
    return []


def code_notices(where: str, model: ModelFolder, trusted: bool) -> Iterator[str]:
    """Whose code runs with this model, beside what is installed."""
    own = read_object(model.path / "config.json").get("auto_map")
    if trusted and own:
        yield f"{where}: {model.name} brings Python code of its own, which the run will execute"


def _wrong_settings(config: dict[str, Any]) -> Iterator[str]:
    for name in (*COUNTS, *CONTEXT_KEYS):
        value = config.get(name)
        if value is not None and not _is_number(value, least=1):
            yield f"{name} is {shown_value(value, 80)}, expected a whole number from 1 up"
    for name in MAPPINGS:
        if not isinstance(config.get(name), dict | None):
            yield f"{name} is {shown_value(config[name], 80)}, expected an object"
    for name in ("model_type",):
        if not isinstance(config.get(name), str | None):
            yield f"{name} is {shown_value(config[name], 80)}, expected a text"
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        yield f"architectures is {shown_value(names, 80)}, expected a list of texts"
    yield from _wrong_ids(config)


def _wrong_ids(config: dict[str, Any]) -> Iterator[str]:
    value = config.get("eos_token_id")
    if value is None:
        return
    for one in value if isinstance(value, list) else [value]:
        if type(one) is not int or not 0 <= one < 2**31:
            yield f"eos_token_id is {shown_value(value, 80)}, expected an id or a list of ids"
            return


def _wrong_sampling(config: dict[str, Any]) -> Iterator[str]:
    for name in SAMPLING:
        value = config.get(name)
        if value is not None and not _is_number(value, least=-1):
            yield f"{name} is {shown_value(value, 80)}, expected a number"
    yield from _wrong_ids(config)


def _is_number(value: Any, least: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and least <= value < 1e18


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _misfits(model: ModelFolder) -> Iterator[str]:
    """Where the tensors' names and shapes are not those of ``config.json``."""
    entries = {
        name: tuple(entry["shape"])
        for file in sorted(model.path.glob("*.safetensors"))
        for name, entry in read_header(file).items()
    }
    yield from _foreign_names(model, list(entries))
    config, path = model.config, model.path / "config.json"
    rows, width = config.get("vocab_size"), config.get("hidden_size")
    embeddings = [
        (name, shape)
        for name, shape in entries.items()
        if name.endswith(".weight")
        and name.split(".")[-2] in EMBEDDINGS
        and len(shape) == 2
        and not name.startswith(("mtp.", "vision", "model.vision"))
        and "layers." not in name
    ]
    if len(embeddings) == 1:
        name, shape = embeddings[0]
        if rows is not None and shape[0] != rows:
            yield (
                f"{path} has vocab_size {rows}, but the weights have {shape[0]} rows of ids "
                f"({name}); name a folder whose config.json is that of its weights"
            )
        elif width is not None and shape[1] != width and not _factored(config):
            yield (
                f"{path} has hidden_size {width}, but the weights have {shape[1]} ({name}); name a "
                "folder whose config.json is that of its weights"
            )
    layers = {int(part) for name in entries for part in _layer_numbers(name)}
    wanted = model.num_layers
    if wanted is not None and layers and len(layers) < wanted and not config.get("vision_config"):
        yield (
            f"{path} has {wanted} layers, but the weights have {len(layers)}; fetch the missing "
            "files, or name a folder whose config.json is that of its weights"
        )


def _factored(config: dict[str, Any]) -> bool:
    """Whether embeddings have a width of their own (OPT, ALBERT)."""
    return any(config.get(name) for name in ("word_embed_proj_dim", "embedding_size"))


def _layer_numbers(name: str) -> Iterator[str]:
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before in ("layers", "h", "blocks") and part.isdecimal() and len(part) < 6:
            yield part
            return


def _foreign_names(model: ModelFolder, names: list[str]) -> Iterator[str]:
    """A model whose code does not know most modules that the weights belong to.

    transformers would leave such weights out, and begin with random ones, after a warning alone.
    """
    whole = read_object(model.path / "config.json")
    kind = whole.get("model_type")
    code = words_of_code(kind) if isinstance(kind, str) else frozenset()
    if not code:
        return
    for part in whole.values():  # A model of several: text and images.
        if isinstance(part, dict) and isinstance(part.get("model_type"), str):
            code |= words_of_code(part["model_type"])
    modules: Counter[str] = Counter(
        part for name in names for part in name.split(".")[:-1] if not part.isdecimal()
    )
    foreign = [part for part in modules if part not in code]
    if names and 2 * len(foreign) > len(modules):
        first = next(name for name in names if set(name.split(".")) & set(foreign))
        yield (
            f"{model.path / 'config.json'} says {kind!r}, but the weights are of another "
            f"architecture ({first!r} is none of its tensors); name a folder whose "
            "config.json is that of its weights"
        )
