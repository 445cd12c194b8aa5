"""An HTTP server that answers ``/v1/completions`` by ids as vLLM does, or wrongly in one way.

Its model is a made-up one: logits are drawn from the context. For faults that no real vLLM has.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tests.support.end_to_end import TEACHER
from tests.support.json_service import JsonHandler, serving
from tests.support.json_service import Server as JsonServer


@dataclass
class Kind:
    """What kind of server it is; the defaults are those of an honest one."""

    vocab_size: int = 49152
    max_model_len: int | None = 256
    max_logprobs: int = 20
    shift_ids: int = 0
    temperature_in_logprobs: bool = False
    logits: bool = False
    forces: bool = True
    forgets: tuple[str, ...] = ()
    own_stop: int | None = None
    cuts_at: int = 10**9
    zero: int | None = None
    """An id of probability 0."""
    breaks: dict[str, Any] = field(default_factory=dict)
    """Fields of the choice in place of the true ones."""


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TEACHER / "tokenizer.json"))


class Server(JsonServer):
    def __init__(self, kind: Kind) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind = kind
        self.tokenizer = tokenizer()
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def logprobs_of(kind: Kind, context: list[int], temperature: float = 1.0) -> np.ndarray:
    """float64 [V] of the next token."""
    logits = np.random.default_rng(context).normal(0, 3, kind.vocab_size)
    if kind.zero is not None:
        logits[kind.zero] = -np.inf
    if kind.logits:
        return logits
    if kind.temperature_in_logprobs:
        logits = logits / max(temperature, 0.01)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


class Refused(Exception):
    pass


class Handler(JsonHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked["models"] += 1
        model: dict[str, Any] = {"id": "large", "object": "model"}
        if self.server.kind.max_model_len is not None:
            model["max_model_len"] = self.server.kind.max_model_len
        self.send(200, {"data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        self.server.asked["completions"] += 1
        try:
            self.send(200, self.complete(body))
        except Refused as error:
            self.send(400, {"error": {"message": str(error), "code": 400}})

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        kind, prompt = self.server.kind, body["prompt"]
        if isinstance(prompt, str):
            ids = self.server.tokenizer.encode(prompt, add_special_tokens=False).ids
            prompt = [(i + kind.shift_ids) % 49152 for i in ids]
        width = body["logprobs"]
        if max(width or 0, body.get("prompt_logprobs") or 0) > kind.max_logprobs:
            raise Refused(f"Requested {width}, greater than max allowed: {kind.max_logprobs}")
        allowed = body.get("allowed_token_ids") if kind.forces else None
        if allowed and max(allowed) >= kind.vocab_size:
            raise Refused("allowed_token_ids contains out-of-vocab token id!")
        ids, rows = [], []
        stops = {*body["stop_token_ids"], kind.own_stop}
        for _ in range(min(body["max_tokens"], kind.cuts_at)):
            logprobs = logprobs_of(kind, [*prompt, *ids], body["temperature"])
            ids.append(allowed[0] if allowed else int(logprobs.argmax()))
            rows.append(named(logprobs, ids[-1], width or 0))
            if ids[-1] in stops:
                break
        choice: dict[str, Any] = {
            "token_ids": ids,
            "prompt_token_ids": prompt,
            "finish_reason": "stop" if ids[-1] in stops else "length",
        }
        if width is not None:
            drawn = [row[token] for row, token in zip(rows, ids, strict=True)]
            named_rows = [{f"token_id:{i}": value for i, value in row.items()} for row in rows]
            choice["logprobs"] = {"token_logprobs": drawn, "top_logprobs": named_rows}
        if body.get("prompt_logprobs") is not None:
            wide = body["prompt_logprobs"]
            told = [
                named(logprobs_of(kind, prompt[:i]), prompt[i], wide) for i in range(1, len(prompt))
            ]
            choice["prompt_logprobs"] = [
                None,
                *({str(i): {"logprob": v, "rank": 1} for i, v in row.items()} for row in told),
            ]
        choice = {n: v for n, v in {**choice, **kind.breaks}.items() if n not in kind.forgets}
        used = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"choices": [choice], "usage": used}


def named(logprobs: np.ndarray, drawn: int, width: int) -> dict[int, float]:
    """The drawn id first, then the best ones, in float32 and without infinities, as vLLM tells."""
    best = np.argsort(-logprobs, kind="stable")[:width].tolist()
    ids = dict.fromkeys([drawn, *best])
    return {i: max(float(np.float32(logprobs[i])), -9999.0) for i in ids}


@contextmanager
def vllm_like(kind: Kind) -> Iterator[Server]:
    """A running server of one kind."""
    with serving(Server(kind)) as server:
        yield server
