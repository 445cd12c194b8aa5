"""What ``--json`` prints: answers for programs, on standard output, without credentials."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from raystill.base.errors import RunError
from raystill.base.records import Folder, plain, read_object
from raystill.base.redact import redact, redacted


def print_json(value: Any) -> None:
    """Print one JSON value; a number that is not finite is null."""
    text = json.dumps(redacted(plain(value)), indent=2, ensure_ascii=False, allow_nan=False)
    print(text, flush=True)


def say_beside(text: str) -> None:
    """Print a line without credentials on standard error, beside the JSON on standard output."""
    print(redact(text), file=sys.stderr, flush=True)


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
