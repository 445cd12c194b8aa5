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
MOST_CHARACTERS = 3600
"""Of all problems that are printed together. The longest are shortened first."""


def shown(text: str, longest: int = LONGEST_PROBLEM) -> str:
    """``text`` for a terminal: no secrets, no control characters, at most so many characters.

    What data brings along (an escape that would move the cursor, half a surrogate pair, a value of
    a megabyte) is named instead of sent.
    """
    text = redact(text)  # Whole: of a part of a secret nobody would know that it is one.
    length = len(text)
    if length > 2 * longest:  # Naming the characters of a megabyte would take a second.
        text = text[:longest] + text[-longest:]
    text = "".join(c if c.isprintable() or c == " " else _named(c) for c in text)
    if length <= longest and len(text) <= longest:
        return text
    between = f" ... ({length:,} characters) ... "
    kept = max(longest - len(between), 0)
    end = kept // 3  # A message ends with the remedy.
    return f"{text[: kept - end]}{between}{text[len(text) - end :]}"


def _named(character: str) -> str:
    """A character that cannot be printed, as Python writes it."""
    return character.encode("unicode_escape").decode("ascii")


def shown_together(texts: Sequence[str], most: int = MOST_CHARACTERS) -> list[str]:
    """The texts as `shown`, and together of at most ``most`` characters.

    Where that is too little, the longest ones share what the shorter ones leave.
    """
    lines = [shown(text) for text in texts]
    left = most
    for number, length in enumerate(sorted(map(len, lines))):
        share = left // (len(lines) - number)
        if length > share:
            return [shown(text, share) for text in texts]
        left -= length
    return lines


def print_problems(problems: Sequence[object]) -> None:
    """Print the problems to standard error, one a line, at most ``MOST_PROBLEMS``; see `shown`."""
    number = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    heading = f"{number}, nothing was started:"
    print(f"\033[31m{heading}\033[0m" if coloured else heading, file=sys.stderr)
    for line in shown_together([str(problem) for problem in problems[:MOST_PROBLEMS]]):
        print(f"  - {line}", file=sys.stderr)
    if len(problems) > MOST_PROBLEMS:
        print(f"  ... and {len(problems) - MOST_PROBLEMS:,} more", file=sys.stderr)
