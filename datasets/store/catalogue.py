"""The catalogue of a teacher store: which segment holds each key, and which rows are duplicates.

It is built from the segments' footers and key columns, and shows the store as it was at that time.
An ``Outline`` is the same without the footers, for a store of which not all are to be in memory.
Imports neither Ray nor torch.

Legend: N rows looked for, S rows stored, M segments.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Footer, Origin
from raystill.datasets.store.reading import Names, UnusableSegment

KEYS = pa.binary(KEY_BYTES)

Words = NDArray[np.uint64]
"""Keys as two numbers each [S, 2], which are equal where the keys are."""


OUTLINED = np.dtype([("marks", "u8"), ("sizes", "i8"), ("rows", "i4"), ("origin", "i4")])
"""What an outline has of a segment."""
SPOOLED = np.dtype(
    [("low", "u8"), ("high", "u8"), ("segment", "i4"), ("place", "i4"), ("kind", "i4")]
)
"""A row: its key, its segment's number and place, and the number of what it can serve."""
SPOOLED_BYTES = 16 << 20
"""Bytes of them that are in memory; from then on they are in a file."""
BUCKETS = 64
"""A part of the keys is looked at at a time."""


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
    """What a store holds, in some 70 bytes a segment, and 12 for each row that may be left out.

    Segments are in the order of a catalogue's entries, and rows in that of the segments. Segment m
    has the rows ``first[m]`` to ``first[m + 1]``, comes from ``origins[origin[m]]``, has
    ``sizes[m]`` bytes, and ``marks[m]`` is the `mark_of` its keys.
    """

    names: Names  # [M]
    sizes: NDArray[np.int64]  # [M]
    origin: NDArray[np.int32]  # [M]
    origins: list[Origin]
    first: NDArray[np.int64]  # [M + 1]
    marks: NDArray[np.uint64]  # [M]
    dropped: NDArray[np.int64]  # [D] rows that are no longer needed, ascending
    held_in: NDArray[np.int32]  # [D] the segment of a row that serves all that this one serves
    shared: NDArray[np.int64]  # segments that share a key with a row that is no longer needed

    @property
    def rows(self) -> int:
        """Number of rows, duplicates included."""
        return int(self.first[-1])

    def name(self, segment: int) -> str:
        """The name of a segment."""
        return self.names[segment]

    def dropped_of(self, segment: int) -> slice:
        """Which of the rows ``dropped`` are those of a segment."""
        return slice(*np.searchsorted(self.dropped, self.first[segment : segment + 2]))

    def needed_of(self, segment: int) -> NDArray[np.bool_]:
        """Mask of the rows of a segment that are needed."""
        start, stop = self.first[segment : segment + 2]
        needed = np.ones(stop - start, bool)
        needed[self.dropped[self.dropped_of(segment)] - start] = False
        return needed


