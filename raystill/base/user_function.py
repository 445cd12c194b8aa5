"""Calls a function of the user in a process of its own, with a time limit for each call.

An endless loop, an exit or a crash in it ends that process alone; the next call begins another.
Nothing that it prints gets into the answers, which come back on a pipe of their own. Imports the
standard library only, and so does the other process, which is this module run as a program.

Code of others that is called here has its limits too: `within` so many seconds, and `tried` once in
a copy of this process, where it may also need memory without end.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from raystill.base.personal import mask

LOAD_S = 60.0
"""Seconds in which its module must be imported."""
LONGEST_ERROR = 300
LONGEST_READ = 10 * LONGEST_ERROR
"""Characters of an error that are searched for personal data before it is cut."""
GRACE_S = 2.0  # Until a process that has closed its pipe is gone, and says how.
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux.


@dataclass(frozen=True)
class Code:
    """Where a function's code is: ``text`` of a file, or else an importable ``module``."""

    name: str
    module: str = ""
    file: str = ""
    text: str = ""

    @property
    def version(self) -> str:
        """A hash of the file's text; '' of a module, whose files are not known."""
        return sha256(self.text.encode()).hexdigest()[:12] if self.text else ""


def parse(function: str) -> tuple[str, str]:
    """(file or module, name of the function) of ``folder/file.py:name`` or ``package.module:name``.

    Raises ValueError for any other form.
    """
    place, _, name = function.rpartition(":")
    is_file = place.endswith(".py")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not name.isidentifier() or not (is_file or is_module):
        raise ValueError(
            f"is {function!r}; expected folder/file.py:function or package.module:function"
        )
    return place, name


@dataclass(frozen=True)
class Result:
    """What a call gave: a value, or the reason why there is none."""

    value: float | bool | None = None
    error: str = ""
    timed_out: bool = False


class TookTooLong(ValueError):
    """Code of others was still at work when its time was over."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in what needs more processor time; in the main thread only, as signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TookTooLong(f"takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def tried(work: Callable[[], object], seconds: int, num_bytes: int) -> str:
    """Run ``work`` in a copy of this process; '' where it ends, whatever it raises, else why not.

    A MemoryError that it raises itself, for what it would not hold, counts as one of too little.

    For what one thread does, mostly in plain Python: the copy has no other threads of this process.
    """
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()
            for stream in (1, 2):  # A library may say there that it has no memory left.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, now + num_bytes))
            work()
        except MemoryError:
            os._exit(3)
        except BaseException:  # This process meets it too, and says so.
            os._exit(0)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status in (3, -signal.SIGABRT):  # By which a library in Rust or C++ ends without memory.
        return f"needs more than {num_bytes >> 20:,} MiB of memory"
    return "" if status == 0 else f"takes more than {seconds} s"


class UserFunction:
    """A function of the user, called elsewhere. A context, at whose end its process is gone."""

    def __init__(self, code: Code, timeout_s: float, quiet: bool = False) -> None:
        """quiet: what it prints is not shown."""
        self._code = code
        self._stderr = subprocess.DEVNULL if quiet else None
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> "UserFunction":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def load(self) -> str:
        """Start the process and import the function there: '', or why that cannot be done."""
        path = [os.getcwd() if entry == "" else entry for entry in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raystill.base.user_function"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Whatever it starts ends with it.
        )
        return self._exchange(asdict(self._code), LOAD_S).error

    def call(self, *arguments: Any) -> Result:
        """Call it with arguments that JSON can hold. Raises nothing for what it does."""
        if self._process is None and (problem := self.load()):
            return Result(error=problem)
        return self._exchange(list(arguments), self._timeout_s)

    def _exchange(self, message: Any, timeout_s: float) -> Result:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(time.monotonic() + timeout_s)
        except BrokenPipeError:
            line = b""
        if line is None:
            self._end()
            return Result(error=f"took longer than {timeout_s:g} s", timed_out=True)
        if not line.endswith(b"\n"):
            return Result(error=f"its process ended ({self._end(GRACE_S)})")
        result = Result(**json.loads(line))
        if result.error and isinstance(message, dict):
            self._end()
        return result

    def _read_line(self, until: float) -> bytes | None:
        """The next line; a part of one, or nothing, where the pipe ended; None: no time is left."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            if not (more := os.read(pipe, 1 << 16)):
                return self._unread
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line + b"\n"

    def _end(self, grace_s: float = 0.0) -> str:
        """End the process and all that it has started; how it ended, in words."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return ""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if code is None:
            return "killed"
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def serve() -> None:
    """The other process: take the code, then arguments, a line each; answer each with a line."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    with os.fdopen(os.dup(0), "rb") as questions, os.fdopen(os.dup(1), "wb") as answers:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)  # What the function prints goes to the log.
        function: Callable[..., Any] | None = None
        for line in questions:
            message = json.loads(line)
            if function is None:
                loaded = attempt(lambda m=message: imported(Code(**m)))  # type: ignore[misc]
                function = None if isinstance(loaded, Result) else loaded
                reply = loaded if isinstance(loaded, Result) else Result()
            else:
                value = attempt(lambda f=function, m=message: f(*m))  # type: ignore[misc]
                reply = value if isinstance(value, Result) else as_result(value)
            answers.write(json.dumps(asdict(reply)).encode() + b"\n")
            answers.flush()


def attempt(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; a Result with the error where it raises, an exit included."""
    try:
        return work()
    except BaseException as error:
        try:
            text = str(error)
        except Exception:
            text = "an error that has no text"
        said = " ".join(f"{type(error).__name__}: {text}"[:LONGEST_READ].split())
        return Result(error=mask(said)[:LONGEST_ERROR])  # It may quote the row.


def imported(code: Code) -> Callable[..., Any]:
    """The function that ``code`` names. Raises what its module raises, TypeError if it is none."""
    if code.text:
        module = types.ModuleType("raystill_user_function")
        module.__file__ = code.file
        sys.modules[module.__name__] = module  # Data classes look for it there.
        exec(compile(code.text, code.file, "exec"), module.__dict__)
    else:
        module = importlib.import_module(code.module)
    if not hasattr(module, code.name):
        raise AttributeError(f"there is no {code.name!r} in {code.file or code.module}")
    function = getattr(module, code.name)
    if not callable(function):
        raise TypeError(f"{code.name!r} is {function!r:.60}; expected a function")
    return function


def as_result(value: Any) -> Result:
    """A value of a function as a result: true or false, a finite number, or an error."""
    if hasattr(value, "item") and not isinstance(value, bool | int | float):  # NumPy's.
        value = attempt(value.item)
    if isinstance(value, bool):
        return Result(value)
    if isinstance(value, int | float) and math.isfinite(value):
        return Result(float(value))
    shown = mask(f"{value!r:.{LONGEST_READ}}")[:60]
    return Result(error=f"returned {shown}; expected true, false or a finite number")


if __name__ == "__main__":
    serve()
