"""What goes from layer to layer in bfloat16, with weights, optimizer and sums in float32."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from raystill.config.training import TrainingConfig
from raystill.train.start.cut import layer_list
from raystill.train.student.module import parallel_module
from raystill.train.student.sharding import gathering_passes, place_student
from tests.support.tiny_student import (
    flat,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    training_config,
)
from tests.support.workers import run_workers

CPU, STEPS = torch.device("cpu"), 12
NARROW, WIDE = {"residual_dtype": "bfloat16"}, {"residual_dtype": "float32"}
# name: (workers, settings)
CASES = {
    "float32": (1, {"compute_dtype": "float32"}),
    "alone, wide": (1, {"compute_dtype": "bfloat16"}),
    "alone, narrow": (1, {"compute_dtype": "bfloat16", **NARROW}),
    "ddp, narrow": (2, {"compute_dtype": "bfloat16", **NARROW}),
    "fsdp, wide": (2, {"compute_dtype": "bfloat16", "strategy": "fsdp", **WIDE}),
    "fsdp": (2, {"compute_dtype": "bfloat16", "strategy": "fsdp"}),
    "fsdp, once": (
        2,
        {"compute_dtype": "bfloat16", "strategy": "fsdp", "reduce_gradients": "once"},
    ),
}


def train(case, rank=0):
    """Twelve steps on the same rows: losses, and dtypes of what there is."""
    workers, settings = CASES[case]
    training = training_config(learning_rate=3e-3, num_workers=workers, **settings)
    student = place_student(tiny_module().model, training, CPU, workers)
    module = parallel_module(student, CPU, workers, compiled=False)
    step = make_step(module, training, workers, total_steps=STEPS)
    seen = set()
    layer = layer_list(student.model)[2][1]
    layer.register_forward_pre_hook(lambda _, inputs: seen.add(str(inputs[0].dtype)))
    losses = []
    for number in range(STEPS):
        rows = [make_row(i) for i in range(10)]
        losses.append(step.run(number, rows[rank::workers], True, False).loss)
    parameters = list(student.parameters())
    states = [step.optimizer.state[p] for p in parameters]
    with gathering_passes(student):
        head = student.head().weight.dtype
    return {
        "losses": torch.tensor(losses),
        "parameters": flat(parameters),
        "stream": sorted(seen),
        "kept": sorted({str(t.dtype) for p in parameters for t in (p, p.grad)}),
        "moments": sorted({str(s["exp_avg"].dtype) for s in states}),
        "sharded": isinstance(parameters[0], DTensor),
        "head": str(head),
    }


def worker_main(rank, folder):
    return {case: train(case, rank) for case, (workers, _) in CASES.items() if workers == 2}


def test_losses_are_those_of_float32_and_only_the_stream_is_narrow(tmp_path):
    ranks = run_workers(worker_main, tmp_path)
    found = {case: train(case) for case, (workers, _) in CASES.items() if workers == 1}
    found |= ranks[0]
    exact = found["float32"]
    start = flat(tiny_module().parameters())
    for case, one in found.items():
        narrow = "narrow" in case or case in ("fsdp", "fsdp, once")
        assert one["stream"] == ["torch.bfloat16" if narrow else "torch.float32"], case
        assert one["kept"] == one["moments"] == ["torch.float32"], case
        assert one["sharded"] == case.startswith("fsdp")
        assert one["head"] == ("torch.bfloat16" if narrow and one["sharded"] else "torch.float32")
        assert (one["losses"] - exact["losses"]).abs().max() < 4e-3 * exact["losses"][0], case
        moved = relative_error(one["parameters"] - start, exact["parameters"] - start)
        assert case == "float32" or 0 < moved < 0.1, (case, moved)
    assert exact["losses"][-1] < 0.95 * exact["losses"][0]
    assert torch.equal(ranks[0]["fsdp"]["losses"], ranks[1]["fsdp"]["losses"])


def test_weights_in_two_precisions_and_in_float64_stay_as_they_are():
    for dtype in (torch.float64, torch.bfloat16):
        module = tiny_module(dtype)
        module.narrow_stream()
        assert module.stream_dtype == dtype
    module = tiny_module(compute_dtype=torch.bfloat16)
    module.model.lm_head.weight.data = module.model.lm_head.weight.data.bfloat16()
    module.narrow_stream()
    assert module.stream_dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"residual_dtype": "bfloat16", "compute_dtype": "float32"}, "compute_dtype is float32"),
        ({"residual_dtype": "bfloat16", "param_dtype": "float64"}, "weights are in float64"),
        ({"residual_dtype": "float32", "optimizer": "adamw_bf16"}, "weights are in bfloat16"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**settings)


def test_by_itself_it_is_narrow_where_workers_share_the_student():
    assert not TrainingConfig().narrow_residual(8)
    assert TrainingConfig(strategy="fsdp").narrow_residual(8)
    assert not TrainingConfig(strategy="fsdp").narrow_residual(1)
    assert not TrainingConfig(strategy="fsdp", residual_dtype="float32").narrow_residual(8)
    assert TrainingConfig(residual_dtype="bfloat16").narrow_residual(1)
