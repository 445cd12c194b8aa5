"""Log files of a run: output of Ray, Serve and vLLM goes to the run folder, not to the terminal.

``redirect_output`` is for a process of this project, such as a teacher replica or a student worker.
It sends everything that the process and its children write to standard output and error to a file.

``quiet_driver`` is for the driver, whose terminal shows the live view. It sends log records of
libraries, and what native code writes to file descriptor 2, to a file. Tracebacks and messages of
this project still appear on the terminal.
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
    """Add labels (run, role, node, step) to every line that this process logs from now on.

    Returns all labels as ``key=value`` pairs with spaces between (logfmt), which log collectors
    parse without configuration.
    """
    global _where
    _where = _where | labels  # A new mapping: another thread may be formatting a line with the old.
    return " ".join(f"{name}={value}" for name, value in _where.items())


class LineFormatter(logging.Formatter):
    """Formats a record by ``LINE_FORMAT``, with the labels set by `say_where`."""

    def __init__(self) -> None:
        super().__init__(LINE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """Format one record as one line."""
        record.where = say_where()
        return super().format(record)


def log_labelled(run: str, role: str, name: str | None = None) -> None:
    """Send a logger's lines to standard error, with labels. ``name`` None: those of all loggers."""
    say_where(run=run, role=role)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    if name is None:  # transformers has a handler of its own and does not propagate to the root.
        _reroute(logging.getLogger("transformers"), handler)


def run_name(path: str) -> str:
    """The run's name in log lines: the last part of its folder's path."""
    return split_query(path)[0].rstrip("/").rpartition("/")[2]


def redirect_output(path: str | os.PathLike[str]) -> Path:
    """Append standard output and error of this process and of its children to a file.

    Replaces the file descriptors, so that native libraries and engine processes are included.
    Returns the file's path, for error messages.
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


def write_line(text: str) -> None:
    """Write a line where `redirect_output` leads. Serve makes its own log of what is printed."""
    os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def quiet_driver(path: str | os.PathLike[str]) -> Callable[[], None]:
    """Send log records of libraries, and native output to standard error, to the file ``path``.

    ``sys.stderr`` keeps writing to the terminal. Call it again after a library was imported that
    adds its own log handlers. Returns a function that undoes this call.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(target)
    handler.setFormatter(LineFormatter())
    undo = [_reroute(logging.getLogger(name), handler) for name in NOISY_LOGGERS]
    undo.append(redact_log_records())
    # The logging module does not say whether it captures warnings.
    capture_was_off = warnings.showwarning is _PLAIN_SHOWWARNING
    logging.captureWarnings(True)
    undo.append(_redirect_native_errors(target))

    def restore() -> None:
        for step in reversed(undo):  # Each undoes to the state that the one before it left.
            step()
        if capture_was_off:
            logging.captureWarnings(False)
        handler.close()

    return restore


def tail(path: str | os.PathLike[str], num_lines: int = 20) -> str:
    """Return the last lines of a log file, for an error message; '' if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))  # Not a whole log, which may be large.
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])


_PLAIN_SHOWWARNING = warnings.showwarning


def _reroute(logger: logging.Logger, handler: logging.Handler) -> Callable[[], None]:
    """Make ``handler`` the logger's only handler. Returns a function that undoes it."""
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers = [handler]
    logger.propagate = False

    def undo() -> None:
        logger.handlers, logger.propagate = handlers, propagate

    return undo


def _redirect_native_errors(target: Path) -> Callable[[], None]:
    """Send file descriptor 2 to ``target`` while ``sys.stderr`` keeps the terminal.

    Returns a function that undoes it.
    """
    try:
        on_terminal = sys.stderr.fileno() == 2
    except (AttributeError, OSError, ValueError):
        on_terminal = False
    if not on_terminal:  # A test runner captures it, or it was redirected before.
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
