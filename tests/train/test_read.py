"""A student whose layers are known before: only they are read, and it is the same student."""

import json
import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raystill.config.run import RunConfig
from raystill.train.start import read
from raystill.train.start.read import read_layers
from raystill.train.student import build
from raystill.train.student.build import build_student
from tests.train.test_family_table import FAMILIES, teacher_of

LAYERS = [3, 0, 3]
ORDERED = {"DeepseekV3": [0, 1, 1], "Glm4Moe": [0, 3, 3]}
"""Of families whose dense layers come first."""


def config_of(folder: Path, layers: list[int]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(folder)},
            "student": {"layers": layers},
            "prompts": {"path": "unused"},
        }
    )


def everything(model: Any) -> dict[str, Any]:
    """All that a model is: its tensors by name, and what its configurations and layers say."""
    said = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    said |= {"kind": type(model), "training": model.training, "folder": model.config.name_or_path}
    tensors = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    modules = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        # A cut model's list of layers is new, and of another mode than the layers in it.
        if key not in ("training", "_is_hf_initialized")
        if isinstance(value, bool | int | float | str)
    }
    trained = {name: one.requires_grad for name, one in model.named_parameters()}
    return {"said": said, "tensors": tensors, "modules": modules, "trained": trained}


def require_same(ours: Any, theirs: Any) -> None:
    mine, whole = everything(ours), everything(theirs)
    tensors, expected = mine.pop("tensors"), whole.pop("tensors")
    assert mine == whole
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    own = {one.data_ptr() for one in ours.parameters()}
    assert len(own) == len(list(ours.parameters())), "two parameters share their numbers"


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a student by its layers alone, and as one that is cut from the whole teacher."""

    def build_both(folder: Path, layers: list[int]) -> tuple[Any, Any]:
        found: list[Any] = []
        monkeypatch.setattr(build, "read_layers", lambda *a: found.append(read_layers(*a)))
        config = config_of(folder, layers)
        whole, state = build_student(config, str(folder), 7), torch.get_rng_state()
        assert found[0] is not None, "it was read whole"
        monkeypatch.undo()
        ours = build_student(config, str(folder), 7)
        assert torch.equal(torch.get_rng_state(), state), "what is drawn next would differ"
        return ours, whole

    return build_both


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_student_that_is_cut_from_the_whole_teacher(
    tmp_path: Path, both: Any, family: str
) -> None:
    torch.manual_seed(1)
    teacher = teacher_of(family).to(torch.bfloat16)
    teacher.generation_config.temperature, teacher.generation_config.do_sample = 0.6, True
    teacher.save_pretrained(tmp_path, max_shard_size="4KB")
    require_same(*both(tmp_path, ORDERED.get(family, LAYERS)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in one file, of four layers."""
    folder = tmp_path_factory.mktemp("llama")
    teacher_of("Llama").save_pretrained(folder)
    return folder


