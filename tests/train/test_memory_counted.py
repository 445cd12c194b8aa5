"""The table of a worker's memory, held against all layers of 8B and 70B models without data.

FSDP2 shards the model over 8 and 64 ranks, of which this process is the first and the others do not
exist. Tensors have shapes and no numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from raystill.placement.memory import need
from raystill.train.start.cut import layer_list
from raystill.train.step.adamw import SmallAdamW
from raystill.train.step.optimizer import build_optimizer
from tests.train.test_memory import CASES, MODELS, sizes_of, training_of

TOKENS = 1000
"""Of one pass; no width of the models, by which an activation is told from a weight."""


def model_of(case: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(**MODELS[CASES[case][0]], use_cache=False)
    return LlamaForCausalLM._from_config(config, dtype=dtype).train()


@contextmanager
def fake_ranks(number: int) -> Iterator[Any]:
    """A mesh of so many ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield init_device_mesh("cpu", (number,))
    finally:
        dist.destroy_process_group()


def bytes_of(tensors: Any) -> int:
    """Of what this rank holds."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in own)


def held(case: str) -> dict[str, int]:
    """Bytes of the first rank's shards, by the step of an optimizer that has had gradients."""
    training = training_of(case)
    with fake_ranks(CASES[case][1]) as mesh, FakeTensorMode():
        model = model_of(case, getattr(torch, training.weights_dtype))
        for layer in layer_list(model)[2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(model, training)
        parameters = list(model.parameters())
        for one in parameters:
            one.grad = torch.zeros_like(one)
        if isinstance(optimizer, SmallAdamW):  # Its step reads the number of the step.
            states = [optimizer.new_state(one) for one in parameters]
        else:
            optimizer.step()
            states = [optimizer.state[one] for one in parameters]
        moments = [t for state in states for name, t in state.items() if name != "step"]
        gradients = [one.grad for one in parameters]
        return {
            "weights": bytes_of(parameters),
            "gradients": bytes_of(gradients),
            "optimizer": bytes_of(moments),
        }


def activations(case: str) -> int:
    """Bytes that a forward pass of all layers keeps for the backward pass."""
    training, kept = training_of(case), {}
    weights = getattr(torch, training.weights_dtype)
    compute = getattr(torch, training.compute_dtype.replace("auto", training.weights_dtype))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if TOKENS in tensor.shape:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = (storage.size(), storage)  # Held, so that no other has its key.
        return tensor

    with FakeTensorMode():
        model = model_of(case, compute)  # As FSDP gathers the layers; the root keeps its own.
        vocab, hidden = model.lm_head.weight.shape
        model.model.embed_tokens = nn.Embedding(vocab, hidden, dtype=weights)
        model.model.norm.weight = nn.Parameter(torch.empty(hidden, dtype=weights))
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mixed = torch.autocast("cpu", compute, enabled=compute != weights)
        with mixed, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model.get_decoder()(input_ids=ids, use_cache=False)
        del output
        return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_what_is_held_and_kept(case: str) -> None:
    training, (parts, decoder) = training_of(case), sizes_of(case)
    needed = need(training, parts, decoder, workers=CASES[case][1], tokens=TOKENS)
    for name, size in held(case).items():
        assert size == pytest.approx(getattr(needed, name), rel=0.001), name
    expected = needed.activations
    if training.activation_checkpointing:  # The layer that is computed again lives in the backward.
        expected -= TOKENS * decoder.activation_bytes(4, 2)
    assert activations(case) == pytest.approx(expected, rel=0.07)
