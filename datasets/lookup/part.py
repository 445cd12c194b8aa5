"""One file of a store's index: where the rows of some segments are, sorted by key.

An index is a cache of what footers and key columns say, so that a process need not open each
segment. It can be deleted at any moment. Whoever reads a row through it compares the row's key with
that in the segment itself.

The file has the rows as they are searched (``rows.ROW``), then an Arrow stream of segments and
groups, and the number of rows in 8 bytes. It is named by the hash of its bytes and that number.

Imports neither Ray nor torch.

Legend: S rows, G groups, M segments of the part.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.lookup.rows import ROW, Rows, Table
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.reading import Names

VERSION = 2
FILE_NAME = re.compile(r"[0-9a-f]{32}-(?P<rows>[0-9]{1,12})\.rows")
UNKNOWN = 0
"""Time of change of a segment whose file was not looked at; its size decides alone."""

Halves = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""Keys [n] as the two big-endian numbers that their bytes are; in the order of the bytes."""

Described = tuple[str, tuple[int, int], Origin, Sequence[tuple[Provenance, pa.Array]]]
"""A segment: name, size and time of change, origin; provenance and keys of each of its groups."""


@dataclass(frozen=True)
class Part:
    """Where the rows of M segments are. ``where`` has them, ascending by key.

    A row names its group by the number in the part. Group g has ``rows[g]`` rows, is the
    ``number[g]``-th of the segment ``segment[g]``, and was asked for by ``provenances[asked[g]]``.
    Segment m has the name ``names[m]``, ``sizes[m]`` bytes, was changed at ``changed[m]``
    (nanoseconds, or UNKNOWN) and came from ``origins[origin[m]]``.
    """

    where: Rows
    segment: NDArray[np.integer]
    number: NDArray[np.integer]
    rows: NDArray[np.integer]
    asked: NDArray[np.integer]
    provenances: list[Provenance]
    names: Names
    sizes: NDArray[np.integer]
    changed: NDArray[np.int64]
    origin: NDArray[np.integer]
    origins: list[Origin]


def halves(keys: pa.Array) -> Halves:
    """Keys of 16 bytes as two numbers each. Raises ArrowInvalid for keys of another size."""
    keys = keys.cast(pa.binary(KEY_BYTES))
    start, stop = keys.offset * KEY_BYTES, (keys.offset + len(keys)) * KEY_BYTES
    buffer = memoryview(keys.buffers()[1] or b"")[start:stop]
    words = np.frombuffer(buffer, ">u8").reshape(-1, 2)
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


def part_of(segments: Sequence[Described]) -> Part:
    """The part of some segments."""
    groups = [group for segment in segments for group in segment[3]]
    lengths = np.array([len(keys) for _, keys in groups], np.int64)
    counts = np.array([len(segment[3]) for segment in segments], np.int64)
    kind = pa.binary(KEY_BYTES)
    all_keys = [keys if keys.type == kind else keys.cast(kind) for _, keys in groups]
    high, low = halves(pa.concat_arrays([*all_keys, pa.array([], kind)]))
    table = np.empty(len(high), ROW)
    table["high"], table["low"], table["place"] = high, low, _within(lengths)
    table["group"] = np.repeat(np.arange(len(groups), dtype=np.int32), lengths)
    origins: dict[Origin, int] = {}
    provenances: dict[Provenance, int] = {}
    return Part(
        Rows.of(table[np.lexsort((low, high))]),
        np.repeat(np.arange(len(segments), dtype=np.int32), counts),
        _within(counts),
        lengths.astype(np.int32),
        np.array([provenances.setdefault(p, len(provenances)) for p, _ in groups], np.int32),
        list(provenances),
        Names.of(name for name, _, _, _ in segments),
        np.array([stamp[0] for _, stamp, _, _ in segments], np.int64),
        np.array([stamp[1] for _, stamp, _, _ in segments], np.int64),
        np.array([origins.setdefault(o, len(origins)) for _, _, o, _ in segments], np.int32),
        list(origins),
    )


