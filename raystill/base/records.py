"""JSONL records of a run folder: ``metrics.jsonl``, ``evaluation.jsonl`` and others.

Each line is one JSON object, and one process appends to a file. In a local run folder it appends
to the file itself. Object stores cannot append, so for a remote folder it appends to a local copy,
and ``upload`` writes that copy whole at each checkpoint.

``step`` is the number of finished optimizer steps: 1 in the first step's line, 0 in the evaluation
of the untrained student. The file holds only steps that led to the current weights: after a
restart ``discard_beyond`` moves the lines of later steps to ``<name>.discarded.jsonl``.

Also here: what a value may be that is to be written so (`require_plain`), and files of others, read
within bounds.
"""

import contextlib
import errno
import json
import math
import os
import stat
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from raystill.base.errors import RunError


class Folder(Protocol):
    """The part of `run_folder.RunFolder` that records need; tests supply a remote one."""

    path: str

    @property
    def is_local(self) -> bool: ...
    @property
    def local(self) -> Path | None: ...
    @property
    def logs(self) -> Path: ...
    def exists(self, name: str) -> bool: ...
    def join(self, name: str) -> str: ...
    def read_text(self, name: str) -> str: ...
    def write_text(self, name: str, text: str) -> None: ...


LARGEST_OBJECT, LARGEST_RECORDS = 64 << 20, 4 << 30
"""Bytes of a local file that is one JSON object, and of one with a record in each line. The second
is far beyond what a run writes (600 bytes a step): its end must not fail by a bound."""


class BrokenFile(RunError, ValueError):
    """A file of a run folder that is there and is not what this version writes."""


