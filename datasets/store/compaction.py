"""Compaction of a teacher store: small segments are merged, and duplicate rows left out.

Its memory does not hold the store. Names and sizes of all segments are in arrays, the keys in a
temporary file (``catalogue.Outline``); footers and answers are there of those segments alone that
are being read, or merged into one. A segment goes once its rows were read in others (`Proof`).

Imports neither Ray nor torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.store.catalogue import (
    KEYS,
    Entry,
    Outline,
    Outlining,
    Stored,
    mark_of,
)
from raystill.datasets.store.footer import Footer, Group, Origin, Provenance, segment_schema
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.reading import (
    GoneSegment,
    ImpossibleValues,
    Listing,
    RefusedSegments,
    UnreadableSegment,
    UnusableSegment,
    ending_of,
    is_in,
    read_each,
    with_retries,
)
from raystill.datasets.store.segment import encode, next_name, segment_name
from raystill.datasets.store.store import LISTINGS, READERS, Progress, TeacherStore
from raystill.datasets.store.values import impossible_rows

COMPACT_ROWS = 192
"""Largest number of rows of a merged segment. A segment that is larger already is left as it is.
A reader of one group opens the segment, which takes as long as there are groups in it."""

COMPACT_BYTES = 256 << 20
"""Largest size of the segments that are merged into one, which are in memory meanwhile."""

OPENED_TOGETHER = 2048
"""Segments whose footers are in memory at a time."""

Groups = list[tuple[Group | Provenance, pa.Table]]
"""Groups of rows as ``segment.encode`` takes them."""

Note = Callable[[str, Origin, list[tuple[Provenance, pa.Array]]], None]
"""Called with a segment's name and origin, and the provenance and keys of its groups."""


Stamp = tuple[int, int]
"""Size and time of change of a file."""


@dataclass(frozen=True)
class Compacted:
    """What ``compact`` did."""

    merged: int  # segments that were replaced
    into: int  # segments that replaced them
    duplicates: int  # rows left out
    refused: RefusedSegments = field(default_factory=dict)  # left as they are


@dataclass(frozen=True)
class Input:
    """A segment that is being merged, as it was read."""

    footer: Footer
    ending: str  # of its file
    keys: pa.Array  # of all groups
    needed: Groups


def compact(
    store: TeacherStore, progress: Progress | None = None, note: Note | None = None
) -> Compacted:
    """Merge small segments of the same origin and leave duplicate rows out.

    The signal is part of the origin, so a key with two signals keeps two rows. A row is left out
    only if another row that stays serves the same signals and has been read without error.
    A merged segment is published, and read again, before the ones it replaces are removed, so that
    every row can be read at any moment; a run that finds a segment gone reads the catalogue again.
    Segments that cannot be used are left as they are, and their rows do not make others duplicates.
    ``note`` is called with each merged segment: its name, origin, and groups.

    Raises RunError if another process compacts or prunes the store.
    """
    lease = Lease(store.folder, "compact")
    with lease.held():
        store.refuse_link()
        store.put_back_all()
        return _compact(store, lease, progress, note)


def _compact(
    store: TeacherStore, lease: Lease, progress: Progress | None, note: Note | None
) -> Compacted:
    """``compact``, under the lease."""
    outline, refused = _to_compact(store)
    batches = list(_segments_to_merge(outline))  # Views of one array.
    if batches:
        store.note_merged(outline.name(segment) for batch in batches for segment in batch)
    merged = duplicates = 0
    made: list[str] = []
    moved = np.full(len(outline.sizes), -1, np.int32)  # [M] where in `made` the needed rows are now
    for number, batch in enumerate(batches, 1):
        inputs: dict[int, Input] = {}
        for segment in batch.tolist():
            try:
                inputs[segment] = _read(store, outline, segment)
            except GoneSegment:  # Removed meanwhile, or its name now holds other rows.
                continue
            except UnusableSegment as error:
                refused[error.name] = error
        origin = outline.origins[outline.origin[batch[0]]]
        kept = {outline.name(segment): read.needed for segment, read in inputs.items()}
        new = publish_merged(store, origin, kept)
        if new is not None:
            moved[list(inputs)] = len(made)
            made.append(new)
            if note is not None:
                note(new, origin, [_noted(group) for groups in kept.values() for group in groups])
        proof = Proof(store, lease)
        for segment, read in inputs.items():
            name, dropped = outline.name(segment), outline.dropped_of(segment)
            witnessed = np.unique(outline.held_in[dropped]).tolist()
            held_by = {
                outline.name(s) if moved[s] < 0 else made[moved[s]] for s in (segment, *witnessed)
            } - {name}
            if name == new or proof.remove(name, read.footer, read.ending, read.keys, held_by):
                merged += 1
                duplicates += dropped.stop - dropped.start
        if progress is not None:
            progress(number, len(batches))
    return Compacted(merged, len(made), duplicates, refused)


