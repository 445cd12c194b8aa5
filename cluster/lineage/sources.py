"""What a run's manifest says of the sources of its student; the papers are made of it alone.

Imports the standard library, yaml and the configuration only.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from raystill.base.records import read_bounded
from raystill.cluster.lineage.graph import BrokenLineage, Model, read_lineage
from raystill.config.load import parse_yaml
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
HUB_DATA = "hf://datasets/"
LARGEST_TEXT = 4 << 20
"""Bytes of a model's card or licence; a larger one counts as none."""


def sources(
    config: RunConfig,
    teacher: ModelFolder | None,
    student: ModelFolder | None,
    licences: Mapping[str, str | None],
    route: str | None,
) -> dict[str, Any]:
    """The teacher, the model that the student's weights began with, the prompts, and all models
    that these come from in turn.

    licences: the licence ids of ``teacher`` and ``base``. route: host of the teacher's service;
    None for weights, and for a server of one's own, whose name is nobody else's to know. The
    teacher's identity is in the manifest already; a base is known by its name, or by the identity
    in its own lineage file.
    """
    by_id: dict[str, Model] = {}
    taught: Model | None = None
    if config.teacher.engine == "api":
        taught = Model("", f"{config.teacher.api.model}", licences["teacher"], route=route)
    elif config.teacher.engine == "vllm":
        taught = _described(config.teacher.model, teacher, licences["teacher"], by_id)
        taught = replace(taught, revision=config.teacher.revision)
    base: Model | None = None
    if config.student.model is not None:
        base = _described(config.student.model, student, licences["base"], by_id)
        base = replace(base, revision=config.student.revision)
    return {
        "teacher": None if taught is None else asdict(taught),
        "teacher_hub_id": _hub_id(config.teacher.model)
        if config.teacher.engine == "vllm"
        else None,
        "base": None if base is None else asdict(base),
        "base_hub_id": _hub_id(config.student.model),
        "starts_from_teacher": config.student.init == "from_teacher"
        and config.teacher.engine == "vllm",
        "prompts": _prompts(config),
        "prompts_licences": sorted({licence for _, licence in config.prompts.licences()}),
        "ancestors": {name: asdict(by_id[name]) for name in sorted(by_id)},
    }


def _described(
    name: str, folder: ModelFolder | None, licence: str | None, by_id: dict[str, Model]
) -> Model:
    """A model with weights; its own ancestors are added to ``by_id``.

    What its lineage file says of it is an ancestor too: the weights may have been changed since.
    """
    lineage = None
    if folder is not None:
        try:
            lineage = read_lineage(folder.path)
        except BrokenLineage:  # The check has told of it.
            lineage = None
    shown = name if _hub_id(name) else os.path.basename(name.rstrip("/"))
    model = Model(name, shown, licence, _licence_hash(folder))
    if lineage is None:
        return model
    by_id.update(lineage.models)
    return replace(model, started_from=lineage.student)


def _licence_hash(folder: ModelFolder | None) -> str | None:
    """sha256 of a model's licence text; None: it has none, or one without an end."""
    for name in LICENCE_FILES:
        if folder is not None and (path := folder.path / name).is_file():
            try:
                return hashlib.sha256(read_bounded(path, LARGEST_TEXT)).hexdigest()
            except OSError:
                return None
    return None


def _hub_id(name: str | None) -> str | None:
    """The name, where it is one on the Hugging Face Hub and not a folder."""
    if name is None or os.path.exists(os.path.expanduser(name)) or name.count("/") != 1:
        return None
    return None if name.startswith((".", "/", "~")) else name


def _prompts(config: RunConfig) -> list[str]:
    """Names of the prompt files: a data set's id on the Hub, else the file's own name."""
    prompts = config.prompts
    settings = [prompts] if prompts.sources is None else list(prompts.sources)
    paths: list[str] = []
    for one in settings:
        paths += [one.path] if isinstance(one.path, str) else list(one.path or ())
    return sorted({_data_name(path) for path in paths})


def _data_name(path: str) -> str:
    if path.startswith(HUB_DATA):
        return HUB_DATA + "/".join(path.removeprefix(HUB_DATA).split("/")[:2]).partition("@")[0]
    return os.path.basename(path.partition("?")[0].rstrip("/")) or "prompts"


def licence_of(model: ModelFolder | None) -> str | None:
    """The licence id of a model's card, or by the first words of its LICENSE; None: not stated."""
    if model is None:
        return None
    card = _front_matter(model.path / "README.md")
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name")
    if isinstance(licence, list):
        licence = licence[0] if len(licence) == 1 else None
    if licence is not None:
        return str(licence)
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (model.path / name).is_file():
            begin = _text(model.path / name)[:400]
            if "Apache License" in begin and "Version 2.0" in begin:
                return "apache-2.0"
            return "mit" if begin.lstrip().startswith("MIT License") else None
    return None


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; {} without one, or where it is broken."""
    text = _text(path)
    if not text.startswith("---"):
        return {}
    try:
        card = parse_yaml(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _text(path: Path) -> str:
    """A text that comes with a model; empty where there is none, or one of any length."""
    try:
        return read_bounded(path, LARGEST_TEXT).decode("utf-8", errors="replace")
    except OSError:
        return ""


def wrong_name(duties: Iterable[tuple[str, str]], repo: str) -> str | None:
    """Why a student with these duties must not be handed on under a name; None: it may."""
    owner, _, own = repo.partition("/")
    for kind, value in sorted(duties):
        prefix = value.replace(" ", "-")
        if kind == "name_prefix" and not own.lower().startswith(prefix.lower()):
            return (
                f"is {repo!r}, but a licence asks for a name that begins with {value}, such as "
                f"{owner}/{prefix}-{own}"
            )
    return None
