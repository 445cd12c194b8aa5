"""What a service tells of one token, worked out one name at a time: the obvious slow way.

`raystill.serve.api.told` does the same for all tokens of an answer at once.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raystill.serve.api.vocabulary import Vocabulary

ZERO = -9999.0


def name_of(entry: Mapping[str, Any]) -> bytes:
    raw = entry.get("bytes")
    return bytes(raw) if raw is not None else str(entry["token"]).encode()


def number_of(entry: Mapping[str, Any]) -> float:
    return -math.inf if entry["logprob"] <= ZERO else min(float(entry["logprob"]), 0.0)


def distribution(
    vocabulary: Vocabulary, drawn_id: int, entry: Mapping[str, Any], inside: bool
) -> tuple[dict[int, float], list[float], float]:
    """Log probabilities by id, those of named tokens that are no id, and the least named one.

    inside: the tokens before have begun a character.
    """
    drawn = name_of(entry), number_of(entry)
    named = [(name_of(other), number_of(other)) for other in entry.get("top_logprobs") or ()]
    others = list(named)
    if drawn in others:
        others.remove(drawn)
    times = Counter(name for name, _ in others)
    found, lost = {drawn_id: drawn[1]}, []
    for name, logprob in others:
        index = vocabulary.id_of(name)
        unclear = times[name] > 1 or (inside and name >= b"\xc0")
        if index is None or unclear or index in found:
            lost.append(logprob)
        else:
            found[index] = logprob
    least = min([logprob for name, logprob in named if (name, logprob) != drawn] or [drawn[1]])
    return found, lost, least


def best_and_tail(
    vocabulary: Vocabulary, found: Mapping[int, float], lost: Sequence[float], least: float, k: int
) -> tuple[dict[int, float], float]:
    """The k best ids with their probabilities, and the probability of all others.

    The tail is what is left of 1, and at most what was named outside and V times the least named.
    """
    order = sorted(found, key=lambda index: -found[index])
    best = {index: math.exp(found[index]) for index in order[:k]}
    outside = [*(found[index] for index in order[k:]), *lost]
    most = sum(map(math.exp, outside)) + math.exp(least) * vocabulary.size
    return best, max(0.0, min(1.0 - sum(best.values()), most, 1.0))
