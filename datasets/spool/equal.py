"""Which of many rows are equal, and their names, in a few bytes a row.

Imports neither Ray nor torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Digests = NDArray[np.uint64]
"""Hashes of many rows, [n, 2]."""
SORTED_ROWS = 1 << 16
"""Rows that are sorted at once, about."""


@dataclass(frozen=True)
class Named:
    """A name for each of many prompts: ``names[number[i]]``, int32 [n]."""

    number: NDArray[np.int32]
    names: list[str | None]

    def of(self, prompts: NDArray[np.int64]) -> NDArray[np.object_]:
        """The names of some prompts, as Python objects."""
        names = np.empty(len(self.names), object)
        names[:] = self.names
        found: NDArray[np.object_] = names[self.number[prompts]]
        return found

    def strings(self, chunks: Sequence[NDArray[np.int64]]) -> pa.ChunkedArray:
        """The names of some prompts, for a table. Chunks of one name share their memory."""
        names = pa.array(self.names, pa.string())
        alone: dict[tuple[int, int], pa.StringArray] = {}
        found = []
        for prompts in chunks:
            numbers = self.number[prompts]
            taken = alone.get((int(numbers[0]), len(numbers))) if len(numbers) else None
            if taken is None or (numbers != numbers[0]).any():
                taken = names.take(pa.array(numbers))
                if len(numbers) and (numbers == numbers[0]).all():
                    alone[int(numbers[0]), len(numbers)] = taken
            found.append(taken)
        return pa.chunked_array(found, pa.string())


def digest_of(prompt: np.ndarray, response: np.ndarray | None = None) -> bytes:
    """A hash that is equal for equal prompts (and responses, where given).

    The prompt's length is in it too: else the same ids, cut elsewhere, would have the same hash.
    """
    digest = blake2b(prompt.tobytes(), digest_size=16)
    if response is not None:
        digest.update(b"\0" + len(prompt).to_bytes(8, "little") + response.tobytes())
    return digest.digest()


def group_numbers(digests: Digests, teacher: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """A number for each row [n], the same for equal digests (of the same teacher).

    The numbers ascend with the first row of each group.
    """
    first = _first_rows(digests, teacher)
    rank = np.cumsum(first == np.arange(len(first), dtype=np.int32), dtype=np.int32)
    rank -= 1
    group: NDArray[np.int32] = rank[first]
    return group


def is_first(digests: Digests, teacher: NDArray[np.int32] | None = None) -> NDArray[np.bool_]:
    """Which rows [n] have a digest (and a teacher) that no row before them has."""
    first = _first_rows(digests, teacher)
    return np.asarray(first == np.arange(len(first), dtype=np.int32), np.bool_)


def _first_rows(digests: Digests, teacher: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """The number of the first row, [n], that has the same digest as each one.

    Sorting takes some fifty bytes a row. So the rows are sorted some at a time, by the first byte
    of their digests, which are hashes.
    """
    first = np.empty(len(digests), np.int32)
    byte = digests.view(np.uint8)[:, 0]
    parts = min(256, len(digests) // SORTED_ROWS + 1)
    edges = [256 * part // parts for part in range(parts + 1)]
    for low, high in pairwise(edges):
        rows = np.flatnonzero((byte >= low) & (byte < high))
        keys = [digests[rows, 0], digests[rows, 1]]
        if teacher is not None:
            keys.append(teacher[rows])
        order = np.lexsort(keys)  # Stable: of equal ones the first row comes first.
        new = np.ones(len(order), np.bool_)
        new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
        starts = np.flatnonzero(new)
        sizes = np.diff(starts, append=len(order))
        first[rows[order]] = np.repeat(rows[order[starts]], sizes)
    return first
