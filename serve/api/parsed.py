"""The body of a service's answer: how much of it is read, its JSON, and how the answer ended.

No service decides how much memory its answers take. A body is read to a bound, which belongs to
what was asked: `LEAST_BYTES`, and above that what so many tokens can take. It is counted as it
arrives, and again unpacked, since a compressed body of one megabyte may be one gigabyte of zeros.

Of the JSON small parts become plain values, and what is told of its tokens is typed. An answer with
20 named tokens beside each of its own is 130 KB for 64 tokens. msgspec reads that shape in a third
of the time that the standard library takes. What is of another shape, and text that is no Unicode
(a lone surrogate), is read by the standard library: such an answer is paid for too. *Consumes* what
arrives of a response.
"""

import json
import logging
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypedDict

import httpx2
import msgspec

from raystill.base.redact import shown_value
from raystill.serve.api.failures import Unread

logger = logging.getLogger(__name__)

LEAST_BYTES = 16 << 20
"""What is read of any response: services write too much at times, and their answers can be cut."""
MOST_BYTES = ContextVar("MOST_BYTES", default=LEAST_BYTES)
"""The bound of the request that is under way."""
OVERSIZED = "oversized_answer"
PIECE_BYTES = 1 << 20
"""Unpacked at a time."""
ENDED = ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence")
"""Words of services for an answer that the model has ended."""
CUT_OFF = ("length", "max_tokens", "MAX_TOKENS")
"""Their words for one that was cut off."""


def bounded_client() -> Any:
    """An HTTP client for `openai.AsyncOpenAI`; the responses that it reads are bounded.

    Its proxies and certificates are those of the environment, as with the client's own.
    """
    import openai

    return openai.DefaultAsyncHttpxClient(
        headers={"Accept-Encoding": "gzip"}, event_hooks={"response": [_bound]}
    )


async def _bound(response: httpx2.Response) -> None:
    """Before any of the body is read. What is unpacked here must not be unpacked again there."""
    told = response.headers.get("Content-Encoding", "")
    packed = [
        one for one in told.lower().replace(" ", "").split(",") if one not in ("", "identity")
    ]
    if packed not in ([], ["gzip"], ["x-gzip"]):
        raise Unread("broken_answer", f"the answer is encoded as {told[:40]!r}, not asked for")
    if packed:
        del response.headers["Content-Encoding"]
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, MOST_BYTES.get(), bool(packed))


class _Bounded(httpx2.AsyncByteStream):
    """A body, unpacked, of which no more than ``most`` bytes are read. Raises Unread."""

    def __init__(self, body: httpx2.AsyncByteStream, most: int, packed: bool) -> None:
        self._body = body
        self._most = most
        self._unpack = _Unzipped() if packed else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        arrived = unpacked = 0
        async for part in self._body:
            arrived += len(part)
            for piece in [part] if self._unpack is None else self._unpack(part):
                unpacked += len(piece)
                self._require(unpacked)
                yield piece
            self._require(arrived)
        if self._unpack is not None and arrived:
            self._unpack.require_end()

    def _require(self, number: int) -> None:
        if number > self._most:
            raise Unread(OVERSIZED, f"an answer has more than {self._most:,} bytes")

    async def aclose(self) -> None:
        await self._body.aclose()


class _Unzipped:
    """Gzip's members, one after another, in pieces of a bounded size. Raises Unread."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def __call__(self, part: bytes) -> Iterator[bytes]:
        while part:
            if self._member.eof:
                self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
            try:
                piece = self._member.decompress(part, PIECE_BYTES)
            except zlib.error as error:
                raise Unread("broken_answer", f"the answer is no gzip: {error}") from None
            part = self._member.unconsumed_tail or self._member.unused_data
            yield piece

    def require_end(self) -> None:
        """That all of the last member has come."""
        if not self._member.eof:
            raise Unread("broken_answer", "the answer's gzip has no end")


class Entry(msgspec.Struct, gc=False):
    """A token that a service names. token: its text; bytes: where it tells them."""

    logprob: float
    token: Any = None
    bytes: list[int] | None = None


class Drawn(Entry, gc=False):
    """A token of the answer, with those that are named beside it."""

    top_logprobs: list[Entry] | None = None


class Logprobs(msgspec.Struct):
    """What is told of a choice's tokens."""

    content: list[Drawn] | None = None


class _Choice(TypedDict, total=False):
    finish_reason: Any
    message: Any
    logprobs: Logprobs | None


class _Completion(TypedDict, total=False):
    choices: list[_Choice]
    usage: Any
    error: Any


_COMPLETION = msgspec.json.Decoder(_Completion)
_ANYTHING = msgspec.json.Decoder()


def chat_completion(data: bytes) -> Any:
    """A chat completion, as far as it is read here; `content_of` reads a choice's ``logprobs``.

    Raises ValueError or RecursionError where it is no JSON.
    """
    return _decoded(_COMPLETION, data)


def plain(data: bytes) -> Any:
    """Any JSON, whole. Raises as `chat_completion`."""
    return _decoded(_ANYTHING, data)


def _decoded(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return json.loads(data)


def content_of(choice: Mapping[str, Any]) -> list[Drawn]:
    """What is told of each token of a choice; [] where nothing is. Raises ValueError."""
    told = choice.get("logprobs")
    if told is not None and not isinstance(told, Logprobs):
        try:  # Numbers may be texts.
            told = msgspec.convert(told, Logprobs, strict=False)
        except msgspec.MsgspecError as error:
            raise ValueError(f"logprobs are of another shape: {error}") from None
    return (told.content if told is not None else None) or []


class Endings:
    """What a service says of the ends of answers. who: what messages call it."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._unknown: list[object] = []

    def complete(self, finish: object) -> bool:
        """Whether the model has ended the answer.

        A word that is not known is taken for one that cuts an answer off, and written to the log.
        """
        if finish not in (None, *ENDED, *CUT_OFF, *self._unknown):
            self._unknown.append(finish)
            told = shown_value(finish, 60)
            logger.warning(
                "%s ends answers with the finish_reason %s, which is not known: they are taken to "
                "be cut off (stream.on_truncated)",
                self._who,
                told,
            )
        return finish in ENDED
