"""The teacher's files on another node: what is missing is fetched, at the driver's commit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from raystill.base.errors import RunError
from raystill.model import files
from raystill.model.on_node import ModelSource, student_needs
from raystill.model.sampling import own_stop_ids
from tests.support.end_to_end import TEACHER

COMMIT, OLDER = "a" * 40, "b" * 40
NAME = "raystill/tiny"


def snapshot(cache: Path, commit: str = COMMIT, leave_out: tuple[str, ...] = ()) -> Path:
    """The teacher as the Hub's cache holds a download; ``main`` is this commit."""
    repository = cache / "models--raystill--tiny"
    folder = repository / "snapshots" / commit
    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns(*leave_out))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's own cache, which reaches no Hub; the driver's is not on it."""
    cache = tmp_path / "node"
    cache.mkdir()
    for module in ("huggingface_hub.constants", "huggingface_hub._snapshot_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


@pytest.fixture
def gone(tmp_path: Path) -> ModelSource:
    """A download that the driver has seen, on a machine that is not this one."""
    source = ModelSource.of(NAME, snapshot(tmp_path / "driver"))
    shutil.rmtree(tmp_path / "driver")
    return source


def test_a_folder_that_is_here_is_taken(tmp_path: Path) -> None:
    source = ModelSource.of("models/tiny", TEACHER)
    assert source.commit is None and "config.json" in source.files
    assert source.on_this_node("all") == source.on_this_node("none") == str(TEACHER)
    assert ModelSource.of(NAME, snapshot(tmp_path)).commit == COMMIT


def test_a_node_without_the_folder_takes_the_same_commit_from_its_own_cache(
    node: Path, gone: ModelSource
) -> None:
    here = snapshot(node)
    (node / "models--raystill--tiny" / "refs" / "main").write_text(OLDER)
    assert gone.on_this_node("all") == str(here)
    assert own_stop_ids(here) == own_stop_ids(TEACHER) != ()


@pytest.mark.parametrize(("weights", "whole"), [("none", True), ("head", False), ("all", False)])
def test_a_download_that_was_cut_short_is_not_taken_for_the_model(
    node: Path, gone: ModelSource, weights: str, whole: bool
) -> None:
    here = snapshot(node, leave_out=("*.safetensors",))
    if whole:
        assert gone.on_this_node(weights) == str(here)
        return
    with pytest.raises(RunError, match=r"without model\.safetensors.*HF_HUB_OFFLINE"):
        gone.on_this_node(weights)


def test_a_model_that_cannot_be_fetched_is_an_error_that_names_the_node(
    node: Path, gone: ModelSource
) -> None:
    with pytest.raises(RunError, match=f"the node .* cannot fetch '{NAME}' at {COMMIT}"):
        gone.on_this_node("none")


def test_a_local_folder_that_a_node_lacks_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    source = ModelSource.of("models/mine", folder)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"no .* in .*/teacher, .*a disk that all nodes share"):
        source.on_this_node("none")


def test_of_a_sharded_model_only_the_file_with_the_head_is_needed(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="1MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with_head = index["model.embed_tokens.weight"]  # The head is tied to it.
    without = next(file for file in sorted(set(index.values())) if file != with_head)
    source = ModelSource.of("models/sharded", folder)
    (folder / without).unlink()
    with pytest.raises(RunError, match=without):
        source.on_this_node("all")
    assert source.on_this_node("head") == str(folder)
    (folder / with_head).unlink()
    with pytest.raises(RunError, match=with_head):
        source.on_this_node("head")


def write_shards(folder: Path, num_layers: int) -> dict[str, str]:
    """A model in small files, two layers in some of them; the file of each tensor."""
    folder.mkdir(parents=True)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.mlp.{part}" for n in range(num_layers) for part in ("up", "down")]
    index = {name: f"model-{place // 3:05}.safetensors" for place, name in enumerate(names)}
    for file in set(index.values()):
        (folder / file).write_bytes(b"weights")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": num_layers}))
    return index


def test_files_of_layers_that_are_not_kept_are_not_asked_for(tmp_path: Path, node: Path) -> None:
    snapshots = "models--raystill--tiny/snapshots"
    index = write_shards(tmp_path / "driver" / snapshots / COMMIT, 12)
    source = ModelSource.of(NAME, tmp_path / "driver" / snapshots / COMMIT)
    shutil.rmtree(tmp_path / "driver")
    kept = [0, 5, 11]
    needed = {
        file
        for name, file in index.items()
        if ".layers." not in name or int(name.split(".")[2]) in kept
    }
    here = node / snapshots / COMMIT
    write_shards(here, 12)
    (node / "models--raystill--tiny" / "refs").mkdir()
    for file in set(index.values()) - needed:
        (here / file).unlink()
    assert len(needed) == 4 and len(set(index.values())) == 9
    assert source.on_this_node("all", lambda number: [n for n in kept if n < number]) == str(here)
    with pytest.raises(RunError, match=r"without model-.*HF_HUB_OFFLINE"):
        source.on_this_node("all")
    with pytest.raises(RunError, match=r"without model-.*HF_HUB_OFFLINE"):
        source.on_this_node("all", lambda number: [0, 5, 10])


WRONG = ["two lists of layers", "no index", "a broken index", "no number", "a list of files"]
WRONG += ["a number of 5,000 digits", "a number of layers that is none"]


@pytest.mark.parametrize("wrong", WRONG)
def test_all_files_are_asked_for_where_the_index_does_not_say_it(
    tmp_path: Path, wrong: str
) -> None:
    folder = tmp_path / "teacher"
    index = write_shards(folder, 4)
    if wrong == "two lists of layers":
        index |= {f"vision.layers.{n}.weight": "model-00000.safetensors" for n in range(4)}
    last = index["model.layers.3.mlp.down"]
    if wrong == "a list of files":
        index["model.layers.3.mlp.down"] = [last]  # type: ignore[assignment]
        index["lm_head.weight"] = [last]  # type: ignore[assignment]
    if wrong == "a number of 5,000 digits":
        index[f"model.layers.{'9' * 5000}.mlp.down"] = last
    text = "[]" if wrong == "a broken index" else json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    if wrong == "no index":
        (folder / "model.safetensors.index.json").unlink()
    if wrong == "no number":
        (folder / "config.json").write_text("{}")
    if wrong == "a number of layers that is none":
        (folder / "config.json").write_text('{"num_hidden_layers": "four"}')
    source = ModelSource.of("models/mine", folder)
    (folder / last).unlink()
    with pytest.raises(RunError, match="has no model-"):
        source.on_this_node("all", lambda _: [0])


@pytest.mark.parametrize(
    ("init", "kind", "needed"),
    [("from_teacher", "topk", "all"), ("model", "topk", "none"), ("model", "hidden", "head")],
)
def test_a_worker_asks_for_what_its_student_needs(init: str, kind: str, needed: str) -> None:
    config = SimpleNamespace(student=SimpleNamespace(init=init), signal=SimpleNamespace(kind=kind))
    assert student_needs(config) == needed  # type: ignore[arg-type]
    of_another = "head" if kind == "hidden" else "none"  # Which gives it the student.
    assert student_needs(config, reads=False) == of_another  # type: ignore[arg-type]


def test_the_weights_are_fetched_at_the_commit_that_was_checked(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot(node)
    requested = {}

    def download(name: str, revision: str | None, **_: object) -> str:
        requested[name] = revision
        return str(node)

    monkeypatch.setattr(
        files,
        "find_model",
        lambda *_: files.ModelLookup(
            files.ModelFolder(NAME, node / "models--raystill--tiny" / "snapshots" / COMMIT)
        ),
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files.fetch_model(NAME)
    assert requested == {NAME: COMMIT}
