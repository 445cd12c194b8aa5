"""The static check of teacher and student: do they fit the run and each other?

Reads configuration and tokenizer files only: no weights, no torch, no transformers.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from raystill.base.errors import ConfigError, Problem
from raystill.config.run import RunConfig
from raystill.datasets.rows.signal import hidden_size
from raystill.model.files import ModelFolder, read_object
from raystill.model.head import find_head, logit_transform, read_header, stored_tensors
from raystill.model.tokenizer import load_tokenizer, read_settings

NAMED_TOKENS = ("bos", "eos", "pad")


def check_teacher(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """The teacher's context, vocabulary, stop ids and weights against the run file."""
    settings = config.teacher
    limit, wanted = teacher.context_tokens, settings.max_model_len
    if limit is not None and wanted is not None and wanted > limit:
        yield Problem(
            "teacher.max_model_len",
            f"is {wanted}, but {teacher.name} takes at most {limit} tokens; set it to {limit} or "
            "less",
        )
    vocabulary = teacher.vocab_size
    if settings.engine == "synthetic":
        vocabulary = settings.synthetic.vocab_size
    if vocabulary is not None:
        yield from _check_top_k(config, vocabulary)
        for token_id in settings.sampling.stop_token_ids or ():
            if not 0 <= token_id < vocabulary:
                yield Problem(
                    "teacher.sampling.stop_token_ids",
                    f"has {token_id}, but the teacher's ids go from 0 to {vocabulary - 1}",
                )
    strings = teacher.generation_config.get("stop_strings")
    if strings and settings.sampling.stop_token_ids is None:
        yield Problem(
            "teacher.sampling.stop_token_ids",
            f"{teacher.name} ends its answers at strings ({strings!r}), which are not supported; "
            "set stop_token_ids to the ids that end an answer",
        )
    yield from _check_hidden(config, teacher)
    needs_weights = settings.engine == "vllm" or config.student.init == "from_teacher"
    if needs_weights and not teacher.has_weights and not _is_in_hub_cache(teacher):
        yield Problem(
            "teacher.model",
            f"the folder {teacher.name!r} has no *.safetensors; name a folder with weights",
        )


def check_student(config: RunConfig, teacher: ModelFolder, student: ModelFolder) -> list[Problem]:
    """The student against the teacher; they are one model with ``init: from_teacher``."""
    if config.student.init == "from_teacher":
        problems = list(_check_layers(config, teacher))
        where = "student.init"
    else:
        problems = check_tokenizers(teacher, student)
        where = "student.model"
        if not student.has_weights and not _is_in_hub_cache(student):
            message = f"the folder {student.name!r} has no *.safetensors; name one with weights"
            problems.append(Problem(where, message))
    try:
        logit_transform(student.config)
    except ValueError as error:
        problems.append(Problem(where, f"{student.name}: {error}"))
    if student.config.get("quantization_config"):
        message = f"{student.name} has quantised weights, which cannot be trained; name a plain one"
        problems.append(Problem(where, message))
    return problems


def check_tokenizers(teacher: ModelFolder, student: ModelFolder) -> list[Problem]:
    """Both must mean the same by every id that both name, since the stream carries ids only."""
    if _same_file(teacher.path / "tokenizer.json", student.path / "tokenizer.json"):
        return []
    try:
        theirs, ours = vocabulary_of(teacher), vocabulary_of(student)
    except ConfigError as error:
        return error.problems
    names = {index: token for token, index in ours.items()}
    differing = [
        (token, index)
        for token, index in theirs.items()
        if names.get(index, token) != token or ours.get(token, index) != index
    ]
    problems = []
    if differing:
        token, index = min(differing, key=lambda pair: pair[1])
        problems.append(
            Problem(
                "student.model",
                f"{student.name} has another tokenizer than {teacher.name}: {len(differing)} of "
                f"{len(theirs)} ids differ (id {index} is {token!r} for the teacher and "
                f"{names.get(index)!r} for the student); choose a student with the teacher's "
                "tokenizer, or init: from_teacher",
            )
        )
    size, needed = student.vocab_size, max(theirs.values(), default=-1) + 1
    if size is not None and size < needed and not problems:
        message = f"{student.name} has {size} ids, but the teacher's tokenizer names {needed}"
        problems.append(Problem("student.model", message + "; choose a student that has them all"))
    return problems


