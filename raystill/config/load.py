"""Load a run file and its overrides as a ``RunConfig``, or list all that is wrong with them.

Imports no torch, ray or vllm.

Validation is lenient: what is wrong is taken out, stand-ins take its place, and the rest is
validated again and can be checked further. Two strict stages, first the schema and then the files,
would need no stand-ins, but would hide problems behind others: a misspelt key those of the prompt
files and models, and a wrong value the rules between values, which pydantic applies only where
every single value is valid.
"""

import re
import stat
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raystill.base.errors import ConfigError, Problem, RunError, shown
from raystill.base.redact import redacted
from raystill.config.base import maps_sections
from raystill.config.describe import dotted, problems_of, section_model, value_at
from raystill.config.prompts import spell_out_prompts
from raystill.config.run import RunConfig
from raystill.config.stream import spell_out_filters

# Stand-ins for required sections that cannot be used, so that the others are still checked.
STAND_INS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "-"},
    "student": {"init": "from_teacher", "layers": [0]},
    "prompts": {"path": "-"},
}


def named_teacher(config: RunConfig, name: str | None) -> str:
    """Which of a run's teachers is meant: its name among several, else "".

    name: as it was given, None where it was not. Raises RunError where it is none of them, or where
    there are several that answer rows and it was not given.
    """
    if config.teachers is None:
        if name is not None:
            raise RunError(f"the teacher {name!r} is named, but the run has one; leave it out")
        return ""
    answering = [one for one in config.teachers if one not in config.only_judges]
    if name is None and len(answering) == 1:
        return answering[0]
    if name not in config.teachers:
        what = "no teacher is named" if name is None else f"{name!r} is none of the teachers"
        raise RunError(f"{what}, and the run has {', '.join(config.teachers)}; name one of them")
    return name


LARGEST_FILE = 2 << 20
"""Bytes of a run file."""
LONGEST_PATH = 200
"""Characters of a file's name in a message."""
MOST_VALUES, DEEPEST = 30_000, 50
"""Values and levels of a YAML text, with every alias written out. 30,000 take a second to read."""


@dataclass
class Loaded:
    """A configuration, and the problems of its run file.

    Without problems ``config`` is that of the run file. Otherwise it has defaults and stand-ins for
    the settings whose dotted names are in ``refused``; no conclusion can be drawn from these. It is
    None if nothing of the file could be used.
    """

    config: RunConfig | None
    problems: list[Problem] = field(default_factory=list)
    refused: frozenset[str] = frozenset()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run file and apply ``a.b=c`` overrides. Raises ConfigError with all problems."""
    loaded = load_leniently(path, overrides)
    if loaded.problems or loaded.config is None:
        raise ConfigError(loaded.problems)
    return loaded.config


def load_leniently(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Like :func:`load_config`, but keep what is usable, so that a check can go on with it."""
    data, problems = read_run_file(path)
    if data is None:
        return Loaded(None, problems)
    for override in overrides:
        problems += apply_override(data, override)
    return validate_leniently(data, problems)


def validate_leniently(data: dict[str, Any], problems: list[Problem]) -> Loaded:
    """Validate; on failure take out what was refused and try again.

    The first time only the refused settings are taken out, later their whole sections.
    """
    data = deepcopy(data)
    refused: set[str] = set()
    for attempt in range(4):  # Single values, rules in a section, rules between sections, success.
        try:
            return Loaded(RunConfig.model_validate(data), problems, frozenset(refused))
        except ValidationError as error:
            # pydantic applies rules between values only once each of them is valid, so a later
            # attempt finds further problems. Where a section has stand-ins, its may be due to them.
            sections = {name.partition(".")[0] for name in refused}
            problems = problems + problems_of(error, data, skip_sections=sections)
            for item in error.errors():
                whole = attempt > 0 or item["type"] in ("value_error", "missing")
                refused |= _take_out(data, item, whole)
    return Loaded(None, problems, frozenset(refused))


