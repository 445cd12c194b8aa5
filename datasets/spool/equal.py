"""Which of many rows are equal, and their names, in a few bytes a row.

Imports neither Ray nor torch.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Digests = NDArray[np.uint64]
"""Hashes of many rows, [n, 2]."""


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

    def strings(self, prompts: NDArray[np.int64]) -> pa.StringArray:
        """The names of some prompts, for a table."""
        return pa.array(self.names, pa.string()).take(pa.array(self.number[prompts]))


def digest_of(prompt: np.ndarray, response: np.ndarray | None = None) -> bytes:
    """A hash that is equal for equal prompts (and responses, where given).

    The prompt's length is in it too: else the same ids, cut elsewhere, would have the same hash.
    """
    digest = blake2b(prompt.tobytes(), digest_size=16)
    if response is not None:
        digest.update(b"\0" + len(prompt).to_bytes(8, "little") + response.tobytes())
    return digest.digest()


def group_numbers(digests: Digests, teacher: NDArray[np.int32] | None = None) -> NDArray[np.int64]:
    """A number for each row [n], the same for equal digests (of the same teacher).

    The numbers ascend with the first row of each group.
    """
    keys = [np.arange(len(digests)), digests[:, 0], digests[:, 1]]
    if teacher is not None:
        keys.append(teacher)
    order = np.lexsort(keys)
    new = np.ones(len(order), np.bool_)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys[1:]], axis=0)
    firsts = order[new]
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    group = np.empty(len(order), np.int64)
    group[order] = rank[np.cumsum(new) - 1]
    return group
