"""The catalogue of a teacher store: which segment holds each key, and which rows are duplicates.

It is built from the segments' footers and key columns, and shows the store as it was at that time.
Imports neither Ray nor torch.

Legend: N rows looked for, S rows stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

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
    """One usable segment of a catalogue."""

    name: str
    footer: Footer


@dataclass(frozen=True)
class Stored:
    """What a stored row can serve: its signal, and whether its response was scored."""

    signal: Signal
    scored: bool

    def replaces(self, other: "Stored") -> bool:
        """Whether a row of this kind serves every signal that one of the other kind serves."""
        if not self.signal.serves(other.signal, self.scored):
            return False
        sampled = Signal("sampled")
        return self.signal.serves(sampled, self.scored) or not other.signal.serves(
            sampled, other.scored
        )


@dataclass
class Catalogue:
    """The stored rows of a store, and the segments that could not be used.

    Row s is in ``entries[segment[s]]``, in its group ``group[s]``, at ``place[s]`` of the group.
    Entries are sorted by signal, the richest first, then by name. Of several rows with one key,
    ``locate`` finds the first.

    Usually the rows of one key hold the same answer with different signals, since a richer signal
    is added by scoring the stored answer. Two runs that ask at the same time can store different
    answers. Each signal then still has one answer, which is the same for every reader: the first
    row that serves the signal (see ``ordered_for``). If none does, the first row of all is scored.
    Only ``hidden`` and ``topk``, which do not serve each other, may then have different answers.
    """

    entries: list[Entry] = field(default_factory=list)
    refused: dict[str, UnusableSegment] = field(default_factory=dict)  # cannot be used; by name
    keys: pa.Array = field(default_factory=lambda: pa.array([], KEYS))  # [S]
    segment: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    group: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    place: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def rows(self) -> int:
        """Number of stored rows, duplicates included."""
        return len(self.keys)

    @cached_property
    def _first_rows(self) -> NDArray[np.int64]:
        assert bool((np.diff(self.segment) >= 0).all()), "only of a catalogue as it was built"
        return np.searchsorted(self.segment, np.arange(len(self.entries) + 1))

    def rows_of(self, segment: int) -> NDArray[np.int64]:
        """Numbers of the rows of a segment (an entry's number), in the order they are stored."""
        return np.arange(*self._first_rows[segment : segment + 2])

    @property
    def duplicates(self) -> int:
        """Number of rows that could be deleted: another row serves the same signals first."""
        return self.rows - int(self.needed().sum())

    def needed(self) -> NDArray[np.bool_]:
        """Mask [S] of rows that are no duplicates.

        A row is a duplicate if an earlier row of the same key serves every signal that it serves,
        with the same answer or another.
        """
        return self.witnesses() == np.arange(self.rows)

    def witnesses(self) -> NDArray[np.int64]:
        """For each row [S] the first row of its key that serves all that it serves, or itself.

        The witness of a duplicate is no duplicate, since what serves what is transitive.
        """
        kinds = [
            Stored(entry.footer.origin.signal, group.scored)
            for entry in self.entries
            for group in entry.footer.groups
        ]
        groups = [len(entry.footer.groups) for entry in self.entries]
        first_group = np.cumsum([0, *groups], dtype=np.int64)
        of_row = first_group[self.segment] + self.group
        witness = np.arange(self.rows)
        for wanted in set(kinds):
            with_it = np.flatnonzero(np.array([k == wanted for k in kinds], bool)[of_row])
            serves = np.array([kind.replaces(wanted) for kind in kinds], bool)
            serving = np.flatnonzero(serves[of_row])
            first = pc.index_in(
                self.keys.take(pa.array(with_it)), value_set=self.keys.take(pa.array(serving))
            )
            witness[with_it] = serving[first.to_numpy()]
        return witness

    def serves(self, wanted: Signal, rows: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
        """Whether ``wanted`` can be derived from each of the stored ``rows``; default: all, [S]."""
        groups = [(e.footer.origin.signal, g.scored) for e in self.entries for g in e.footer.groups]
        serving = np.array([signal.serves(wanted, scored) for signal, scored in groups], bool)
        first = np.cumsum([0, *(len(entry.footer.groups) for entry in self.entries)])
        at = slice(None) if rows is None else rows
        return np.asarray(serving[first[self.segment[at]] + self.group[at]], bool)

    def ordered_for(self, wanted: Signal) -> "Catalogue":
        """The same catalogue with the rows that serve ``wanted`` first.

        Within both halves the order stays. ``locate`` then finds a row that serves ``wanted`` if
        there is one.
        """
        rows = np.argsort(~self.serves(wanted), kind="stable")
        return replace(
            self,
            keys=self.keys.take(pa.array(rows)),
            segment=self.segment[rows],
            group=self.group[rows],
            place=self.place[rows],
        )

    def locate(self, keys: pa.Array) -> NDArray[np.int64]:
        """Number of the first stored row of each of ``keys`` [N]; -1 where there is none."""
        rows = pc.index_in(keys.cast(KEYS), value_set=self.keys)
        return np.asarray(rows.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def build_catalogue(
    read: list[tuple[Entry, list[pa.Array]]], refused: dict[str, UnusableSegment]
) -> Catalogue:
    """The catalogue of segments in this order. ``read``: each with the keys of its groups."""
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
