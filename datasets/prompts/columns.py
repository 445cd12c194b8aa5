"""Fields of the prompt files, in files of their own: those that filters read, a row for each
training row; and all of the held-out prompts', where checks of their answers ask for them.

They stay out of the prompt tables, which the source reads and sends: the answer stage looks them up
by row number, and a run whose filters read no field has no such file.

Legend: P training prompts, N training rows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem
from raystill.base.redact import shown_value
from raystill.config.stream import FilterConfig
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.spool.spool import CHUNK_ROWS

if TYPE_CHECKING:
    from raystill.config.run import RunConfig

PREFIX = "field "
"""Stands before the name of a field, which so is never that of the column ``row``."""


def filter_columns(
    config: "RunConfig", prompts: Sequence[RawPrompt], rows: NDArray[np.int64]
) -> pa.Table | None:
    """The fields that filters read, as JSON text; None where they read none.

    prompts: the training prompts [P]. rows: the prompt of each training row, [N]. Columns: ``row``
    int64, and for each field ``field NAME``, string as a dictionary, since a prompt may have many
    rows. Raises ConfigError where a filter's source has no prompts, or a prompt lacks a reference.
    """
    _require_usable(config, prompts)
    names = config.filters.columns
    if not names:
        return None
    table = {"row": pa.array(np.arange(len(rows)), pa.int64())}
    of_prompt = pa.array(rows, pa.int32())
    for place, name in enumerate(names):
        values = strings(prompt.columns[place] for prompt in prompts)
        column = pa.DictionaryArray.from_arrays(of_prompt, values)
        table[PREFIX + name] = column
    return pa.table(table)


def strings(values: Iterable[str | None]) -> pa.StringArray:
    """An Arrow array of them, without all being Python objects at once."""
    rest = iter(values)
    parts = [pa.array([], pa.string())]
    while batch := list(islice(rest, CHUNK_ROWS)):
        parts.append(pa.array(batch, pa.string()))
    return pa.concat_arrays(parts)


def held_out_fields(prompts: Sequence[RawPrompt]) -> pa.Table:
    """``row`` int64, ``prompt`` in words, and ``fields``: those of its row as a JSON object."""
    columns = {
        "row": pa.array(np.arange(len(prompts)), pa.int64()),
        "prompt": pa.array([_words(prompt) for prompt in prompts], pa.string()),
        "fields": pa.array([json.dumps(p.fields or {}, default=str) for p in prompts], pa.string()),
    }
    return pa.table(columns)


def _words(prompt: RawPrompt) -> str:
    """The prompt's text; of a chat the last message's, as JSON where it has parts."""
    content = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")  # Half a surrogate pair is no UTF-8.


def _require_usable(config: "RunConfig", prompts: Sequence[RawPrompt]) -> None:
    """ConfigError for filters that these training prompts leave nothing to decide by."""
    sources = {prompt.source for prompt in prompts} if config.filters.rules else set()
    problems = [*_why_not_compared(config), *_why_not_masked(config)]
    for number, rule in enumerate(config.filters.rules):
        for source in sorted(set(rule.sources or ()) - sources):
            listed = ", ".join(sorted(sources)[:30])
            message = (
                f"{source!r} is no source of the training prompts ({listed}); name one of them"
            )
            problems.append(Problem(f"filters.rules.{number}.sources", message))
        lacking, first = _without_reference(config, rule, prompts)
        if lacking:
            assert rule.answer is not None
            problems.append(
                Problem(
                    f"filters.rules.{number}.answer.column",
                    f"is {rule.answer.column!r}, which {lacking} of {len(prompts)} training "
                    f"prompts do not have (the first is {first}); name the field with "
                    "the reference, or limit the filter to sources that have it (sources: [...])",
                )
            )
        problems += _without_column(config, number, rule, prompts)
    if problems:
        raise ConfigError(problems)


def _without_column(
    config: "RunConfig", number: int, rule: FilterConfig, prompts: Sequence[RawPrompt]
) -> Iterator[Problem]:
    """Fields that a function or a judge is to be given, and no prompt has: names that are wrong."""
    given = [(where, column) for where, function in rule.functions for column in function.columns]
    given += [("judge", column) for column in (rule.judge.columns if rule.judge else ())]
    for where, column in given:
        place = config.filters.columns.index(column)
        asked = (p for p in prompts if rule.sources is None or p.source in rule.sources)
        first = next(asked, None)
        if first is None or first.columns[place] is not None:
            continue
        if all(prompt.columns[place] is None for prompt in asked):
            yield Problem(
                f"filters.rules.{number}.{where}.columns",
                f"has {shown_value(column, 80)}, a field that none of the filter's training "
                "prompts has; name fields of the prompt files, or remove it",
            )


def _is_nothing(field: str | None) -> bool:
    """Whether a field's JSON is of no value; CSV writes "" for it, and pandas NaN."""
    value = None if field is None else json.loads(field)
    if isinstance(value, str):
        return not value.strip()
    return value in (None, [], {}) or value != value


def _without_reference(
    config: "RunConfig", rule: FilterConfig, prompts: Sequence[RawPrompt]
) -> tuple[int, str]:
    """How many prompts lack the reference of a filter, and where the first of them is."""
    lacking, first = 0, ""
    if rule.answer is None:
        return lacking, first
    place = config.filters.columns.index(rule.answer.column)
    for prompt in prompts:
        asked = rule.sources is None or prompt.source in rule.sources
        if asked and _is_nothing(prompt.columns[place]):
            lacking, first = lacking + 1, first or prompt.where
    return lacking, first


def _why_not_masked(config: "RunConfig") -> Iterator[Problem]:
    """Masked answers have no signal of the teacher's: it gave one for what it wrote."""
    for number, rule in enumerate(config.filters.rules):
        masks = rule.personal_data is not None and rule.personal_data.action == "mask"
        if masks and config.signal.kind != "text":
            yield Problem(
                f"filters.rules.{number}.personal_data.action",
                f"is mask, but signal.kind is {config.signal.kind!r}: the teacher's probabilities "
                "are of the tokens that it wrote, and none are of the marks; set action: reject, "
                "or signal.kind: text with objective.cross_entropy alone",
            )


def _why_not_compared(config: "RunConfig") -> Iterator[Problem]:
    """Why the answers to one prompt would not be in one group, where filters compare them."""
    filters, prompts, rows = config.filters, config.prompts, config.stream.group_rows
    if not filters.compares_samples:
        return
    samples, keep = prompts.samples_per_prompt, filters.best.keep if filters.best else 1
    if samples <= keep:
        yield Problem(
            "prompts.samples_per_prompt",
            f"is {samples}, and a filter chooses among the answers to each prompt; set it to "
            f"{keep + 1} or more, or remove the filter",
        )
    elif rows % samples:
        yield Problem(
            "stream.group_rows",
            f"is {rows}, and a filter compares the {samples} answers to each prompt, which must be "
            f"in one group; set it to a multiple of {samples}",
        )
    for number, source in enumerate(prompts.sources or ()):
        if source.weight != 1:
            yield Problem(
                f"prompts.sources.{number}.weight",
                f"is {source.weight:g}, and a filter compares the answers to each prompt, of which "
                "there must be as many for all; set it to 1",
            )
