"""Fields of the prompt files that filters read: a row for each training row, in a file of its own.

They stay out of the prompt tables, which the source reads and sends: the answer stage looks them up
by row number, and a run whose filters read no field has no such file.

Legend: P training prompts, N training rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem
from raystill.config.stream import FilterConfig
from raystill.datasets.prompts.read import RawPrompt

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
        values = pa.array([prompt.columns[place] for prompt in prompts], pa.string())
        column = pa.DictionaryArray.from_arrays(of_prompt, values)
        table[PREFIX + name] = column
    return pa.table(table)


def _require_usable(config: "RunConfig", prompts: Sequence[RawPrompt]) -> None:
    """ConfigError for filters that these training prompts leave nothing to decide by."""
    sources = {prompt.source for prompt in prompts}
    problems = []
    for number, rule in enumerate(config.filters.rules):
        for source in sorted(set(rule.sources or ()) - sources):
            listed = ", ".join(sorted(sources)[:30])
            message = (
                f"{source!r} is no source of the training prompts ({listed}); name one of them"
            )
            problems.append(Problem(f"filters.rules.{number}.sources", message))
        lacking = _without_reference(config, rule, prompts)
        if lacking:
            assert rule.answer is not None
            problems.append(
                Problem(
                    f"filters.rules.{number}.answer.column",
                    f"is {rule.answer.column!r}, which {len(lacking)} of {len(prompts)} training "
                    f"prompts do not have (the first is {lacking[0].where}); name the field with "
                    "the reference, or limit the filter to sources that have it (sources: [...])",
                )
            )
    if problems:
        raise ConfigError(problems)


def _without_reference(
    config: "RunConfig", rule: FilterConfig, prompts: Sequence[RawPrompt]
) -> list[RawPrompt]:
    if rule.answer is None:
        return []
    place = config.filters.columns.index(rule.answer.column)
    return [
        prompt
        for prompt in prompts
        if (rule.sources is None or prompt.source in rule.sources) and not prompt.columns[place]
    ]
