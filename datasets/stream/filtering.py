"""Filters in the answer stage: what they need of a group's rows, beside the loop that answers them.

*Consumes* a group's prompts and published answers. Filters run in threads of their own, since they
may take long, and the store's look-ups must not wait behind them.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, RunError
from raystill.datasets.filters.answers import Answers
from raystill.datasets.filters.filters import AnswerFilters, ids_of, text_of
from raystill.datasets.filters.personal import counts_of, masked_ids
from raystill.datasets.prompts.columns import PREFIX
from raystill.datasets.prompts.reader import PromptReader
from raystill.datasets.rows.schema import POLICY_VERSION

if TYPE_CHECKING:
    from raystill.datasets.stream.spec import StreamSpec

logger = logging.getLogger(__name__)


class Filtered(NamedTuple):
    """A group's answers as the student gets them, why rows are dropped, string, and counters."""

    answers: pa.Table
    reasons: pa.Array
    counters: dict[str, float]


class GroupFilters:
    """The filters of a run, for groups of the stream; they also count personal data."""

    def __init__(self, spec: "StreamSpec") -> None:
        assert spec.teacher is not None, "there are filters, but no teacher whose tokenizer to use"
        rules = spec.filters.rules
        self._filters = AnswerFilters(spec.filters, spec.function_texts)
        self._decode = text_of(spec.teacher)
        self._encode = ids_of(spec.teacher)
        self._config = spec.filters
        self._counts_personal = spec.counts_personal
        self._masks = any(r.personal_data and r.personal_data.action == "mask" for r in rules)
        self._fields = spec.prompt_columns and PromptReader(spec.prompt_columns, None)
        self._reading = Lock()
        self._threads = ThreadPoolExecutor(spec.filters.function_processes, "filters")

    async def applied(self, prompts: pa.Table, answers: pa.Table, reasons: pa.Array) -> Filtered:
        """The answers, and ``reasons`` with those of filters where there was none."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._applied, prompts, answers, reasons)

    def _applied(self, prompts: pa.Table, answers: pa.Table, reasons: pa.Array) -> Filtered:
        ids, ends = (answers[n].combine_chunks() for n in ("response_ids", "finish_reason"))
        fields = {}
        if self._fields:
            with self._reading:
                table = self._fields.take(prompts["row"].to_numpy())
            fields = {
                name.removeprefix(PREFIX): column.combine_chunks().cast(pa.string())
                for name, column in zip(table.column_names, table.columns, strict=True)
                if name.startswith(PREFIX)
            }
        seen = Answers(
            ids,
            ends,
            prompts["row"].to_numpy(),
            numbered(prompts["prompt_ids"].combine_chunks()),
            prompts["source"].combine_chunks(),
            fields,
            self._decode,
        )
        kept = pc.is_null(reasons).to_numpy(zero_copy_only=False).astype(np.bool_)
        if POLICY_VERSION in answers.column_names:  # They judge what the teacher wrote.
            kept &= pc.is_null(answers[POLICY_VERSION]).to_numpy()
        counters = self._counted(seen.take(np.flatnonzero(kept)))
        reasons = pc.coalesce(reasons, self._filters.rejected(seen, kept))
        kept &= pc.is_null(reasons).to_numpy(zero_copy_only=False).astype(np.bool_)
        if self._masks and kept.any():
            masked = masked_ids(self._config, seen, self._encode, kept)
            place = answers.schema.get_field_index("response_ids")
            masked = masked.cast(answers.schema.field(place).type)
            answers = answers.set_column(place, answers.schema.field(place), masked)
        return Filtered(answers, reasons, counters)

    def _counted(self, answers: Answers) -> dict[str, float]:
        """Counters of personal data. A node that has no tokenizer to read answers counts none."""
        if not self._counts_personal or not len(answers):
            return {}
        try:
            return counts_of(answers)
        except (ConfigError, RunError, OSError) as error:
            self._counts_personal = False
            logger.warning("answers are not searched for personal data here: %s", error)
            return {}


def numbered(prompt_ids: pa.ListArray) -> NDArray[np.int64]:
    """A number for each prompt [P] of N rows, equal where the prompts are, int64 [N]."""
    numbers: dict[bytes, int] = {}
    texts = (ids.values.to_numpy().tobytes() for ids in prompt_ids)
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
