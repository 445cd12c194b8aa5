"""Settings of services, filters, policies and terms that nobody means, and files that they name.

Each case is a run file with one thing changed: its exact exit status, a word that a person needs,
and what the judge of all hostile cases asks for.
"""

import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from raystill.base.records import read_bounded
from raystill.base.user_function import Code, TookTooLong, UserFunction, tried, within
from raystill.config.load import MOST_VALUES
from tests.hostile.judge import SECRET, Case, call, faults, inside, write
from tests.hostile.places import Bases
from tests.support.end_to_end import TEACHER
from tests.support.sound_run import SOUND

API: dict[str, Any] = {
    "teacher": {
        "engine": "api",
        "api": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None},
    },
    "signal": {"kind": "text"},
    "objective": {"cross_entropy": 1},
    "terms": {"teacher_licence": "apache-2.0"},
}
HELD = {"held_out_rows": 2, "free_running": {"rows": 2}}
Row = tuple[str, int, str, dict[str, Any], dict[str, bytes | str]]
"""What it is called, its exit status, a word of what is told, what is changed, and files."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("newer"))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``one`` with the values of ``other``, section by section."""
    deeper = {
        key: merged(one[key], value)
        for key, value in other.items()
        if isinstance(value, dict) and isinstance(one.get(key), dict)
    }
    return {**one, **other, **deeper}


def of_service(name: str, word: str, status: int = 2, **settings: Any) -> Row:
    changed = merged(API, {"teacher": {"api": settings}})
    return f"service: {name}", status, word, changed, {}


def of_section(section: str, name: str, word: str, status: int = 2, **settings: Any) -> Row:
    return f"{section}: {name}", status, word, {section: settings}, {}


URLS = {
    "an open bracket": "http://[::1",
    "no address in brackets": "http://[zz]/v1",
    "an escape": "http://\x1b[2J",
    "a port too high": "http://h:99999/v1",
    "port 0": "http://h:0/v1",
    "a port of letters": "http://h:abc/v1",
    "no host": "http:///v1",
    "a port alone": "http://:80/v1",
    "a dot": "http://.",
    "a dash": "http://-",
    "a backslash": "http://h\\x/v1",
    "right to left": "http://\u202eh/v1",
    "percent": "http://%zz/v1",
    "5,000 letters": f"http://{'a' * 5000}",
}
SET_ELSEWHERE = ("model", "messages", "stream", "n", "max_tokens", "temperature", "logprobs")
NO_JSON = {"a date": date(2025, 1, 1), "a set": {"a"}, "bytes": b"xy", "deeper": [{"a": b"x"}]}


def on_services() -> Iterator[Row]:
    for name, url in URLS.items():
        yield of_service(f"URL with {name}", "teacher.api.base_url", base_url=url)
    yield of_service("as it is", "no problems found", 0)
    for name in SET_ELSEWHERE:
        yield of_service(f"{name} in extra_body", f"sets {name}", extra_body={name: 1})
    for name, value in NO_JSON.items():
        yield of_service(f"{name} in extra_body", "no value of JSON", extra_body={"x": value})
    for name in ("", "  ", "m\x1b[2J"):
        yield of_service(f"model {name!r}", "teacher.api.model", model=name)
    for batch in ({"window": ""}, {"window": "\x1b"}, {"poll_s": 1e-9}, {"gather_s": 1e18}):
        yield of_service(f"batch {batch}", "teacher.api.batch", batch=batch)
    unused = {"teacher": {"api": {"base_url": "http://h/v1", "model": "m"}}}
    yield "service: not asked", 0, "the service is not asked", unused, {}


def on_numbers() -> Iterator[Row]:
    yield of_section("student", "true as a layer", "expected no yes or no", layers=[True])
    many = [0] * 40_000
    yield of_section("student", "many layers", f"more than {MOST_VALUES:,} values", layers=many)
    yield of_section(
        "policy", "hot", "temperature", student_share=0.5, sampling={"temperature": 1e9}
    )
    yield of_section("policy", "PiB", "kv_cache_gib", student_share=0.5, kv_cache_gib=1e17)
    yield of_section("training", "a rate", "learning_rate", learning_rate=1e17)
    yield of_section("training", "a tiny epsilon", "epsilon", epsilon=1e-300)
    yield of_section("teacher", "cores", "expected no yes or no", cpu_cores=[True])
    stops = {"stop_token_ids": [True]}
    yield of_section("teacher", "stops", "expected no yes or no", sampling=stops)
    for name, value in NO_JSON.items():
        yield of_section("teacher", f"engine, {name}", "no value of JSON", engine_args={"x": value})
        kwargs = {"chat_template_kwargs": {"x": value}}
        yield of_section("prompts", f"template, {name}", "no value of JSON", **kwargs)
    for name in ("messages", "add_generation_prompt"):
        kwargs = {"chat_template_kwargs": {name: "x"}}
        yield of_section("prompts", f"kwargs {name}", f"sets {name}", **kwargs)
    resources = {"gpu": True}
    yield of_section("teacher", "yes", "expected no yes", resources_per_replica=resources)
    teacher = {"model": str(TEACHER)}
    yield "teachers: empty name", 2, "names a teacher ''", {"teachers": {"": teacher}}, {}
    yield "teachers: none", 2, "teachers: is empty", {"teachers": {}}, {}


