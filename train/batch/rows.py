"""One training row: a prompt, the teacher's answer and the signal of its tokens, as numpy arrays.

The stream delivers blocks of rows as Arrow tables (`datasets/rows/schema.row_schema`). Each worker
calls `rows_from_table` on every block it takes; `batch.collate` makes tensors of the rows. The
arrays are views of the table's buffers, so nothing is copied here. Imports numpy and pyarrow only.

Legend: P prompt tokens, T response tokens of a row, K teacher ids kept for each token, D the
teacher's hidden size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

_SIGNAL_COLUMNS = ("sampled_logprobs", "topk_ids", "topk_logprobs", "tail_logprob", "hidden")
_VERSION, _VERSIONS = "policy_version", "token_versions"


@dataclass(slots=True)
class Row:
    """One prompt with the teacher's answer.

    The columns of the signal are None where its kind does not have them.

    Attributes:
        position: Place of the row in the order of the epoch, from 0.
        row: Number of the row in the prompt table.
        prompt_ids: int32 [P].
        response_ids: int32 [T], with the stop token that ended the answer.
        finish_reason: ``stop``, or ``length`` where the answer was cut off.
        sampled_logprobs: float32 [T], nats, of the drawn tokens.
        topk_ids: int32 [T, K].
        topk_logprobs: float32 [T, K], nats.
        tail_logprob: float32 [T], nats, of all ids outside the K.
        hidden: uint16 [T, D], the bits of bfloat16, a type that numpy does not have.
        policy_version: Steps that the student had finished when it wrote the response; None where
            the teacher wrote it.
        token_versions: int32 [T], the same of the weights that wrote each token; None or empty
            where the teacher wrote the response.
    """

    position: int
    row: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    finish_reason: str | None = None
    sampled_logprobs: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None
    tail_logprob: np.ndarray | None = None
    hidden: np.ndarray | None = None
    policy_version: int | None = None
    token_versions: np.ndarray | None = None

    @property
    def student_written(self) -> bool:
        """Whether the student wrote the response."""
        return self.policy_version is not None

    @property
    def num_inputs(self) -> int:
        """Number of tokens the model reads: all but the last, which predicts nothing."""
        return max(0, len(self.prompt_ids) + len(self.response_ids) - 1)

    @property
    def num_targets(self) -> int:
        """Number of response tokens with a loss: all that have a token before them."""
        return max(0, len(self.response_ids) - (len(self.prompt_ids) == 0))


def rows_from_table(table: pa.Table) -> list[Row]:
    """The rows of a delivered table, in its order; their arrays are views of its buffers.

    Raises ValueError where a list column has a row without a value.
    """
    rows: list[Row] = []
    for batch in table.to_batches():
        columns = set(batch.schema.names)
        positions = batch.column("position").to_pylist()
        numbers = batch.column("row").to_pylist()
        reasons = batch.column("finish_reason").to_pylist()
        versions = batch.column(_VERSION).to_pylist() if _VERSION in columns else None
        lists = {
            name: _list_views(batch.column(name), name)
            for name in ("prompt_ids", "response_ids", *_SIGNAL_COLUMNS, _VERSIONS)
            if name in columns
        }
        for i in range(batch.num_rows):
            views: dict[str, Any] = {name: values[i] for name, values in lists.items()}
            row = Row(positions[i], numbers[i], finish_reason=reasons[i], **views)
            row.policy_version = None if versions is None else versions[i]
            rows.append(row)
    return rows


def _list_views(column: pa.Array, name: str) -> list[np.ndarray]:
    """One view for each row of a list column.

    The shape follows the type of the list's items: [T] for numbers, [T, K] for fixed-size lists,
    uint16 [T, D] for fixed-size binary values of 2 bytes a component.
    """
    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} rows without a value; expected 0")
    offsets = column.offsets.to_numpy()
    values = column.values
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        # .values ignores a slice of a fixed-size list; .flatten() copies where there are nulls.
        flat = values.values.slice(values.offset * width, len(values) * width)
        array = flat.to_numpy(zero_copy_only=True).reshape(-1, width)
    elif pa.types.is_fixed_size_binary(values.type):
        array = _components(values)
    else:
        array = values.to_numpy(zero_copy_only=True)
    return [array[offsets[i] : offsets[i + 1]] for i in range(len(column))]


def _components(values: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Fixed-size binary values as a view, uint16 [length, D]."""
    width = values.type.byte_width // 2
    buffer = values.buffers()[1]  # The whole buffer, also of a slice: hence the offset below.
    if buffer is None or len(values) == 0:
        return np.empty((0, width), dtype=np.uint16)
    first = values.offset * width
    flat = np.frombuffer(buffer, dtype=np.uint16)[first : first + len(values) * width]
    return flat.reshape(-1, width)
