"""`check` and `calibrate` say what they need on a GPU, and refuse what does not fit."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raystill.cluster.check.ahead.student_memory import check_memory
from raystill.cluster.commands.calibrate import calibration_memory
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder

CONFIG = {
    **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "model_type": "llama",
}


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """A model of 8.03B parameters: a true header, and a file with a hole for its weights."""
    d, f, v, k = 4096, 14_336, 128_256, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
    }
    for layer in range(32):
        for name, shape in zip(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)],
            strict=True,
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ModelFolder("eight", tmp_path)


def config_of(student: dict[str, Any] | None, training: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": "t", "sampling": {"max_tokens": 512}},
            "student": student or {"init": "model", "model": "m"},
            "prompts": {"path": "p.jsonl"},
            "training": training,
        }
    )


def said(
    folder: ModelFolder, longest: int = 500, student: dict[str, Any] | None = None, **training: Any
) -> tuple[list[str], list[str]]:
    tables: Any = SimpleNamespace(longest_prompt_tokens=longest)
    problems, notices = check_memory(config_of(student, training), folder, tables)
    return [str(problem) for problem in problems], notices


def test_one_gpu_is_too_small_and_the_remedies_are_named(folder: ModelFolder) -> None:
    (problem,), notices = said(folder, accelerator_type="H100")
    assert not notices
    assert "weights 32.1, gradients 32.1, optimizer state 64.2" in problem
    assert (
        "but H100 has 80 GB; possible: training.num_workers: 2 with strategy: fsdp and" in problem
    )
    assert "training.num_workers: 4 with strategy: fsdp (70" in problem
    (small,), _ = said(folder, accelerator_type="L4")
    assert "strategy: fsdp and activation_checkpointing: true (" in small
    (none,), _ = said(folder, accelerator_type="T4", num_workers=2, gpus_per_worker=0.5)
    assert none.endswith("possible: a smaller student")


def test_eight_fit_and_the_longest_pass_is_said(folder: ModelFolder) -> None:
    settings = {"strategy": "fsdp", "num_workers": 8, "accelerator_type": "H100"}
    problems, (notice,) = said(folder, **settings)
    assert not problems and "H100 has 80 GB, enough for" in notice
    fits = int(notice.rpartition("enough for ")[2].removesuffix(" tokens").replace(",", ""))
    assert fits > 4096
    problems, _ = said(folder, longest=fits - 512, **settings)
    assert not problems
    (problem,), _ = said(folder, longest=fits - 511, **settings)
    assert f"rows of at most {fits:,} tokens" in problem
    assert "training.activation_checkpointing: true (" in problem
    assert "training.optimizer: adamw_bf16 (" in problem


def test_a_student_with_fewer_layers_and_narrower_ones_needs_less(folder: ModelFolder) -> None:
    kept: dict[str, Any] = {"init": "from_teacher", "layers": list(range(16))}
    narrow = {"hidden_size": 2048, "ffn_size": 7168, "num_heads": 16}
    _, (wide,) = said(folder, student=kept, gpus_per_worker=1)
    _, (told,) = said(folder, student=kept | narrow, gpus_per_worker=1)
    # 128,256 x 4096 twice and 16 layers of 218.1M; 128,256 x 2048 twice and 16 of 56.6M.
    assert "weights 18.2, gradients 18.2, optimizer state 36.3" in wide
    assert "weights 5.7, gradients 5.7, optimizer state 11.5" in told


def test_a_teacher_that_is_too_large_is_judged_by_the_layer_but_for_widths(
    folder: ModelFolder,
) -> None:
    settings: dict[str, Any] = {"num_workers": 64, "strategy": "fsdp", "accelerator_type": "T4"}
    chosen: dict[str, Any] = {"init": "from_teacher", "layers": {"keep": 2}}
    problems, told = said(folder, student=chosen, tokens_per_micro_batch=1012, **settings)
    assert not problems
    assert told[1].startswith(
        "the teacher is judged one layer at a time, which takes longer: 16 GB"
    )
    (problem,), _ = said(folder, student=chosen | {"ffn_size": 7168}, **settings)
    assert (
        "16 GB of weights, but T4 has 16 GB; leave hidden_size, ffn_size and num_heads" in problem
    )
    even = {"init": "from_teacher", "layers": {"keep": 2, "by": "even"}}
    problems, _ = said(folder, student=even, tokens_per_micro_batch=1012, **settings)
    assert not problems


def test_answers_that_no_worker_can_write_alone_are_told(folder: ModelFolder) -> None:
    settings: dict[str, Any] = {
        "num_workers": 16,
        "strategy": "fsdp",
        "tokens_per_micro_batch": 1012,
    }
    settings |= {"activation_checkpointing": True, "accelerator_type": "A10G"}
    assert len(said(folder, **settings)[1]) == 1, "nothing is held out"
    tables: Any = SimpleNamespace(longest_prompt_tokens=500)
    config = config_of(None, settings)
    held = config.evaluation.model_copy(update={"held_out_rows": 8})
    problems, told = check_memory(config.model_copy(update={"evaluation": held}), folder, tables)
    assert not problems and len(told) == 2
    # 8.03B in bfloat16, beside 8 GB of shards with their state.
    assert told[1].startswith("the student writes its own answers sharded, 16 GB gathered for each")
    assert "evaluation.free_running.rows: 0 leaves them out" in told[1]
    roomy = config_of(None, settings | {"accelerator_type": "H100"})
    roomy = roomy.model_copy(update={"evaluation": held})
    assert len(check_memory(roomy, folder, tables)[1]) == 1


def test_adapters_need_gradients_and_moments_of_their_own_alone(folder: ModelFolder) -> None:
    lora: dict[str, Any] = {"init": "model", "model": "m", "lora": {"rank": 16}}
    problems, (told,) = said(folder, student=lora, accelerator_type="H100")
    # 8.03B in bfloat16, and 32 layers of 1.31M adapters with 4, 4 and 8 bytes.
    assert not problems
    assert "weights 16.2, gradients 0.2, optimizer state 0.3" in told
    wide = lora | {"lora": {"rank": 16, "base_dtype": "float32"}}
    _, (told,) = said(folder, student=wide, accelerator_type="H100")
    assert "weights 32.3" in told
    sharded = {"strategy": "fsdp", "num_workers": 8, "accelerator_type": "L4"}
    problems, (told,) = said(folder, student=lora, activation_checkpointing=True, **sharded)
    assert not problems and "weights 2.0" in told


def test_an_unknown_gpu_is_told_of_and_no_gpu_is_not(folder: ModelFolder) -> None:
    problems, (notice,) = said(folder, gpus_per_worker=1)
    assert not problems and "set training.accelerator_type to have it compared" in notice
    assert said(folder) == ([], [])
    assert said(folder, gpus_per_worker=0, accelerator_type="H100") == ([], [])


def test_a_folder_without_its_weights_says_nothing(folder: ModelFolder) -> None:
    (folder.path / "model.safetensors").unlink()
    assert said(folder, accelerator_type="H100") == ([], [])


def compared(
    folder: ModelFolder, longest: int = 500, student: dict[str, Any] | None = None, **training: Any
) -> tuple[list[str], str | None]:
    tables: Any = SimpleNamespace(longest_prompt_tokens=longest)
    config = config_of(student, training)
    problems, told = calibration_memory(config, folder, tables)
    return [str(problem) for problem in problems], told


def test_a_calibration_says_beforehand_what_it_needs_and_has(folder: ModelFolder) -> None:
    settings: dict[str, Any] = {"accelerator_type": "H200", "tokens_per_micro_batch": 4096}
    problems, told = compared(folder, **settings)
    # 8.03B in float32, a gradient, and another one in host memory.
    assert not problems and told is not None
    assert "weights 32.1, gradients 32.1, activations" in told and "32.1 GB of host" in told
    assert told.endswith("for passes of 4,096 tokens; H200 has 141 GB")
    assert "126.1 GB on its GPU" in told and "in one process" in told
    (problem,), _ = compared(folder, **settings | {"accelerator_type": "H100"})
    assert problem.endswith("H100 has 80 GB; set training.activation_checkpointing=true (79.2 GB)")
    again = settings | {"accelerator_type": "H100", "activation_checkpointing": True}
    problems, told = compared(folder, **again)
    assert not problems, "the remedy helps"
    (problem,), _ = compared(folder, **settings | {"accelerator_type": "T4"})
    assert problem.endswith("or name a GPU with more memory")
    kept: dict[str, Any] = {"init": "from_teacher", "layers": list(range(20))}
    (problem,), _ = compared(folder, student=kept, **settings | {"accelerator_type": "H100"})
    assert "but H100 has 80 GB; set training.activation_checkpointing=true (56.3 GB)" in problem
    settings = {"accelerator_type": "H100", "tokens_per_micro_batch": 1012}
    problems, _ = compared(folder, student=kept, **settings)
    assert not problems, "fewer tokens help too"
    _, told = compared(folder)
    assert told is not None and "gradients 64.2" in told and "GB of memory (" in told


def test_several_workers_share_the_student_of_a_calibration(folder: ModelFolder) -> None:
    settings: dict[str, Any] = {"accelerator_type": "H100", "tokens_per_micro_batch": 4096}
    problems, told = compared(folder, num_workers=8, **settings)
    # An eighth of 8.03B in float32, a gradient, and another one in host memory. Whole for a while:
    # 1.05B outside the layers, and 218.1M of a layer 3 1/4 times.
    assert not problems and told is not None and "in each of 8 processes" in told
    assert "weights 4.0, gradients 4.0, gathered layers 7.0, activations" in told
    assert "4.0 GB of host memory" in told
    (problem,), _ = compared(folder, num_workers=4, **settings)
    assert "set training.activation_checkpointing=true (34.1 GB)" in problem
    (problem,), _ = compared(folder, **settings | {"accelerator_type": "A100"})
    both = "set training.num_workers=4 and training.activation_checkpointing=true (34.1 GB)"
    assert problem.endswith(both)
    problems, told = compared(folder, num_workers=[2, 8], **settings | {"accelerator_type": "H200"})
    assert not problems and told is not None and "in each of 2 processes" in told
