"""The run file described from its models: the fields by dotted name, their help, and the errors.

Loading turns pydantic's errors into problems with it, ``driver.py fields`` prints its help, and
editors complete a run file by its JSON schema, which is published as ``configs/run.schema.json``.
Imports no torch, ray or vllm.

The words of the help are made here and not from the JSON schema: "number > 0, <= 1 or null" reads
better than ``anyOf`` with ``exclusiveMinimum`` and ``maximum``, and to turn the latter into the
former takes as many lines.
"""

import difflib
import json
import textwrap
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raystill.base.errors import MOST_PROBLEMS, ConfigError, Problem
from raystill.base.records import natural
from raystill.base.redact import is_secret_name, redact, shown_value
from raystill.config.base import inner_model, maps_sections
from raystill.config.run import RunConfig

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
HEAD = """\
Fields of a run file. Set any of them on the command line with --set a.b=value.
A change of an [identity] field makes another run: an existing run folder refuses it.
An [operational] field may change between restarts of the same run.
"""

# Names that other tools use, and what to set here instead.
HINTS = {
    "stop": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "stop_strings": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "stop_sequences": "stop strings are not supported; set teacher.sampling.stop_token_ids",
    "batch_size": "set training.rows_per_step (rows of one optimizer step, all workers)",
    "lr": "did you mean training.learning_rate?",
    "wait_timeout_s": "set training.startup_timeout_s and teacher.startup_timeout_s",
}

MAY_HOLD_SECRETS = frozenset({"teacher.engine_args", "teacher.api"})
"""Settings that other programs name: of a value of the wrong type only the type is told."""


@dataclass(frozen=True)
class Field:
    """One setting of a run file.

    ``name`` is dotted; ``type`` and ``default`` are in words; ``kind`` is identity or operational.
    ``default_value`` is the default as JSON, None where the field is unset or required.
    """

    name: str
    type: str
    default: str
    sentence: str
    kind: str
    default_value: Any = None

    @property
    def required(self) -> bool:
        """Whether a run file must set it (or its section is left out)."""
        return self.default == "required"


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Field]:
    """Every setting below ``model``, in the order of the run file.

    ``a[].b`` is the setting ``b`` of each entry of the list ``a``.
    """
    for name, info in model.model_fields.items():
        inner = inner_model(info.annotation)
        listed = _lists_sections(info.annotation)
        if inner is not None and not listed and not _is_union(info.annotation):
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
            None if info.default is PydanticUndefined else _as_json(info.default),
        )
        if inner is not None and not maps_sections(info.annotation):  # Those are told elsewhere.
            entry = "[]" if listed else ""
            yield from fields(inner, f"{prefix}{name}{entry}.")


def section_model(dotted: str) -> type[BaseModel] | None:
    """The model of the section with that dotted name, or None if it is not a section.

    For a list or mapping of sections this is the model of its entries, with or without an entry's
    number or name.
    """
    model: type[BaseModel] | None = RunConfig
    is_name = False
    for name in dotted.split(".") if dotted else []:
        if is_name or name.isdecimal():
            is_name = False
            continue
        if model is None or name not in model.model_fields:
            return None
        annotation = model.model_fields[name].annotation
        model, is_name = inner_model(annotation), maps_sections(annotation)
    return model


