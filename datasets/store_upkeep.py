"""Looking after a teacher store: verify, compact, prune. Each may be broken off at any moment.

Imports neither Ray nor torch.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raystill.datasets.segment import (
    DamagedSegment,
    Group,
    Origin,
    Payer,
    encode,
    segment_name,
    segment_schema,
)
from raystill.datasets.store import SEGMENTS, Catalogue, TeacherStore

COMPACT_ROWS = 8192
"""Rows of a compacted segment, at most (a larger one is left as it is)."""

STALE_S = 3600.0
"""Age from which a half-written file is nobody's any more."""

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Compacted:
    """What compacting did: segments merged into how many, and duplicate rows left out."""

    merged: int
    into: int
    duplicates: int


def verify(store: TeacherStore, progress: Told | None = None) -> dict[str, str]:
    """Read everything and hold it against its checksums: why, by name, of each damaged segment."""
    damaged = {}
    names = store.names()
    for number, name in enumerate(names, 1):
        try:
            file = store.open(name)
            columns = segment_schema(file.footer.origin.signal).names
            for group in range(len(file.footer.groups)):
                file.read(group, columns)
        except DamagedSegment as error:
            damaged[name] = str(error)
        if progress is not None:
            progress(number, len(names))
    return damaged


def compact(store: TeacherStore, progress: Told | None = None) -> Compacted:
    """Merge small segments of one origin, group by group, and leave duplicate rows out.

    Origins differ in their signal too, so two signals of a key stay two segments; a row goes only
    where another that stays serves every wish it serves.
    A merged segment is published before those it replaces are removed, so every row can be read
    at any moment; a run that finds one of those gone looks the store through again. Damaged
    segments are left where they are.
    """
    catalogue = store.catalogue()
    counting = catalogue.counting()
    batches = list(_batches(catalogue, counting))
    merged = into = 0
    for number, (origin, segments) in enumerate(batches, 1):
        groups = [g for segment in segments for g in _kept(store, catalogue, segment, counting)]
        old = [catalogue.entries[segment].name for segment in segments]
        new = None
        if groups:
            keys = [key for _, rows in groups for key in rows["key"].to_pylist()]
            new = segment_name(keys, origin.signal)
            if new not in old:
                store.folder.write_bytes(f"{SEGMENTS}/{new}", encode(origin, groups))
        for name in old:
            if name != new:
                remove(store, name)
        merged, into = merged + len(old), into + (new is not None)
        if progress is not None:
            progress(number, len(batches))
    return Compacted(merged, into, int((~counting).sum()))


def prune(
    store: TeacherStore, damaged: dict[str, str], teacher: str | None, dry_run: bool
) -> list[str]:
    """Remove damaged segments, stale half-written files, and those of one teacher; their names.

    ``teacher``: the beginning of an identity; its segments go too. ``dry_run``: remove nothing.
    """
    names = list(damaged)
    if teacher:
        for name in store.names():
            if name not in damaged:
                identity = store.open(name).footer.origin.teacher_identity
                names += [name] if identity.startswith(teacher) else []
    selector = pafs.FileSelector(f"{store.folder.root}/{SEGMENTS}", allow_not_found=True)
    for info in store.folder.filesystem().get_file_info(selector):
        stale = time.time() - (info.mtime_ns or 0) / 1e9 > STALE_S
        if info.base_name.startswith(".") and stale:
            names.append(info.base_name)
    for name in names if not dry_run else ():
        remove(store, name)
    return sorted(names)


def remove(store: TeacherStore, name: str) -> None:
    """Delete one file of the store's segments; one that is gone already is no error."""
    with suppress(FileNotFoundError):
        store.folder.filesystem().delete_file(f"{store.folder.root}/{SEGMENTS}/{name}")


def _batches(catalogue: Catalogue, counting: np.ndarray) -> Iterator[tuple[Origin, list[int]]]:
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
    store: TeacherStore, catalogue: Catalogue, segment: int, counting: np.ndarray
) -> Iterator[tuple[Group | Payer, pa.Table]]:
    """The segment's groups without rows that another answer to the same key is served for."""
    entry = catalogue.entries[segment]
    file = store.open(entry.name)
    columns = segment_schema(entry.footer.origin.signal).names
    mine = np.flatnonzero(catalogue.segment == segment)
    for number, group in enumerate(entry.footer.groups):
        rows = file.read(number, columns)
        keep = counting[mine[catalogue.group[mine] == number]]
        if keep.all():
            yield group, rows
        elif keep.any():
            yield group.payer, rows.filter(pa.array(keep))
