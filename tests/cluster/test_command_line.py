"""The command line itself: help, wrong words, JSON, colour, and what ends a command from outside.

Nearly all call ``driver.main`` in this process. What only a process can show (its imports, a closed
pipe, Ctrl-C, completion) starts ``driver.py``.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import driver
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.commands import store as store_commands
from raystill.cluster.job import run as job
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin
from raystill.datasets.store.store import TeacherStore
from tests.cluster.test_driver import ROOT, run_file
from tests.datasets.test_store import path_of, publish

__all__ = ["run_file"]  # The fixture of a sound run file.

COMMANDS = (
    *("run", "check", "calibrate", "submit", "report", "draft"),
    *("lineage", "revoke", "fields", "store"),
)
STORE_COMMANDS = ("list", "verify", "compact", "prune", "export", "import")
NOT_FOR_HELP = ("pydantic", "numpy", "pyarrow", "yaml", "rich", "jinja2")


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    status = driver.main(words)
    return (status, *capsys.readouterr())


def answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    """The one JSON value that a command prints; nothing else is on standard output."""
    ended, out, err = call(capsys, *words)
    assert ended == status, err
    return json.loads(out)


# Help.


def test_help_names_the_commands_and_the_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "--help")
    assert (status, err) == (0, "")
    for word in (*COMMANDS, "130/143", "refused before anything was spent", "resumes"):
        assert word in out
    assert call(capsys, "-h") == (0, out, "")
    assert "--set A.B=C" in call(capsys, "run", "-h")[1]


@pytest.mark.parametrize(
    "words", [[], *([name] for name in COMMANDS), *(["store", name] for name in STORE_COMMANDS)]
)
def test_help_fits_80_columns_and_cuts_no_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(capsys, *words, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in re.sub(r"[\[{](ARGS|RUN_FOLDER|FILES)[\]}]\.{3}", "", out)


@pytest.mark.parametrize("words", [[], ["store"]])
def test_without_a_command_there_is_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *words)
    assert (status, out) == (driver.EXIT_REFUSED, "")
    for name in STORE_COMMANDS if words else COMMANDS:
        assert f"\n  {name} " in err


def test_the_version_needs_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    from raystill import __version__

    assert call(capsys, "--version") == (0, f"raystill {__version__}\n", "")


def test_help_imports_next_to_nothing() -> None:
    script = (
        "import sys, driver\n"
        "assert driver.main(['--help']) == 0\n"
        f"print([name for name in {NOT_FOR_HELP} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# Wrong words.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["store", "verfy"], "No such command 'verfy'. Did you mean 'verify'?"),
        (["walk"], "No such command 'walk'"),
        (["run"], "Missing argument 'RUN.yaml'"),
        (["report"], "Missing argument 'RUN_FOLDER'"),
        (["submit", "a.yaml"], "Missing option '--address'"),
        (["check", "a.yaml", "--fast"], "No such option: --fast"),
        (["check", "a.yaml", "--stat"], "No such option: --stat"),  # No abbreviations.
        (["check", "a.yaml", "--set"], "Option '--set' requires an argument"),
        (["check", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["calibrate", "a.yaml", "--positions", "0"], "'--positions': Input should be greater"),
        (["calibrate", "a.yaml", "--cosine", "1"], "'--cosine': 1 is not between 0 and 1"),
        (["calibrate", "a.yaml", "--cosine", "x"], "'--cosine': Input should be a valid number"),
        (["submit", "a.yaml", "--address", "http://a", "--stop-wait-s", "x"], "'--stop-wait-s'"),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *words)
    assert (status, out) == (driver.EXIT_REFUSED, "")
    assert f"Error: {said}" in err or f"Error: Invalid value for {said}" in err or said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4


# Which program.


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("driver.py", "python driver.py"),
        ("{here}/driver.py", "python driver.py"),
        ("{here}/sub folder/driver.py", "python 'sub folder/driver.py'"),
        ("/opt/raystill/driver.py", "python /opt/raystill/driver.py"),
        ("/home/me/.venv/bin/raystill", "raystill"),
        ("pytest", "python driver.py"),
    ],
)
def test_a_command_to_be_typed_again_begins_as_it_was_typed(
    typed: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [typed.format(here=tmp_path)])
    assert driver.program() == shown
    resume = driver.resume_command("a run.yaml", ["teacher.cpu_cores=[0, 1]"], skip_probe=True)
    assert resume == f"{shown} run 'a run.yaml' --set 'teacher.cpu_cores=[0, 1]' --skip-probe"


def test_a_shell_completes_the_installed_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--install-completion" not in call(capsys, "--help")[1]  # Of ``python driver.py``.
    words = {"_RAYSTILL_COMPLETE": "complete_bash", "COMP_WORDS": "raystill c", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = '/usr/bin/raystill'\nimport driver; driver.command()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **words},
    )
    assert (done.stdout.split(), done.stderr) == (["check", "calibrate"], "")


# fields


def test_fields_lists_every_setting_or_those_of_a_section(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, everything, _ = call(capsys, "fields")
    for name in ("teacher.model", "training.learning_rate", "stream.max_rows_ahead"):
        assert f"  {name} " in everything
    assert "another run" in everything
    _, section, _ = call(capsys, "fields", "teacher")
    assert "  teacher.model " in section and "  training." not in section
    _, below, _ = call(capsys, "fields", "teacher.sampling")
    assert "  teacher.sampling.max_tokens " in below and "  teacher.model " not in below


def test_fields_are_there_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    names = [field["name"] for field in answer(capsys, "fields", "--json")]
    assert {"teacher.model", "training.learning_rate"} <= set(names)
    few = answer(capsys, "fields", "teacher.sampling", "--json")
    assert all(field["name"].startswith("teacher.sampling.") for field in few)
    schema = answer(capsys, "fields", "--schema")
    assert "teacher" in schema["properties"]


def test_a_section_that_does_not_exist_is_refused_with_the_one_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = call(capsys, "fields", "teachr")
    assert (status, out) == (driver.EXIT_REFUSED, "")
    assert "did you mean teacher?" in err


# check


def cluster_says(monkeypatch: pytest.MonkeyPatch, *problems: Problem) -> list[str]:
    """Stand in for the cluster; what is asked of it is noted in the list."""
    asked = []

    @contextmanager
    def connected(*_: object, for_check: bool) -> Iterator[None]:
        asked.append("connected")
        yield

    def check_on_cluster(_: object) -> list[Problem]:
        print("asked for: CPU 2")
        return list(problems)

    monkeypatch.setattr(job, "connected", connected)
    monkeypatch.setattr(job, "check_on_cluster", check_on_cluster)
    return asked


NO_ROOM = Problem("training.num_workers", "the cluster cannot grow")


def test_check_tells_a_program_what_the_run_will_do(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_says(monkeypatch)
    told = answer(capsys, "check", run_file, "--json")
    assert told["problems"] == [] and told["error"] is None
    assert (told["train_rows"], told["held_out_rows"], told["steps"]) == (6, 2, 2)
    assert told["run_folder"] == str(Path("runs/sound").absolute())


def test_check_tells_a_program_of_problems_and_of_a_cluster_that_fails(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_says(monkeypatch, NO_ROOM)
    words = ["check", run_file, "--json", "--set", "prompts.path=missing.jsonl"]
    told = answer(capsys, *words, status=driver.EXIT_REFUSED)
    missing, room = told["problems"]
    assert missing["where"] == "prompts.path" and "no such file" in missing["message"]
    assert room == {"where": NO_ROOM.where, "message": NO_ROOM.message}
    for error, status in (
        (RunError("no cluster at s3://me:secret@there"), driver.EXIT_FAILED),
        (ConfigError([NO_ROOM]), driver.EXIT_REFUSED),
    ):
        monkeypatch.setattr(job, "connected", fail_with(error))
        told = answer(capsys, "check", run_file, "--json", status=status)
        if status == driver.EXIT_FAILED:
            assert (told["problems"], told["error"]) == ([], "no cluster at s3://***@there")
        else:
            assert [problem["where"] for problem in told["problems"]] == [NO_ROOM.where]


def fail_with(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_what_needs_no_cluster_is_told_before_the_cluster_is_asked(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ["--set", "prompts.path=missing.jsonl"]
    monkeypatch.setattr(job, "connected", fail_with(RunError("no cluster")))
    status, _, err = call(capsys, "check", run_file, *missing)
    assert status == driver.EXIT_FAILED
    assert err.index("no such file") < err.index("error: no cluster")
    cluster_says(monkeypatch, NO_ROOM)
    status, out, err = call(capsys, "check", run_file, *missing)
    assert status == driver.EXIT_REFUSED
    assert err.index("no such file") < err.index(str(NO_ROOM))
    assert "no problems found" not in out


def test_where_the_run_file_is_wrong_no_cluster_is_asked(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cluster_says(monkeypatch, NO_ROOM)
    wrong = [["--set", "signal.topk=8"], ["--set", "seed=x"]]
    for words in ([run_file, *wrong[0]], [run_file, *wrong[1], "--json"], ["nowhere.yaml"]):
        assert call(capsys, "check", *words)[0] == driver.EXIT_REFUSED
    assert call(capsys, "check", run_file, "--static")[0] == 0
    assert asked == []


# report


def finished(folder: str, **totals: object) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "summary.json").write_text(json.dumps({"status": "completed", **totals}))


def test_report_gives_programs_the_totals_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished("runs/a", rows_trained=6, perplexity=float("inf"))
    finished("runs/b", rows_trained=7)
    (told,) = answer(capsys, "report", "runs/a", "--json")["runs"]
    assert told == {
        "run_folder": str(tmp_path / "runs/a"),
        "status": "completed",
        "rows_trained": 6,
        "perplexity": None,  # JSON has no infinity.
    }
    both = answer(capsys, "report", "--json", "runs/a", "runs/b")["runs"]
    assert [run["rows_trained"] for run in both] == [6, 7]
    status, out, err = call(capsys, "report", "runs/a", "runs/none", "--json")
    assert (status, out) == (driver.EXIT_FAILED, "")
    assert err.startswith("error: ") and "runs/none has no summary.json" in err


def test_report_writes_a_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("seed: 7\n")
    status, out, _ = call(capsys, "report", "runs/a")
    assert (status, Path("runs/a/report.html").exists()) == (0, True)
    assert "no start of this run has ended yet" in out
    assert out.splitlines()[-1] == "The page: runs/a/report.html"
    _, out, _ = call(capsys, "report", "runs/a", "runs/a")
    assert out.splitlines()[-1] == "The page: runs/a/comparison.html"
    _, out, _ = call(capsys, "report", "runs/a", "--html", "there/both.html")
    assert out.splitlines()[-1] == "The page: there/both.html"
    assert "compared" in Path("runs/a/comparison.html").read_text()
    assert "compared" not in Path("there/both.html").read_text()
    Path("file").write_text("")
    status, out, err = call(capsys, "report", "runs/a", "--html", "file/x.html")
    assert (status, out) == (driver.EXIT_FAILED, "")
    assert "the page cannot be written" in err and "--html FILE" in err
    monkeypatch.setattr(RunFolder, "write_text", unwritable)
    status, out, _ = call(capsys, "report", "runs/a")
    assert status == 0 and "the page cannot be written" in out


def unwritable(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


# store


def test_store_tells_programs_what_it_holds_and_does(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(store, [0, 1, 2])
    torn = path_of(store, publish(store, [2, 3]))
    told = answer(capsys, "store", "list", store.path, "--json")
    (answers,) = told["answers"]
    assert (told["rows"], told["duplicates"], told["refused"]) == (5, 1, [])
    assert (answers["teacher"], answers["segments"], answers["rows"]) == ("models/teacher", 2, 5)
    assert answers["signal"] == {"kind": "topk", "width": 16}
    assert answer(capsys, "store", "verify", store.path, "--json")["segments"] == 2
    torn.write_bytes(torn.read_bytes()[:-9])
    damaged = store_commands.EXIT_DAMAGED
    told = answer(capsys, "store", "verify", store.path, "--json", status=damaged)
    assert [(one["segment"], one["kind"]) for one in told["refused"]] == [(torn.name, "damaged")]
    dry = ["store", "prune", store.path, "--json", "--dry-run"]
    told = answer(capsys, *dry, status=call(capsys, *dry[:3], "--dry-run")[0])
    assert (told["dry_run"], len(told["removed"])) == (True, 1) and torn.exists()
    told = answer(capsys, "store", "prune", store.path, "--json")
    assert (told["dry_run"], len(told["removed"]), told["refused"]) == (False, 1, [])
    assert not torn.exists()
    told = answer(capsys, "store", "compact", store.path, "--json")
    assert told["duplicates"] == 0 and told["refused"] == []


@pytest.mark.parametrize("name", [name for name in STORE_COMMANDS if name != "import"])
def test_a_store_that_is_not_there_is_named_and_nothing_is_printed_for_programs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(tmp_path / "out")] if name == "export" else []
    status, out, err = call(capsys, "store", name, str(tmp_path / "none"), *more, "--json")
    assert (status, out) == (driver.EXIT_FAILED, "")
    assert err.startswith("error: there is no teacher store at ")


def test_brackets_in_a_name_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "models/[/red]:smile:[bold]x"
    origin = Origin("abc", name, "vllm", "1", "float32", 300, Signal("text"))
    store_commands._print_origins({origin: [1, 2, 3]})
    assert name in capsys.readouterr().out
    _, _, err = call(capsys, "report", "runs/[/red][bold]x")
    assert "runs/[/red][bold]x has no summary.json" in err
    _, _, err = call(capsys, "check", "[/red].yaml", "[bold]")
    assert "([bold])" in err


# Colour.


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"),
    [(True, None, True), (True, "1", False), (False, None, False)],
)
def test_colour_is_for_terminals_and_for_those_who_want_it(
    terminal: bool,
    no_color: str | None,
    coloured: bool,
    run_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    _, out, _ = call(capsys, "check", run_file, "--static")
    _, _, err = call(capsys, "report", "runs/none")
    assert "check: no problems found" in out and "error:" in err
    assert ("\x1b[" in out, "\x1b[" in err) == (coloured, coloured)


# What ends a command from outside.


@pytest.mark.parametrize("words", [["list"], ["verify"], ["compact"], ["prune"]])
def test_ctrl_c_ends_a_command_quietly(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_commands, "store_command", fail_with(KeyboardInterrupt()))
    assert call(capsys, "store", *words, str(tmp_path)) == (128 + signal.SIGINT, "", "")


def test_ctrl_c_ends_a_process_quietly(tmp_path: Path) -> None:
    """The command has begun when it is interrupted: it says so, and then takes its time."""
    code = (
        "import pathlib, signal, sys, time, driver\n"
        # A shell without job control starts what it puts into the background deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from raystill.cluster.commands import store as commands\n"
        "def wait(*_, **__):\n"
        "    pathlib.Path(sys.argv[1]).touch()\n"
        "    time.sleep(60)\n"
        "commands.store_command = wait\n"
        "driver.leave(driver.main(['store', 'list', '.']))\n"
    )
    begun = tmp_path / "begun"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(begun)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)
    assert (process.returncode, *shown) == (128 + signal.SIGINT, b"", b"")


@pytest.mark.parametrize("words", [["fields"], ["check", "nowhere.yaml"]])
def test_a_reader_that_has_left_ends_a_process_quietly(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    refused = "check" in words  # It tells its problems on standard error.
    process = subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), *words],
        stdout=writing,
        stderr=writing if refused else subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert process.returncode == driver.EXIT_CLOSED_PIPE
    assert not process.stderr


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Ray's"), EOFError("of a file")])
def test_an_error_that_a_terminal_can_cause_is_shown_where_it_comes_from_elsewhere(
    error: Exception,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # Typer replaces both.
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(store_commands, "store_command", fail_with(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        driver.main(["store", "list", str(tmp_path)])
