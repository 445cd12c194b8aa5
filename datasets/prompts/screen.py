"""Personal data and keys in prompts: counted, masked, or their prompts left out.

Looked at is what teacher and student read: the prompt, a given response, and what the teacher alone
reads. Masked is all that is kept of a row, also the fields that filters and checks read.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raystill.base import personal
from raystill.base.errors import config_error
from raystill.config.prompts import PersonalDataAction
from raystill.datasets.prompts.control import texts_of, with_texts
from raystill.datasets.prompts.read import RawPrompt


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
    raws: list[RawPrompt], action: PersonalDataAction | None
) -> tuple[list[RawPrompt], PersonalData | None]:
    """The prompts as ``prompts.personal_data`` wants them, and what they held; None: not looked at.

    Raises ConfigError where every prompt would be left out.
    """
    if action is None:
        return raws, None
    held = personal.kinds_in(["\n".join(_read_texts(raw)) for raw in raws])
    kinds = Counter(kind for each in held for kind in each)
    found = PersonalData(action, len(raws), sum(map(bool, held)), dict(kinds))
    if action == "mask":
        return [_masked(raw) if each else _kept_masked(raw) for raw, each in _pairs(raws, held)], (
            found
        )
    if action == "drop" and found.num_prompts:
        left = [raw for raw, each in _pairs(raws, held) if not each]
        if not left:
            raise config_error(
                "prompts.personal_data",
                f"is 'drop', and each of the {len(raws)} prompts holds personal data or keys "
                f"({personal.told(kinds)}); set it to mask or count, or name other files",
            )
        return left, found
    return raws, found


def _pairs(
    raws: Sequence[RawPrompt], held: Sequence[frozenset[str]]
) -> "zip[tuple[RawPrompt, frozenset[str]]]":
    return zip(raws, held, strict=True)


def _read_texts(raw: RawPrompt) -> list[str]:
    """What teacher or student read of a row."""
    said = (raw.text, raw.messages, raw.response, raw.teacher_messages)
    return [text for one in said for text in texts_of(one)]


def _masked(raw: RawPrompt) -> RawPrompt:
    """The prompt with marks in place of what was found."""
    text, messages, response, more = (
        with_texts(one, personal.mask)
        for one in (raw.text, raw.messages, raw.response, raw.teacher_messages)
    )
    masked = replace(raw, text=text, messages=messages, response=response, teacher_messages=more)
    return _kept_masked(masked)


def _kept_masked(raw: RawPrompt) -> RawPrompt:
    """The same for the fields that are kept for filters and checks."""
    if not raw.fields and not any(raw.columns):
        return raw
    columns = tuple(
        None if one is None else json.dumps(with_texts(json.loads(one), personal.mask))
        for one in raw.columns
    )
    fields = None if raw.fields is None else with_texts(raw.fields, personal.mask)
    return replace(raw, columns=columns, fields=fields)
