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
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raystill.placement.memory import Decoder, kept_activations, need
from raystill.train.start.cut import layer_list
from raystill.train.step.adamw import SmallAdamW
from raystill.train.step.optimizer import build_optimizer
from raystill.train.student.masks import ROWS, tell_transformers
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


@pytest.fixture(autouse=True)
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded rows, as a `StudentModule` says it: without a mask [S, S]."""
    tell_transformers()
    monkeypatch.setattr(ROWS, "packed", False)


def activations(case: str) -> int:
    """Bytes that a forward pass of all layers keeps for the backward pass."""
    training = training_of(case)
    compute = getattr(torch, training.compute_dtype.replace("auto", training.weights_dtype))
    narrow = training.narrow_residual(CASES[case][1])
    weights = compute if narrow else getattr(torch, training.weights_dtype)
    with FakeTensorMode():
        model = model_of(case, compute)  # As FSDP gathers the layers.
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return kept_by(model, weights, compute)


def kept_by(model: Any, weights: torch.dtype, compute: torch.dtype) -> int:
    """Bytes that a forward pass of the decoder keeps; weights: of what is outside of the layers."""
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if TOKENS in tensor.shape:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = (storage.size(), storage)  # Held, so that no other has its key.
        return tensor

    vocab, hidden = model.lm_head.weight.shape
    model.model.embed_tokens = nn.Embedding(vocab, hidden, dtype=weights)
    model.model.norm.weight = nn.Parameter(torch.empty(hidden, dtype=weights))
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
    expected = kept_activations(training, parts, decoder, TOKENS, workers=CASES[case][1])
    assert activations(case) == pytest.approx(expected, rel=0.003)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What SDPA calls on a GPU for 16 bits, with autocast as it has it."""
    assert attn_mask is None and enable_gqa, "else keys and values would be repeated"
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["of a CPU", "FlashAttention"])
@pytest.mark.parametrize("precision", ["float32 float32", "float32 bfloat16", "bfloat16 bfloat16"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_a_layer_keeps_by_family_precision_and_attention(
    monkeypatch: pytest.MonkeyPatch, family: str, precision: str, path: str
) -> None:
    if path == "FlashAttention":
        monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    weights, compute = (getattr(torch, name) for name in precision.split())
    config_class: Any = {"Llama": LlamaConfig, "Qwen3": Qwen3Config}[family]
    model_class: Any = {"Llama": LlamaForCausalLM, "Qwen3": Qwen3ForCausalLM}[family]
    sizes = {**MODELS["8B"], "vocab_size": 1024, "head_dim": 128}
    kept = []
    for layers in (1, 2):
        config = config_class(**sizes | {"num_hidden_layers": layers}, use_cache=False)
        with FakeTensorMode():
            model = model_class._from_config(config, dtype=compute).train()
            kept.append(kept_by(model, weights, compute))
    decoder = Decoder.of(config.to_dict())
    assert decoder is not None and decoder.normed_heads == (family == "Qwen3")
    table = TOKENS * decoder.activation_bytes(weights.itemsize, compute.itemsize)
    assert kept[1] - kept[0] == pytest.approx(table, rel=0.001)
