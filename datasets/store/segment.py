"""A segment: one Parquet file of teacher answers, with all that is needed to trust it.

A segment holds whole groups, one Parquet row group each. Its footer names the teacher, the signal
and, for every group, the run that paid for it, its rows and a checksum of each column. So a reader
verifies exactly what it reads, and damage is told apart from an answer, from bytes that do not come
and from what a newer version wrote. Segments are shared between runs: row numbers, positions and
epochs are not in them.

Imports neither Ray nor torch. Nothing in a segment is ever unpickled.

Checksums of columns: over their values, not over the bytes of a file.

Imports neither Ray nor torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raystill.datasets.rows.schema import KEY_BYTES, SCHEMA_VERSION, TOKEN_IDS, signal_fields
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.reading import (
    DamagedSegment,
    NewerSegment,
    UnreadableSegment,
    UnusableSegment,
    WatchedSource,
)

FOOTER = b"raystill.segment"
AFTER_FINAL_NORM = "after the final norm"
COMPRESSION = "zstd"
COMPRESSION_LEVEL = 1

Damage = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What reading a file that is not a sound segment may raise (or a sound one, out of reach)."""


@dataclass(frozen=True)
class Origin:
    """Who answered, and how: the same for every row of a segment.

    ``vocab_size`` is V of the teacher's logprobs, from which a smaller K's tail follows.
    ``hidden_is`` says which state a ``hidden`` signal is; None with the other kinds.
    """

    teacher_identity: str
    teacher: str
    engine: str
    engine_version: str
    dtype: str
    vocab_size: int
    signal: Signal
    hidden_is: str | None = None

    def __post_init__(self) -> None:
        if self.signal.kind != "hidden":
            return
        if self.hidden_is not in (None, AFTER_FINAL_NORM):
            raise ValueError(
                f"its hidden states are those {self.hidden_is}; expected {AFTER_FINAL_NORM}"
            )
        object.__setattr__(self, "hidden_is", AFTER_FINAL_NORM)


@dataclass(frozen=True)
class Provenance:
    """The run that paid for a group, and what for: the teacher answered it, or ``scored`` it."""

    run: str
    purpose: str  # "training" or "evaluation"
    scored: bool = False


@dataclass(frozen=True)
class Group:
    """One row group: who paid for it, its rows, its columns' checksums."""

    run: str
    purpose: str
    rows: int
    checksums: dict[str, str]
    scored: bool = False

    @property
    def provenance(self) -> Provenance:
        """Who paid for it, and what for."""
        return Provenance(self.run, self.purpose, self.scored)


@dataclass(frozen=True)
class Footer:
    """What a segment says of itself."""

    origin: Origin
    groups: tuple[Group, ...]

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(group.rows for group in self.groups)


def segment_schema(signal: Signal) -> pa.Schema:
    """Columns of a segment: the key, the prompt, the answer, the signal."""
    return pa.schema(
        [
            pa.field("key", pa.binary(KEY_BYTES)),
            pa.field("prompt_ids", TOKEN_IDS),
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            *signal_fields(signal),
        ]
    )


def segment_name(keys: Sequence[bytes], signal: Signal) -> str:
    """File name of the segment of these rows: the same whoever writes it, in any order of rows."""
    name = blake2b(str(signal).encode() + b"\0", digest_size=16)
    for key in sorted(keys):
        name.update(key)
    return f"{name.hexdigest()}.parquet"


def beside(name: str) -> str:
    """Another name for the rows of ``name``, whose file must not be replaced; always the same."""
    return f"{blake2b(name.encode(), digest_size=16).hexdigest()}.parquet"


def encode(origin: Origin, groups: Sequence[tuple[Group | Provenance, pa.Table]]) -> bytes:
    """A segment's bytes. Each group comes with its ``Group``, or with its ``Provenance`` if new."""
    schema = segment_schema(origin.signal)
    described, tables = [], []
    for group, table in groups:
        rows = table.select(schema.names).cast(schema).combine_chunks()
        if isinstance(group, Provenance):
            sums = {name: checksum(rows[name]) for name in schema.names}
            group = Group(group.run, group.purpose, len(rows), sums, group.scored)
        described.append(group)
        tables.append(rows)
    told = {
        "schema_version": SCHEMA_VERSION,
        "origin": asdict(origin),
        "groups": [asdict(group) for group in described],
    }
    text = json.dumps(told, sort_keys=True)
    told["footer_checksum"] = blake2b(text.encode(), digest_size=CHECKSUM_BYTES).hexdigest()
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema.with_metadata({FOOTER: json.dumps(told, sort_keys=True).encode()}),
        compression=COMPRESSION,
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=["finish_reason"],
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for rows in tables:
            writer.write_table(rows, row_group_size=max(1, len(rows)))
    return bytes(sink.getvalue())


