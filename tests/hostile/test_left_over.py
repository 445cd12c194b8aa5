"""What was accepted without a word, or told without an end, by settings that do not fit each other:
folders in one another, fields that no prompt has, a fit of nothing, the plan of a run.
"""

import gzip
import json
from typing import Any

import pytest
import yaml

import driver
from raystill.base.errors import MOST_CHARACTERS
from raystill.base.run_folder import RunFolder
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.config.teacher import MOST_TEACHERS
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.screen import is_blank, says_nothing
from tests.hostile.judge import SECRET, Case, inside, write
from tests.hostile.places import Bases
from tests.hostile.test_newer_settings import judged, merged
from tests.support.sound_run import SOUND

FUNCTION = b"def f(row): return 1\n"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("left_over"))


def told_of(
    bases: Bases, changed: dict[str, Any], status: int, files: dict[str, bytes | str] | None = None
) -> str:
    """What the check says of a sound run file with this changed."""
    config = merged(SOUND, changed)
    if "teachers" in changed:
        del config["teacher"]
    text = yaml.safe_dump(config, sort_keys=False).encode()
    words = ("check", "--static", "bad.yaml")
    case = Case(words, {**(files or {}), "bad.yaml": text}, statuses=frozenset({status}))
    return judged(bases, case)


def rows(*more: dict[str, Any]) -> bytes:
    plain = [{"prompt": f"Say {i}.", "t": None} for i in range(8)]
    return "".join(json.dumps(row) + "\n" for row in [*plain, *more]).encode()


@pytest.mark.ray  # Which it imports, and does not start.
def test_the_plan_of_a_run_is_as_short_as_that_of_a_check(
    bases: Bases, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"name": f"{'s' * 200}{i}", "path": "prompts.jsonl"} for i in range(300)]
    sources[0]["name"] = f"\x1b[2J{SECRET}"
    place = bases.fresh("run_file")
    config = merged(SOUND, {"prompts": {"path": None, "sources": sources}})
    write(place, {"long.yaml": yaml.safe_dump(config).encode()})
    capsys.readouterr()
    # Another driver is at the run, so that this one ends where it has told its plan.
    with inside(place), hold_run_folder(RunFolder(str(place / "runs/long"))):
        assert driver.main(["run", "long.yaml"]) == driver.EXIT_FAILED
    told = capsys.readouterr()
    assert told.out.startswith("prompts: ")
    assert "more lines; raystill check --json tells more of them" in told.out
    assert len(told.out) < MOST_CHARACTERS + 200
    assert SECRET[:8] not in told.out and "\x1b" not in told.out


UNSEEN = {"blank": " \t", "NUL": "\0\0", "zero width": "\u200b\ufeff", "direction": "\u202e"}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_prompt_of_which_nothing_is_seen_asks_nothing(bases: Bases, kind: str) -> None:
    text = UNSEEN[kind]
    assert says_nothing(text) and not says_nothing(f"{text}a{text}")
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    assert is_blank(RawPrompt(None, parts, "s", "p.jsonl, line 1"))
    asked: list[dict[str, Any]] = [
        {"prompt": text},
        {"messages": [{"role": "user", "content": text}]},
        {"prompt": "Say it.", "t": [{"role": "user", "content": text}]},
    ]
    asked = [{"t": None, **row} for row in asked]
    prompts = {"path": "p.jsonl", "teacher_messages_field": "t"}
    told = told_of(bases, {"prompts": prompts}, 2, {"p.jsonl": rows(*asked)})
    assert "prompts: 8 to train on" in told and "3 empty" in told


APART = {
    "one folder": ("x", "x", 2, "output.path", "which is the teacher store"),
    "one folder by a link": ("link/x", "x", 2, "output.path", "which is the teacher store"),
    "one folder by dots": ("x/../x/.", "x", 2, "output.path", "which is the teacher store"),
    "the run in the store": ("x/segments", "x", 2, "output.path", "which is inside the teacher"),
    "the store in the student": ("x", "x/student", 2, "store.path", "files of its own in"),
    "the store in checkpoints": ("x", "x/checkpoints/s", 2, "store.path", "files of its own in"),
    "the store in a folder of its own": ("x", "x/answers", 0, "no problems", ""),
    "names that begin alike": ("xy", "x", 0, "no problems", ""),
}


@pytest.mark.parametrize("kind", APART)
def test_store_and_run_folder_keep_apart(bases: Bases, kind: str) -> None:
    output, store, status, where, words = APART[kind]
    changed = {"output": {"path": output}, "store": {"path": store}}
    told = told_of(bases, changed, status, {"link": "link ."})
    assert where in told and words in told


def test_teachers_are_not_without_end(bases: Bases) -> None:
    one = SOUND["teacher"]
    for number, status in ((MOST_TEACHERS, 0), (MOST_TEACHERS + 1, 2)):
        names = [f"t{i}" for i in range(number)]
        sources = [{"name": name, "path": "prompts.jsonl", "teacher": name} for name in names]
        changed = {
            "teachers": {name: one for name in names},
            "prompts": {"path": None, "sources": sources},
        }
        told = told_of(bases, changed, status)
        assert (f"names {number:,} teachers; expected at most" in told) == (status == 2)


