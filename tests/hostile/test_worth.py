"""What `draft`, `speed` and `tasks` read of a finished run: broken files are told before an engine.

The measuring itself is not begun: it would start a cluster.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import HELD_OUT_PROMPTS
from raystill.cluster.commands import calibrate
from raystill.cluster.worth import draft, speed, tasks
from tests.hostile.judge import call, faults, inside, write
from tests.hostile.places import Bases
from tests.support.end_to_end import TEACHER

BEGUN = "the measuring begins"
CONFIG = json.loads((TEACHER / "config.json").read_text())
COMMANDS = {"draft": (), "speed": (), "tasks": ("--task", "x")}


def ids(values: Any, kind: pa.DataType | None = None, name: str = "prompt_ids") -> bytes:
    """A Parquet file of one column."""
    out = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(values, kind)}), out)
    return out.getvalue()


SOUND = ids([[1, 2, 3]] * 4, pa.list_(pa.int32()))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("worth"))


@pytest.fixture
def run(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a run with a student, whose teacher is the small one."""

    def begin(*_: object, **__: object) -> None:
        raise RunError(BEGUN)

    for module, name in ((draft, "measure_into"), (speed, "measure_into"), (tasks, "measure")):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(tasks, "harness_version", lambda: "0")
    place = bases.fresh("run")
    (place / "run" / "student").mkdir(exist_ok=True)
    for file in TEACHER.iterdir():
        (place / "run" / "student" / file.name).unlink(missing_ok=True)
        os.link(file, place / "run" / "student" / file.name)
    write(place, {f"run/{HELD_OUT_PROMPTS}": SOUND})
    return place


def told(place: Path, command: str, files: dict[str, bytes | str]) -> str:
    write(place, {f"run/{name}": content for name, content in files.items()})
    with inside(place):
        found = call((command, "run", *COMMANDS[command]))
    assert not list(faults(found, frozenset({1, 2}), False))
    return found.out + found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_sound_run_is_measured(run: Path, command: str) -> None:
    assert BEGUN in told(run, command, {})


PROMPTS: dict[str, bytes | str] = {
    **{"empty": b"", "text": b"hello", "cut": SOUND[:100], "folder": "folder", "pipe": "pipe"},
    **{"changed": SOUND[:60] + b"\xff" * 20 + SOUND[80:], "endless": "link /dev/zero"},
    **{"another column": ids([1], name="x"), "texts": ids(["a"]), "fractions": ids([[1.5]])},
    **{"none": ids([None, [1]]), "none within": ids([[None, 1]]), "no lists": ids([1])},
    **{"of 41 bits": ids([[2**40]]), "negative": ids([[-1]]), "lists of lists": ids([[[1]]])},
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("command", ["draft", "speed"])
def test_held_out_prompts_that_are_none(run: Path, command: str, kind: str) -> None:
    text = told(run, command, {HELD_OUT_PROMPTS: PROMPTS[kind]})
    assert HELD_OUT_PROMPTS in text and "restore it from a copy" in text and BEGUN not in text


def changed(**values: Any) -> bytes:
    return json.dumps({**CONFIG, **values}).encode()


STUDENT: dict[str, tuple[str, bytes | str, str]] = {
    "a count that is a text": ("config.json", changed(vocab_size="x"), "vocab_size"),
    "a context that is a text": (
        "config.json",
        changed(max_position_embeddings="x"),
        "max_position_embeddings",
    ),
    "57 digits": ("config.json", changed(x=10**57), "student"),
    "no Unicode": ("config.json", changed(x="\ud800"), "student"),
    "a list": ("config.json", b"[]", "student"),
    "a web page": ("model.safetensors", b"<html></html>", "is a web page"),
    "a folder": ("model.safetensors", "folder", "is no file"),
    "a token": ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "tokenizer_config.json"),
}


@pytest.mark.parametrize("kind", STUDENT)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_student_that_is_broken(run: Path, command: str, kind: str) -> None:
    name, content, word = STUDENT[kind]
    text = told(run, command, {f"student/{name}": content})
    assert word in text and BEGUN not in text


PATHS = ("\0", "~nobody/x", "x" * 300, "a\ud800", "/dev/null", "sound.yaml/x", "", "missing")


@pytest.mark.parametrize("path", PATHS, ids=ascii)
@pytest.mark.parametrize("command", ["speed", "draft", "push", "tasks"])
def test_paths_that_are_none(run: Path, command: str, path: str) -> None:
    with inside(run):
        found = call((command, *COMMANDS.get(command, ("--to=a/b",)), "--", path))
    assert not list(faults(found, frozenset({1, 2}), False))
    assert BEGUN not in found.err


def test_a_name_on_the_hub_that_is_empty(run: Path) -> None:
    with inside(run):
        found = call(("push", "run", "--to="))
    assert found.status == 2 and "expected OWNER/NAME" in found.err


@pytest.mark.parametrize("path", ["\0", "x" * 300, "sound.yaml/x", "/dev/null"], ids=ascii)
def test_a_report_of_calibration_that_cannot_be_written(run: Path, path: str) -> None:
    with inside(run), pytest.raises(RunError, match="name another"):
        calibrate._made(path)


OTHER_TABLES = {
    "numbers": ids([1, 2]),
    "texts": ids(["a", "b"]),
    "nulls": ids([None, None]),
    "lists of texts": ids([["a"], ["b"]]),
    "lists of a fixed size": ids([[1, 2]], pa.list_(pa.int32(), 2)),
    "another column": ids([[1]], name="other"),
    "objects": ids([{"a": 1}]),
    "no rows": ids([], pa.list_(pa.int32())),
    "cut": SOUND[:-9],
}


@pytest.mark.parametrize("name", ["prompts/train.parquet", HELD_OUT_PROMPTS, "held_out.parquet"])
@pytest.mark.parametrize("kind", OTHER_TABLES)
def test_the_page_of_a_run_whose_tables_are_others(bases: Bases, kind: str, name: str) -> None:
    place = bases.fresh("run")
    write(place, {f"run/{name}": OTHER_TABLES[kind]})
    with inside(place):
        told = call(("report", "run"))
    assert not list(faults(told, frozenset({0, 1}), False))
