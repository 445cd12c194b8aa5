"""Reading segments from a disk or a network: the errors, and retries.

A Parquet reader raises OSError both for a damaged page and for a broken connection. Therefore the
bytes pass through a ``WatchedSource``, which records whether all of them arrived. A segment is
*damaged* only if its bytes arrived and are wrong, so that deleting damaged segments never deletes
one that was only out of reach.

Imports neither Ray nor torch.
"""

import os
import resource
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

RETRY_PAUSES_S = (0.2, 1.0, 3.0)
"""Pauses before an unreadable segment is read again. Together they outlast a throttled request or a
short failure of a file server; they are short enough for a run to wait."""

ENDING_BYTES = 64 << 10
"""Bytes at a file's end that are read at once to find its metadata."""

ASKED_TOGETHER = 1024
"""Segments that wait for a thread at a time: each takes a kilobyte meanwhile."""

TRIED_ALONE = 4
"""Segments that are read one after the other to see whether that waits for a disk or a network.
Where it does not, eight threads take twice as much of the processor, and no less time."""

LISTED_TOGETHER = 4096
"""Files of a local store that are looked at together."""

NAMES_TOGETHER = 1 << 17
"""Names of segments that a table is made of, to look others up in it."""

T = TypeVar("T")


class UnusableSegment(Exception):
    """A segment cannot be used, for the reason ``why``; the subclass says if it may be deleted."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"segment {name}: {why}")
        self.name = name
        self.why = why

    # By default an exception is unpickled from its message alone, which lacks ``why``.
    def __reduce__(self) -> tuple[type["UnusableSegment"], tuple[str, str]]:
        return type(self), (self.name, self.why)


class DamagedSegment(UnusableSegment):
    """All bytes were read and are not what was written: cut off, altered, or no segment at all."""


class UnreadableSegment(UnusableSegment):
    """The bytes cannot be read at the moment. The segment may be sound and is never deleted."""


class NewerSegment(UnusableSegment):
    """A newer version wrote something unknown here. It may be sound and is never deleted."""


class ImpossibleValues(UnusableSegment):
    """It is as it was written, and some of its rows have values that no teacher means."""


class ForeignFile(UnusableSegment):
    """A file that was never a segment of a store: it is not used and never removed."""


class GoneSegment(UnusableSegment):
    """There is no file of that name, or it has been deleted."""


RefusedSegments = dict[str, UnusableSegment]
"""Segments that cannot be used, by name. The class of the error says whether one may be deleted."""


@dataclass(frozen=True)
class Listing:
    """The segments that are there: names (string), sizes in bytes, times of change in ns."""

    names: pa.ChunkedArray
    sizes: NDArray[np.int64]
    changed: NDArray[np.int64]

    @classmethod
    def of(cls, files: Iterable[list[pafs.FileInfo]], without: Collection[str] = ()) -> "Listing":
        """The listing of these files except those ``without``."""
        names, numbers = [], [np.empty((0, 2), np.int64)]
        for infos in files:
            chosen = [info for info in infos if info.base_name not in without]
            names.append(pa.array([info.base_name for info in chosen], pa.string()))
            stamps = [(info.size or 0, info.mtime_ns or 0) for info in chosen]
            numbers.append(np.array(stamps, np.int64).reshape(-1, 2))
        sizes, changed = np.concatenate(numbers).T.copy()
        return cls(pa.chunked_array(names, pa.string()), sizes, changed)

    def chosen(self, some: NDArray[np.bool_]) -> "Listing":
        """Some of them, by a mask."""
        return Listing(self.names.filter(pa.array(some)), self.sizes[some], self.changed[some])

    def together(self, number: int) -> Iterator["Listing"]:
        """All of them, so many at a time."""
        for start in range(0, len(self.sizes), number):
            some = slice(start, start + number)
            names = self.names.slice(start, number)
            yield Listing(names, self.sizes[some], self.changed[some])


def is_in(
    names: Iterable[str] | pa.Array | pa.ChunkedArray,
    among: Iterable[str] | pa.Array | pa.ChunkedArray,
) -> NDArray[np.bool_]:
    """Mask of the names that are among others; these are looked at NAMES_TOGETHER at a time."""
    first, second = (
        given if isinstance(given, (pa.Array, pa.ChunkedArray)) else pa.array(given, pa.string())
        for given in (names, among)
    )
    found = np.zeros(len(first), bool)
    for start in range(0, len(second), NAMES_TOGETHER):
        some = second.slice(start, NAMES_TOGETHER)
        some = some.combine_chunks() if isinstance(some, pa.ChunkedArray) else some
        found |= pc.is_in(first, value_set=some).to_numpy(zero_copy_only=False)
    return found


def files_in(
    filesystem: pafs.FileSystem, folder: str, is_local: bool
) -> Iterator[list[pafs.FileInfo]]:
    """The files of a folder of segments, some at a time: a FileInfo takes ten times what it says.

    On an object store they come all at once.
    """

    def segments_of(infos: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
        return [i for i in infos if i.type == pafs.FileType.File and i.extension == "parquet"]

    if not is_local:
        selector = pafs.FileSelector(folder, allow_not_found=True)
        yield segments_of(filesystem.get_file_info(selector))
        return
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        paths = (entry.path for entry in entries if entry.name.endswith(".parquet"))
        while some := list(islice(paths, LISTED_TOGETHER)):
            yield segments_of(filesystem.get_file_info(some))


class WatchedSource:
    """A file that pyarrow can read and that keeps the last error of reading in ``failure``.

    Receiving fewer bytes than the file has is such an error. A position beyond the file's end is
    not: only the metadata of a damaged file sends the reader there.
    """

    closed = False

    def __init__(self, source: pa.NativeFile) -> None:
        self._source = source
        self.size = source.size()
        self.failure: Exception | None = None

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset in bytes and return the new position."""
        return int(self._source.seek(offset, whence))

    def tell(self) -> int:
        """The position in bytes."""
        return int(self._source.tell())

    def read_buffer(self, nbytes: int = -1) -> pa.Buffer:
        """The next ``nbytes`` bytes, or all up to the end. Raises OSError if not all arrive."""
        left = max(0, self.size - self.tell())
        wanted = left if nbytes < 0 else min(nbytes, left)
        try:
            data = self._source.read_buffer(wanted)
            if len(data) < wanted:
                raise OSError(f"{len(data)} of {wanted} bytes came")
        except Exception as error:
            self.failure = error
            raise
        return data

    def read(self, nbytes: int = -1) -> bytes:
        """The same as ``read_buffer``, as ``bytes``."""
        return bytes(self.read_buffer(nbytes))

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def ending_of(file: pa.NativeFile | WatchedSource) -> str:
    """Hash of an open file's Parquet metadata. Files with one are alike in footer and checksums.

    To hash it takes a tenth of the time of reading it. Raises OSError.
    """
    size = file.size() if isinstance(file, pa.NativeFile) else file.size
    file.seek(max(0, size - ENDING_BYTES))
    data = file.read()
    length = int.from_bytes(data[-8:-4], "little") + 8
    if len(data) < length <= size:
        file.seek(size - length)
        data = file.read()
    return blake2b(data[-length:], digest_size=16).hexdigest()


