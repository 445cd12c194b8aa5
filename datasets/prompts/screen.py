"""What should not be learned from prompts: personal data and keys, what is measured on, nothing.

Personal data is counted, masked, or its prompts are left out. Overlap with held-out prompts and
with benchmarks is counted, and refused above a limit.

Looked at is what teacher and student read: the prompt, a given response, and what the teacher alone
reads. Masked is all that is kept of a row, also the fields that filters and checks read.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raystill.base import personal
from raystill.base.errors import ConfigError, Problem, config_error
from raystill.config.prompts import PersonalDataAction, PromptsConfig
from raystill.datasets.overlap.ngrams import Items
from raystill.datasets.prompts.control import texts_of, with_texts
from raystill.datasets.prompts.files import (
    UNREADABLE,
    PromptFile,
    PromptSource,
    find_files,
    why_unreadable,
)
from raystill.datasets.prompts.formats import READERS, BrokenRow
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.spool.spool import Spool

UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Categories of Unicode whose characters leave nothing to read."""


@dataclass(frozen=True)
class PersonalData:
    """What prompts hold, by the forms of ``base/personal.py``.

    ``action``: what was done with it. ``num_read``: prompts looked at; ``num_prompts``: those that
    hold any; ``kinds``: those that hold each kind. No text of a prompt is in it.
    """

    action: PersonalDataAction
    num_read: int
    num_prompts: int
    kinds: Mapping[str, int]

    def line(self) -> str:
        """One line for a person, without any of the texts."""
        done = {"count": "kept as they are", "mask": "masked", "drop": "left out"}[self.action]
        if not self.num_prompts:
            return f"personal data and keys: found in none of {self.num_read:,} prompts"
        return (
            f"personal data and keys: in {self.num_prompts:,} of {self.num_read:,} prompts "
            f"({personal.told(self.kinds)}), {done}"
        )

    def record(self) -> dict[str, Any]:
        """For the manifest and for programs."""
        return {
            "action": self.action,
            "prompts_read": self.num_read,
            "prompts": self.num_prompts,
            "kinds": dict(sorted(self.kinds.items())),
        }


def screen_personal(
    raws: Spool[RawPrompt], action: PersonalDataAction | None
) -> tuple[Spool[RawPrompt], PersonalData | None]:
    """The prompts as ``prompts.personal_data`` wants them, and what they held; None: not looked at.

    Raises ConfigError where every prompt would be left out.
    """
    if action is None:
        return raws, None
    kinds: Counter[str] = Counter()
    num_prompts = 0
    left: Spool[RawPrompt] = Spool()
    for chunk in raws.chunks():
        held = personal.kinds_in(["\n".join(_read_texts(raw)) for raw in chunk])
        kinds.update(kind for each in held for kind in each)
        num_prompts += sum(map(bool, held))
        if action == "mask":
            left.extend(_all_masked(chunk, held))
        elif action == "drop":
            left.extend(raw for raw, each in zip(chunk, held, strict=True) if not each)
    found = PersonalData(action, len(raws), num_prompts, dict(kinds))
    if action == "drop" and num_prompts and not left:
        raise config_error(
            "prompts.personal_data",
            f"is 'drop', and each of the {len(raws)} prompts holds personal data or keys "
            f"({personal.told(kinds)}); set it to mask or count, or name other files",
        )
    return raws if action == "count" else left, found


def _read_texts(raw: RawPrompt) -> list[str]:
    """What teacher or student read of a row."""
    said = (raw.text, raw.messages, raw.response, raw.teacher_messages)
    return [text for one in said for text in texts_of(one, keys=True)]


def _all_masked(raws: Sequence[RawPrompt], held: Sequence[frozenset[str]]) -> list[RawPrompt]:
    """The prompts with marks in place of what was found. ConfigError for what cannot be read."""
    masked = []
    for raw, each in zip(raws, held, strict=True):
        try:
            masked.append(_kept_masked(_masked(raw) if each else raw))
        except RecursionError:
            message = "is nested too deeply for prompts.personal_data: mask; flatten or remove it"
            raise ConfigError([Problem(raw.where, message)]) from None
    return masked


def _masked(raw: RawPrompt) -> RawPrompt:
    """The prompt with marks in what teacher and student read."""
    text, messages, response, more = (
        with_texts(one, personal.mask, keys=True)
        for one in (raw.text, raw.messages, raw.response, raw.teacher_messages)
    )
    return replace(raw, text=text, messages=messages, response=response, teacher_messages=more)


def _kept_masked(raw: RawPrompt) -> RawPrompt:
    """The same for the fields that are kept for filters and checks."""
    if not raw.fields and not any(raw.columns):
        return raw
    columns = tuple(
        None if one is None else json.dumps(_mask_all(json.loads(one))) for one in raw.columns
    )
    return replace(raw, columns=columns, fields=raw.fields and _mask_all(raw.fields))


def _mask_all(value: Any) -> Any:
    """A value of JSON with all its texts masked, names of fields too."""
    if isinstance(value, str):
        return personal.mask(value)
    if isinstance(value, dict):
        return {_mask_all(name): _mask_all(inner) for name, inner in value.items()}
    return [_mask_all(inner) for inner in value] if isinstance(value, list | tuple) else value


