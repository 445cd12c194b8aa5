"""A two-layer student with random weights, rows with a random signal, and its training step."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raystill.base.run_folder import RunFolder
from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.rows import Row
from raystill.train.checkpoint.checkpoint import Checkpointer, Part, Snapshot
from raystill.train.loss.teacher_head import TeacherHead
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.step import GlobalStep
from raystill.train.student.lora import identity_of_base
from raystill.train.student.module import StudentModule, parallel_module
from raystill.train.student.sharding import shard_student, whole

torch.set_num_threads(1)  # Tensors this small make two threads wait for each other.

VOCAB, TOP_K, STOP_ID = 60, 5, 2
TEACHER_VOCAB, TEACHER_HIDDEN = 64, 8
OBJECTIVE = ObjectiveConfig(forward_kl=1.0, cross_entropy=0.3)
NUM_STEPS = 4


def tiny_module(dtype=torch.float32, tied=True, wide=False, **kwargs):
    """A student; wide: with matrices that have 8-bit moments, in more than one block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=272 if wide else 32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=STOP_ID,
        eos_token_id=STOP_ID,
        tie_word_embeddings=tied,
    )
    return StudentModule(LlamaForCausalLM(config).to(dtype), **kwargs)


def make_row(number, tokens=None):
    generator = np.random.default_rng(number)
    tokens = tokens or int(generator.integers(1, 14))
    response = generator.integers(3, VOCAB, tokens).astype(np.int32)
    response[-1] = STOP_ID
    ids = np.stack([generator.permutation(VOCAB)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
    probs = generator.dirichlet(np.ones(TOP_K + 1), tokens)
    log_p = np.log(probs).astype(np.float32)
    return Row(
        position=number,
        row=number,
        prompt_ids=generator.integers(3, VOCAB, int(generator.integers(1, 20))).astype(np.int32),
        response_ids=response,
        finish_reason="stop",
        sampled_logprobs=log_p[:, 0],
        topk_ids=ids,
        topk_logprobs=log_p[:, :TOP_K],
        tail_logprob=log_p[:, TOP_K],
    )


def parallel(module, strategy):
    """``module`` on two workers: sharded in place, or in DDP."""
    if strategy == "fsdp":
        shard_student(module, torch.device("cpu"), 2)
    return parallel_module(module, torch.device("cpu"), 2, compiled=False)


def tiny_teacher(dtype=torch.float32):
    """A head with four rows more than the student's; its logits are of the size of real ones."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(TEACHER_VOCAB, TEACHER_HIDDEN, generator=generator).to(dtype)
    return TeacherHead(weight, compute_dtype=dtype, num_classes=VOCAB, most_gap=0.02)


def make_hidden_row(number, tokens=None):
    """`make_row` with hidden states, and the log probabilities that follow from them."""
    row = make_row(number, tokens)
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(len(row.response_ids), TEACHER_HIDDEN, generator=generator).bfloat16()
    log_p = torch.log_softmax(hidden.float() @ tiny_teacher().weight.T, dim=1)
    drawn = torch.from_numpy(row.response_ids).long()
    row.hidden = hidden.view(torch.uint16).numpy()
    row.sampled_logprobs = log_p.gather(1, drawn[:, None]).squeeze(1).numpy()
    return row


def make_step(module, training=None, world_size=1, total_steps=NUM_STEPS, **kwargs):
    training = training or training_config()
    inner = getattr(module, "module", module)
    settings = dict(objective=OBJECTIVE, signal_kind="topk", student_vocab=VOCAB) | kwargs
    return GlobalStep(
        module,
        build_optimizer(inner, training),
        BatchMaker(training, **settings),
        total_steps=total_steps,
        world_size=world_size,
    )


def training_config(**kwargs):
    settings = dict(tokens_per_micro_batch=64, learning_rate=1e-2, weight_decay=0.1)
    if kwargs.get("optimizer") != "adamw_bf16":
        settings["compute_dtype"] = "float32"  # On any machine.
    return TrainingConfig(**(settings | kwargs))


def flat(tensors):
    return torch.cat([whole(tensor.detach()).flatten() for tensor in tensors])


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def gradients_of_first_step(module, step, rows):
    """Gradients as the optimizer saw them, unclipped."""
    result = step.run(0, rows, has_more=True, stop=False)
    return flat(p.grad for p in module.parameters()), result


def write_checkpoint(training, folder, ranks):
    """The state after the first step, written and published by all ranks; its folder on rank 0."""
    published = []
    writer = Checkpointer(RunFolder(str(folder)).ensure(), ranks, published.append)
    part = Part.copied(training.model, training.optimizer, ranks)
    base = identity_of_base(training.model)
    snapshot = Snapshot(1, 0, [{}] * ranks.world_size, {}, part.num_files, base=base)
    writer.begin(1, part, snapshot if ranks.first else None)
    assert writer.finish()
    return published
