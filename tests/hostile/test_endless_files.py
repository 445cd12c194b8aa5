"""Files without end, or that stand in another's place: of models, of prompts, of letters.

A model's folder with one file changed, or one file of prompts. The holes of sparse files take no
room on the disk; reading them whole would take all memory.
"""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raystill.base.errors import RunError
from raystill.base.records import number
from raystill.cluster.harness import ask
from raystill.datasets.prompts import files, select
from raystill.datasets.rows.unpacked import unpacked_bytes
from raystill.model.files import ModelFolder
from tests.hostile.judge import SECRET, Case, call, faults, inside, write
from tests.hostile.places import Bases
from tests.support.end_to_end import TEACHER

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2140\nsize 269060552\n"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROWS = b"".join(json.dumps({"prompt": f"Say {i}."}).encode() + b"\n" for i in range(6))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("endless"))


def told(
    bases: Bases, case: Case, change: Callable[[Path], object] = lambda place: None
) -> tuple[int, str]:
    """What a case's command tells, of which the judge finds nothing wrong."""
    place = bases.fresh(case.base)
    write(place, case.files)
    change(place)
    with inside(place):
        result = call(case.words)
    assert list(faults(result, case.statuses, "--json" in case.words)) == [], result
    return result.status, result.out + result.err


def checked(bases: Bases, run_file: str, status: int, **files: bytes | str) -> str:
    """What a check tells of a model's folder with these files in place of its own."""
    placed = {f"model/{name.replace('_dot_', '.')}": content for name, content in files.items()}
    words = ("check", "--static", run_file)
    return told(bases, Case(words, placed, "model", frozenset({status})))[1]


TEMPLATES = {
    "loops in loops": (LOOP, "takes more than"),
    "a length of ten digits": ("{{ 'x' * 10**10 }}", "of memory"),
    "a filter that fills": ("{{ 'x' | center(10**10) }}", "of memory"),
    "a width of ten digits": ("{{ '%9999999999d' % 1 }}", "of memory"),
    "twice and twice": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "of memory",
    ),
    "100 MB": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "of memory"),
    "a loop for one prompt": (
        "{% if 'Count to 3' in messages[0].content %}" + LOOP + "{% endif %}{{ messages }}",
        "line 4: the teacher's chat template takes more than",
    ),
    "long for one prompt": (
        "{% if 'to 3' in messages[0].content %}{{ 'x' * 1100000 }}{% endif %}{{ messages }}",
        "line 4: the teacher's chat template makes 1,1",
    ),
    "40 loops, one in another": ("{% for x in [1] %}" * 40 + "{% endfor %}" * 40, "is broken"),
    "a million brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is broken"),
    "nothing by nothing": ("{{ 1 / 0 }}", "refuses it: division by zero"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_does_not_end(bases: Bases, kind: str) -> None:
    text, word = TEMPLATES[kind]
    assert word in checked(bases, "teacher.yaml", 2, chat_template_dot_jinja=text.encode())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"x" * 2_000_000, "expected at most 1,048,576"),
        ("{{ messages }}".encode("utf-16"), "chat_template.jinja: cannot be read"),
        ("pipe", "device or pipe"),
        ("link /dev/zero", "device or pipe"),
    ],
    ids=["2 MB", "UTF-16", "pipe", "device"],
)
def test_a_chat_template_that_is_none(bases: Bases, content: bytes | str, word: str) -> None:
    assert word in checked(bases, "teacher.yaml", 2, chat_template_dot_jinja=content)


