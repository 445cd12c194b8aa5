"""The JSON of a service's answer: small parts as plain values, what is told of its tokens typed.

An answer with 20 named tokens beside each of its own is 130 KB for 64 tokens. msgspec reads that
shape in a third of the time that the standard library takes. What is of another shape, and text
that is no Unicode (a lone surrogate), is read by the standard library: such an answer is paid for
too. *Consumes* the bytes of a response.
"""

import json
from collections.abc import Mapping
from typing import Any, TypedDict

import msgspec


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
