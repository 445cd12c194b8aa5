"""Looking after a teacher store: verify, compact, prune. Each may be broken off at any moment.

None removes what it has not read: what is out of reach at the moment, or of a newer version, stays.

Imports neither Ray nor torch.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.datasets.store.catalogue import Catalogue
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    UnusableSegment,
    look_at_all,
)
from raystill.datasets.store.segment import (
    Group,
    Origin,
    Provenance,
    SegmentFile,
    beside,
    encode,
    segment_name,
    segment_schema,
)
from raystill.datasets.store.store import SEGMENTS, TeacherStore

COMPACT_ROWS = 8192
"""Rows of a compacted segment, at most (a larger one is left as it is)."""

STALE_S = 3600.0
"""Age from which a half-written file is nobody's any more."""

Told = Callable[[int, int], None]
Groups = list[tuple[Group | Provenance, pa.Table]]
Refused = dict[str, UnusableSegment]
"""Segments that cannot be used, by name; the class says why, and what may be done."""


@dataclass(frozen=True)
class Compacted:
    """What compacting did: segments merged into how many, duplicate rows left out, and which
    segments were left as they are because they cannot be used.
    """

    merged: int
    into: int
    duplicates: int
    refused: Refused = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """Names of the files that were removed, or would be; segments that could not be judged."""

    files: list[str]
    refused: Refused


def verify(store: TeacherStore, progress: Told | None = None) -> Refused:
    """Read everything and hold it against its checksums: what cannot be used."""
    seen = look_at_all(partial(_flaw, store), store.names(), progress)
    return {n: flaw for n, flaw in seen.items() if flaw and not isinstance(flaw, GoneSegment)}


def compact(store: TeacherStore, progress: Told | None = None) -> Compacted:
    """Merge small segments of one origin, group by group, and leave duplicate rows out.

    Origins differ in their signal too, so two signals of a key stay two segments; a row goes only
    where another that stays serves every wish it serves, and was read to be sure.
    A merged segment is published before those it replaces are removed, so every row can be read
    at any moment; a run that finds one of those gone looks the store through again. Segments that
    cannot be used are left where they are and count for nothing; ``refused`` names them.
    """
    catalogue, counting, refused = _relied_on(store)
    batches = list(_batches(catalogue, counting))
    merged = into = duplicates = 0
    for number, (origin, segments) in enumerate(batches, 1):
        kept: dict[str, Groups] = {}
        for segment in segments:
            entry = catalogue.entries[segment]
            try:
                kept[entry.name] = list(_kept(store, catalogue, segment, counting))
            except GoneSegment:
                continue
            except UnusableSegment as error:
                refused[entry.name] = error
                continue
            rows = sum(len(rows) for _, rows in kept[entry.name])
            duplicates += entry.footer.rows - rows
        new = _publish_merged(store, origin, kept)
        for name in kept:
            if name != new:
                remove(store, name)
        merged, into = merged + len(kept), into + (new is not None)
        if progress is not None:
            progress(number, len(batches))
    return Compacted(merged, into, duplicates, refused)


def prune(
    store: TeacherStore, refused: Mapping[str, UnusableSegment], teacher: str | None, dry_run: bool
) -> Pruned:
    """Remove damaged segments, stale half-written files, and those of one teacher.

    ``refused``: what ``verify`` found. The damaged ones of it are read once more before they go,
    since a run may have replaced one meanwhile; the others stay.
    ``teacher``: the beginning of an identity; its segments go too. ``dry_run``: remove nothing.
    """
    names = []
    left = {name: flaw for name, flaw in refused.items() if not isinstance(flaw, DamagedSegment)}
    damaged = [name for name in refused if name not in left]
    for name, flaw in look_at_all(partial(_flaw, store), damaged).items():
        if isinstance(flaw, DamagedSegment):
            names.append(name)
        elif flaw and not isinstance(flaw, GoneSegment):
            left[name] = flaw
    others = [name for name in store.names() if name not in refused] if teacher else []
    for name, found in look_at_all(partial(_identity, store), others).items():
        if isinstance(found, str):
            names += [name] if found.startswith(teacher or "") else []
        elif not isinstance(found, GoneSegment):
            left[name] = found
    selector = pafs.FileSelector(f"{store.folder.root}/{SEGMENTS}", allow_not_found=True)
    for info in store.folder.filesystem().get_file_info(selector):
        stale = time.time() - (info.mtime_ns or 0) / 1e9 > STALE_S
        if info.base_name.startswith(".") and stale:
            names.append(info.base_name)
    for name in names if not dry_run else ():
        remove(store, name)
    return Pruned(sorted(names), left)


