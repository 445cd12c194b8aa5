"""A segment's bytes as they come from a disk or a network, and why a segment may be of no use.

A reader of Parquet files says OSError of a torn page and of a broken connection alike. So the bytes
pass through ``WatchedSource``, which knows whether they came: a segment is *damaged* only where its
bytes came and are wrong. Whoever deletes what is damaged deletes nothing that was out of reach.

Imports neither Ray nor torch.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

WAITS_S = (0.2, 1.0, 3.0)
"""Pauses before what could not be read is tried again: longer than a throttled request or a file
server's stumble needs, shorter than anybody who waits for the rows would mind."""

T = TypeVar("T")


class UnusableSegment(Exception):
    """A segment that cannot be used: ``why``; its class says what may be done with it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"segment {name}: {why}")
        self.name = name
        self.why = why

    def __reduce__(self) -> tuple[type["UnusableSegment"], tuple[str, str]]:
        return type(self), (self.name, self.why)


class DamagedSegment(UnusableSegment):
    """Its bytes were all read and are not what was written: torn, altered, or not a segment."""


class UnreadableSegment(UnusableSegment):
    """Its bytes could not be read at this moment; it may be sound, and is never deleted."""


class NewerSegment(UnusableSegment):
    """It says what this version does not know; it may be sound, and is never deleted."""


class GoneSegment(UnusableSegment):
    """There is no file of that name, or none any more."""


class WatchedSource:
    """A seekable input, as pyarrow reads one, that keeps in ``failure`` what went wrong in reading.

    Fewer bytes than there are count as a failure. A place that the file does not have is none:
    only a damaged file has its reader look there.
    """

    closed = False

    def __init__(self, source: pa.NativeFile) -> None:
        self._source = source
        self._size = source.size()
        self.failure: Exception | None = None

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place; the place."""
        return int(self._source.seek(place, whence))

    def tell(self) -> int:
        """The place."""
        return int(self._source.tell())

    def read_buffer(self, nbytes: int = -1) -> pa.Buffer:
        """So many bytes, or all to the end. Raises OSError where they do not all come."""
        left = max(0, self._size - self.tell())
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
        """The same as bytes."""
        return bytes(self.read_buffer(nbytes))

    def close(self) -> None:
        """Close the input."""
        self._source.close()


def patiently(read: Callable[[], T]) -> T:
    """What ``read`` returns, tried anew after each of the waits while it raises UnreadableSegment.

    ``read`` opens what it reads: a connection that broke is of no more use. Raises what the last
    try raised, and everything else at once.
    """
    for wait in WAITS_S:
        try:
            return read()
        except UnreadableSegment:
            time.sleep(wait)
    return read()


def look_at_all(
    look: Callable[[str], T | UnusableSegment],
    names: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
) -> dict[str, T | UnusableSegment]:
    """What ``look`` makes of each segment, in the order of ``names``.

    What is unreadable is looked at again after each of the waits. They are for all segments at
    once: a store of which nothing can be read says so in seconds, however many it has.
    """
    found: dict[str, T | UnusableSegment] = {}
    left = list(names)
    with ThreadPoolExecutor(threads, thread_name_prefix="segments") as pool:
        for wait in (0.0, *WAITS_S):
            if wait and left:
                time.sleep(wait)
            for number, (name, seen) in enumerate(zip(left, pool.map(look, left), strict=True), 1):
                found[name] = seen
                if progress is not None and not wait:
                    progress(number, len(names))
            left = [name for name in left if isinstance(found[name], UnreadableSegment)]
    return found