def _to_compact(store: TeacherStore) -> tuple[Outline, RefusedSegments]:
    """The outline to compact by, and the segments left out.

    Making an outline verifies only footers and keys. Therefore segments with duplicate keys are
    read whole here, and what cannot be used is taken out. Else a sound row could be removed as the
    duplicate of a damaged one.
    """
    made, there, refused = _outlining(store)
    sound: set[str] = set()
    while True:
        outline = made.outline(there)
        names = [n for s in outline.shared.tolist() if (n := outline.name(s)) not in sound]
        results = read_each(partial(problem_of, store), names)
        if not any(results.values()):
            return outline, refused
        sound.update(name for name, problem in results.items() if problem is None)
        bad = {name: problem for name, problem in results.items() if problem is not None}
        refused |= {n: error for n, error in bad.items() if not isinstance(error, GoneSegment)}
        there &= ~is_in(made.names, bad)


def _outlining(store: TeacherStore) -> tuple[Outlining, NDArray[np.bool_], RefusedSegments]:
    """Read footers and keys of all segments; which of them are there, and what cannot be used."""
    made = Outlining()
    refused: RefusedSegments = {}
    late: dict[str, int] = {}

    def read(sizes: dict[str, int], pauses: tuple[float, ...] | None) -> None:
        found: list[tuple[Entry, list[pa.Array]]] = []
        for name, result in read_each(store.keys_of, list(sizes), None, READERS, pauses).items():
            if isinstance(result, UnreadableSegment) and pauses is not None:
                late[name] = sizes[name]
            elif isinstance(result, UnusableSegment):
                refused[name] = result
            else:
                found.append(result)
        made.add(found, [sizes[entry.name] for entry, _ in found])

    listing: Listing | None = None
    for _ in range(LISTINGS):
        # A segment that is gone was merged into one that this listing may be the first to show.
        listing = None  # Two of them at a time are as much as all else.
        listing = store.listing()
        unread = ~is_in(listing.names, made.names) & ~is_in(listing.names, refused)
        if not unread.any():
            break
        for some in listing.chosen(unread).together(OPENED_TOGETHER):
            read(dict(zip(some.names, some.sizes.tolist(), strict=True)), ())
        again, late = late, {}
        read(again, None)  # All of them wait together.
        for name in [n for n, error in refused.items() if isinstance(error, GoneSegment)]:
            del refused[name]
    assert listing is not None
    known = sorted(refused)
    refused = {known[i]: refused[known[i]] for i in np.flatnonzero(is_in(known, listing.names))}
    return made, is_in(made.names, listing.names), refused


def _segments_to_merge(outline: Outline) -> Iterator[NDArray[np.int32]]:
    """Batches of segments to be merged into one each.

    A batch has one origin, at most COMPACT_ROWS rows and COMPACT_BYTES of files. A single segment
    is a batch only if it has duplicate rows.
    """
    with_duplicates = np.zeros(len(outline.sizes), bool)
    with_duplicates[np.searchsorted(outline.first, outline.dropped, side="right") - 1] = True
    by_origin = np.argsort(outline.origin, kind="stable").astype(np.int32)
    lengths, origin = np.diff(outline.first), outline.origin

    def batch(start: int, stop: int) -> list[NDArray[np.int32]]:
        worth = stop - start > 1 or (stop > start and with_duplicates[by_origin[start]])
        return [by_origin[start:stop]] if worth else []

    start = rows = size = 0
    for place, segment in enumerate(by_origin):
        new = place > start and origin[segment] != origin[by_origin[start]]
        rows, size = rows + lengths[segment], size + outline.sizes[segment]
        if new or (place > start and (rows > COMPACT_ROWS or size > COMPACT_BYTES)):
            yield from batch(start, place)
            start, rows, size = place, lengths[segment], outline.sizes[segment]
    yield from batch(start, len(by_origin))


def _read(store: TeacherStore, outline: Outline, segment: int) -> Input:
    """A segment's groups, verified and without duplicate rows.

    An unchanged group keeps its ``Group`` with the old checksums. Raises UnusableSegment;
    GoneSegment if it is not what the outline says.
    """
    name, origin = outline.name(segment), outline.origins[outline.origin[segment]]
    columns = segment_schema(origin.signal).names

    def read() -> tuple[Footer, str, list[pa.Table]]:
        file = store.open(name)
        if file.footer.origin != origin:
            raise GoneSegment(name, "another segment has replaced it")
        tables = [file.read(i, columns) for i in range(len(file.footer.groups))]
        try:
            return file.footer, ending_of(file.data), tables
        except OSError as error:
            raise UnreadableSegment(name, str(error)) from error

    footer, ending, tables = with_retries(read)
    for rows in tables:
        refuse_impossible(name, rows, origin)
    of_groups = [table["key"].combine_chunks().cast(KEYS) for table in tables]
    if mark_of(footer, of_groups) != outline.marks[segment]:
        raise GoneSegment(name, "another segment has replaced it")
    keys = pa.concat_arrays([pa.array([], KEYS), *of_groups])
    needed, start = outline.needed_of(segment), 0
    groups: Groups = []
    for group, rows in zip(footer.groups, tables, strict=True):
        keep, start = needed[start : start + group.rows], start + group.rows
        if keep.all():
            groups.append((group, rows))
        elif keep.any():
            groups.append((group.provenance, rows.filter(pa.array(keep))))
    return Input(footer, ending, keys, groups)


