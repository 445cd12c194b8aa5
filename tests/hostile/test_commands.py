"""Every command on hostile paths, files and words: the table of single cases, and generated ones.

Each case has its exact exit status, and a word that a person needs. What `fuzz.py` found is here.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile.generators import KINDS
from tests.hostile.judge import SECRET, Case, call, faults, inside, judge, write
from tests.hostile.parts import json_of
from tests.hostile.places import EVALUATION, Bases

EXAMPLES = 5
"""Of each kind that the fuzzing command draws from, with a fixed seed."""
LONG, NUL, HALF = "x" * 300, "a\0b", "\udcff"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
REMOTE = ("://", "x://y", "s3://", f"s3://me:{SECRET}@bucket/x", "hdfs://\x1b")
NO_PATHS = {"NUL": NUL, "300": LONG, "half": HALF, "deep": "/".join(["y" * 200] * 30)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("hostile"))


Row = tuple[str, int, str, Case]
"""What it is called, its exit status, a word of what is told, and the case."""


def row(
    name: str, status: int, word: str, *words: str, base: str = "run_file", **files: Any
) -> Row:
    content = {key.replace("__", "/").replace("_dot_", "."): value for key, value in files.items()}
    return name, status, word, Case(words, content, base, frozenset({status}))


def on_paths() -> Iterator[Row]:
    """Paths that no folder has, for every command that takes one."""
    commands = {
        "report": ("report", "{}"),
        "report json": ("report", "--json", "{}"),
        "report two": ("report", ".", "{}"),
        "page": ("report", ".", "--html", "{}"),
        "list": ("store", "list", "{}"),
        "verify": ("store", "verify", "{}"),
        "prune": ("store", "prune", "{}"),
        "compact": ("store", "compact", "{}"),
        "export": ("store", "export", "{}", "out"),
        "import": ("store", "import", "{}", "prompts.jsonl", "--teacher", "sound.yaml"),
        "lineage": ("lineage", "{}"),
        "draft": ("draft", "{}"),
        "revoke": ("revoke", "{}", "--teacher", "abab"),
    }
    for command, words in commands.items():
        for kind, path in NO_PATHS.items():
            yield row(f"{command} {kind}", 1, "the path", *(w.format(path) for w in words))
    for command in ("report", "list", "lineage", "draft", "revoke"):
        for number, uri in enumerate(REMOTE):
            told = "lineage.json" if command == "lineage" else "cannot be opened"
            words = (word.format(uri) for word in commands[command])
            yield row(f"{command} URI {number}", 1, told, *words)
    for kind, path in NO_PATHS.items():
        yield row(f"out {kind}", 1, "the path", "store", "export", "store", path, base="store")
        to = ("revoke", "store", "--teacher", "abab", "--runs", path)
        yield row(f"runs {kind}", 1, "the path", *to, base="store")
        at = ("submit", "sound.yaml", "--address", "http://127.0.0.1:9", "--working-dir", path)
        yield row(f"shipped {kind}", 1, "the path", *at)


def on_words() -> Iterator[Row]:
    """Words that nobody types: shown, never sent, and not at full length."""
    for name, word in {
        "escape": ESCAPE,
        "long": "y" * 5000,
        "secret": SECRET,
        "half": HALF,
    }.items():
        yield row(f"command {name}", 2, "No such command", word)
        yield row(f"verb {name}", 2, "No such command", "store", word)
        yield row(f"option {name}", 2, "No such option", "check", f"--{word}")
        yield row(f"too many {name}", 2, "unexpected extra", "lineage", ".", word)
        yield row(f"number {name}", 2, "Input should be a valid", "draft", ".", "--k", word)
        yield row(f"section {name}", 2, "run file", "fields", word)
        yield row(f"format {name}", 1, "--format", "store", "export", "s", "o", "--format", word)
        yield row(f"backend {name}", 1, "--backend", "tasks", ".", "--task=x", f"--backend={word}")
        here = ("revoke", "store", f"--teacher={word}")
        yield row(f"teacher {name}", 1, "is no teacher", *here, base="store")


def on_addresses() -> Iterator[Row]:
    addresses = {
        "no brackets": ("http://[", 2),
        "no port": ("http://127.0.0.1:port", 1),
        "a port too high": ("http://127.0.0.1:99999999", 1),
        "no scheme": ("127.0.0.1:9", 2),
        "a file": ("file:///etc/passwd", 2),
        "empty": ("", 2),
        "no host": ("http://", 1),
        "a space": ("http://127.0.0.1:9/a b", 1),
        "an escape": (f"http://127.0.0.1:9/{ESCAPE}", 1),
        "letters": ("http://ä:9", 1),
        "half": (f"http://127.0.0.1:9/{HALF}", 1),
        "a secret": (f"http://me:{SECRET}@127.0.0.1:9", 1),
    }
    for name, (address, status) in addresses.items():
        words = ("submit", "sound.yaml", "--address", address)
        yield row(f"address: {name}", status, "--address", *words, **{"driver.py": b""})
    words = ("submit", "sound.yaml", "--address", "http://127.0.0.1:9", "--env", "NOWHERE\x1b")
    yield row("no variable", 2, "is not set here", *words, **{"driver.py": b""})
    words = ("submit", "sound.yaml", "--address", "http://127.0.0.1:9")
    yield row("no code", 2, "--working-dir", *words)


def on_runs() -> Iterator[Row]:
    """Run folders with files that are none, or hold more than anybody wants to see."""
    many = b"".join(json_of({**EVALUATION, "step": i}) + b"\n" for i in range(3000))
    checks = {
        f"check {i}{ESCAPE}": {"student": {"mean": 1, "low": 0, "high": 1}} for i in range(500)
    }
    answers = {
        "step": 0,
        "row": 0,
        "prompt": ESCAPE + "x" * 9000,
        "teacher": SECRET,
        "student": "\0",
    }
    files: dict[str, tuple[str, Any, int]] = {
        "pipe": ("summary.json", "pipe", 1),
        "device": ("summary.json", "link /dev/zero", 1),
        "loop": ("summary.json", "link summary.json", 0),
        "pipe of records": ("evaluation.jsonl", "pipe", 1),
        "device of records": ("answers.jsonl", "link /dev/zero", 1),
        "pipe of settings": ("config.yaml", "pipe", 0),
        "many evaluations": ("evaluation.jsonl", many, 0),
        "many checks": ("evaluation.jsonl", json_of({**EVALUATION, "checks": checks}) + b"\n", 0),
        "answers of escapes": ("answers.jsonl", json_of(answers) + b"\n", 0),
        "many tasks": (
            "tasks.json",
            json_of({"tasks": {str(i): {"a": {}} for i in range(900)}}),
            0,
        ),
        "tasks that are none": ("tasks.json", json_of({"tasks": [1]}), 0),
        "a status of escapes": ("status.json", json_of({"state": ESCAPE}), 0),
    }
    for name, (file, content, status) in files.items():
        yield row(name, status, "", "report", "run", base="run", **{f"run__{file}": content})
    lineages: dict[str, Any] = {
        "pipe": "pipe",
        "device": "link /dev/zero",
        "folder": "folder",
        "deep": b"[" * 100_000,
        "large": b'"' + b"x" * 5_000_000 + b'"',
        "half": json_of({"raystill_lineage": 1, "student": "\ud800", "models": {"\ud800": {}}}),
        "NaN": json_of({"raystill_lineage": float("nan"), "student": "a", "models": {"a": {}}}),
    }
    for name, content in lineages.items():
        file = {"run__student__lineage.json": content}
        yield row(f"lineage: {name}", 1, "lineage.json", "lineage", "run", base="run", **file)


def on_stores() -> Iterator[Row]:
    """Foreign things among the segments, answers that are none, targets that are taken."""
    name = f"store__segments__{'0' * 32}.parquet"
    for verb, pipe, text in (("verify", 0, 1), ("prune", 0, 0), ("list", 0, 0), ("compact", 0, 0)):
        yield row(f"{verb} pipe", pipe, "", "store", verb, "store", base="store", **{name: "pipe"})
        words = ("store", verb, "store", "--json")
        yield row(f"{verb} text", text, "{", *words, base="store", **{name: b"no Parquet"})
        device = {name: "link /dev/zero"}
        yield row(f"{verb} device", 0, "", "store", verb, "store", base="store", **device)
        odd = {f"store__segments__{ESCAPE}.parquet": b"x"}
        status = 5 if verb in ("verify", "prune") else 0
        yield row(f"{verb} escape", status, "", "store", verb, "store", base="store", **odd)
    to = ("store", "export", "store")
    yield row("export to a file", 1, "new or empty", *to, "sound.yaml", base="store")
    yield row("export below a file", 1, "sound.yaml", *to, "sound.yaml/out", base="store")
    yield row("export onto others", 1, "new or empty", *to, "others", base="store")
    yield row("export of no top-K", 1, "topk", *to, "o", "--format=distillkit", base="store")
    yield row("export of a tokenizer", 1, "--model", *to, "o", f"--model={ESCAPE}", base="store")
    teacher = ("--teacher", "sound.yaml")
    given: dict[str, tuple[Any, int]] = {
        "nothing": (b"", 1),
        "no object": (b"3\n", 1),
        "bytes": (b"\xff\xfe\n", 1),
        "deep": (b"[" * 100_000 + b"\n", 1),
        "half": (b'{"prompt": "\\ud800", "response": "x"}\n', 1),
        "digits": (b'{"prompt": "a", "response": "x", "n": ' + b"9" * 5000 + b"}\n", 1),
        "no answer": (b'{"prompt": "a", "response": " "}\n', 1),
        "a reason": (b'{"prompt": "a", "response": "b", "finish_reason": "\\u001b"}\n', 1),
        "a list": (b'{"prompt": [3], "response": "b"}\n', 1),
        "a pipe": ("pipe", 2),
        "a device": ("link /dev/zero", 2),
        "a folder": ("folder", 2),
        "a loop": ("link given.jsonl", 2),
    }
    for kind, (content, status) in given.items():
        words = ("store", "import", "new", "given.jsonl", *teacher)
        yield row(f"import {kind}", status, "", *words, **{"given.jsonl": content})


def on_checks() -> Iterator[Row]:
    """Prompt files that are none."""
    for kind, content, word in (
        ("pipe", "pipe", "device or pipe"),
        ("device", "link /dev/zero", "device or pipe"),
        ("loop", "link p.jsonl", "p.jsonl"),
        ("folder", "folder", "nothing"),
    ):
        words = ("check", "--static", "sound.yaml", "--set", "prompts.path=p.jsonl")
        word = "" if kind == "folder" else word
        yield row(f"prompts: {kind}", 2, word, *words, **{"p.jsonl": content})


ROWS = [*on_paths(), *on_words(), *on_addresses(), *on_runs(), *on_stores(), *on_checks()]


@pytest.mark.parametrize(("name", "status", "word", "case"), ROWS, ids=[one[0] for one in ROWS])
def test_a_command(bases: Bases, name: str, status: int, word: str, case: Case) -> None:
    place = bases.fresh(case.base)
    write(place, case.files)
    with inside(place):
        told = call(case.words)
    assert told.status == status, told
    assert list(faults(told, case.statuses, "--json" in case.words)) == [], told
    assert word in told.out + told.err, told


@pytest.mark.parametrize("kind", KINDS)
def test_generated_cases(bases: Bases, kind: str) -> None:
    """The generators of the fuzzing command, with a fixed seed."""

    @given(KINDS[kind])
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def all_are_answered(case: Case) -> None:
        assert judge(case, bases.fresh(case.base)) == []

    all_are_answered()


def test_the_judge_finds_what_is_wrong(bases: Bases) -> None:
    """Else a fuzzing command that finds nothing would say nothing."""
    place = bases.fresh("store")
    assert judge(Case(("store", "list", "store"), base="store"), place) == []
    wrong = judge(Case(("store", "list", "store"), statuses=frozenset({2})), place)
    assert wrong == ["exit status 0, not one of [2]"]
