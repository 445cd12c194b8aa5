"""Is a vLLM server what the run takes it for? Asked once, with a few tokens, before any row.

Ids mean the same tokens there and here; the vocabulary's size is known, which the tail of a signal
needs; the context is as long as the run's keys say; so many logprobs are allowed; and they are
those of the model's own distribution, not of what sampling makes of it.

Each check gives None or what is wrong, a sentence with its remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from raystill.config.base import ApiConfig
from raystill.datasets.rows.schema import FATAL
from raystill.serve.api.completions import IdsRequest, completion
from raystill.serve.api.service import UNUSABLE, Request, Service

TEXTS = (
    "The quick brown fox: 12,345.67 (x > y) naïve café — “so”.\n\n\tdef f(x):\n    return x**2\n",
    "Привет, мир! 你好，世界。 こんにちは 🙂 العربية हिन्दी",
)
SPREAD_IDS = 192
"""Ids, evenly over the vocabulary, from whose text one more probe is made."""
LONGEST_PROBE = 512
APART_NATS = 0.5
"""More than kernels of two precisions differ by, less than a temperature changes."""
LARGEST_VOCABULARY = 2**24


@dataclass(frozen=True)
class Expected:
    """What the run takes a server for.

    model: whose tokenizer is used. vocab_size, context: as its configuration says, tokens; None: it
    does not. logprobs: most ids that will be asked for a token; None: no logprobs.
    """

    model: str
    vocab_size: int | None
    context: int | None
    logprobs: int | None


@dataclass(frozen=True)
class Found:
    """What a server told: ids that its output head has, and the longest prompt with its answer,
    which are no longer than the run allows.
    """

    vocab_size: int
    max_model_len: int


async def probe(
    service: Service, api: ApiConfig, tokenizer: Tokenizer, expected: Expected
) -> Found | str:
    """What the server is, or why it cannot be asked by ids."""
    server = _Server(service, api)
    context = await server.context()
    if isinstance(context, str):
        return context
    if expected.context is not None and context is not None and context < expected.context:
        return (
            f"{api.base_url} takes {context} tokens of prompt and answer, but the run allows "
            f"{expected.context}; set teacher.max_model_len: {context}, or start the server with "
            "more"
        )
    longest = min(LONGEST_PROBE, (context or expected.context or LONGEST_PROBE) - 1)
    for text in texts(tokenizer, longest):
        if problem := await server.other_ids(text, tokenizer, expected.model):
            return problem
    size = await server.vocab_size(tokenizer.get_vocab_size(with_added_tokens=True), expected)
    if isinstance(size, str):
        return size
    if expected.logprobs is not None:
        ids = tokenizer.encode(TEXTS[0], add_special_tokens=False).ids[:longest]
        problem = (
            await server.too_few(ids, expected.logprobs)
            or await server.not_raw(ids, expected.logprobs)
            or await server.not_scored(ids)
        )
        if problem:
            return problem
    limits = (context, expected.context)
    return Found(size, min((limit for limit in limits if limit is not None), default=2**31 - 1))


def texts(tokenizer: Tokenizer, longest: int) -> list[str]:
    """Texts of many kinds, of at most ``longest`` tokens each, to be tokenised by both sides."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    spread = np.linspace(0, size - 1, min(SPREAD_IDS, size)).astype(int).tolist()
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    wanted = [*TEXTS, "a" + "b".join(special[:16]), tokenizer.decode(spread)]
    return [_cut(text, tokenizer, longest) for text in wanted]


