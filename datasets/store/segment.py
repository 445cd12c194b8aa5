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
from dataclasses import asdict, dataclass
from functools import lru_cache
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
    ForeignFile,
    NewerSegment,
    UnreadableSegment,
    UnusableSegment,
    WatchedSource,
)
from raystill.datasets.store.values import CHECKSUM_BYTES, checksum

FOOTER = b"raystill.segment"
AFTER_FINAL_NORM = "after the final norm"
OWN_NAME = re.compile(r"(\.removed-[0-9a-f]{16}-)?[0-9a-f]{32}\.parquet(\.aside)?")
"""Names that this module gives to segments; such a file is taken for one without its footer."""

COMPRESSION = "zstd"
COMPRESSION_LEVEL = 1
READ_WHOLE_BYTES = 128 << 10
"""Size up to which a file is read in one piece. Arrow reads half of it to find its metadata."""
THREADS_BYTES = 1 << 20
"""Size from which several threads decode the columns of a group. Those cost time to start."""

WRONG = (ValueError, KeyError, TypeError, IndexError, AttributeError)
READ_ERRORS = (pa.ArrowException, OSError, *WRONG)
"""What reading a damaged segment may raise, or a sound one that is out of reach."""


WITH_TOKENIZER = " (tokenizer "
"""In the name of a teacher behind a service, before the model whose tokenizer reads its answers."""


def name_of_teacher(model: str, served: str | None = None) -> str:
    """A teacher's name in a store. served: the model of a service, which has written the answers;
    ``model`` is then the one whose tokenizer makes ids of them.
    """
    return model if served is None else f"{served}{WITH_TOKENIZER}{model})"


@dataclass(frozen=True)
class Origin:
    """The teacher and engine that answered, and the signal: the same for all rows of a segment.

    ``teacher`` is for people: its model, as `name_of_teacher` writes it.
    ``vocab_size`` is V of the teacher's logprobs, needed to compute the tail of a smaller K.
    ``hidden_is`` says which hidden state was stored; None for signals other than ``hidden``.
    """

    teacher_identity: str
    teacher: str
    engine: str
    engine_version: str
    dtype: str
    vocab_size: int
    signal: Signal
    hidden_is: str | None = None

    @property
    def tokenizer(self) -> str:
        """The model whose tokenizer the ids are of."""
        return self.teacher.partition(WITH_TOKENIZER)[2].removesuffix(")") or self.teacher

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
    """The run that requested a group, and its purpose.

    ``scored``: the teacher scored responses that were there, and did not generate them.
    """

    run: str
    purpose: str  # "training" or "evaluation"
    scored: bool = False


@dataclass(frozen=True)
class Group:
    """One row group as the footer describes it: its origin run, row count and checksums."""

    run: str
    purpose: str
    rows: int
    checksums: dict[str, str]  # by column
    scored: bool = False

    @property
    def provenance(self) -> Provenance:
        """The run that requested it, and its purpose."""
        return Provenance(self.run, self.purpose, self.scored)


@dataclass(frozen=True)
class Footer:
    """A segment's description: its origin and its groups, in the order of the row groups."""

    origin: Origin
    groups: tuple[Group, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all groups."""
        return sum(group.rows for group in self.groups)


@lru_cache(maxsize=64)
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
    footer["footer_checksum"] = _footer_checksum(footer)
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
            raise UnreadableSegment(name, _reason(error)) from error
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
            self.footer = _footer(described, name)
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
            raise self._as_unusable(error, f"group {group}: ") from error

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
            return UnreadableSegment(self.name, where + _reason(failure or error))
        # A type or encoding that this build of Arrow lacks may be what a newer one wrote.
        if isinstance(error, NotImplementedError):
            return NewerSegment(self.name, where + _reason(error))
        kind = DamagedSegment if self._is_segment else ForeignFile
        return kind(self.name, where + _reason(error))

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


def _footer(metadata: dict[bytes, bytes], name: str) -> Footer:
    """The footer in a file's metadata.

    Raises NewerSegment, or one of READ_ERRORS if it is not what was written.
    """
    if FOOTER not in metadata:
        raise ValueError("it has no footer of a segment")
    footer = json.loads(metadata[FOOTER])
    # Checked before the checksum, which another version may compute in another way.
    version = footer.get("schema_version")
    if version != SCHEMA_VERSION:
        ours = {key: footer[key] for key in ("origin", "groups") if key in footer}
        ours["schema_version"] = SCHEMA_VERSION
        if footer.get("footer_checksum") == _footer_checksum(ours):
            raise ValueError(
                f"its schema version was altered: all else of its footer is of {SCHEMA_VERSION}"
            )
        raise NewerSegment(
            name, f"it has schema version {version!r}; this version reads {SCHEMA_VERSION}"
        )
    if not _is_as_written(metadata[FOOTER], footer.pop("footer_checksum"), footer):
        raise ValueError("its footer is not what was written (checksum)")
    try:  # The checksum holds: an unknown field or value was written by a newer version.
        return _parse_footer(footer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NewerSegment(
            name,
            f"its footer, of schema version {version}, says what this version does not know: "
            f"{_reason(error)}",
        ) from error


def _is_as_written(text: bytes, written: Any, footer: dict[str, Any]) -> bool:
    """Whether a footer has the checksum that its text says; ``footer``: the text without it."""
    # `encode` has hashed this very text. Making it again takes longer than parsing it.
    hashed = text.replace(f'"footer_checksum": {json.dumps(written)}, '.encode(), b"", 1)
    return written == _hash(hashed) or written == _footer_checksum(footer)


def _footer_checksum(footer: dict[str, Any]) -> str:
    """Checksum (blake2b-64, hexadecimal) of a footer, which it does not contain yet."""
    return _hash(json.dumps(footer, sort_keys=True).encode())


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=CHECKSUM_BYTES).hexdigest()


def _parse_footer(footer: dict[str, Any]) -> Footer:
    """The footer as objects. Raises ValueError, KeyError or TypeError at anything unknown."""
    origin, signal = footer["origin"], footer["origin"].pop("signal")
    # Segments from before ``hidden`` was added have ``top_k`` in place of ``width``.
    width = signal.get("width", signal.get("top_k", 0))
    parsed = Footer(
        origin=Origin(signal=Signal(signal["kind"], width), **origin),
        groups=tuple(Group(**group) for group in footer["groups"]),
    )
    known = set(segment_schema(parsed.origin.signal).names)
    for group in parsed.groups:
        if unexpected := known ^ set(group.checksums):
            raise ValueError(f"it has other columns ({', '.join(sorted(unexpected))})")
    return parsed


def _reason(error: BaseException) -> str:
    """The first line of an error's message, or its class where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
