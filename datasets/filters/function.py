"""A user's function as a filter: in processes of its own, each call with a time limit.

A function may hang, even within C code that keeps the interpreter, or end its process. So it runs
in a process that is ended and started again where a call takes too long; the row is then rejected
and counted as such. A function that cannot be loaded ends the run.
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.run_folder import resolve_input
from raystill.config.stream import FiltersConfig, FunctionConfig

logger = logging.getLogger(__name__)

PROCESS = Path(__file__).with_name("function_process.py")
START_S = 120.0
"""Seconds in which a process must have started and loaded the function."""
TIMED_OUT, FAILED, DIED = "timed out", "failed", "died"
MOST_WARNINGS = 20


class Died(Exception):
    """The process has ended."""


def read_functions(filters: FiltersConfig) -> dict[str, str]:
    """Texts of the Python files that filters name, by the setting; read on the driver's machine.

    The text travels with the stream, so that no node needs the file. Raises ConfigError.
    """
    texts, problems = {}, []
    for number, rule in enumerate(filters.rules):
        for where, function in rule.functions:
            if not function.file:
                continue
            try:
                texts[function.path] = Path(resolve_input(function.file)).read_text("utf-8")
                compile(texts[function.path], function.file, "exec")
            except (OSError, ValueError, SyntaxError) as error:
                message = (
                    f"is {function.path!r}, which cannot be read ({error}); name a Python file"
                )
                problems.append(Problem(f"filters.rules.{number}.{where}.path", message))
    if problems:
        raise ConfigError(problems)
    return texts


def hashes_of(texts: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of each file's text, for the manifest."""
    return {path: sha256(text.encode()).hexdigest() for path, text in sorted(texts.items())}


class FunctionProcess:
    """One process that has loaded a function."""

    def __init__(self, config: FunctionConfig, source: str | None) -> None:
        mine, its = os.pipe()
        path = os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROCESS), str(its)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(its,),
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # What it starts ends with it.
            )
        except BaseException:
            os.close(mine)
            raise
        finally:
            os.close(its)
        self._replies = mine
        assert self._process.stdin is not None
        self._requests = self._process.stdin.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        request: dict[str, Any] = {"module": config.module, "function": config.function}
        request |= {"source": source, "timeout_s": config.timeout_s}
        try:
            reply = self.ask(request, START_S)
        except (TimeoutError, Died) as error:
            self.end()
            how = "took too long" if isinstance(error, TimeoutError) else "ended its process"
            raise RunError(f"loading the filter function {config.path} {how}") from None
        if "error" in reply:
            self.end()
            raise RunError(
                f"the filter function {config.path} cannot be loaded ({reply['error']}); it must "
                "be importable on every node, or be in a file that is named as file.py:function"
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its reply. Raises TimeoutError after ``seconds``, and Died."""
        deadline = time.monotonic() + seconds
        text = json.dumps(request).encode()
        data = memoryview(len(text).to_bytes(4, "big") + text)
        while data:
            self._wait(self._requests, selectors.EVENT_WRITE, deadline)
            try:
                data = data[os.write(self._requests, data) :]
            except BrokenPipeError:
                raise Died from None
            except BlockingIOError:
                continue
        length = int.from_bytes(self._read(4, deadline), "big")
        reply: dict[str, Any] = json.loads(self._read(length, deadline))
        return reply

    def end(self) -> None:
        """End it, with all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1

    def _read(self, size: int, deadline: float) -> bytes:
        parts = b""
        while len(parts) < size:
            self._wait(self._replies, selectors.EVENT_READ, deadline)
            try:
                part = os.read(self._replies, size - len(parts))
            except BlockingIOError:
                continue
            if not part:
                raise Died
            parts += part
        return parts

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError


@dataclass
class Function:
    """A user's function, called in processes that wait for rows; may be used by many threads.

    source: text of its file; None where it is imported.
    """

    config: FunctionConfig
    source: str | None = None
    _idle: "LifoQueue[FunctionProcess]" = field(default_factory=LifoQueue)
    _warnings: int = 0

    def score(self, row: dict[str, Any]) -> float | str:
        """What the function returns for a row, or why it returns nothing. RunError: no function."""
        try:
            process = self._idle.get_nowait()
        except Empty:
            process = FunctionProcess(self.config, self.source)
        try:
            reply = process.ask({"row": row}, self.config.timeout_s)
        except (TimeoutError, Died) as error:
            process.end()
            late = isinstance(error, TimeoutError)
            self._warn(f"more than {self.config.timeout_s:g} s" if late else "its process ended")
            return TIMED_OUT if late else DIED
        except BaseException:
            process.end()
            raise
        self._idle.put(process)
        score = reply.get("score")
        if not isinstance(score, float) or score != score:
            self._warn(reply.get("error") or "it returned NaN")
            return FAILED
        return score

    def close(self) -> None:
        """End the processes that wait."""
        with suppress(Empty):
            while True:
                self._idle.get_nowait().end()

    def _warn(self, reason: str) -> None:
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            logger.warning("filter function %s rejects a row: %s", self.config.path, reason)