def _cut(text: str, tokenizer: Tokenizer, longest: int) -> str:
    while len(tokenizer.encode(text, add_special_tokens=False).ids) > longest:
        text = text[: len(text) // 2]
    return text


class _Server:
    """The probes of one server. A result that is a text is what is wrong."""

    def __init__(self, service: Service, api: ApiConfig) -> None:
        self._service = service
        self._api = api

    async def context(self) -> int | str | None:
        """Most tokens of prompt and answer; None where the server does not say."""

        def read(answer: Any) -> tuple[list[str], int | None]:
            models = {each["id"]: each.get("max_model_len") for each in answer["data"]}
            told = models.get(self._api.model)
            return list(models), told if isinstance(told, int) and told > 0 else None

        request: Request[tuple[list[str], int | None]] = Request(
            send=lambda client: client.get("/models", cast_to=object),
            read=read,
            written=lambda answer: 0,
            prompt_tokens=0,
            max_tokens=0,
            free=True,
        )
        told = await self._service.ask(request)
        if isinstance(told, str):
            return self._why(told)
        names, longest = told
        if self._api.model not in names:
            return (
                f"teacher.api.model is {self._api.model!r}, but {self._api.base_url} serves "
                f"{', '.join(sorted(names)[:8]) or 'nothing'}; name one of them"
            )
        return longest

    async def other_ids(self, text: str, tokenizer: Tokenizer, model: str) -> str | None:
        """Has the text other ids there?"""
        own = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = await self._ask(IdsRequest(text), lambda choice: list(choice["prompt_token_ids"]))
        if isinstance(theirs, str):
            return theirs
        if theirs == own:
            return None
        both = zip([*own, None], [*theirs, None], strict=False)
        place = next((i for i, (a, b) in enumerate(both) if a != b), 0)
        return (
            f"{self._api.base_url} has another tokenizer than {model}: {text[:40]!r} is "
            f"{theirs[place : place + 4]} there and {own[place : place + 4]} here from its "
            f"token {place} on; name the server's own tokenizer in teacher.model, or set "
            "teacher.api.ids: false and signal.kind: text"
        )

    async def vocab_size(self, named: int, expected: Expected) -> int | str:
        """Ids that the output head has: the least one that cannot be forced."""
        for size in dict.fromkeys([expected.vocab_size or named, named]):
            if await self._can_force(size - 1) and not await self._can_force(size):
                return size
        if (why := await self._not_forced(named - 1)) is not None:
            return (
                f"{self._api.base_url} does not take id {named - 1}, the last that the tokenizer "
                f"of {expected.model} names, in allowed_token_ids ({why}); name the server's own "
                "tokenizer in teacher.model"
            )
        low, high = named, named * 2  # low ids are there; high is not.
        while await self._can_force(high - 1):
            low, high = high, high * 2
            if high > LARGEST_VOCABULARY:
                return (
                    f"{self._api.base_url} takes any id in allowed_token_ids, so it does not force "
                    "them; teacher.api.ids needs a vLLM server"
                )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await self._can_force(middle - 1) else (low, middle)
        return low

    async def _can_force(self, token: int) -> bool:
        return await self._not_forced(token) is None

    async def _not_forced(self, token: int) -> str | None:
        """What became of an answer that may have this token alone, where that is not what it is."""
        request = IdsRequest([0], more={"allowed_token_ids": [token]})
        told = await self._ask(request, lambda choice: list(choice["token_ids"]))
        if isinstance(told, str):
            return told
        return None if told == [token] else f"it answered {told[:4]}"

    async def too_few(self, ids: list[int], logprobs: int) -> str | None:
        """Are fewer logprobs allowed than the run asks for?"""
        told = await self._best(IdsRequest(ids, logprobs=logprobs))
        if not isinstance(told, str):
            return None
        return (
            f"{self._api.base_url} does not give the logprobs of {logprobs} ids a token ({told}); "
            f"start it with --max-logprobs {logprobs}, or lower signal.top_k and evaluation.top_k"
        )

    async def not_raw(self, ids: list[int], logprobs: int) -> str | None:
        """Do the logprobs depend on how tokens are sampled?"""
        width = max(2, logprobs)
        told = [
            await self._best(IdsRequest(ids, logprobs=width, temperature=temperature))
            for temperature in (0.5, 2.0)
        ]
        for each in told:
            if isinstance(each, str):
                return each
        cold, warm = (np.sort(np.array(each))[::-1][:width] for each in told)
        apart = float(np.abs(cold - warm).max())
        total = float(np.exp(cold).sum())
        if apart <= APART_NATS and total <= 1.01 and cold.max() <= 0.01:
            return None
        return (
            f"{self._api.base_url} does not tell the model's own log probabilities (they change "
            f"by {apart:.2f} nats with the temperature, and {width} of them sum to {total:.3f}); "
            "start it with --logprobs-mode raw_logprobs"
        )

    async def not_scored(self, ids: list[int]) -> str | None:
        """Is the last of these ids scored otherwise where it is read than where it is forced?"""
        forced = IdsRequest(ids[:-1], logprobs=0, more={"allowed_token_ids": [ids[-1]]})
        read = IdsRequest(ids, more={"prompt_logprobs": 0})
        told = [
            await self._ask(forced, lambda choice: float(choice["logprobs"]["token_logprobs"][0])),
            await self._ask(read, lambda choice: _of_last(choice, ids[-1])),
        ]
        for each in told:
            if isinstance(each, str):
                return each
        apart = abs(float(told[0]) - float(told[1]))
        if apart <= APART_NATS:
            return None
        return (
            f"{self._api.base_url} scores a token {apart:.2f} nats apart where it is read and "
            "where it is written; start it with --logprobs-mode raw_logprobs"
        )

    async def _best(self, request: IdsRequest) -> list[float] | str:
        return await self._ask(
            request, lambda choice: list(choice["logprobs"]["top_logprobs"][0].values())
        )

    async def _ask(self, request: IdsRequest, read: Any) -> Any:
        answer = await self._service.ask(completion(self._api, request, read))
        return self._why(answer) if isinstance(answer, str) else answer

    def _why(self, error: str) -> str:
        if error in UNUSABLE:
            return (
                f"{self._api.base_url} does not answer by token ids (fields that vLLM returns are "
                "missing); teacher.api.ids needs a vLLM server, else set it to false"
            )
        return error.removeprefix(FATAL)


def _of_last(choice: Mapping[str, Any], token: int) -> float:
    return float(choice["prompt_logprobs"][-1][str(token)]["logprob"])
