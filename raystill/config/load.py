"""From a run file and its overrides to a ``RunConfig``, or to everything that is wrong with them.

Consumes YAML; feeds the driver, ``check`` and every stage. Imports no torch, ray or vllm.

YAML as run files use it: safe, without repeated keys, and with ``1e-4`` as a number.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raystill.base.errors import ConfigError, Problem
from raystill.base.redact import redacted
from raystill.config.describe import dotted, problems_of, section_model, value_at
from raystill.config.prompts import spell_out_prompts
from raystill.config.run import RunConfig

# What stands in for a required section that cannot be used, so that the others are still checked.
STAND_INS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "-"},
    "student": {"init": "from_teacher", "layers": [0]},
    "prompts": {"path": "-"},
}


@dataclass
class Loaded:
    """A configuration with what was wrong with it.

    ``config`` is the writer's where there are no problems. Otherwise defaults and stand-ins take
    the place of what was refused, and ``refused`` has the dotted names of those settings, which
    say nothing; it is None where nothing of the file could be used.
    """

    config: RunConfig | None
    problems: list[Problem] = field(default_factory=list)
    refused: frozenset[str] = frozenset()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with ``a.b=c`` overrides applied. Raises ConfigError with all problems."""
    loaded = load_leniently(path, overrides)
    if loaded.problems or loaded.config is None:
        raise ConfigError(loaded.problems)
    return loaded.config


def load_leniently(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Like :func:`load_config`, but keep what is usable, so that a check can go on to the rest."""
    data, problems = read_run_file(path)
    if data is None:
        return Loaded(None, problems)
    for override in overrides:
        problems += apply_override(data, override)
    return validate_leniently(data, problems)


def validate_leniently(data: dict[str, Any], problems: list[Problem]) -> Loaded:
    """Validate; on failure take out what was refused and try again, then whole sections."""
    data = deepcopy(data)
    refused: set[str] = set()
    for attempt in range(4):
        try:
            return Loaded(RunConfig.model_validate(data), problems, frozenset(refused))
        except ValidationError as error:
            # A rule between values is only judged once each of them is valid. What it says then
            # counts, unless a stand-in of ours is what it objects to.
            sections = {name.partition(".")[0] for name in refused}
            problems = problems + problems_of(error, data, skip_sections=sections)
            for item in error.errors():
                whole = attempt > 0 or item["type"] in ("value_error", "missing")
                refused |= _take_out(data, item, whole)
    return Loaded(None, problems, frozenset(refused))


def read_run_file(path: str | Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The file's mapping, or why there is none."""
    where = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, [Problem(where, "no such file; name a run file, e.g. configs/quickstart.yaml")]
    except (OSError, UnicodeDecodeError) as error:
        return None, [Problem(where, f"cannot be read ({error}); expected a YAML text file")]
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        return None, [Problem(_with_line(where, error), f"is not valid YAML: {_reason(error)}")]
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        return None, [Problem(where, f"is {kind}; expected a mapping of sections (teacher: ...)")]
    return _spelled_out(data), []


def apply_override(data: dict[str, Any], override: str) -> list[Problem]:
    """Set the dotted key of ``a.b=value`` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        return [Problem(f"--set {override}", "expected a dotted key and a value: --set a.b=value")]
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        return [Problem(f"--set {override}", f"the value is not valid YAML: {_reason(error)}")]
    names = key.split(".")
    section: Any = data
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        if isinstance(section, list) and not (name.isdecimal() and int(name) < len(section)):
            message = f"{above} has {len(section)} entries, numbered from 0, and no {name!r}"
            return [Problem(f"--set {override}", f"{message}; set one of these, or {above} whole")]
        place = int(name) if isinstance(section, list) else name
        if depth == len(names) - 1:
            section[place] = value
            break
        inner = value_at(section, name)
        if not isinstance(inner, dict | list):
            here = ".".join(names[: depth + 1])
            if inner is not None and section_model(here) is None:
                message = f"{here} is {inner!r}, which has no keys; set it whole"
                return [Problem(f"--set {override}", message)]
            inner = section[place] = {}
        section = inner
    _spelled_out(data)
    return []


def _spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """The data with sections in their long form, in place: overrides and errors speak of that."""
    if "prompts" in data:
        data["prompts"] = spell_out_prompts(data["prompts"])
    return data


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out; loads back to the same.

    Credentials are left out: a copy is for reading and comparing, and nobody runs it.
    """
    told = redacted(config.model_dump(mode="json"))
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def identity_fields(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The settings that make a run this run and not another: dotted key to JSON value."""
    values: dict[str, Any] = {}
    dumped = redacted(config.model_dump(mode="json"))  # An earlier run's copy has no credentials.
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        extra = info.json_schema_extra
        if isinstance(value, BaseModel) and section_model(f"{prefix}{name}") is not None:
            values |= identity_fields(value, f"{prefix}{name}.")
        elif isinstance(extra, dict) and extra.get("kind") == "identity":
            values[f"{prefix}{name}"] = dumped[name]
    return values


def compare_identity(old: BaseModel, new: BaseModel) -> list[str]:
    """What makes ``new`` another run than ``old``, one line a setting; empty if nothing does."""
    before, after = identity_fields(old), identity_fields(new)
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _take_out(data: dict[str, Any], item: Any, whole: bool) -> set[str]:
    """Remove what one error refuses, in place; return the names whose values are now made up."""
    if not item["loc"]:  # a rule between sections: both sides of the only one there is
        _stand_in(data, "objective")
        _stand_in(data, "signal")
        return {"objective", "signal"}
    unknown = item["type"] == "extra_forbidden"
    first, *rest = dotted(item).split(".")
    if whole or not rest or not isinstance(data.get(first), dict):
        _stand_in(data, first)
        return set() if unknown and not whole else {first}
    names = [first, *rest]
    for depth in range(len(rest), 0, -1):
        section = value_at(data, ".".join(names[:depth]))
        if isinstance(section, dict):  # an entry of a list goes with the list
            section.pop(names[depth], None)  # gone where several errors are about one value
            break
    return set() if unknown else {".".join(names[: depth + 1])}


def _stand_in(data: dict[str, Any], section: str) -> None:
    if section in STAND_INS:
        data[section] = deepcopy(STAND_INS[section])
    else:
        data.pop(section, None)


def _with_line(where: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return where if mark is None else f"{where}, line {mark.line + 1}"


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping of ``node``; raises ConstructorError on a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice; keep one", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as text, since it wants a dot and a sign.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except ValueError as error:  # A day that no month has.
        raise yaml.YAMLError(str(error)) from None
