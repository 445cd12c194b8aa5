"""The engine without a model: a small Markov chain that answers like a teacher, at once.

Where it sits: behind the same deployment and contract as vLLM, for fault tests and for measuring
the stream. The same prompt always has the same answer, in any group and on any replica, and the
signal is exact: K ids and the tail hold mass 1. The next token's distribution depends on the last
token only, so a student can learn it.

Legend: B rows of a group, T response tokens, K ids kept, V vocabulary, r decay of a distribution.
"""

import asyncio
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raystill.config.teacher import SyntheticConfig
from raystill.datasets.rows.answers import Answer, Int32Array, why_unanswerable, why_unscorable
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling

UNBOUNDED = 2**31 - 1
EXIT_POISONED = 71
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


class SyntheticEngine:
    """Deterministic answers of ``response_tokens`` ids, each group after ``delay_s``.

    After id a, the id of rank j = 0, 1, ... is (7 a + 3 + j) mod V with p_j = (1-r) r^j / (1-r^V),
    where r in [0.3, 0.9) depends on a. The last token of an answer is its stop token (rank 0 of a
    state of its own), unless ``max_tokens`` cuts the answer first.
    """

    name = "synthetic"
    version = "1"
    dtype = "float64"

    def __init__(
        self,
        config: SyntheticConfig,
        sampling: ResolvedSampling,
        max_model_len: int | None = None,
    ) -> None:
        self._config = config
        self._sampling = sampling
        self.vocab_size = config.vocab_size
        self.max_model_len = max_model_len or UNBOUNDED

    async def start(self) -> None:
        """Nothing to load."""

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group; see ``Answer`` for shapes."""
        await self._take_time(prompt_ids)
        reasons = [why_unanswerable(p, self.max_model_len, UNBOUNDED) for p in prompt_ids]
        usable = [p for p, reason in zip(prompt_ids, reasons, strict=True) if reason is None]
        answered = iter(self._answer(usable, signal) if usable else [])
        return [Answer(error=r) if r is not None else next(answered) for r in reasons]

    async def score(
        self,
        prompt_ids: Sequence[Int32Array],
        response_ids: Sequence[Int32Array],
        signal: Signal,
        at: Sequence[Int32Array] | None = None,
    ) -> list[Answer]:
        """The signal of given responses, as if they had been drawn. ValueError with ``at``."""
        if at is not None:
            raise ValueError("the synthetic engine names the K best ids only")
        await self._take_time(prompt_ids)
        return [self._score(*pair, signal) for pair in zip(prompt_ids, response_ids, strict=True)]

    async def probe(self) -> None:
        """Always in health."""

    def close(self) -> None:
        """Nothing to free."""

    async def _take_time(self, prompt_ids: Sequence[Int32Array]) -> None:
        poison = self._config.poison_token
        if poison is not None and any(poison in prompt for prompt in prompt_ids):
            os._exit(EXIT_POISONED)
        if self._config.delay_s:
            await asyncio.sleep(self._config.delay_s)

    def _score(self, prompt: Int32Array, response: Int32Array, signal: Signal) -> Answer:
        reason = why_unscorable(prompt, response, self.max_model_len, UNBOUNDED)
        if reason is not None:
            return Answer(error=reason)
        ids = np.asarray(response, np.int64)[None]
        last = np.concatenate([prompt[-1:], response[:-1]]).astype(np.int64)[None]
        first, decay = self._state_after(last)
        if response[-1] in self._sampling.stop_token_ids:  # As it ends an answer of its own.
            first[:, -1] = ids[:, -1]
        return self._signal(ids, first, decay, "stop", signal)[0]

    def _answer(self, prompts: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        num_tokens = min(self._config.response_tokens, self._sampling.max_tokens)
        stopped = num_tokens == self._config.response_tokens
        first, decay, ranks = self._draw(prompts, num_tokens, stopped)
        ids = (first + ranks) % self.vocab_size
        return self._signal(ids, first, decay, "stop" if stopped else "length", signal)

    def _signal(
        self,
        ids: Int64Array,
        first: Int64Array,
        decay: Float64Array,
        finish: str,
        signal: Signal,
    ) -> list[Answer]:
        """Answers from their tokens, rank-0 ids and decays, each [B, T]."""
        values = {}
        if signal.kind == "topk":
            rank = np.arange(signal.width)
            values["topk_ids"] = (first[..., None] + rank) % self.vocab_size  # [B, T, K]
            values["topk_logprobs"] = self._logprobs(rank, decay[..., None])
            values["tail_logprob"] = self._tail(decay, signal.width)
        if signal.kind != "text":
            values["sampled_logprobs"] = self._logprobs((ids - first) % self.vocab_size, decay)
        arrays = {
            name: array.astype(np.int32 if name == "topk_ids" else np.float32)
            for name, array in values.items()
        }
        return [
            Answer(row.astype(np.int32), finish, **{n: v[b] for n, v in arrays.items()})
            for b, row in enumerate(ids)
        ]

    def _draw(
        self, prompts: Sequence[Int32Array], num_tokens: int, stopped: bool
    ) -> tuple[Int64Array, Float64Array, Int64Array]:
        """Rank-0 ids, decays and drawn ranks, each [B, T]."""
        shape = (len(prompts), num_tokens)
        uniforms = np.stack([_uniforms(p, num_tokens) for p in prompts])
        first, ranks = np.empty(shape, np.int64), np.empty(shape, np.int64)
        decay = np.empty(shape)
        last = np.array([int(p[-1]) for p in prompts], np.int64)
        for t in range(num_tokens):
            first[:, t], decay[:, t] = self._state_after(last)
            ranks[:, t] = self._rank_of(uniforms[:, t], decay[:, t])
            if stopped and t == num_tokens - 1:
                first[:, t], ranks[:, t] = self._sampling.stop_token_ids[0], 0
            last = (first[:, t] + ranks[:, t]) % self.vocab_size
        return first, decay, ranks

    def _state_after(self, last: Int64Array) -> tuple[Int64Array, Float64Array]:
        """Rank-0 ids and decays of what follows the ids ``last``."""
        decay = 0.3 + 0.6 * ((last * 2_654_435_761) % 2**32) / 2**32
        return (7 * last + 3) % self.vocab_size, decay

    def _rank_of(self, uniform: Float64Array, decay: Float64Array) -> Int64Array:
        """Inverse of the cumulative distribution 1 - r^(j+1), over 1 - r^V."""
        mass = uniform * -np.expm1(self.vocab_size * np.log(decay))
        rank = np.floor(np.log1p(-mass) / np.log(decay)).astype(np.int64)
        return np.clip(rank, 0, self.vocab_size - 1)

    def _logprobs(self, rank: Int64Array, decay: Float64Array) -> Float64Array:
        whole = np.log1p(-(decay**self.vocab_size))
        return np.log1p(-decay) + rank * np.log(decay) - whole

    def _tail(self, decay: Float64Array, top_k: int) -> Float64Array:
        """log((r^K - r^V) / (1 - r^V)), exact; -inf for K = V."""
        if top_k > self.vocab_size:
            raise ValueError(
                f"K ({top_k}) is more than the vocabulary ({self.vocab_size}); lower signal.top_k"
            )
        if top_k == self.vocab_size:
            return np.full_like(decay, -np.inf)
        rest = self.vocab_size - top_k
        log_decay = np.log(decay)
        outside = top_k * log_decay + np.log1p(-np.exp(rest * log_decay))
        return outside - np.log1p(-np.exp(self.vocab_size * log_decay))


def _uniforms(prompt_ids: Int32Array, num_tokens: int) -> Float64Array:
    """Uniform draws in [0, 1) that depend on the prompt's ids alone, [T]."""
    digest = hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(num_tokens)