SPARSE = ("tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize("name", SPARSE)
def test_a_file_of_a_model_that_has_no_end(bases: Bases, name: str, run_file: str) -> None:
    def change(place: Path) -> None:
        (place / "model" / name).unlink()
        (place / "model" / name).touch()
        os.truncate(place / "model" / name, 300 << 30)

    case = Case(("check", "--static", run_file), {}, "model", frozenset({2}))
    assert f"{name} has 322,122,547,200 bytes" in told(bases, case, change)[1]


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
@pytest.mark.parametrize("content", [300 << 30, "pipe", "link /dev/zero"], ids=str)
def test_a_card_without_end_says_nothing(bases: Bases, name: str, content: int | str) -> None:
    def change(place: Path) -> None:
        (place / "model" / "README.md").unlink()
        if isinstance(content, int):
            (place / "model" / name).touch()
            os.truncate(place / "model" / name, content)
        else:
            write(place, {f"model/{name}": content})

    case = Case(("check", "--static", "teacher.yaml"), {}, "model", frozenset({2}))
    assert "states no licence" in told(bases, case, change)[1]


def test_a_card_of_aliases_of_aliases_says_nothing(bases: Bases) -> None:
    """Written out, its licence has 9 ** 10 values."""
    tens = [f"c{i}: &c{i} [{', '.join([f'*c{i - 1}' if i else 'x'] * 9)}]" for i in range(10)]
    card = "\n".join(["---", *tens, "license: *c9", "---"]).encode()
    deep = b"---\n" + b"[" * 5000 + b"\n---\n"
    for content in (card, deep):
        assert "states no licence" in checked(bases, "teacher.yaml", 2, README_dot_md=content)


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize(
    "name", ["../../others/letter.txt", "/dev/zero", "", ".", "x" * 5000, "a/b.safetensors", "\x1b"]
)
def test_an_index_that_names_files_elsewhere(bases: Bases, name: str, run_file: str) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    case = Case(
        ("check", "--static", run_file),
        {"model/model.safetensors.index.json": index},
        "model",
        frozenset({2}),
    )

    def change(place: Path) -> None:
        (place / "model/model.safetensors").rename(place / "model/one.safetensors")

    assert "which is no *.safetensors beside it" in told(bases, case, change)[1]


@pytest.mark.parametrize("factor", ["x", -1, 1e300, True, [2]])
def test_a_factor_of_the_context_that_is_none(bases: Bases, factor: object) -> None:
    config = json.loads((TEACHER / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": factor, "rope_theta": 1e4}
    content = json.dumps(config).encode()
    word = "expected a finite one" if factor == 1e300 else "has the factor"
    assert word in checked(bases, "teacher.yaml", 2, config_dot_json=content)


def test_a_context_of_odd_factors_is_a_number(tmp_path: Path) -> None:
    for factor in ("x", None, 1e30, 4):
        scaling = {"rope_type": "yarn", "factor": factor}
        config = {"max_position_embeddings": 100, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert number(ModelFolder("m", tmp_path).context_tokens) is not None


PROMPTS: dict[str, tuple[str, bytes, str]] = {
    "LFS as text": ("p.txt", LFS, "is a Git LFS pointer"),
    "LFS as JSONL": ("p.jsonl", LFS, "is a Git LFS pointer"),
    "LFS as JSON": ("p.json", LFS, "is a Git LFS pointer"),
    "LFS as CSV": ("p.csv", LFS, "is a Git LFS pointer"),
    "a page as text": ("p.txt", b"<!DOCTYPE html>\n<html>Log in</html>\n", "is a web page"),
    "a page as JSONL": ("p.jsonl", b"\n <!doctype HTML>", "p.jsonl"),
    "columns of one name": ("p.csv", b"prompt,id,prompt\na,1,b\n", "two columns of one name"),
    "a long prompt": ("p.txt", b"x" * 5_000_000, "line 1: has 5,000,000 characters"),
    "a long chat": (
        "p.jsonl",
        ROWS + json.dumps({"messages": [{"role": "user", "content": "x " * 2_100_000}]}).encode(),
        "line 7: has 4,200,000 characters",
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_that_are_none(bases: Bases, kind: str) -> None:
    name, content, word = PROMPTS[kind]
    words = ("check", "--static", "sound.yaml", "--set", f"prompts.path={name}")
    assert word in told(bases, Case(words, {name: content}, statuses=frozenset({2})))[1]


def test_empty_columns_may_be_many(bases: Bases) -> None:
    """As spreadsheets leave them."""
    content = b"prompt,,\n" + b"".join(b"Say %d.,,\n" % i for i in range(6))
    words = ("check", "--static", "sound.yaml", "--set", "prompts.path=p.csv")
    assert told(bases, Case(words, {"p.csv": content}, statuses=frozenset({0})))[0] == 0


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "txt"])
def test_prompts_without_end(bases: Bases, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """One line of 300 GB: refused with the file and the bound, after a few megabytes."""
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(files, "LONGEST_TEXT", 1 << 20)

    def change(place: Path) -> None:
        (place / f"p.{form}").touch()
        os.truncate(place / f"p.{form}", 300 << 30)

    words = ("check", "--static", "sound.yaml", "--set", f"prompts.path=p.{form}")
    _, text = told(bases, Case(words, statuses=frozenset({2})), change)
    assert f"p.{form}: cannot be read" in text and "has more than 1,048,576 characters" in text


def test_the_longest_prompt_is_longer_than_any_context() -> None:
    assert select.LONGEST_PROMPT >= 4_000_000 < files.LONGEST_LINE


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "status.json", "summary.json"])
@pytest.mark.parametrize("words", [("report", "run"), ("check", "--static", "sound.yaml")])
def test_a_file_of_a_run_that_has_no_end(bases: Bases, name: str, words: tuple[str, ...]) -> None:
    def change(place: Path) -> None:
        (place / "run" / name).unlink(missing_ok=True)
        (place / "run" / name).touch()
        os.truncate(place / "run" / name, 300 << 30)

    told(bases, Case(words, {}, "run"), change)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", "pipe", 300 << 30], ids=str)
def test_revoke_names_a_run_that_it_cannot_read(bases: Bases, content: bytes | str | int) -> None:
    def change(place: Path) -> None:
        (place / "runs/a").mkdir(parents=True)
        if isinstance(content, int):
            (place / "runs/a/manifest.json").touch()
            os.truncate(place / "runs/a/manifest.json", content)
        else:
            write(place, {"runs/a/manifest.json": content})

    words = ("revoke", "store", "--teacher", "abab", "--runs", "runs", "--dry-run")
    status, text = told(bases, Case(words, {}, "store"), change)
    assert status in (0, 1) and "runs/a" in text


def test_a_folder_of_tasks_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> bool:
        with pytest.raises(RunError, match="has more than"):
            ask.folder_content(str(tmp_path))
        return True

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.yaml").write_text("task: a")
    (tmp_path / "up").symlink_to("..")
    os.mkfifo(tmp_path / "b.yaml")
    assert ask.folder_content(str(tmp_path)) == {"deep/a.yaml": b"task: a"}
    os.truncate(tmp_path / "deep/a.yaml", 300 << 30)
    assert refused()
    os.truncate(tmp_path / "deep/a.yaml", 0)
    monkeypatch.setattr(ask, "MOST_ENTRIES", 3)
    assert refused()
    # The whole disk: refused before it is looked through.
    with pytest.raises(RunError, match="has more than 3 files"):
        ask.folder_content("/")


def bomb(form: str, small: bool = False) -> bytes:
    """A file that unpacks to some hundred times its size: 24 MB, or a tenth of it."""
    number, text = 24 if small else 240, "x y " * 25_000
    if form == "parquet":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), [text])
        buffer = io.BytesIO()
        table = pa.table({"prompt": column, "response": column})
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()
    row = {"prompt": text, "response": text}
    if form == "json.gz":
        return gzip.compress(json.dumps([row] * number).encode())
    lines = "".join(json.dumps(row) + "\n" for _ in range(number))
    if form == "txt.gz":
        lines = f"{text}\n" * number
    if form == "csv.gz":
        lines = "prompt,response\n" + f"{text},{text}\n" * number
    return gzip.compress(lines.encode())


FORMS = ["parquet", "jsonl.gz", "json.gz", "csv.gz", "txt.gz"]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_unpacks_without_end(
    bases: Bases, monkeypatch: pytest.MonkeyPatch, form: str, small: bool
) -> None:
    monkeypatch.setattr(files, "LEAST_BOMB", 10_000_000)
    name, content = f"p.{form}", bomb(form, small)
    for setting in ("prompts.path", "prompts.overlap.path"):
        words = ("check", "--static", "sound.yaml", "--set", f"{setting}={name}")
        status, said = told(bases, Case(words, {name: content}))
        assert ("it unpacks to more than 300 times its size" in said) != small, said
        assert small or status == 2
    if form in ("parquet", "jsonl.gz"):
        words = ("store", "import", "store", name, "--teacher", "sound.yaml")
        status, said = told(bases, Case(words, {name: content}, "store"))
        assert ("it unpacks to more than 300 times" in said) != small, said


def test_what_is_not_packed_is_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LEAST_BOMB", 10)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Say it."}) + "\n")
    names = ("prompt", "messages", None, "source", None)
    source = files.PromptSource("prompts", None, (str(tmp_path),), "auto", *names)
    (file,), _ = files.find_files(source)
    with file.open_text() as lines:
        assert len(list(lines)) == 1


