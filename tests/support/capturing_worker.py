"""A worker whose engine captures, without vLLM: batches of requests as its model runner has them.

A token's hidden state is made of its request's number and its place, so that a test can tell
which one it got.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from raystill.serve.engine import capture
from raystill.serve.engine.capture import Capture, CaptureRequest

VOCAB = 32


@dataclass
class Row:
    """A request in the engine: P prompt tokens, T response tokens."""

    number: int
    prompt: int
    response: int
    wanted: CaptureRequest | None
    computed: int = 0

    @property
    def name(self) -> str:
        return f"row-{self.number}"

    @property
    def end(self) -> int:
        """Tokens that have to be computed; the last response token is not put in."""
        return self.prompt + self.response - 1


def states_of(number: int, places: np.ndarray, size: int) -> torch.Tensor:
    """bfloat16 [n, D]: the hidden states of a request's tokens at ``places``."""
    first = torch.from_numpy((number * 7919 + places * 31) % 251).to(torch.bfloat16)
    return (first[:, None] + torch.arange(size, dtype=torch.bfloat16)[None, :] % 5).contiguous()


@dataclass
class CapturingWorker:
    """Runs steps. ``size``: D, the hidden size."""

    size: int
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=None, vocab_size=VOCAB)
        head = torch.linspace(-1, 1, self.size * VOCAB).reshape(self.size, VOCAB)
        model = SimpleNamespace(compute_logits=lambda states: states.float() @ head / 1000)
        self.runner = SimpleNamespace(
            input_batch=batch,
            requests={},
            query_start_loc=SimpleNamespace(np=None),
            model=model,
            sampler=SimpleNamespace(gather_logprobs=None),
            _model_forward=lambda output: output,
        )
        self.head = head / 1000
        self.worker: Any = Capture()
        self.worker.model_runner = self.runner

    async def call(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """As ``AsyncLLM.collective_rpc``."""
        return [getattr(self.worker, method)(*args)]

    def add(self, row: Row) -> None:
        """Let a request join the next step."""
        extra = row.wanted.extra_args() if row.wanted else None
        parameters = SimpleNamespace(extra_args=extra)
        self.runner.requests[row.name] = SimpleNamespace(sampling_params=parameters)
        self.rows.append(row)

    def step(self, most: int = 1 << 30) -> list[Row]:
        """Compute what is left of prompts and one token of answers; return who has ended.

        ``most``: the most tokens of one request; longer prompts come in chunks.
        """
        counts = [min(most, max(1, row.prompt - row.computed)) for row in self.rows]
        batch = self.runner.input_batch
        batch.req_ids = [row.name for row in self.rows]
        batch.num_computed_tokens_cpu = np.array([row.computed for row in self.rows], np.int32)
        self.runner.query_start_loc.np = np.cumsum([0, *counts]).astype(np.int32)
        parts = [
            states_of(row.number, np.arange(row.computed, row.computed + count), self.size)
            for row, count in zip(self.rows, counts, strict=True)
        ]
        self.runner._model_forward(torch.cat(parts))
        for row, count in zip(self.rows, counts, strict=True):
            row.computed += count
        return [row for row in self.rows if row.computed >= row.end]

    def leave(self, row: Row) -> None:
        """Let a request leave the engine, as it does when it has ended."""
        self.rows.remove(row)
        del self.runner.requests[row.name]


def captures_alone(monkeypatch: Any) -> None:
    """Let a worker of no distributed group be the one that answers."""
    monkeypatch.setattr(capture, "_is_last_stage", lambda: True)
    monkeypatch.setattr(capture, "_is_first_rank", lambda: True)
    monkeypatch.setattr(capture, "end_with", lambda *arguments: None)
