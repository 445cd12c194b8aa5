"""Acceptance of greedily drafted tokens, counted along an answer, and the speed that follows.

In greedy speculative decoding a draft model proposes k tokens, and the teacher reads them in one
pass. It accepts the tokens that it would have written itself, up to the first that differs, and
adds one token of its own. This is a *verification*. Every accepted token is the answer's own, so
the draft was made with the answer so far as its context: which tokens a verification accepts is
known from one pass of the student over the finished answer, for every k (`walk`). The engine's own
counts are read by the same rules (`steps_of`), so that the two can be compared.

Legend: T tokens of an answer, k drafted tokens of a verification, c the cost ratio: the time of a
draft token divided by that of a teacher's token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_DRAFTED = 8
"""Largest k."""
COST_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Cost ratios for which the speed is worked out besides the measured one."""


class Verification(NamedTuple):
    """One verification: the position of its first drafted token in the answer, and how many of the
    drafted tokens were accepted.
    """

    start: int
    accepted: int


def walk(matches: Sequence[bool], k: int) -> list[Verification]:
    """The verifications of an answer, from where the student would have drafted its tokens.

    matches: [T], whether the student's most probable token is the answer's, the answer before it
    given. The first token comes from reading the prompt and is never drafted. Tokens beyond the
    answer's end are not known, so they count as not accepted: `count` leaves such a verification
    out.
    """
    verifications, start = [], 1
    while start < len(matches):
        accepted = 0
        while accepted < k and start + accepted < len(matches) and matches[start + accepted]:
            accepted += 1
        verifications.append(Verification(start, accepted))
        start += accepted + 1
    return verifications


def steps_of(accepted: Sequence[int], num_tokens: int) -> list[Verification] | None:
    """The verifications of an answer of ``num_tokens`` from what the engine says it accepted.

    None where they do not add up to the answer: the engine has verified the answer's last tokens
    also beyond its end, but no verification may begin there, and none may be missing.
    """
    verifications, start = [], 1
    for number in accepted:
        if start >= num_tokens:
            return None
        verifications.append(Verification(start, number))
        start += number + 1
    return verifications if start >= num_tokens else None


@dataclass(frozen=True)
class Acceptance:
    """What the teacher accepts of k drafted tokens, over all answers.

    Attributes:
        k: Drafted tokens of a verification.
        verifications: Number of them.
        windows: Those of which all k drafted tokens and the teacher's own lie within the answer.
            The rates are over these: the others would seem to accept less, or are not known.
        accepted: For i from 1 to k, the windows in which at least i tokens were accepted.
    """

    k: int
    verifications: int
    windows: int
    accepted: tuple[int, ...]

    @property
    def rates(self) -> list[float | None]:
        """The share of windows in which the drafted token at position 1, 2, ... k was accepted."""
        return [n / self.windows if self.windows else None for n in self.accepted]

    @property
    def mean_length(self) -> float | None:
        """Mean acceptance length: tokens of a verification, the teacher's own included."""
        return 1 + sum(self.accepted) / self.windows if self.windows else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return {
            "verifications": self.verifications,
            "windows": self.windows,
            "accepted_by_position": list(self.accepted),
            "acceptance_by_position": self.rates,
            "mean_acceptance_length": self.mean_length,
        }


def count(answers: Iterable[tuple[int, Sequence[Verification]]], k: int) -> Acceptance:
    """Count verifications; ``answers``: of each its number of tokens T and its verifications."""
    total, windows, accepted = 0, 0, [0] * k
    for num_tokens, verifications in answers:
        for start, number in verifications:
            total += 1
            if start + k >= num_tokens:
                continue
            windows += 1
            for position in range(number):
                accepted[position] += 1
    return Acceptance(k, total, windows, tuple(accepted))


def speed_up(mean_length: float, k: int, cost_ratio: float) -> float:
    """How many times as fast the teacher writes with the draft as without.

    A verification gives ``mean_length`` tokens and takes the time of k draft tokens and of one pass
    of the teacher, so it is mean_length / (1 + k c). With one acceptance rate a at all positions
    the mean length is (1 - a^(k + 1)) / (1 - a): theorem 3.8 of Leviathan et al. 2023,
    arXiv:2211.17192. The measured length needs no such assumption. What it assumes is that the
    teacher reads k + 1 tokens in the time of one, which holds where reading its weights is what
    takes the time: on a GPU, with few rows at once.
    """
    return mean_length / (1 + k * cost_ratio)


def best_k(lengths: dict[int, float], cost_ratio: float) -> tuple[int, float]:
    """The k with the largest speed-up, and that speed-up. (0, 1): no draft is faster.

    lengths: the mean acceptance length by k.
    """
    found = {k: speed_up(length, k, cost_ratio) for k, length in lengths.items()}
    best = max(found, key=lambda k: found[k], default=0)
    return (best, found[best]) if best and found[best] > 1 else (0, 1.0)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers differ, or at which one ends; None: they do not."""
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))