def number(value: object) -> float | None:
    """``value`` of a record as a finite float; None where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def natural(text: str) -> int | None:
    """The number that a text of up to nine of ASCII's digits says, such as a key; else None.

    ``isdigit`` holds for a raised two, which ``int`` refuses, as it does 5,000 digits.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def mapping(value: object) -> dict[str, Any]:
    """``value`` of a record where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


class MetricsLog:
    """One append-only JSONL file of a run folder.

    keep_more: this node's copy of a remote file is kept where it begins as that does and has more.
    """

    def __init__(
        self, folder: Folder, name: str = "metrics.jsonl", keep_more: bool = False
    ) -> None:
        self.folder = folder
        self.name = name
        local = folder.local
        self._file = (local if local is not None else folder.logs) / name
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if local is None:  # A copy left on this node may be older than the one in the run folder.
            there = folder.read_text(name) if folder.exists(name) else ""
            here = self._file.read_text(errors="replace") if self._file.exists() else ""
            if not (keep_more and there and here.startswith(there)):
                self._file.write_text(there)
            elif len(here) > len(there):
                self.upload()
        _end_last_line(self._file)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Numpy and torch scalars become numbers, a non-finite number null."""
        line = json.dumps(plain(record), allow_nan=False)
        with open(self._file, "a") as file:
            file.write(line + "\n")

    def discard_beyond(self, step: int) -> int:
        """Move lines of steps after ``step``, and broken lines, to the discarded file.

        Returns the number of lines moved.
        """
        if not self._file.exists():
            return 0
        lines = self._file.read_text(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        discarded = [line for line in lines if line and _step_of(line) > step]
        if discarded:
            name = self.discarded_name
            earlier = self.folder.read_text(name) if self.folder.exists(name) else ""
            # First the copy, then the removal: a crash between them repeats lines but loses none.
            self.folder.write_text(name, earlier + "".join(line + "\n" for line in discarded))
            _replace(self._file, "".join(line + "\n" for line in kept))
            self.upload()
        return len(discarded)

    @property
    def is_local(self) -> bool:
        """Whether the file itself is written, and not a copy."""
        return self.folder.local is not None

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self._file.stat().st_size

    @property
    def discarded_name(self) -> str:
        """Name of the file that receives discarded lines."""
        return self.name.removesuffix(".jsonl") + ".discarded.jsonl"

    def upload(self) -> None:
        """Write the whole file into a remote run folder; does nothing for a local one."""
        if self.folder.local is None:
            self.folder.write_text(self.name, self._file.read_text())


def require_size(folder: Folder, name: str, most: int = LARGEST_OBJECT) -> None:
    """Raise BrokenFile for a local file that is larger than any run writes it: it is read whole."""
    try:
        size = 0 if folder.local is None else (folder.local / name).stat().st_size
    except (OSError, ValueError):
        return  # Reading it says why.
    if size > most:
        where = f"{folder.path}/{name}"
        raise BrokenFile(f"{where} has {size:,} bytes, expected at most {most:,}; {RESTORE}")


def read_bounded(path: Path, most: int = LARGEST_OBJECT) -> bytes:
    """Read a file of somebody's that is to be read whole.

    Raises OSError for what is no file, which may never end (a pipe, ``/dev/zero``), and for a file
    of more than ``most`` bytes.
    """
    with contextlib.ExitStack() as opened:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        opened.callback(os.close, descriptor)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            kind = "folder" if stat.S_ISDIR(info.st_mode) else "device or pipe"
            raise OSError(f"{path} is a {kind}, and no file")
        if info.st_size > most:
            raise OSError(f"{path} has {info.st_size:,} bytes, expected at most {most:,}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most + 1)


def open_own(path: str | Path) -> BinaryIO:
    """Open a file to lock and append to; it is made where there is none.

    Raises OSError for a link, through which a file of somebody else would be written, and for what
    is no file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"{path} is a link, and is not written to; remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is a device or pipe, and no file; remove it")
    return open(descriptor, "a+b")


def read_object(folder: Folder, name: str) -> dict[str, Any]:
    """Read a file that is one JSON object. Raises BrokenFile, also where there is no such file."""
    where = f"{folder.path}/{name}"
    require_size(folder, name)
    try:
        value = json.loads(folder.read_text(name))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFile(f"{where} cannot be read ({_why(error)}); {RESTORE}") from None
    if not isinstance(value, dict):
        raise BrokenFile(f"{where} is a {type(value).__name__} and no JSON object; {RESTORE}")
    return value


RESTORE = "restore it from a copy, or remove it if it is not of this run"


def read_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    """Read all records of a file; [] if there is no file.

    A last line that is cut off (a crash, or a write in progress) is left out. Raises BrokenFile for
    any other line that is no JSON object.
    """
    if not folder.exists(name):
        return []
    require_size(folder, name, LARGEST_RECORDS)
    try:
        lines = folder.read_text(name).splitlines()
    except (OSError, ValueError) as error:
        message = f"{folder.path}/{name} cannot be read ({_why(error)}); {RESTORE}"
        raise BrokenFile(message) from None
    records = []
    for number, line in enumerate(lines, start=1):
        reason = "no object"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record, reason = None, _why(error)
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines) or reason == "no object":
            raise BrokenFile(
                f"{folder.path}/{name}, line {number}, is not JSON ({reason}); remove that line, "
                "or the file if it is not of this run"
            )
    return records


def _why(error: Exception) -> str:
    """Why a file or a line was not read, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition("\n")[0][:200] or type(error).__name__


def plain(value: Any) -> Any:
    """Convert ``value`` to JSON's types: numpy and torch scalars become Python numbers.

    Non-finite numbers become None, since JSON has none.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


LARGEST_INTEGER, LARGEST_NUMBER = 2**63 - 1, 1e18
LARGEST_SETTING, SMALLEST_SETTING = 1e9, 1e-30
"""Of a setting that is a number: beyond them float32 has no such number, or nobody means it."""


def require_sized(value: float) -> None:
    """ValueError for a finite number that is larger or smaller than any setting is meant to be."""
    if math.isfinite(value) and value and not SMALLEST_SETTING <= abs(value) <= LARGEST_SETTING:
        raise ValueError(
            f"is {value:g}; expected 0 or a size from {SMALLEST_SETTING:g} to {LARGEST_SETTING:g}"
        )


def require_plain(value: Any) -> None:
    """ValueError for a value that no setting has, however deep it lies in lists and mappings.

    Numbers are finite and of a size that 64 bits and a person can tell; text has no NUL and no half
    of a surrogate pair, which neither a file name nor UTF-8 can hold. Inside lists and mappings
    there are only values that JSON has, as they go to services, engines and files.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, set | frozenset) and one is not value:
            raise ValueError("has a set, which is no value of JSON; expected a list")
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, float) and not abs(one) <= LARGEST_NUMBER:  # NaN is in no order.
            raise ValueError(f"is {one:g}; expected a finite number up to {LARGEST_NUMBER:g}")
        elif isinstance(one, int) and abs(one) > LARGEST_INTEGER:
            raise ValueError("is an integer of more than 64 bits; expected a smaller one")
        elif isinstance(one, str) and ("\0" in one or any("\ud800" <= c <= "\udfff" for c in one)):
            raise ValueError("has a character that no text may have (NUL or half a surrogate pair)")
        elif isinstance(one, date | bytes) and one is not value:
            kind = "bytes" if isinstance(one, bytes) else f"the date {one}"
            raise ValueError(f"has {kind}, which is no value of JSON; put it in quotes")


def _step_of(line: str) -> float:
    """Return a line's step; infinity if the line is broken or has no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _end_last_line(path: Path) -> None:
    """End a half line that a crash has left, so that the next record starts on a new line."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        _replace(path, data.decode(errors="replace") + "\n")


def _replace(path: Path, text: str) -> None:
    # Written beside its place and renamed, so that a crash leaves the old file or the new one.
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)  # Which may be a link.
    temporary.write_text(text)
    os.replace(temporary, path)
