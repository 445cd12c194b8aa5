"""The log probabilities that a service tells of an answer, as the signal of the student's ids.

Where it sits: `ApiEngine` asks for ``top_logprobs`` and hands over what came. A service names
tokens as text, so a distribution is used as far as its tokens are ids (`vocabulary.Vocabulary`).
What is not goes to the tail, which is right: an unmapped token is none of the K ids. It only says
less, and how much less is told and bounded (``teacher.api.max_unmapped_mass``).

Legend: T response tokens, K ids kept for each, V vocabulary.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.rows.answers import Answer, tail_logprob
from raystill.datasets.rows.signal import Signal
from raystill.model.tokenizer import PlainText
from raystill.serve.api.parsed import Drawn, Entry, content_of
from raystill.serve.api.vocabulary import REPLACEMENT, Vocabulary

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ZERO = -9999.0
"""What services write for a log probability of minus infinity, which JSON lacks."""
SUM_TOLERANCE = 1e-2
"""By how much the probabilities of one token may be above 1: services round them."""
MOST_OTHER_CUTS = 0.1
"""Share of an answer's tokens that may begin elsewhere than the tokenizer would cut its text.

A model samples such a token now and then. With another tokenizer it is most answers.
"""
FIRST_OF_MANY = b"\xc0"
"""Bytes from here on begin a character of several bytes."""
NO_LOGPROBS = "no_logprobs"
OTHER_TOKENS = "other_tokens"
UNMAPPED = "unmapped_tokens"


class Named(NamedTuple):
    """A token that a service names, by its bytes, with its log probability in nats."""

    meant: bytes
    logprob: float


def named(told: Sequence[Entry]) -> list[Named]:
    """Of entries of ``content`` or ``top_logprobs``. Raises one of UNREADABLE."""
    logprobs = _logprobs([one.logprob for one in told]).tolist()
    return list(map(Named, _all_meant(told), logprobs))


def _all_meant(told: Sequence[Entry]) -> list[bytes]:
    given = [one.bytes for one in told]
    try:
        return list(map(bytes, given))  # type: ignore[arg-type]
    except TypeError:  # Not all are told.
        return list(map(_meant, told))


def _meant(told: Entry) -> bytes:
    """The bytes count where they are told: text cannot say a part of a character."""
    if told.bytes is not None:
        return bytes(told.bytes)
    name: bytes = told.token.encode()
    return name


def _logprobs(told: Sequence[float]) -> Floats:
    """Numbers in nats. Raises ValueError where they are no log probabilities."""
    values = np.array(told, np.float64)
    if not (values <= SUM_TOLERANCE).all():  # Also where one is not a number.
        raise ValueError("a log probability is above 0, or no number")
    return np.where(values <= ZERO, -np.inf, np.minimum(values, 0.0))


class Beside:
    """What a service names beside each of T drawn tokens: arrays [T, N], of N places or fewer.

    drawn: the tokens of the answer. ``there``: whether a place has a token. The drawn token is
    named once more among the best, or is not among them: ``same`` are the places where it stands
    again, ``other`` all but the first of these. Raises one of UNREADABLE.
    """

    def __init__(self, content: Sequence[Drawn], drawn: Sequence[Named]) -> None:
        each = [one.top_logprobs or () for one in content]
        lengths = np.array([len(some) for some in each], np.int64)
        flat = list(chain.from_iterable(each))
        self.names = _all_meant(flat)
        logprobs = _logprobs([one.logprob for one in flat])
        self.starts = np.cumsum(lengths) - lengths
        self.there: Bools = np.arange(max(lengths, default=0)) < lengths[:, None]
        same, first = (np.zeros(len(flat), bool) for _ in range(2))
        values = logprobs.tolist()
        for one, start, length in zip(drawn, self.starts.tolist(), lengths.tolist(), strict=True):
            places = _places(self.names, values, one, start, start + length)
            same[places], first[places[:1]] = True, True
        self.logprobs: Floats = self.placed(logprobs, -np.inf)
        self.same: Bools = self.placed(same, False)
        self.other: Bools = self.there & ~self.placed(first, False)

    def placed(self, values: NDArray[Any], empty: Any) -> NDArray[Any]:
        """Values of all named tokens, one after another, at their places."""
        found = np.full(self.there.shape, empty, values.dtype)
        found[self.there] = values
        return found

    @cached_property
    def many(self) -> Bools:
        """Places of names that begin with a byte of `FIRST_OF_MANY` or above."""
        return self.placed(np.array([n >= FIRST_OF_MANY for n in self.names], bool), False)


def _places(
    names: Sequence[bytes], values: Sequence[float], one: Named, start: int, end: int
) -> list[int]:
    """Where a token stands just as it is, between two places."""
    found: list[int] = []
    while True:
        try:
            start = names.index(one.meant, start, end)
        except ValueError:
            return found
        if values[start] == one.logprob:
            found.append(start)
        start += 1


def _repeated(ids: Ints, among: Bools) -> Bools:
    """Whether an id stands more than once in its row of [T, N], among some of its places."""
    places = np.arange(ids.shape[1])
    own = np.where(among & (ids >= 0), ids, -1 - places)  # No two of the others are equal.
    order = np.argsort(own, axis=1)
    equal = np.diff(np.take_along_axis(own, order, axis=1), axis=1) == 0
    found = np.zeros(ids.shape, bool)
    if equal.any():
        either = np.pad(equal, ((0, 0), (0, 1))) | np.pad(equal, ((0, 0), (1, 0)))
        np.put_along_axis(found, order, either, axis=1)
    return found


def of_text(content: list[Drawn], text: str) -> list[Drawn]:
    """The tokens at the end that are an answer's text and its end; all where none begins it."""
    meant, wanted = [one.meant for one in named(content)], text.encode()
    whole, starts = b"".join(meant), [0, *accumulate(map(len, meant))]
    for end in (starts[-1], starts[-2]):  # The last one may be a stop token.
        start = end - len(wanted)
        if start in starts and whole[start:end] == wanted:
            return content[starts.index(start) :]
    return content


