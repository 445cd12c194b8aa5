"""How many bytes a response token takes in the teacher store, by its signal.

Measured, not worked out: answers are encoded as a segment, compression and all, and the columns
that hold tokens and their signal are counted. What a row has once (key, prompt, footer) is not.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from raystill.datasets.schema import KEY_BYTES, TOKEN_IDS, signal_fields
from raystill.datasets.segment import Origin, Payer, encode
from raystill.datasets.signal import Signal


def bytes_per_token(answers: pa.Table, signal: Signal) -> float:
    """answers: ``answer_schema`` of the signal, with one response token or more."""
    keys = [number.to_bytes(KEY_BYTES, "little") for number in range(len(answers))]
    rows = answers.drop_columns("error").append_column("key", pa.array(keys, pa.binary(KEY_BYTES)))
    prompts = pa.array([[]] * len(answers), TOKEN_IDS)
    origin = Origin("", "", "", "", "", 1, signal)
    segment = encode(origin, [(Payer("", "training"), rows.append_column("prompt_ids", prompts))])
    counted = {"response_ids", *(field.name for field in signal_fields(signal.kind, signal.width))}
    group = pq.ParquetFile(io.BytesIO(segment)).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    stored = sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in counted
    )
    tokens = len(answers["response_ids"].combine_chunks().flatten())
    return stored / tokens