def type_text(annotation: Any, info: FieldInfo | None = None) -> str:
    """A type and its bounds in words, e.g. ``integer > 0 or null``."""
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        inner = next((a for a in args[1:] if isinstance(a, FieldInfo)), None)
        return type_text(args[0], inner)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if _is_union(annotation):  # A bound of the whole is one of each member but null.
        return " or ".join(type_text(a, None if a is type(None) else info) for a in args)
    if origin is tuple and Ellipsis in args:
        text = f"list of {type_text(args[0])}"
    elif origin is tuple:
        text = f"[{', '.join(type_text(a) for a in args)}]"
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
    """One problem for each refused key of ``data``, with the key that was probably meant.

    Errors in the sections to skip are left out. So is the rule between signal and objective, which
    has no location, if either of them is skipped.
    """
    skip = set(skip_sections) | ({""} if {"signal", "objective"} & set(skip_sections) else set())
    messages: dict[str, list[str]] = {}
    expected: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        where = dotted(item)
        if where.partition(".")[0] in skip:
            continue
        if item["type"] == "extra_forbidden":
            unknown = unknown_key(where) if len(messages) < MOST_PROBLEMS else "unknown key"
            messages.setdefault(where, []).append(unknown)
        elif item["type"] == "missing":
            messages.setdefault(where, []).append(f"is missing; set {where} ({_sentence(where)})")
        elif item["type"] == "value_error":
            messages.setdefault(where, []).append(redact(str(item["ctx"]["error"])))
        elif not (isinstance(value_at(data, where), dict) and _takes_mapping(where)):
            # Else the value is a mapping for a field that is a number or a section: then the errors
            # in its keys say more than that it is no number.
            messages.setdefault(where, [])
            expected.setdefault(where, []).append(_expectation(item["msg"]))
    return [
        Problem(where or "run file", "; ".join(_wrong_value(where, expected, data) + others))
        for where, others in messages.items()
    ]


def _wrong_value(where: str, expected: dict[str, list[str]], data: dict[str, Any]) -> list[str]:
    """One message for what all members of a union expect."""
    if where not in expected:
        return []
    either = " or ".join(dict.fromkeys(expected[where]))
    value = value_at(data, where)
    if _of_teacher(where) in MAY_HOLD_SECRETS or any(
        is_secret_name(part) for part in where.split(".")
    ):
        shown = f"a {type(value).__name__} (not shown, as it may hold a secret)"
    else:
        shown = shown_value(value)
    return [f"is {shown}; expected {either} ({_sentence(where)})"]


def _of_teacher(where: str) -> str:
    """The same setting of ``teacher``, for one of ``teachers.NAME``."""
    first, _, rest = where.partition(".")
    return f"teacher.{rest.partition('.')[2]}" if first == "teachers" else where


def _expectation(message: str) -> str:
    """What was expected, from pydantic's message."""
    if "dictionary" in message:
        return "a mapping of keys"
    text = message.removeprefix("Input should be ").partition(", unable to")[0]
    text = text.replace("a valid integer", "an integer").replace("a valid ", "a ")
    if text.startswith(("greater", "less")):
        text = f"a value {text}"
    return text.replace("tuple", "list")


def unknown_key(where: str) -> str:
    """The message for a key that does not exist: the near miss, and the keys there are."""
    section, _, leaf = where.rpartition(".")
    meant = near_miss(where)
    hint = HINTS.get(leaf) or (f"did you mean {meant}?" if meant else "remove it")
    listed = ", ".join(_keys_of(section))
    return f"unknown key; {hint} (keys of {section or 'a run file'}: {listed})"


def near_miss(where: str) -> str | None:
    """The dotted key that was probably meant: a similar one in the same section, else elsewhere."""
    section, _, leaf = where.rpartition(".")
    near = difflib.get_close_matches(leaf, _keys_of(section), n=1, cutoff=0.6)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    # Reversed, so that of fields with one name the first in the run file is named.
    leaves = {field.name.rpartition(".")[2]: field.name for field in reversed(list(fields()))}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    return leaves[near[0]] if near else None


def _keys_of(section: str) -> list[str]:
    model = section_model(section)
    return list(model.model_fields) if model is not None else []


def field_info(dotted: str) -> FieldInfo | None:
    """The declaration of the setting with that dotted name."""
    section, _, leaf = dotted.rpartition(".")
    model = section_model(section)
    return model.model_fields.get(leaf) if model is not None else None


def dotted(item: Any) -> str:
    """The dotted key of an error's location, without the names of a union's members."""
    parts: list[str] = []
    model: type[BaseModel] | None = RunConfig
    is_name = False
    for depth, part in enumerate(item["loc"]):
        last_is_key = item["type"] == "extra_forbidden" and depth == len(item["loc"]) - 1
        if isinstance(part, int) or last_is_key or is_name:
            parts.append(str(part))
            is_name = False
        elif model is not None and part in model.model_fields:
            parts.append(part)
            annotation = model.model_fields[part].annotation
            model, is_name = inner_model(annotation), maps_sections(annotation)
    return ".".join(parts)


