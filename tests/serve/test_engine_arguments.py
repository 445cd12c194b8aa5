"""Engine arguments in the keys of answers; a replica refuses what is not as its keys say."""

import ast
import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.model.identity import identity_of_teacher
from raystill.model.on_node import ModelSource
from raystill.serve import replica as replica_module
from raystill.serve.engine.arguments import (
    DEFAULTS,
    FIXED,
    NEUTRAL,
    NEUTRAL_NAMES,
    OWNED,
    engine_argument_problems,
    keyed_arguments,
)
from raystill.serve.replica import ReplicaSettings, Teacher
from tests.support.runs import run_of

OF_OTHER_VERSIONS = {"swap_space", "disable_log_requests"}
CHANGES_ANSWERS = {
    *("kv_cache_dtype", "kv_cache_dtype_skip_layers", "load_format", "model_loader_extra_config"),
    *("hf_config_path", "model_class_overrides", "code_revision", "worker_cls"),
    *("quantization_config", "enable_lora", "default_mm_loras", "additional_config"),
    *("disable_sliding_window", "logits_processors", "watermark_config", "speculative_config"),
    *("attention_backend", "compilation_config"),
}


def teacher_of(**fields: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": "m", **fields})


def run_config(model: str, **teacher: Any) -> RunConfig:
    settings = {
        "teacher": {"model": model, **teacher},
        "student": {"layers": [0]},
        "prompts": {"path": "p.jsonl"},
    }
    return RunConfig.model_validate(settings)


def vllm_sources() -> Path:
    """The installed vLLM's folder, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(spec.origin).parent


def fields_of(file: Path) -> dict[str, dict[str, ast.expr | None]]:
    """Fields of each class in a Python file, with the expressions of their defaults."""
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: {
            line.target.id: line.value
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
        for node in classes
    }


def engine_fields() -> dict[str, ast.expr | None]:
    classes = fields_of(vllm_sources() / "engine" / "arg_utils.py")
    return {**classes["EngineArgs"], **classes["AsyncEngineArgs"]}


def test_the_neutral_arguments_are_vllms_and_each_has_one_reason() -> None:
    assert engine_fields().keys() >= NEUTRAL_NAMES - OF_OTHER_VERSIONS
    assert sum(len(names.split()) for names in NEUTRAL.values()) == len(NEUTRAL_NAMES)
    assert not NEUTRAL_NAMES & (DEFAULTS.keys() | FIXED.keys())


def test_no_argument_that_changes_answers_is_neutral() -> None:
    assert engine_fields().keys() >= CHANGES_ANSWERS
    value = {"of": "no default"}
    for name in CHANGES_ANSWERS:
        assert keyed_arguments(teacher_of(engine_args={name: value})) == {name: value}


def test_the_defaults_that_keep_a_key_are_those_of_the_installed_vllm() -> None:
    folder, fields = vllm_sources(), engine_fields()
    configs: dict[str, dict[str, ast.expr | None]] = {}
    for file in (folder / "config").glob("*.py"):
        configs |= fields_of(file)
    for name, stated in DEFAULTS.items():
        default = fields[name]
        while isinstance(default, ast.Attribute) and isinstance(default.value, ast.Name):
            default = configs[default.value.id][default.attr]
        if isinstance(default, ast.Call):  # Field(default=...)
            default = next(word.value for word in default.keywords if word.arg == "default")
        assert default is not None and ast.literal_eval(default) == stated, name


def test_arguments_at_their_default_and_those_of_the_synthetic_engine_are_in_no_key() -> None:
    assert keyed_arguments(teacher_of()) == {}
    assert keyed_arguments(teacher_of(engine_args=DEFAULTS)) == {}
    synthetic = teacher_of(engine="synthetic", engine_args={"kv_cache_dtype": "fp8"})
    assert keyed_arguments(synthetic) == {}
    assert keyed_arguments(teacher_of(engine_args={"unknown_to_us": None})) != {}


def test_a_configuration_in_another_folder_is_refused_as_no_identity_covers_it() -> None:
    problems = engine_argument_problems(
        teacher_of(engine_args={"hf_config_path": "x"}), {"hf_config_path"}
    )
    assert "is not passed through; set teacher.model" in problems["hf_config_path"]
    assert "hf_config_path" in OWNED


class Engine:
    """Stands in for vLLM, running in ``dtype``."""

    name, version, vocab_size, max_model_len = "vllm", "1", 9, 64
    closed = False

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    async def start(self) -> None:
        """Nothing to load."""

    def close(self) -> None:
        self.closed = True


def model_folder(folder: Path, dtype: str = "bfloat16") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": dtype}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def start(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    expected: str | None,
    runs_in: str = "bfloat16",
    **teacher: Any,
) -> None:
    """Start a replica of the model in ``folder``; ``expected``: the driver's identity."""
    engine = Engine(runs_in)
    monkeypatch.setattr(replica_module, "build_engine", lambda *_: engine)
    config = run_config(str(folder), **teacher)
    source = ModelSource.of("m", folder)
    settings = ReplicaSettings(config, source, None, None, 0, 1, teacher_identity=expected)

    async def begin() -> None:
        replica = object.__new__(Teacher)
        try:
            await replica.__init__(settings, rank=(0, 0))  # type: ignore[misc]
        except RunError:
            assert engine.closed, "a replica that refuses to serve must end its engine"
            raise

    asyncio.run(begin())


def test_a_replica_with_the_drivers_files_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "m")
    identity = identity_of_teacher(teacher_of(), folder)
    start(monkeypatch, folder, identity)
    start(monkeypatch, folder, None)


