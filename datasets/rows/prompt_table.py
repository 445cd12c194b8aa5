"""Reads rows of a prompt table by their numbers, for the source and the filters of the stream."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raystill.datasets.rows.schema import STUDENT_PROMPT

COLUMNS = ("row", "source", "prompt_ids", "response_ids", STUDENT_PROMPT)
"""What the stream reads of a row, as far as there is such a column; the keys are read apart, all at
once."""
CACHE_BYTES = 256 << 20
"""Size of the decoded Parquet row groups that a ``PromptReader`` keeps in memory."""


def open_table(path: str) -> pq.ParquetFile:
    """Open a Parquet file by path or URI."""
    if "://" in path:
        filesystem, path = pafs.FileSystem.from_uri(path)
    else:
        filesystem = pafs.LocalFileSystem()
    return pq.ParquetFile(filesystem.open_input_file(path))


class PromptReader:
    """Reads rows of a prompt table by their numbers, with the last used row groups in memory.

    ``columns``: those to read, ``row`` among them; None: all.
    """

    def __init__(self, path: str, columns: Sequence[str] | None = COLUMNS) -> None:
        self._file = open_table(path)
        there = self._file.schema_arrow.names
        self._columns = None if columns is None else [name for name in columns if name in there]
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._held_bytes = 0

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return int(self._starts[-1])

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """The rows with these numbers, in this order."""
        group_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        groups = np.unique(group_of_row)
        parts = [self._row_group(int(group)) for group in groups]
        # Where each row is in the concatenated parts.
        before = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        index = before[np.searchsorted(groups, group_of_row)] + rows - self._starts[group_of_row]
        taken = pa.concat_tables(parts).take(pa.array(index))
        numbers = taken["row"].to_numpy()
        assert np.array_equal(numbers, rows), f"asked for rows {rows}, the table has {numbers}"
        return taken.combine_chunks()

    def _row_group(self, index: int) -> pa.Table:
        if index not in self._held:
            part = self._file.read_row_group(index, self._columns)
            self._held[index] = part
            self._held_bytes += part.nbytes
            while len(self._held) > 1 and self._held_bytes > CACHE_BYTES:
                self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(index)
        return self._held[index]
