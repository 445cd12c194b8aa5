"""Where the chatter of Ray, Serve and vLLM goes: files in the run folder, never the terminal.

``redirect_output`` is for processes of our own (a teacher replica, a student worker): everything
they and their children write to standard output and error. ``quiet_driver`` is for the driver,
whose terminal belongs to the live view: libraries' loggers and whatever native code writes to
file descriptor 2 go to the file, while tracebacks and our own messages still reach the person.
"""

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from raystill.base.redact import redact_log_records
from raystill.base.run_folder import split_query

NOISY_LOGGERS = ("ray", "ray.serve", "ray.data", "ray.train", "vllm", "transformers", "py.warnings")
LINE_FORMAT = "%(asctime)s %(levelname)s %(where)s %(name)s: %(message)s"
_where: dict[str, object] = {"run": "-", "role": "-", "node": socket.gethostname()}


def say_where(**labels: object) -> str:
    """From now on the lines this process logs name these: run, role, node, step; what they name.

    ``key=value`` with spaces between, which log collectors read without being told.
    """
    global _where
    _where = _where | labels  # Other threads may be writing a line.
    return " ".join(f"{name}={value}" for name, value in _where.items())


class LineFormatter(logging.Formatter):
    """``LINE_FORMAT``, with what `say_where` was told."""

    def __init__(self) -> None:
        super().__init__(LINE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        record.where = say_where()
        return super().format(record)


def log_labelled(run: str, role: str, name: str | None = None) -> None:
    """Let a logger's lines (None: all loggers') go to standard error, labelled."""
    say_where(run=run, role=role)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    if name is None:  # It has a handler of its own.
        _reroute(logging.getLogger("transformers"), handler)


def run_name(path: str) -> str:
    """The run's name in log lines: the last part of its folder's path."""
    return split_query(path)[0].rstrip("/").rpartition("/")[2]


def redirect_output(path: str | os.PathLike[str]) -> Path:
    """Send this process's standard output and error, and its children's, to a file (appended).

    Works on the file descriptors, so native libraries and engine processes follow. Returns the
    file's path, for error messages that name it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for standard in (1, 2):
            os.dup2(descriptor, standard)
    finally:
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    redact_log_records()
    return target


def quiet_driver(path: str | os.PathLike[str]) -> Callable[[], None]:
    """Send libraries' log lines and native error output of this process to ``path``.

    ``sys.stderr`` keeps writing to the terminal. May be called again (a library that is imported
    later adds its handlers then); returns a function that undoes this call.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(target)
    handler.setFormatter(LineFormatter())
    undo = [_reroute(logging.getLogger(name), handler) for name in NOISY_LOGGERS]
    undo.append(redact_log_records())
    capture_was_off = warnings.showwarning is _PLAIN_SHOWWARNING
    logging.captureWarnings(True)
    undo.append(_redirect_native_errors(target))

    def restore() -> None:
        for step in reversed(undo):
            step()
        if capture_was_off:
            logging.captureWarnings(False)
        handler.close()

    return restore


def tail(path: str | os.PathLike[str], num_lines: int = 20) -> str:
    """The last lines of a log file, for an error message; a missing file gives ''."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])


_PLAIN_SHOWWARNING = warnings.showwarning


def _reroute(logger: logging.Logger, handler: logging.Handler) -> Callable[[], None]:
    """Make ``handler`` the logger's only one; returns the undoing."""
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers = [handler]
    logger.propagate = False

    def undo() -> None:
        logger.handlers, logger.propagate = handlers, propagate

    return undo


def _redirect_native_errors(target: Path) -> Callable[[], None]:
    """Point descriptor 2 at ``target`` while ``sys.stderr`` keeps the terminal."""
    try:
        on_terminal = sys.stderr.fileno() == 2
    except (AttributeError, OSError, ValueError):
        on_terminal = False
    if not on_terminal:  # Captured by a test runner, or already redirected.
        return lambda: None
    python_stderr = sys.stderr
    python_stderr.flush()
    terminal = os.dup(2)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    ours = open(terminal, "w", buffering=1, closefd=True)  # noqa: SIM115 - lives on as sys.stderr
    sys.stderr = ours

    def undo() -> None:
        ours.flush()
        os.dup2(terminal, 2)
        if sys.stderr is ours:
            sys.stderr = python_stderr
        ours.close()

    return undo
