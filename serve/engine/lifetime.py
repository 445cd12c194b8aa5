"""The end of an engine's process: it ends with its replica, and nobody waits for one that ended.

vLLM's processes wait for requests on a socket. A replica that is killed, with its node or its
driver, closes nothing, and they would wait for ever, with all their memory: `end_with`. They look
after it from before the model is loaded (``REPLICA``), and wherever they were started from then on.

vLLM 0.32 (``vllm/v1/engine/core_client.py``) tells the requests that it has of the end of its
process. One that is being sent when it closes its sockets waits for ever, and so does what its
workers were asked (``collective_rpc``): `unless_dead`.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import Any, TypeVar

import psutil

REPLICA = "RAYSTILL_REPLICA"
"""Environment variable with the process that an engine is to end with, and its machine."""

LOOK_EVERY_S = 1.0
EXIT_ALONE = 1

T = TypeVar("T")


def name_replica() -> None:
    """Let the engines that this process starts from now on end with it."""
    os.environ[REPLICA] = f"{os.getpid()}@{socket.gethostname()}"


def end_with_replica() -> None:
    """`end_with` the process that has named itself, unless it is this one."""
    pid, _, host = os.environ.get(REPLICA, "").partition("@")
    if pid and int(pid) != os.getpid():
        end_with(int(pid), host)


def end_with(pid: int, host: str) -> None:
    """End this process within two seconds of the end of process ``pid``, without a word.

    Returns at once; a thread looks. Does nothing on another machine than ``host``, where the number
    means another process: Ray ends what it started there.
    """
    if host != socket.gethostname():
        return

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched = psutil.Process(pid)  # Remembers when it started: a number may be given again.
            while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                time.sleep(LOOK_EVERY_S)
        os._exit(EXIT_ALONE)

    Thread(target=watch, name="end-with-replica", daemon=True).start()


def has_ended(engine: Any) -> bool:
    """Whether a process of vLLM's ``AsyncLLM`` has ended, whether or not vLLM has seen it."""
    manager = engine.engine_core.resources.engine_manager
    return engine.errored or (manager is not None and bool(manager.finished_procs()))


def engine_is_dead(error: BaseException) -> bool:
    """Whether the error says that the engine's process has ended."""
    return any(kind.__name__ == "EngineDeadError" for kind in type(error).__mro__)


async def unless_dead(work: Awaitable[T], raise_if_dead: Callable[[], None]) -> T:
    """The result of ``work``, which is cancelled with its caller.

    Raises what ``raise_if_dead`` raises, at most LOOK_EVERY_S after it would do so.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=LOOK_EVERY_S))[0]:
            raise_if_dead()
        return task.result()
    finally:
        task.cancel()
