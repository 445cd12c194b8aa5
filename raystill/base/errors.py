"""What can be wrong with a run: problems that are collected, and the two errors that carry them."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raystill.base.redact import redact


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a run from starting.

    ``where`` is what a person edits (a dotted configuration key, a file with its line);
    ``message`` says the value, what was expected, and the remedy.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(ValueError):
    """Everything found wrong with a configuration or its inputs, all at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[Problem]]]:
        return (type(self), (self.problems,))


def config_error(where: str, message: str) -> ConfigError:
    """A ConfigError of one problem, to be raised."""
    return ConfigError([Problem(where, message)])


class RunError(Exception):
    """A run cannot go on, for a reason its owner can act on; shown without a traceback."""


def print_problems(problems: Sequence[object]) -> None:
    """List the problems on the error stream, each under what a person edits."""
    number = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    print(f"{number}, nothing was started:", file=sys.stderr)
    for problem in problems:
        print(f"  - {redact(str(problem))}", file=sys.stderr)