def on_filters() -> Iterator[Row]:
    def of_rules(name: str, status: int, word: str, *rules: dict[str, Any]) -> Row:
        return f"filter: {name}", status, word, {"filters": {"rules": list(rules)}}, {}

    yield of_rules("a blank phrase", 2, "phrases", {"refusal": {"phrases": [" "]}})
    many = [{"name": f"rule{i}", "finished": True} for i in range(500)]
    yield of_rules("500", 0, "and 490 more", *many)


def on_judges() -> Iterator[Row]:
    judges: dict[str, tuple[str, dict[str, Any]]] = {
        "equal scores": ("tells nothing apart", {"verdicts": {"a": 1, "b": 1}}),
        "yes for a score": ("expected no yes or no", {"verdicts": {"a": True, "b": 0}}),
        "a bound above all": ("rejects every answer", {"min_score": 7}),
    }
    for name, (word, settings) in judges.items():
        judge = {"teacher": "b", "rubric": "Is it good?", **settings}
        source = {"name": "s", "path": "prompts.jsonl", "teacher": "a"}
        teachers = {one: {"model": str(TEACHER)} for one in "ab"}
        prompts = {"path": None, "sources": [source]}
        rules = {"rules": [{"judge": judge}]}
        changed = {"teachers": teachers, "prompts": prompts, "filters": rules}
        yield f"judge: {name}", 2, word, changed, {}


CODE: dict[str, tuple[bytes | str, str]] = {
    "a pipe": ("pipe", "device or pipe"),
    "a device": ("link /dev/zero", "device or pipe"),
    "a folder": ("folder", "folder"),
    "nowhere": ("link nowhere", "m.py"),
    "large": (b"def f(x): return 1\n" + b"#" * 3_000_000, "expected at most"),
    "NUL": (b"def f(x):\n\0 return 1\n", "null bytes"),
    "deep": (b"x = " + b"(" * 5000 + b"1" + b")" * 5000, "m.py"),
    "an error without a text": (
        b"class E(Exception):\n def __str__(s): raise ValueError\nraise E()\n",
        "an error that has no text",
    ),
}


def on_functions() -> Iterator[Row]:
    for name, (content, word) in CODE.items():
        rules = {"filters": {"rules": [{"function": {"path": "m.py:f"}}]}}
        yield f"filter function: {name}", 2, word, rules, {"m.py": content}
        checks = {"evaluation": {**HELD, "checks": [{"function": "m.py:f"}]}}
        yield f"check function: {name}", 2, word, checks, {"m.py": content}


def on_letters() -> Iterator[Row]:
    files: dict[str, bytes | str] = {
        "a pipe": "pipe",
        "a device": "link /dev/zero",
        "empty": b"",
        "a folder": "folder",
    }
    for name, content in files.items():
        letter = {"file": "letter", "rule": "x", "reason": "They wrote so."}
        changed = {"terms": {"permission": letter}}
        yield f"letter: {name}", 2, "terms.permission.file", changed, {"letter": content}
    long = {"file": "x" * 300, "rule": "x", "reason": "They wrote so."}
    yield "letter: a long name", 2, "terms.permission.file", {"terms": {"permission": long}}, {}
    blank = {"file": "letter", "rule": "x", "reason": "  "}
    yield "letter: no reason", 2, "reason", {"terms": {"permission": blank}}, {"letter": b"yes"}
    unused = {"file": "letter", "rule": "x", "reason": "They wrote so."}
    changed = {"terms": {"permission": unused}}
    yield "letter: of no rule", 0, "changes nothing", changed, {"letter": b"yes"}


ROWS = [*on_services(), *on_numbers(), *on_filters(), *on_judges(), *on_functions(), *on_letters()]


def judged(bases: Bases, case: Case, environment: dict[str, str] | None = None) -> str:
    """Run a case; what it told. Its status is the one it names, and nothing else is wrong."""
    place = bases.fresh(case.base)
    write(place, case.files)
    with inside(place), pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        told = call(case.words)
    assert list(faults(told, case.statuses, "--json" in case.words)) == [], told
    return told.out + told.err