def is_blank(raw: RawPrompt) -> bool:
    """Whether a prompt asks nothing, of the student or of the teacher."""
    if raw.teacher_messages is not None and _ask_nothing(raw.teacher_messages):
        return True
    return says_nothing(raw.text or "") if raw.messages is None else _ask_nothing(raw.messages)


def _ask_nothing(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether there are messages of the user, and none has a text that says anything."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return bool(asked) and all(says_nothing(text) for one in asked for text in texts_of(one))


def says_nothing(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, control and format characters."""
    text = text.strip()
    if text and text[0].isprintable():  # So begin nearly all.
        return False
    return all(unicodedata.category(character) in UNSEEN for character in text)


HELD_OUT = "held-out prompts"


@dataclass(frozen=True)
class Overlap:
    """How many of some items are contained in training prompts.

    ``name``: a file of a benchmark, or HELD_OUT. ``first``: where the first contained item is, and
    the training prompt that has its words; empty without one.
    """

    name: str
    items: int
    contained: int
    first: str = ""

    def line(self) -> str:
        """One line for a person, without any of the texts."""
        first = f"; the first is {self.first}" if self.contained else ""
        return f"overlap: {self.contained:,} of {self.items:,} {self._of()}{first}"

    def _of(self) -> str:
        whose = HELD_OUT if self.name == HELD_OUT else f"rows of {self.name}"
        return f"{whose} are contained in training prompts"

    def record(self) -> dict[str, Any]:
        """For the manifest and for programs."""
        return {"name": self.name, "items": self.items, "contained": self.contained}


def count_overlap(
    prompts: PromptsConfig, trained: Sequence[RawPrompt], held_out: Sequence[RawPrompt]
) -> list[Overlap]:
    """Overlap of the training prompts with the held-out ones and with each file of benchmarks.

    Raises ConfigError for files that cannot be read, and where it is above
    ``prompts.overlap.max_fraction``.
    """
    overlap = prompts.overlap
    sets: list[tuple[str, list[str], Items]] = []
    if held_out:
        own = [_asked_texts(raw) for raw in held_out]
        sets.append((HELD_OUT, [raw.where for raw in held_out], Items(own, overlap.ngram)))
    for file, rows in _benchmarks(prompts):
        texts = [_texts_of_row(row, where) for where, row in rows]
        sets.append((file.name, [where for where, _ in rows], Items(texts, overlap.ngram)))
    if not sets:
        return []
    for _, _, items in sets:
        items.look_in("\n".join(_asked_texts(raw)) for raw in trained)
    found = []
    for name, places, items in sets:
        shares, firsts = items.shares()
        contained = [n for n, share in enumerate(shares) if share >= overlap.min_share]
        first = ""
        if contained:
            first = f"{places[contained[0]]}, by {trained[firsts[contained[0]]].where}"
        found.append(Overlap(name, len(items), len(contained), first))
    limit = overlap.max_fraction
    problems = [
        Problem(
            "prompts.overlap.max_fraction",
            f"is {limit:g}, but {one.contained} of {one.items} {one._of()} ({overlap.ngram}-grams "
            f"of words; the first is {one.first}); remove these training prompts, or raise it",
        )
        for one in found
        if limit is not None and one.contained > limit * one.items
    ]
    if problems:
        raise ConfigError(problems)
    return found


def _asked_texts(raw: RawPrompt) -> list[str]:
    """What the student reads of a row, and the response that came with it."""
    asked = [m for m in raw.messages or () if m["role"] not in ("system", "developer")]
    return [text for one in (raw.text, asked, raw.response) for text in texts_of(one)]


def _benchmarks(prompts: PromptsConfig) -> list[tuple[PromptFile, list[tuple[str, Any]]]]:
    """The rows of each file of ``prompts.overlap.path``, each after its place."""
    path = prompts.overlap.path
    if not path:
        return []
    paths = (path,) if isinstance(path, str) else path
    names = ("prompt", "messages", None, "source", None)
    files, problems = find_files(
        PromptSource("prompts.overlap", None, paths, prompts.overlap.format, *names)
    )
    read = [(file, _rows(file, problems)) for file in files]
    problems += [
        Problem(file.name, "holds no rows; expected a benchmark's")
        for file, rows in read
        if not rows and not any(problem.where.startswith(file.name) for problem in problems)
    ]
    if problems:
        raise ConfigError(problems)
    return read


def _rows(file: PromptFile, problems: list[Problem]) -> list[tuple[str, Any]]:
    """The rows of a file, whatever their fields; adds what is wrong with it to ``problems``."""
    try:
        rows = list(READERS[file.format](file))
    except UNREADABLE as error:
        problems.append(Problem(file.name, why_unreadable(file.format, error)))
        return []
    broken = [(where, row) for where, row in rows if isinstance(row, BrokenRow)]
    problems += [Problem(where, str(row)) for where, row in broken[:3]]
    return [(where, row) for where, row in rows if not isinstance(row, BrokenRow)]


def _texts_of_row(row: Any, where: str) -> list[str]:
    try:
        return list(texts_of(row))
    except RecursionError:
        raise ConfigError([Problem(where, "is nested too deeply; flatten or remove it")]) from None