@dataclass(frozen=True)
class Told:
    """An answer with its signal, and the mean probability of named tokens that are no ids."""

    answer: Answer
    unmapped: float


class Reader:
    """Reads what a service tells of its answers.

    stops: ids that may end an answer; the first is taken where the service tells none.
    """

    def __init__(self, vocabulary: Vocabulary, plain: PlainText, stops: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._plain = plain
        self._stops = tuple(stops)

    def read(
        self, content: Sequence[Drawn], text: str, complete: bool, signal: Signal
    ) -> Told | str:
        """The answer with its signal, or why it cannot be used.

        content: T tokens. complete: whether the model has ended it. Raises one of UNREADABLE where
        these are no log probabilities.
        """
        drawn = named(content)
        ids = self._drawn_ids([one.meant for one in drawn], text, complete)
        if ids is None:
            return OTHER_TOKENS
        beside = Beside(content, drawn)
        known = self._distributions(ids, drawn, beside)
        logprobs = [one.logprob for one in drawn] + [0.0] * (len(ids) - len(drawn))
        sampled = np.array(logprobs, np.float32)
        response, finish = np.array(ids, np.int32), "stop" if complete else "length"
        mean = float(known.lost.sum()) / len(ids)
        if signal.kind != "topk":
            return Told(Answer(response, finish, sampled), mean)
        best_ids, best, outside = self._best(known, signal.width)
        if len(ids) > len(drawn):  # The stop token, of which nothing is told: it is what came.
            last = _Known.certain(ids[-1])
            of_last = self._best(last, signal.width)
            best_ids, best, outside = map(
                np.concatenate, zip((best_ids, best, outside), of_last, strict=True)
            )
        tail = tail_logprob(best, self._vocabulary.size, outside)
        return Told(Answer(response, finish, sampled, best_ids, best, tail), mean)

    def _drawn_ids(self, meant: list[bytes], text: str, complete: bool) -> list[int] | None:
        """Ids of the answer's tokens, with its stop token; None: they are not the tokenizer's.

        A token that is part of a character has no text. It is the tokenizer's own where all others
        of the answer are.
        """
        vocabulary, end = self._vocabulary, []
        if complete and self._stops:
            last = vocabulary.id_of(meant[-1]) if meant else None
            told = last in self._stops or (bool(meant) and not meant[-1])
            end = [last if last in self._stops else self._stops[0]]
            meant = meant[:-1] if told else meant
        found = [vocabulary.id_of(one) for one in meant]
        if any(index in vocabulary.control for index in found):
            return None
        own = self._plain.encode(text)
        if len(own) == len(found) and all(f in (None, o) for f, o in zip(found, own, strict=True)):
            return [*own, *end]
        if None in found or b"".join(meant) not in (text.encode(), b" " + text.encode()):
            return None
        ids = [index for index in found if index is not None]
        others = self._starts(ids) ^ self._starts(own)
        return [*ids, *end] if len(others) <= MOST_OTHER_CUTS * len(ids) else None

    def _starts(self, ids: Sequence[int]) -> set[int]:
        """At which byte each token begins, counted from the end: a first space may be left out."""
        lengths = (len(self._vocabulary.bytes_of(index)) for index in reversed(ids))
        return set(accumulate(lengths))

    def _inside_characters(self, ids: Sequence[int]) -> list[bool]:
        """Of each token, whether those before it have begun a character and not ended it."""
        if b"".join(map(self._vocabulary.bytes_of, ids)).isascii():
            return [False] * len(ids)
        decoder, inside = codecs.getincrementaldecoder("utf-8")("replace"), []
        for index in ids:
            inside.append(bool(decoder.getstate()[0]))
            decoder.decode(self._vocabulary.bytes_of(index))
        return inside

    def _distributions(
        self, ids: Sequence[int], drawn: Sequence[Named], beside: Beside
    ) -> "_Known":
        """Which named tokens are ids, and how much is in those that are none.

        Of two tokens that have the same bytes nobody can tell which is the id. One that ends a
        character is named as the whole character by some services (vLLM), which may be another id:
        inside a character such a name is no id.
        """
        number = len(drawn)
        own = np.array(ids[:number], np.int64)[:, None]
        sampled = np.array([one.logprob for one in drawn])[:, None]
        others = beside.placed(self._vocabulary.ids_of(beside.names), -1)
        unclear = _repeated(others, beside.other) | (others == own)
        inside = np.array(self._inside_characters(ids[:number]))
        if inside.any():
            unclear |= inside[:, None] & beside.many
        found = beside.other & (others >= 0) & ~unclear
        masses = np.where(beside.other, np.exp(beside.logprobs), 0.0)
        total = float((masses.sum(axis=1) + np.exp(sampled[:, 0])).max())
        if total > 1 + SUM_TOLERANCE:
            raise ValueError(f"the probabilities of a token sum to {total:.3f}")
        # The drawn one may stand beside better ones that are not named.
        apart = np.where(beside.there & ~beside.same, beside.logprobs, np.inf)
        least = apart.min(axis=1, initial=np.inf)
        return _Known(
            ids=np.hstack([own, others]),
            logprobs=np.hstack([sampled, beside.logprobs]),
            found=np.hstack([np.ones_like(own, bool), found]),
            lost=np.where(found, 0.0, masses).sum(axis=1),
            least=np.where(np.isposinf(least), sampled[:, 0], least),
        )

    def _best(self, known: "_Known", width: int) -> tuple[NDArray[np.int32], Any, Floats]:
        """The K best ids [T, K], descending, and their log probabilities; log of the most that is
        outside of them [T]: what was named, and V times the least named. Where there are too few,
        the places have ids of probability 0.
        """
        unknown = np.where(known.found, -known.logprobs, np.nan)  # Sorted last.
        order = np.argsort(unknown, axis=1, kind="stable")
        taken, left = order[:, :width], order[:, width:]
        best_ids = np.full((len(order), width), -1, np.int32)
        best = np.full((len(order), width), -np.inf, np.float32)
        best_ids[:, : taken.shape[1]] = np.take_along_axis(known.ids, taken, axis=1)
        best[:, : taken.shape[1]] = np.take_along_axis(known.logprobs, taken, axis=1)
        for t in np.flatnonzero(known.found.sum(axis=1) < width):
            self._fill(best_ids[t], best[t], known.ids[t][known.found[t]].tolist())
        masses = np.where(known.found, np.exp(known.logprobs), 0.0)
        outside = np.take_along_axis(masses, left, axis=1).sum(axis=1) + known.lost
        outside += np.exp(known.least + np.log(self._vocabulary.size))
        with np.errstate(divide="ignore"):
            return best_ids, best, np.minimum(0.0, np.log(outside))

    def _fill(
        self, best_ids: NDArray[np.int32], best: NDArray[np.float32], found: Sequence[int]
    ) -> None:
        """Puts ids of probability 0 into the places after those of the known ones."""
        taken = {*found, *self._stops}
        unlikely = self._vocabulary.fillers(len(best) + len(taken))
        free = [index for index in unlikely if index not in taken]
        best_ids[len(found) :] = free[: len(best) - len(found)]
        best[len(found) :] = -np.inf


@dataclass(frozen=True)
class _Known:
    """What is known of T distributions: ids and log probabilities [T, N], the drawn one first.

    found: where they count. lost [T]: the mass of named tokens that are no ids. least [T]: no
    token that is not named is more probable (log).
    """

    ids: Ints
    logprobs: Floats
    found: Bools
    lost: Floats
    least: Floats

    @classmethod
    def certain(cls, index: int) -> "_Known":
        """Of one token: there is no other."""
        nothing = np.array([-np.inf])
        return cls(
            np.array([[index]]), np.array([[0.0]]), np.array([[True]]), np.array([0.0]), nothing
        )


def first_of(completion: Any) -> dict[bytes, float] | str:
    """Log probabilities of what the first token may be, by bytes; NO_LOGPROBS where not told.

    Parts of characters may have one name for many tokens, of which each answer names others.
    """
    content = content_of(completion["choices"][0])
    told = content[0].top_logprobs if content else None
    if not told:
        return NO_LOGPROBS
    likely = [one for one in named(told) if one.logprob > -np.inf]
    return {one.meant: one.logprob for one in likely if one.meant and REPLACEMENT not in one.meant}


def most_apart(told: Sequence[Mapping[bytes, float]]) -> float:
    """Largest difference between the first and the last of a token's log probabilities, in nats."""
    first, last = told[0], told[-1]
    return max((abs(first[one] - last[one]) for one in first.keys() & last.keys()), default=0.0)
