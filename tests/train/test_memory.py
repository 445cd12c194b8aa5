"""The table of a worker's memory at 8B and 70B parameters, by arithmetic."""

from typing import Any

import pytest

from raystill.config.training import TrainingConfig
from raystill.placement.memory import GPU_BYTES, Decoder, Parts, longest_pass, need, remedies

MODELS: dict[str, dict[str, int]] = {
    "8B": {
        **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "70B": {
        **{"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672},
        **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
# name: (model, workers, training)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "8B": ("8B", 8, {}),
    "8B, recomputed": ("8B", 8, {"activation_checkpointing": True}),
    "8B, adamw_bf16": ("8B", 8, {"optimizer": "adamw_bf16"}),
    "8B, wide": ("8B", 8, {"residual_dtype": "float32"}),
    "70B, recomputed": ("70B", 64, {"activation_checkpointing": True}),
}
TOKENS = 4096


def training_of(case: str) -> TrainingConfig:
    _, workers, settings = CASES[case]
    common = {"strategy": "fsdp", "num_workers": workers, "tokens_per_micro_batch": TOKENS}
    common["attention"] = "sdpa"  # What is counted is a GPU; rows are read one by one on a CPU.
    # auto would be float32 on this CPU; adamw_bf16 decides by itself.
    dtype = {} if "optimizer" in settings else {"compute_dtype": "bfloat16"}
    return TrainingConfig(**(common | dtype | settings))


def sizes_of(case: str) -> tuple[Parts, Decoder]:
    """What a check reads of a folder: by arithmetic, as a Llama's files have it."""
    config = MODELS[CASES[case][0]]
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    k = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = [("model.embed_tokens.weight", (v, d)), ("lm_head.weight", (v, d))]
    shapes.append(("model.norm.weight", (d,)))
    for layer in range(config["num_hidden_layers"]):
        sizes = [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f), (d,), (d,)]
        shapes += [(f"model.layers.{layer}.{i}", size) for i, size in enumerate(sizes)]
    decoder = Decoder.of(config)
    assert decoder is not None
    return Parts.of(shapes, v * d), decoder


def test_an_8b_student_needs_eight_gpus_or_less_state() -> None:
    parts, decoder = sizes_of("8B")
    alone = TrainingConfig(tokens_per_micro_batch=TOKENS)
    has = GPU_BYTES["H100"]
    needed = need(alone, parts, decoder, workers=1, tokens=TOKENS)
    assert 128e9 < needed.device < 180e9  # 16 bytes a parameter, and the rest.
    assert longest_pass(alone, parts, decoder, workers=1, has=has) == 0
    found = remedies(alone, parts, decoder, workers=1, tokens=TOKENS, has=has)
    assert any("num_workers: 4 with strategy: fsdp (70" in text for text in found), found
    eight = training_of("8B, recomputed")
    longest = longest_pass(eight, parts, decoder, workers=8, has=has)
    assert longest > 32_768
    for tokens, fits in ((longest, True), (longest + 1, False)):
        each = need(eight, parts, decoder, workers=8, tokens=tokens)
        assert (each.device <= has) == fits


def test_ddp_has_gradients_twice_for_a_moment() -> None:
    parts, decoder = sizes_of("8B")
    alone = TrainingConfig(tokens_per_micro_batch=64)
    several = alone.model_copy(update={"num_workers": 2})
    short, two = (
        need(t, parts, decoder, workers=w, tokens=64) for t, w in ((alone, 1), (several, 2))
    )
    # As the second step begins, when there are no activations: the new buckets beside the old.
    assert two.gathered == pytest.approx(parts.total * 4) and two.activations == 0
    assert two.device > short.device + 20e9
    long = [
        need(t, parts, decoder, workers=w, tokens=1 << 18) for t, w in ((alone, 1), (several, 2))
    ]
    assert long[0] == long[1], "less than what a long pass keeps"
    small = several.model_copy(update={"optimizer": "adamw_8bit"})
    assert need(small, parts, decoder, workers=2, tokens=64).optimizer == parts.total * 4


def test_what_each_setting_does() -> None:
    parts, decoder = sizes_of("8B")
    base = training_of("8B")

    def of(**changes: Any) -> Any:
        changed = base.model_copy(update=changes)
        return need(changed, parts, decoder, workers=8, tokens=TOKENS)

    plain = of()
    offloaded = of(cpu_offload=True)
    assert offloaded.weights == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.host == pytest.approx(parts.total * 16 / 8)
    assert of(shard_group_size=4).weights == 2 * plain.weights
    once = of(reduce_gradients="once").gathered - plain.gathered
    assert once == pytest.approx(parts.total * 4)
    assert of(activation_checkpointing=True).activations < plain.activations / 5
    assert of(optimizer="adamw_8bit").optimizer < plain.optimizer / 3.9
    assert of(optimizer="adamw_bf16", compute_dtype="auto").device < 0.9 * plain.device


def test_layers_that_are_not_kept_are_not_counted() -> None:
    shapes = [("model.layers.0.w", (3, 4)), ("model.layers.10.w", (2, 2)), ("head", (5,))]
    assert Parts.of(shapes, 5) == Parts((12, 4), 5, 5)
    assert Parts.of(shapes, 5, kept=[10]) == Parts((4,), 5, 5)
