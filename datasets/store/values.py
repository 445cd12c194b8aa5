"""Values that no teacher means: NaN or positive log probabilities, ids outside the vocabulary.

Such a row is not stored, since the student would refuse it each time.

Imports neither Ray nor torch.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.rows.signal import Signal

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
    lengths = rows["response_ids"].combine_chunks().value_lengths().fill_null(0)
    row_of = np.repeat(np.arange(len(rows)), lengths.to_numpy(zero_copy_only=False))

    def mark(tokens: np.bool_ | NDArray[np.bool_]) -> None:
        bad[row_of[np.asarray(tokens, bool)]] = True

    drawn = _flat(rows["sampled_logprobs"])
    wrong = ~(drawn <= TOLERANCE_NATS)
    if signal.kind == "hidden":
        missing = np.bincount(row_of[np.isnan(drawn)], minlength=len(rows))
        wrong &= (missing != lengths.to_numpy(zero_copy_only=False))[row_of]
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
