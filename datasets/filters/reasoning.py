"""What the student learns of a teacher's reasoning (``prompts.reasoning``).

Where it sits: between the store, which keeps answers as they came, and the filters. *Consumes* a
group's answers; the tokenizer is loaded with the first of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.config.run import RunConfig
from raystill.datasets.rows.reasoning import (
    PAIRS,
    Cutter,
    Markers,
    markers_of,
    reasoning_keys,
    with_reasoning,
    without_reasoning,
)
from raystill.datasets.rows.schema import answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.token_bytes import token_bytes
from raystill.model.on_node import ModelSource
from raystill.model.tokenizer import (
    chat_template,
    control_tokens,
    read_settings,
    shared_tokenizer,
)

TEXT = answer_schema(Signal("text")).names


def markers_in(folder: Path) -> Markers | None:
    """The markers of reasoning that a model's folder has. Raises ConfigError."""
    settings = read_settings(folder)
    added = shared_tokenizer(folder, settings).tokenizer.get_added_tokens_decoder()
    named = {token.content: index for index, token in added.items()}
    return markers_of(named, chat_template(folder, settings))


def cutter_of(folder: Path) -> Cutter:
    """Cuts answers in the ids of a model's tokenizer. Raises NoBytes, ConfigError."""
    settings = read_settings(folder)
    tokenizer = shared_tokenizer(folder, settings).tokenizer
    control = control_tokens(tokenizer, settings, folder, chat_template(folder, settings)).always
    return Cutter(token_bytes(tokenizer), markers_in(folder) or Markers(*PAIRS[0]), control)


@dataclass
class Reasoning:
    """The wish of a run. most: tokens that an answer with its reasoning may have."""

    wish: Literal["keep", "drop"]
    teacher: ModelSource
    most: int

    @classmethod
    def of(cls, config: RunConfig, teacher: ModelSource) -> "Reasoning | None":
        """That of a run file; None where answers are taken as they come."""
        wish = config.prompts.reasoning
        return None if wish is None else cls(wish, teacher, config.max_response_tokens)

    def applied(
        self,
        answers: pa.Table,
        keys: pa.Array,
        prompt_ids: pa.Array,
        free: pa.Array,
        stored: Callable[[pa.Array], Iterable[tuple[NDArray[np.int64], pa.Table]]],
    ) -> pa.Table:
        """The answers [n] as the student learns them.

        free: whether the teacher has written the response, boolean [n]. stored: finds what is
        published under keys: places among these, and answers.
        """
        among = pc.and_(free, pc.is_null(answers["error"].combine_chunks()))
        mine = among.to_numpy(zero_copy_only=False)
        if self.wish == "drop":
            return without_reasoning(answers, prompt_ids, self._cutter, mine)
        good = np.flatnonzero(mine)
        if answers.column_names != TEXT or not len(good):  # It is in the answer's ids, or nowhere.
            return answers
        responses = answers["response_ids"].combine_chunks().take(pa.array(good))
        own = reasoning_keys(keys.take(pa.array(good)), responses)
        before: list[NDArray[np.int32] | None] = [None] * len(answers)
        for places, found in stored(own):
            for place, ids in zip(places.tolist(), found["response_ids"], strict=True):
                before[good[place]] = ids.values.to_numpy(zero_copy_only=False)
        return with_reasoning(answers, before, self.most)

    @cached_property
    def _cutter(self) -> Cutter:
        return cutter_of(Path(self.teacher.on_this_node("none")))
