"""Maintenance of a teacher store: verify, compact and prune.

Each can be interrupted at any moment without losing a row, and can run beside training runs that
use the store. Nothing is removed that could not be read: unreadable segments and those of a newer
version stay. A lease (``lease.py``) lets one process at a time remove segments; how that is safe
even without it is in ``removal.py``.

Imports neither Ray nor torch.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.datasets.store.catalogue import Catalogue
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.proof import Proof, problem_of, refuse_impossible
from raystill.datasets.store.reading import (
    DamagedSegment,
    ForeignFile,
    GoneSegment,
    ImpossibleValues,
    UnusableSegment,
    read_each,
)
from raystill.datasets.store.removal import TEMPORARY
from raystill.datasets.store.segment import (
    OWN_NAME,
    Group,
    Origin,
    Provenance,
    SegmentFile,
    encode,
    next_name,
    segment_name,
    segment_schema,
)
from raystill.datasets.store.store import SEGMENTS, Progress, TeacherStore
from raystill.datasets.store.values import impossible_rows

COMPACT_ROWS = 192
"""Largest number of rows of a merged segment. A segment that is larger already is left as it is.
A reader of one group opens the segment, which takes as long as there are groups in it."""

COMPACT_BYTES = 256 << 20
"""Largest size of the segments that are merged into one, which are in memory meanwhile."""

STALE_S = 3600.0
"""Age from which a temporary file is taken for one whose writer has died."""

Groups = list[tuple[Group | Provenance, pa.Table]]
"""Groups of rows as ``segment.encode`` takes them."""

Note = Callable[[str, Origin, list[tuple[Provenance, pa.Array]]], None]
"""Called with a segment's name and origin, and the provenance and keys of its groups."""

RefusedSegments = dict[str, UnusableSegment]
"""Segments that cannot be used, by name. The class of the error says whether one may be deleted."""


