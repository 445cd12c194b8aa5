"""Checksums of columns: over their values, not over the bytes of a file.

Imports neither Ray nor torch.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

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