def changed(llama: Path, folder: Path, tensors: Any = None, **settings: Any) -> Path:
    """A copy of the teacher with other tensors, or another configuration."""
    whole = load_file(llama / "model.safetensors")
    save_file(tensors(whole) if tensors else whole, folder / "model.safetensors")
    config = json.loads((llama / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_layers_that_are_not_kept_need_not_be_there(tmp_path: Path) -> None:
    teacher_of("Qwen3Moe").save_pretrained(tmp_path, max_shard_size="1KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    left_out = {name for name in index if ".layers.1." in name or ".layers.3." in name}
    needed = {file for name, file in index.items() if name not in left_out}
    removed = {index[name] for name in left_out} - needed
    assert len(removed) > 4
    for file in removed:
        (tmp_path / file).unlink()
    student = build_student(config_of(tmp_path, [0, 2]), str(tmp_path), 0)
    assert student.config.num_hidden_layers == 2


def test_the_rest_is_brought_where_the_kept_layers_alone_will_not_do(
    llama: Path, tmp_path: Path
) -> None:
    def tensors(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return whole | {"model.layers.3.mlp.other.weight": torch.ones(2)}

    alone, brought = tmp_path / "alone", tmp_path / "brought"
    alone.mkdir()
    brought.mkdir()
    changed(llama, alone, tensors)
    changed(llama, brought)
    calls: list[Path] = []

    def rest() -> str:
        calls.append(brought)
        return str(brought)

    config = config_of(alone, [0, 3])
    student = build_student(config, str(alone), 0, rest=rest)
    assert calls == [brought] and student.config.name_or_path == str(brought)
    build_student(config, str(brought), 0, rest=rest)
    assert calls == [brought], "what is kept was there"


def test_files_in_another_precision_than_the_configuration_says(
    llama: Path, tmp_path: Path, both: Any
) -> None:
    require_same(*both(changed(llama, tmp_path, dtype="bfloat16"), [0, 3]))


def test_names_without_the_models_own_prefix_and_layers_that_it_does_not_run(
    llama: Path, tmp_path: Path, both: Any
) -> None:
    def bare(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next_tokens = {f"layers.{n}.mlp.up_proj.weight": torch.ones(2) for n in (4, 5)}
        return {name.removeprefix("model."): t for name, t in whole.items()} | next_tokens

    require_same(*both(changed(llama, tmp_path, bare), [0, 3]))


@pytest.mark.parametrize("wrong", ["missing", "unknown", "no precision", "two lists", "adapters"])
def test_what_is_not_certain_is_read_whole(llama: Path, tmp_path: Path, wrong: str) -> None:
    def tensors(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if wrong == "missing":
            del whole["model.layers.3.mlp.up_proj.weight"]
        if wrong == "unknown":
            whole["model.layers.3.mlp.other.weight"] = torch.ones(2)
        if wrong == "two lists":
            whole = {name.replace("model.", "text."): tensor for name, tensor in whole.items()}
            whole |= {f"vision.layers.{n}.weight": torch.ones(2) for n in range(4)}
        return whole

    settings: dict[str, Any] = {"dtype": None} if wrong == "no precision" else {}
    folder = changed(llama, tmp_path, tensors, **settings)
    if wrong == "adapters":
        (folder / "adapter_config.json").write_text("{}")
    assert read_layers(str(folder), [0, 3]) is None


def test_what_a_left_out_layer_lacks_does_not_matter(llama: Path, tmp_path: Path) -> None:
    def tensors(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del whole["model.layers.3.mlp.up_proj.weight"]
        return whole

    assert read_layers(str(changed(llama, tmp_path, tensors)), [0, 2]) is not None


EXPERTS = {
    **{"vocab_size": 512, "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 8},
    **{"intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8},
    **{"num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 2, "dtype": "bfloat16"},
}
EXPERT = {"gate_proj": (512, 1024), "up_proj": (512, 1024), "down_proj": (1024, 512)}


def write_holes(folder: Path) -> int:
    """A mixture of experts in one file, whose weights are a hole; the size of the weights."""
    config = transformers.Qwen3MoeConfig(**EXPERTS)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if ".experts." not in n}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            for name, shape in EXPERT.items():
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def test_memory_follows_the_kept_layers(tmp_path: Path) -> None:
    size = write_holes(tmp_path)
    assert size > 600e6
    read.read_layers(str(tmp_path), [0])  # What is loaded once, such as code.
    process = psutil.Process()
    # Linux: the largest resident size begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = process.memory_info().rss
    model = read_layers(str(tmp_path), [0, 12])
    assert model is not None and model.config.num_hidden_layers == 2
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    peak = int(line.split()[1]) * 1024 - before
    kept = size / 12
    # The file's pages, and the experts joined. The whole teacher takes more than twice its size.
    assert 0.5 * kept < peak < 4 * kept, f"{peak / 1e6:.0f} MB for {kept / 1e6:.0f} MB"
