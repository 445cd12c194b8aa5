"""Values of stored columns: their checksums, and those that no teacher means.

Those are NaN or positive log probabilities, and ids outside the vocabulary. Such a row is not
stored, since the student would refuse it each time.

Imports neither Ray nor torch.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.rows.signal import Signal

CHECKSUM_BYTES = 8
TOLERANCE_NATS = 1e-3
"""By how much rounding to float32 may lift a log probability above 0, or above the one before."""


def impossible_rows(rows: pa.Table, signal: Signal, vocab_size: int) -> NDArray[np.bool_]:
    """Mask [n] of rows whose values are impossible. ``rows``: at least the signal's columns.

    Log probabilities are impossible where they are NaN, or above 0; those of the K best ids also
    where they do not descend. The drawn tokens' may be NaN for all of a row's tokens in ``hidden``:
    a scored response has none there. -inf is a probability of 0.
    """
    bad = np.zeros(len(rows), bool)
    if signal.kind == "text":
        return bad

    def row_of() -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # Of sound rows nobody asks.
        told = rows["response_ids"].combine_chunks().value_lengths().fill_null(0)
        lengths = told.to_numpy(zero_copy_only=False)
        return np.repeat(np.arange(len(rows)), lengths), lengths

    def mark(tokens: np.bool_ | NDArray[np.bool_]) -> None:
        if np.any(tokens):
            bad[row_of()[0][np.asarray(tokens, bool)]] = True

    drawn = _flat(rows["sampled_logprobs"])
    wrong = ~(drawn <= TOLERANCE_NATS)
    if signal.kind == "hidden" and wrong.any():
        of_token, lengths = row_of()
        missing = np.bincount(of_token[np.isnan(drawn)], minlength=len(rows))
        wrong &= (missing != lengths)[of_token]
    mark(wrong)
    if signal.kind == "topk":
        best = _flat(rows["topk_logprobs"]).reshape(-1, signal.width)
        ids = _flat(rows["topk_ids"]).reshape(-1, signal.width)
        mark(~(best <= TOLERANCE_NATS).all(axis=1))
        mark((best[:, 1:] > best[:, :-1] + TOLERANCE_NATS).any(axis=1))
        mark(((ids < 0) | (ids >= vocab_size)).any(axis=1))
        mark(~(_flat(rows["tail_logprob"]) <= TOLERANCE_NATS))
    return bad


def _flat(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """The numbers of a column of lists, in one array."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return np.asarray(array.to_numpy(zero_copy_only=False))


def checksum(column: pa.ChunkedArray | pa.Array) -> str:
    """Checksum (blake2b-64, hexadecimal) of a column's values.

    Chunks, offsets and the file's encoding do not change it.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    digest = blake2b(digest_size=CHECKSUM_BYTES)
    _update_digest(digest, array)
    return digest.hexdigest()


def _update_digest(digest: Any, array: pa.Array, nested: bool = False) -> None:
    """Add an array's values to the digest; ``nested``: it is the values of a list column.

    Numbers and hidden states (nested binaries) are added as whole buffers, which is fast. Strings
    and keys, of which a row has one, are added one by one with their lengths.
    """
    kind = array.type
    digest.update(f"{len(array)} {array.null_count};".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(kind):
        if array.null_count or not len(array):  # An empty one may have no offsets at all.
            lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        else:
            lengths = np.diff(array.offsets.to_numpy())
        digest.update(lengths.astype("<i4").tobytes())
        _update_digest(digest, array.flatten(), nested=True)
    elif pa.types.is_fixed_size_list(kind):
        _update_digest(digest, array.flatten(), nested=True)
    elif pa.types.is_fixed_size_binary(kind) and nested:
        digest.update(_bytes_of(array))
    elif pa.types.is_string(kind) or pa.types.is_fixed_size_binary(kind):
        values = array.view(pa.binary()) if pa.types.is_string(kind) else array
        told = (b"\0" if v is None else b"%d:%b" % (len(v), v) for v in values.to_pylist())
        digest.update(b"".join(told))
    else:
        values = array.fill_null(0) if array.null_count else array
        digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())


def _bytes_of(array: pa.FixedSizeBinaryArray) -> memoryview:
    """The values of fixed-size binaries as they lie in their buffer. ValueError if one is null."""
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} states are null; expected none")
    if not len(array):
        return memoryview(b"")
    width = array.type.byte_width
    start = array.offset * width
    return memoryview(array.buffers()[1])[start : start + len(array) * width]