def publish_merged(store: TeacherStore, origin: Origin, kept: Mapping[str, Groups]) -> str | None:
    """Publish the groups kept of a batch's segments (by name) as one segment; returns its name.

    None if no group is kept. The merged segment's name may be taken, by one of another origin, with
    other answers or unusable. That one stays, and the next free name is used, unless the segment of
    that name is the only one of the batch with rows to keep, or the very same: it was published by
    a compaction that died, or by a request that was carried out and not confirmed.
    """
    groups = [group for of_segment in kept.values() for group in of_segment]
    if not groups:
        return None
    name = segment_name([k for _, rows in groups for k in rows["key"].to_pylist()], origin.signal)
    if [n for n, of_segment in kept.items() if of_segment] == [name]:
        return name
    data = encode(origin, groups)
    while not store.put(name, data) and not store.holds(name, data):
        name = next_name(name)
    return name


def _noted(group: tuple[Group | Provenance, pa.Table]) -> tuple[Provenance, pa.Array]:
    of, rows = group
    return of if isinstance(of, Provenance) else of.provenance, rows["key"].combine_chunks()


def refuse_impossible(name: str, rows: pa.Table, origin: Origin) -> None:
    """Raise ImpossibleValues if some of a segment's rows have values that no teacher means."""
    if number := int(impossible_rows(rows, origin.signal, origin.vocab_size).sum()):
        raise ImpossibleValues(
            name, f"{number} of {len(rows)} rows read have logprobs or ids that cannot be"
        )


def problem_of(store: TeacherStore, name: str) -> UnusableSegment | None:
    """The error that reading the whole segment ends with; None if it is sound."""
    try:
        read_whole(store, name)
    except UnusableSegment as error:
        return error
    return None


def read_whole(store: TeacherStore, name: str) -> tuple[Footer, pa.Array]:
    """Read all of a segment; its footer, and the keys of all groups. Raises UnusableSegment."""
    file = store.open(name)
    origin, keys = file.footer.origin, []
    for rows in file.pieces(segment_schema(origin.signal).names):
        refuse_impossible(name, rows, origin)
        keys.extend(rows["key"].chunks)
    return file.footer, pa.concat_arrays([pa.array([], KEYS), *keys])


class Proof:
    """Removal of segments whose rows have just been read, without error, in other ones."""

    def __init__(self, store: TeacherStore, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._read: dict[str, tuple[Stamp, dict[Stored, pa.Array]] | None] = {}

    def remove(
        self, name: str, footer: Footer, ending: str, keys: pa.Array, held_by: Collection[str]
    ) -> bool:
        """Remove a segment if those of ``held_by`` have all of its rows; whether it was removed.

        footer, ending, keys: of the segment, as it was read. Each segment of ``held_by`` is read
        whole once, and must still be there, unchanged, after this one was set aside. So must this
        one have the same footer still, which the ``ending`` of its file tells.
        """
        held = {n: found for n in held_by if (found := self._whole(n)) is not None}
        kinds = [kind for _, of_segment in held.values() for kind in of_segment.items()]
        start = 0
        for group in footer.groups:
            wanted = Stored(footer.origin.signal, group.scored)
            mine, start = keys.slice(start, group.rows), start + group.rows
            there = [of_kind for stored, of_kind in kinds if stored.replaces(wanted)]
            found = pc.is_in(mine, value_set=pa.concat_arrays([*there, mine.slice(0, 0)]))
            if not pc.all(found, min_count=0).as_py():
                return False

        def may_go(opened: str) -> bool:
            self._lease.confirm()
            same = self._store.ending(opened) == ending
            return same and all(self._store.stamp(n) == found[0] for n, found in held.items())

        return self._store.take_away(name, may_go)

    def _whole(self, name: str) -> tuple[Stamp, dict[Stored, pa.Array]] | None:
        """A segment that can be read whole: its stamp, and the keys of its groups of each kind."""
        if name not in self._read:
            self._read[name] = None
            stamp = self._store.stamp(name)
            with suppress(UnusableSegment):
                footer, keys = read_whole(self._store, name)
                signal, start = footer.origin.signal, 0
                of_kind: dict[Stored, list[pa.Array]] = {}
                for group in footer.groups:
                    mine, start = keys.slice(start, group.rows), start + group.rows
                    of_kind.setdefault(Stored(signal, group.scored), []).append(mine)
                if stamp is not None:
                    whole = {kind: pa.concat_arrays(several) for kind, several in of_kind.items()}
                    self._read[name] = stamp, whole
        return self._read[name]
