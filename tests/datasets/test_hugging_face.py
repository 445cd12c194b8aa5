"""What ``store export`` writes is read by Hugging Face's ``datasets``, and what that writes by
``store import``.

The library runs in a process of its own, in another folder: the folder ``datasets`` here has its
name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from driver import main
from raystill.config.prompts import PromptsConfig
from raystill.datasets.exchange.export import SCHEMAS
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Provenance
from raystill.datasets.store.store import TeacherStore
from tests.datasets import test_import as importing
from tests.datasets.test_export import CHATS, MODEL, TOPK, fill, origin, read, stored

ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, sys
import datasets

assert datasets.__version__ and not datasets.__file__.startswith(ROOT), datasets.__file__
folder = sys.argv[1]
found = {}
ways = {
    "parquet": lambda **m: datasets.load_dataset("parquet", data_files=FILES, **m),
    "folder": lambda **m: datasets.load_dataset(folder, **m),
}
for way, load in ways.items():
    whole, streamed = load(), load(streaming=True)
    assert type(streamed).__name__ == "IterableDatasetDict"
    for split, rows in whole.items():
        assert list(streamed[split]) == list(rows), f"{way} {split}: the stream differs"
        assert str(streamed[split].features) == str(rows.features), (way, split)
        found[f"{way} {split}"] = {
            "rows": list(rows), "features": {n: repr(f) for n, f in rows.features.items()}
        }
saved = folder + "-saved"
whole.save_to_disk(saved)
again = datasets.load_from_disk(saved)
for split, rows in whole.items():
    assert list(again[split]) == list(rows) and again[split].features == rows.features
print(json.dumps(found))
"""
WRITE = """
import sys
import datasets

rows = datasets.load_dataset("parquet", data_files=FILES)["train"]
kind, out = sys.argv[2:]
if kind == "messages":
    rows = rows.select_columns(["messages"])
if kind == "shuffled":
    rows = rows.shuffle(seed=3)
if kind == "sharded":
    for shard in range(2):
        rows.shard(2, shard).to_parquet(f"{out}-{shard}.parquet")
elif out.endswith("jsonl"):
    rows.to_json(out, force_ascii=False)
else:
    rows.to_parquet(out)
"""


def run_library(code: str, folder: Path, *arguments: str) -> str:
    """Output of a process that has the library and not this folder on its path."""
    files: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.parquet")):
        files.setdefault(file.name.split("-")[0], []).append(str(file))
    head = f"ROOT, FILES = {str(ROOT)!r} + '/datasets', {files!r}\n"
    work = folder.parent / "work"
    work.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", head + code, str(folder), *arguments],
        cwd=work,
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.fixture(scope="module")
def tokeniser() -> PromptTokeniser:
    return PromptTokeniser(MODEL, PromptsConfig(path="none"))


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


def exported(store: TeacherStore, form: str, out: Path) -> dict[str, Any]:
    """What the library finds in a data set that was exported now."""
    assert main(["store", "export", store.path, str(out), "--format", form]) == 0
    return dict(json.loads(run_library(READ, out)))


INT32 = "List(Value('int32'))"
TOP = {"ids": "List(List(Value('int32')))", "values": "List(List(Value('float32')))"}
FLOATS, STRING = "List(Value('float32'))", "Value('string')"
FEATURES = {
    "trl": {
        "messages": "List({'role': Value('string'), 'content': Value('string')})",
        "prompt_ids": INT32,
        "completion_ids": INT32,
        "logprobs": TOP["values"],
        "logprob_token_ids": TOP["ids"],
        "sampled_logprobs": FLOATS,
        "tail_logprob": FLOATS,
        "teacher": STRING,
        "teacher_identity": STRING,
        "finish_reason": STRING,
        "key": STRING,
    },
    "distillkit": {
        "input_ids": INT32,
        "labels": INT32,
        "attention_mask": "List(Value('int8'))",
        "token_ids": TOP["ids"],
        "top_values": TOP["values"],
    },
}


