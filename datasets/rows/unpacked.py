"""How many bytes a column stands for, however little of it a file or Arrow keeps."""

import pyarrow as pa
import pyarrow.compute as pc

TEXTS = (pa.StringArray, pa.LargeStringArray, pa.BinaryArray, pa.LargeBinaryArray)


def unpacked_bytes(column: pa.Array) -> int:
    """Bytes of a column's values, each text of a dictionary counted as often as it is named.

    A Parquet file of 800 bytes may name one text of 100 KB a million times; Arrow holds it once.
    """
    kind = column.type
    if pa.types.is_dictionary(kind) and isinstance(column.dictionary, TEXTS):
        lengths = pc.binary_length(column.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(unpacked_bytes, column.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return unpacked_bytes(column.flatten())
    return int(column.nbytes)
