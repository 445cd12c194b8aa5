"""A user's function in a process of its own: values, errors, exits, crashes, loops, prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raystill.base.user_function import Code, Result, UserFunction, parse

HOSTILE = """
import dataclasses, os, re, signal, subprocess, sys, time

@dataclasses.dataclass
class Rule:
    least: int

def check(prompt, answer, row):
    print("noise", flush=True)
    os.write(1, b'{"value": 1.0}\\n')
    if answer == "bool":
        return len(prompt) > Rule(2).least
    if answer == "number":
        return row["expected"] / 2
    if answer == "numpy":
        import numpy
        return numpy.bool_(True)
    if answer == "none":
        return None
    if answer == "nan":
        return float("nan")
    if answer == "raise":
        raise KeyError("no such\\ncolumn")
    if answer == "exit":
        sys.exit(3)
    if answer == "hard exit":
        os._exit(7)
    if answer == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if answer == "input":
        return len(sys.stdin.read()) == 0
    if answer == "loop":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(row["pids"], "w").write(f"{os.getpid()} {child.pid}")
        while True:
            pass
    if answer == "regex":  # It keeps the interpreter's lock.
        re.match(r"(a+)+$", "a" * 40 + "b")
"""


def code(text: str = HOSTILE, name: str = "check") -> Code:
    return Code(name, file="checks.py", text=text)


def call(answer: str, row: dict[str, Any] | None = None, timeout_s: float = 20) -> Result:
    with UserFunction(code(), timeout_s) as function:
        return function.call("a prompt", answer, row or {})


def test_values_come_back_whatever_the_function_prints() -> None:
    assert call("bool") == Result(True)
    assert call("number", {"expected": 5}) == Result(2.5)
    assert call("numpy") == Result(True)
    assert call("input") == Result(True)  # Nobody types anything.


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("none", "returned None; expected true, false or a finite number"),
        ("nan", "returned nan; expected"),
        ("raise", "KeyError: 'no such\\ncolumn'"),
        ("exit", "SystemExit: 3"),
        ("hard exit", "its process ended (exit status 7)"),
        ("crash", "its process ended (signal 11)"),
    ],
)
def test_what_goes_wrong_is_the_answers_error_and_the_next_one_is_checked(
    answer: str, sentence: str
) -> None:
    with UserFunction(code(), 20) as function:
        assert sentence in function.call("a prompt", answer, {}).error
        assert function.call("a prompt", "bool", {}) == Result(True)


def gone(pid: int) -> bool:
    """Whether a process is no more, or is only waited for."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_an_endless_loop_ends_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with UserFunction(code(), 3) as function:
        began = time.monotonic()
        result = function.call("p", "loop", {"pids": str(pids)})
        assert time.monotonic() - began < 15
        assert result == Result(error="took longer than 3 s", timed_out=True)
        assert function.call("a prompt", "bool", {}) == Result(True)
    deadline = time.monotonic() + 10
    while not all(gone(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_function_ends_with_a_caller_that_was_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    caller = (
        "import sys\n"
        "from raystill.base.user_function import Code, UserFunction\n"
        f"with UserFunction(Code('check', file='c.py', text={HOSTILE!r}), 600) as function:\n"
        f"    function.call('p', 'loop', {{'pids': {str(pids)!r}}})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", caller])
    try:
        deadline = time.monotonic() + 30
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    function, child = map(int, pids.read_text().split())
    os.kill(child, signal.SIGKILL)  # What a function starts ends with it only if it is told to.
    while not gone(function):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_regular_expression_that_never_ends_is_ended() -> None:
    assert call("regex", timeout_s=1).timed_out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def chekc(p, a, r): pass", "there is no 'check' in checks.py"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("def check(p, a, r)", "SyntaxError"),
        ("check = 3", "TypeError: 'check' is 3; expected a function"),
        ("import sys; sys.exit()", "SystemExit"),
    ],
)
def test_code_that_cannot_be_loaded_says_why(text: str, sentence: str) -> None:
    with UserFunction(code(text), 5) as function:
        assert sentence in function.load()
        assert sentence in function.call("p", "bool", {}).error


def test_a_module_is_imported_by_its_name() -> None:
    with UserFunction(Code("basename", module="posixpath"), 20) as function:
        assert function.load() == ""
        assert "returned 'c'" in function.call("a/b/c").error
    assert function._process is None


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        call("bool")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_function_is_named_by_a_file_or_a_module() -> None:
    assert parse("checks/json.py:is_valid") == ("checks/json.py", "is_valid")
    assert parse("C:/x.py:f") == ("C:/x.py", "f")
    assert parse("package.module:f") == ("package.module", "f")
    for wrong in ("is_valid", "a.py", "a.py:", "a.py:b c", "a-b:f", ":f", "a..b:f", "x/y:f"):
        with pytest.raises(ValueError, match=r"expected folder/file\.py:function"):
            parse(wrong)
