"""An engine without a model: a small Markov chain that takes the teacher's place.

Where it sits: it is deployed and called like vLLM, in tests of faults and to measure the stream. A
prompt always has the same answer, in any group and on any replica. The signal is exact: the K ids
and the tail have probability 1 together. The next token's distribution depends on the last token
only, so that a student can learn it.

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

UNBOUNDED = 2**31 - 1  # The largest int32: no limit of length or vocabulary.
EXIT_POISONED = 71  # Exit status of a replica that was sent ``teacher.synthetic.poison_token``.
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


class SyntheticEngine:
    """Deterministic answers of ``response_tokens`` ids; a group takes ``delay_s`` seconds.

    After id a, the id of rank j = 0, 1, ... is (7 a + 3 + j) mod V, with probability
    p_j = (1-r) r^j / (1-r^V), where r in [0.3, 0.9) depends on a. An answer ends with the stop
    token, which then has rank 0, unless ``max_tokens`` cuts it first.
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
        """Does nothing: there is no model to load."""

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error."""
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
        """The signal of given responses. ``at`` is not supported: it raises ValueError."""
        if at is not None:
            raise ValueError("the synthetic engine gives the K best ids only; leave at=None")
        await self._take_time(prompt_ids)
        return [self._score(*pair, signal) for pair in zip(prompt_ids, response_ids, strict=True)]

    async def probe(self) -> None:
        """Does nothing: the engine is always healthy."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

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
        # ``sample`` gives a stop token rank 0 in the last position: the scores must be the same.
        if response[-1] in self._sampling.stop_token_ids:
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
        """Answers from their token ids, the ids of rank 0 and the decays, each [B, T]."""
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
        """Ids of rank 0, decays and sampled ranks, each [B, T]."""
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
        """Id of rank 0 and decay of the distributions that follow the ids ``last``."""
        decay = 0.3 + 0.6 * ((last * 2_654_435_761) % 2**32) / 2**32
        return (7 * last + 3) % self.vocab_size, decay

    def _rank_of(self, uniform: Float64Array, decay: Float64Array) -> Int64Array:
        """Rank at a uniform number: the inverse of the distribution (1 - r^(j+1)) / (1 - r^V)."""
        mass = uniform * -np.expm1(self.vocab_size * np.log(decay))
        rank = np.floor(np.log1p(-mass) / np.log(decay)).astype(np.int64)
        return np.clip(rank, 0, self.vocab_size - 1)

    def _logprobs(self, rank: Int64Array, decay: Float64Array) -> Float64Array:
        """log p_j of the ranks j, in nats."""
        normaliser = np.log1p(-(decay**self.vocab_size))
        return np.log1p(-decay) + rank * np.log(decay) - normaliser

    def _tail(self, decay: Float64Array, top_k: int) -> Float64Array:
        """Exact tail: log((r^K - r^V) / (1 - r^V)), in nats; -inf if K = V."""
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
    """Uniform numbers in [0, 1), [T], that depend on the prompt's ids alone."""
    digest = hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(num_tokens)
