"""The table of a worker's memory, held against the worst moment of a whole step without data.

FSDP2 over 8 and 64 ranks of which this process is the first; collectives do nothing. Every storage
that an operation makes is counted from there until it is freed, or resized as FSDP does.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from raystill.config.objective import ObjectiveConfig
from raystill.placement.memory import need
from raystill.train.batch.batch import MicroBatch, collate
from raystill.train.batch.rows import Row
from raystill.train.loss import head_loss, log_probs
from raystill.train.step.adamw import SmallAdamW
from raystill.train.step.optimizer import build_optimizer
from raystill.train.student import module, sharding
from tests.train.test_memory import CASES, MODELS, TOKENS, sizes_of, training_of

LAYERS = dict.fromkeys(CASES, 8) | {"8B": 32, "8B, recomputed": 16}
"""All of one case: others are alike, and tell what a layer takes."""


class Counter(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has freed, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, or what it has become."""
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self._change(key, storage.size())

    def _forget(self, key: int) -> None:
        self._change(key, 0)
        self.sizes.pop(key, None)

    def _change(self, key: int, size: int) -> None:
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and not isinstance(one, DTensor):
                self.note(one.untyped_storage())
        return made


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts within it; resizing a storage is no operation that a mode sees."""
    counter, resize = Counter(), torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        counter.note(storage)
        return found

    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    with FakeTensorMode(), counter:
        yield counter


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a GPU's sizes, and nothing that reads a number, which these tensors do not have."""
    for owner in (head_loss, log_probs):
        for name in ("CHUNK_BYTES", "WIDE_BYTES", "BLOCK_BYTES"):
            if hasattr(owner, f"CPU_{name}"):
                monkeypatch.setattr(owner, f"CPU_{name}", getattr(owner, f"DEVICE_{name}"))
    mesh_of = sharding.init_device_mesh

    def mesh(*args: Any, **more: Any) -> Any:
        with _disable_current_modes():
            return mesh_of(*args, **more)

    monkeypatch.setattr(sharding, "init_device_mesh", mesh)
    monkeypatch.setattr(module, "require_known_head", lambda *_: None)


@contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def micro_batch(vocab: int) -> MicroBatch:
    """One row of as many inputs as a pass takes, nearly all of them with a loss."""
    random = np.random.default_rng(0)
    prompt, response = (random.integers(3, vocab, n).astype(np.int32) for n in (2, TOKENS - 1))
    row = Row(0, 0, prompt, response)
    row.topk_ids = random.integers(3, vocab, (len(response), 8)).astype(np.int32)
    row.topk_logprobs = np.full((len(response), 8), -3.0, np.float32)
    row.tail_logprob = np.full(len(response), -0.5, np.float32)
    return collate([row], "topk", vocab)


def worst(case: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of one rank in the second pass of a step, with moments and gradients of the first."""
    name, workers, _ = CASES[case]
    sizes, training = MODELS[name] | {"num_hidden_layers": num_layers}, training_of(case)
    batch, objective = micro_batch(sizes["vocab_size"]), ObjectiveConfig(forward_kl=1.0)
    with fake_ranks(workers), counting(monkeypatch) as counter:
        config = LlamaConfig(**sizes, use_cache=False, dtype=training.weights_dtype)
        model: Any = LlamaForCausalLM._from_config(config)
        student = sharding.place_student(model, training, torch.device("cpu"), workers)
        optimizer = build_optimizer(student, training)
        fake = batch.mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        student(fake, objective).total.backward()
        if isinstance(optimizer, SmallAdamW):  # Its step reads the number of the step.
            states = [optimizer.new_state(one) for one in student.parameters()]
        else:
            optimizer.step()
            states = list(optimizer.state.values())
        for moment in (one for state in states for one in state.values()):
            if isinstance(moment, DTensor):  # Which DTensor made without an operation of its own.
                counter.note(moment.to_local().untyped_storage())
        counter.most = counter.now
        student(fake, objective).total.backward()
        del states
        return counter.most


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_the_worst_moment_of_a_step(
    case: str, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None
) -> None:
    parts, decoder = sizes_of(case)
    parts = replace(parts, layers=parts.layers[: LAYERS[case]])
    needed = need(training_of(case), parts, decoder, workers=CASES[case][1], tokens=TOKENS)
    counted = worst(case, LAYERS[case], monkeypatch)
    assert counted == pytest.approx(needed.device - needed.reserve, rel=0.025)
