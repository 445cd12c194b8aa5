"""The teacher store: every answer ever paid for, by key, in segments that appear whole or not.

``<store>/segments/<hash of the keys>.parquet``. Writers never share a file: a segment is written
beside its name and published by one atomic step, and where its name is taken already, the answers
that were there first are the ones that count. On object stores, whose uploads appear when they are
closed, the last of two writers of the same rows counts.

Imports neither Ray nor torch.

Legend: N rows looked for, S rows stored.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.cluster.run_folder import RunFolder
from raystill.datasets.schema import KEY_BYTES
from raystill.datasets.segment import (
    DamagedSegment,
    Footer,
    Origin,
    Payer,
    SegmentFile,
    encode,
    segment_name,
)
from raystill.datasets.signal import Signal

SEGMENTS = "segments"
READERS = 8
KEYS = pa.binary(KEY_BYTES)


@dataclass(frozen=True)
class Entry:
    """One sound segment of a catalogue."""

    name: str
    footer: Footer


@dataclass
class Catalogue:
    """What a store held when it was looked through: where each key is, and what was refused.

    Row s is stored in ``entries[segment[s]]``, group ``group[s]``, place ``place[s]``; the richest
    signal first, then by name. Of several answers to a key the first is the one that counts.

    As a rule they say the same and differ in their signal, since a poorer one is enriched by
    scoring it. Two runs that asked at once may have stored two answers, though. Then each wish
    still has one answer, the first that serves it (``serving``), the same for every reader of the
    store; where none does, the first of all is the one that is scored. But a wish that follows from
    ``hidden`` alone and one that follows from ``topk`` alone may then be told different answers.
    """

    entries: list[Entry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # name -> why
    keys: pa.Array = field(default_factory=lambda: pa.array([], KEYS))  # [S]
    segment: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    group: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    place: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def rows(self) -> int:
        """Stored rows, duplicates included."""
        return len(self.keys)

    @property
    def duplicates(self) -> int:
        """Rows that no wish is served from."""
        return self.rows - int(self.counting().sum())

    def counting(self) -> NDArray[np.bool_]:
        """Which rows count for some wish, [S]: no other row of the key comes first and serves
        whatever they serve, be it by the same answer or by another.
        """
        signals = [entry.footer.origin.signal for entry in self.entries]
        counting = np.zeros(self.rows, bool)
        for wish in set(signals):
            mine = self._rows_of([signal == wish for signal in signals])
            serving = self._rows_of([signal.serves(wish) for signal in signals])
            first = pc.index_in(self.keys.take(mine), value_set=self.keys.take(serving))
            counting[mine] = serving.to_numpy()[first.to_numpy()] == mine.to_numpy()
        return counting

    def serving(self, wish: Signal) -> "Catalogue":
        """The same with the segments first that ``wish`` is served from; else in this order."""
        serves = np.array([e.footer.origin.signal.serves(wish) for e in self.entries], bool)
        order = np.argsort(~serves, kind="stable")
        number = np.argsort(order).astype(np.int32)
        rows = np.argsort(number[self.segment], kind="stable")
        return Catalogue(
            entries=[self.entries[index] for index in order],
            refused=self.refused,
            keys=self.keys.take(pa.array(rows)),
            segment=number[self.segment][rows],
            group=self.group[rows],
            place=self.place[rows],
        )

    def _rows_of(self, entries: list[bool]) -> pa.Int64Array:
        """Numbers of the rows of those entries, ascending."""
        return pa.array(np.flatnonzero(np.array(entries, bool)[self.segment]), pa.int64())

    def locate(self, keys: pa.Array) -> NDArray[np.int64]:
        """Stored row of each of ``keys`` [N], -1 where there is none."""
        found = pc.index_in(keys.cast(KEYS), value_set=self.keys)
        return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


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
        """A segment by name. Raises DamagedSegment, also where it is gone."""
        try:
            source = self.folder.open_input(f"{SEGMENTS}/{name}")
        except OSError as error:
            raise DamagedSegment(name, str(error)) from error
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
        refused: dict[str, str] = {}
        with ThreadPoolExecutor(READERS, thread_name_prefix="catalogue") as pool:
            for number, found in enumerate(pool.map(self._keys, names), 1):
                if isinstance(found, DamagedSegment):
                    refused[found.name] = str(found)
                else:
                    read.append(found)
                if progress is not None:
                    progress(number, len(names))
        read.sort(key=lambda item: item[0].footer.origin.signal.richness, reverse=True)
        return _catalogue(read, refused)

    def read(
        self, catalogue: Catalogue, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Columns of stored ``rows``, in their order. Raises DamagedSegment."""
        segments, groups = catalogue.segment[rows], catalogue.group[rows]
        parts, order = [], []
        opened: dict[int, SegmentFile] = {}
        for segment, group in sorted(set(zip(segments.tolist(), groups.tolist(), strict=True))):
            if segment not in opened:
                opened[segment] = self.open(catalogue.entries[segment].name)
            mine = np.flatnonzero((segments == segment) & (groups == group))
            part = opened[segment].read(group, columns)
            parts.append(part.take(pa.array(catalogue.place[rows[mine]])))
            order.append(mine)
        back = np.argsort(np.concatenate(order))
        return pa.concat_tables(parts).take(pa.array(back)).combine_chunks()

    def publish(self, origin: Origin, payer: Payer, rows: pa.Table) -> tuple[str, pa.Table]:
        """Write one group's answers; (name, the rows that are published under it).

        Where another writer was first, the rows are those it published; a damaged segment of the
        name is replaced.
        """
        keys = rows["key"].to_pylist()
        name = segment_name(keys, origin.signal)
        data = encode(origin, [(payer, rows)])
        if self.folder.is_local:
            if not self._link(name, data):
                with suppress(DamagedSegment):
                    return name, self.open(name).rows_of(rows["key"], rows.column_names)
                self.folder.write_bytes(f"{SEGMENTS}/{name}", data)
        else:
            self.folder.write_bytes(f"{SEGMENTS}/{name}", data)
        return name, rows

    def _keys(self, name: str) -> tuple[Entry, list[pa.Array]] | DamagedSegment:
        try:
            file = self.open(name)
            groups = range(len(file.footer.groups))
            return Entry(name, file.footer), [
                file.read(i, ["key"])["key"].combine_chunks() for i in groups
            ]
        except DamagedSegment as error:
            return error

    def _link(self, name: str, data: bytes) -> bool:
        """Publish in a local store unless the name is taken: then False, and nothing changes."""
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


def _catalogue(read: list[tuple[Entry, list[pa.Array]]], refused: dict[str, str]) -> Catalogue:
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
class Paid:
    """Rows in segments that a run published: answers it asked for, and those it had scored."""

    asked: int = 0
    scored: int = 0


def rows_paid_for(catalogue: Catalogue, run: str) -> dict[str, Paid]:
    """What ``run`` has paid for, by purpose."""
    rows: Counter[tuple[str, bool]] = Counter()
    for entry in catalogue.entries:
        for group in entry.footer.groups:
            if group.run == run:
                rows[group.purpose, group.scored] += group.rows
    return {p: Paid(rows[p, False], rows[p, True]) for p in ("training", "evaluation")}