class SegmentFile:
    """An open segment. Every method raises UnusableSegment where it cannot vouch for the file:
    DamagedSegment, UnreadableSegment or NewerSegment.
    """

    def __init__(self, source: pa.NativeFile, name: str) -> None:
        self.name = name
        try:
            self._source = WatchedSource(source)
        except OSError as error:
            raise UnreadableSegment(name, _reason(error)) from error
        try:
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
            self.footer = _footer(self._file.schema_arrow.metadata or {}, name)
            metadata = self._file.metadata
            found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            expected = [group.rows for group in self.footer.groups]
            if found != expected:
                raise ValueError(f"it has groups of {found} rows, expected {expected}")
        except Damage as error:
            raise self._refusal(error) from error

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of one group, their checksums verified."""
        try:
            rows = self._file.read_row_group(group, list(columns)).combine_chunks()
            told = self.footer.groups[group]
            wrong = [n for n in columns if checksum(rows[n]) != told.checksums[n]]
            if wrong or len(rows) != told.rows:
                raise ValueError(f"{', '.join(wrong) or 'its row count'} is not what was written")
        except Damage as error:
            raise self._refusal(error, f"group {group}: ") from error
        return rows.select(list(columns))

    def _refusal(self, error: BaseException, where: str = "") -> UnusableSegment:
        """What an error of reading says of the segment.

        Damage is only what came whole. Memory that ran out says nothing of the file, and what this
        build of Arrow has not learned may be what another wrote: what is not sure stays.
        """
        failure = self._source.failure
        if failure is not None or isinstance(error, MemoryError):
            return UnreadableSegment(self.name, where + _reason(failure or error))
        kind = NewerSegment if isinstance(error, NotImplementedError) else DamagedSegment
        return kind(self.name, where + _reason(error))

    def rows_of(self, keys: pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
        """Columns of the rows of ``keys``, in their order, from all groups."""
        names = ["key", *(column for column in columns if column != "key")]
        groups = range(len(self.footer.groups))
        rows = pa.concat_tables([self.read(i, names) for i in groups]).combine_chunks()
        there = rows["key"].combine_chunks()
        index = pc.index_in(keys.combine_chunks().cast(there.type), value_set=there)
        if index.null_count:
            raise DamagedSegment(
                self.name, f"it lacks {index.null_count} of the rows it is named for"
            )
        return rows.take(index).select(list(columns))


def _footer(metadata: dict[bytes, bytes], name: str) -> Footer:
    """The footer. Raises NewerSegment, and one of Damage where it is not what was written."""
    if FOOTER not in metadata:
        raise ValueError("it has no footer of a segment")
    told = json.loads(metadata[FOOTER])
    # Before the checksum, which another version may work out otherwise.
    version = told.get("schema_version")
    if version != SCHEMA_VERSION:
        raise NewerSegment(
            name, f"it has schema version {version}; this version reads {SCHEMA_VERSION}"
        )
    found = told.pop("footer_checksum")
    text = json.dumps(told, sort_keys=True)
    if found != blake2b(text.encode(), digest_size=CHECKSUM_BYTES).hexdigest():
        raise ValueError("its footer is not what was written (checksum)")
    try:  # It is as it was written: what is not understood now was not known to this version.
        return _understood(told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NewerSegment(
            name,
            f"its footer, of schema version {version}, says what this version does not know: "
            f"{_reason(error)}",
        ) from error


def _understood(told: dict[str, Any]) -> Footer:
    origin, signal = told["origin"], told["origin"].pop("signal")
    width = signal.get("width", signal.get("top_k", 0))  # ``top_k`` before there was ``hidden``.
    footer = Footer(
        origin=Origin(signal=Signal(signal["kind"], width), **origin),
        groups=tuple(Group(**group) for group in told["groups"]),
    )
    known = set(segment_schema(footer.origin.signal).names)
    for group in footer.groups:
        if other := known ^ set(group.checksums):
            raise ValueError(f"it has other columns ({', '.join(sorted(other))})")
    return footer


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


CHECKSUM_BYTES = 8


def checksum(column: pa.ChunkedArray | pa.Array) -> str:
    """Hexadecimal blake2b-64 of a column's values, whatever its chunks and offsets."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    digest = blake2b(digest_size=CHECKSUM_BYTES)
    _feed(digest, array)
    return digest.hexdigest()


def _feed(digest: Any, array: pa.Array, nested: bool = False) -> None:
    """Values by their buffers; strings and keys, of which a row has one, each with its length."""
    kind = array.type
    digest.update(f"{len(array)} {array.null_count};".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(kind):
        lengths = array.value_lengths().fill_null(0)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        _feed(digest, array.flatten(), nested=True)
    elif pa.types.is_fixed_size_list(kind):
        _feed(digest, array.flatten(), nested=True)
    elif pa.types.is_fixed_size_binary(kind) and nested:
        digest.update(_bytes_of(array))
    elif pa.types.is_string(kind) or pa.types.is_fixed_size_binary(kind):
        for value in array.cast(pa.large_binary()).to_pylist():
            digest.update(b"\0" if value is None else b"%d:%b" % (len(value), value))
    else:
        values = array.fill_null(0) if array.null_count else array
        digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())


def _bytes_of(array: pa.FixedSizeBinaryArray) -> memoryview:
    """The values of fixed-size binaries end to end, as they lie in their buffer; none is null."""
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} states are null; expected none")
    if not len(array):
        return memoryview(b"")
    width = array.type.byte_width
    start = array.offset * width
    return memoryview(array.buffers()[1])[start : start + len(array) * width]
