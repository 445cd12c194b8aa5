"""Check that teacher and student fit the run file and each other, before anything is started.

Reads configuration files, tokenizers and the headers of weight files: no weights, no torch, no
transformers.
"""

import filecmp
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from raystill.base.errors import ConfigError, Problem
from raystill.cluster.check.ahead.teacher_memory import overrides_config
from raystill.cluster.check.folders import check_architecture, check_weights
from raystill.cluster.check.trackers import check_api
from raystill.config.run import RunConfig
from raystill.config.student import LayerChoice
from raystill.datasets.rows.signal import hidden_size
from raystill.model.adapters import adapter_problems
from raystill.model.files import ModelFolder
from raystill.model.head import find_head, logit_transform, read_header, stored_tensors
from raystill.model.sizes import FFN_OUTPUT, Sizes, is_ffn_output, uneven_widths
from raystill.model.tokenizer import read_settings, shared_tokenizer
from raystill.model.weights import layer_of

NAMED_TOKENS = ("bos", "eos", "pad")


def check_teacher(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """Do the teacher's context, vocabulary, stop ids and weights fit the run file?"""
    settings = config.teacher
    limit, context = teacher.context_tokens, settings.max_model_len
    if limit is not None and context is not None and context > limit:
        yield Problem(
            "teacher.max_model_len",
            f"is {context}, but {teacher.name} takes at most {limit} tokens; set it to {limit} or "
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
    yield from check_api(config)
    if settings.engine == "vllm" or config.student.init == "from_teacher":
        yield from _check_folder("teacher.model", teacher)
    if settings.engine == "vllm" and not overrides_config(settings):
        trusted = settings.trust_remote_code
        for message in check_architecture("teacher.model", teacher, trusted=trusted, served=True):
            yield Problem("teacher.model", message)


def check_student(config: RunConfig, teacher: ModelFolder, student: ModelFolder) -> list[Problem]:
    """Does the student fit the teacher, and can this version train it?

    With ``init: from_teacher`` both are the same folder.
    """
    if config.student.init == "from_teacher":
        problems = [*_check_layers(config, teacher), *_check_widths(config, teacher)]
        problems += _check_refit(config, teacher)
        where = "student.init"
    else:
        problems = check_tokenizers(teacher, student)
        where = "student.model"
        problems += _check_folder(where, student)
    problems += _check_balance(config, student)
    trusted = trusts_student(config)
    for message in check_architecture(where, student, trusted=trusted, served=False):
        problems.append(Problem(where, message))
    try:
        logit_transform(student.config)
    except ValueError as error:
        problems.append(Problem(where, f"{student.name}: {error}"))
    if config.student.lora is not None:
        for field, message in adapter_problems(student, config.student.lora):
            problems.append(Problem(f"student.lora.{field}", message))
    if student.config.get("quantization_config"):
        message = f"{student.name} has quantised weights, which cannot be trained; name a plain one"
        problems.append(Problem(where, message))
    return problems


def trusts_student(config: RunConfig) -> bool:
    """Whether Python code in the student's folder may run."""
    trusted = config.student.trust_remote_code
    if config.student.init == "from_teacher":
        return trusted or config.teacher.trust_remote_code
    return trusted


def _check_folder(where: str, model: ModelFolder) -> list[Problem]:
    """Are the weights there, whole, and those of config.json?"""
    to_fetch = "snapshots" in model.path.parts  # Of the hub's cache.
    if not model.has_weights and not to_fetch:
        message = f"the folder {model.name!r} has no *.safetensors; name a folder with weights"
        return [Problem(where, message)]
    return check_weights(where, model, fetched=not to_fetch)


def check_ids(
    named: int, config: RunConfig, teacher: ModelFolder, student: ModelFolder | None
) -> Iterator[Problem]:
    """Have both models a row for each of the ids 0 to ``named`` - 1 of the teacher's tokenizer?"""
    models = {"teacher.model": teacher} if config.teacher.engine == "vllm" else {}
    if student is not None and student is not teacher:
        models["student.model"] = student
    for where, model in models.items():
        size = model.vocab_size
        if size is not None and size < named:
            yield Problem(
                where,
                f"{model.name} has {size} ids, but the teacher's tokenizer names {named}; choose a "
                "model that has them all, or the tokenizer that was saved with it",
            )


def _check_widths(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """Has the teacher as many units, neurons and heads as the student is to keep?"""
    student = config.student
    if not student.narrowed:
        return
    try:
        sizes = Sizes.of(teacher.config)
    except ValueError as error:
        yield Problem("student", f"{teacher.name}: {error}")
        return
    wanted = student.hidden_size, student.ffn_size, student.num_heads
    if problems := sizes.problems(*wanted):
        yield from problems
        return
    yield from uneven_widths(teacher.config.get("model_type"), sizes, sizes.narrowed(*wanted))
    number, kept = teacher.num_layers, None
    if number is not None and not isinstance(student.layers, LayerChoice):
        kept = student.kept_layers(number)
    shapes = {
        name: entry["shape"]
        for file in sorted(f for f in set(stored_tensors(teacher.path).values()) if f.exists())
        for name, entry in read_header(file).items()
        if kept is None or (layer := layer_of(name)) is None or layer in kept
    }
    for text in islice(sizes.unfit(shapes), 1):
        named = [f for f in ("hidden_size", "ffn_size", "num_heads") if getattr(student, f)]
        yield Problem(
            f"student.{named[0]}",
            f"makes the layers narrower, but {teacher.name} {text}; leave student.hidden_size, "
            "ffn_size and num_heads unset for this model",
        )


def _check_balance(config: RunConfig, student: ModelFolder) -> Iterator[Problem]:
    """Has the student experts, where their load is to be balanced?"""
    sections = {"objective": config.objective, "policy.objective": config.policy.objective}
    if any(value and ("expert" in name or "moe" in name) for name, value in student.config.items()):
        return
    for where, objective in sections.items():
        if objective.router_balance and (where == "objective" or config.policy.enabled):
            yield Problem(
                f"{where}.router_balance",
                f"is {objective.router_balance:g}, but {student.name} has no experts "
                "(num_experts_per_tok in its config.json), whose load it would balance; set it to "
                "0, or remove it",
            )


def _check_refit(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """Has each layer the one feed-forward projection that can be fitted?"""
    names, layers = stored_tensors(teacher.path), teacher.num_layers
    if not config.student.refit or layers is None or not names:  # To be downloaded.
        return
    count = sum(is_ffn_output(name) for name in names)
    if count != layers:
        yield Problem(
            "student.refit",
            f"is true, but {teacher.name} has {count} feed-forward projections named {FFN_OUTPUT} "
            f"in {layers} layers; expected one in each, as dense decoders have: set it to false",
        )


def refit_notices(config: RunConfig, teacher: ModelFolder) -> Iterator[str]:
    """Where there is nothing to fit, since nothing of the teacher is left out."""
    student, layers = config.student, teacher.num_layers
    if not student.refit or student.narrowed or layers is None:
        return
    if student.kept_layers(layers) == list(range(layers)):
        yield (
            f"student.refit fits nothing: the student keeps all {layers} layers of "
            f"{teacher.name} at their width; leave some out, or remove it"
        )


def check_tokenizers(teacher: ModelFolder, student: ModelFolder) -> list[Problem]:
    """An id must be the same token for both, because the stream carries ids only.

    Either may have tokens that the other lacks.
    """
    if _same_file(teacher.path / "tokenizer.json", student.path / "tokenizer.json"):
        return []
    try:
        of_teacher, of_student = vocabulary_of(teacher), vocabulary_of(student)
    except ConfigError as error:
        return error.problems
    names = {index: token for token, index in of_student.items()}
    differing = [
        (token, index)
        for token, index in of_teacher.items()
        if names.get(index, token) != token or of_student.get(token, index) != index
    ]
    problems = []
    if differing:
        token, index = min(differing, key=lambda pair: pair[1])
        problems.append(
            Problem(
                "student.model",
                f"{student.name} has another tokenizer than {teacher.name}: {len(differing)} of "
                f"{len(of_teacher)} ids differ (id {index} is {token!r} for the teacher and "
                f"{names.get(index)!r} for the student); choose a student with the teacher's "
                "tokenizer, or init: from_teacher",
            )
        )
    return problems


def tokenizer_notices(teacher: ModelFolder, student: ModelFolder) -> Iterator[str]:
    """Named tokens that differ, which does no harm: the exported student gets the teacher's."""
    of_student, of_teacher = read_settings(student.path), read_settings(teacher.path)
    for name in NAMED_TOKENS:
        own, used = of_student.get(f"{name}_token"), of_teacher.get(f"{name}_token")
        if own != used:
            yield f"the student's {name} token is {own!r}, the teacher's {used!r} is used"


def vocabulary_of(model: ModelFolder) -> dict[str, int]:
    """Token to id, special tokens included, not to be changed. Raises ConfigError."""
    return shared_tokenizer(model.path, read_settings(model.path)).vocabulary


def _check_hidden(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """With ``signal.kind: hidden``: does the teacher have hidden states and a readable output head?

    The student computes the teacher's logits from both.
    """
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
        if not stored_tensors(teacher.path):  # To be downloaded, or a problem of another check.
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
            "could not compute its logits; correct config.json, or set signal.kind: topk",
        )


def _check_top_k(config: RunConfig, vocabulary: int) -> Iterator[Problem]:
    settings = {"evaluation.top_k": config.evaluation.top_k if config.evaluation.enabled else 0}
    if config.signal.kind == "topk":
        settings["signal.top_k"] = config.signal.top_k
    for where, top_k in settings.items():
        if top_k > vocabulary:
            yield Problem(
                where,
                f"is {top_k}, but the teacher has {vocabulary} ids; set it to {vocabulary} or less",
            )


def _check_layers(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    layers, number = config.student.layers, teacher.num_layers
    if isinstance(layers, LayerChoice):
        if number is not None and layers.keep > number:
            yield Problem(
                "student.layers.keep",
                f"is {layers.keep}, but {teacher.name} has {number} layers; keep {number} or fewer",
            )
        return
    if layers is None or number is None:
        return
    outside = [layer for layer in layers if not 0 <= layer < number]
    if outside:
        yield Problem(
            "student.layers",
            f"has {outside}, but {teacher.name} has layers 0 to {number - 1}; name those only",
        )
    twice = sorted(layer for layer, count in Counter(layers).items() if count > 1)
    if twice:
        yield Problem("student.layers", f"names {twice} more than once; name each layer once")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False
