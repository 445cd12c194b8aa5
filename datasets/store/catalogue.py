"""What a store held when it was looked through: where each key is, and which row of it counts.

Imports neither Ray nor torch.

Legend: N rows looked for, S rows stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.reading import UnusableSegment
from raystill.datasets.store.segment import Footer

KEYS = pa.binary(KEY_BYTES)


@dataclass(frozen=True)
class Entry:
    """One sound segment of a catalogue."""

    name: str
    footer: Footer


@dataclass
class Catalogue:
    """What a store held when it was looked through: where each key is, and what was refused.

    Row s is stored in ``entries[segment[s]]``, group ``group[s]``, place ``place[s]``; the richest
    signal first, then by name. Of several answers to a key the first is the one that counts.

    As a rule they say the same and differ in their signal, since a poorer one is enriched by
    scoring it. Two runs that asked at once may have stored two answers, though. Then each wish
    still has one answer, the first that serves it (``serving``), the same for every reader of the
    store; where none does, the first of all is the one that is scored. But a wish that follows from
    ``hidden`` alone and one that follows from ``topk`` alone may then be told different answers.
    """

    entries: list[Entry] = field(default_factory=list)
    refused: dict[str, UnusableSegment] = field(default_factory=dict)
    keys: pa.Array = field(default_factory=lambda: pa.array([], KEYS))  # [S]
    segment: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    group: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    place: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def rows(self) -> int:
        """Stored rows, duplicates included."""
        return len(self.keys)

    @property
    def duplicates(self) -> int:
        """Rows that no wish is served from."""
        return self.rows - int(self.counting().sum())

    def counting(self) -> NDArray[np.bool_]:
        """Which rows count for some wish, [S]: no other row of the key comes first and serves
        whatever they serve, be it by the same answer or by another.
        """
        signals = [entry.footer.origin.signal for entry in self.entries]
        counting = np.zeros(self.rows, bool)
        for wanted in set(signals):
            mine = self._rows_of([signal == wanted for signal in signals])
            serving = self._rows_of([signal.serves(wanted) for signal in signals])
            first = pc.index_in(self.keys.take(mine), value_set=self.keys.take(serving))
            counting[mine] = serving.to_numpy()[first.to_numpy()] == mine.to_numpy()
        return counting

    def serving(self, wanted: Signal) -> "Catalogue":
        """The same with the segments first that ``wish`` is served from; else in this order."""
        serves = np.array([e.footer.origin.signal.serves(wanted) for e in self.entries], bool)
        order = np.argsort(~serves, kind="stable")
        number = np.argsort(order).astype(np.int32)
        rows = np.argsort(number[self.segment], kind="stable")
        return Catalogue(
            entries=[self.entries[index] for index in order],
            refused=self.refused,
            keys=self.keys.take(pa.array(rows)),
            segment=number[self.segment][rows],
            group=self.group[rows],
            place=self.place[rows],
        )

    def _rows_of(self, entries: list[bool]) -> pa.Int64Array:
        """Numbers of the rows of those entries, ascending."""
        return pa.array(np.flatnonzero(np.array(entries, bool)[self.segment]), pa.int64())

    def locate(self, keys: pa.Array) -> NDArray[np.int64]:
        """Stored row of each of ``keys`` [N], -1 where there is none."""
        found = pc.index_in(keys.cast(KEYS), value_set=self.keys)
        return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def catalogue_of(
    read: list[tuple[Entry, list[pa.Array]]], refused: dict[str, UnusableSegment]
) -> Catalogue:
    """A catalogue of segments, each with the keys of its groups, in this order."""
    keys = [group for _, groups in read for group in groups]
    if not keys:
        return Catalogue([entry for entry, _ in read], refused)

    def spread(values: Iterator[int]) -> NDArray[np.int32]:
        lengths = [len(group) for group in keys]
        return np.repeat(np.fromiter(values, np.int32, len(keys)), lengths)

    return Catalogue(
        entries=[entry for entry, _ in read],
        refused=refused,
        keys=pa.concat_arrays(keys),
        segment=spread(number for number, (_, groups) in enumerate(read) for _ in groups),
        group=spread(i for _, groups in read for i in range(len(groups))),
        place=np.concatenate([np.arange(len(group), dtype=np.int32) for group in keys]),
    )
