"""A command and the person before it: progress of the reading of prompts, an error that has no
sentence of its own, an output that nobody reads.
"""

import os
import select
import sys
import tempfile
import time
import traceback
from types import TracebackType
from typing import Any, TextIO

from raystill.base.errors import shown
from raystill.base.redact import redact

BAR_AFTER_S = 0.5
LINE_AFTER_S = 2.0


def unexpected(error: Exception) -> str:
    """A sentence on an error that has none; its traceback is in a file that the sentence names."""
    text = redact("".join(traceback.format_exception(error)))
    with tempfile.NamedTemporaryFile(
        "w", prefix="raystill-", suffix=".log", delete=False, errors="backslashreplace"
    ) as file:
        file.write(text)
    reason = shown(f"{type(error).__name__}: {error}")
    return f"unexpected: {reason}; the whole story is in {file.name}, please report it"


def nobody_reads(stream: TextIO) -> bool:
    """Whether the stream is a pipe whose reader has closed it, as ``| head -1`` does."""
    try:
        descriptor = stream.fileno()
    except OSError:  # A test's stand-in.
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # Of no event: an error is reported always.
    return bool(poll.poll(0))


class ReadingProgress:
    """How far the reading of prompts is, on stderr: a bar on a terminal, one line elsewhere.

    Nothing is shown for a run that is read at once, and nothing goes to stdout, which a program may
    read. A ``Progress`` of ``datasets.prompts``; as a context manager it removes its bar.

    with ReadingProgress() as progress:
        read_prompts(prompts, progress)
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._on_terminal = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb")
        self._has_line = False
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Show that ``done`` prompts of ``total`` (None: unknown) have passed this phase."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        waited_s = now - self._started
        if self._on_terminal:
            if waited_s >= BAR_AFTER_S:
                self._show_bar(phase, done, total)
        elif waited_s >= LINE_AFTER_S and done != total and not self._has_line:
            self._has_line = True
            of_total = "" if total is None else f" of {total}"
            print(f"{phase}: {done}{of_total} so far", file=sys.stderr, flush=True)

    def _show_bar(self, phase: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(phase, total=total)
            self._phase = phase
        self._bar.update(self._task, completed=done)


def _new_bar() -> Any:
    # Late: a check of few prompts needs none, and rich takes a tenth of a second.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
