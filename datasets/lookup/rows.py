"""The rows of a part of the index: keys in ascending order, of which most stay on the disk.

A process keeps every `STEP`-th key in memory, and reads those between two of them when a key is
looked for. So an index of ten million rows takes a process 600 KB and not 240 MB. The file is read
and not mapped into memory: one that another node deletes is then an error, and does not end the
process. On an object store, where each reading is a request, all of a part is in memory.

Imports neither Ray nor torch.

Legend: S rows of a part, n keys looked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("group", "<i4"), ("place", "<i4")])
"""A row: the two halves of its key, its group's number in the part, and its place in the group."""

Table = NDArray[np.void]
"""Rows [S], of the type ROW."""

STEP = 256
"""Rows between two keys that are in memory; so many are read to find one."""
STEPS = 256
"""Steps that are read together where all rows are."""


class LostPart(OSError):
    """The file of a part can no longer be read."""


@dataclass(frozen=True)
class Rows:
    """The first ``count`` rows of an open file, ascending by key.

    fences, sums: the high half of each STEP-th key, and the sum of the rows from there on.
    """

    file: pa.NativeFile
    count: int
    fences: NDArray[np.uint64]
    sums: NDArray[np.uint64]

    @classmethod
    def of(cls, table: Table) -> "Rows":
        """Rows that are in memory."""
        data = pa.py_buffer(np.ascontiguousarray(table))
        return cls(pa.BufferReader(data), len(table), table["high"][::STEP].copy(), _sums(table))

    @classmethod
    def read_from(cls, file: pa.NativeFile, count: int, seen: Callable[[Table], None]) -> "Rows":
        """Rows of an open file, all of which are read once. Raises LostPart.

        seen: called with some of them after the other.
        """
        fences, sums = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for start in range(0, count, STEP * STEPS):
            table = np.frombuffer(_bytes(file, start, min(start + STEP * STEPS, count)), ROW)
            fences.append(table["high"][::STEP].copy())
            sums.append(_sums(table))
            seen(table)
        return cls(file, count, np.concatenate(fences), np.concatenate(sums))

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Table:
        """The rows from ``start``, which is one of the STEP-th, to ``stop``, which is too or the
        end. Raises LostPart where they are not what was read before.
        """
        return self._read_runs([(start, stop)])

    def _read_runs(self, runs: Sequence[tuple[int, int]]) -> Table:
        """The rows of several runs as `read` takes them, ascending: one read each, one check.

        Raises LostPart.
        """
        table = np.frombuffer(b"".join(_bytes(self.file, *run) for run in runs), ROW)
        known = [self.sums[start // STEP : -(-stop // STEP)] for start, stop in runs]
        # Only the last of the runs can end within a step, so that steps begin where they did.
        if not np.array_equal(_sums(table), np.concatenate(known)):
            raise LostPart("a part of the index has changed")
        return table

    def pieces(self) -> Iterator[Table]:
        """All rows, some after the other."""
        for start in range(0, self.count, STEP * STEPS):
            yield self.read(start, min(start + STEP * STEPS, self.count))

    def all(self) -> Table:
        """All rows."""
        return self.read(0, self.count)

    def near(self, high: NDArray[np.uint64]) -> Table:
        """Some of the rows, ascending: all those of which the key begins with one of ``high`` [n].

        high: ascending.
        """
        if not len(high) or not self.count:
            return np.empty(0, ROW)
        # A key may be the last before a fence, and equal keys may reach over several.
        first = np.maximum(np.searchsorted(self.fences, high, "left") - 1, 0) * STEP
        last = np.minimum(np.searchsorted(self.fences, high, "right") * STEP, self.count)
        begins = np.flatnonzero(first[1:] > last[:-1]) + 1  # Runs that do not touch.
        starts = first[np.concatenate([[0], begins])]
        stops = last[np.concatenate([begins - 1, [len(high) - 1]])]
        return self._read_runs(list(zip(starts.tolist(), stops.tolist(), strict=True)))


def _bytes(file: pa.NativeFile, start: int, stop: int) -> bytes:
    """The bytes of the rows from ``start`` to ``stop``. Raises LostPart."""
    wanted = (stop - start) * ROW.itemsize
    try:
        data = file.read_at(wanted, start * ROW.itemsize)
    except (OSError, ValueError) as error:
        raise LostPart(str(error)) from error
    if len(data) < wanted:
        raise LostPart(f"{len(data)} of {wanted} bytes came")
    return bytes(data)


def _sums(table: Table) -> NDArray[np.uint64]:
    """Sums of the rows' bytes as numbers, of STEP rows each."""
    words = table.view(np.uint64).reshape(-1)
    if not len(words):
        return np.empty(0, np.uint64)
    return np.add.reduceat(words, np.arange(0, len(words), STEP * ROW.itemsize // 8))
