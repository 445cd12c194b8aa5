"""Checks that a model's folder holds what it says: settings that can be used, weights that are
whole and fit them, an architecture that can be served or trained.

Reads configuration files, and the headers and sizes of weight files: no weights, no torch, no
transformers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeGuard

from raystill.base.errors import ConfigError, Problem
from raystill.base.records import number
from raystill.base.redact import shown_value
from raystill.model.files import CONTEXT_KEYS, ModelFolder, read_object
from raystill.model.head import EMBEDDINGS, read_header
from raystill.model.identity import QUANT_FILES
from raystill.model.known import (
    decoder_types,
    is_known_type,
    knows_activation,
    knows_rope,
    vllm_knows,
    words_of_code,
)
from raystill.model.sizes import PLAIN_TYPES, wrong_tensors
from raystill.model.weights import weight_problems

COUNTS = ("vocab_size", "num_hidden_layers", "n_layer", "hidden_size")
LAYER_COUNTS = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
"""Whole numbers that some models have by layer, in a list."""
OTHER_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "n_shared_experts", "shared_expert_intermediate_size"),
    *("num_nextn_predict_layers", "first_k_dense_replace"),
)
ABOVE_ZERO = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
SPREADS = ("initializer_range", "attention_dropout", "hidden_dropout", "rope_local_base_freq")
YES_OR_NO = ("tie_word_embeddings", "is_encoder_decoder")
DTYPES = re.compile(
    r"(?:torch\.)?(?:float(?:16|32|64|8_\w+|4_\w+)?|bfloat16|half|double|u?int\d{1,2}|auto)"
)
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
MOST_LONGER = 10_000
"""Times a model's context is made longer by its rotary embeddings."""
MAPPINGS = (
    *("text_config", "rope_scaling", "rope_parameters", "auto_map", "vision_config"),
    *("audio_config", "quantization_config", "compression_config"),
)
ROPE_NUMBERS = (
    *("rope_theta", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
)
SAMPLING = {"temperature": (0, 100), "top_p": (1e-30, 1), "top_k": (-1, 2**31), "min_p": (0, 1)}
"""Least and most of each, as for ``teacher.sampling`` of a run file."""
NO_DECODERS = (
    *("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"),
    *("ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining"),
)
"""How the names of models end that do not predict the next token."""
NO_WEIGHTS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
AGAIN = "fetch or save the model again"
FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.json", "preprocessor_config.json", "processor_config.json", *QUANT_FILES),
)
"""What transformers and vLLM read of a model beside its tokenizer and weights."""


def check_settings(where: str, model: ModelFolder) -> list[Problem]:
    """Problems of the files of settings, which all that follows reads, here and in a run."""
    problems: list[Problem] = []
    read: dict[str, dict[str, Any]] = {}
    for name in FILES:
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
    return broken or [Problem(where, text) for text in _misfits(model, whole=fetched)]


def require_sound(where: str, model: ModelFolder) -> None:
    """Raise ConfigError where settings or files of weights cannot be used, before any engine is."""
    found = weight_problems(model.path, fetched="snapshots" not in model.path.parts)
    broken = [Problem(where, f"{file} {why}") for file, why in found]
    if problems := check_settings(where, model) + broken:
        raise ConfigError(problems)


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
    for names, is_right, expected in RULES:
        for name in names:
            value = config.get(name)
            if value is not None and not is_right(value):
                yield f"{name} is {shown_value(value, 80)}, expected {expected}"
    layers, kind = config.get("num_hidden_layers"), config.get("model_type")
    for name in LAYER_COUNTS:
        value = config.get(name)
        if not isinstance(value, list):
            continue
        if isinstance(kind, str) and kind in PLAIN_TYPES:
            yield f"{name} is {shown_value(value, 80)}, expected a whole number, as a {kind} has"
        elif type(layers) is int and len(value) < layers:
            yield f"{name} has {len(value)} entries, expected one for each of {layers} layers"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if _is_whole(heads, 1) and _is_whole(groups, 1) and heads % groups:
        yield f"num_key_value_heads is {groups}, expected a divisor of the {heads} heads"
    yield from _wrong_kinds(config)
    yield from _wrong_ids(config)


def _wrong_kinds(config: dict[str, Any]) -> Iterator[str]:
    """Names of what the installed libraries do not have, and entries of the wrong type."""
    for name in ("torch_dtype", "dtype"):
        value = config.get(name)
        if not isinstance(value, dict | None) and not DTYPES.fullmatch(str(value)):
            yield f"{name} is {shown_value(value, 80)}, expected a type of torch such as bfloat16"
    for name in ACTIVATIONS:
        value = config.get(name)
        if value is not None and not config.get("auto_map") and knows_activation(value) is False:
            yield f"{name} is {shown_value(value, 80)}, which the installed transformers lacks"
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        parts = [value, *value.values()] if isinstance(value, dict) else []
        for part in parts:  # Some models have rotary embeddings by kind of layer.
            yield from _wrong_rope(name, part) if isinstance(part, dict) else ()
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if _are_texts(kinds) and type(layers) is int and len(kinds) < layers:
        yield f"layer_types has {len(kinds)} entries, expected one for each of {layers} layers"


