"""Tiny families: cut, trained by one and by two workers, resumed, exported, loaded again.

What holds of any model is in test_sharding.py, step after step; here each family trains one.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from raystill.model.sampling import ResolvedSampling
from raystill.train.checkpoint.checkpoint import (
    load_tensors,
    read_snapshot,
)
from raystill.train.start.cut import keep_layers
from raystill.train.step.ranks import Ranks
from raystill.train.student.build import Outline, freeze_unreached
from raystill.train.student.export import ExportSettings, save_student
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import place_student
from tests.support.tiny_student import (
    STOP_ID,
    VOCAB,
    flat,
    make_row,
    make_step,
    parallel,
    relative_error,
    training_config,
    write_checkpoint,
)
from tests.support.workers import run_workers

LAYERS = [0, 1, 3]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": STOP_ID,
    "eos_token_id": STOP_ID,
    "bos_token_id": 1,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED = MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4},
}
PLAIN_HEADS = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 4},
    "Ministral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4},
    "Phi": PLAIN_HEADS,
    "Phi3": {},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Olmo": PLAIN_HEADS,
    "Olmo2": PLAIN_HEADS,
    "Olmo3": PLAIN_HEADS | {"sliding_window": 4},
    "Starcoder2": {"sliding_window": 4},
    "StableLm": {},
    "Cohere": {},
    "Cohere2": {"sliding_window": 4},
    "Granite": {},
    "Glm": {},
    "Glm4": {},
    "Helium": {},
    "Exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "SeedOss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "Ernie4_5": {},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 12},
    "Qwen3Moe": MOE | {"num_experts": 4},
    "Olmoe": MOE | {"num_experts": 4} | PLAIN_HEADS,
    "DeepseekV3": ROUTED | LATENT | {"first_k_dense_replace": 1},
    "Glm4Moe": ROUTED | {"first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Gemma3, with a vision tower": {"sliding_window": 4},
}
# DDP minds parameters without a gradient, which plain decoders do not have.
IN_DDP = {"Llama", *(f for f, more in FAMILIES.items() if "num_experts_per_tok" in more)}
IN_DDP |= {"Gemma3, with a vision tower"}
ROWS = [range(0, 6), range(6, 10)]
SHARES = (range(0, 4), range(4, 6))  # Of the first step.


def student_of(family: str) -> StudentModule:
    """The untrained student of a family, as one worker has it."""
    return StudentModule(model_of(family)).train()


def model_of(family: str) -> Any:
    """Three of the family's four layers, untrained."""
    model = teacher_of(family)
    keep_layers(model, LAYERS)
    freeze_unreached(model)
    return model


def teacher_of(family: str) -> Any:
    """All four layers of a family."""
    torch.manual_seed(0)
    name, _, more = family.partition(", ")
    if more == "with a vision tower":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = transformers.Gemma3Config(
            text_config=COMMON | FAMILIES[family], vision_config=vision, mm_tokens_per_image=1
        )
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{name}Config")(**(COMMON | FAMILIES[family]))
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    return model


def step_of(module: Any, world_size: int = 1) -> Any:
    return make_step(module, training_config(max_grad_norm=None), world_size)


def run(step: Any, number: int, rows: Any) -> Any:
    return step.run(number, [make_row(i) for i in rows], has_more=True, stop=False)


def trained(module: StudentModule) -> torch.Tensor:
    return flat(p for p in module.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(worker_main, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_resumed_and_exported(
    ranks: list[dict[str, Any]], tmp_path: Path, family: str
) -> None:
    student = student_of(family)
    step = step_of(student)
    results = [run(step, 0, ROWS[0])]
    first = SimpleNamespace(optimizer=step.optimizer, model=student.model)
    (checkpoint,) = [str(path) for path in write_checkpoint(first, tmp_path / "run", Ranks())]
    for rank in ranks:
        for strategy, weights in rank[family].items():
            assert relative_error(weights, trained(student)) < 1e-4, strategy
    results.append(run(step, 1, ROWS[1]))
    assert all(0 < result.loss < 20 for result in results)

    again = student_of(family)
    resumed = step_of(again)
    load_tensors(checkpoint, read_snapshot(checkpoint).num_files, again.model, resumed.optimizer)
    run(resumed, 1, ROWS[1])
    assert torch.equal(trained(again), trained(student)), "a resumed run is the undisturbed one"

    sampling = ResolvedSampling(0.0, 1.0, 0, 0.0, max_tokens=8, stop_token_ids=(STOP_ID,))
    settings = ExportSettings("float32", str(tmp_path / "teacher"), sampling)
    save_student(student.model, tmp_path / "student", settings)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[3, 4, 9, 11, 30, 7]])
    with torch.no_grad():
        mine, theirs = student.model.eval()(ids).logits, loaded.eval()(ids).logits
    assert torch.allclose(mine, theirs, atol=1e-5)


def strategies(family: str) -> list[str]:
    return ["fsdp", "ddp"] if family in IN_DDP else ["fsdp"]


def one_step(family: str, strategy: str, rank: int) -> torch.Tensor:
    if strategy == "ddp":
        student = student_of(family)
        step = step_of(parallel(student, strategy), world_size=2)
    else:
        student = sharded_from_first(family, rank)
        step = step_of(student, world_size=2)
    run(step, 0, SHARES[rank])
    return trained(student)


def sharded_from_first(family: str, rank: int) -> StudentModule:
    """The student that only rank 0 has made."""
    ranks, model = Ranks(rank, 2), model_of(family) if rank == 0 else None
    outline = ranks.from_first(Outline.of(model) if rank == 0 else None)
    if model is None:
        model = outline.hollow()
        assert not any(one.any() for one in model.parameters())
    return place_student(model, training_config(strategy="fsdp"), torch.device("cpu"), 2, True)


def worker_main(rank: int, folder: Path) -> dict[str, Any]:
    return {
        family: {strategy: one_step(family, strategy, rank) for strategy in strategies(family)}
        for family in FAMILIES
    }