def tokenizer_notices(teacher: ModelFolder, student: ModelFolder) -> Iterator[str]:
    """What differs and does no harm, since ``student/`` gets the teacher's."""
    mine, theirs = read_settings(student.path), read_settings(teacher.path)
    for name in NAMED_TOKENS:
        ours, asked = mine.get(f"{name}_token"), theirs.get(f"{name}_token")
        if ours != asked:
            yield f"the student's {name} token is {ours!r}, the teacher's {asked!r} is used"


def vocabulary_of(model: ModelFolder) -> dict[str, int]:
    """Token to id, special tokens included. Raises ConfigError."""
    tokenizer: Tokenizer = load_tokenizer(model.path, read_settings(model.path))
    return tokenizer.get_vocab(with_added_tokens=True)


def count_parameters(model: ModelFolder, layers: list[int] | None = None) -> int | None:
    """Parameters by the safetensors headers, of some layers only if given; None if unknown."""
    files = sorted(model.path.glob("*.safetensors"))
    if not files:
        index = read_object(model.path / "model.safetensors.index.json")
        total = index.get("metadata", {}).get("total_size")
        width = 4 if model.config.get("dtype", model.config.get("torch_dtype")) == "float32" else 2
        if total is None:
            return None
        kept = 1.0 if layers is None else len(layers) / max(1, model.num_layers or len(layers))
        return round(total / width * kept)
    total, wanted = 0, None if layers is None else set(layers)
    for file in files:
        for name, entry in read_header(file).items():
            layer = name.partition("layers.")[2].partition(".")[0]
            if wanted is not None and layer.isdigit() and int(layer) not in wanted:
                continue
            size = 1
            for extent in entry["shape"]:
                size *= extent
            total += size
    return total


def _check_hidden(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """With ``signal.kind: hidden``: are there states, and a head at the student to give them to?"""
    if config.signal.kind != "hidden":
        return
    if config.teacher.engine == "synthetic":
        yield Problem(
            "signal.kind",
            "is 'hidden', but the synthetic engine has no hidden states; set teacher.engine: vllm, "
            "or signal.kind: topk",
        )
        return
    try:
        size = hidden_size(teacher.config)
        logit_transform(teacher.config)
        if not stored_tensors(teacher.path):  # Still to be fetched, or missed elsewhere.
            return
        weight = find_head(teacher).weight
    except ValueError as error:
        yield Problem("teacher.model", str(error))
        return
    expected = (teacher.vocab_size or (weight.shape or (0,))[0], size)
    if weight.shape is not None and weight.shape != expected:
        yield Problem(
            "teacher.model",
            f"{teacher.name} has an output head ({weight.name}) of {list(weight.shape)}, but by "
            f"its config.json it would have {list(expected)} (ids, hidden size), so the student "
            "could not rebuild its logits; mend config.json, or set signal.kind: topk",
        )


def _check_top_k(config: RunConfig, vocabulary: int) -> Iterator[Problem]:
    asked = {"evaluation.top_k": config.evaluation.top_k if config.evaluation.enabled else 0}
    if config.signal.kind == "topk":
        asked["signal.top_k"] = config.signal.top_k
    for where, top_k in asked.items():
        if top_k > vocabulary:
            yield Problem(
                where,
                f"is {top_k}, but the teacher has {vocabulary} ids; set it to {vocabulary} or less",
            )


def _check_layers(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    layers, number = config.student.layers, teacher.num_layers
    if layers is None or number is None:
        return
    outside = [layer for layer in layers if not 0 <= layer < number]
    if outside:
        yield Problem(
            "student.layers",
            f"has {outside}, but {teacher.name} has layers 0 to {number - 1}; name those only",
        )
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        yield Problem("student.layers", f"names {twice} more than once; name each layer once")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other) or (
            one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
        )
    except OSError:
        return False


def _is_in_hub_cache(model: ModelFolder) -> bool:
    return "snapshots" in model.path.parts
