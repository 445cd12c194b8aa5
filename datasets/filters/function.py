"""A user's function as a filter: called in processes of its own, each call with a time limit.

A call that takes too long, fails or ends its process costs its own row, which is rejected and
counted as such. A function that cannot be loaded ends the run.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.records import read_bounded
from raystill.base.run_folder import resolve_input
from raystill.base.user_function import Code, UserFunction
from raystill.config.prompts import FunctionConfig
from raystill.config.stream import FiltersConfig

logger = logging.getLogger(__name__)

TIMED_OUT, FAILED = "timed out", "failed"
MOST_WARNINGS = 20
LARGEST_CODE = 1 << 20
"""Bytes of a Python file that a filter names."""


def read_functions(filters: FiltersConfig) -> dict[str, str]:
    """Texts of the Python files that filters name, by the setting; read on the driver's machine.

    The text travels with the stream, so that no node needs the file. Raises ConfigError.
    """
    texts, problems = {}, []
    for where, function in _functions(filters):
        if not function.is_file:
            continue
        try:
            code = read_bounded(Path(resolve_input(function.place)), LARGEST_CODE)
            texts[function.path] = code.decode("utf-8")
            with warnings.catch_warnings():  # Of the user's code, which nobody asked about here.
                warnings.simplefilter("ignore")
                compile(texts[function.path], function.place, "exec")
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            message = f"is {function.path!r}, which cannot be read ({error}); name a Python file"
            problems.append(Problem(where, message))
    if problems:
        raise ConfigError(problems)
    return texts


def check_functions(filters: FiltersConfig, texts: Mapping[str, str]) -> Iterator[Problem]:
    """A problem for each function that cannot be imported, tried in a process of its own."""
    for where, function in _functions(filters):
        code = code_of(function, texts)
        with UserFunction(code, function.timeout_s, quiet=True) as process:
            if reason := process.load():
                message = f"is {function.path!r}, which cannot be imported ({reason}); correct it"
                yield Problem(where, message)


def code_of(function: FunctionConfig, texts: Mapping[str, str]) -> Code:
    """Where a function's code is; ``texts``: those of files (`read_functions`)."""
    if function.is_file:
        return Code(function.name, file=function.place, text=texts[function.path])
    return Code(function.name, module=function.place)


def hashes_of(texts: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of each file's text, for the manifest."""
    return {path: sha256(text.encode()).hexdigest() for path, text in sorted(texts.items())}


def _functions(filters: FiltersConfig) -> Iterator[tuple[str, FunctionConfig]]:
    """Every function that filters call, after the name of its setting."""
    for number, rule in enumerate(filters.rules):
        for where, function in rule.functions:
            yield f"filters.rules.{number}.{where}.path", function


@dataclass
class Function:
    """A user's function, called in processes that wait for rows; may be used by many threads."""

    config: FunctionConfig
    code: Code
    _idle: "LifoQueue[UserFunction]" = field(default_factory=LifoQueue)
    _warnings: int = 0

    def score(self, row: dict[str, Any]) -> float | str:
        """What the function returns for a row, or why it returns nothing. RunError: no function."""
        try:
            process = self._idle.get_nowait()
        except Empty:
            process = self._started()
        result = process.call(row)  # After a call that took too long another process is started.
        self._idle.put(process)
        if result.value is not None:
            return float(result.value)
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            logger.warning("filter function %s rejects a row: %s", self.config.path, result.error)
        return TIMED_OUT if result.timed_out else FAILED

    def close(self) -> None:
        """End the processes that wait."""
        with suppress(Empty):
            while True:
                self._idle.get_nowait().__exit__()

    def _started(self) -> UserFunction:
        process = UserFunction(self.code, self.config.timeout_s)
        if reason := process.load():
            process.__exit__()
            raise RunError(
                f"the filter function {self.config.path} cannot be loaded ({reason}); it must be "
                "importable on every node, or be in a file that is named as file.py:function"
            )
        return process