def test_a_text_of_a_dictionary_counts_as_often_as_it_is_named() -> None:
    texts = pa.array(["a" * 1000, "b", None])
    named = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, None, 2], pa.int32()), texts)
    assert unpacked_bytes(named) == 2001
    inside = pa.ListArray.from_arrays([0, 2, 5], pa.StructArray.from_arrays([named], ["content"]))
    assert unpacked_bytes(inside) == 2001
    assert unpacked_bytes(inside.slice(1)) == 1
    assert unpacked_bytes(pa.array([1, 2], pa.int64())) == 16


def test_what_is_no_folder_is_no_store_to_import_into(bases: Bases) -> None:
    given = json.dumps({"prompt": "Say it.", "response": "It."}).encode() + b"\n"
    words = ("store", "import", "/dev/null", "given.jsonl", "--teacher", "sound.yaml")
    status, said = told(bases, Case(words, {"given.jsonl": given}, "store", frozenset({1})))
    assert status == 1 and "/dev/null cannot be a teacher store" in said


@pytest.mark.parametrize("cut", [0, 1, 9, 20])
def test_a_broken_line_is_not_quoted_where_it_was_cut_in_a_secret(bases: Bases, cut: int) -> None:
    line = json.dumps(f"x {SECRET}")[3 + cut :] + '"}\n'
    words = ("check", "--static", "sound.yaml", "--set", "prompts.path=p.jsonl")
    content = b'{"prompt": "Say."}\n' + line.encode()
    _, said = told(bases, Case(words, {"p.jsonl": content}))
    assert "p.jsonl, line 2: is not JSON" in said and "***" in said
