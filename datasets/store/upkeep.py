"""Maintenance of a teacher store: verify and prune (``compaction.py`` has compact).

Each can be interrupted at any moment without losing a row, and can run beside training runs that
use the store. Nothing is removed that could not be read: unreadable segments and those of a newer
version stay. A lease (``lease.py``) lets one process at a time remove segments; how that is safe
even without it is in ``removal.py``.

Imports neither Ray nor torch.
"""

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.fs as pafs

from raystill.base.errors import RunError
from raystill.base.run_folder import is_utf8
from raystill.datasets.store.compaction import Groups, problem_of, publish_merged
from raystill.datasets.store.footer import segment_schema
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.reading import (
    DamagedSegment,
    ForeignFile,
    GoneSegment,
    ImpossibleValues,
    RefusedSegments,
    UnusableSegment,
    read_each,
)
from raystill.datasets.store.removal import TEMPORARY
from raystill.datasets.store.segment import OWN_NAME, SegmentFile
from raystill.datasets.store.store import SEGMENTS, Progress, TeacherStore
from raystill.datasets.store.values import impossible_rows

STALE_S = 3600.0
"""Age from which a temporary file is taken for one whose writer has died."""


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did."""

    files: list[str]  # removed, or to be removed in a dry run
    refused: RefusedSegments  # left: they may be sound


def verify(store: TeacherStore, progress: Progress | None = None) -> RefusedSegments:
    """Read all segments whole, check every checksum, and return those that cannot be used."""
    return _unusable(read_each(partial(problem_of, store), store.names(), progress))


def prune(
    store: TeacherStore, refused: Mapping[str, UnusableSegment], teacher: str | None, dry_run: bool
) -> Pruned:
    """Remove damaged segments, old temporary files and, on request, the segments of one teacher.

    refused: what ``verify`` returned. Damaged segments are read again when they were set aside,
    since a run may have replaced one meanwhile; the others of it stay. Groups of a damaged segment
    that are as they were written, and of one with impossible values all other rows, are published
    in another before it goes. Files that
    never were segments stay, and so do links.
    teacher: the beginning of a teacher's identity, whose segments are removed; None for none.
    dry_run: only report what would be removed.

    Raises RunError if another process compacts or prunes the store.
    """
    store.refuse_link()
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

        removed = []
        for name in names:
            mended = None
            if not dry_run and isinstance(results.get(name), DamagedSegment):
                mended = _mend(store, lease, name)
            if dry_run or mended or (mended is None and store.take_away(name, may_go)):
                removed.append(name)
            elif mended is False and store.exists(name):
                left[name] = results[name]
        removed += [name for name in to_mend if dry_run or _mend(store, lease, name)]
        left |= {n: refused[n] for n in to_mend if n not in removed and store.exists(n)}
        return Pruned(sorted(removed + _stale_files(store, dry_run)), left)


def _mend(store: TeacherStore, lease: Lease, name: str) -> bool | None:
    """Put the sound rows of a segment in its place; whether that was done. None: it has none.

    They are those of groups that are as they were written, without impossible values. They are
    published, and read again, before the segment goes.
    """
    try:
        file = store.open(name)
        groups, damaged = _sound_groups(file)
    except DamagedSegment:
        return None
    except UnusableSegment:
        return False
    if damaged and not groups:
        return None
    new = publish_merged(store, file.footer.origin, {"": groups})
    stamp = None if new is None else store.stamp(new)
    if new is not None and (stamp is None or problem_of(store, new) is not None):
        return False

    def may_go(opened: str) -> bool:
        lease.confirm()
        try:
            same = store.open(opened).footer == file.footer
        except UnusableSegment:
            return False
        # The footer of one that a run has written in its place meanwhile may be the same.
        as_before = not damaged or isinstance(problem_of(store, opened), DamagedSegment)
        return same and as_before and (new is None or store.stamp(new) == stamp)

    return store.take_away(name, may_go)


def _sound_groups(file: SegmentFile) -> tuple[Groups, bool]:
    """A segment's sound rows by their groups, and whether it has damaged groups. Raises
    UnusableSegment where one cannot be judged.
    """
    origin, damaged = file.footer.origin, False
    groups: Groups = []
    for number, group in enumerate(file.footer.groups):
        try:
            rows = file.read(number, segment_schema(origin.signal).names)
        except DamagedSegment:
            damaged = True
            continue
        bad = impossible_rows(rows, origin.signal, origin.vocab_size)
        if not bad.any():
            groups.append((group, rows))
        elif not bad.all():
            groups.append((group.provenance, rows.filter(pa.array(~bad))))
    return groups, damaged


def _stale_files(store: TeacherStore, dry_run: bool) -> list[str]:
    """Remove the temporary files of writers that have died; their names."""
    filesystem, path = store.folder.filesystem(), f"{store.folder.root}/{SEGMENTS}"
    if store.folder.is_local:  # Whose names need not be UTF-8.
        there = os.listdir(path) if os.path.isdir(path) else []
        files = [f"{path}/{name}" for name in there if TEMPORARY.fullmatch(name) and is_utf8(name)]
        infos = filesystem.get_file_info(files)
    else:
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    names = [
        info.base_name
        for info in infos
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


def _unusable(results: Mapping[str, UnusableSegment | None]) -> RefusedSegments:
    """The segments that are there and cannot be used, from what ``problem_of`` said of each."""
    return {n: e for n, e in results.items() if e is not None and not isinstance(e, GoneSegment)}


def _identity(store: TeacherStore, name: str) -> str | UnusableSegment:
    """The identity of a segment's teacher."""
    try:
        return store.open(name).footer.origin.teacher_identity
    except UnusableSegment as error:
        return error
