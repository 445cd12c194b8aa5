"""What several packed rows begin with, once.

All rows of a run begin with the chat template's first tokens, and answers to one prompt with all of
it. A token's state in a causal model depends on nothing behind it, so it is the same in all rows
that are equal up to it: it is computed once, and gradients from all these rows add up in it.

Legend: B rows, M tokens of the rows one behind the other, N <= M of them that are kept.
"""

from collections.abc import Sequence

import numpy as np


def places_of(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each row the place of each of its tokens among the N, int64 of the row's length.

    rows: token ids [L] each. Two rows that are equal up to a token have it at the same place.
    Places are given from 0 without gaps, and never fall within a row.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number].tolist())
    found: list[np.ndarray] = [np.empty(0, np.int64)] * len(rows)
    free, before = 0, np.empty(0, np.int64)  # Sorted, a row begins most like the one before it.
    places = np.empty(0, np.int64)
    for number in order:
        ids = rows[number]
        same = _same_beginning(before, ids)
        new = len(ids) - same
        places = np.concatenate([places[:same], np.arange(free, free + new)])
        found[number], before, free = places, ids, free + new
    return found


def _same_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if len(differs) else size