def _wrong_rope(name: str, value: dict[str, Any]) -> Iterator[str]:
    kind, factor = value.get("rope_type", value.get("type")), value.get("factor")
    if kind is not None and not (isinstance(kind, str) and knows_rope(kind) is not False):
        yield f"{name} has the rope_type {shown_value(kind, 80)}, which nobody here knows"
    if factor is not None and not 0 < (number(factor) or 0) <= MOST_LONGER:
        yield f"{name} has the factor {shown_value(factor, 80)}, expected 0 to {MOST_LONGER:,}"
    for key in ROPE_NUMBERS:
        one = value.get(key)
        if one is not None and not _is_above_zero(one):
            yield f"{name} has the {key} {shown_value(one, 80)}, expected a number above 0"
    for key in ("long_factor", "short_factor"):
        one = value.get(key)
        if one is not None and not (isinstance(one, list) and all(map(_is_above_zero, one))):
            yield f"{name} has the {key} {shown_value(one, 80)}, expected a list of numbers above 0"


def _wrong_ids(config: dict[str, Any]) -> Iterator[str]:
    value = config.get("eos_token_id")
    if value is None:
        return
    for one in value if isinstance(value, list) else [value]:
        if type(one) is not int or not 0 <= one < 2**31:
            yield f"eos_token_id is {shown_value(value, 80)}, expected an id or a list of ids"
            return
    rows = config.get("vocab_size")
    ends = value if isinstance(value, list) else [value]
    if type(rows) is int and ends and not any(one < rows for one in ends):
        yield f"eos_token_id is {shown_value(value, 80)}, but vocab_size is {rows}: no answer ends"


def _wrong_sampling(config: dict[str, Any]) -> Iterator[str]:
    for name, (least, most) in SAMPLING.items():
        value = config.get(name)
        if value is not None and not (_is_number(value, least) and value <= most):
            yield f"{name} is {shown_value(value, 80)}, expected {least:g} to {most:g}"
    for name in NAMED_IDS:
        value = config.get(name)
        if value is not None and not _are_ids(value):
            yield f"{name} is {shown_value(value, 80)}, expected an id"
    yield from _wrong_ids(config)


def _is_number(value: Any, least: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and least <= value < 1e18


def _is_above_zero(value: Any) -> bool:
    return _is_number(value, 0) and value > 0


def _is_whole(value: Any, least: int) -> TypeGuard[int]:
    return type(value) is int and _is_number(value, least)


def _are_whole(value: Any, least: int) -> bool:
    each = value if isinstance(value, list) and value else [value]
    return all(_is_whole(one, least) for one in each)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_ids(value: Any) -> bool:
    """Of a token that may be missing, for which some write -1."""
    ids = value if isinstance(value, list) else [value]
    return all(type(one) is int and abs(one) < 2**31 for one in ids)


NAMED_IDS = ("bos_token_id", "pad_token_id")
FROM_ONE = "a whole number from 1 up"
RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (COUNTS, lambda value: _is_whole(value, 1), FROM_ONE),
    (CONTEXT_KEYS, lambda value: _is_number(value, 1) and value == int(value), FROM_ONE),
    (LAYER_COUNTS, lambda value: _are_whole(value, 1), FROM_ONE),
    (OTHER_COUNTS, lambda value: _are_whole(value, 0), "a whole number from 0 up"),
    (("sliding_window",), lambda value: _are_whole(value, -1), "a whole number"),
    (ABOVE_ZERO, _is_above_zero, "a number above 0"),
    (SPREADS, lambda value: _is_number(value, 0), "a number from 0 up"),
    (MAPPINGS, lambda value: isinstance(value, dict), "an object"),
    (YES_OR_NO, lambda value: isinstance(value, bool), "true or false"),
    (("model_type",), lambda value: isinstance(value, str), "a text"),
    (("architectures", "layer_types"), _are_texts, "a list of texts"),
    (NAMED_IDS, _are_ids, "an id"),
)
"""Names of settings, what each must be, and that in words."""


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _misfits(model: ModelFolder, *, whole: bool) -> list[str]:
    """Where the tensors' names, shapes and types are not those of ``config.json``.

    ``whole``: the folder has all tensors.
    """
    found = {
        name: entry
        for file in sorted(model.path.glob("*.safetensors"))
        for name, entry in read_header(file).items()
    }
    shapes = {name: tuple(entry["shape"]) for name, entry in found.items()}
    kind = read_object(model.path / "config.json").get("model_type")
    config = {**model.config, "model_type": kind}  # And not that of a part of it.
    wrong = [*_foreign_names(model, list(shapes)), *_other_sizes(model, shapes)]
    if not wrong:
        wrong = [
            f"{model.name} {text}; name a folder whose config.json is that of its weights"
            for text in (*wrong_tensors(config, shapes, whole=whole), *_wrong_types(config, found))
        ]
    return wrong


def _other_sizes(model: ModelFolder, entries: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Where the numbers of ids, hidden units and layers are not those of ``config.json``."""
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


def _wrong_types(config: dict[str, Any], entries: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Weights of whole numbers, which only a quantised model has."""
    if config.get("quantization_config"):
        return
    for name, entry in entries.items():
        whole = entry["dtype"] in NO_WEIGHTS and len(entry["shape"]) > 1
        if whole and name.endswith(".weight"):
            yield f"has {name} of the type {entry['dtype']}, and no quantization_config"
            return


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
