"""The lineage of a student: which models and services it learned from, back through generations.

``lineage.json`` lies in a student's folder. It names every model of its ancestry once, by an id, so
that its size grows with the number of models and not with the number of ways to them. The file of a
teacher is read by the check of the next run, and goes into the next student's own.

Such a file comes from whoever made the folder. It can only add sources, and with them duties.
Imports the standard library only.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

LINEAGE = "lineage.json"
VERSION = 1
MOST_BYTES = 4 << 20
MOST_MODELS = 1000
LONGEST_TEXT = 500
"""Limits of a file that is read, in characters for a text of it."""


class BrokenLineage(ValueError):
    """A lineage file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Model:
    """One model or service of a lineage.

    id: a model's identity, else its name. route: the host of a service, None for weights.
    learned_from, started_from: ids of its teachers, and of the model whose weights it began with.
    data, data_licences: names of the prompts, and the licences that were stated of them. made: what
    the run that made it says of itself, in texts.
    """

    id: str
    name: str
    licence: str | None = None
    licence_sha256: str | None = None
    revision: str | None = None
    route: str | None = None
    learned_from: tuple[str, ...] = ()
    started_from: str | None = None
    data: tuple[str, ...] = ()
    data_licences: tuple[str, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict)

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of all that it comes from, without duplicates."""
        started = () if self.started_from is None else (self.started_from,)
        return tuple(dict.fromkeys((*self.learned_from, *started)))


@dataclass(frozen=True)
class Lineage:
    """The models of a student's ancestry by id, the student included."""

    student: str
    models: Mapping[str, Model]

    def ancestors(self) -> Iterator[Model]:
        """All models but the student, in the order of their ids."""
        return (self.models[name] for name in sorted(self.models) if name != self.student)

    def teaches(self, name: str) -> bool:
        """Whether another model of the lineage learned from this one's outputs."""
        return any(name in model.learned_from for model in self.models.values())

    def to_json(self) -> str:
        """The text of ``lineage.json``."""
        models = {name: asdict(self.models[name]) for name in sorted(self.models)}
        content = {"raystill_lineage": VERSION, "student": self.student, "models": models}
        return json.dumps(content, indent=2) + "\n"


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of the model in a folder; None where it has no such file. Raises BrokenLineage.

    Models that the student does not come from are left out.
    """
    path = folder / LINEAGE
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BrokenLineage(f"cannot be read ({error.strerror})") from error
    if len(data) > MOST_BYTES:
        raise BrokenLineage(f"is larger than {MOST_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenLineage("is no JSON") from None
    return lineage_of(content)


def lineage_of(content: Any) -> Lineage:
    """The lineage in the content of a file. Raises BrokenLineage."""
    if not isinstance(content, dict) or content.get("raystill_lineage") != VERSION:
        raise BrokenLineage(f"is no lineage of version {VERSION}")
    entries = content.get("models")
    if not isinstance(entries, dict) or not 0 < len(entries) <= MOST_MODELS:
        raise BrokenLineage(f"must have 1 to {MOST_MODELS} models")
    models = {name: _model(name, entry) for name, entry in entries.items()}
    student = content.get("student")
    if not isinstance(student, str) or student not in models:
        raise BrokenLineage("names no student of its models")
    for model in models.values():
        if missing := [name for name in model.parents if name not in models]:
            raise BrokenLineage(f"does not describe {missing[0]!r}, from which a model comes")
    try:
        TopologicalSorter({n: m.parents for n, m in models.items()}).prepare()
    except CycleError:
        raise BrokenLineage("has a model that comes from itself") from None
    return Lineage(student, _reached(student, models))


def _reached(student: str, models: Mapping[str, Model]) -> dict[str, Model]:
    found: dict[str, Model] = {}
    left = [student]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = models[name]
            left += models[name].parents
    return found


def _model(name: Any, entry: Any) -> Model:
    if not isinstance(entry, dict):
        raise BrokenLineage("has a model that is no object")
    texts = {n: _text(entry.get(n)) for n in ("licence", "licence_sha256", "revision", "route")}
    made = entry.get("made") or {}
    if not isinstance(made, dict) or len(made) > 50:
        raise BrokenLineage("has a model whose making is no short list of texts")
    return Model(
        id=_text(name) or "",
        name=_text(entry.get("name")) or "",
        learned_from=_texts(entry.get("learned_from")),
        started_from=_text(entry.get("started_from")),
        data=_texts(entry.get("data")),
        data_licences=_texts(entry.get("data_licences")),
        made={_text(n) or "": _text(value) or "" for n, value in made.items()},
        **texts,
    )


def clean(text: str | None) -> str | None:
    """A text as a lineage takes it: in one line, without control characters, not too long."""
    if text is None:
        return None
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST_TEXT]


def _text(value: Any) -> str | None:
    """A text in one line without control characters. Raises BrokenLineage for something else."""
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or not value.isprintable():
        raise BrokenLineage("has a value that is no short text in one line")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) > MOST_MODELS:
        raise BrokenLineage("has a value that is no list of texts")
    return tuple(_text(value) or "" for value in values)
