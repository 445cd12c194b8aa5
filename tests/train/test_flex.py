"""FlexAttention for models that cap attention's logits or have sinks: what eager attention gives.

PyTorch has no gradient of it on a CPU, where it refuses to run, and transformers no sinks there.
Here both run what they would run on a GPU, uncompiled: PyTorch's own dense formula.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.attention.flex_attention as of_torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    masking_utils,
)
from transformers.integrations import flex_attention as of_transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.student import attention, masks
from raystill.train.student.attention import FLEX, use_attention, use_packing, wants_packing
from raystill.train.student.module import StudentModule
from tests.support.tiny_student import (
    VOCAB,
    gradients_of_first_step,
    make_row,
    make_step,
    relative_error,
    training_config,
)
from tests.train.test_evaluate import FakeSampling

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = {
    **dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2),
    **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0),
    **dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}
MODELS = {
    "cap": (Gemma2ForCausalLM, Gemma2Config(**SIZES, attn_logit_softcapping=2.0)),
    "sinks": (
        GptOssForCausalLM,
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    ),
}


def student(name):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(copy.deepcopy(config))  # It notes the kernel.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.5, 1.0)  # Sinks that matter.
    return StudentModule(model).train()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    make = masking_utils.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **given: make(**given | {"_compile": False})
    )
    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)
    source = inspect.getsource(of_transformers.flex_attention_forward)
    assert 'query.device.type != "cpu"' in source
    scope = dict(vars(of_transformers))
    scope["compile_friendly_flex_attention"] = lambda *states, training, **more: (
        of_torch.flex_attention(*states, **more)
    )
    exec(source.replace('query.device.type != "cpu"', "True"), scope)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLEX, scope["flex_attention_forward"])


def step_with(name, kernel, packed):
    module = student(name)
    assert module.model.config._attn_implementation == "eager"
    module.model.set_attn_implementation(kernel)
    if packed:
        assert use_packing(True, module, kernel, CPU)
    training = training_config(tokens_per_micro_batch=90, max_grad_norm=None)
    step = make_step(module, training, packed=packed)
    return gradients_of_first_step(module, step, [make_row(i, tokens=5 + i) for i in range(8)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_eager_attention_padded_and_packed(as_on_a_gpu, name, packed):
    expected, of_eager = step_with(name, "eager", packed=False)
    got, result = step_with(name, FLEX, packed)
    assert result.loss == pytest.approx(of_eager.loss, rel=1e-6)
    assert relative_error(got, expected) < 1e-5
    assert (result.padding_fraction == 0) == packed


def test_rows_of_a_model_that_hides_its_positions_are_kept_apart(monkeypatch):
    """gpt-oss does not show them to what makes the mask, with eager attention neither."""
    assert use_packing(True, student("sinks"), "eager", CPU)
    monkeypatch.setattr(masking_utils, "_preprocess_mask_arguments", masks._prepare)
    monkeypatch.setattr(masks, "_prepare", None)  # A version that is not known.
    with pytest.raises(ValueError, match="rows of GptOssForCausalLM cannot be packed"):
        use_packing(True, student("sinks"), "eager", CPU)


def test_it_takes_the_place_of_eager_attention_on_a_gpu_alone():
    capped, sinks = student("cap").model, student("sinks").model
    for model in (capped, sinks):
        assert attention._fastest(model, GPU, torch.float32) == FLEX
        assert attention._fastest(model, CPU, torch.float32) is None
        with pytest.raises(ValueError, match="where PyTorch has no gradient of it; set training"):
            use_attention(FLEX, model, CPU, torch.float32)
    assert use_attention(FLEX, sinks, GPU, torch.float32) == FLEX
    capped.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="has attention_dropout"):
        use_attention(FLEX, capped, GPU, torch.float32)
    assert attention._fastest(capped, GPU, torch.float32) is None
    capped.set_attn_implementation("sdpa")  # A model whose kernel is not eager keeps it.
    assert attention._fastest(capped, GPU, torch.float32) is None
    assert wants_packing("auto", FLEX) and not wants_packing("auto", "eager")


def test_answers_are_written_with_eager_attention():
    module = student("cap")
    settings = FreeRunning(3, 5, FakeSampling(temperature=0.0), seed=0)
    prompts = [make_row(i).prompt_ids for i in range(3)]
    expected = generate(module.model, prompts, settings, CPU)
    module.model.set_attn_implementation(FLEX)
    assert generate(module.model, prompts, settings, CPU) == expected
    assert module.model.config._attn_implementation == FLEX
