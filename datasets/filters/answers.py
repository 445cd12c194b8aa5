"""What filters look at: the answered rows of one group, with fields of their prompts.

Legend: N rows, T response tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

STOPPED = "stop"
"""``finish_reason`` of an answer that ends with a stop token."""
Int32Array = NDArray[np.int32]
Decode = Callable[[Sequence[Int32Array]], list[str]]
"""From token ids to text, several answers at a time; special tokens are left out."""


@dataclass(frozen=True)
class Answers:
    """The answers of N rows.

    Attributes:
        ids: Response ids of each row, lists of int32 [T], with their stop token.
        finish_reasons: ``stop`` or ``length`` for each row, string [N].
        rows: Numbers of the rows, all different, [N]; a later sample of a prompt has a higher one.
        prompts: A number for each row, equal where the prompt is, [N].
        sources: Name of each row's source, string [N].
        fields: Fields of the prompt files that filters read, by name: JSON text or null, [N].
        decode: Makes text of token ids.
    """

    ids: pa.ListArray
    finish_reasons: pa.StringArray
    rows: NDArray[np.int64]
    prompts: NDArray[np.int64]
    sources: pa.StringArray
    fields: Mapping[str, pa.StringArray]
    decode: Decode
    _texts: dict[int, str] = field(default_factory=dict)  # by row; of all that were taken from here

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tokens(self) -> list[Int32Array]:
        """Token ids [T] of each answer, without its stop token."""
        return [
            ids.values.to_numpy()[: -1 if finished else None]
            for ids, finished in zip(self.ids, self.finished, strict=True)
        ]

    @cached_property
    def finished(self) -> NDArray[np.bool_]:
        """Whether each answer ends with a stop token, [N]."""
        return np.array([reason == STOPPED for reason in self.finish_reasons.to_pylist()], bool)

    @cached_property
    def texts(self) -> list[str]:
        """Text of each answer, decoded once however many filters read it."""
        rows = self.rows.tolist()
        missing = [place for place, row in enumerate(rows) if row not in self._texts]
        if missing:
            decoded = self.decode([self.tokens[place] for place in missing])
            self._texts.update(zip((rows[place] for place in missing), decoded, strict=True))
        return [self._texts[row] for row in rows]

    def values(self, name: str) -> list[Any]:
        """Values of a field of the prompt files, None where a row has none."""
        return [
            None if text is None else json.loads(text) for text in self.fields[name].to_pylist()
        ]

    def of_sources(self, names: Sequence[str] | None) -> NDArray[np.bool_]:
        """Whether each row is of one of these sources, [N]; None: of any."""
        return np.array([names is None or s in names for s in self.sources.to_pylist()], bool)

    def take(self, rows: NDArray[np.int64]) -> "Answers":
        """The rows with these numbers."""
        places = pa.array(rows)
        return Answers(
            self.ids.take(places),
            self.finish_reasons.take(places),
            self.rows[rows],
            self.prompts[rows],
            self.sources.take(places),
            {name: values.take(places) for name, values in self.fields.items()},
            self.decode,
            self._texts,
        )
