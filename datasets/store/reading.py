"""Reading segments from a disk or a network: the errors, and retries.

A Parquet reader raises OSError both for a damaged page and for a broken connection. Therefore the
bytes pass through a ``WatchedSource``, which records whether all of them arrived. A segment is
*damaged* only if its bytes arrived and are wrong, so that deleting damaged segments never deletes
one that was only out of reach.

Imports neither Ray nor torch.
"""

import os
import re
import resource
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raystill.base.run_folder import is_utf8

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

HASH_NAME = re.compile(r"[0-9a-f]{32}\.parquet")
"""Name that a segment has from its keys."""

DIGEST = np.dtype("S16")
"""A name of a segment. Strings of bytes are ordered and found by their bytes, as numpy has them."""

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
    """All bytes were read and are not what was written: cut off, altered, or no segment at all.

    group: the number of the one group in which that was seen; None: it may be any.
    """

    group: int | None = None


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


class Names:
    """Names of segments in 16 bytes each: the hash that a name is; of any other name, its own hash.

    digests: [n], such hashes. others: the names that are none, by their hash.
    """

    def __init__(self, digests: NDArray[np.bytes_], others: dict[bytes, str]) -> None:
        self.digests = digests
        self.others = others

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """These names, in their order."""
        digests, others = bytearray(), {}
        for name in names:
            if HASH_NAME.fullmatch(name):
                digests += bytes.fromhex(name[:32])
            else:
                digest = blake2b(os.fsencode(name), digest_size=16).digest()
                others[digest] = name
                digests += digest
        return cls(np.frombuffer(digests, DIGEST), others)

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> "Names":
        """The names in a column of strings."""
        names = column.combine_chunks().cast(pa.string())
        ours = pc.match_substring_regex(names, f"^{HASH_NAME.pattern}$")
        if names.null_count or not pc.all(ours, min_count=0).as_py():
            return cls.of(names.to_pylist())
        if not len(names):
            return cls.of([])
        width = len(names[0].as_py())
        _, offsets, text = names.buffers()
        first = int(np.frombuffer(offsets, np.int32)[names.offset])
        letters = np.frombuffer(text, np.uint8)[first : first + width * len(names)]
        hashes = letters.reshape(-1, width)[:, : 2 * DIGEST.itemsize].tobytes()
        return cls(np.frombuffer(bytearray.fromhex(hashes.decode()), DIGEST), {})

    def column(self) -> pa.Array:
        """The names as an array of strings."""
        if self.others:
            return pa.array(list(self), pa.string())
        hashes = np.frombuffer(self.digests.tobytes().hex().encode(), np.uint8)
        letters = hashes.reshape(len(self), 2 * DIGEST.itemsize)
        ending = np.broadcast_to(np.frombuffer(b".parquet", np.uint8), (len(self), 8))
        text = np.concatenate([letters, ending], axis=1)
        offsets = np.arange(len(self) + 1, dtype=np.int32) * np.int32(text.shape[1])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        return pa.Array.from_buffers(pa.string(), len(self), buffers)

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, number: int) -> str:
        digest = self.digests[number].ljust(16, b"\0")  # numpy leaves out zeros at the end.
        return self.others.get(digest, f"{digest.hex()}.parquet")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def chosen(self, some: NDArray[Any] | slice) -> "Names":
        """Some of them: by a mask, by numbers or by a slice."""
        return Names(self.digests[some], self.others)

    @classmethod
    def joined(cls, several: Sequence["Names"]) -> "Names":
        """Several after one another."""
        digests = np.concatenate([np.empty(0, DIGEST), *(names.digests for names in several)])
        others = {digest: name for names in several for digest, name in names.others.items()}
        return cls(digests, others)


def places_in(ascending: Names, wanted: Names) -> NDArray[np.int64]:
    """The place of each of the names ``wanted`` among others, which ascend; -1 if it is not there.

    [n] of the wanted ones.
    """
    if not len(ascending):
        return np.full(len(wanted), -1)
    places = np.searchsorted(ascending.digests, wanted.digests)
    places[places == len(ascending)] = 0
    places[ascending.digests[places] != wanted.digests] = -1
    return places


def is_in(names: Iterable[str] | Names, among: Iterable[str] | Names) -> NDArray[np.bool_]:
    """Mask of the names that are among others."""
    first, second = (n if isinstance(n, Names) else Names.of(n) for n in (names, among))
    digests = second.digests
    if len(digests) > 1 and (digests[1:] < digests[:-1]).any():
        digests = np.sort(digests)
    return np.asarray(places_in(Names(digests, {}), first) >= 0)


@dataclass(frozen=True)
class Listing:
    """The segments that are there, in the order of `Names.digests`: names, sizes in bytes, times of
    change in ns.
    """

    names: Names
    sizes: NDArray[np.int64]
    changed: NDArray[np.int64]

    @classmethod
    def of(cls, files: Iterable[list[pafs.FileInfo]], without: Collection[str] = ()) -> "Listing":
        """The listing of these files except those ``without``."""
        # They grow in place, and are put in order one by one: two of them take as much as all else.
        told = {"digests": bytearray(), "sizes": bytearray(), "changed": bytearray()}
        others: dict[bytes, str] = {}
        for infos in files:
            chosen = [info for info in infos if info.base_name not in without]
            names = Names.of(info.base_name for info in chosen)
            others |= names.others
            told["digests"] += names.digests.tobytes()
            told["sizes"] += np.array([info.size or 0 for info in chosen], np.int64).tobytes()
            told["changed"] += np.array([i.mtime_ns or 0 for i in chosen], np.int64).tobytes()
        digests = np.frombuffer(told.pop("digests"), DIGEST)
        order = np.argsort(digests, kind="stable").astype(np.int32)
        digests = digests[order]
        sizes, changed = (np.frombuffer(told.pop(n), np.int64)[order] for n in ("sizes", "changed"))
        return cls(Names(digests, others), sizes, changed)

    def chosen(self, some: NDArray[np.bool_]) -> "Listing":
        """Some of them, by a mask."""
        return Listing(self.names.chosen(some), self.sizes[some], self.changed[some])

    def together(self, number: int) -> Iterator["Listing"]:
        """All of them, so many at a time."""
        for start in range(0, len(self.sizes), number):
            some = slice(start, start + number)
            yield Listing(self.names.chosen(some), self.sizes[some], self.changed[some])


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
        # Arrow cannot be told a name that is not UTF-8, which no writer of ours has given.
        names = (e for e in entries if e.name.endswith(".parquet") and is_utf8(e.name))
        paths = (entry.path for entry in names)
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