GZIPPED = gzip.compress(rows())
OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "gzip": (GZIPPED, "it is compressed by gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"\xff" * 50, "it is compressed by zstd"),
    "bzip2": (b"BZh91AY&SY\xff" + b"x" * 50, "it is compressed by bzip2"),
    "xz": (b"\xfd7zXZ\0" + b"\xff" * 50, "it is compressed by xz"),
    "zip": (b"PK\x03\x04" + b"x" * 100, "it is a ZIP archive"),
    "parquet": (b"PAR1\x15" + b"x" * 100, "it is a Parquet file"),
    "PDF": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "it is a PDF document"),
    "UTF-16": (rows().decode().encode("utf-16"), "it is UTF-16 text"),
    "UTF-16 without a mark": (rows().decode().encode("utf-16-le"), "it has NUL characters"),
    "Latin-1": ("grün\n".encode("latin-1"), "it is not UTF-8"),
}


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt", "p.json"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_named(bases: Bases, kind: str, name: str) -> None:
    content, words = OTHER_KINDS[kind]
    for setting in ({"path": name}, {"overlap": {"path": name}}):
        assert words in told_of(bases, {"prompts": setting}, 2, {name: content})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
NO_PARQUET = {
    "a pointer": (LFS, "it is a Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "gzip": (GZIPPED, "it is compressed by gzip"),
    "cut": (b"PAR1\x15\0\x15", "cannot be read as parquet"),
    "NUL": (b"\0" * 99, "cannot be read as parquet"),
}


@pytest.mark.parametrize("kind", NO_PARQUET)
def test_a_parquet_file_that_is_none(bases: Bases, kind: str) -> None:
    content, words = NO_PARQUET[kind]
    told = told_of(bases, {"prompts": {"path": "p.parquet"}}, 2, {"p.parquet": content})
    assert words in told and "let its name end in .parquet" not in told
    command = ("store", "import", "store", "p.parquet", "--teacher", "sound.yaml")
    case = Case(command, {"p.parquet": content}, "store", frozenset({1}))
    assert words in judged(bases, case)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "UTF-16"])
def test_imported_answers_of_another_kind_are_named(bases: Bases, kind: str) -> None:
    words = ("store", "import", "store", "given.jsonl", "--teacher", "sound.yaml")
    files: dict[str, bytes | str] = {"given.jsonl": OTHER_KINDS[kind][0]}
    told = judged(bases, Case(words, files, "store", frozenset({1})))
    assert "given.jsonl" in told


COLUMNS: dict[str, tuple[dict[str, Any], int]] = {
    "a function": ({"function": {"path": "m.py:f", "columns": ["refrence"]}}, 2),
    "a function, and one that is there": ({"function": {"path": "m.py:f", "columns": ["t"]}}, 0),
    "the score of the best": (
        {"best": {"keep": 1, "score": {"path": "m.py:f", "columns": ["refrence"]}}},
        2,
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_field_that_no_prompt_has_is_misspelt(bases: Bases, kind: str) -> None:
    rule, status = COLUMNS[kind]
    changed = {
        "filters": {"rules": [rule]},
        "prompts": {"path": "p.jsonl", "samples_per_prompt": 2},
    }
    only_one = rows({"prompt": "With a field.", "t": "yes"})
    told = told_of(bases, changed, status, {"p.jsonl": only_one, "m.py": FUNCTION})
    assert ("'refrence', a field that none of" in told) == (status == 2)


def test_a_judge_is_given_fields_that_prompts_have(bases: Bases) -> None:
    judge = {"teacher": "b", "rubric": "Is it good?", "columns": ["refrence"]}
    source = {"name": "s", "path": "prompts.jsonl", "teacher": "a"}
    changed = {
        "teachers": {one: SOUND["teacher"] for one in "ab"},
        "prompts": {"path": None, "sources": [source]},
        "filters": {"rules": [{"judge": judge}]},
    }
    assert "filters.rules.0.judge.columns: has 'refrence'" in told_of(bases, changed, 2)


@pytest.mark.parametrize("by", ["even", "importance", "influence"])
@pytest.mark.parametrize(("keep", "words"), [(3, "has 2 layers"), (10**9, "student.layers.keep")])
def test_more_layers_than_there_are(bases: Bases, by: str, keep: int, words: str) -> None:
    layers = {"layers": {"keep": keep, "by": by}, "refit": True}
    assert words in told_of(bases, {"student": layers}, 2)


@pytest.mark.parametrize(("layers", "fits"), [([0, 1], False), ([0], True), ([1, 0], True)])
def test_a_fit_of_nothing_is_noticed(bases: Bases, layers: list[int], fits: bool) -> None:
    told = told_of(bases, {"student": {"layers": layers, "refit": True}}, 0)
    assert ("student.refit fits nothing: the student keeps all 2 layers" in told) != fits
