"""The index of a teacher store: which segment holds each key, without opening the segments.

Each file of ``<store>/index/`` (``part.py``) covers some segments. Whoever looks through the store
lists it, opens the segments that no part covers as they are now (by name, size and time of change),
and writes a part of them: so a segment is opened once, and not by each process at each epoch.
Parts are only ever added and merged. Any of them may be deleted, damaged, or of another store: then
segments are opened again. In a local store one process at a time does so, the others wait for it.

Imports neither Ray nor torch.

Legend: n keys looked for, M segments of a part.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.lookup.part import UNKNOWN, Part, halves
from raystill.datasets.lookup.rows import Table
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin
from raystill.datasets.store.reading import Listing, UnusableSegment, is_in, places_in
from raystill.datasets.store.store import RowCounts

Mask = NDArray[np.bool_]
BULK = 1 << 18
"""Keys that are looked for at once where there are many."""
NEEDLES = 1 << 12
"""Keys that are looked for at once in a part, whose rows near each of them are read."""


@dataclass(frozen=True)
class Found:
    """Where each of n keys is stored: [n] each. ``segment``: its number in the index, -1: nowhere.

    ``serves``: whether the wanted signal can be derived from the row.
    """

    segment: NDArray[np.int64]
    group: NDArray[np.int32]
    place: NDArray[np.int32]
    scored: Mask
    serves: Mask


@dataclass(frozen=True)
class Index:
    """The rows of a store as it was at one time.

    live: [M] of each part, which of its segments are there and are taken from this part.
    refused: segments that cannot be used, by name. damaged: groups that cannot be, of segments that
    can: their names and numbers.
    """

    parts: Sequence[Part] = ()
    live: Sequence[Mask] = ()
    refused: dict[str, UnusableSegment] = field(default_factory=dict)
    damaged: frozenset[tuple[str, int]] = frozenset()

    @property
    def rows(self) -> int:
        """Number of stored rows, duplicates included."""
        return sum(
            int(part.rows[keep[part.segment]].sum())
            for part, keep in zip(self.parts, self.live, strict=True)
        )

    @property
    def num_segments(self) -> int:
        """Number of segments that can be used."""
        return sum(int(keep.sum()) for keep in self.live)

    def name(self, segment: int) -> str:
        """Name of a segment."""
        part, number = self._part_of(segment)
        return part.names[number]

    def origin(self, segment: int) -> Origin:
        """Origin of a segment."""
        part, number = self._part_of(segment)
        return part.origins[part.origin[number]]

    def _part_of(self, segment: int) -> tuple[Part, int]:
        for part in self.parts:
            if segment < len(part.names):
                return part, segment
            segment -= len(part.names)
        raise IndexError(segment)

    def find(self, keys: pa.Array, wanted: Signal) -> Found:
        """Where each of ``keys`` (fixed binary 16, [n]) is.

        Of several rows with a key it is the first that serves ``wanted``, else the first of all;
        they are ordered by signal, the richest first, then by the segment's name.
        """
        high, low = halves(keys)
        order = np.argsort(high, kind="stable")  # Neighbours are then found in the same cache line.
        candidates = [np.empty((5, 0), np.int64)]
        first = 0
        for part, keep in zip(self.parts, self.live, strict=True):
            found = _candidates(part, keep, high[order], low[order], wanted)
            found[0] = order[found[0]]
            found[1] += first
            candidates.append(found)
            first += len(part.names)
        found = np.concatenate(candidates, axis=1)
        needle, segment, group, place, kind = found[:, self._sound(found[1], found[2])]
        if len(needle) > len(np.unique(needle)):
            best = np.lexsort((place, group, self._rank(segment), kind & 1 == 0, needle))
            best = best[np.unique(needle[best], return_index=True)[1]]
            needle, segment, group, place, kind = (
                a[best] for a in (needle, segment, group, place, kind)
            )
        shape = len(keys)
        result = np.zeros((4, shape), np.int64)
        result[0] = -1
        result[:, needle] = segment, group, place, kind
        return Found(
            result[0],
            result[1].astype(np.int32),
            result[2].astype(np.int32),
            result[3] & 2 > 0,
            result[3] & 1 > 0,
        )

    def _sound(self, segments: NDArray[np.int64], groups: NDArray[np.int64]) -> Mask:
        """Which of these groups of segments are not known to be damaged."""
        bad = np.zeros(len(segments), bool)
        for segment in np.unique(segments) if self.damaged else ():
            name = self.name(int(segment))
            numbers = [group for damaged, group in self.damaged if damaged == name]
            bad |= (segments == segment) & np.isin(groups, numbers)
        return ~bad

    def _rank(self, segments: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each in the order of signals, then of names."""
        different, of_each = np.unique(segments, return_inverse=True)

        def order(number: int) -> tuple[int, int, str]:
            kind, width = self.origin(number).signal.richness
            return -kind, -width, self.name(number)

        rank = np.empty(len(different), np.int64)
        rank[sorted(range(len(different)), key=lambda i: order(int(different[i])))] = np.arange(
            len(different)
        )
        return rank[of_each]

    def find_many(self, keys: pa.ChunkedArray, wanted: Signal) -> tuple[Mask, Mask]:
        """Which of many keys [n] are stored, and which of these with the wanted signal."""
        found = [
            self.find(chunk.slice(start, BULK), wanted)
            for chunk in keys.chunks
            for start in range(0, len(chunk), BULK)
        ]
        none = [np.empty(0, bool)]
        return (
            np.concatenate(none + [part.segment >= 0 for part in found]),
            np.concatenate(none + [part.serves for part in found]),
        )

    def requested_by(self, run: str) -> dict[str, RowCounts]:
        """Rows in the store that ``run`` had the teacher answer or score, by purpose."""
        counts = {purpose: [0, 0] for purpose in ("training", "evaluation")}
        for part, keep in zip(self.parts, self.live, strict=True):
            there = keep[part.segment]
            sums = np.bincount(
                part.asked[there], weights=part.rows[there], minlength=len(part.provenances)
            )
            for provenance, rows in zip(part.provenances, sums, strict=True):
                if provenance.run == run and provenance.purpose in counts:
                    counts[provenance.purpose][provenance.scored] += int(rows)
        return {purpose: RowCounts(*both) for purpose, both in counts.items()}