def with_retries(read: Callable[[], T]) -> T:
    """Call ``read`` and return its result; after UnreadableSegment, pause and call it again.

    The pauses are ``RETRY_PAUSES_S``; what the last call raises is passed on, and so is any other
    error at once. ``read`` must open the file itself, since a broken connection cannot be reused.
    """
    for pause in RETRY_PAUSES_S:
        try:
            return read()
        except UnreadableSegment:
            time.sleep(pause)
    return read()


def read_each(
    read: Callable[[str], T | UnusableSegment],
    names: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
    pauses: Sequence[float] | None = None,
) -> dict[str, T | UnusableSegment]:
    """Call ``read`` with the name of each segment; the results by name, in the order of ``names``.

    ``read`` returns an UnusableSegment instead of raising it. Unreadable segments are read again
    after each of ``pauses`` (seconds; None: ``RETRY_PAUSES_S``). All segments share one pause:
    reading a store that is out of reach fails within seconds, however many segments it has.
    ``progress`` is called with (segments read, segments in all) during the first pass.
    ``threads``: at most so many; one, this one, where the first reads did not wait for anything.
    """
    results: dict[str, T | UnusableSegment] = {}
    remaining = list(names)
    known: dict[str, T | UnusableSegment] = {}
    if threads > 1:
        before = _waits()
        known = {name: read(name) for name in remaining[:TRIED_ALONE]}
        threads = threads if _waits() - before >= len(known) else 1

    def of(name: str) -> T | UnusableSegment:
        return known.pop(name) if name in known else read(name)

    with ThreadPoolExecutor(threads, thread_name_prefix="segments") as pool:
        for pause in (0.0, *(RETRY_PAUSES_S if pauses is None else pauses)):
            if pause and remaining:
                time.sleep(pause)
            for start in range(0, len(remaining), ASKED_TOGETHER):
                some = remaining[start : start + ASKED_TOGETHER]
                read_now = map(of, some) if threads == 1 else pool.map(of, some)
                for number, (name, result) in enumerate(
                    zip(some, read_now, strict=True), start + 1
                ):
                    results[name] = result
                    if progress is not None and not pause:
                        progress(number, len(names))
            remaining = [n for n in remaining if isinstance(results[n], UnreadableSegment)]
    return results


def _waits() -> int:
    """How often this thread has given up the processor to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
