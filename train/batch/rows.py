"""From delivered Arrow rows to the padded tensors of one forward pass.

The stream hands a worker tables of rows; `row_views` sees them as numpy arrays without a copy,
`cut_micro_batches` groups them under a token budget, `collate` pads one group into a
`MicroBatch`, or packs it into one sequence. No Ray, no vLLM.

Legend: B rows, S length, P prompt tokens, T response tokens, N response tokens of a
micro-batch that have a context, K teacher ids kept for each, D the teacher's hidden size.

The shift, stated once: position j of the input predicts token j + 1. Response token t (from 0) of
a row stands at P + t, so its logits are those of position P + t - 1. The last response token
predicts nothing and is not put in. With P = 0 token 0 has no context; it bears no loss.

The rows of a delivered table as numpy arrays, without a copy.

Between the stream and `batch`: `rows_from_table` is what a worker does with each block it takes.

Legend: T response tokens of a row, K teacher ids kept for each, D the teacher's hidden size.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(slots=True)
class Row:
    """One prompt with the teacher's answer; arrays are views of the delivered table.

    prompt_ids int32 [P]; response_ids int32 [T], its stop token included; the signal, where the
    kind has it: sampled_logprobs [T], topk_ids and topk_logprobs [T, K], tail_logprob [T], nats;
    hidden uint16 [T, D], the bits of bfloat16.
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

    @property
    def num_inputs(self) -> int:
        """Tokens put into the model: all but the last."""
        return max(0, len(self.prompt_ids) + len(self.response_ids) - 1)

    @property
    def num_targets(self) -> int:
        """Response tokens that bear loss: all with at least one token before them."""
        return max(0, len(self.response_ids) - (len(self.prompt_ids) == 0))


def rows_from_table(table: pa.Table) -> list[Row]:
    """The rows of a delivered table (`datasets.schema.row_schema`), as views without a copy."""
    rows: list[Row] = []
    for batch in table.to_batches():
        columns = set(batch.schema.names)
        positions = batch.column("position").to_pylist()
        numbers = batch.column("row").to_pylist()
        reasons = batch.column("finish_reason").to_pylist()
        lists = {
            name: _list_views(batch.column(name), name)
            for name in ("prompt_ids", "response_ids", *_SIGNAL_COLUMNS)
            if name in columns
        }
        for i in range(batch.num_rows):
            views = {name: values[i] for name, values in lists.items()}
            rows.append(Row(positions[i], numbers[i], finish_reason=reasons[i], **views))
    return rows


_SIGNAL_COLUMNS = ("sampled_logprobs", "topk_ids", "topk_logprobs", "tail_logprob", "hidden")


def _list_views(column: pa.Array, name: str) -> list[np.ndarray]:
    """One view a row of a list column: [T], or [T, K] for lists of fixed-size lists.

    Of fixed-size binary values (2 bytes a component) uint16 [T, D].
    """
    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} rows without a value; expected 0")
    offsets = column.offsets.to_numpy()
    values = column.values
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        # .values ignores the slice of a fixed-size list, .flatten() would copy around nulls.
        flat = values.values.slice(values.offset * width, len(values) * width)
        array = flat.to_numpy(zero_copy_only=True).reshape(-1, width)
    elif pa.types.is_fixed_size_binary(values.type):
        array = _components(values)
    else:
        array = values.to_numpy(zero_copy_only=True)
    return [array[offsets[i] : offsets[i + 1]] for i in range(len(column))]


def _components(values: pa.FixedSizeBinaryArray) -> np.ndarray:
    """uint16 [length, D] of fixed-size binary values, a view."""
    width = values.type.byte_width // 2
    buffer = values.buffers()[1]
    if buffer is None or len(values) == 0:
        return np.empty((0, width), dtype=np.uint16)
    first = values.offset * width
    flat = np.frombuffer(buffer, dtype=np.uint16)[first : first + len(values) * width]
    return flat.reshape(-1, width)
