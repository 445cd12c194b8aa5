"""What the step sees of the student, and the optimizer: positions, precision, decay, schedule."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
)

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import collate
from raystill.train.step.optimizer import build_optimizer, learning_rate
from raystill.train.student.module import StudentModule, resolve_compute_dtype
from tests.support.slow_objective import BETA, slow
from tests.support.tiny_student import (
    STOP_ID,
    VOCAB,
    gradients_of_first_step,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    training_config,
)


def test_what_stands_in_the_padding_changes_nothing():
    batch = collate([make_row(1), make_row(2, tokens=13)], "topk", VOCAB)
    padding = torch.ones_like(batch.input_ids, dtype=torch.bool)
    for b, row in enumerate([make_row(1), make_row(2, tokens=13)]):
        padding[b, : row.num_inputs] = False
    assert padding.any()
    module = tiny_module(torch.float64)
    before = module.logits(batch)
    filled = replace(batch, input_ids=batch.input_ids.masked_fill(padding, STOP_ID))
    assert torch.equal(module.logits(filled), before)


def test_the_head_runs_on_the_response_positions_only():
    batch = collate([make_row(i) for i in range(4)], "topk", VOCAB)
    module = tiny_module()
    logits = module.logits(batch)
    assert logits.shape == (batch.num_tokens, VOCAB) and logits.dtype == torch.float32
    full = module.model(input_ids=batch.input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits, full[batch.logit_index])


def test_bfloat16_compute_keeps_float32_gradients():
    module = tiny_module(compute_dtype=torch.bfloat16)
    rows = [make_row(i) for i in range(4)]
    grads, result = gradients_of_first_step(module, make_step(module), rows)
    exact = tiny_module()
    wanted, exact_result = gradients_of_first_step(exact, make_step(exact), rows)
    assert grads.dtype == torch.float32
    assert result.loss == pytest.approx(exact_result.loss, rel=2e-2)
    assert relative_error(grads, wanted) < 5e-2


def test_compute_precision_follows_the_device_and_the_parameters():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert resolve_compute_dtype("auto", gpu, "float32") == torch.bfloat16
    assert resolve_compute_dtype("float32", gpu, "float32") == torch.float32
    assert resolve_compute_dtype("bfloat16", cpu, "float32") == torch.bfloat16
    assert resolve_compute_dtype("auto", gpu, "float64") == torch.float64


SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
)


def build(kind):
    torch.manual_seed(0)
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.5))
    elif kind == "cohere":
        model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0))
    elif kind == "granite":
        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.25))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied"))
    return model.double()


@pytest.mark.parametrize("kind", ["tied", "untied", "gemma2", "cohere", "granite"])
def test_students_of_every_kind_train_as_their_own_logits_say(kind):
    student = StudentModule(build(kind)).train()
    batch = collate([make_row(i) for i in range(3)], "topk", VOCAB)
    own = student.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.logit_index]
    torch.testing.assert_close(student.logits(batch), own, rtol=1e-6, atol=1e-9)
    nll = torch.nn.functional.cross_entropy(own, batch.targets, reduction="sum")
    loss = nll + slow("jsd", own, batch.partition).sum()
    parameters = list(student.parameters())
    expected = torch.autograd.grad(loss, parameters)
    objective = ObjectiveConfig(cross_entropy=1.0, jsd=1.0, jsd_beta=BETA)
    grads = torch.autograd.grad(student(batch, objective).total, parameters)
    for got, wanted in zip(grads, expected, strict=True):
        assert relative_error(got, wanted) < 1e-6


def test_a_student_whose_logits_are_made_another_way_is_refused():
    model = build("untied")
    forward = model.forward
    model.forward = lambda **inputs: _doubled(forward(**inputs))
    with pytest.raises(ValueError, match="LlamaForCausalLM differ from its output head's"):
        StudentModule(model)


@pytest.mark.parametrize(
    ("kind", "more"),
    [(ModernBertDecoderConfig, {}), (Llama4TextConfig, {"num_local_experts": 2})],
)
def test_a_model_whose_decoder_does_not_run_apart_from_its_head_is_refused(kind, more):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size_mlp": 48} if more else {}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **more))
    with pytest.raises(ValueError, match="no decoder and output head that can be run apart"):
        StudentModule(model)


def _doubled(output):
    output.logits = 2 * output.logits
    return output


def test_activation_checkpointing_changes_no_gradient():
    rows = [make_row(i) for i in range(4)]
    grads = []
    for recompute in (False, True):
        module = tiny_module(activation_checkpointing=recompute).train()
        grads.append(gradients_of_first_step(module, make_step(module), rows)[0])
    assert relative_error(grads[0], grads[1]) < 1e-6


def test_decay_is_on_matrices_only():
    optimizer = build_optimizer(tiny_module(), training_config(weight_decay=0.1))
    decays = [{(p.ndim, g["weight_decay"]) for p in g["params"]} for g in optimizer.param_groups]
    assert decays == [{(2, 0.1)}, {(1, 0.0)}]


def test_the_learning_rate_depends_on_the_step_alone():
    # Warm-up over 2 steps: 0.5, 1. Then a half cosine over steps 2..6: 1 at 2, the middle
    # (1 + 0.1) / 2 = 0.55 at 4, 0.1 at 6, and it stays there.
    cosine = training_config(learning_rate=1.0, warmup_steps=2, min_learning_rate_ratio=0.1)
    rates = [learning_rate(step, 7, cosine) for step in (0, 1, 2, 4, 6, 9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    constant = training_config(learning_rate=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 7, constant) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 1.0]


def test_figures_are_measured_with_float32_products_of_the_head():
    """bfloat16 logits of a student against those of its own teacher look like a difference."""
    batch = collate([make_row(i) for i in range(4)], "topk", VOCAB)
    module = tiny_module(compute_dtype=torch.bfloat16)
    logits = module.logits(batch)
    hidden = module.hidden_states(batch).float()
    expected = hidden @ module.model.get_output_embeddings().weight.float().T
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits, logits.bfloat16().float())
