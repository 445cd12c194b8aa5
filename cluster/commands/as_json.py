"""What ``--json`` prints: answers for programs, on standard output, without credentials.

Whatever data brings along, it is one JSON value of printable characters, which the output's
encoding has, and of at most `MOST_CHARACTERS`.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from raystill.base.console import printable
from raystill.base.errors import RunError
from raystill.base.records import Folder, plain, read_object
from raystill.base.redact import redacted

MOST_CHARACTERS = 1_000_000
BOUNDS = ((1000, 2000), (100, 500), (20, 200))
"""Entries of a list or mapping and characters of a text: the first pair that fits is taken."""
LEFT_OUT = "_left_out"


def print_json(value: Any) -> None:
    """Print one JSON value; a number that is not finite is null.

    Of a list or mapping with too many entries the first ones are told, and how many are left out:
    for a list beside it, under its name with ``_left_out``, for a mapping in it, as ``_left_out``.
    A text that is too long ends with ``...``. Raises RunError where the rest is still too much.
    """
    clean = redacted(plain(value))
    for entries, characters in BOUNDS:
        bounded = _bounded(clean, entries, characters)
        text = json.dumps(bounded, indent=2, ensure_ascii=False, allow_nan=False)
        if len(text) <= MOST_CHARACTERS:
            print(_printable(text), flush=True)
            return
    raise RunError(f"the answer has {len(text):,} characters; at most {MOST_CHARACTERS:,} are told")


def counted(name: str, items: Sequence[Any], number: int) -> dict[str, Any]:
    """The list ``name`` with the first items of ``number``, and how many are left out, if any."""
    left_out = number - len(items)
    return {name: list(items), **({f"{name}{LEFT_OUT}": left_out} if left_out > 0 else {})}


def _bounded(value: Any, entries: int, characters: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= characters else f"{value[: characters - 3]}..."
    if isinstance(value, list):
        return [_bounded(item, entries, characters) for item in value[:entries]]
    if not isinstance(value, dict):
        return value
    bounded: dict[str, Any] = {}
    for name in list(value)[:entries]:
        item, short = value[name], _bounded(name, entries, characters)
        while short in bounded:  # Two names that begin alike.
            short += "'"
        inner = _bounded(item, entries, characters)
        if isinstance(item, list):
            bounded |= counted(short, inner, len(item))
        else:
            bounded[short] = inner
    if len(value) > entries:
        bounded[LEFT_OUT] = len(value) - entries
    return bounded


def _printable(text: str) -> str:
    """The same JSON, with escapes in place of what a terminal or the output's encoding cannot show.

    Outside of its texts JSON is plain ASCII, so that each such character is one of a text.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return text if _fits(text, encoding) else json.dumps(json.loads(text), indent=2)


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def say_beside(text: str) -> None:
    """Print a line without credentials on standard error, beside the JSON on standard output."""
    print(printable(text), file=sys.stderr, flush=True)


def print_totals(folders: Sequence[Folder]) -> None:
    """Print ``{"runs": [...]}``: the ``summary.json`` of each run, with its folder."""
    print_json({"runs": [totals(folder) for folder in folders]})


def totals(folder: Folder) -> dict[str, Any]:
    """A run's ``summary.json`` with ``run_folder``. Raises RunError where no run has ended."""
    if not folder.exists("summary.json"):
        raise RunError(
            f"{folder.path} has no summary.json: no run has ended there yet; "
            "name the folder of a run that has, e.g. runs/quickstart"
        )
    return {"run_folder": folder.path, **read_object(folder, "summary.json")}