@dataclass(frozen=True)
class Compacted:
    """What ``compact`` did."""

    merged: int  # segments that were replaced
    into: int  # segments that replaced them
    duplicates: int  # rows left out
    refused: RefusedSegments = field(default_factory=dict)  # left as they are


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did."""

    files: list[str]  # removed, or to be removed in a dry run
    refused: RefusedSegments  # left: they may be sound


def verify(store: TeacherStore, progress: Progress | None = None) -> RefusedSegments:
    """Read all segments whole, check every checksum, and return those that cannot be used."""
    return _unusable(read_each(partial(problem_of, store), store.names(), progress))


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
        _refuse_links(store)
        store.put_back_all()
        return _compact(store, lease, progress, note)


def _compact(
    store: TeacherStore, lease: Lease, progress: Progress | None, note: Note | None
) -> Compacted:
    """``compact``, under the lease."""
    catalogue, witnesses, refused = _catalogue_to_compact(store)
    needed = witnesses == np.arange(catalogue.rows)
    batches = list(_segments_to_merge(catalogue, needed, store.sizes()))
    if batches:
        every = (segment for _, segments in batches for segment in segments)
        store.note_merged([catalogue.entries[segment].name for segment in every])
    merged = into = duplicates = 0
    moved: dict[str, str] = {}  # Segment -> the one that holds its needed rows now.
    for number, (origin, segments) in enumerate(batches, 1):
        kept: dict[str, Groups] = {}
        numbers: dict[str, int] = {}
        for segment in segments:
            name = catalogue.entries[segment].name
            try:
                kept[name] = list(_needed_groups(store, catalogue, segment, needed))
                numbers[name] = segment
            except GoneSegment:  # Removed meanwhile, or its name now holds other rows.
                continue
            except UnusableSegment as error:
                refused[name] = error
        new = _publish_merged(store, origin, kept)
        if new is not None and note is not None:
            note(new, origin, [_noted(group) for groups in kept.values() for group in groups])
        moved |= {name: new for name in kept if new is not None}
        proof = Proof(store, lease)
        for name in kept:
            entry = catalogue.entries[numbers[name]]
            mine = catalogue.rows_of(numbers[name])
            dropped = mine[~needed[mine]]
            left_out = np.unique(catalogue.segment[witnesses[dropped]])
            names = {catalogue.entries[witness].name for witness in left_out}
            held_by = {moved.get(name, name) for name in {name, *names}} - {name}
            if name == new:
                merged += 1
            elif proof.remove(entry, catalogue, mine, held_by):
                merged += 1
                duplicates += len(dropped)
        into += new is not None
        if progress is not None:
            progress(number, len(batches))
    return Compacted(merged, into, duplicates, refused)


def prune(
    store: TeacherStore, refused: Mapping[str, UnusableSegment], teacher: str | None, dry_run: bool
) -> Pruned:
    """Remove damaged segments, old temporary files and, on request, the segments of one teacher.

    refused: what ``verify`` returned. Damaged segments are read again when they were set aside,
    since a run may have replaced one meanwhile; the others of it stay. Of a segment with impossible
    values only the rows that have them are removed: the others are published in another. Files that
    never were segments stay, and so do links.
    teacher: the beginning of a teacher's identity, whose segments are removed; None for none.
    dry_run: only report what would be removed.

    Raises RunError if another process compacts or prunes the store.
    """
    _refuse_links(store)
    lease = Lease(store.folder, "prune")
    with nullcontext() if dry_run else lease.held():
        if not dry_run:
            store.put_back_all()
        to_mend = [n for n, e in refused.items() if isinstance(e, ImpossibleValues)]
        kinds = (DamagedSegment, ImpossibleValues)
        left = {n: e for n, e in refused.items() if not isinstance(e, kinds)}
        damaged = [name for name in refused if name not in left and name not in to_mend]
        results = _unusable(read_each(partial(problem_of, store), damaged))
        names = [n for n, error in results.items() if isinstance(error, DamagedSegment)]
        left |= {n: error for n, error in results.items() if n not in names}
        if teacher:
            others = [name for name in store.names() if name not in refused]
            for name, result in read_each(partial(_identity, store), others).items():
                if isinstance(result, str):
                    names += [name] if result.startswith(teacher) else []
                elif not isinstance(result, GoneSegment):
                    left[name] = result

        def may_go(name: str) -> bool:
            lease.confirm()
            identity = _identity(store, name)
            if teacher and isinstance(identity, str) and identity.startswith(teacher):
                return True
            return isinstance(problem_of(store, name), DamagedSegment)

        removed = [name for name in names if dry_run or store.take_away(name, may_go)]
        removed += [name for name in to_mend if dry_run or _mend(store, lease, name)]
        left |= {n: refused[n] for n in to_mend if n not in removed and store.exists(n)}
        return Pruned(sorted(removed + _stale_files(store, dry_run)), left)


def _mend(store: TeacherStore, lease: Lease, name: str) -> bool:
    """Put a segment without its impossible rows in the place of a segment; whether that was done.

    The rows that are left are published, and read again, before the segment goes.
    """
    try:
        file = store.open(name)
        origin = file.footer.origin
        groups: Groups = []
        for number, group in enumerate(file.footer.groups):
            rows = file.read(number, segment_schema(origin.signal).names)
            bad = impossible_rows(rows, origin.signal, origin.vocab_size)
            if not bad.any():
                groups.append((group, rows))
            elif not bad.all():
                groups.append((group.provenance, rows.filter(pa.array(~bad))))
    except UnusableSegment:
        return False
    new = _publish_merged(store, origin, {"": groups})
    stamp = None if new is None else store.stamp(new)
    if new is not None and (stamp is None or problem_of(store, new) is not None):
        return False

    def may_go(opened: str) -> bool:
        lease.confirm()
        try:
            same = store.open(opened).footer == file.footer
        except UnusableSegment:
            return False
        return same and (new is None or store.stamp(new) == stamp)

    return store.take_away(name, may_go)


def _stale_files(store: TeacherStore, dry_run: bool) -> list[str]:
    """Remove the temporary files of writers that have died; their names."""
    selector = pafs.FileSelector(f"{store.folder.root}/{SEGMENTS}", allow_not_found=True)
    names = [
        info.base_name
        for info in store.folder.filesystem().get_file_info(selector)
        if TEMPORARY.fullmatch(info.base_name)
        and info.type == pafs.FileType.File
        and time.time() - (info.mtime_ns or 0) / 1e9 > STALE_S
    ]
    return [name for name in names if dry_run or store.take_away(name, lambda _: True)]


def refuse_foreign(store: TeacherStore) -> None:
    """Raise RunError if the folder is no teacher store."""
    if not store.folder.exists(SEGMENTS):
        raise RunError(
            f"{store.path} is no teacher store: it has no folder '{SEGMENTS}'; name the folder "
            "that a run printed as its teacher store"
        )
    names = store.names()
    if names and not any(OWN_NAME.fullmatch(name) for name in names):
        problems = read_each(partial(problem_of, store), names)
        if all(isinstance(problem, ForeignFile) for problem in problems.values()):
            raise RunError(
                f"{store.path} is no teacher store: no file of its folder '{SEGMENTS}' is a "
                f"segment (for example {names[0]}); name the folder that a run printed"
            )


def _refuse_links(store: TeacherStore) -> None:
    """Raise RunError if the segments are not in the store's own folder, but behind a link."""
    if store.folder.is_local and os.path.islink(f"{store.folder.root}/{SEGMENTS}"):
        raise RunError(
            f"the folder '{SEGMENTS}' of the teacher store {store.path} is a link, and nothing is "
            "removed through a link; name the folder that holds the segments' folder itself"
        )


def _unusable(results: Mapping[str, UnusableSegment | None]) -> RefusedSegments:
    """The segments that are there and cannot be used, from what ``problem_of`` said of each."""
    return {n: e for n, e in results.items() if e is not None and not isinstance(e, GoneSegment)}