def _takes_mapping(where: str) -> bool:
    """Whether the setting may be a section (``teacher.num_replicas`` is a number or a section)."""
    info = field_info(where)
    if info is None or _lists_sections(info.annotation):
        return False
    return inner_model(info.annotation) is not None


def _sentence(where: str) -> str:
    """The sentence of the setting, or of the list that the setting is an item of."""
    info = field_info(where) or field_info(where.rpartition(".")[0])
    return (info.description or "").rstrip(".") if info is not None else where


def value_at(data: Any, where: str) -> Any:
    """The value at a dotted key of nested mappings and lists; None where there is none."""
    for part in where.split("."):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list | tuple) and (place := natural(part)) is not None:
            data = data[place] if place < len(data) else None
        else:
            return None
    return data


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _lists_sections(annotation: Any) -> bool:
    """Whether it is a list of sections, or a union that such a list is a member of."""
    if _is_union(annotation):
        return any(_lists_sections(part) for part in get_args(annotation))
    return get_origin(annotation) is tuple and inner_model(annotation) is not None


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


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def select_fields(section: str | None = None) -> list[Field]:
    """The fields of a section, or the one field, with that dotted name; all of them for None.

    Raises ConfigError, with the near miss, where the run file has neither.
    """
    everywhere = list(fields())
    if section is None:
        return everywhere
    below = (f"{section}.", f"{section}[].")
    selected = [f for f in everywhere if f.name == section or f.name.startswith(below)]
    if not selected:
        leaf, meant = section.rpartition(".")[2], near_miss(section)
        hint = HINTS.get(leaf) or (f"did you mean {meant}?" if meant else "name one that exists")
        listed = ", ".join(RunConfig.model_fields)
        message = f"is no section or field of a run file; {hint} (a run file has {listed})"
        raise ConfigError([Problem(section, message)])
    return selected


def describe_fields(section: str | None = None) -> str:
    """The help of a section, or of the whole run file: one paragraph a field, in its order."""
    lines, heading = [HEAD], ""
    for field in select_fields(section):
        head = field.name.split(".")[0] if "." in field.name else ""
        if head != heading:
            heading = head
            lines.append(f"{heading}:")
        lines.append(f"  {field.name}  ({field.type}; default: {field.default}) [{field.kind}]")
        lines.append(textwrap.indent(textwrap.fill(field.sentence, 86), " " * 6))
    return "\n".join(lines) + "\n"


def fields_json(section: str | None = None) -> list[dict[str, Any]]:
    """:func:`describe_fields` for programs: one JSON object a field."""
    return [
        {
            "name": field.name,
            "type": field.type,
            "required": field.required,
            "default": field.default_value,
            "kind": field.kind,
            "description": field.sentence,
        }
        for field in select_fields(section)
    ]


def run_schema() -> dict[str, Any]:
    """The JSON schema of a run file, by which editors complete and check it while it is written.

    ``kind`` marks each field as identity or operational. Rules between fields are not in it; only
    ``driver.py check`` knows them.
    """
    schema = RunConfig.model_json_schema()
    models = schema.pop("$defs")
    schema["required"].remove("teacher")  # Or teachers.
    for model in (schema, *models.values()):
        for setting in model["properties"].values():
            setting.pop("title", None)  # The name again, with capitals.
            if "$ref" in setting:
                # An editor would write the whole section out on completing its name.
                setting.pop("default", None)
    sources = models["PromptsConfig"]["properties"]["sources"]["anyOf"][0]
    rules = models["FiltersConfig"]["properties"]["rules"]
    listed = {"type": "array", "items": rules["items"]}
    for section, short in (("prompts", sources), ("filters", listed)):  # A bare list is short.
        setting = schema["properties"][section]
        setting["anyOf"] = [{"$ref": setting.pop("$ref")}, short]
    return {
        "$schema": SCHEMA_DIALECT,
        **schema,
        "title": "Raystill run file",
        "$defs": models,
    }


def schema_text() -> str:
    """The text of ``configs/run.schema.json``."""
    return json.dumps(run_schema(), indent=2, ensure_ascii=False) + "\n"
