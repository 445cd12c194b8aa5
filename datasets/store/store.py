"""The teacher store: every answer ever paid for, by key, in segments that appear whole or not.

``<store>/segments/<hash of the keys>.parquet``. Writers never share a file: a segment is written
beside its name and published by one atomic step, and where its name is taken already, the answers
that were there first are the ones that count. On object stores, whose uploads appear when they are
closed, the last of two writers of the same rows at once counts. A name held by what cannot be read
now, or by a newer version, is left to it, and the answers are published beside it.

Imports neither Ray nor torch.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.base.run_folder import RunFolder
from raystill.datasets.store.catalogue import Catalogue, Entry, catalogue_of
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    UnreadableSegment,
    UnusableSegment,
    look_at_all,
    patiently,
)
from raystill.datasets.store.segment import (
    Origin,
    Provenance,
    SegmentFile,
    beside,
    encode,
    segment_name,
)

SEGMENTS = "segments"
READERS = 8


class TeacherStore:
    """A store folder, local or on an object store; pickles, since it holds only the path."""

    def __init__(self, path: str) -> None:
        self.folder = RunFolder(path)

    @property
    def path(self) -> str:
        """The store's absolute path or URI."""
        return self.folder.path

    def names(self) -> list[str]:
        """Names of all segments, sorted."""
        selector = pafs.FileSelector(f"{self.folder.root}/{SEGMENTS}", allow_not_found=True)
        infos = self.folder.filesystem().get_file_info(selector)
        return sorted(i.base_name for i in infos if i.base_name.endswith(".parquet"))

    def open(self, name: str) -> SegmentFile:
        """A segment by name. Raises UnusableSegment; GoneSegment where there is none."""
        try:
            source = self.folder.open_input(f"{SEGMENTS}/{name}")
        except FileNotFoundError as error:
            raise GoneSegment(name, "there is no such file") from error
        except OSError as error:
            raise UnreadableSegment(name, str(error)) from error
        return SegmentFile(source, name)

    def exists(self, name: str) -> bool:
        """Whether a segment of that name is published."""
        return self.folder.exists(f"{SEGMENTS}/{name}")

    def size(self, name: str) -> int:
        """Bytes of a segment."""
        path = f"{self.folder.root}/{SEGMENTS}/{name}"
        return int(self.folder.filesystem().get_file_info(path).size or 0)

    def catalogue(
        self,
        without: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Catalogue:
        """Look through all segments but ``without``: their footers and keys, nothing else of them.

        ``progress`` is called with (segments read, segments there).
        """
        names = [name for name in self.names() if name not in without]
        read: list[tuple[Entry, list[pa.Array]]] = []
        refused: dict[str, UnusableSegment] = {}
        for name, found in look_at_all(self._keys, names, progress, READERS).items():
            if not isinstance(found, UnusableSegment):
                read.append(found)
            elif not isinstance(found, GoneSegment):
                refused[name] = found
        read.sort(key=lambda item: item[0].footer.origin.signal.richness, reverse=True)
        return catalogue_of(read, refused)

    def read(
        self, catalogue: Catalogue, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Columns of stored ``rows``, in their order. Raises UnusableSegment."""
        segments, groups = catalogue.segment[rows], catalogue.group[rows]
        parts, order = [], []
        opened: dict[str, SegmentFile] = {}
        for segment, group in sorted(set(zip(segments.tolist(), groups.tolist(), strict=True))):
            mine = np.flatnonzero((segments == segment) & (groups == group))
            part = self.read_group(catalogue.entries[segment].name, group, columns, opened)
            parts.append(part.take(pa.array(catalogue.place[rows[mine]])))
            order.append(mine)
        back = np.argsort(np.concatenate(order))
        return pa.concat_tables(parts).take(pa.array(back)).combine_chunks()

    def publish(
        self, origin: Origin, provenance: Provenance, rows: pa.Table
    ) -> tuple[str, pa.Table]:
        """Write one group's answers; (name, the rows that are published under it).

        Where another writer was first, the rows are those it published; a damaged segment of the
        name is replaced. What may be sound but cannot be used keeps its name.
        """
        name = segment_name(rows["key"].to_pylist(), origin.signal)
        data = encode(origin, [(provenance, rows)])
        while not self._put(name, data):
            try:
                return name, self.rows_of(name, rows["key"], rows.column_names)[1]
            except (DamagedSegment, GoneSegment):
                self.folder.write_bytes(f"{SEGMENTS}/{name}", data)
                break
            except UnusableSegment:
                name = beside(name)
        return name, rows

    def rows_of(
        self, name: str, keys: pa.ChunkedArray, columns: Sequence[str]
    ) -> tuple[Origin, pa.Table]:
        """Columns of a segment's rows of ``keys``, in their order. Raises UnusableSegment."""

        def read() -> tuple[Origin, pa.Table]:
            file = self.open(name)
            return file.footer.origin, file.rows_of(keys, columns)

        return patiently(read)

    def read_group(
        self, name: str, group: int, columns: Sequence[str], opened: dict[str, SegmentFile]
    ) -> pa.Table:
        """Columns of one group of a segment, which is ``opened`` once. Raises UnusableSegment."""

        def read() -> pa.Table:
            file = opened.pop(name, None) or self.open(name)
            table = file.read(group, columns)
            opened[name] = file
            return table

        return patiently(read)

    def _keys(self, name: str) -> tuple[Entry, list[pa.Array]] | UnusableSegment:
        try:
            file = self.open(name)
            groups = range(len(file.footer.groups))
            return Entry(name, file.footer), [
                file.read(i, ["key"])["key"].combine_chunks() for i in groups
            ]
        except UnusableSegment as error:
            return error

    def _put(self, name: str, data: bytes) -> bool:
        """Publish unless the name is taken: then False, and nothing changes."""
        if self.folder.is_local:
            return self._link(name, data)
        if self.exists(name):
            return False
        self.folder.write_bytes(f"{SEGMENTS}/{name}", data)
        return True

    def _link(self, name: str, data: bytes) -> bool:
        """``_put`` in a local store."""
        folder = f"{self.folder.root}/{SEGMENTS}"
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.link(temporary, f"{folder}/{name}")
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True


@dataclass(frozen=True)
class RowCounts:
    """Rows in segments that a run published: answers it asked for, and those it had scored."""

    asked: int = 0
    scored: int = 0


def rows_requested_by(catalogue: Catalogue, run: str) -> dict[str, RowCounts]:
    """What ``run`` has paid for, by purpose."""
    rows: Counter[tuple[str, bool]] = Counter()
    for entry in catalogue.entries:
        for group in entry.footer.groups:
            if group.run == run:
                rows[group.purpose, group.scored] += group.rows
    return {p: RowCounts(rows[p, False], rows[p, True]) for p in ("training", "evaluation")}
