"""The teacher store: all answers that any run has requested, by key, in a folder of segments.

The files are ``<store>/segments/<hash of the keys>.parquet``. A segment becomes visible whole or
not at all: on a local disk it is written to a temporary file and linked to its name, on S3 it is
one conditional request. If the name is taken, the answers that are already there are used. (On an
object store without conditional writes the last of two that write at the same time wins.) A segment
that cannot be read at the moment, or that a newer version wrote, keeps its name; the new answers
are then published under the next name (``segment.next_name``).

Imports neither Ray nor torch.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.base.object_store import ConditionIgnored
from raystill.base.run_folder import RunFolder
from raystill.datasets.store import removal
from raystill.datasets.store.catalogue import Catalogue, Entry, build_catalogue
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.reading import (
    DIGEST,
    DamagedSegment,
    GoneSegment,
    Listing,
    Names,
    UnreadableSegment,
    UnusableSegment,
    ending_of,
    files_in,
    read_each,
    with_retries,
)
from raystill.datasets.store.segment import OWN_NAME, SegmentFile, encode, next_name, segment_name

SEGMENTS = "segments"
READERS = 8
MERGED = "merged"
"""File with the names (16 bytes each) of segments that a compaction was about to remove."""
MERGED_KEPT_S = 86_400.0
"""For how long names stay in it beside those of a later compaction."""
MOST_GONE = 100
"""How often a name may be taken and its segment be gone before the store is held to be broken."""
LISTINGS = 8
"""How often a catalogue lists a store at most until a listing shows nothing that was not read."""


Progress = Callable[[int, int], None]
"""Called with (number done, number in all)."""

Merged = tuple[tuple[int, int] | None, Names]
"""Stamp of the file `MERGED`, None if there is none, and the names in it, ascending."""
NONE_MERGED: Merged = (None, Names.of([]))


class TeacherStore:
    """A store in a local folder or on an object store; it holds only the path, so it pickles."""

    def __init__(self, path: str) -> None:
        self.folder = RunFolder(path)

    @property
    def path(self) -> str:
        """The store's absolute path or URI."""
        return self.folder.path

    def names(self) -> list[str]:
        """Names of all segments, sorted."""
        return sorted(info.base_name for infos in self._files() for info in infos)

    def listing(self, without: Collection[str] = ()) -> Listing:
        """All segments except those ``without``, in no order."""
        return Listing.of(self._files(), without)

    def _files(self) -> Iterator[list[pafs.FileInfo]]:
        path = f"{self.folder.root}/{SEGMENTS}"
        return files_in(self.folder.filesystem(), path, self.folder.is_local)

    def open(self, name: str) -> SegmentFile:
        """Open a segment by name. Raises UnusableSegment (GoneSegment if there is no such file)."""
        try:
            source = self.folder.open_input(f"{SEGMENTS}/{name}")
        except FileNotFoundError as error:
            raise GoneSegment(name, "there is no such file") from error
        except OSError as error:
            raise UnreadableSegment(name, str(error)) from error
        return SegmentFile(source, name)

    def ending(self, name: str) -> str | None:
        """`ending_of` a segment, which tells if it is the same; None if it cannot be read."""
        try:
            with self.folder.open_input(f"{SEGMENTS}/{name}") as file:
                return ending_of(file)
        except OSError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is a segment of that name."""
        return self.folder.exists(f"{SEGMENTS}/{name}")

    def holds(self, name: str, data: bytes) -> bool:
        """Whether there is a segment of that name with these very bytes."""
        with suppress(OSError):
            return self.size(name) == len(data) and data == self.folder.read_bytes(
                f"{SEGMENTS}/{name}"
            )
        return False

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size and time of change of a segment, which tell if it is the same; None if gone."""
        return self._stamp(f"{SEGMENTS}/{name}")

    def _stamp(self, name: str) -> tuple[int, int] | None:
        info = self.folder.filesystem().get_file_info(f"{self.folder.root}/{name}")
        return (info.size, info.mtime_ns) if info.type == pafs.FileType.File else None

    def note_merged(self, names: Iterable[str]) -> None:
        """Write down, before they are removed, that these segments' rows are in others.

        A retry of the group that one of them is named for then knows that it was answered.
        """
        stamp = self._stamp(MERGED)
        new = io.BytesIO()  # Written from where it is: as bytes it would be there twice.
        if stamp is not None and time.time() - stamp[1] / 1e9 < MERGED_KEPT_S:
            known = self.folder.read_bytes(MERGED)
            new.write(known[: len(known) - len(known) % DIGEST.itemsize])  # It may have been cut.
        for name in names:
            if OWN_NAME.fullmatch(name) and not name.startswith("."):
                new.write(bytes.fromhex(name[:32]))
        if new.tell():
            new.seek(0)
            self.folder.write_bytes(MERGED, new)

    def merged(self, known: Merged = NONE_MERGED) -> Merged:
        """What `note_merged` wrote down; ``known`` if the file is the same."""
        stamp = self._stamp(MERGED)
        if stamp is None or stamp == known[0]:
            return NONE_MERGED if stamp is None else known
        data = self.folder.read_bytes(MERGED)
        digests = np.frombuffer(data, DIGEST, count=len(data) // DIGEST.itemsize)
        return stamp, Names(np.sort(digests), {})

    def size(self, name: str) -> int:
        """Size of a segment in bytes; 0 if there is none."""
        path = f"{self.folder.root}/{SEGMENTS}/{name}"
        return int(self.folder.filesystem().get_file_info(path).size or 0)

    def catalogue(
        self,
        without: Collection[str] = (),
        progress: Progress | None = None,
    ) -> Catalogue:
        """Read footers and keys of all segments except ``without``.

        ``progress`` is called with (segments read, segments in all).
        """
        results: dict[str, tuple[Entry, list[pa.Array]] | UnusableSegment] = {}
        for again in range(LISTINGS):
            listed = [name for name in self.names() if name not in without]
            # A segment that is gone was merged into one that this listing may be the first to show.
            results = {n: results[n] for n in listed if n in results}
            unread = [name for name in listed if name not in results]
            if again and not unread:
                break
            shown = None if again else progress
            read_now = read_each(self.keys_of, unread, shown, READERS)
            results |= {n: r for n, r in read_now.items() if not isinstance(r, GoneSegment)}
        read: list[tuple[Entry, list[pa.Array]]] = []
        refused: dict[str, UnusableSegment] = {}
        for name, result in sorted(results.items()):
            if isinstance(result, UnusableSegment):
                refused[name] = result
            else:
                read.append(result)
        read.sort(key=lambda item: item[0].footer.origin.signal.richness, reverse=True)
        return build_catalogue(read, refused)

    def read(
        self, catalogue: Catalogue, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """These columns of stored ``rows`` (numbers in the catalogue), in the order of ``rows``.

        Raises UnusableSegment.
        """
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
        """Publish one group's answers; returns the segment's name and the rows that are in it.

        If another writer was first, these are the rows that it published. A damaged segment of the
        name is taken away first. One that may be sound but cannot be used stays, and the next name
        is used.
        Raises OSError if the segment cannot be written.
        """
        name = segment_name(rows["key"].to_pylist(), origin.signal)
        data = encode(origin, [(provenance, rows)])
        keys, columns = rows["key"], rows.column_names

        def damaged(file: str) -> bool:
            try:
                self.rows_of(file, keys, columns)
            except DamagedSegment:
                return True
            except UnusableSegment:
                return False
            return False

        gone = 0
        while not self.put(name, data):
            try:
                return name, self.rows_of(name, keys, columns)[1]
            except GoneSegment:  # Removed meanwhile and the name is free, or a link to nothing.
                if (gone := gone + 1) > MOST_GONE:
                    raise OSError(f"{name} is there for writing, and not for reading") from None
                name = next_name(name) if self.exists(name) or self._is_link(name) else name
            except DamagedSegment:
                # Not simply written over: another writer may have replaced it since it was read.
                replaced = self._replaced(name, data, damaged)
                if replaced:
                    return name, rows
                removed = replaced is None and self.take_away(name, damaged)
                if not removed and damaged(name):
                    name = next_name(name)
            except UnusableSegment:
                name = next_name(name)
        return name, rows

    def _replaced(self, name: str, data: bytes, may_go: Callable[[str], bool]) -> bool | None:
        """Put ``data`` in the place of an object if ``may_go`` says so of it; whether it was done.

        Another writer's object, which has another version, stays. None where the store has no
        conditional writes.
        """
        if (objects := self.folder.objects()) is None:
            return None
        try:
            version = objects.version(f"{SEGMENTS}/{name}")
            return may_go(name) and objects.replace(f"{SEGMENTS}/{name}", data, version)
        except FileNotFoundError:
            return False
        except ConditionIgnored:
            return None

    def take_away(self, name: str, may_go: Callable[[str], bool]) -> bool:
        """Remove a segment if ``may_go`` says so of it; whether it was removed.

        may_go: is given the name under which the segment can be opened. In a local store it is
        asked twice, the second time when the file was set aside, so that a sound segment that has
        just taken the name is kept. On an object store, which cannot rename, it is asked once.
        Links are never removed.
        """
        folder = f"{self.folder.root}/{SEGMENTS}"
        if self._is_link(name) or not may_go(name):
            return False
        if not self.folder.is_local:
            self.folder.filesystem().delete_file(f"{folder}/{name}")
            return True
        aside = removal.set_aside(folder, name)
        if aside is None:
            return False
        goes = False
        try:
            goes = may_go(aside)
        finally:
            (removal.discard if goes else removal.put_back)(folder, aside)
        return goes

    def _is_link(self, name: str) -> bool:
        return self.folder.is_local and os.path.islink(f"{self.folder.root}/{SEGMENTS}/{name}")

    def refuse_link(self) -> None:
        """Raise RunError if the segments are not in the store's own folder, but behind a link."""
        if self.folder.is_local and os.path.islink(f"{self.folder.root}/{SEGMENTS}"):
            raise RunError(
                f"the folder '{SEGMENTS}' of the teacher store {self.path} is a link, and nothing "
                "is removed through a link; name the folder that holds the segments' folder itself"
            )

    def put_back_all(self) -> None:
        """Put back what an upkeep that died had set aside. Nothing is then lost by its death."""
        if self.folder.is_local:
            removal.put_all_back(f"{self.folder.root}/{SEGMENTS}")

    def rows_of(
        self, name: str, keys: pa.ChunkedArray, columns: Sequence[str]
    ) -> tuple[Origin, pa.Table]:
        """The segment's origin, and these columns of its rows with ``keys``, in that order.

        Raises UnusableSegment.
        """

        def read() -> tuple[Origin, pa.Table]:
            file = self.open(name)
            return file.footer.origin, file.rows_of(keys, columns)

        return with_retries(read)

    def read_group(
        self, name: str, group: int, columns: Sequence[str], opened: dict[str, SegmentFile]
    ) -> pa.Table:
        """These columns of one group of a segment. Raises UnusableSegment.

        ``opened``: files that are open already, by name; the segment's own is added.
        """

        def read() -> pa.Table:
            file = opened.pop(name, None) or self.open(name)
            table = file.read(group, columns)
            opened[name] = file
            return table

        return with_retries(read)

    def keys_of(self, name: str) -> tuple[Entry, list[pa.Array]] | UnusableSegment:
        """A segment with the keys of each of its groups."""
        try:
            file = self.open(name)
            return Entry(name, file.footer), file.keys()
        except UnusableSegment as error:
            return error

    def put(self, name: str, data: bytes) -> bool:
        """Publish a segment; False, and nothing is written, if the name is taken."""
        if self.folder.is_local:
            return self._link(name, data)
        if (objects := self.folder.objects()) is not None:
            with suppress(ConditionIgnored):
                return objects.create(f"{SEGMENTS}/{name}", data)
        if self.exists(name):
            return False
        self.folder.write_bytes(f"{SEGMENTS}/{name}", data)
        return True

    def _link(self, name: str, data: bytes) -> bool:
        """``put`` in a local store: a hard link is atomic and fails if the name is taken."""
        folder = f"{self.folder.root}/{SEGMENTS}"
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would keep other users out.
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.link(temporary, f"{folder}/{name}")
            _sync_names(folder)  # Else a power cut can take it back after its parts were removed.
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True


def _sync_names(folder: str) -> None:
    """Returns when the names in a local folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RowCounts:
    """Number of rows that a run had the teacher answer (``asked``), or score (``scored``)."""

    asked: int = 0
    scored: int = 0
