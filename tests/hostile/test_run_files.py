"""Run files that nobody would write: refused in a sentence, at once, whatever they hold.

Each case is a call of the command in this process: the exit status, no traceback, a bounded text
without control characters, and the word that a person needs.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import driver
from raystill.base.errors import MOST_CHARACTERS as MOST_OF_PROBLEMS
from raystill.base.errors import MOST_PROBLEMS, shown, shown_together
from raystill.config.describe import select_fields
from raystill.config.load import load_leniently, parse_yaml
from tests.support.sound_run import SOUND

MOST_CHARACTERS = 4_000


def refused(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    start = time.process_time()  # Not of the clock: a busy machine is no flaw of the check.
    assert driver.main(["check", "--static", *words]) == status
    assert time.process_time() - start < 5
    told = capsys.readouterr()
    text = told.out + told.err
    assert "Traceback" not in text
    assert len(text) <= MOST_CHARACTERS
    assert all(c.isprintable() or c in "\n" for c in text), ascii(text)
    return text


NUMBERS = sorted(
    one.name
    for one in select_fields(None)
    if any(kind in one.type for kind in ("int", "float", "number")) and "." in one.name
)
NONSENSE = (
    *(".inf", "-.inf", ".nan", "1.0e300", "true", "'many'", "{x: -1}", "[-1]"),
    "99999999999999999999999999",
)


LISTS = {"student.layers", "teacher.sampling.stop_token_ids"}
"""Lists of ids, which the check of the models holds against the teacher."""


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_a_number(place: Path, name: str) -> None:
    """By the loader, which every command begins with: the whole check would take minutes."""
    for value in NONSENSE:
        if value == "[-1]" and name in LISTS:
            continue
        problems = load_leniently("sound.yaml", [f"{name}={value}"]).problems
        assert problems, f"{name}={value} is accepted"
        told = "\n".join(shown(str(p)) for p in problems)
        assert name.split(".")[0] in told and len(told) < MOST_CHARACTERS


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: &b [*a, *a]\n"
        + "".join(
            f"c{i}: &c{i} [{', '.join([f'*c{i - 1}' if i else '*b'] * 9)}]\n" for i in range(9)
        ),
        "teacher: &t {model: *t}\n",
        "[" * 2000 + "]" * 2000,
        "".join(f"{'  ' * i}a:\n" for i in range(200)),
        "{" * 3000,
        "a: !!python/object/apply:os.system [echo]\n",
        "teacher: 2030-02-30\n",
        'seed: !!int ""\n',
        "a: 1\na: 2\n",
        "\t- x",
        "seed: " + "9" * 5000,
        "",
        "- 1",
        "just text",
        "teacher: [1, 2]\nstudent: 3\nprompts: {}\n",
        "? [a]\n: 1\n",
        'a: "\\ud800"\n',
    ],
    ids=lambda text: text[:24],
)
def test_a_text_that_is_no_run_file(
    place: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (place / "bad.yaml").write_text(text)
    refused(capsys, "bad.yaml")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x00", bytes(range(256)), b"teacher: \xff"])
def test_bytes_that_are_no_text(
    place: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    (place / "bad.yaml").write_bytes(data)
    refused(capsys, "bad.yaml")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("/dev/zero", "device or pipe"),
        (".", "is a folder"),
        ("pipe", "device or pipe"),
        ("missing.yaml", "no such file"),
        ("x" * 300, "cannot be read"),
        ("a\0b", "cannot be read"),
    ],
)
def test_a_path_that_is_no_file(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, word: str
) -> None:
    os.mkfifo("pipe")
    assert word in refused(capsys, name)


def test_a_file_without_end_is_refused_by_its_size(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "large.yaml").write_bytes(b"# comment\n" * 500_000)
    assert "expected a run file of at most" in refused(capsys, "large.yaml")


def test_many_problems_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {f"unknown_key_{i}": i for i in range(3000)}
    (place / "bad.yaml").write_text(yaml.safe_dump(SOUND | {"training": unknown}))
    told = refused(capsys, "bad.yaml")
    assert told.count("\n  - ") == MOST_PROBLEMS
    assert f"and {3000 - MOST_PROBLEMS:,} more" in told


@pytest.mark.parametrize("key", ["seed", "prompts.path", "teacher.model", "student.layers"])
@pytest.mark.parametrize(
    "value",
    [
        "x" * 300,
        "x" * 1_000_000,
        "\x1b[2J\x1b]0;owned\x07",
        "\u202eevil",
        "a\nb\rc",
        "[/red][bold]x",
        "\ufffe",
    ],
    ids=["300", "1 MB", "escapes", "RTL", "lines", "markup", "no character"],
)
def test_a_value_is_shown_and_never_sent(
    place: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    config = yaml.safe_load((place / "sound.yaml").read_text())
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = value
    (place / "bad.yaml").write_text(yaml.safe_dump(config))
    told = refused(capsys, "bad.yaml")
    assert "\x1b" not in told and "\u202e" not in told


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("teacher.resources_per_replica={'': 1}", "expected"),
        ("training.resources_per_worker={gpu: -1}", "greater than or equal to 0"),
        ("training.cpu_cores=[]", "expected"),
        ("teacher.cpu_cores=[-1]", "greater than or equal to 0"),
        ("prompts.samples_per_prompt=1000000000", "less than or equal to"),
        ("prompts=[{name: a, path: prompts.jsonl, weight: 1.0e12}]", "less than or equal to"),
        ('store.path="a\\0b"', "NUL"),
        ("training.epochs.deeper=1", "expected an integer"),
        ("=1", "expected a dotted key"),
        (".".join("a" * 50_000) + "=1", "50,000 levels"),
        (f"student.layers.{'9' * 5000}=1", "student.layers has 1 entries"),
        ("a..b=1", "expected a dotted key"),
        ("training.epochs=[", "not valid YAML"),
        ("training.epochs", "expected a dotted key and a value"),
    ],
)
def test_settings_that_nobody_means(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, word: str
) -> None:
    assert word in refused(capsys, "sound.yaml", "--set", override)


def test_an_error_without_a_sentence_is_kept_in_a_file(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.cluster.check import static

    monkeypatch.setenv("SOME_API_KEY", "planted-secret-77aa")

    def broken(*_: object) -> None:
        raise KeyError("planted-secret-77aa \x1b[31m")

    monkeypatch.setattr(static, "load_leniently", broken)
    told = refused(capsys, "sound.yaml", status=1)
    path = Path(told.split("the whole story is in ")[1].split(", please")[0])
    story = path.read_text()
    path.unlink()
    assert "Traceback" in story and "in broken" in story
    assert "planted-secret" not in told + story


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = ["teacher", "student", "prompts", "signal", "objective", "stream", "store", "training"]


@given(section=st.sampled_from([*SECTIONS, "seed", "x"]), leaf=st.text(max_size=6), tree=TREES)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_tree_of_values_ends_in_a_traceback(
    place: Path, capsys: pytest.CaptureFixture[str], section: str, leaf: str, tree: Any
) -> None:
    config = SOUND | {section: {leaf: tree} if leaf else tree}
    (place / "tree.yaml").write_text(yaml.safe_dump(config))
    assert driver.main(["check", "--static", "tree.yaml"]) in (0, 2)
    told = capsys.readouterr()
    assert "unexpected:" not in told.err
    assert len(told.out + told.err) <= MOST_CHARACTERS


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_text_is_yaml_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except yaml.YAMLError as error:
        assert str(error)


@given(st.text(max_size=2000), st.integers(20, 300))
def test_what_is_shown_is_printable_and_bounded(text: str, longest: int) -> None:
    told = shown(text, longest)
    assert all(c.isprintable() for c in told)
    assert len(told) <= max(longest, 40)
    assert text != told or len(text) <= longest


@given(st.lists(st.text(max_size=900), max_size=20))
def test_what_is_shown_together_is_bounded_and_short_lines_stay(texts: list[str]) -> None:
    told = shown_together(texts)
    assert len(told) == len(texts) and sum(map(len, told)) <= MOST_OF_PROBLEMS
    share = MOST_OF_PROBLEMS // max(1, len(texts))
    for text, line in zip(texts, told, strict=True):
        if len(shown(text)) <= share:
            assert line == shown(text)