def _within(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """0, 1, ... for each of the lengths, one after the other."""
    starts = np.cumsum(lengths) - lengths
    return (np.arange(lengths.sum()) - np.repeat(starts, lengths)).astype(np.int32)


def merged(chosen: Iterable[tuple[Part, NDArray[np.bool_]]]) -> Part:
    """One part of several, at least one. With each comes which of its segments [M] to keep."""
    origins: dict[Origin, int] = {}
    provenances: dict[Provenance, int] = {}
    columns: dict[str, list[NDArray[Any]]] = {}
    names, found_rows = [], bytearray()  # It grows in place; a list of tables is there twice.
    first_group = first_segment = 0
    for part, keep in chosen:
        of_origin = np.array([origins.setdefault(o, len(origins)) for o in part.origins], np.int32)
        of_asked = np.array(
            [provenances.setdefault(p, len(provenances)) for p in part.provenances], np.int32
        )
        groups = keep[part.segment]
        rows = part.where.all()
        rows = rows[groups[rows["group"]]]
        new_segment = np.cumsum(keep, dtype=np.int32) - 1 + np.int32(first_segment)
        new_group = np.cumsum(groups, dtype=np.int32) - 1 + np.int32(first_group)
        rows["group"] = new_group[rows["group"]]
        found_rows += rows.tobytes()
        found = {
            "segment": new_segment[part.segment[groups]],
            "number": part.number[groups],
            "rows": part.rows[groups],
            "asked": of_asked[part.asked[groups]],
            "sizes": part.sizes[keep],
            "changed": part.changed[keep],
            "origin": of_origin[part.origin[keep]],
        }
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
        names.append(part.names.chosen(keep))
        first_group += int(groups.sum())
        first_segment += int(keep.sum())
    whole = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    table = np.frombuffer(found_rows, ROW)
    table = table[np.lexsort((table["low"], table["high"]))]
    return Part(
        Rows.of(table),
        **whole,
        provenances=list(provenances),
        names=Names.joined(names),
        origins=list(origins),
    )


def encoded(part: Part) -> tuple[str, pa.Buffer]:
    """A part's file: its name and its bytes."""
    of_group = ("segment", "number", "rows", "asked")
    groups = pa.table({name: getattr(part, name) for name in of_group})
    of_segment = ("sizes", "changed", "origin")
    columns = {name: getattr(part, name) for name in of_segment}
    segments = pa.table({"names": part.names.column(), **columns})
    described = {
        "version": VERSION,
        "origins": [asdict(origin) for origin in part.origins],
        "provenances": [asdict(provenance) for provenance in part.provenances],
    }
    metadata = {b"described": json.dumps(described).encode(), b"groups": _stream(groups)}
    tail = _stream(segments.replace_schema_metadata(metadata))
    tail += len(part.where).to_bytes(8, "little")
    place, end = 0, len(part.where) * ROW.itemsize
    data = np.empty(end + len(tail), np.uint8)  # A stream that grows is there twice.
    for rows in part.where.pieces():
        data[place : place + rows.nbytes] = np.frombuffer(rows.tobytes(), np.uint8)
        place += rows.nbytes
    data[end:] = np.frombuffer(tail, np.uint8)
    made = pa.py_buffer(data)
    digest = blake2b(memoryview(made), digest_size=16).hexdigest()
    return f"{digest}-{len(part.where)}.rows", made


def rows_in(name: str) -> int:
    """Number of rows of the part in a file of this name."""
    match = FILE_NAME.fullmatch(name)
    assert match is not None, name
    return int(match["rows"])


def decoded(name: str, file: pa.NativeFile) -> Part:
    """The part in a file, which stays open. Raises ValueError, KeyError, OSError or an Arrow error
    for any other file.
    """
    size, count = file.size(), rows_in(name)
    end = count * ROW.itemsize
    if end > size:
        raise ValueError(f"it has {size} bytes, too few for {count} rows")
    digest, groups_in = blake2b(digest_size=16), [0]

    def seen(table: Table) -> None:
        digest.update(table.tobytes())
        groups_in.extend([int(table["group"].min()), int(table["group"].max()) + 1])

    where = Rows.read_from(file, count, seen)
    file.seek(end)
    tail = file.read_buffer(size - end)  # Of Arrow's memory, which goes back when it is free.
    digest.update(tail)
    if name != f"{digest.hexdigest()}-{count}.rows" or bytes(tail[-8:]) != count.to_bytes(
        8, "little"
    ):
        raise ValueError("its bytes are not what was written")
    segments = pa.ipc.open_stream(tail).read_all()
    metadata = segments.schema.metadata
    described = json.loads(metadata[b"described"])
    if described["version"] != VERSION:
        raise ValueError(f"it has version {described['version']}; this version reads {VERSION}")
    groups = pa.ipc.open_stream(metadata[b"groups"]).read_all()

    numbers: dict[str, Any] = {
        **{name: _narrow(groups[name]) for name in ("segment", "number", "rows", "asked")},
        **{name: _narrow(segments[name]) for name in ("sizes", "changed", "origin")},
    }
    part = Part(
        where,
        **numbers,
        provenances=[Provenance(**provenance) for provenance in described["provenances"]],
        names=Names.of_column(segments["names"]),
        origins=[Origin(signal=Signal(**o.pop("signal")), **o) for o in described["origins"]],
    )
    _require_inside(part, min(groups_in), max(groups_in))
    return part


def _require_inside(part: Part, least: int, end: int) -> None:
    """Raise ValueError if a number of the part names nothing. The rows' groups: least to end."""
    if least < 0 or end > len(part.segment):
        raise ValueError("it names groups that it does not have")
    for numbers, count in (
        (part.segment, len(part.names)),
        (part.asked, len(part.provenances)),
        (part.origin, len(part.origins)),
    ):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError("it names segments that it does not have")


def _narrow(column: pa.ChunkedArray) -> NDArray[np.integer]:
    """Whole numbers in as few bytes as they need, apart from the buffer that they were read in."""
    values = column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    for kind in (np.uint8, np.uint16, np.uint32):
        if least >= 0 and most <= np.iinfo(kind).max:
            return values.astype(kind)
    return values


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