def test_a_replica_with_other_files_than_the_driver_refuses_and_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of the weights differs, of the same size, under the same path on its node."""
    folder = model_folder(tmp_path / "m")
    identity = identity_of_teacher(teacher_of(), folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    found = identity_of_teacher(teacher_of(), folder)
    with pytest.raises(RunError, match=f"have the identity {found}, .* {identity}") as error:
        start(monkeypatch, folder, identity)
    assert "\n" not in str(error.value)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match="cannot be compared with the driver's"):
        start(monkeypatch, folder, identity)


def test_a_replica_with_other_modelling_code_refuses_where_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "modeling_m.py").write_text("scale = 1")
    plain = identity_of_teacher(teacher_of(), folder)
    with_code = identity_of_teacher(teacher_of(trust_remote_code=True), folder)
    (folder / "modeling_m.py").write_text("scale = 2")
    start(monkeypatch, folder, plain)
    with pytest.raises(RunError, match="have the identity"):
        start(monkeypatch, folder, with_code, trust_remote_code=True)


@pytest.mark.parametrize(
    ("stored", "asked", "runs_in", "refused"),
    [
        ("bfloat16", "auto", "bfloat16", False),
        ("bfloat16", "auto", "float16", True),  # a GPU without bfloat16
        ("float16", "auto", "bfloat16", True),  # a model that cannot run in float16
        ("float16", "float16", "float16", False),
        ("float32", "auto", "bfloat16", False),  # its key says auto
        ("float32", "auto", "float16", False),
        ("float32", "float32", "float32", False),
        ("float32", "float32", "bfloat16", True),
        ("float8_e4m3fn", "auto", "bfloat16", False),  # no precision that a run can state
    ],
)
def test_a_replica_refuses_to_run_in_another_precision_than_the_keys_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    asked: str,
    runs_in: str,
    refused: bool,
) -> None:
    folder = model_folder(tmp_path / "m", stored)
    if not refused:
        start(monkeypatch, folder, None, runs_in, dtype=asked)
        return
    with pytest.raises(RunError, match=rf"in {runs_in} here, .*; set teacher\.dtype: {runs_in}"):
        start(monkeypatch, folder, None, runs_in, dtype=asked)


def test_the_driver_sends_its_identity_to_the_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.serve import deploy

    serve = MagicMock()
    monkeypatch.setattr(deploy, "serve", serve)
    monkeypatch.setattr(deploy, "_replicas_per_node", lambda config, others: 1)
    monkeypatch.setattr(deploy.TeacherApp, "_has_gpus", lambda self: False)
    config = run_config(str(tmp_path))
    run = run_of(config, RunFolder(str(tmp_path / "run")), teacher_identity="the driver's")
    deploy.TeacherApp.of(run).deploy()
    (settings,) = serve.deployment.return_value.bind.call_args.args
    assert settings.teacher_identity == "the driver's"


def test_a_synthetic_replica_has_no_files_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nothing"
    start(monkeypatch, folder, "another", "float64", engine="synthetic")
