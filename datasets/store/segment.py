"""A segment: one Parquet file of teacher answers, with the checksums that verify it.

A segment holds whole groups of rows, one Parquet row group each. Its footer (JSON in the Parquet
metadata) names the teacher and the signal. For every group it has the run that requested it, the
number of rows and a checksum of each column, computed over the column's values and not over the
file's bytes. A reader therefore verifies just the columns it reads, and can tell a damaged segment
from an unreadable one and from one that a newer version wrote. Segments are shared between runs, so
they contain no row numbers, positions or epochs.

Imports neither Ray nor torch. Nothing in a segment is ever unpickled.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raystill.datasets.rows.schema import SCHEMA_VERSION
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import (
    FOOTER,
    Group,
    Origin,
    Provenance,
    footer_checksum,
    footer_of,
    reason_of,
    segment_schema,
)
from raystill.datasets.store.reading import (
    DamagedSegment,
    ForeignFile,
    NewerSegment,
    UnreadableSegment,
    UnusableSegment,
    WatchedSource,
)
from raystill.datasets.store.values import checksum

OWN_NAME = re.compile(r"(\.removed-[0-9a-f]{16}-)?[0-9a-f]{32}\.parquet(\.aside)?")
"""Names that this module gives to segments; such a file is taken for one without its footer."""

COMPRESSION = "zstd"
COMPRESSION_LEVEL = 1
READ_WHOLE_BYTES = 128 << 10
"""Size up to which a file is read in one piece. Arrow reads half of it to find its metadata."""
THREADS_BYTES = 1 << 20
"""Size from which several threads decode the columns of a group. Those cost time to start."""

WRONG = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
READ_ERRORS = (pa.ArrowException, OSError, *WRONG)
"""What reading a damaged segment may raise, or a sound one that is out of reach."""


def segment_name(keys: Sequence[bytes], signal: Signal) -> str:
    """File name of the segment that holds these rows with this signal.

    It depends on the set of keys and the signal alone, so that every writer chooses the same name.
    """
    name = blake2b(str(signal).encode() + b"\0", digest_size=16)
    for key in sorted(keys):
        name.update(key)
    return f"{name.hexdigest()}.parquet"


def next_name(name: str) -> str:
    """The file name to try for the same rows when ``name`` is taken by a file that must stay.

    It is a hash of ``name``, so that writers and readers follow the same sequence of names.
    """
    return f"{blake2b(name.encode(), digest_size=16).hexdigest()}.parquet"


def encode(origin: Origin, groups: Sequence[tuple[Group | Provenance, pa.Table]]) -> bytes:
    """The bytes of a segment with these groups.

    A group copied from another segment comes with its ``Group``, whose checksums are kept; a new
    one comes with its ``Provenance``. Tables must have all columns of ``segment_schema``.
    """
    schema = segment_schema(origin.signal)
    described, tables = [], []
    for group, table in groups:
        rows = table.select(schema.names).cast(schema).combine_chunks()
        if isinstance(group, Provenance):
            sums = {name: checksum(rows[name]) for name in schema.names}
            group = Group(group.run, group.purpose, len(rows), sums, group.scored)
        described.append(group)
        tables.append(rows)
    footer = {
        "schema_version": SCHEMA_VERSION,
        "origin": asdict(origin),
        "groups": [vars(group) for group in described],
    }
    footer["footer_checksum"] = footer_checksum(footer)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema.with_metadata({FOOTER: json.dumps(footer, sort_keys=True).encode()}),
        compression=COMPRESSION,
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=["finish_reason"],  # Its few values repeat; ids and logprobs hardly do.
        write_statistics=False,  # No reader filters by value.
        write_page_checksum=True,
    ) as writer:
        for rows in tables:
            writer.write_table(rows, row_group_size=max(1, len(rows)))
    return bytes(sink.getvalue())


class SegmentFile:
    """An open segment. What its methods return has been verified.

    Raises:
        UnusableSegment: (all methods) as DamagedSegment, UnreadableSegment, NewerSegment or
            ForeignFile.
    """

    def __init__(self, source: pa.NativeFile, name: str) -> None:
        self.name = name
        self._is_segment = OWN_NAME.fullmatch(name) is not None
        try:
            self._source = WatchedSource(source)
        except OSError as error:
            raise UnreadableSegment(name, reason_of(error)) from error
        try:
            small = self._source.size <= READ_WHOLE_BYTES
            # Arrow's threads must not hold a file of Python's: one that lets go of it while the
            # interpreter ends aborts the process.
            self._for_threads = pa.BufferReader(self._source.read_buffer()) if small else source
            self.data = self._for_threads if small else self._source
            self._file = pq.ParquetFile(self.data, page_checksum_verification=True)
            metadata = self._file.metadata
            described = metadata.metadata or {}
            self._is_segment |= FOOTER in described
            self.footer = footer_of(described, name)
            actual = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            expected = [group.rows for group in self.footer.groups]
            if actual != expected:
                raise ValueError(f"it has groups of {actual} rows, expected {expected}")
        except READ_ERRORS as error:
            raise self._as_unusable(error) from error

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of one group, whose checksums are verified."""
        try:
            if self._size(group) > THREADS_BYTES:
                known = {"metadata": self._file.metadata, "page_checksum_verification": True}
                with suppress(*READ_ERRORS):  # What is wrong is seen by reading it once more.
                    file = pq.ParquetFile(self._for_threads, **known)
                    return self._verified(file, group, columns, threads=True)
            return self._verified(self._file, group, columns, threads=False)
        except READ_ERRORS as error:
            unusable = self._as_unusable(error, f"group {group}: ")
            if isinstance(unusable, DamagedSegment):
                unusable.group = group
            raise unusable from error

    def _verified(
        self, file: pq.ParquetFile, group: int, columns: Sequence[str], threads: bool
    ) -> pa.Table:
        """`read` from this file. Raises one of READ_ERRORS."""
        rows = file.read_row_group(group, list(columns), use_threads=threads).combine_chunks()
        written = self.footer.groups[group]
        wrong = [n for n in columns if checksum(rows[n]) != written.checksums[n]]
        if wrong or len(rows) != written.rows:
            raise ValueError(f"{', '.join(wrong) or 'its row count'} is not what was written")
        return rows.select(list(columns))

    def pieces(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """These columns of all groups, verified; small ones together, up to THREADS_BYTES."""
        start, sizes = 0, [self._size(group) for group in range(len(self.footer.groups))]
        while start < len(sizes):
            stop, size = start + 1, sizes[start]
            while stop < len(sizes) and size + sizes[stop] <= THREADS_BYTES:
                stop, size = stop + 1, size + sizes[stop]
            alone = stop == start + 1
            yield self.read(start, columns) if alone else self._together(start, stop, columns)
            start = stop

    def keys(self) -> list[pa.Array]:
        """The keys of each group, whose checksums are verified."""
        if not (groups := self.footer.groups):
            return []
        whole = self._together(0, len(groups), ["key"])["key"].combine_chunks()
        starts = np.cumsum([0, *(group.rows for group in groups)]).tolist()
        return [whole.slice(at, g.rows) for at, g in zip(starts[:-1], groups, strict=True)]

    def _together(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """`read` of several groups that follow each other, with one look into the file."""
        names, place = list(columns), 0
        try:
            whole = self._file.read_row_groups(range(start, stop), names, use_threads=False)
            whole = whole.combine_chunks().select(names)
            for group in self.footer.groups[start:stop]:
                rows = whole.slice(place, group.rows)
                if any(checksum(rows[name]) != group.checksums[name] for name in names):
                    raise ValueError("a group is not what was written")
                place += group.rows
            if place == len(whole):
                return whole
        except READ_ERRORS:
            pass  # Read one by one, the group at fault is named.
        return pa.concat_tables([self.read(i, names) for i in range(start, stop)])

    def _size(self, group: int) -> int:
        """Bytes of a group before compression."""
        return int(self._file.metadata.row_group(group).total_byte_size)

    def _as_unusable(self, error: BaseException, where: str = "") -> UnusableSegment:
        """The UnusableSegment that an error of reading stands for."""
        failure = self._source.failure
        # pyarrow's out-of-memory error is an ArrowException too, and says nothing of the file.
        if failure is not None or isinstance(error, MemoryError):
            return UnreadableSegment(self.name, where + reason_of(failure or error))
        # A type or encoding that this build of Arrow lacks may be what a newer one wrote.
        if isinstance(error, NotImplementedError):
            return NewerSegment(self.name, where + reason_of(error))
        kind = DamagedSegment if self._is_segment else ForeignFile
        return kind(self.name, where + reason_of(error))

    def rows_of(self, keys: pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows with ``keys``, in the order of ``keys``.

        All groups are read. DamagedSegment if a key is missing.
        """
        names = ["key", *(column for column in columns if column != "key")]
        rows = pa.concat_tables(self.pieces(names)).combine_chunks()
        stored = rows["key"].combine_chunks()
        index = pc.index_in(keys.combine_chunks().cast(stored.type), value_set=stored)
        if index.null_count:
            raise DamagedSegment(
                self.name, f"it lacks {index.null_count} of the rows it is named for"
            )
        return rows.take(index).select(list(columns))