def _candidates(
    part: Part, keep: Mask, high: NDArray[np.uint64], low: NDArray[np.uint64], wanted: Signal
) -> NDArray[np.int64]:
    """Rows of a part with these keys: number of the key, segment, group, place, kind; [5, rows].

    kind: 1 if it serves ``wanted``, and 2 if it was scored.
    """
    few = [_near(part, high, low, start) for start in range(0, len(high) or 1, NEEDLES)]
    needle, rows = few[0] if len(few) == 1 else map(np.concatenate, zip(*few, strict=True))
    if not len(needle):
        return np.empty((5, 0), np.int64)
    # The file may have changed since it was verified.
    inside = (rows["group"] >= 0) & (rows["group"] < len(part.segment)) & (rows["place"] >= 0)
    rows, needle = rows[inside], needle[inside]
    there = keep[part.segment[rows["group"]]]
    rows, needle = rows[there], needle[there]
    group = rows["group"]
    segment = part.segment[group]
    kinds = np.array(
        [
            [o.signal.serves(wanted, p.scored) + 2 * p.scored for p in part.provenances]
            for o in part.origins
        ],
        np.int64,
    ).reshape(len(part.origins), len(part.provenances))
    kind = kinds[part.origin[segment], part.asked[group]]
    return np.stack([needle, segment, part.number[group], rows["place"], kind]).astype(np.int64)


def _near(
    part: Part, high: NDArray[np.uint64], low: NDArray[np.uint64], first: int
) -> tuple[NDArray[np.int64], Table]:
    """The rows with one of NEEDLES keys from the ``first`` on: the key's number, and the row."""
    high, low = high[first : first + NEEDLES], low[first : first + NEEDLES]
    rows = part.where.near(high)
    of_rows = np.ascontiguousarray(rows["high"])
    start, stop = (np.searchsorted(of_rows, high, side) for side in ("left", "right"))
    count = stop - start
    needle = np.repeat(np.arange(len(high)), count)
    rows = rows[np.arange(len(needle)) + (start - np.cumsum(count) + count)[needle]]
    same = rows["low"] == low[needle]
    return needle[same] + first, rows[same]


def live_in(
    listing: Listing, parts: Sequence[Part], without: Collection[str] = ()
) -> tuple[list[Mask], Mask]:
    """Which segments of each part are those listed, and which listed ones no part has.

    Each listed segment is taken from the first part that has it as it is now. ``without``: names
    that no part is believed about.
    """
    covered = np.zeros(len(listing.names), bool)
    live = []
    for part in parts:
        place = places_in(listing.names, part.names)
        same = (place >= 0) & ~is_in(part.names, without)
        same[same] &= listing.sizes[place[same]] == part.sizes[same]
        unknown = part.changed[same] == UNKNOWN
        same[same] &= unknown | (listing.changed[place[same]] == part.changed[same])
        same[same] &= ~covered[place[same]]
        once = np.zeros(len(same), bool)  # A part of merged ones may have a segment twice.
        once[np.flatnonzero(same)[np.unique(place[same], return_index=True)[1]]] = True
        same &= once
        covered[place[same]] = True
        live.append(same)
    return live, ~covered
