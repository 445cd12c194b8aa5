"""Model folders that are broken, or are not what they say: refused before anything is started.

Each case is a small model's folder with one thing changed. The static check reads headers and
sizes; no weights are loaded, and neither torch nor transformers.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import driver
from raystill.cluster.check.static import check_run_file
from raystill.model.weights import header_of
from tests.support.end_to_end import TEACHER

NUM_LAYERS, HIDDEN, ROWS = 2, 64, 49152
SETTINGS = ("config.json", "generation_config.json")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2140\nsize 269060552\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small teacher's folder, copied; sound.yaml trains it from another one's answers."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    rows = [{"prompt": f"Count to {i}."} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = {
        "teacher": {"model": str(TEACHER), "sampling": {"max_tokens": 8}},
        "student": {"init": "model", "model": "model"},
        "prompts": {"path": "prompts.jsonl"},
        "training": {"rows_per_step": 4},
        "stream": {"group_rows": 2},
    }
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(config))
    config |= {"teacher": config["teacher"] | {"model": "model"}, "student": {"layers": [1]}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(config))
    return folder


def refused(capsys: pytest.CaptureFixture[str], run_file: str, *words: str) -> str:
    assert driver.main(["check", "--static", run_file]) == driver.EXIT_REFUSED
    told = capsys.readouterr()
    text = told.out + told.err
    assert "Traceback" not in text and "unexpected:" not in text
    assert len(text) <= 4000
    for word in words:
        assert word in text
    return text


def change(file: Path, **values: Any) -> None:
    """Change a JSON object's keys; None takes one out."""
    whole = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
def test_the_folder_is_sound_as_it_is(model: Path, run_file: str) -> None:
    assert check_run_file(run_file).problems == []


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b'{"vocab_size": 4', b"just text", b'"text"', b"[]", b"null", b"3"),
        *(b"\xff\xfe", b"[" * 100_000, b"<html></html>", LFS.encode()),
    ],
    ids=lambda content: repr(content[:16]),
)
def test_settings_that_are_no_object(
    model: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, run_file: str
) -> None:
    (model / name).write_bytes(content)
    refused(capsys, run_file, name, "fetch or save the model again")


WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in ("vocab_size", "num_hidden_layers") for value in (0, -1, "8", [8])),
    *(("max_position_embeddings", value) for value in ("8192", -3, True, {}, float("nan"), 1e300)),
    *(("rope_parameters", value) for value in ("yarn", 3, ["yarn"])),
    *(("model_type", value) for value in (3, ["llama"], {})),
    *(("architectures", value) for value in ("LlamaForCausalLM", 3, [3], {})),
    *(("eos_token_id", value) for value in ("</s>", [[2]], -1, 2.5, True, 2**70)),
    *(("text_config", value) for value in ("x", [1], 3)),
    *((name, 0) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")),
    *(("intermediate_size", value) for value in ("128", [128, "x"], -1)),
    *((name, value) for name in ("rms_norm_eps", "rope_theta") for value in ("x", 0, -1, 1e300)),
    *(("dtype", value) for value in ("float99", 16, ["bfloat16"])),
    *(("tie_word_embeddings", value) for value in ("no", 1, [])),
    *(("hidden_act", value) for value in ("nosuch", 3, ["silu"])),
    *(("rope_scaling", {"rope_type": value}) for value in ("nosuch", 3)),
    *(("layer_types", value) for value in ("full_attention", [1, 2], ["full_attention"])),
    *((name, value) for name in ("bos_token_id", "pad_token_id") for value in ("x", 0.5, True)),
    *(("eos_token_id", value) for value in (10**6, [49152, 49153])),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_settings_of_the_wrong_type(
    model: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    change(model / "config.json", **{key: value})
    refused(capsys, "student.yaml", "config.json", key)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("top_p", []), ("top_k", {}), ("eos_token_id", "x")]
)
def test_sampling_of_the_wrong_type(
    model: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    change(model / "generation_config.json", **{key: value})
    refused(capsys, "teacher.yaml", "generation_config.json", key)


def cut(folder: Path, length: int) -> None:
    os.truncate(folder / "model.safetensors", length)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def header(entry: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (written(b""), "is empty"),
    "one byte": (written(b"x"), "cut off or no safetensors file"),
    "HTML": (written(b"<!DOCTYPE html><html>Log in</html>"), "is a web page"),
    "HTML, later": (written(b"\n\n  <HTML>\n<body>"), "is a web page"),
    "LFS pointer": (written(LFS.encode()), "git lfs pull"),
    "pickle": (written(b"PK\x03\x04" + b"\0" * 90), "is a pickle"),
    "text": (written(b"Entry not found and more"), "cut off or no safetensors file"),
    "JSON": (written(b'{"error": "gone"}'), "is a text"),
    "cut in the header": (lambda folder: cut(folder, 100), "cut off"),
    "cut in the data": (lambda folder: cut(folder, 1_000_000), "are missing: the file is cut off"),
    "one byte short": (
        lambda folder: cut(folder, (folder / "model.safetensors").stat().st_size - 1),
        "1 are missing",
    ),
    "too long": (lambda folder: (folder / "model.safetensors").open("ab").write(b"xx"), "too many"),
    "zeros": (written(b"\0" * 64), "no JSON object"),
    "header of 2^64": (written(b"\xff" * 16), "header of 18,446,744,073,709,551,615"),
    "header of 100 GB": (written(struct.pack("<Q", 10**11) + b"{}"), "header of 100,000,000,000"),
    "header too deep": (written(struct.pack("<Q", 50_000) + b"[" * 50_000), "no JSON object"),
    "header a list": (written(header([])), "no JSON object"),
    "header not UTF-8": (written(struct.pack("<Q", 2) + b"\xff\xfe"), "no JSON object"),
    "entry a number": (written(header({"a": 3})), "without shape or place"),
    "no shape": (written(header({"a": ENTRY | {"shape": None}}, b"x" * 8)), "without shape"),
    "shape of text": (written(header({"a": ENTRY | {"shape": ["2"]}}, b"x" * 8)), "without shape"),
    "negative shape": (written(header({"a": ENTRY | {"shape": [-2]}}, b"x" * 8)), "without shape"),
    "offsets back": (
        written(header({"a": ENTRY | {"data_offsets": [8, 0]}}, b"x" * 8)),
        "without shape or place",
    ),
    "other size": (written(header({"a": ENTRY | {"shape": [3]}}, b"x" * 8)), "gives 'a' 8 bytes"),
    "pipe": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            os.mkfifo(folder / "x.safetensors"),
        ),
        "is no file",
    ),
    "folder": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors").mkdir(),
        ),
        "is no file",
    ),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors"),
}


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_none(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str, run_file: str
) -> None:
    spoil, word = FILES[kind]
    spoil(model)
    refused(capsys, run_file, "safetensors", word)