class Outlining:
    """An outline in the making. The keys are in a temporary file, of 28 bytes a row."""

    def __init__(self) -> None:
        self._origins: dict[Origin, int] = {}
        self._kinds: dict[Stored, int] = {}
        self._parts = bytearray()  # of OUTLINED. It grows in place.
        self._names: list[Names] = []
        self._spool = Spool()
        self._count = 0

    @property
    def names(self) -> Names:
        """Names of the segments that were added."""
        self._names = [Names.joined(self._names)]
        return self._names[0]

    def add(self, read: Sequence[tuple[Entry, list[pa.Array]]], sizes: Sequence[int]) -> None:
        """Add segments, each with the keys of its groups, and their sizes in bytes."""
        part = np.empty(len(read), OUTLINED)
        tables = [np.empty(0, SPOOLED)]
        for number, (entry, of_groups) in enumerate(read):
            footer = entry.footer
            signal = footer.origin.signal
            kinds = [Stored(signal, group.scored) for group in footer.groups]
            table = np.empty(footer.rows, SPOOLED)
            table["kind"] = np.repeat(
                [self._kinds.setdefault(kind, len(self._kinds)) for kind in kinds],
                [group.rows for group in footer.groups],
            )
            words = words_of(pa.concat_arrays([*of_groups, pa.array([], KEYS)]))
            table["low"], table["high"] = words[:, 0], words[:, 1]
            table["segment"], table["place"] = self._count + number, np.arange(footer.rows)
            tables.append(table)
            origin = self._origins.setdefault(footer.origin, len(self._origins))
            part[number] = mark_of(footer, of_groups), sizes[number], footer.rows, origin
        self._spool.add(np.concatenate(tables))
        self._parts += part.tobytes()
        self._names.append(Names.of(entry.name for entry, _ in read))
        self._count += len(read)

    def outline(self, there: NDArray[np.bool_]) -> Outline:
        """What was added of segments that are ``there``.

        Richer signals come first, then the order is that of the names.
        """
        part, origins = np.frombuffer(self._parts, OUTLINED), list(self._origins)
        order = np.argsort(self.names.digests, kind="stable").astype(np.int32)
        order = order[there[order]]
        richest = sorted({known.signal.richness for known in origins}, reverse=True)
        rank = np.array([richest.index(known.signal.richness) for known in origins], np.int16)
        order = order[np.argsort(rank[part["origin"][order]], kind="stable")]
        number = np.full(self._count, -1, np.int32)
        number[order] = np.arange(len(order), dtype=np.int32)
        first = np.zeros(len(order) + 1, np.int64)
        np.cumsum(part["rows"][order], out=first[1:])
        dropped, held_in, shared = self._duplicates(number, first)
        sizes, marks, origin = (part[name][order] for name in ("sizes", "marks", "origin"))
        names = self.names.chosen(order)
        return Outline(names, sizes, origin, origins, first, marks, dropped, held_in, shared)

    def _duplicates(
        self, number: NDArray[np.int32], first: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """``dropped``, ``held_in`` and ``shared`` of an outline. number: in it, of each segment."""
        dropped, held_in = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        shared = np.zeros(len(first) - 1, bool)
        for table in self._spool.buckets():
            segment = number[table["segment"]]
            table, segment = table[segment >= 0], segment[segment >= 0]
            rows = first[segment] + table["place"]
            order = np.argsort(rows)
            rows, segment, table = rows[order], segment[order], table[order]
            words = np.stack([table["low"], table["high"]], axis=1)
            witness, sharing = witnesses(words, table["kind"], list(self._kinds))
            mine = np.flatnonzero(witness != np.arange(len(rows)))
            dropped.append(rows[mine])
            held_in.append(segment[witness[mine]])
            shared[segment[sharing]] = True
        all_dropped, all_held_in = np.concatenate(dropped), np.concatenate(held_in)
        order = np.argsort(all_dropped)
        return all_dropped[order], all_held_in[order], np.flatnonzero(shared)


class Spool:
    """Rows of SPOOLED in a temporary file, to be had again by their keys, some keys at a time."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(SPOOLED_BYTES)  # noqa: SIM115
        self._blocks: list[NDArray[np.int64]] = []  # where each bucket begins and ends in it

    def add(self, table: NDArray[np.void]) -> None:
        """Add rows."""
        bucket = (table["low"] % BUCKETS).astype(np.uint8)
        ends = np.cumsum(np.bincount(bucket, minlength=BUCKETS))
        self._blocks.append(self._file.tell() + np.concatenate([[0], ends]) * SPOOLED.itemsize)
        self._file.write(table[np.argsort(bucket, kind="stable")].tobytes())

    def buckets(self) -> Iterator[NDArray[np.void]]:
        """All rows; those of one key together."""
        for number in range(BUCKETS):
            parts = []
            for block in self._blocks:
                start, stop = block[number : number + 2].tolist()
                self._file.seek(start)
                parts.append(self._file.read(stop - start))
            yield np.frombuffer(b"".join(parts), SPOOLED)
        self._file.seek(0, os.SEEK_END)


def mark_of(footer: Footer, keys: Sequence[pa.Array]) -> int:
    """A hash of a segment's keys, in their order, and of whether each was scored."""
    mark = blake2b(digest_size=8)
    for group, of_group in zip(footer.groups, keys, strict=True):
        mark.update(b"scored" if group.scored else b"asked")
        mark.update(words_of(of_group).tobytes())
    return int.from_bytes(mark.digest(), "little")


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
