"""The log probabilities that a service tells of an answer, as the signal of the student's ids.

Where it sits: `ApiEngine` asks for ``top_logprobs`` and hands over what came. A service names
tokens as text, so a distribution is used as far as its tokens are ids (`vocabulary.Vocabulary`).
What is not goes to the tail, which is right: an unmapped token is none of the K ids. It only says
less, and how much less is told and bounded (``teacher.api.max_unmapped_mass``).

Legend: T response tokens, K ids kept for each, V vocabulary.
"""

import codecs
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from raystill.datasets.rows.answers import Answer, tail_logprob
from raystill.datasets.rows.signal import Signal
from raystill.model.tokenizer import PlainText
from raystill.serve.api.vocabulary import Vocabulary

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

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Named":
        """From an entry of ``content`` or ``top_logprobs``. Raises one of UNREADABLE.

        The bytes count where they are told: text cannot say a part of a character.
        """
        given, value = told.get("bytes"), float(told["logprob"])
        meant = told["token"].encode() if given is None else bytes(given)
        if not value <= SUM_TOLERANCE:
            raise ValueError(f"a log probability is {value}")
        return cls(meant, -np.inf if value <= ZERO else min(value, 0.0))


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
        self, content: Sequence[Mapping[str, Any]], text: str, complete: bool, signal: Signal
    ) -> Told | str:
        """The answer with its signal, or why it cannot be used.

        content: T entries with ``top_logprobs``. complete: whether the model has ended it. Raises
        one of UNREADABLE where that is no list of logprobs.
        """
        drawn = [Named.of(one) for one in content]
        ids = self._drawn_ids([one.meant for one in drawn], text, complete)
        if ids is None:
            return OTHER_TOKENS
        width = signal.width if signal.kind == "topk" else 0
        best = np.full((len(ids), width), -np.inf, np.float32)
        best_ids = np.empty((len(ids), width), np.int32)
        outside, unmapped = np.full(len(ids), -np.inf), np.zeros(len(ids))
        inside = self._inside_characters(ids)
        for t, one in enumerate(drawn):
            named = [Named.of(other) for other in content[t].get("top_logprobs") or ()]
            found, lost = self._distribution(ids[t], one, named, inside[t])
            unmapped[t] = sum(np.exp(lost))
            order = sorted(found, key=lambda index: -found[index])
            best_ids[t], best[t] = self._filled(order, found, width)
            # The drawn one may stand beside better ones that are not named.
            least = min([o.logprob for o in named if o != one] or [one.logprob])
            outside[t] = self._most_outside([found[i] for i in order[width:]] + lost, least)
        if len(ids) > len(drawn):  # The stop token, of which nothing is told: it is what came.
            best_ids[-1], best[-1] = self._filled([ids[-1]], {ids[-1]: 0.0}, width)
        logprobs = [one.logprob for one in drawn] + [0.0] * (len(ids) - len(drawn))
        sampled = np.array(logprobs, np.float32)
        response, finish = np.array(ids, np.int32), "stop" if complete else "length"
        mean = float(unmapped.mean())
        if signal.kind != "topk":
            return Told(Answer(response, finish, sampled), mean)
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
        lengths = [len(self._vocabulary.bytes_of(index)) for index in reversed(ids)]
        return set(np.cumsum(lengths).tolist())

    def _inside_characters(self, ids: Sequence[int]) -> list[bool]:
        """Of each token, whether those before it have begun a character and not ended it."""
        decoder, inside = codecs.getincrementaldecoder("utf-8")("replace"), []
        for index in ids:
            inside.append(bool(decoder.getstate()[0]))
            decoder.decode(self._vocabulary.bytes_of(index))
        return inside

    def _distribution(
        self, drawn_id: int, drawn: Named, named: Sequence[Named], inside: bool
    ) -> tuple[dict[int, float], list[float]]:
        """Log probabilities by id, and those of named tokens that are no id.

        The drawn token is named once more among the best, or is not among them. Of two tokens that
        have the same bytes nobody can tell which is the id. inside: the token before has begun a
        character. One that ends it is named as the whole character by some services (vLLM), which
        may be another id.
        """
        others = list(named)
        if drawn in others:
            others.remove(drawn)
        times = Counter(one.meant for one in others)
        found, lost = {drawn_id: drawn.logprob}, []
        for one in others:
            unclear = times[one.meant] > 1 or (inside and one.meant >= FIRST_OF_MANY)
            index = None if unclear else self._vocabulary.id_of(one.meant)
            if index is None or index in found:
                lost.append(one.logprob)
            else:
                found[index] = one.logprob
        total = float(np.exp([*found.values(), *lost]).sum())
        if total > 1 + SUM_TOLERANCE:
            raise ValueError(f"the probabilities of a token sum to {total:.3f}")
        return found, lost

    def _filled(
        self, order: Sequence[int], found: Mapping[int, float], width: int
    ) -> tuple[list[int], list[float]]:
        """K ids, descending, and their log probabilities; ids of probability 0 where some lack."""
        ids = list(order[:width])
        values = [found[index] for index in ids]
        if len(ids) < width:
            taken = {*found, *self._stops}
            unlikely = self._vocabulary.fillers(width + len(taken))
            free = [index for index in unlikely if index not in taken]
            ids += free[: width - len(ids)]
            values += [-np.inf] * (width - len(values))
        return ids, values

    def _most_outside(self, left_out: Sequence[float], least: float) -> float:
        """Log of the most that is outside the K ids: what was named, and V times the least named.

        least: no token that is not named is more probable.
        """
        mass = np.exp([*left_out, least + np.log(self._vocabulary.size)]).sum()
        return float(min(0.0, np.log(mass))) if mass > 0 else -np.inf
