"""What a command shows that data has a part in, and its end: progress of the reading of prompts, an
error without a sentence of its own, an output that nobody reads.
"""

import os
import re
import select
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from raystill.base import object_store
from raystill.base.errors import LONGEST_PROBLEM, MOST_CHARACTERS, RunError, shown
from raystill.base.redact import redact

if TYPE_CHECKING:
    from rich.console import (
        Console,
        ConsoleOptions,
        ConsoleRenderable,
        RenderableType,
        RenderResult,
    )

    from raystill.base.run_folder import RunFolder

BAR_AFTER_S = 0.5
LINE_AFTER_S = 2.0
LONGEST_USAGE = 3000
COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")
MOST_OF_TABLES = 3800
"""Characters of tables that are printed together, without their colours."""


def unexpected(error: BaseException) -> str:
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


def print_lines(lines: Iterable[str], most: int = MOST_CHARACTERS, told_by: str = "--json") -> None:
    """Print lines as `shown`, until they have ``most`` characters together; the rest is counted.

    A line keeps the spaces that it begins with. ``told_by``: what tells more than is printed.
    """
    left, more = most, 0
    for line in lines:
        text = shown(line, LONGEST_PROBLEM)
        left -= len(text) + 1
        if left < 0:
            more += 1
        else:
            print(text)
    if more:
        print(f"... and {more:,} more lines; {told_by} tells more of them")


def printable(text: str) -> str:
    """``text`` without secrets; control characters are named, but for its line ends."""
    longest = 10 * len(text) + 1  # A character is named by ten at most.
    lines = redact(text).split("\n")  # Whole: a secret may have several lines.
    return "\n".join(line if line.isprintable() else shown(line, longest) for line in lines)


class _Named:
    """A thing that rich draws, in whose text escapes are named: colours are then rich's alone."""

    def __init__(self, drawn: "RenderableType") -> None:
        self._drawn = drawn

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        for segment in console.render(self._drawn, options):
            yield segment._replace(text=segment.text.replace("\x1b", r"\x1b"))


class _NameEscapes:
    """rich's hook for all that a console prints."""

    def process_renderables(self, drawn: "list[ConsoleRenderable]") -> "list[ConsoleRenderable]":
        return [_Named(one) for one in drawn]


@contextmanager
def bounded_tables(console: "Console") -> Iterator[None]:
    """What is printed to ``console`` within is shown at the end, if nothing fails.

    It is bounded, and without control characters of data: a text of a model may neither hide itself
    nor move the cursor. Lines lose the spaces at their end. On a terminal rich's colours stay.
    """
    console.push_render_hook(_NameEscapes())
    try:
        with console.capture() as captured:
            yield
    finally:
        console.pop_render_hook()
    _print_tables(console, captured.get())


def _print_tables(console: "Console", text: str) -> None:
    left, more = MOST_OF_TABLES, 0
    clean = text if console.is_terminal else printable(text)  # At once: each look takes a while.
    for line in clean.removesuffix("\n").split("\n"):
        parts = COLOURS.split(line) if console.is_terminal else [line]
        named = map(printable, parts[::2]) if console.is_terminal else parts
        plain = "".join(named).rstrip()
        left -= len(plain) + 1
        if left < 0:
            more += 1
        elif console.is_terminal:
            shown_parts = [part if i % 2 else printable(part) for i, part in enumerate(parts)]
            console.file.write("".join(shown_parts).rstrip() + "\n")
        else:
            console.file.write(plain + "\n")
    if more:
        console.file.write(f"... and {more:,} more lines\n")


def open_named(path: str) -> "RunFolder":
    """The folder at a path or URI. Raises RunError where none can be there, or nobody answers."""
    from raystill.base.run_folder import RunFolder, require_path  # Late: it imports pyarrow.

    folder = RunFolder(require_path(path))
    if folder.is_local:
        return folder

    def ask() -> None:
        if not folder.root:
            raise ValueError("it names no bucket")
        folder.exists()

    name = shown(path, 200)
    try:
        object_store.in_time(ask)
    except TimeoutError:
        raise RunError(
            f"{name} did not answer in {object_store.ANSWER_WAIT_S:.0f} s; see to the address, the "
            "connection and the credentials, and run this again"
        ) from None
    except Exception as error:  # Of every file system its own kind.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{name} cannot be opened ({shown(reason, 300)}); name a folder, or a URI such as "
            "s3://bucket/folder that can be reached"
        ) from error
    return folder


def told_usage(error: Any) -> int:
    """Show what is wrong with a command line, which anybody may have written; the exit status."""
    text = error.message
    error.message = printable(text) if len(text) <= LONGEST_USAGE else shown(text)
    error.show()
    return int(error.exit_code)


def leave(code: int) -> NoReturn:
    """End this process; at once where a thread of a failed run is still inside a call to Ray, whose
    clean-up at exit would crash under it, or inside one to an object store that does not answer.
    """
    job = sys.modules.get("raystill.cluster.job.run")
    waiting = any(thread.name == object_store.WAITING for thread in threading.enumerate())
    if waiting or (job is not None and job.threads_left()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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
