"""How much of some texts stands in others, by n-grams of words.

What is asked: of each *item* (a held-out prompt, a row of a benchmark), which share of its words is
part of an n-gram that a *trained* text has too. That is the measure of Llama 3 (Grattafiori et al.
2024, 5.1.4: the ratio of tokens in 8-grams that occur in the training data). An n-gram that more
than ten trained texts have is a phrase of a template, and counts for nothing, as in GPT-3 (Brown et
al. 2020, appendix C), unless trained texts have all n-grams of the item: one that was copied often
is no template, of which each place has words of its own. Words are compared in lower case without
punctuation; in scripts that write no spaces a character is a word.

Memory is that of the items' n-grams, 16 bytes each; trained texts pass by in batches.

Legend: W words of a text, n words of an n-gram, G different n-grams of all items.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

MOST_TEXTS = 10
"""Trained texts that an n-gram may be in, and still count."""
BATCH_TEXTS = 500
LONGEST_TEXT = 1_000_000
"""Characters of a text that are read."""
WORDS = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    r"|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
FACTOR = np.uint64(0x9E3779B97F4A7C15)
Hashes = NDArray[np.uint64]


def words_of(text: str) -> Hashes:
    """A number for each word of a text, [W]; equal for equal words in this process alone."""
    words = WORDS.findall(text[:LONGEST_TEXT].casefold())
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def ngrams_of(words: Hashes, n: int) -> Hashes:
    """A number for each n-gram of words [W], [W - n + 1]; of fewer than n words one for all."""
    n = min(n, len(words))
    if not n:
        return np.empty(0, np.uint64)
    total = np.full(len(words) - n + 1, n, np.uint64)  # So that a short text equals no part.
    for place in range(n):
        total = total * FACTOR + words[place : len(words) - n + 1 + place]
        total ^= total >> np.uint64(29)
    return total


def ngrams_of_many(texts: Sequence[str], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The n-grams of several texts, and the number of the text of each."""
    words = [words_of(text) for text in texts]
    lengths = np.array([len(one) for one in words], np.int64)
    # One pass over all words, without the windows that begin in one text and end in another.
    ends = np.repeat(np.cumsum(lengths), lengths)
    whole = np.flatnonzero(np.arange(len(ends)) + n <= ends)
    of_text = np.repeat(np.arange(len(texts)), lengths)
    grams = ngrams_of(np.concatenate([np.empty(0, np.uint64), *words]), n)[whole]
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    few = [ngrams_of(words[text], n) for text in short]
    return np.concatenate([grams, *few]), np.concatenate([of_text[whole], short])


class Items:
    """Texts whose n-grams are looked for in trained ones; an item may have several texts."""

    def __init__(self, items: Iterable[Sequence[str]], n: int) -> None:
        self.n = n
        self._texts: list[list[tuple[int, Hashes]]] = []
        for texts in items:
            words = [words_of(text) for text in texts]
            # Short fields, an answer of one word for example, say nothing beside a long one.
            least = min(n, max((len(one) for one in words), default=0))
            counted = [(len(one), ngrams_of(one, n)) for one in words if len(one) >= max(1, least)]
            self._texts.append(counted)
        grams = [ngrams for texts in self._texts for _, ngrams in texts]
        self._all = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))
        self._texts_with = np.zeros(len(self._all), np.uint32)
        self._first = np.full(len(self._all), -1, np.int64)
        self._trained = 0

    def __len__(self) -> int:
        return len(self._texts)

    def look_in(self, trained: Iterable[str]) -> None:
        """Note which n-grams [G] these trained texts have, in how many, and which had it first."""
        rest = iter(trained)
        while batch := list(islice(rest, BATCH_TEXTS)):
            found, of_text = ngrams_of_many(batch, self.n)
            places = np.searchsorted(self._all, found)
            known = np.flatnonzero(places < len(self._all))
            known = known[self._all[places[known]] == found[known]]
            # Each n-gram once a text, the texts in order.
            pairs = np.unique(np.stack([of_text[known], places[known]]), axis=1)
            of_text, places = pairs[0], pairs[1]
            np.add.at(self._texts_with, places, 1)
            fresh = self._first[places] < 0
            # The last assignment to a place wins, so they go backwards.
            self._first[places[fresh][::-1]] = self._trained + of_text[fresh][::-1]
            self._trained += len(batch)

    def shares(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of each item the largest share of a text's words that are covered, and the number of the
        first trained text with the n-gram that covers it; -1 where there is none.
        """
        shares, firsts = np.zeros(len(self)), np.full(len(self), -1, np.int64)
        for item, texts in enumerate(self._texts):
            for num_words, grams in texts:
                places = np.searchsorted(self._all, grams)
                counts = self._texts_with[places]
                most = MOST_TEXTS if (counts == 0).any() else counts.max()
                hits = np.flatnonzero((counts > 0) & (counts <= most))
                if not len(hits):
                    continue
                share = covered(hits, min(self.n, num_words), num_words) / num_words
                if share > shares[item]:
                    shares[item], firsts[item] = share, self._first[places[hits[0]]]
        return shares, firsts


def covered(starts: NDArray[np.int64], n: int, num_words: int) -> int:
    """Words, of ``num_words``, that are part of an n-gram which begins at one of ``starts``."""
    changes = np.zeros(num_words + 1, np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, starts + n, -1)
    return int((np.cumsum(changes[:-1]) > 0).sum())
