"""RMS norms as one kernel: which are replaced, that they give the same, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raystill.train.student.norms import fuse_norms, replace_plain_norms
from tests.support.tiny_student import flat, make_row, make_step, relative_error, tiny_module
from tests.train.test_memory import MODELS
from tests.train.test_memory_counted import TOKENS, kept_by

SIZES = {
    **dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2),
    **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
}


@pytest.mark.parametrize(
    ("config", "model", "fused"),
    [
        (LlamaConfig, LlamaForCausalLM, 5),
        (Qwen3Config, Qwen3ForCausalLM, 9),  # With those of queries and keys.
        (Gemma2Config, Gemma2ForCausalLM, 0),  # It adds 1 to its weight.
    ],
)
def test_plain_norms_alone_are_replaced_and_the_logits_are_the_same(config, model, fused):
    torch.manual_seed(0)
    student = model(config(**SIZES)).eval()
    for parameter in student.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1.0, 0.3)
    ids = torch.arange(12)[None]
    before, weights = student(ids).logits, flat(student.parameters())
    assert fuse_norms(student, torch.device("cpu")) == 0
    assert replace_plain_norms(student) == fused
    assert torch.equal(flat(student.parameters()), weights)
    torch.testing.assert_close(student(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_a_step_is_the_same_with_the_kernel():
    results = []
    for fused in (False, True):
        module = tiny_module(torch.float64).train()
        assert not fused or replace_plain_norms(module) == 5
        make_step(module).run(0, [make_row(i) for i in range(6)], has_more=True, stop=False)
        results.append(flat(p.grad for p in module.parameters()))
    # transformers' norms compute in float32, also of float64.
    assert relative_error(*results) < 1e-6


class Kernel(torch.autograd.Function):
    """``F.rms_norm`` as it is on a GPU, by what its gradient is computed from."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(
            hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        )
        return torch.empty_like(hidden)


def test_the_kernel_keeps_its_input_alone(monkeypatch):
    sizes = {**MODELS["8B"], "vocab_size": 1024}
    kept = []
    for fused in (False, True):
        for layers in (1, 2):
            config = LlamaConfig(**sizes | {"num_hidden_layers": layers}, use_cache=False)
            with FakeTensorMode():
                model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()
                if fused:
                    with monkeypatch.context() as patched:
                        patched.setattr(F, "rms_norm", lambda x, _, w, __: Kernel.apply(x, w))
                        patched.setattr("raystill.train.student.norms._is_plain", lambda _: True)
                        assert replace_plain_norms(model) == 2 * layers + 1
                        kept.append(kept_by(model, torch.bfloat16, torch.bfloat16))
                else:
                    kept.append(kept_by(model, torch.bfloat16, torch.bfloat16))
    written, kernel = kept[1] - kept[0], kept[3] - kept[2]
    # Two norms a layer: 8 bytes a number each as written, 4 with the kernel, and 4 a token.
    assert (written - kernel) / TOKENS == pytest.approx(8 * 4096, rel=0.001)
