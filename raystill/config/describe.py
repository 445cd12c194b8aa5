"""The configuration's own description: its fields by dotted name, and errors in those words.

Used by loading (which key was meant?) and by the field help.

The help of the run file: every field with its type, default, sentence and mark.
"""

import difflib
import textwrap
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raystill.base.errors import Problem
from raystill.config.run import RunConfig

# Keys that people bring from elsewhere, and what to do instead.
HINTS = {
    "stop": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "stop_strings": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "stop_sequences": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "batch_size": "set training.rows_per_step (rows of one optimizer step, all workers)",
    "lr": "did you mean training.learning_rate?",
    "wait_timeout_s": "set training.startup_timeout_s and teacher.startup_timeout_s",
}


@dataclass(frozen=True)
class Field:
    """One setting: its dotted name, type and default in words, sentence, and mark."""

    name: str
    type: str
    default: str
    sentence: str
    kind: str


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Field]:
    """Every setting below ``model``, in the order of the run file; ``a[].b``: of a list's entry."""
    for name, info in model.model_fields.items():
        inner = _inner_model(info.annotation)
        if inner is not None and not _is_union(info.annotation):
            yield from fields(inner, f"{prefix}{name}.")
            continue
        extra = info.json_schema_extra
        kind = str(extra.get("kind")) if isinstance(extra, dict) else ""
        yield Field(
            f"{prefix}{name}",
            type_text(info.annotation, info),
            _default_text(info),
            info.description or "",
            kind,
        )
        if inner is not None:
            entry = "[]" if _is_list(info.annotation) else ""
            yield from fields(inner, f"{prefix}{name}{entry}.")


def section_model(dotted: str) -> type[BaseModel] | None:
    """The model of the section with that dotted name, or None if it is not a section.

    A list of sections has that of its entries, which are named by their number.
    """
    model: type[BaseModel] | None = RunConfig
    for name in dotted.split(".") if dotted else []:
        if name.isdecimal():
            continue
        if model is None or name not in model.model_fields:
            return None
        model = _inner_model(model.model_fields[name].annotation)
    return model


def type_text(annotation: Any, info: FieldInfo | None = None) -> str:
    """A type and its bounds in words."""
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        inner = next((a for a in args[1:] if isinstance(a, FieldInfo)), None)
        return type_text(args[0], inner)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if _is_union(annotation):
        text = " or ".join(type_text(a) for a in args)
    elif origin is tuple:
        text = f"list of {type_text(args[0])}"
    elif origin is dict:
        text = "mapping"
    elif annotation is type(None):
        text = "null"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = "{" + ", ".join(annotation.model_fields) + "}"
    else:
        names = {str: "text", int: "integer", float: "number", bool: "true/false", Any: "any"}
        text = names.get(annotation, str(annotation))
    return text + _bounds_text(info)


def problems_of(
    error: ValidationError, data: dict[str, Any], skip_sections: Collection[str] = ()
) -> list[Problem]:
    """Every refused value as a problem, one a key, with the key that was probably meant.

    What is said of the sections to skip is left out, and so is the rule between signal and
    objective (which has no location) if either of them is to be skipped.
    """
    skip = set(skip_sections) | ({""} if {"signal", "objective"} & set(skip_sections) else set())
    found: dict[str, list[str]] = {}
    wishes: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        where = dotted(item)
        if where.partition(".")[0] in skip:
            continue
        if item["type"] == "extra_forbidden":
            found.setdefault(where, []).append(unknown_key(where))
        elif item["type"] == "missing":
            found.setdefault(where, []).append(f"is missing; set {where} ({_sentence(where)})")
        elif item["type"] == "value_error":
            found.setdefault(where, []).append(str(item["ctx"]["error"]))
        elif not (isinstance(value_at(data, where), dict) and _takes_mapping(where)):
            found.setdefault(where, [])  # a mapping is judged by its keys, not as a number
            wishes.setdefault(where, []).append(_wish(item["msg"]))
    return [
        Problem(where or "run file", "; ".join(_wrong_value(where, wishes, data) + messages))
        for where, messages in found.items()
    ]


def _wrong_value(where: str, wishes: dict[str, list[str]], data: dict[str, Any]) -> list[str]:
    """One message for all that the members of a union wanted."""
    if where not in wishes:
        return []
    expected = " or ".join(dict.fromkeys(wishes[where]))
    return [f"is {value_at(data, where)!r}; expected {expected} ({_sentence(where)})"]


