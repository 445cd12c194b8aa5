"""What a replica asks of its engine, and what some engines can be asked beside it."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal

Ids = list[NDArray[np.int32]]


class Engine(Protocol):
    """What the replica asks of an engine."""

    name: str
    version: str
    dtype: str
    vocab_size: int
    max_model_len: int

    async def start(self) -> None: ...
    async def sample(self, prompt_ids: Ids, signal: Signal) -> list[Answer]: ...
    async def score(
        self, prompt_ids: Ids, response_ids: Ids, signal: Signal, at: Ids | None
    ) -> list[Answer]: ...
    async def probe(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class KeyedEngine(Protocol):
    """An engine that names what it asks for by the keys of the answers."""

    async def sample_keyed(self, ids: Ids, keys: list[bytes], signal: Signal) -> list[Answer]: ...


@runtime_checkable
class ChatEngine(Protocol):
    """An engine that asks in words, and can be given them."""

    async def sample_chats(self, ids: Ids, chats: list[str], signal: Signal) -> list[Answer]: ...


@runtime_checkable
class MortalEngine(Protocol):
    """An engine that a row may kill: it can be asked row by row, with no other row in it."""

    died: bool

    async def sample(
        self, prompt_ids: Ids, signal: Signal, *, one_by_one: bool
    ) -> list[Answer]: ...
    async def score(
        self, prompt_ids: Ids, response_ids: Ids, signal: Signal, *, one_by_one: bool
    ) -> list[Answer]: ...
