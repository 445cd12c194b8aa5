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


class RunInUseError(RunError):
    """Another driver is at work on the run: its folder is that driver's to write."""


MOST_PROBLEMS = 20
LONGEST_PROBLEM = 600


def shown(text: str, longest: int = LONGEST_PROBLEM) -> str:
    """``text`` for a terminal: no secrets, no control characters, at most so many characters.

    What data brings along (an escape that would move the cursor, half a surrogate pair, a value of
    a megabyte) is named instead of sent.
    """
    text = redact(text)  # Whole: of a part of a secret nobody would know that it is one.
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text):,} characters) ... {text[-half // 2 :]}"
    return "".join(c if c.isprintable() or c == " " else _named(c) for c in text)


def _named(character: str) -> str:
    """A character that cannot be printed, as Python writes it."""
    return character.encode("unicode_escape").decode("ascii")


def print_problems(problems: Sequence[object]) -> None:
    """Print the problems to standard error, one a line, at most ``MOST_PROBLEMS``; see `shown`."""
    number = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    heading = f"{number}, nothing was started:"
    print(f"\033[31m{heading}\033[0m" if coloured else heading, file=sys.stderr)
    for problem in problems[:MOST_PROBLEMS]:
        print(f"  - {shown(str(problem))}", file=sys.stderr)
    if len(problems) > MOST_PROBLEMS:
        print(f"  ... and {len(problems) - MOST_PROBLEMS:,} more", file=sys.stderr)
