"""The page while a run goes on: written again every so often, and what became of the run.

Consumes the run folder. ``status.json`` says what the other files cannot: that a driver is at work
on the run now, or that it failed, and why. A page is for people; whatever goes wrong with it is
said once and never ends a run.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raystill.base.errors import RunInUseError
from raystill.base.redact import redact
from raystill.base.run_folder import REPORT, STATUS, RunFolder
from raystill.cluster.report.page.page import page, write_page
from raystill.cluster.report.page.read import RunReader

EVERY_S = 60.0
MOST_SHARE = 0.02
"""Share of the driver's time that writing pages may take."""
LONGEST_ERROR = 2_000
ALIVE_S = 300.0
"""Seconds after its last sign from which on a driver counts as gone."""


class LivePage:
    """Writes a run's page beside the driver's main thread, which must stay free to see signals.

    ``tell`` is told once what goes wrong. ``look`` and ``wait`` are the main thread's.
    """

    def __init__(
        self,
        folder: RunFolder,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._tell = tell
        self._clock = clock
        self._reader = RunReader(folder)
        self._due = clock() + EVERY_S / 6
        self._told = False
        self._thread: threading.Thread | None = None
        self._began = time.time()
        self._record_running()

    def look(self) -> None:
        """Start writing the page where one is due: once a minute, less often where it takes long.

        Does not wait for it: the metrics of a hundred thousand steps take ten seconds to read.
        """
        if self._clock() >= self._due and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="page", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait for a page that is being written, so that it does not replace a later one."""
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        began = self._clock()
        self._try(self._write)
        wait_s = max(EVERY_S, (self._clock() - began) / MOST_SHARE)
        self._record_running(wait_s)
        self._due = self._clock() + wait_s

    def _record_running(self, next_look_s: float = EVERY_S) -> None:
        until = time.time() + next_look_s + ALIVE_S
        self._try(lambda: record_state(self._folder, "running", self._began, alive_until=until))

    def _write(self) -> None:
        self._folder.write_text(REPORT, page([self._reader.read()]))

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if not self._told:
                self._told = True
                self._tell(not_written(error))


@contextmanager
def failure_recorded(folder: RunFolder, tell: Callable[[str], None]) -> Iterator[None]:
    """Record that the run failed, and write its page, if the block raises; from its first moment.

    A Ctrl-C before anything listens for signals is recorded as a stop. Nothing is recorded where
    another driver is at work on the run.
    """
    try:
        yield
    except RunInUseError:
        raise
    except BaseException as error:
        said = redact(str(error) or type(error).__name__)[:LONGEST_ERROR]
        try:
            if isinstance(error, KeyboardInterrupt):
                record_state(folder, "stopped")
            else:
                record_state(folder, "failed", error=said)
            folder.write_text(REPORT, page([RunReader(folder).read()]))
        except Exception as also:
            tell(not_written(also))
        raise


def close_page(folder: RunFolder, stopped: bool, tell: Callable[[str], None]) -> None:
    """Record that a run was stopped or is complete, and write its page, from its summary too."""
    try:
        record_state(folder, "stopped" if stopped else "completed")
        write_page([folder])
    except Exception as error:
        tell(not_written(error))


def not_written(error: Exception) -> str:
    """The line for a page that cannot be written."""
    what = redact(f"{type(error).__name__}: {error}")
    return f"the page {REPORT} was not written ({what}); the run itself is not touched by that"


def record_state(
    folder: RunFolder, state: str, at: float | None = None, **more: float | str
) -> None:
    """Write ``status.json``: ``state``, ``time`` (since when; seconds since 1970), and ``more``.

    ``error`` says why a run failed. ``alive_until`` is when a running run's driver, if it has not
    said more by then, is gone.
    """
    record = {"state": state, "time": time.time() if at is None else at, **more}
    folder.write_text(STATUS, json.dumps(record) + "\n")