INDICES: dict[str, tuple[Any, str]] = {
    "no map": ({}, "has no weight_map"),
    "a list": ({"weight_map": ["a"]}, "has no weight_map"),
    "numbers": ({"weight_map": {"a": 1}}, "has no weight_map"),
    "a shard that is not there": ({"weight_map": {"a": "b.safetensors"}}, "names 'b.safetensors'"),
    "a tensor elsewhere": ({"weight_map": {"a": "one.safetensors"}}, "says that 'a' is in one"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_is_wrong(model: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    value, word = INDICES[kind]
    (model / "model.safetensors").rename(model / "one.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(value))
    refused(capsys, "student.yaml", "model.safetensors.index.json", word)


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "T5": (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
        | {"is_encoder_decoder": True},
        "a decoder alone",
    ),
    "T5 that does not say": ({"model_type": "t5", "architectures": None}, "is no decoder"),
    "BERT": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "the next token"),
    "CLIP": ({"model_type": "clip", "architectures": ["CLIPModel"]}, "is no decoder"),
    "unknown": ({"model_type": "newarch", "architectures": ["NewForCausalLM"]}, "does not know"),
    "own code": (
        {"model_type": "newarch", "auto_map": {"AutoModelForCausalLM": "modeling_new.NewModel"}},
        "set student.trust_remote_code: true",
    ),
    "no type": ({"model_type": None}, "has no model_type"),
    "GPT-2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "another architecture"),
    "BLOOM": ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "another archi"),
    "fewer ids": ({"vocab_size": 1000}, "vocab_size 1000, but the weights have 49152"),
    "more ids": ({"vocab_size": 50000}, "vocab_size 50000, but the weights have 49152"),
    "another width": ({"hidden_size": 576}, "hidden_size 576, but the weights have 64"),
    "more layers": ({"num_hidden_layers": 30}, "30 layers, but the weights have 2"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "cannot be trained"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_another_kind(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    values, word = KINDS[kind]
    change(model / "config.json", **values)
    refused(capsys, "student.yaml", "student.model", word)


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 7}, "o_proj.weight of [64, 64], but by config.json it would"),
    "key-value heads": ({"num_key_value_heads": 2}, "k_proj.weight of [32, 64]"),
    "key-value heads without a group": ({"num_key_value_heads": 7}, "a divisor of the 2 heads"),
    "neurons": ({"intermediate_size": 100}, "down_proj.weight of [64, 128]"),
    "size of a head": ({"head_dim": 3}, "k_proj.weight of [32, 64]"),
    "a head of its own": ({"tie_word_embeddings": False}, "has no lm_head.weight"),
}


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize("kind", SIZES)
def test_settings_that_the_weights_do_not_have(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str, run_file: str
) -> None:
    values, word = SIZES[kind]
    change(model / "config.json", **values)
    refused(capsys, run_file, word)


Tensors = dict[str, dict[str, Any]]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: entry for name, entry in tensors.items() if part not in name}


