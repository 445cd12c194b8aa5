"""Personal data and keys in answers: counted in all of them, rejected or masked by a filter.

An answer stays in the store as it was written. Masked is the row that the student gets: its text
with marks, as the tokenizer's ids. No signal of the teacher's is of these ids, so a run that masks
learns from text alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base import personal
from raystill.config.prompts import PersonalFilterConfig
from raystill.config.stream import FiltersConfig
from raystill.datasets.filters.answers import Answers, Int32Array

Encode = Callable[[str], Sequence[int]]
"""From text to token ids; what looks like a special token is text, and none is added."""
HELD = "personal_data/"
"""Begins the names of counters: answers that hold a kind; ``any``: that hold something; ``looked``:
that were looked at."""


def by_personal_data(config: PersonalFilterConfig, answers: Answers) -> NDArray[np.bool_]:
    """Rejects what holds one of the kinds; nothing where it is to be masked, [N]."""
    if config.action == "mask":
        return np.zeros(len(answers), bool)
    kinds = frozenset(config.kinds or personal.KINDS)
    return np.array([bool(held & kinds) for held in personal.kinds_in(answers.texts)], bool)


def counts_of(answers: Answers) -> dict[str, float]:
    """Counters of the answers that hold personal data or keys, by kind."""
    held = [kinds for kinds in personal.kinds_in(answers.texts) if kinds]
    by_kind = Counter(kind for kinds in held for kind in kinds)
    totals: dict[str, float] = {f"{HELD}looked": len(answers), f"{HELD}any": len(held)}
    return totals | {f"{HELD}{kind}": n for kind, n in by_kind.items()}


def masked_ids(
    filters: FiltersConfig, answers: Answers, encode: Encode, kept: NDArray[np.bool_]
) -> pa.ListArray:
    """The response ids of each answer, lists of int32 [T], masked where a filter asks for it.

    kept: the answers to mask, [N]; of the others nothing is read. The stop token stays. The ids of
    an answer in which nothing is found stay as they are.
    """
    places = np.flatnonzero(kept)
    some = answers.take(places)
    texts, changed = list(some.texts), set[int]()
    for rule in filters.rules:
        config = rule.personal_data
        if config is None or config.action != "mask":
            continue
        kinds = config.kinds or personal.KINDS
        found = personal.kinds_in(texts)
        for number in np.flatnonzero(some.of_sources(rule.sources)):
            if not found[number].isdisjoint(kinds):
                texts[number] = personal.mask(texts[number], kinds)
                changed.add(int(number))
    if not changed:
        return answers.ids
    ids = [row.values for row in answers.ids]
    for number in changed:
        written = some.ids[number].values.to_numpy()
        end = written[-1:] if some.finished[number] else written[:0]
        masked: Int32Array = np.append(np.array(encode(texts[number]), np.int32), end)
        ids[places[number]] = masked
    return pa.array(ids, answers.ids.type)
