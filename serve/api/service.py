"""One service as its engine asks it: the client, its limits, and patience with its failures.

Where it sits: between an engine of ``serve/api/`` and the service. Each request waits for its turn,
is tried again while its failure may pass, and is paid for once it is answered. *Waits for* the
service, as `limits.Limits` lets it.
"""

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar
from urllib.parse import urlsplit

from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.schema import FATAL
from raystill.serve.api import failures
from raystill.serve.api.failures import describe, judge, refuses_everybody
from raystill.serve.api.limits import BudgetReached, Limits, Usage
from raystill.serve.api.parsed import LEAST_BYTES, MOST_BYTES, OVERSIZED, bounded_client

logger = logging.getLogger(__name__)

MAX_TRANSIENT = 8
"""Attempts of one row at a service that fails by itself (5xx, cut connections, broken answers)."""
MAX_UNUSABLE = 3
"""Attempts of one row whose answer comes, and is paid for, without anything that can be used."""
CONNECTIONS_EACH = 16
"""Of one client, which looks at all its idle connections before each request."""
UNREADABLE = (AttributeError, TypeError, ValueError, IndexError, KeyError, OverflowError)
"""What an answer of an unexpected shape raises where it is read."""
MOST_TOKENS = 20_000_000
"""Of one request; above, ``usage`` is a mistake. The largest contexts have 10 million."""
UNUSABLE = ("empty_answer", "broken_answer")
"""Errors of an answer that another attempt may mend."""
SLOWEST_FILE = 64 * 1024
"""Bytes a second: a file that comes or goes more slowly is given up."""
TOKEN_BYTES, NAMED_BYTES = 1024, 512
"""Of a token of an answer as JSON, and of one that is named beside it: what no answer has in the
mean, so that all that may be used is read."""

R = TypeVar("R")


class Unanswered(Exception):
    """A call to the service that failed for good; its text is a row's error of FATAL."""


@dataclass(frozen=True)
class Request(Generic[R]):
    """One request: how it is sent, the most that it may take, and how its answer is read.

    send: asks a client, and returns what came. read: from that to a result, or a row's error; it
    may raise one of UNREADABLE. written: response tokens by our own count, where the service tells
    none; may raise one of UNREADABLE too, and then ``max_tokens`` are charged. free: no tokens are
    asked for. named: tokens named beside each one, of the prompt too.
    """

    send: Callable[[Any], Awaitable[Any]]
    read: Callable[[Any], R | str]
    written: Callable[[Any], int]
    prompt_tokens: int
    max_tokens: int
    free: bool = False
    named: int = 0

    @property
    def most_bytes(self) -> int:
        """Of the response's body: more is no answer to this."""
        named = (self.prompt_tokens + self.max_tokens) * self.named
        return LEAST_BYTES + TOKEN_BYTES * self.max_tokens + NAMED_BYTES * named


