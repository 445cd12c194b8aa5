"""What no student should lose to: uniform, unigram and bigram models of the training answers.

Pairs (token before, response token) of the trained rows are counted (`pairs.count_pairs`). On the
held-out rows the three models are measured on the same partition of K ids and a tail as the
student.

    uniform   q(v) = 1 / V
    unigram   q(v) = (c(v) + 1) / (N + V)                       add-one
    bigram    q(v | u) = (c(u, v) + d(u) unigram(v)) / (c(u) + d(u))    Witten-Bell

with c counts over response tokens, N their number, d(u) the number of different tokens seen after
u. A context never seen (d = 0) falls back to the unigram. Only numpy; float64.

Legend: N tokens, K ids kept for each, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MERGE_PAIRS = 1_000_000


class PairCounts:
    """Counts of (token before, response token) pairs, as sorted codes ``before * V + token``."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._codes = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, answers: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count the response tokens of answers, each a prompt [P] and a response [T], token ids.

        A first token without a prompt has no pair.
        """
        for prompt_ids, response_ids in answers:
            ids = np.concatenate([prompt_ids[-1:], response_ids]).astype(np.int64)
            codes = ids[:-1] * self.vocab_size + ids[1:]
            self._pending.append(codes)
            self._num_pending += len(codes)
        if self._num_pending > MERGE_PAIRS:
            self._settle()

    def arrays(self) -> dict[str, np.ndarray]:
        """``pair_codes`` (ascending, distinct) and ``pair_counts``, both int64."""
        self._settle()
        return {"pair_codes": self._codes, "pair_counts": self._counts}

    def _settle(self) -> None:
        if not self._pending:
            return
        new, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._num_pending = [], 0
        codes = np.concatenate([self._codes, new])
        self._codes, where = np.unique(codes, return_inverse=True)
        counts = np.concatenate([self._counts, counts])
        self._counts = np.zeros(len(self._codes), dtype=np.int64)
        np.add.at(self._counts, where, counts)


@dataclass(frozen=True)
class HeldOutTokens:
    """Held-out tokens: before [N], ids [N, K] (below 0: no id), log_p [N, K + 1], tail last."""

    before: np.ndarray
    ids: np.ndarray
    log_p: np.ndarray


class CountModels:
    """The unigram and bigram probabilities that follow from pair counts."""

    def __init__(self, vocab_size: int, pair_codes: np.ndarray, pair_counts: np.ndarray) -> None:
        self.vocab_size = vocab_size
        self.codes, self.counts = pair_codes, pair_counts
        before, token = np.divmod(pair_codes, vocab_size)
        self.token_counts = np.bincount(token, weights=pair_counts, minlength=vocab_size)
        self.before_counts = np.bincount(before, weights=pair_counts, minlength=vocab_size)
        self.distinct = np.bincount(before, minlength=vocab_size).astype(np.float64)
        self.unigram = (self.token_counts + 1) / (self.token_counts.sum() + vocab_size)
        self._starts = np.searchsorted(before, np.arange(vocab_size + 1))
        self._tokens = token

    def bigram(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """q(id | before), [N, K], for before [N] and ids [N, K] (all below V)."""
        codes = before[:, None] * self.vocab_size + ids
        if len(self.codes):
            at = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
            seen = np.where(self.codes[at] == codes, self.counts[at], 0).astype(np.float64)
        else:
            seen = np.zeros(codes.shape)
        distinct = self.distinct[before][:, None]
        total = self.before_counts[before][:, None] + distinct
        mixed = (seen + distinct * self.unigram[ids]) / np.maximum(total, 1.0)
        return np.where(total > 0, mixed, self.unigram[ids])

    def bigram_best(self, before: np.ndarray) -> np.ndarray:
        """The likeliest token after each of ``before`` [N].

        Among tokens never seen after u the unigram's best is best, so only the seen ones and
        that one are compared.
        """
        overall = int(self.unigram.argmax())
        best = {}
        for token in np.unique(before):
            seen = self._tokens[self._starts[token] : self._starts[token + 1]]
            candidates = np.append(seen, overall)
            q = self.bigram(np.array([token]), candidates[None])[0]
            best[token] = candidates[q.argmax()]
        return np.array([best[token] for token in before], dtype=np.int64)


def partition_kl(q_ids: np.ndarray, tokens: HeldOutTokens) -> float:
    """Mean over tokens of KL(teacher || q) on the partition, nats; q_ids [N, K] of ``ids``."""
    used = tokens.ids >= 0
    q_ids = np.where(used, q_ids, 0.0)
    q_tail = np.maximum(1.0 - q_ids.sum(axis=1), 0.0)
    q = np.concatenate([q_ids, q_tail[:, None]], axis=1)
    log_p = tokens.log_p.astype(np.float64)
    p = np.exp(log_p)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - np.log(q)), 0.0)
    return float(terms.sum(axis=1).mean())


def measure_baselines(
    parts: Sequence[HeldOutTokens], counts: PairCounts
) -> dict[str, dict[str, float]]:
    """``{uniform, unigram, bigram: {kl_nats_per_token, top1_agreement}}`` over all tokens.

    The uniform model has no best token: its agreement is what a blind guess expects, 1 / V.
    """
    vocab = counts.vocab_size
    models = CountModels(vocab, **counts.arrays())
    sums = {name: np.zeros(2) for name in ("uniform", "unigram", "bigram")}
    num_tokens = sum(len(part.before) for part in parts)
    for part in parts:
        ids = np.maximum(part.ids, 0)
        best = part.log_p[:, :-1].argmax(axis=1)
        teacher_best = np.take_along_axis(part.ids, best[:, None], axis=1)[:, 0]
        size = len(part.before)
        sums["uniform"] += [size * partition_kl(np.full(ids.shape, 1 / vocab), part), size / vocab]
        agreed = (models.unigram.argmax() == teacher_best).sum()
        sums["unigram"] += [size * partition_kl(models.unigram[ids], part), agreed]
        agreed = (models.bigram_best(part.before) == teacher_best).sum()
        sums["bigram"] += [size * partition_kl(models.bigram(part.before, ids), part), agreed]
    return {
        name: {"kl_nats_per_token": kl / num_tokens, "top1_agreement": top1 / num_tokens}
        for name, (kl, top1) in sums.items()
    }
