"""``driver.py lineage``: who taught a student, and who taught its teachers, by its folder alone.
``driver.py push``: the student goes to the Hugging Face Hub, with these papers.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from raystill.base.console import open_named, print_lines
from raystill.base.errors import RunError, config_error
from raystill.base.redact import redact
from raystill.base.run_folder import CONFIG, STUDENT, RunFolder, require_path
from raystill.cluster.check.terms import describe, of_lineage
from raystill.cluster.commands.as_json import print_json
from raystill.cluster.lineage.graph import (
    LINEAGE,
    BrokenLineage,
    Lineage,
    Model,
    lineage_of,
    read_lineage,
)
from raystill.cluster.lineage.hub import push_student
from raystill.config.load import load_config
from raystill.config.training import HubConfig
from raystill.model.files import ModelFolder
from raystill.model.identity import teacher_identity

CHANGED = "the weights, configuration or tokenizer are not those that the lineage was written for"
EXIT_CHANGED = 1
MOST_OF_TREE, MOST_OF_TERMS = 2400, 1200
"""Characters of what a person is shown; ``--json`` has it whole."""


def lineage_command(folder: str, as_json: bool) -> int:
    """Print the lineage of the student in a folder, or in a run folder; 1 where it was changed.

    Raises RunError.
    """
    path = Path(os.path.expanduser(require_path(folder)))
    path = path / STUDENT if (path / STUDENT / LINEAGE).is_file() else path
    try:
        lineage = read_lineage(path)
    except BrokenLineage as error:
        raise RunError(f"{path / LINEAGE} {error}; it was not written by this program") from None
    if lineage is None:
        raise RunError(
            f"{path} has no {LINEAGE}; name the folder of a student, or of a finished run"
        )
    changed = _is_changed(path, lineage)
    terms = describe(of_lineage(ModelFolder(str(path), path)))
    if as_json:
        print_json({**lineage_json(lineage), "changed": changed, "terms": terms})
    else:
        print_lines(tree(lineage), MOST_OF_TREE)
        print_lines(terms, MOST_OF_TERMS)
        if changed:
            print(f"warning: {CHANGED}")
    return EXIT_CHANGED if changed else 0


def push_command(
    run_folder: str, repo: str | None, public: bool, replace: bool, as_json: bool
) -> int:
    """Push the student of a finished run, and print where it is. Raises RunError, ConfigError."""
    folder = open_named(run_folder)
    hub = _hub_of(folder, repo, public)
    record = push_student(folder, hub, replace)
    if as_json:
        print_json(record)
    else:
        print(redact(f"{record['sent']} of {record['files']} files sent: {record['url']}"))
    return 0


def _hub_of(folder: RunFolder, repo: str | None, public: bool) -> HubConfig:
    """What the run file says, and what the command line says instead."""
    named = None
    if folder.exists(CONFIG):
        named = load_config(folder.join(CONFIG), []).output.hub
    if repo is None and named is None:
        raise config_error(
            "--to", f"is not given, and {folder.path} names no output.hub; set it to OWNER/NAME"
        )
    private = named.private if named is not None else True
    try:
        name = repo if repo is not None or named is None else named.repo
        return HubConfig.model_validate({"repo": name, "private": private and not public})
    except ValueError:
        message = f"is {repo!r}; expected OWNER/NAME of letters, digits, '-', '_', '.'"
        raise config_error("--to", message) from None


def lineage_json(lineage: Lineage) -> dict[str, object]:
    """The content of the file, checked."""
    import json

    content: dict[str, object] = json.loads(lineage.to_json())
    assert lineage_of(content) == lineage
    return content


def tree(lineage: Lineage) -> Iterator[str]:
    """A line a model, indented below what it taught; one that was shown already is not repeated."""
    left = [(0, "", lineage.student)]
    shown: set[str] = set()
    while left:
        depth, how, name = left.pop()
        model = lineage.models[name]
        again = " (see above)" if name in shown and model.parents else ""
        yield "  " * depth + how + _line(model) + again
        if name in shown:
            continue
        shown.add(name)
        if model.learned_from:
            data = ", ".join(model.data) or "prompts that are not recorded"
            yield "  " * (depth + 1) + f"on: {data}"
        parents = [(depth + 1, "taught by ", one) for one in model.learned_from]
        if model.started_from is not None:
            how = "weights of " if model.learned_from else "made from "
            parents.append((depth + 1, how, model.started_from))
        left += reversed(parents)


def _line(model: Model) -> str:
    facts = [model.licence or "licence not stated"]
    facts += [f"through {model.route}"] if model.route else []
    facts += [f"revision {model.revision}"] if model.revision else []
    facts += [f"on {model.made['on'][:10]}"] if model.made.get("on") else []
    facts += [f"read as {model.made['verdict']}"] if model.made.get("verdict") else []
    identity = f", {model.id[:12]}" if model.id != model.name else ""
    return f"{model.name}{identity} ({'; '.join(facts)})"


def _is_changed(folder: Path, lineage: Lineage) -> bool:
    """Whether the folder's files are not those of the lineage's student, as far as is known."""
    try:
        return len(lineage.student) == 64 and teacher_identity(folder) != lineage.student
    except (OSError, ValueError):  # Papers without weights.
        return False
