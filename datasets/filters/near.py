"""One pass of an epoch over a filter that compares all its answers: which are near-duplicates.

Where it sits: the process that decides (cluster/coordinator/duplicates.py) has one object a filter
and pass. In ``fixed`` order a row is compared with those of lower positions that passed, so groups
wait for their turn, and which of two stays depends on the plan alone. In ``arrival`` order the one
that is decided first stays. A decision is kept by position: a group that is answered again after a
process was lost is told the same, and no row is a duplicate of itself. Imports neither Ray nor
torch.

Legend: n rows of a group, H hashes of a signature.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raystill.config.stream import SimilarConfig
from raystill.datasets.filters.minhash import NearIndex

UNDECIDED, PASSED, NEAR = 0, 1, 2
Positions = NDArray[np.int64]


class NearPass:
    """Decisions of one filter in one pass over an epoch of ``num_rows`` rows."""

    def __init__(
        self, config: SimilarConfig, num_rows: int, groups: Sequence[int] | None = None
    ) -> None:
        """groups: first position of each group that is left, ascending, where they have turns."""
        self._index = NearIndex(num_rows, config.max_similarity)
        self._decided = np.zeros(num_rows, np.int8)
        self._groups = groups
        self._turn = 0

    def is_turn_of(self, group: int) -> bool:
        """Whether a group may be decided: all before it were. group: its first position."""
        groups = self._groups
        return groups is None or self._turn == len(groups) or group <= groups[self._turn]

    def restore(self, positions: Positions, signatures: NDArray[np.uint16]) -> None:
        """Rows that passed before, by ascending position; the weights have learned from them."""
        for position, signature in zip(positions.tolist(), signatures, strict=True):
            self._index.add(signature, position)
        self._decided[positions] = PASSED

    def decide(
        self, group: int, positions: Positions, signatures: NDArray[np.uint16]
    ) -> list[bool]:
        """Which rows of a group are near-duplicates, [n], by ascending positions.

        signatures: [n, H]. A group without rows to look at has its turn too.
        """
        assert self.is_turn_of(group), f"group {group} is decided before its turn"
        for position, signature in zip(positions.tolist(), signatures, strict=True):
            if self._decided[position] != UNDECIDED:
                continue
            near = self._index.take(signature, position, in_order=self._groups is not None)
            self._decided[position] = NEAR if near else PASSED
        if self._groups is not None and self._turn < len(self._groups):
            self._turn += group == self._groups[self._turn]
        return (self._decided[positions] == NEAR).tolist()
