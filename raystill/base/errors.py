"""Problems that keep a run from starting, and the errors that carry them.

Checks collect every problem before they raise, so that a person can correct all of them at once.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raystill.base.redact import redact


@dataclass(frozen=True)
class Problem:
    """One problem that keeps a run from starting.

    ``where``: what to edit, a dotted configuration key or a file with its line. ``message``: the
    value, what was expected, and the remedy.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(ValueError):
    """Problems of a configuration or of its inputs, all in one error."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[Problem]]]:
        # Ray pickles errors between processes. By default the message, and not the problems,
        # would be handed to __init__.
        return (type(self), (self.problems,))


def config_error(where: str, message: str) -> ConfigError:
    """Return a ConfigError of one problem; the caller raises it."""
    return ConfigError([Problem(where, message)])


class RunError(Exception):
    """A run cannot go on, for a reason that its owner can remove. Shown without a traceback."""


def print_problems(problems: Sequence[object]) -> None:
    """Print the problems to standard error, one a line, credentials hidden."""
    number = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    heading = f"{number}, nothing was started:"
    print(f"\033[31m{heading}\033[0m" if coloured else heading, file=sys.stderr)
    for problem in problems:
        print(f"  - {redact(str(problem))}", file=sys.stderr)
