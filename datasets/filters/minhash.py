"""Near-duplicates among many answers: MinHash signatures, and an index of them by bands.

Where it sits: the answer stage makes the signatures of a group's answers, and one process of the
run holds the index (cluster/coordinator/duplicates.py). Of two sets of n-grams with Jaccard
similarity s, each hash of a signature agrees with probability s; so the share that agrees estimates
s, with a standard error of sqrt(s (1 - s) / H), at most 0.045. To be compared at all two signatures
must agree in one of their bands of R hashes (locality-sensitive hashing), which they do with
probability 1 - (1 - s^R)^B. Pure numpy.

Legend: N answers, T response tokens, H hashes of a signature, B bands, R hashes of a band.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.filters.answers import Int32Array

HASHES = 128
FOUND_AT_LIMIT = 0.95
"""Least probability that two answers are compared whose similarity is just the limit."""
FULL = 0.5
"""Share of the places of a band's table that are taken at most."""
LOOKED_AT = 256
"""Answers of one band that are compared at most, the newest ones: a beginning that all answers have
in common must not stall the run."""
NGRAMS_AT_ONCE = 4096

Signature = NDArray[np.uint16]
_random = np.random.Generator(np.random.PCG64(0x5EED))  # PCG64's stream is the same for ever.
_FACTORS = _random.integers(0, 2**32, HASHES, np.uint32) | np.uint32(1)
_TERMS = _random.integers(0, 2**32, HASHES, np.uint32)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def signatures(tokens: Sequence[Int32Array], ngram: int) -> NDArray[np.uint16]:
    """The signature of each answer's n-grams, [N, H]; of a shorter answer the whole counts.

    tokens: ids [T] of each answer. Equal ids have equal signatures on every machine.
    """
    made = np.empty((len(tokens), HASHES), np.uint16)
    for row, ids in enumerate(tokens):
        least = np.full(HASHES, 2**32 - 1, np.uint32)
        hashes = _ngram_hashes(ids, min(ngram, max(1, len(ids))))
        for start in range(0, len(hashes), NGRAMS_AT_ONCE):
            some = hashes[start : start + NGRAMS_AT_ONCE]
            # A permutation of the numbers below 2^32 for each hash: wraps around, as it should.
            least = np.minimum(least, (_FACTORS[:, None] * some + _TERMS[:, None]).min(axis=1))
        # The least of many has few high bits left, so all are mixed before 16 are kept.
        made[row] = (least.astype(np.uint64) * _MIX) >> np.uint64(48)
    return made


def _ngram_hashes(ids: Int32Array, ngram: int) -> NDArray[np.uint32]:
    """32 bits for each n-gram of ids [T], [T - n + 1]."""
    values = ids.astype(np.uint64)
    number = len(ids) - ngram + 1
    mixed = np.full(max(0, number), ngram, np.uint64)
    for place in range(ngram if number > 0 else 0):
        mixed = (mixed ^ values[place : place + number]) * _MIX
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(16)).astype(np.uint32)


def hashes_of_band(max_similarity: float) -> int:
    """R: the most hashes of a band with which answers at the limit are still found."""
    for size in range(HASHES, 1, -1):
        if 1 - (1 - max_similarity**size) ** (HASHES // size) >= FOUND_AT_LIMIT:
            return size
    return 1


def bytes_of_row(max_similarity: float) -> float:
    """Memory of the index for each row of an epoch, in bytes, where each answer passes."""
    bands = HASHES // hashes_of_band(max_similarity)
    return 2 * HASHES + 4 * bands / FULL + 4 * bands + 8


class NearIndex:
    """Signatures that passed, each with a position; finds those that are near to another.

    The table of a band has the newest signature with each value of the band; links lead to the
    older ones. All memory is asked for at the start and touched as it is needed.
    """

    def __init__(self, capacity: int, max_similarity: float) -> None:
        """capacity: most signatures."""
        self._limit = max_similarity
        self._of_band = hashes_of_band(max_similarity)
        self._bands = np.arange(HASHES // self._of_band)
        self._places = np.uint64(_prime(int(capacity / FULL) + 3))  # Each step visits all places.
        self._newest = np.zeros((len(self._bands), int(self._places)), np.int32)  # 0: none
        self._older = np.empty((capacity + 1, len(self._bands)), np.int32)
        self._signatures = np.empty((capacity + 1, HASHES), np.uint16)
        self._in_bands = self._banded(self._signatures)  # A view.
        self._positions = np.empty(capacity + 1, np.int64)
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def has_near(self, signature: Signature, before: int | None = None) -> bool:
        """Whether one is more similar than the limit; ``before``: with a position below this."""
        return self._is_near(signature, self._find(signature)[1], before)

    def add(self, signature: Signature, position: int) -> None:
        """One that passed."""
        self._put(signature, position, *self._find(signature))

    def take(self, signature: Signature, position: int, in_order: bool) -> bool:
        """Whether one is near, as ``has_near``; if not, it has passed and is added.

        in_order: it is compared with those of lower positions only.
        """
        places, found = self._find(signature)
        if self._is_near(signature, found, position if in_order else None):
            return True
        self._put(signature, position, places, found)
        return False

    def _is_near(self, signature: Signature, found: NDArray[np.int32], before: int | None) -> bool:
        """found: the newest in each band, [B]; 0: none."""
        seen, bands = [], self._bands
        for _ in range(LOOKED_AT):
            there = found > 0
            bands, found = bands[there], found[there]
            if not len(found):
                break
            seen.append(found)
            found = self._older[found, bands]
        if not seen:
            return False
        others = np.unique(np.concatenate(seen))
        if before is not None:
            others = others[self._positions[others] < before]
        agreeing = (self._signatures[others] == signature).sum(axis=1)
        return bool((agreeing > self._limit * HASHES).any())

    def _put(
        self,
        signature: Signature,
        position: int,
        places: NDArray[np.int64],
        found: NDArray[np.int32],
    ) -> None:
        self._number += 1
        self._signatures[self._number] = signature
        self._positions[self._number] = position
        self._older[self._number] = found
        self._newest[self._bands, places] = self._number

    def _find(self, signature: Signature) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """For each band its place in the table, and the newest with its value there; 0: none."""
        bands = self._banded(signature)
        mixed = np.zeros(len(bands), np.uint64)
        for value in bands.T.astype(np.uint64):
            mixed = (mixed ^ value) * _MIX
            mixed ^= mixed >> np.uint64(29)
        size = int(self._places)
        places = (mixed % self._places).astype(np.int64)
        steps = ((mixed >> np.uint64(32)) % np.uint64(size - 1)).astype(np.int64) + 1
        found = np.zeros(len(bands), np.int32)
        left = self._bands
        while True:
            there = self._newest[left, places[left]]
            taken = there > 0
            if not taken.any():
                return places, found
            left, there = left[taken], there[taken]
            same = (self._in_bands[there, left] == bands[left]).all(axis=1)
            found[left[same]] = there[same]
            left = left[~same]
            places[left] = (places[left] + steps[left]) % size

    def _banded(self, signature: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """[..., H] as [..., B, R]."""
        whole = signature[..., : len(self._bands) * self._of_band]
        return whole.reshape(*signature.shape[:-1], len(self._bands), self._of_band)


def _prime(number: int) -> int:
    """The first prime number from ``number`` on."""
    while any(number % one == 0 for one in range(2, isqrt(number) + 1)):
        number += 1
    return number