def _wish(message: str) -> str:
    """Pydantic's message as what was expected."""
    if "dictionary" in message:
        return "a mapping of keys"
    wish = message.removeprefix("Input should be ").partition(", unable to")[0]
    wish = wish.replace("a valid integer", "an integer").replace("a valid ", "a ")
    if wish.startswith(("greater", "less")):
        wish = f"a value {wish}"
    return wish.replace("tuple", "list")


def unknown_key(where: str) -> str:
    """What to say of a key that does not exist: the near miss, and the keys there are."""
    section, _, leaf = where.rpartition(".")
    model = section_model(section)
    siblings = list(model.model_fields) if model is not None else []
    everywhere = [field.name for field in fields()]
    if leaf in HINTS:
        hint = HINTS[leaf]
    else:
        near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
        leaves = {name.rpartition(".")[2]: name for name in reversed(everywhere)}
        others = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)]
        meant = [f"{section}.{n}" if section else n for n in near] or others[:1]
        hint = f"did you mean {meant[0]}?" if meant else "remove it"
    return f"unknown key; {hint} (keys of {section or 'a run file'}: {', '.join(siblings)})"


def field_info(dotted: str) -> FieldInfo | None:
    """The declaration of the setting with that dotted name."""
    section, _, leaf = dotted.rpartition(".")
    model = section_model(section)
    return model.model_fields.get(leaf) if model is not None else None


def dotted(item: Any) -> str:
    """An error's location as a dotted key, without the names of a union's members."""
    parts: list[str] = []
    model: type[BaseModel] | None = RunConfig
    for depth, part in enumerate(item["loc"]):
        last_is_key = item["type"] == "extra_forbidden" and depth == len(item["loc"]) - 1
        if isinstance(part, int) or last_is_key:
            parts.append(str(part))
        elif model is not None and part in model.model_fields:
            parts.append(part)
            model = _inner_model(model.model_fields[part].annotation)
    return ".".join(parts)


def _takes_mapping(where: str) -> bool:
    """Whether the setting is a number or the like, or else a section."""
    info = field_info(where)
    if info is None or _is_list(info.annotation):
        return False
    return _inner_model(info.annotation) is not None


def _sentence(where: str) -> str:
    """The setting's sentence; that of the list for one of its items."""
    info = field_info(where) or field_info(where.rpartition(".")[0])
    return (info.description or "").rstrip(".") if info is not None else where


def value_at(data: Any, where: str) -> Any:
    """What stands at a dotted key of mappings and lists; None where nothing does."""
    for part in where.split("."):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list | tuple) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        inner = _inner_model(part)
        if inner is not None:
            return inner
    return None


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_list(annotation: Any) -> bool:
    """A list, or a union of one and anything else."""
    return get_origin(annotation) is tuple or (
        _is_union(annotation) and any(_is_list(part) for part in get_args(annotation))
    )


def _bounds_text(info: FieldInfo | None) -> str:
    signs = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    bounds = []
    for mark in info.metadata if info is not None else []:
        sign = signs.get(type(mark).__name__)
        if sign is not None:
            bounds.append(f"{sign} {getattr(mark, type(mark).__name__.lower())}")
    return f" {', '.join(bounds)}" if bounds else ""


def _default_text(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return "unset"
    if isinstance(info.default, bool):
        return str(info.default).lower()
    if isinstance(info.default, tuple):
        return str(list(info.default))
    return str(info.default)


HEAD = """\
Fields of a run file. Set any of them on the command line with --set a.b=value.
A change of an [identity] field makes another run: an existing run folder refuses it.
An [operational] field may change between restarts of the same run.
"""


def describe_fields() -> str:
    """One paragraph a field, under its dotted name, in the order of the run file."""
    lines, section = [HEAD], ""
    for field in fields():
        head = field.name.split(".")[0] if "." in field.name else ""
        if head != section:
            section = head
            lines.append(f"{section}:")
        lines.append(f"  {field.name}  ({field.type}; default: {field.default}) [{field.kind}]")
        lines.append(textwrap.indent(textwrap.fill(field.sentence, 86), " " * 6))
    return "\n".join(lines) + "\n"