@pytest.mark.parametrize("form", ["trl", "distillkit"])
def test_the_library_reads_what_was_written_with_its_features(
    store: TeacherStore, tokeniser: PromptTokeniser, tmp_path: Path, form: str
) -> None:
    """At once and as a stream, by file and by folder, and from its own copy on the disk."""
    fill(store, tokeniser)
    found = exported(store, form, tmp_path / "out")
    ways, splits = ("parquet", "folder"), ("train", "test")
    assert set(found) == {f"{way} {split}" for way in ways for split in splits}
    for name, one in found.items():
        assert one["features"] == FEATURES[form] and list(one["features"]) == SCHEMAS[form].names
        assert one["rows"] == read(tmp_path / "out", name.split()[1])
    if form == "trl":
        (test,) = found["folder test"]["rows"]
        assert test["messages"][:-1] == CHATS[3]
        assert len(test["completion_ids"]) == len(test["logprobs"]) == len(test["sampled_logprobs"])
        assert {len(ids) for ids in test["logprob_token_ids"]} == {TOPK.width}


def test_one_row_without_logprobs(
    store: TeacherStore, tokeniser: PromptTokeniser, tmp_path: Path
) -> None:
    """A column of nulls has its type in the file, so that two data sets can be put together."""
    rows = stored([tokeniser.encode(importing_prompt(CHATS[2]))], Signal("text"))
    store.publish(origin(Signal("text")), Provenance("run", "training"), rows)
    found = exported(store, "trl", tmp_path / "out")
    one = found["folder train"]
    assert one["features"] == FEATURES["trl"]
    (row,) = one["rows"]
    assert row["messages"][0]["content"] == CHATS[2][0]["content"]
    assert row["logprobs"] is row["sampled_logprobs"] is row["tail_logprob"] is None


def importing_prompt(chat: Any) -> Any:
    from raystill.datasets.prompts.read import RawPrompt

    return RawPrompt(None, chat, "", "")


def test_of_nothing_no_data_set_is_written(
    store: TeacherStore, tmp_path: Path, capsys: Any
) -> None:
    Path(store.path, "segments").mkdir(parents=True)
    assert main(["store", "export", store.path, str(tmp_path / "out")]) != 0
    assert capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("all", "set.jsonl"),
        ("all", "set.parquet"),
        ("shuffled", "set.parquet"),
        ("sharded", "set"),
        ("messages", "set.jsonl"),
        ("messages", "set.parquet"),
    ],
)
def test_what_the_library_writes_is_imported(
    tmp_path: Path, capsys: Any, kind: str, name: str
) -> None:
    """Of Parquet with ids and logprobs bit for bit; of JSON and of messages alone the text."""
    rows = importing.TestADataSetThatWasExported().fill(tmp_path, importing.LOCAL, capsys)
    run_library(WRITE, tmp_path / "set", kind, str(tmp_path / name))
    names = [f"set-{n}.parquet" for n in range(2)] if kind == "sharded" else [name]
    told = importing.run_import(tmp_path, capsys, *names)
    kept = {row["key"]: row for row in importing.rows_in(tmp_path)}
    assert set(kept) == set(rows["key"].to_pylist()) and not told["left_out"]
    if kind == "messages" or name.endswith("jsonl"):
        assert told["imported"] == {"text": len(rows)}
        assert importing.answered(tmp_path, "signal.kind=text") == (len(rows), True)
    else:
        assert told["imported"] == {"topk 3": len(rows)}
        for row in rows.select(["key", "prompt_ids", "response_ids"]).to_pylist():
            assert kept[row["key"]]["response_ids"] == row["response_ids"]
            assert kept[row["key"]]["prompt_ids"] == row["prompt_ids"]
        assert importing.answered(tmp_path) == (len(rows), True)
    assert importing.run_import(tmp_path, capsys, *names)["there"] == len(rows)
