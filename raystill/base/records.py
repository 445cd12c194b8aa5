"""The run's line-by-line records: ``metrics.jsonl``, ``evaluation.jsonl`` and their like.

One JSON object a line, appended by one process. In a local run folder the lines are appended to
the file itself; object stores cannot append, so for a remote folder they go to a local copy that
``upload`` writes whole, at each checkpoint.

``step`` in a line counts finished optimizer steps: the first step's line says 1, an evaluation of
the untrained student says 0. The file holds the steps of the surviving weights only: after a
restart ``discard_beyond`` moves the lines of lost steps to ``<name>.discarded.jsonl``.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol


class Folder(Protocol):
    """What is needed of a run folder (``cluster/run_folder.py``)."""

    path: str

    @property
    def is_local(self) -> bool: ...
    @property
    def local(self) -> Path | None: ...
    @property
    def logs(self) -> Path: ...
    def exists(self, name: str) -> bool: ...
    def read_text(self, name: str) -> str: ...
    def write_text(self, name: str, data: str) -> None: ...


class MetricsLog:
    """One append-only JSONL file of a run folder."""

    def __init__(self, folder: Folder, name: str = "metrics.jsonl") -> None:
        self.folder = folder
        self.name = name
        local = folder.local
        self._file = (local if local is not None else folder.logs) / name
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if local is None:  # The uploaded copy counts; one left here may be of another node's past.
            self._file.write_text(folder.read_text(name) if folder.exists(name) else "")
        _end_last_line(self._file)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line: numpy and torch scalars become numbers, a non-finite number null."""
        line = json.dumps(plain(record), allow_nan=False)
        with open(self._file, "a") as file:
            file.write(line + "\n")

    def discard_beyond(self, step: int) -> int:
        """Move lines whose ``step`` is above ``step``, and broken ones, aside; returns how many."""
        if not self._file.exists():
            return 0
        lines = self._file.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        gone = [line for line in lines if line and _step_of(line) > step]
        if gone:
            aside = self.discarded_name
            before = self.folder.read_text(aside) if self.folder.exists(aside) else ""
            self.folder.write_text(aside, before + "".join(line + "\n" for line in gone))
            _replace(self._file, "".join(line + "\n" for line in kept))
            self.upload()
        return len(gone)

    @property
    def discarded_name(self) -> str:
        """The file that lines of lost steps move to."""
        return self.name.removesuffix(".jsonl") + ".discarded.jsonl"

    def upload(self) -> None:
        """Write the whole file into a remote run folder; nothing to do for a local one."""
        if self.folder.local is None:
            self.folder.write_text(self.name, self._file.read_text())


def read_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    """All whole lines of a record file; a missing file gives [], a torn last line is left out."""
    if not folder.exists(name):
        return []
    lines = folder.read_text(name).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{folder.path}/{name}, line {number}, is not JSON ({error}); "
                    "remove that line, or the file if it is not of this run"
                ) from None
    return records


def plain(value: Any) -> Any:
    """``value`` with only JSON's own types: scalars of numpy and torch by their ``item``."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _step_of(line: str) -> float:
    """A line's step; infinity where the line is broken or names none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _end_last_line(path: Path) -> None:
    """A crash can leave half a line: end it, so that the next line starts on its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        _replace(path, data.decode(errors="replace") + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
