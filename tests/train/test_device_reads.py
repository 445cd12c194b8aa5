"""What the host asks a device for during a step: nothing within the passes, so that it is ahead.

On a GPU each read makes the host wait until all that is queued has been computed. Without one, the
operations that would read are counted.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raystill.config.objective import ObjectiveConfig
from tests.support.tiny_student import (
    make_hidden_row,
    make_row,
    make_step,
    tiny_module,
    tiny_teacher,
)

READS = ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal", "aten.unique")
COPIES = ("lift_fresh",)
"""What a tensor of Python numbers is made by: a copy from pageable memory, which waits too."""
SIGNALS: dict[str, dict[str, Any]] = {
    "topk": {},
    "text": {"objective": ObjectiveConfig(cross_entropy=1.0)},
    "sampled": {},
    "hidden": {"objective": ObjectiveConfig(forward_kl=0.5, reverse_kl=0.5, cross_entropy=0.1)},
}


class Reads(TorchDispatchMode):
    """Counts the operations that read from a device, or copy single numbers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in READS + COPIES):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def step_of(kind: str, device: str = "cpu") -> tuple[Any, list[Any]]:
    module = tiny_module().to(device).train()
    settings: dict[str, Any] = {"signal_kind": kind, "device": device, **SIGNALS[kind]}
    row = make_row
    if kind == "hidden":
        settings["teacher"], row = tiny_teacher(), make_hidden_row
    return make_step(module, **settings), [row(i) for i in range(9)]


@pytest.mark.parametrize("kind", SIGNALS)
def test_nothing_is_read_within_the_passes(kind: str) -> None:
    step, rows = step_of(kind)
    step.run(0, rows, has_more=True, stop=False)  # What is done once.
    batches = [step.batches.make(group) for group in step.batches.cut(rows)]
    assert len(batches) > 1
    with Reads() as reads:
        for batch in batches:
            step._forward_backward(batch)
    assert not reads.seen
    with Reads() as reads:
        step._update(1.0, 1e-3)
    assert reads.seen == {"aten._local_scalar_dense.default": 1}, "the gradient norm, once a step"


def test_the_count_sees_a_read() -> None:
    with Reads() as reads:
        bool((torch.ones(3) == 1).all())
        torch.ones(3).new_tensor([1.0, 2.0])
    assert sum(reads.seen.values()) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["topk", "text", "sampled"])
def test_a_gpu_is_not_waited_for_within_the_passes(kind: str) -> None:
    step, rows = step_of(kind, "cuda")
    step.run(0, rows, has_more=True, stop=False)
    batches = [step.batches.make(group) for group in step.batches.cut(rows)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step._forward_backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
