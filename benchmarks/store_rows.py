"""Segments for `benchmarks.store_scale`, as runs publish and note them, in a tenth of the time.

All answers are alike, so two segments differ in their keys, in what is hashed of these, and in
nothing else. One is made by `segment.encode`; `Pattern` writes the others by putting other keys in
its place. The first segment of each block is compared with what `encode` makes of it.
"""

import base64
import os
import re
import zlib
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raystill.datasets.lookup.files import write_part
from raystill.datasets.lookup.keeping import NOTED
from raystill.datasets.lookup.part import Described, part_of
from raystill.datasets.rows.answers import Answer, answers_table, tail_logprob
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import FOOTER, Origin, Provenance, segment_schema
from raystill.datasets.store.segment import encode, segment_name
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.values import CHECKSUM_BYTES, checksum

GROUP_ROWS, TOP_K, VOCAB = 8, 64, 49_152
TOPK = Signal("topk", TOP_K)
ORIGIN = Origin("identity", "teacher", "benchmark", "1", "float32", VOCAB, TOPK)
ASKED = Provenance("run", "training")
KEYS = pa.binary(KEY_BYTES)
ARROW_SCHEMA = b"ARROW:schema"
CHECKSUM = re.compile(rb'"footer_checksum": "([0-9a-f]+)", ')


def publish_rows(
    folder: str, rows: int, tokens: int, first: int = 0, every: int = 1
) -> dict[str, Any]:
    """Segments as a run publishes and notes them, without waiting for the disk.

    They come in blocks, each from its own seed. A block that is there already is passed over, so
    what was broken off goes on. ``first``, ``every``: of blocks, where several processes write.
    """
    os.makedirs(f"{folder}/{SEGMENTS}", exist_ok=True)
    store, columns = TeacherStore(folder), columns_of(tokens)
    pattern = Pattern(columns, bytes(range(GROUP_ROWS * KEY_BYTES)))
    segments, written = rows // GROUP_ROWS, 0
    for block in range(first, -(-segments // NOTED), every):
        number = min(NOTED, segments - block * NOTED)
        keys = np.frombuffer(
            np.random.default_rng([rows, block]).bytes(number * GROUP_ROWS * KEY_BYTES), "V16"
        ).reshape(number, GROUP_ROWS)
        if os.path.exists(f"{folder}/{SEGMENTS}/{segment_name(keys[-1].tolist(), TOPK)}"):
            continue
        written += number
        noted: list[Described] = []
        for of_group in keys:
            name, data = segment_name(of_group.tolist(), TOPK), pattern.segment(of_group.tobytes())
            if not noted:
                assert data == encoded(columns, of_group.tobytes()), "not what `encode` writes"
            with open(f"{folder}/{SEGMENTS}/{name}", "wb") as file:
                file.write(data)
            stamp = store.stamp(name)
            assert stamp is not None, name
            noted.append((name, stamp, ORIGIN, [(ASKED, keys_of(of_group.tobytes()))]))
        write_part(store, part_of(noted))
    return {"segments": segments, "written": written}


class Pattern:
    """A segment of one group, of which others with other keys are made."""

    def __init__(self, columns: dict[str, pa.ChunkedArray], keys: bytes) -> None:
        self._columns, self._data = columns, encoded(columns, keys)
        metadata = pq.read_metadata(pa.BufferReader(self._data)).metadata
        self._footer = metadata[FOOTER]
        self._schema = base64.b64decode(metadata[ARROW_SCHEMA])
        chunk = pq.read_metadata(pa.BufferReader(self._data)).row_group(0).column(0)
        start = chunk.data_page_offset
        # Keys cannot be compressed, so a page has them as they are.
        self._keys = self._only(keys)
        self._page = slice(start, start + chunk.total_compressed_size)
        self._begin = self._data.index(b"\x28\xb5\x2f\xfd", start)  # of a frame of zstd
        self._sum = self._key_sum(keys)
        self._crc = self._crc_of(self._data)
        self._crc_at = self._data.index(self._crc, start)
        assert self._crc_at < self._begin, "the page's checksum is not in its header"

    def segment(self, keys: bytes) -> bytes:
        """The bytes of the segment with the keys of GROUP_ROWS rows."""
        data = bytearray(self._data)
        data[self._keys : self._keys + len(keys)] = keys
        crc = self._crc_of(data)
        if len(crc) != len(self._crc):  # One of 16: it has fewer digits, and all else moves.
            return encoded(self._columns, keys)
        data[self._crc_at : self._crc_at + len(crc)] = crc
        footer = self._footer.replace(self._sum, self._key_sum(keys))
        footer = CHECKSUM.sub(b'"footer_checksum": "%s", ' % footer_sum(footer), footer)
        schema = self._schema.replace(self._footer, footer)
        made = bytes(data).replace(self._footer, footer)
        return made.replace(base64.b64encode(self._schema), base64.b64encode(schema))

    def _only(self, part: bytes) -> int:
        """Where in the segment these bytes are, which are there once."""
        assert self._data.count(part) == 1, part
        return self._data.index(part)

    def _crc_of(self, data: bytes | bytearray) -> bytes:
        """The checksum of the page of keys as its header has it: seven bits a byte."""
        crc = zlib.crc32(memoryview(data)[self._begin : self._page.stop])
        rest = crc << 1 if crc < 1 << 31 else ((1 << 32) - crc << 1) - 1
        digits = bytearray()
        while rest > 127:
            digits.append(rest & 127 | 128)
            rest >>= 7
        return bytes([*digits, rest])

    def _key_sum(self, keys: bytes) -> bytes:
        return checksum(keys_of(keys)).encode()


def footer_sum(footer: bytes) -> bytes:
    """The checksum of a segment's footer, which has another one in it."""
    rest = CHECKSUM.sub(b"", footer)
    return blake2b(rest, digest_size=CHECKSUM_BYTES).hexdigest().encode()


def encoded(columns: dict[str, pa.ChunkedArray], keys: bytes) -> bytes:
    """The segment with these keys as `segment.encode` writes it."""
    table = pa.table({"key": keys_of(keys), **columns})
    return encode(ORIGIN, [(ASKED, table)])


def keys_of(keys: bytes) -> pa.Array:
    """Keys that lie one after the other."""
    return pa.Array.from_buffers(KEYS, len(keys) // KEY_BYTES, [None, pa.py_buffer(keys)])


def columns_of(tokens: int) -> dict[str, pa.ChunkedArray]:
    """The columns of a group, but for its keys."""
    generator = np.random.default_rng(tokens)
    logprobs = np.sort(-generator.exponential(6, (tokens, TOP_K)) - 5)[:, ::-1].astype(np.float32)
    ids = generator.integers(0, VOCAB, (tokens, TOP_K), dtype=np.int32)
    tail = tail_logprob(logprobs, VOCAB)
    answer = Answer(ids[:, 0], "stop", logprobs[:, 0], ids, logprobs, tail)
    prompts = pa.array([[1, 2, 3]] * GROUP_ROWS, pa.list_(pa.int32()))
    told = answers_table([answer] * GROUP_ROWS, TOPK).append_column("prompt_ids", prompts)
    schema = segment_schema(TOPK)
    return {f.name: told[f.name].cast(f.type) for f in schema if f.name != "key"}