def shaped(part: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {n: {"shape": shape} for n in tensors if n.endswith(part)}


def change_weights(folder: Path, change_tensors: Callable[[Tensors], Tensors]) -> None:
    """Write the folder's weights anew: all zero, with the names, shapes and types that are left."""
    file, end, entries = folder / "model.safetensors", 0, {}
    for name, entry in change_tensors(header_of(file)).items():
        kept = {"dtype": "BF16"} | {key: entry[key] for key in ("dtype", "shape") if key in entry}
        size = math.prod(kept["shape"]) * (2 if kept["dtype"] == "BF16" else 1)
        entries[name] = kept | {"data_offsets": [end, end + size]}
        end += size
    file.unlink()
    file.write_bytes(header(entries))
    os.truncate(file, file.stat().st_size + end)


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a projection": (without("layers.1.self_attn.q_proj"), "self_attn.q_proj.weight in layer 1"),
    "a norm in a layer": (without("layers.0.input_layernorm"), "input_layernorm.weight in layer 0"),
    "the last norm": (without("model.norm"), "has no norm.weight"),
    "the embeddings": (without("embed_tokens"), "has no embed_tokens.weight"),
    "every layer": (lambda _: {"a": {"shape": (1,)}}, "no tensor of a layer, but for instance 'a'"),
    "another name": (
        lambda tensors: {f"transformer.{name}": entry for name, entry in tensors.items()},
        "no tensor of a layer, but for instance 'transformer.model.",
    ),
    "a row": (shaped("layers.0.self_attn.q_proj.weight", 63, 64), "q_proj.weight of [63, 64]"),
    "half a norm": (shaped("model.norm.weight", 32), "norm.weight of [32]"),
    "flat embeddings": (shaped("embed_tokens.weight", 64), "embed_tokens.weight of [64]"),
    "whole numbers": (
        lambda tensors: {name: entry | {"dtype": "I8"} for name, entry in tensors.items()},
        "of the type I8, and no quantization_config",
    ),
    "yes and no": (
        lambda tensors: {name: entry | {"dtype": "BOOL"} for name, entry in tensors.items()},
        "of the type BOOL, and no quantization_config",
    ),
}


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize("kind", TENSORS)
def test_weights_that_lack(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str, run_file: str
) -> None:
    """transformers would begin with random ones in their place, after a warning alone."""
    change_tensors, word = TENSORS[kind]
    change_weights(model, change_tensors)
    refused(capsys, run_file, word)


@pytest.mark.parametrize("kind", ["T5", "BERT", "unknown", "own code", "GPT-2", "more layers"])
def test_a_teacher_of_another_kind(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    values, word = KINDS[kind]
    change(model / "config.json", **values)
    refused(capsys, "teacher.yaml", "teacher.model", word.replace("student", "teacher"))


def test_fewer_ids_than_the_tokenizer_names(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights and config.json agree, and the tokenizer is the teacher's own."""
    change(model / "config.json", vocab_size=1000)
    change_weights(model, shaped("embed_tokens.weight", 1000, HIDDEN))
    for run_file in ("teacher.yaml", "student.yaml"):
        refused(capsys, run_file, "has 1000 ids, but the teacher's tokenizer names 49152")


@pytest.mark.parametrize(
    ("run_file", "role"), [("teacher.yaml", "teacher"), ("student.yaml", "student")]
)
def test_own_code_that_is_trusted_is_a_notice(model: Path, run_file: str, role: str) -> None:
    change(model / "config.json", **KINDS["own code"][0])
    checked = check_run_file(run_file, [f"{role}.trust_remote_code=true"])
    assert checked.problems == []
    assert any("Python code of its own" in notice for notice in checked.notices)


@pytest.mark.parametrize("engine", ["synthetic"])
def test_weights_that_nobody_reads_are_not_judged(model: Path, engine: str) -> None:
    """An engine that needs the tokenizer alone, and a student with weights of its own."""
    (model / "model.safetensors").write_text(LFS)
    student = ["student.init=model", f"student.model={TEACHER}", "student.layers=null"]
    checked = check_run_file("teacher.yaml", [f"teacher.engine={engine}", *student])
    assert checked.problems == []


@given(position=st.integers(0, 4000), byte=st.integers(0, 255), length=st.integers(0, 5000))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_header_is_read_or_refused(
    tmp_path: Path, position: int, byte: int, length: int
) -> None:
    """By the reader: a byte changed, and the file cut off."""
    content = bytearray(header({f"layer.{i}": ENTRY for i in range(40)}, b"x" * 8))
    content[position % len(content)] = byte
    file = tmp_path / "x.safetensors"
    file.write_bytes(content[:length])
    try:
        assert isinstance(header_of(file), dict)
    except ValueError as error:
        assert str(error)
