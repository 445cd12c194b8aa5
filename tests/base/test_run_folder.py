"""The run folder: where it is, that it pickles, and that files in it are never half written."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from raystill.base.errors import ConfigError
from raystill.base.run_folder import (
    RunFolder,
    resolve_input,
    resolve_output,
    resolve_store,
    split_query,
)

RUN = {
    "teacher": {"model": "m"},
    "student": {"layers": [0]},
    "prompts": {"path": "p.txt"},
}


def test_files_and_tables_come_back(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run")).ensure()
    table = pa.table({"row": [0, 1], "text": ["a", "b"]})
    folder.write_text("prompts/note.txt", "zwölf")
    folder.write_table("prompts/train.parquet", table)
    again = pickle.loads(pickle.dumps(folder))
    assert again == folder
    assert again.local == tmp_path / "run"
    assert again.read_text("prompts/note.txt") == "zwölf"
    assert again.read_table("prompts/train.parquet").equals(table)
    assert again.read_table("prompts/train.parquet", ["row"]).column_names == ["row"]
    assert again.exists("prompts/note.txt")
    assert not again.exists("prompts/none.txt")
    assert again.names() == ["logs", "prompts"]
    assert again.join("a/b") == f"{tmp_path}/run/a/b"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_text("summary.json", "old")
    with pytest.raises(TypeError):
        folder.write_bytes("summary.json", None)
    assert folder.read_text("summary.json") == "old"
    assert folder.names() == ["summary.json"]


def test_a_folder_elsewhere_keeps_its_logs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(RunFolder, "_opened", lambda self: (store, "bucket/run"))
    folder = RunFolder("s3://bucket/run").ensure()
    folder.write_text("a/b.txt", "x")
    assert folder.read_text("a/b.txt") == "x"
    assert (tmp_path / "bucket/run/a/b.txt").read_text() == "x"
    assert folder.join("a/b.txt") == "s3://bucket/run/a/b.txt"
    assert folder.local is None
    assert folder.logs.is_dir()
    assert folder.logs == RunFolder("s3://bucket/run").logs
    assert folder.logs != RunFolder("s3://bucket/other").logs


QUERY = "?region=eu-west-1&endpoint_override=localhost:9000&scheme=http"


def test_a_query_stays_behind_the_path() -> None:
    folder = RunFolder(f"s3://me:se%2Fcret@bucket/runs/one/{QUERY}")
    assert folder.join("a/b") == f"s3://me:se%2Fcret@bucket/runs/one/a/b{QUERY}"
    assert folder.join("") == folder.path
    assert folder.root == "bucket/runs/one"
    delayed = f"{folder.join('a/b')}&allow_delayed_open=true"  # One request for a small file.
    filesystem, path = pafs.FileSystem.from_uri(delayed)
    assert path == "bucket/runs/one/a/b"
    assert filesystem == folder.filesystem()
    store = resolve_store(None, folder)
    assert store == f"s3://me:se%2Fcret@bucket/runs/teacher_store{QUERY}"
    assert RunFolder(store).filesystem() == folder.filesystem()
    assert RunFolder("/a?b=c").join("d") == "/a?b=c/d"


def test_the_default_store_is_in_the_bucket_of_the_run() -> None:
    for output in ("s3://bucket/run", "s3://bucket/run/"):
        assert resolve_store(None, RunFolder(output)) == "s3://bucket/teacher_store"
    assert resolve_store(None, RunFolder("/run")) == "/teacher_store"
    for output in ("s3://bucket", "s3://bucket/", f"s3://bucket{QUERY}"):
        with pytest.raises(ConfigError, match=r"output.path: s3://bucket.* is a whole bucket, so"):
            resolve_store(None, RunFolder(output))
        assert resolve_store("s3://other/store", RunFolder(output)) == "s3://other/store"


@pytest.mark.parametrize(
    ("uri", "query"),
    [
        ("s3://b/p.jsonl?region=a", "?region=a"),
        ("s3://b/part-?.jsonl?region=a&scheme=http", "?region=a&scheme=http"),
        ("s3://b/*?endpoint_override=http://h:1/", "?endpoint_override=http://h:1/"),
        ("s3://b/part-?.jsonl", ""),
        ("s3://b/?ear=2024/*.jsonl", ""),
        ("a?b=c", ""),
    ],
)
def test_a_query_is_told_from_a_glob(uri: str, query: str) -> None:
    assert split_query(uri) == (uri.removesuffix(query), query)


def test_output_is_named_after_the_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_output(None, "configs/tiny.yaml") == f"{tmp_path}/runs/tiny"
    assert resolve_output("out", "tiny.yaml") == f"{tmp_path}/out"
    assert resolve_output("/a/../b", "tiny.yaml") == "/b"
    assert resolve_output("s3://b/x", "tiny.yaml") == "s3://b/x"


def test_relative_output_goes_to_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSTILL_HOME", "/shared/raystill")
    monkeypatch.chdir(tmp_path)
    assert resolve_output(None, "tiny.yaml") == "/shared/raystill/runs/tiny"


def test_relative_output_is_refused_where_ray_will_delete_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"output.path: 'runs/tiny' is relative.*RAYSTILL_HOME"):
        resolve_output(None, "tiny.yaml")
    assert resolve_output("/data/x", "tiny.yaml") == "/data/x"
    monkeypatch.setenv("RAYSTILL_HOME", "/shared")
    assert resolve_output(None, "tiny.yaml") == "/shared/runs/tiny"


def test_inputs_are_looked_for_at_home_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a.txt").touch()
    monkeypatch.setenv("RAYSTILL_HOME", str(tmp_path / "home"))
    assert resolve_input("a.txt") == f"{tmp_path}/home/a.txt"
    assert resolve_input("b.txt") == "b.txt"
    assert resolve_input("s3://a.txt") == "s3://a.txt"


def test_a_remote_folder_opens_its_file_system_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew for each call, connections and an instance's credentials would be had anew too."""
    from raystill.base import run_folder

    opened = []

    class FileSystem:
        @staticmethod
        def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
            opened.append(uri)
            return pafs.LocalFileSystem(), "/nowhere/"

    monkeypatch.setattr(run_folder.pafs, "FileSystem", FileSystem)
    for _ in range(3):
        folder = RunFolder("mock-scheme://bucket/run")
        assert folder.root == "/nowhere"
        assert not folder.exists("x")
    assert opened == ["mock-scheme://bucket/run"]
