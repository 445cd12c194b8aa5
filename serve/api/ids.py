"""A teacher behind a vLLM server that is asked by token ids: ids in, ids and their signal out.

Where it sits: in a Serve replica, in the place of the engine that runs the model itself, with the
same contract. Prompts go to ``/completions`` as ids, and ids come back, so no text is read and no
chat template is applied there. ``start`` refuses a server whose ids, vocabulary or logprobs are not
what the run takes them for (``probe.py``).

Legend: P prompt tokens, T response tokens, K ids named for each token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from raystill.base.errors import RunError
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import (
    Answer,
    Float32Array,
    Int32Array,
    tail_logprob,
    why_unanswerable,
    why_unscorable,
)
from raystill.datasets.rows.schema import FATAL
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.api.completions import TOKEN, IdsRequest, completion
from raystill.serve.api.probe import Expected, probe
from raystill.serve.api.service import Service, answers_of

ZERO = -9999.0
"""What the server writes for a log probability of minus infinity, which JSON lacks."""


class IdsEngine:
    """One server, asked for one completion a row."""

    name = "api"
    dtype = "unknown"

    def __init__(
        self,
        teacher: TeacherConfig,
        sampling: ResolvedSampling,
        tokenizer: Tokenizer,
        service: Service,
        expected: Expected,
    ) -> None:
        """expected: what the run takes the server for."""
        self.version = service.version
        self.service = service
        self.vocab_size = self.max_model_len = 0  # The server tells.
        self._api = teacher.api
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._expected = expected

    async def start(self) -> None:
        """Asks the server what it is. Raises RunError where it is not what the run expects."""
        self.service.start()
        found = await probe(self.service, self._api, self._tokenizer, self._expected)
        if isinstance(found, str):
            raise RunError(found.removeprefix(FATAL))
        self.vocab_size, self.max_model_len = found.vocab_size, found.max_model_len

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error."""
        _require_ids_signal(signal)
        return await answers_of(self._sampled(ids, signal) for ids in prompt_ids)

    async def score(
        self,
        prompt_ids: Sequence[Int32Array],
        response_ids: Sequence[Int32Array],
        signal: Signal,
        at: Sequence[Int32Array] | None = None,
    ) -> list[Answer]:
        """The signal of given responses, by prefill. The caller sets ``finish_reason``.

        ``at`` cannot be had: ValueError.
        """
        _require_ids_signal(signal)
        if at is not None:
            raise ValueError("a server names its own best ids, not ids of the caller's choice")
        pairs = zip(prompt_ids, response_ids, strict=True)
        return await answers_of(self._scored(p, r, signal) for p, r in pairs)

    async def probe(self) -> None:
        """Does nothing: the replica is healthy, whatever the server is."""

    def close(self) -> None:
        """Writes down what is spent; the client ends with the process."""
        self.service.close()

    async def _sampled(self, prompt_ids: Int32Array, signal: Signal) -> Answer:
        reason = why_unanswerable(prompt_ids, self.max_model_len, self.vocab_size)
        if reason is not None:
            return Answer(error=reason)
        sampling = self._sampling
        most = min(sampling.max_tokens, self.max_model_len - len(prompt_ids))
        request = IdsRequest(
            prompt_ids.tolist(),
            most,
            None if signal.kind == "text" else signal.width,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop_token_ids=list(sampling.stop_token_ids),
        )

        def read(choice: Mapping[str, Any]) -> Answer | str:
            ids = self._ids_of(choice["token_ids"])
            reason = self._why_not(choice, ids, most)
            if reason is not None:
                return reason
            answer = Answer(ids, choice["finish_reason"])
            if signal.kind == "text":
                return answer
            return with_signal(answer, sampled_pairs(choice["logprobs"]), signal, self.vocab_size)

        return await self._ask(request, read)

    def _ids_of(self, told: Any) -> Int32Array:
        """Ids of an answer. Raises ValueError for what is no list of ids of the vocabulary."""
        if not isinstance(told, list) or not all(
            type(one) is int and 0 <= one < self.vocab_size for one in told
        ):
            raise ValueError("token_ids are no ids of the vocabulary")
        return np.array(told, np.int32)

    def _why_not(self, choice: Mapping[str, Any], ids: Int32Array, most: int) -> str | None:
        """Why an answer cannot be used; None if it can. Stop ids and limits must be the run's."""
        finish = choice["finish_reason"]
        if finish not in ("stop", "length"):
            return "broken_answer"
        if not len(ids):
            return "empty_answer"
        if finish == "stop" and int(ids[-1]) not in self._sampling.stop_token_ids:
            return (
                f"{FATAL}{self._api.base_url} ended an answer at id {ids[-1]}, which is not among "
                f"teacher.sampling.stop_token_ids ({list(self._sampling.stop_token_ids)}); add it "
                "there, or start the server without stop ids of its own"
            )
        if finish == "length" and len(ids) < most:
            return (
                f"{FATAL}{self._api.base_url} cut an answer at {len(ids)} tokens, where {most} "
                "were asked for; set teacher.sampling.max_tokens to what the server allows"
            )
        return "broken_answer" if len(ids) > most else None

    async def _scored(
        self, prompt_ids: Int32Array, response_ids: Int32Array, signal: Signal
    ) -> Answer:
        reason = why_unscorable(prompt_ids, response_ids, self.max_model_len, self.vocab_size)
        if reason is not None:
            return Answer(error=reason)
        if signal.kind == "text":
            return Answer(response_ids)
        # The last token is not put in but forced, so that a response may fill the context.
        ids, last = np.concatenate([prompt_ids, response_ids[:-1]]), int(response_ids[-1])
        request = IdsRequest(
            ids.tolist(),
            1,
            signal.width,
            more={"prompt_logprobs": signal.width, "allowed_token_ids": [last]},
        )

        def read(choice: Mapping[str, Any]) -> Answer | str:
            if choice["token_ids"] != [last]:
                return "broken_answer"
            before = prompt_pairs(choice["prompt_logprobs"][len(prompt_ids) :])
            pairs = [*before, *sampled_pairs(choice["logprobs"])]
            return with_signal(Answer(response_ids), pairs, signal, self.vocab_size)

        return await self._ask(request, read)

    async def _ask(self, request: IdsRequest, read: Any) -> Answer:
        answer = await self.service.ask(completion(self._api, request, read))
        return Answer(error=answer) if isinstance(answer, str) else answer