def read_run_file(path: str | Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The mapping in the file, or None and the problem with it."""
    where = shown(str(path), LONGEST_PATH)
    try:
        if (problem := _why_not_read(Path(path))) is not None:
            return None, [Problem(where, problem)]
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, [Problem(where, "no such file; name a run file, e.g. configs/quickstart.yaml")]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return None, [Problem(where, f"cannot be read ({reason}); expected a YAML text file")]
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        return None, [Problem(_with_line(where, error), f"is not valid YAML: {_reason(error)}")]
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        return None, [Problem(where, f"is {kind}; expected a mapping of sections (teacher: ...)")]
    return _spelled_out(data), []


def _why_not_read(path: Path) -> str | None:
    """Why a run file is not opened: a pipe would wait for ever, a device has no end."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        kind = "folder" if stat.S_ISDIR(info.st_mode) else "device or pipe"
        return f"is a {kind}; expected a YAML text file"
    if info.st_size > LARGEST_FILE:
        return f"has {info.st_size:,} bytes; expected a run file of at most {LARGEST_FILE:,}"
    return None


def apply_override(data: dict[str, Any], override: str) -> list[Problem]:
    """Set the dotted key of ``a.b=value`` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        return [Problem(f"--set {override}", "expected a dotted key and a value: --set a.b=value")]
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        # Without the value: what stands in it under a secret's name only YAML could tell.
        return [Problem(f"--set {key}", f"the value is not valid YAML: {_reason(error)}")]
    names = key.split(".")
    if len(names) > DEEPEST:
        return [Problem("--set", f"has a key of {len(names):,} levels; expected at most {DEEPEST}")]
    section: Any = data
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        number = int(name) if name.isdecimal() and len(name) < 10 else LARGEST_FILE
        if isinstance(section, list) and number >= len(section):
            there = f"{len(section)} entries, numbered from 0, and no {shown(name, 40)!r}"
            message = f"{above} has {there}; set one of these, or {above} whole"
            return [Problem(f"--set {shown(override, 100)}", message)]
        place = number if isinstance(section, list) else name
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
    """The data with its sections in their long form, to which overrides and errors refer.

    It is changed in place.
    """
    if "prompts" in data:
        data["prompts"] = spell_out_prompts(data["prompts"])
    if "filters" in data:
        data["filters"] = spell_out_filters(data["filters"])
    return data


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML with every default; it loads back to the same.

    Credentials are hidden: such a copy is read and compared, and not run.
    """
    data = redacted(config.model_dump(mode="json"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def identity_fields(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The settings that make it another run if they change: dotted key to JSON value."""
    values: dict[str, Any] = {}
    dumped = redacted(config.model_dump(mode="json"))  # As in the copy of an earlier run.
    for name, info in type(config).model_fields.items():
        if name not in dumped:  # That of `first_of_several`.
            continue
        value = getattr(config, name)
        extra = info.json_schema_extra
        if isinstance(value, dict) and maps_sections(info.annotation):
            for one, section in value.items():
                values |= identity_fields(section, f"{prefix}{name}.{one}.")
        elif isinstance(value, BaseModel) and section_model(f"{prefix}{name}") is not None:
            values |= identity_fields(value, f"{prefix}{name}.")
        elif isinstance(extra, dict) and extra.get("kind") == "identity":
            values[f"{prefix}{name}"] = dumped[name]
    return values


def compare_identity(old: BaseModel, new: BaseModel) -> list[str]:
    """The settings that make ``new`` another run than ``old``, one line each."""
    before, after = identity_fields(old), identity_fields(new)
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _take_out(data: dict[str, Any], item: Any, whole: bool) -> set[str]:
    """Take out of ``data`` what one error refuses; return the names that now have stand-ins.

    ``whole``: take out the whole section. An unknown key leaves no stand-in, as nothing depends on
    it.
    """
    if not item["loc"]:  # The only rule between sections is that of these two.
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
        if isinstance(section, dict):  # Of a list the whole list is taken out, not an entry.
            section.pop(names[depth], None)  # None: an earlier error may be of the same value.
            break
    return set() if unknown else {".".join(names[: depth + 1])}


def _stand_in(data: dict[str, Any], section: str) -> None:
    if section in STAND_INS:
        data[section] = deepcopy(STAND_INS[section])
    else:
        data.pop(section, None)
    prompts = data.get("prompts")
    if section == "teachers":  # Nobody is named any more.
        data["teacher"] = deepcopy(STAND_INS["teacher"])
        named = [prompts, *(value_at(prompts, "sources") or ())]
        for one in filter(lambda one: isinstance(one, dict), named):
            one.pop("teacher", None)
            one.pop("teacher_field", None)
    elif section == "prompts" and data.get("teachers") is not None:
        data[section]["teacher_field"] = "-"


def _with_line(where: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return where if mark is None else f"{where}, line {mark.line + 1}"


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong, without what PyYAML took for a name: it may be a password with a ! or *."""
    reason = str(getattr(error, "problem", None) or error).replace("\n", " ")
    named = re.match(r"found undefined (?:alias|tag handle)|could not .* for the tag", reason)
    if named is None:
        return reason
    return f"{named[0]}; put quotes around a text that begins with *, & or !"


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses a repeated key instead of keeping the last one."""

    _num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises YAMLError for one too many, before the others are read."""
        self._num_nodes += 1
        if self._num_nodes > MOST_VALUES:
            raise yaml.YAMLError(f"has more than {MOST_VALUES:,} values; write fewer")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping of ``node``. Raises ConstructorError for a repeated key."""
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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build the value of ``node``. Raises ConstructorError for a text that is none of its kind.

        The text is not quoted: under this name may be a secret.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, LookupError, TypeError, OverflowError):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "a value begins like a number or a date, or has a tag (!!), and cannot be read as "
                "such; write another one, or put quotes around a text",
                node.start_mark,
            ) from None


# PyYAML follows YAML 1.1, where 1e-4 is text: a number needs a dot, and a sign in its exponent.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    loader = StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_small(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"nested too deeply; expected at most {DEEPEST} levels") from None
    except (ValueError, OverflowError):
        raise yaml.YAMLError("an escape (\\U) names a character that there is not") from None
    finally:
        loader.dispose()


def _require_small(root: yaml.Node) -> None:
    """YAMLError for a text that is small, and what it says is not: by aliases, or by depth."""
    sizes: dict[int, int] = {}

    def size_of(node: yaml.Node, depth: int, above: frozenset[int]) -> int:
        if id(node) in above:
            raise yaml.YAMLError("a value contains itself, by an alias (*name); write it out")
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested too deeply; expected at most {DEEPEST} levels")
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            inner = above | {id(node)}
            parts: list[yaml.Node] = []
            for item in node.value:
                parts += item if isinstance(item, tuple) else [item]
            total = 1 + sum(size_of(part, depth + 1, inner) for part in parts)
            if total > MOST_VALUES:
                raise yaml.YAMLError(
                    f"has more than {MOST_VALUES:,} values when its aliases (*name) are written out"
                )
            sizes[id(node)] = total
        return sizes[id(node)]

    size_of(root, 1, frozenset())