@pytest.mark.parametrize(("name", "status", "word", "changed", "files"), ROWS, ids=lambda one: None)
def test_a_run_file(
    bases: Bases,
    name: str,
    status: int,
    word: str,
    changed: dict[str, Any],
    files: dict[str, bytes | str],
) -> None:
    config = merged(SOUND, changed)
    if "teachers" in changed:
        del config["teacher"]
    text = yaml.safe_dump(config, sort_keys=False).encode()
    case = Case(
        ("check", "--static", "bad.yaml"), {**files, "bad.yaml": text}, statuses=frozenset({status})
    )
    told = judged(bases, case)
    assert word in told, (name, told)
    assert "'-' is neither" not in told, "of a stand-in that nobody wrote"


KEYS = {
    "a line's end": "abcdefgh\nijkl",
    "no ASCII": "abcdefgh\u0430",
    "blank": "   ",
    "space": "k ",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_no_header_holds(bases: Bases, kind: str) -> None:
    config = merged(SOUND, merged(API, {"teacher": {"api": {"api_key_env": "SOME_API_KEY"}}}))
    files: dict[str, bytes | str] = {"bad.yaml": yaml.safe_dump(config).encode()}
    case = Case(("check", "--static", "bad.yaml"), files, statuses=frozenset({2}))
    told = judged(bases, case, {"SOME_API_KEY": KEYS[kind]})
    assert "$SOME_API_KEY, whose value has" in told and "abcdefgh" not in told


@pytest.mark.parametrize("content", ["pipe", "link /dev/urandom"])
def test_a_log_in_file_that_never_ends(bases: Bases, content: str) -> None:
    config = merged(SOUND, {"output": {"wandb": {}}})
    files: dict[str, bytes | str] = {"bad.yaml": yaml.safe_dump(config).encode(), "netrc": content}
    case = Case(("check", "--static", "bad.yaml"), files, statuses=frozenset({2}))
    told = judged(bases, case, {"NETRC": "netrc", "WANDB_API_KEY": "", "HOME": "nowhere"})
    assert "output.wandb" in told


@pytest.mark.parametrize("address", ["http://[::1", "nowhere", "http://", f"x{SECRET}"])
def test_an_address_of_a_tracker_that_is_none(bases: Bases, address: str) -> None:
    config = merged(SOUND, {"output": {"wandb": {}}})
    files: dict[str, bytes | str] = {"bad.yaml": yaml.safe_dump(config).encode()}
    case = Case(("check", "--static", "bad.yaml"), files, statuses=frozenset({2}))
    told = judged(bases, case, {"WANDB_BASE_URL": address, "WANDB_API_KEY": ""})
    assert "$WANDB_BASE_URL is" in told


def test_a_field_of_teachers_that_no_row_has_is_named(bases: Bases) -> None:
    config = merged(SOUND, {"teachers": {"a": SOUND["teacher"]}})
    config["prompts"] = {"path": "prompts.jsonl", "teacher_field": "whoo"}
    del config["teacher"]
    files: dict[str, bytes | str] = {"bad.yaml": yaml.safe_dump(config).encode()}
    case = Case(("check", "--static", "bad.yaml"), files, statuses=frozenset({2}))
    assert "line 1: names no teacher in its field 'whoo'" in judged(bases, case)


def test_what_a_function_prints_is_not_shown_by_a_check(
    bases: Bases, capfd: pytest.CaptureFixture[str]
) -> None:
    config = merged(SOUND, {"filters": {"rules": [{"function": {"path": "m.py:f"}}]}})
    code = f"print({SECRET!r} * 9999)\ndef f(row): return 1\n".encode()
    files: dict[str, bytes | str] = {"bad.yaml": yaml.safe_dump(config).encode(), "m.py": code}
    case = Case(("check", "--static", "bad.yaml"), files, statuses=frozenset({0}))
    judged(bases, case)
    assert capfd.readouterr().err == ""


def test_a_function_that_prints_is_heard_in_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    with UserFunction(Code("f", file="m.py", text="print('heard')\ndef f(): return 1"), 5) as one:
        assert one.load() == "" and one.call().value == 1
    assert "heard" in capfd.readouterr().err


def test_a_file_is_read_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, expected at most 4"):
        read_bounded(file, 4)
    os.truncate(file, 900 << 30)
    with pytest.raises(OSError, match="expected at most"):
        read_bounded(file)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"is a (folder|device or pipe)"):
            read_bounded(other)


def test_code_of_others_has_limits() -> None:
    def endless() -> None:
        while True:
            pass

    def hungry() -> None:
        kept = "x"
        while True:
            kept = kept + kept

    def wrong() -> None:
        raise KeyError("what this process would meet itself")

    assert tried(endless, 1, 1 << 30) == "takes more than 1 s"
    assert tried(hungry, 5, 1 << 26) == "needs more than 64 MiB of memory"
    assert tried(wrong, 5, 1 << 30) == tried(lambda: None, 5, 1 << 30) == ""
    with pytest.raises(TookTooLong, match=r"more than 0\.1 s"), within(0.1):
        endless()
    with within(0.1):
        pass