class Service:
    """The service of one teacher, in the one process that asks it."""

    def __init__(
        self, teacher: TeacherConfig, limits: Limits, close: Callable[[], None] = lambda: None
    ) -> None:
        """close: called at the end, when nothing more is paid."""
        import openai

        self.version = str(openai.__version__)
        self.limits = limits
        self._close = close
        self._api = teacher.api
        self._timeout_s = teacher.request_timeout_s
        self.client: Any = None
        self._clients: Iterator[Any] = iter(())
        """For requests, in turns: the one above among others where many go at once."""
        self._refused: str | None = None
        """Why the service answers nobody; rows that wait then do not ask it."""

    def start(self) -> None:
        """Makes the clients; the service is asked nothing yet."""
        import openai

        clients = [
            openai.AsyncOpenAI(
                base_url=self._api.base_url,
                api_key=os.environ.get(self._api.api_key_env or "", "") or "none",
                max_retries=0,  # A repeated request may be paid twice: each is counted here.
                timeout=self._timeout_s,
                http_client=bounded_client(),
            )
            for _ in range(math.ceil(self._api.max_concurrency / CONNECTIONS_EACH))
        ]
        if not is_openai(self._api.base_url):
            for client in clients:  # What the environment says is meant for OpenAI alone.
                client.organization = client.project = None
                client._custom_headers = {}
        self.client, self._clients = clients[0], itertools.cycle(clients)

    def close(self) -> None:
        """No more is asked; the clients end with the process."""
        self._close()

    async def call(
        self,
        send: Callable[[Any], Awaitable[R]],
        attempts: int = MAX_TRANSIENT,
        most_bytes: int = LEAST_BYTES,
        file_bytes: int = 0,
    ) -> R:
        """What comes of a call that costs nothing. Raises Unanswered; waiting is no attempt.

        most_bytes: of the response's body. file_bytes: of a file that goes with it, if any.
        """
        transient, last = 0, None
        MOST_BYTES.set(most_bytes)
        while transient < attempts:
            try:
                async with self.in_time(file_bytes):
                    return await send(self.client)
            except Exception as error:
                verdict = judge(error)
                if isinstance(verdict, str):
                    raise Unanswered(verdict) from None
                transient, last = transient + verdict.counts, error
                self.limits.failed(verdict.name, verdict.retry_after_s, verdict.too_fast)
                if verdict.name == OVERSIZED:
                    raise Unanswered(self.gave_up(transient, last)) from None
                waits = verdict.retry_after_s or failures.pause_s(max(1, transient))
                await asyncio.sleep(waits)
        raise Unanswered(self.gave_up(transient, last))

    async def receive(self, file: str, room: IO[bytes], most_bytes: int) -> None:
        """Appends one of the service's files to ``room``: there may be more than memory has.

        Raises Unanswered, also where the file has more than ``most_bytes``.
        """
        start = room.tell()

        async def receive(client: Any) -> None:
            room.seek(start)
            room.truncate()
            async with client.files.with_streaming_response.content(file) as content:
                async for part in content.iter_bytes():
                    room.write(part)

        await self.call(receive, most_bytes=most_bytes, file_bytes=most_bytes)

    def in_time(self, file_bytes: int = 0) -> asyncio.Timeout:
        """Ends a request that takes too long as a whole, with TimeoutError.

        The client's own limit is of each part of what comes in parts. file_bytes: of a file that
        goes with it, which may take its time.
        """
        limit_s = self._timeout_s
        return asyncio.timeout(limit_s and limit_s + file_bytes / SLOWEST_FILE)

    def gave_up(self, attempts: int, last: BaseException | None) -> str:
        """The error of a row whose service failed too often."""
        return (
            f"{FATAL}{self._api.base_url} failed {attempts} times for one row (last: "
            f"{describe(last)}); start the run again later: what is answered is kept"
        )

    async def ask(self, request: Request[R]) -> R | str:
        """What the service answers, or a row's error; those of FATAL end the run."""
        transient = unusable = 0
        result: R | str = ""
        last: BaseException | None = None
        while transient < MAX_TRANSIENT and unusable < MAX_UNUSABLE:
            try:
                turn_of = self.limits.turn(request.prompt_tokens, request.max_tokens)
                async with turn_of as turn:
                    if self._refused is not None:
                        return self._refused
                    async with self.in_time():
                        MOST_BYTES.set(request.most_bytes)
                        completion = await request.send(next(self._clients))
                    if not request.free:
                        turn.paid(self.charged(request, completion))
            except BudgetReached as error:
                return f"{FATAL}{error}"
            except Exception as error:
                verdict = judge(error)
                if isinstance(verdict, str):
                    if refuses_everybody(error):
                        self._refused = verdict
                    return verdict
                transient, last = transient + verdict.counts, error
                self.limits.failed(verdict.name, verdict.retry_after_s, verdict.too_fast)
                if verdict.lost and not request.free:
                    self.limits.lost(request.prompt_tokens, request.max_tokens)
                if not verdict.too_fast:
                    await asyncio.sleep(failures.pause_s(transient))
                if verdict.name == OVERSIZED:  # It is answered, and paid for.
                    result, unusable = verdict.name, unusable + 1
                continue
            result = understood(request, completion)
            if not isinstance(result, str):
                return result
            if not result.startswith(FATAL):
                self.limits.count(result)
            if result not in UNUSABLE:
                return result
            unusable += 1
        if unusable:
            return str(result)
        return self.gave_up(transient, last)

    def charged(self, request: Request[R], completion: Any) -> Usage:
        """What is charged; our own count where the service tells none that can be true.

        Without it a service that leaves ``usage`` out would be free, and ``max_cost`` no limit.
        """
        usage = usage_of(completion)
        if usage is not None and usage.output:
            return usage
        try:
            written = request.written(completion)
        except UNREADABLE:
            written = request.max_tokens if usage is None else 0
        if usage is not None and not written:
            return usage
        self.limits.count("usage_estimated")
        return Usage(input=request.prompt_tokens, output=written)


async def posted(client: Any, path: str, body: Mapping[str, Any]) -> bytes:
    """What the service answers to a JSON, as it came."""
    import openai

    answer = await client.post(path, cast_to=openai.HttpxBinaryResponseContent, body=body)
    content: bytes = answer.content
    return content


def understood(request: Request[R], completion: Any) -> R | str:
    """The result in a completion, or why there is none that can be used."""
    try:
        return request.read(completion)
    except UNREADABLE:  # Of another shape, or a text that is none: a lone surrogate.
        return "broken_answer"


def is_openai(base_url: str | None) -> bool:
    """Whether a service is OpenAI's own."""
    host = urlsplit(base_url or "").hostname or ""
    return host == "openai.com" or host.endswith(".openai.com")


async def answers_of(rows: Iterable[Awaitable[Answer]]) -> list[Answer]:
    """The answers of a group. A row that fails as none should ends the run, but not before what
    the others paid for is stored.
    """
    found = await asyncio.gather(*rows, return_exceptions=True)
    return [one if isinstance(one, Answer) else _as_error(one) for one in found]


def _as_error(error: BaseException) -> Answer:
    if not isinstance(error, Exception):
        raise error
    logger.error("a row failed unexpectedly", exc_info=error)
    return Answer(error=f"{FATAL}a row failed unexpectedly: {describe(error)}; please report it")


def usage_of(completion: Any) -> Usage | None:
    """Tokens that a completion is charged for; None where the service does not say.

    completion: the client's object, or plain JSON. A prompt of no tokens, a negative number, more
    tokens than any model has room for, or a sum above the total says nothing; nor do more cached
    tokens than were read, or more of reasoning than were written. A total above the sum
    is what is charged: some services count reasoning there alone.
    """
    usage = _of(completion, "usage")
    told = (_of(usage, n) for n in ("prompt_tokens", "completion_tokens"))
    asked, answered = (n if type(n) is int and n >= 0 else None for n in told)
    if not asked or answered is None:
        return None
    total = _of(usage, "total_tokens")
    total = asked + answered if total is None else total
    if type(total) is not int or not asked + answered <= total <= MOST_TOKENS:
        return None

    def number(owner: Any, name: str, most: int) -> int:
        value = _of(owner, name)
        return value if type(value) is int and 0 < value <= most else 0

    written = total - asked
    return Usage(
        input=asked,
        cached=number(_of(usage, "prompt_tokens_details"), "cached_tokens", asked),
        output=written,
        reasoning=number(_of(usage, "completion_tokens_details"), "reasoning_tokens", written),
    )


def _of(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
