"""The catalogue of a teacher store: which segment holds each key, and which rows are duplicates.

It is built from the segments' footers and key columns, and shows the store as it was at that time.
An ``Outline`` is the same without the footers, for a store of which not all are to be in memory.
Imports neither Ray nor torch.

Legend: N rows looked for, S rows stored, M segments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.reading import UnusableSegment
from raystill.datasets.store.segment import Footer, Origin

KEYS = pa.binary(KEY_BYTES)

Words = NDArray[np.uint64]
"""Keys as two numbers each [S, 2], which are equal where the keys are."""


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
        """For each row [S] the first row of its key that serves all that it serves, or itself."""
        numbers: dict[Stored, int] = {}
        kinds = [
            numbers.setdefault(Stored(entry.footer.origin.signal, group.scored), len(numbers))
            for entry in self.entries
            for group in entry.footer.groups
        ]
        groups = [len(entry.footer.groups) for entry in self.entries]
        first_group = np.cumsum([0, *groups], dtype=np.int64)
        kind = np.array(kinds, np.int16)[first_group[self.segment] + self.group]
        return witnesses(words_of(self.keys), kind, list(numbers))[0]

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


@dataclass(frozen=True)
class Outline:
    """What a store holds, in 18 bytes a row and some 60 a segment.

    Segments are in the order of a catalogue's entries, and rows in that of the segments. Segment m
    has the rows ``first[m]`` to ``first[m + 1]``, comes from ``origins[origin[m]]`` and has
    ``sizes[m]`` bytes. Row s can serve what ``kinds[kind[s]]`` says.
    """

    names: pa.Array  # string [M]
    sizes: NDArray[np.int64]  # [M]
    origin: NDArray[np.int32]  # [M]
    origins: list[Origin]
    first: NDArray[np.int64]  # [M + 1]
    keys: Words
    kind: NDArray[np.int16]  # [S]
    kinds: list[Stored]

    @property
    def rows(self) -> int:
        """Number of rows, duplicates included."""
        return len(self.kind)

    def name(self, segment: int) -> str:
        """The name of a segment."""
        return str(self.names[segment])

    def segments_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the segments that hold these rows."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def chosen(self, segments: NDArray[np.int64]) -> "Outline":
        """These segments alone, in this order."""
        lengths = np.diff(self.first)[segments]
        first = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.repeat(self.first[segments] - first[:-1], lengths) + np.arange(first[-1])
        return replace(
            self,
            names=self.names.take(pa.array(segments)),
            sizes=self.sizes[segments],
            origin=self.origin[segments],
            first=first,
            keys=self.keys[rows],
            kind=self.kind[rows],
        )


class Outlining:
    """An outline in the making."""

    def __init__(self) -> None:
        self._origins: dict[Origin, int] = {}
        self._kinds: dict[Stored, int] = {}
        self._parts: list[tuple[pa.Array, ...]] = []
        self.names = pa.array([], pa.string())

    def add(self, read: Sequence[tuple[Entry, list[pa.Array]]], sizes: Sequence[int]) -> None:
        """Add segments, each with the keys of its groups, and their sizes in bytes."""
        footers = [entry.footer for entry, _ in read]
        origins = [self._origins.setdefault(f.origin, len(self._origins)) for f in footers]
        kinds = [
            self._kinds.setdefault(Stored(footer.origin.signal, group.scored), len(self._kinds))
            for footer in footers
            for group in footer.groups
        ]
        groups = [keys for _, of_segment in read for keys in of_segment]
        kind = np.repeat(np.array(kinds, np.int16), [len(keys) for keys in groups])
        rows = np.array([footer.rows for footer in footers], np.int64)
        words = words_of(pa.concat_arrays([*groups, pa.array([], KEYS)])).copy()
        of_segments = np.array(sizes, np.int64), np.array(origins, np.int32), rows
        self._parts.append((*of_segments, words, kind))
        names = pa.array([entry.name for entry, _ in read], pa.string())
        self.names = pa.concat_arrays([self.names, names])

    def outline(self) -> Outline:
        """What was added. Richer signals come first, then the order is that of the names."""
        self.add([], [])  # So that there is one.
        sizes, origin, rows, words, kind = map(np.concatenate, zip(*self._parts, strict=True))
        self._parts.clear()
        first = np.concatenate([[0], np.cumsum(rows)])
        origins, kinds = list(self._origins), list(self._kinds)
        made = Outline(self.names, sizes, origin, origins, first, words, kind, kinds)
        by_name = pc.sort_indices(self.names).to_numpy().astype(np.int64)
        richest = sorted({known.signal.richness for known in origins}, reverse=True)
        rank = np.array([richest.index(known.signal.richness) for known in origins], np.int32)
        order = by_name[np.argsort(rank[origin[by_name]], kind="stable")]
        return made if (np.diff(order) == 1).all() else made.chosen(order)


def words_of(keys: pa.Array) -> Words:
    """Keys as numbers, where they lie in memory."""
    start, stop = keys.offset * KEY_BYTES, (keys.offset + len(keys)) * KEY_BYTES
    return np.frombuffer(memoryview(keys.buffers()[1] or b"")[start:stop], np.uint64).reshape(-1, 2)


def witnesses(
    keys: Words, kind: NDArray[np.int16], kinds: Sequence[Stored]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row [S] the first row of its key that serves all that it serves, or itself.

    The witness of a duplicate is no duplicate, since what serves what is transitive. Returned with
    the rows that share their key with a duplicate, in any order. ``kind``: of each row, in
    ``kinds``.
    """
    witness = np.arange(len(keys))
    order = np.lexsort((keys[:, 0], keys[:, 1]))  # It is stable: rows of one key ascend.
    is_first = np.ones(len(keys), bool)
    high, low = keys[order, 1], keys[order, 0]
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(keys)))
    order = order[np.repeat(lengths > 1, lengths)]
    lengths = lengths[lengths > 1]
    if not len(order):
        return witness, order
    starts = np.cumsum(lengths) - lengths
    for number, wanted in enumerate(kinds):
        serves = np.array([stored.replaces(wanted) for stored in kinds], bool)[kind[order]]
        first = np.minimum.reduceat(np.where(serves, order, len(keys)), starts)
        mine = kind[order] == number
        witness[order[mine]] = np.repeat(first, lengths)[mine]
    duplicate = np.logical_or.reduceat(witness[order] != order, starts)
    return witness, order[np.repeat(duplicate, lengths)]
