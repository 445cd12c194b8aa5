"""What ``--json`` prints of hostile input: one JSON value, bounded, of printable characters.

In this process, by what the command wrote to its standard output.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import driver
from raystill.base.errors import MOST_CHARACTERS, MOST_PROBLEMS
from raystill.cluster.commands import as_json
from tests.support.sound_run import SOUND


def answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> Any:
    assert driver.main(words) == status
    told = capsys.readouterr()
    assert "Traceback" not in told.err and "unexpected:" not in told.err
    assert all(c.isprintable() or c == "\n" for c in told.out)
    assert len(told.out) <= as_json.MOST_CHARACTERS
    return json.loads(told.out)


def test_many_problems_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {f"unknown_key_{i}": i for i in range(3000)}
    (place / "bad.yaml").write_text(yaml.safe_dump(SOUND | {"training": unknown}))
    told = answer(capsys, "check", "--static", "--json", "bad.yaml")
    assert len(told["problems"]) == MOST_PROBLEMS
    assert told["problems_left_out"] == 3000 - MOST_PROBLEMS
    assert told["problems"][0]["where"] == "training.unknown_key_0"


def test_few_problems_are_all_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "check", "--static", "--json", "sound.yaml", "--set", "seed=x")
    assert [problem["where"] for problem in told["problems"]] == ["seed"]
    assert "problems_left_out" not in told


@pytest.mark.parametrize(
    "value", ["x" * 200_000, "\x1b[2J\x9b1m", "\u202eevil", "\ufffe", "a\nb", "\U000e0041"]
)
def test_a_value_is_escaped_and_bounded(
    place: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    config = SOUND | {"seed": value, value: 1, "training": {value: value}}
    (place / "bad.yaml").write_text(yaml.safe_dump(config))
    told = answer(capsys, "check", "--static", "--json", "bad.yaml")
    assert len(told["problems"]) == 3
    assert len(json.dumps(told["problems"])) < 2 * MOST_CHARACTERS


@pytest.mark.parametrize(
    "name",
    [b"\x1b[2J.yaml", b"a\nb.yaml", "\u202e.yaml".encode(), b"[red].yaml"],
)
def test_a_file_name_of_any_characters(
    place: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    word = os.fsdecode(name)
    (place / "sound.yaml").rename(word)
    told = answer(capsys, "check", "--static", "--json", word, status=0)
    assert told["run_file"] == word


def test_a_file_name_that_is_not_utf8(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder would be named like it, which only Python can open."""
    word = os.fsdecode(b"\xff\xfe.yaml")
    (place / "sound.yaml").rename(word)
    told = answer(capsys, "check", "--static", "--json", word)
    assert [problem["where"] for problem in told["problems"]] == ["output.path"]
    out = ["--set", "output.path=runs/x"]
    assert answer(capsys, "check", "--static", "--json", word, *out, status=0)["run_file"] == word


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_that_has_few_characters(
    place: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    (place / "bad.yaml").write_text(yaml.safe_dump(SOUND | {"päß": "日本\U0001f600"}))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    assert driver.main(["check", "--static", "--json", "bad.yaml"]) == driver.EXIT_REFUSED
    assert json.loads(raw.getvalue().decode(encoding))["problems"][0]["where"] == "päß"


def printed(capsys: pytest.CaptureFixture[str], value: Any) -> Any:
    as_json.print_json(value)
    text = capsys.readouterr().out
    assert len(text) <= as_json.MOST_CHARACTERS
    return json.loads(text)


def test_what_is_left_out_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, {"a": list(range(1001))})["a_left_out"] == 1
    assert "a_left_out" not in printed(capsys, {"a": list(range(1000))})
    assert printed(capsys, {"x": {str(i): i for i in range(1500)}})["x"]["_left_out"] == 500
    many = printed(capsys, {"a": ["x" * 1000] * 5000})
    assert (len(many["a"]), many["a_left_out"]) == (100, 4900)
    assert set(printed(capsys, {"k" * 3000: 1, "k" * 3001: 2}).values()) == {1, 2}


def test_what_is_too_much_all_the_same_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_json, "MOST_CHARACTERS", 10_000)
    deep: Any = "x" * 200
    for _ in range(2):
        deep = [deep] * 20
    with pytest.raises(driver.RunError, match="at most 10,000"):
        as_json.print_json({"a": deep})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_value_is_told(value: Any) -> None:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        as_json.print_json({"told": value})
    text = out.getvalue()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert type(json.loads(text)["told"]) in (type(value), type(None))


def test_a_secret_of_several_lines_is_not_told_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "one\ntwo two two\nabc")
    driver.say("refused: one\ntwo two two\nabc\nand a\x1b[2J")
    assert capsys.readouterr().out == "refused: $DB_PASSWORD\nand a\\x1b[2J\n"
