"""From the worker's memory to the replica: the arrays captured of each finished row.

Where it sits: ``VllmEngine`` asks for a row as soon as its request has ended. *Consumes* what
``capture.py`` keeps, by calls of vLLM that say where it is; the arrays themselves are read from
memory shared with the worker, while the engine goes on. Rows that end together share a call.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raystill.serve.engine.blocks import BlockReader, BlocksHandle, TakenBlocks
from raystill.serve.engine.lifetime import unless_dead

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.001

Bytes = NDArray[np.uint8]


class Takes:
    """Takes what the engine's workers captured."""

    def __init__(
        self, call: Callable[..., Awaitable[list[Any]]], raise_if_dead: Callable[[], None]
    ):
        """call: ``AsyncLLM.collective_rpc``. raise_if_dead: raises if the engine has ended."""
        self._call = call
        self._raise_if_dead = raise_if_dead
        self._reader: BlockReader | None = None
        self._waiting: list[tuple[str, int, asyncio.Future[Bytes]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking = False

    async def start(self) -> None:
        """Let the workers capture, and open their memory if it is on this machine."""
        results = await self._call("raystill_capture", args=(os.getpid(), socket.gethostname()))
        handle = next(result for result in results if result is not None)
        try:
            self._reader = BlockReader(BlocksHandle(**handle))
        except OSError as error:
            logger.warning(
                "hidden states come through the engine's calls, which stop it while they are "
                "copied: its worker's memory cannot be opened (%s)",
                error,
            )

    async def take(self, tag: str, length: int) -> Bytes:
        """The array captured for a tag: uint8 [length, bytes of a row]. It is forgotten there.

        A caller that is cancelled leaves nothing behind.

        Raises:
            RuntimeError: not all of it was captured.
            EngineDeadError: the engine's process has ended.
        """
        if length == 0:
            self.drop(tag)
            return np.empty((0, 0), np.uint8)
        future: asyncio.Future[Bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((tag, length, future))
        if not self._asking:
            self._asking = True
            self._spawn(self._ask())
        return await future

    def drop(self, tag: str) -> None:
        """Let the workers forget a request that will not be taken. Returns at once."""
        self._spawn(self._drop(tag))

    def close(self) -> None:
        """Close the workers' memory."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    async def _ask(self) -> None:
        """Take all that wait, until none waits."""
        try:
            while self._waiting:
                rows, self._waiting = self._waiting, []
                tags, lengths = [tag for tag, _, _ in rows], [length for _, length, _ in rows]
                try:
                    arguments = (tags, lengths, self._reader is None)
                    results = await self._called("raystill_take", arguments)
                except Exception as error:
                    for _, _, future in rows:
                        _finish(future, error)
                    continue
                captured = next(result for result in results if result is not None)
                for result, (_, length, future) in zip(captured, rows, strict=True):
                    self._spawn(self._receive(result, length, future))
        finally:
            self._asking = False

    async def _receive(
        self, result: list[Any], length: int, future: "asyncio.Future[Bytes]"
    ) -> None:
        """Read one row's array. Its blocks are given back whether or not someone waits for it."""
        reader = self._reader
        match result:
            case [str(problem)]:
                _finish(future, RuntimeError(problem))
            case [bytes(data)]:
                _finish(future, np.frombuffer(data, np.uint8).reshape(length, -1))
            case [job, blocks, width]:
                assert reader is not None, "blocks are named to a reader only"
                taken = TakenBlocks(job, blocks, length, width)
                try:
                    while not reader.is_written(taken):
                        self._raise_if_dead()
                        await asyncio.sleep(LOOK_EVERY_S)
                    # Off the event loop, which all rows' tokens pass.
                    array = await asyncio.to_thread(reader.read, taken)
                except Exception as error:
                    _finish(future, error)
                else:
                    _finish(future, array)
                finally:
                    reader.give_back(blocks)

    async def _drop(self, tag: str) -> None:
        try:
            await self._called("raystill_drop", ([tag],))
        except Exception as error:  # A dead engine has forgotten everything.
            logger.debug("%s was not dropped: %s", tag, error)

    async def _called(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        """What the workers return."""
        return await unless_dead(self._call(method, args=arguments), self._raise_if_dead)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _finish(future: "asyncio.Future[Bytes]", result: Bytes | Exception) -> None:
    """Give the future its result, unless its caller was cancelled."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
