"""A student cut from a teacher of each family: saved and loaded again, it is the same model.

A configuration that does not follow the cut makes transformers load another model, with fresh
weights in place of those it does not find, and only a warning.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from raystill.model.known import words_of_code
from raystill.model.sampling import ResolvedSampling
from raystill.train.start.cut import keep_layers
from raystill.train.student.export import ExportSettings, save_student

COMMON = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6}
COMMON |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4}
FAMILIES = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 2},
    "Gemma2": {"sliding_window": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": ROUTED | LATENT | {"first_k_dense_replace": 3},
    "Glm4Moe": ROUTED | {"first_k_dense_replace": 3},
    "Qwen3Moe": EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "SmolLM3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
}
IDS = torch.tensor([[3, 4, 9, 11, 30, 2, 7]])


def teacher_of(family, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(COMMON | FAMILIES[family] | more))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("layers", [[0, 2, 3, 5], [1, 3], [0, 0, 4, 5]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_loads_again_as_itself(tmp_path, family, layers):
    model = teacher_of(family)
    keep_layers(model, layers)
    sampling = ResolvedSampling(0.0, 1.0, 0, 0.0, max_tokens=8, stop_token_ids=(2,))
    settings = ExportSettings("float32", str(tmp_path / "teacher"), sampling)
    save_student(model, tmp_path / "student", settings)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["DeepseekV3", "Glm4Moe"])
def test_layers_that_no_configuration_describes_are_refused(family):
    # The dense layers come first in these families; here one of them would come second.
    with pytest.raises(
        ValueError, match=r"describes these layers: .*layers\.0\.mlp.*keep other layers"
    ):
        keep_layers(teacher_of(family), [4, 0])


def test_a_setting_without_a_tensor_of_its_own_is_seen_too():
    model = teacher_of("SmolLM3")
    model.config.no_rope_layers = [1] * 6  # As a field that does not follow the cut.
    with pytest.raises(ValueError, match=r"layer 1\.self_attn\.use_rope: 0, by its .* 1 "):
        keep_layers(model, [0, 1])


def test_a_cut_leaves_the_random_state_as_it_was():
    model = teacher_of("Llama")
    torch.manual_seed(5)
    keep_layers(model, [0, 1])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_the_check_knows_the_modules_of_a_model_whose_decoder_is_another_family() -> None:
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    with torch.device("meta"):
        model = transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text | sizes))
    parts = {part for name in model.state_dict() for part in name.split(".")[:-1]}
    assert {part for part in parts if not part.isdecimal()} <= words_of_code("fuyu")