def remove(store: TeacherStore, name: str) -> None:
    """Delete one file of the store's segments; one that is gone already is no error."""
    with suppress(FileNotFoundError):
        store.folder.filesystem().delete_file(f"{store.folder.root}/{SEGMENTS}/{name}")


def _flaw(store: TeacherStore, name: str) -> UnusableSegment | None:
    """Why a segment cannot be used; None where all of it was read and is sound."""
    try:
        file = store.open(name)
        columns = segment_schema(file.footer.origin.signal).names
        for group in range(len(file.footer.groups)):
            file.read(group, columns)
    except UnusableSegment as error:
        return error
    return None


def _identity(store: TeacherStore, name: str) -> str | UnusableSegment:
    """The teacher of a segment."""
    try:
        return store.open(name).footer.origin.teacher_identity
    except UnusableSegment as error:
        return error


def _relied_on(store: TeacherStore) -> tuple[Catalogue, NDArray[np.bool_], Refused]:
    """A catalogue to compact by, which rows of it count, and what it leaves out.

    A catalogue has seen footers and keys. So segments that share a key are read whole, and looked
    at without those that are found to be of no use: else a row might go for the sake of one that
    cannot be read.
    """
    refused: Refused = {}
    sound: set[str] = set()
    while True:
        catalogue = store.catalogue(without=refused)
        refused |= catalogue.refused
        counting = catalogue.counting()
        doubled = catalogue.keys.filter(pa.array(~counting))
        shared = pc.is_in(catalogue.keys, value_set=doubled).to_numpy(zero_copy_only=False)
        names = [catalogue.entries[s].name for s in np.unique(catalogue.segment[shared])]
        seen = look_at_all(partial(_flaw, store), [name for name in names if name not in sound])
        flaws = {name: flaw for name, flaw in seen.items() if flaw is not None}
        if not flaws:
            return catalogue, counting, refused
        sound.update(name for name in seen if name not in flaws)
        refused |= {n: flaw for n, flaw in flaws.items() if not isinstance(flaw, GoneSegment)}


def _publish_merged(store: TeacherStore, origin: Origin, kept: Mapping[str, Groups]) -> str | None:
    """Publish what is kept of a batch (by name) as one segment; its name, None where it is nothing.

    Its rows may be those of a segment that is there: of another origin, with other answers, or one
    that cannot be used. That keeps its file and name, unless it is itself all that is kept.
    """
    groups = [group for mine in kept.values() for group in mine]
    if not groups:
        return None
    name = segment_name([k for _, rows in groups for k in rows["key"].to_pylist()], origin.signal)
    if [n for n, mine in kept.items() if mine] == [name]:
        return name
    while store.exists(name):
        name = beside(name)
    store.folder.write_bytes(f"{SEGMENTS}/{name}", encode(origin, groups))
    return name


def _batches(
    catalogue: Catalogue, counting: NDArray[np.bool_]
) -> Iterator[tuple[Origin, list[int]]]:
    """Segments to merge: of one origin, up to COMPACT_ROWS, or single ones with duplicates."""
    by_origin: dict[Origin, list[int]] = {}
    for number, entry in enumerate(catalogue.entries):
        by_origin.setdefault(entry.footer.origin, []).append(number)
    spoilt = set(catalogue.segment[~counting].tolist())
    for origin, segments in by_origin.items():
        batch: list[int] = []
        rows = 0
        for segment in segments:
            size = catalogue.entries[segment].footer.rows
            if batch and rows + size > COMPACT_ROWS:
                if len(batch) > 1 or batch[0] in spoilt:
                    yield origin, batch
                batch, rows = [], 0
            batch.append(segment)
            rows += size
        if len(batch) > 1 or (batch and batch[0] in spoilt):
            yield origin, batch


def _kept(
    store: TeacherStore, catalogue: Catalogue, segment: int, counting: NDArray[np.bool_]
) -> Iterator[tuple[Group | Provenance, pa.Table]]:
    """The segment's groups without rows that another answer to the same key is served for."""
    entry = catalogue.entries[segment]
    columns = segment_schema(entry.footer.origin.signal).names
    mine = np.flatnonzero(catalogue.segment == segment)
    opened: dict[str, SegmentFile] = {}
    for number, group in enumerate(entry.footer.groups):
        rows = store.read_group(entry.name, number, columns, opened)
        here = mine[catalogue.group[mine] == number]
        if not rows["key"].combine_chunks().equals(catalogue.keys.take(pa.array(here))):
            raise GoneSegment(entry.name, "another has taken its place")
        keep = counting[here]
        if keep.all():
            yield group, rows
        elif keep.any():
            yield group.provenance, rows.filter(pa.array(keep))
