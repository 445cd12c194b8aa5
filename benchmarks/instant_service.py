"""An OpenAI-compatible service that answers at once, in a process of its own; for ``api_rate``.

It has its answers ready as bytes, so that it takes next to nothing of what is measured.
"""

import asyncio
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from tokenizers import Tokenizer

START_S = 300.0


def chat_completion(text: str, ids: list[int], named: list[dict[str, Any]] | None) -> bytes:
    """An answer as services give it. named: what is told of its tokens; None: nothing."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
        "logprobs": None if named is None else {"content": named, "refusal": None},
        "finish_reason": "stop",
    }
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": len(ids),
        "total_tokens": 20 + len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    told = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "large"}
    return json.dumps({**told, "choices": [choice], "usage": usage}).encode()


def named_tokens(
    tokenizer: Tokenizer, ids: list[int], top: int, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """For each id its text, bytes and log probability, and those of ``top`` tokens."""

    def entry(index: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([index], skip_special_tokens=False)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    told = []
    for index in ids:
        weights = 0.5 ** np.arange(1, top + 1)
        others = generator.integers(200, tokenizer.get_vocab_size(), top - 1).tolist()
        named = [entry(i, float(np.log(p))) for i, p in zip([index, *others], weights, strict=True)]
        told.append({**named[0], "top_logprobs": named})
    return told


def answers(tokenizer_file: str, texts: Sequence[str], top: int | None) -> list[bytes]:
    """The answers of the service, one after the other, each from its text."""
    tokenizer, generator = Tokenizer.from_file(tokenizer_file), np.random.default_rng(0)
    found = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        named = None if top is None else named_tokens(tokenizer, ids, top, generator)
        found.append(chat_completion(text, ids, named))
    return found


class Instant(asyncio.Protocol):
    """One connection, which is kept open: an answer for each request."""

    def __init__(self, replies: Iterator[bytes]) -> None:
        self._replies = replies
        self._came = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._came += data
        while (end := self._came.find(b"\r\n\r\n")) >= 0:
            head = self._came[:end].lower()
            _, _, after = head.partition(b"content-length:")
            whole = end + 4 + int(after.split(b"\r\n", 1)[0] or 0)
            if len(self._came) < whole:
                return
            self._came = self._came[whole:]
            self._transport.write(next(self._replies))


def serve(port: Connection, tokenizer_file: str, texts: Sequence[str], top: int | None) -> None:
    """Answers until the process is ended; tells its port first."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ready = [head % len(one) + one for one in answers(tokenizer_file, texts, top)]
    replies = itertools.cycle(ready)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Instant(replies), "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def instant_service(tokenizer_file: str, texts: Sequence[str], top: int | None) -> Iterator[str]:
    """The service at work; gives its URL. top: tokens named beside each; None: the text alone."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    asked = (its, tokenizer_file, list(texts), top)
    process = context.Process(target=serve, args=asked, daemon=True)
    process.start()
    try:
        if not mine.poll(START_S):
            raise SystemExit(f"the service did not start within {START_S:g} s")
        yield f"http://127.0.0.1:{mine.recv()}/v1"
    finally:
        process.terminate()
        process.join()