def _identity(store: TeacherStore, name: str) -> str | UnusableSegment:
    """The identity of a segment's teacher."""
    try:
        return store.open(name).footer.origin.teacher_identity
    except UnusableSegment as error:
        return error


def _catalogue_to_compact(
    store: TeacherStore,
) -> tuple[Catalogue, NDArray[np.int64], RefusedSegments]:
    """The catalogue to compact by, the witnesses [S] of its rows, and the segments left out.

    Reading a catalogue verifies only footers and keys. Therefore segments with duplicate keys are
    read whole here, and if one cannot be used, the catalogue is read again without it. Else a sound
    row could be removed as the duplicate of a damaged one.
    """
    refused: RefusedSegments = {}
    sound: set[str] = set()
    while True:
        catalogue = store.catalogue(without=refused)
        refused |= catalogue.refused
        witnesses = catalogue.witnesses()
        duplicates = witnesses != np.arange(catalogue.rows)
        duplicate_keys = catalogue.keys.filter(pa.array(duplicates))
        shared = pc.is_in(catalogue.keys, value_set=duplicate_keys).to_numpy(zero_copy_only=False)
        names = [catalogue.entries[s].name for s in np.unique(catalogue.segment[shared])]
        results = read_each(partial(problem_of, store), [n for n in names if n not in sound])
        if not any(results.values()):
            return catalogue, witnesses, refused
        sound.update(name for name, problem in results.items() if problem is None)
        refused |= _unusable(results)


def _publish_merged(store: TeacherStore, origin: Origin, kept: Mapping[str, Groups]) -> str | None:
    """Publish the groups kept of a batch's segments (by name) as one segment; returns its name.

    None if no group is kept. The merged segment's name may be taken, by one of another origin, with
    other answers or unusable. That one stays, and the next free name is used, unless the segment of
    that name is the only one of the batch with rows to keep.
    """
    groups = [group for of_segment in kept.values() for group in of_segment]
    if not groups:
        return None
    name = segment_name([k for _, rows in groups for k in rows["key"].to_pylist()], origin.signal)
    if [n for n, of_segment in kept.items() if of_segment] == [name]:
        return name
    data = encode(origin, groups)
    while not store.put(name, data):
        name = next_name(name)
    return name


def _noted(group: tuple[Group | Provenance, pa.Table]) -> tuple[Provenance, pa.Array]:
    of, rows = group
    return of if isinstance(of, Provenance) else of.provenance, rows["key"].combine_chunks()


def _segments_to_merge(
    catalogue: Catalogue, needed: NDArray[np.bool_], sizes: Mapping[str, int]
) -> Iterator[tuple[Origin, list[int]]]:
    """Batches of segments (entry numbers) to be merged into one each.

    A batch has one origin, at most COMPACT_ROWS rows and COMPACT_BYTES of files. A single segment
    is a batch only if it has duplicate rows.
    """
    by_origin: dict[Origin, list[int]] = {}
    for number, entry in enumerate(catalogue.entries):
        by_origin.setdefault(entry.footer.origin, []).append(number)
    with_duplicates = set(catalogue.segment[~needed].tolist())
    for origin, segments in by_origin.items():
        batch: list[int] = []
        rows = bytes_ = 0
        for segment in segments:
            entry = catalogue.entries[segment]
            more, size = entry.footer.rows, sizes.get(entry.name, 0)
            if batch and (rows + more > COMPACT_ROWS or bytes_ + size > COMPACT_BYTES):
                if len(batch) > 1 or batch[0] in with_duplicates:
                    yield origin, batch
                batch, rows, bytes_ = [], 0, 0
            batch.append(segment)
            rows, bytes_ = rows + more, bytes_ + size
        if len(batch) > 1 or (batch and batch[0] in with_duplicates):
            yield origin, batch


def _needed_groups(
    store: TeacherStore, catalogue: Catalogue, segment: int, needed: NDArray[np.bool_]
) -> Iterator[tuple[Group | Provenance, pa.Table]]:
    """A segment's groups, verified and without duplicate rows.

    An unchanged group keeps its ``Group`` with the old checksums. Raises UnusableSegment.
    """
    entry = catalogue.entries[segment]
    columns = segment_schema(entry.footer.origin.signal).names
    in_segment = catalogue.rows_of(segment)
    opened: dict[str, SegmentFile] = {}
    for number, group in enumerate(entry.footer.groups):
        rows = store.read_group(entry.name, number, columns, opened)
        refuse_impossible(entry.name, rows, entry.footer.origin)
        in_group = in_segment[catalogue.group[in_segment] == number]
        if not rows["key"].combine_chunks().equals(catalogue.keys.take(pa.array(in_group))):
            raise GoneSegment(entry.name, "another segment has replaced it")
        keep = needed[in_group]
        if keep.all():
            yield group, rows
        elif keep.any():
            yield group.provenance, rows.filter(pa.array(keep))