Pair = tuple[NDArray[np.int64], Float32Array]
"""Ids and logprobs of one token: the drawn one and the K best, in any order, each id once."""


def sampled_pairs(logprobs: Mapping[str, Any]) -> list[Pair]:
    """Of each response token, from ``logprobs`` of a choice, whose ids are `TOKEN` and a number."""
    return [_pair([_id_of(name) for name in top], top.values()) for top in logprobs["top_logprobs"]]


def prompt_pairs(entries: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Of each prompt token, from some entries of ``prompt_logprobs`` of a choice."""
    return [
        _pair([int(name) for name in entry], [value["logprob"] for value in entry.values()])
        for entry in entries
    ]


def _pair(ids: Sequence[int], logprobs: Any) -> Pair:
    values = np.fromiter(logprobs, np.float32, len(ids))
    values[values <= ZERO] = -np.inf
    return np.array(ids, np.int64), values


def _id_of(name: str) -> int:
    if not name.startswith(TOKEN):
        raise ValueError(f"a token is {name!r}, expected {TOKEN}<id>")
    return int(name[len(TOKEN) :])


def with_signal(answer: Answer, pairs: Sequence[Pair], signal: Signal, vocab_size: int) -> Answer:
    """The answer with what the server says of its tokens.

    Raises ValueError where that is not of these tokens, or names fewer or more than K ids.
    """
    drawn, width = answer.response_ids, signal.width if signal.kind == "topk" else 0
    if len(pairs) != len(drawn):
        raise ValueError(f"logprobs of {len(pairs)} tokens for {len(drawn)}")
    sampled = np.empty(len(drawn), np.float32)
    ids = np.empty((len(drawn), width), np.int32)
    best = np.empty((len(drawn), width), np.float32)
    for t, (named, logprobs) in enumerate(pairs):
        mine = named == drawn[t]
        if mine.sum() != 1 or len(named) not in (width, width + 1):
            raise ValueError(f"token {t} has logprobs of {len(named)} ids, expected {width}")
        sampled[t] = logprobs[mine][0]
        if len(named) > width:  # The drawn one is not among the best.
            named, logprobs = named[~mine], logprobs[~mine]
        order = np.argsort(-logprobs, kind="stable")
        ids[t], best[t] = named[order], logprobs[order]
    if np.isnan(sampled).any() or np.isnan(best).any():
        raise ValueError("a log probability is not a number")
    if signal.kind != "topk":
        return Answer(drawn, answer.finish_reason, sampled)
    tail = tail_logprob(best, vocab_size)
    return Answer(drawn, answer.finish_reason, sampled, ids, best, tail)


def _require_ids_signal(signal: Signal) -> None:
    if signal.kind == "hidden":
        raise ValueError("a server gives no hidden states; set signal.kind: topk")
