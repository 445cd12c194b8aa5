"""Memory recipes of training: optimizers with less state, HSDP, offload, one reduction a step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raystill.config.training import TrainingConfig
from raystill.train.checkpoint.checkpoint import load_tensors, read_snapshot
from raystill.train.checkpoint.tensors import optimizer_tensors
from raystill.train.step.adamw import (
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
)
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import parallel_module
from raystill.train.student.sharding import num_shards, shard_student, whole_weights
from tests.support.tiny_student import (
    flat,
    make_row,
    make_step,
    relative_error,
    tiny_module,
    training_config,
    write_checkpoint,
)
from tests.support.workers import run_workers

WORKERS = 4
STEPS = [range(0, 12), range(12, 20)]
KINDS = ("adamw_bf16", "adamw_8bit")
# name: (training, the largest relative difference to one worker after two steps)
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "sharded": ({}, 1e-6),
    "copies": ({"shard_group_size": 2, "num_workers": 4}, 1e-6),
    "copies of one worker": ({"shard_group_size": 1, "num_workers": 4}, 1e-6),
    "reduced once": ({"reduce_gradients": "once"}, 1e-6),
    "copies, reduced once": (
        {"shard_group_size": 2, "num_workers": 4, "reduce_gradients": "once"},
        1e-6,
    ),
    "offloaded": ({"cpu_offload": True}, 1e-6),
    "adamw_8bit": ({"optimizer": "adamw_8bit"}, 1e-4),
    "adamw_8bit, copies, offloaded": (
        {"optimizer": "adamw_8bit", "cpu_offload": True, "shard_group_size": 2, "num_workers": 4},
        1e-4,
    ),
    "adamw_bf16": ({"optimizer": "adamw_bf16"}, 4e-3),
}


class Training:
    """A student under way, alone or on one of four ranks; clipping makes the global norm count."""

    def __init__(self, case: str, rank: int | None = None) -> None:
        self.rank = rank
        settings = CASES[case][0]
        config = training_config(max_grad_norm=0.5, strategy="fsdp", learning_rate=1e-3, **settings)
        dtype = torch.bfloat16 if config.optimizer == "adamw_bf16" else torch.float32
        self.inner = tiny_module(dtype, wide=True).train()
        module: Any = self.inner
        world_size = 1
        if rank is not None:
            world_size = WORKERS
            shard_student(self.inner, torch.device("cpu"), WORKERS, config)
            module = parallel_module(self.inner, torch.device("cpu"), WORKERS, compiled=False)
        self.step = make_step(module, config, world_size)
        self.model, self.optimizer = self.inner.model, self.step.optimizer

    def run(self, number: int) -> None:
        rows = STEPS[number]
        mine = rows if self.rank is None else rows[self.rank :: WORKERS]
        self.step.run(number, [make_row(i) for i in mine], has_more=True, stop=False)

    def weights(self) -> torch.Tensor:
        return flat(self.inner.parameters()).float()

    def state_bytes(self) -> float:
        """Bytes a parameter of the optimizer's state, of all ranks."""
        tensors = optimizer_tensors(self.model, self.optimizer).items()
        state = sum(t.numel() * t.element_size() for n, t in tensors if not n.startswith("step."))
        return state / sum(p.numel() for p in self.model.parameters())


def reference(kind: str, dtype: torch.dtype, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same noisy quadratic by this optimizer, and by PyTorch's in float64: how far each moved.

    Gradients of three orders of magnitude in each row.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 640, generator=generator) * 0.02
    sizes = 10.0 ** (-3 * torch.rand(16, 640, generator=generator))
    moved = []
    for name, precision in ((kind, dtype), ("adamw", torch.float64)):
        module = torch.nn.Linear(640, 16, bias=False, dtype=precision)
        with torch.no_grad():
            module.weight.copy_(start.to(dtype))
        config = TrainingConfig(
            optimizer=name,  # type: ignore[arg-type]
            learning_rate=1e-4,
            weight_decay=0.01,
        )
        optimizer = build_optimizer(module, config)
        noise = torch.Generator().manual_seed(1)
        before = module.weight.detach().double().clone()
        for _ in range(steps):
            drawn = torch.randn(16, 640, generator=noise)
            module.weight.grad = (sizes * (0.3 + drawn)).to(precision)
            optimizer.step()
        held = module.weight.detach().double()
        if name == "adamw_bf16":
            held += optimizer.state[module.weight]["compensation"].double()
        moved.append(held - before)
    return moved[0], moved[1]


@pytest.mark.parametrize(("kind", "bound"), [("adamw_bf16", 0.01), ("adamw_8bit", 0.025)])
def test_three_hundred_steps_are_those_of_float64(kind: str, bound: float) -> None:
    dtype = torch.bfloat16 if kind == "adamw_bf16" else torch.float32
    mine, exact = reference(kind, dtype, 300)
    assert relative_error(mine, exact) < bound
    # Neither drifts: the mean of what each weight has moved is the same.
    assert abs(float(mine.mean() / exact.mean()) - 1) < 2e-3


def test_bfloat16_alone_would_lose_the_updates() -> None:
    """What Kahan summation is for: the same by PyTorch's AdamW on bfloat16 weights."""
    plain, exact = reference("adamw", torch.bfloat16, 300)
    assert relative_error(plain, exact) > 0.3


def test_codes_keep_numbers_to_four_percent() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 700, generator=generator) * 10.0 ** torch.randint(-9, 9, (8, 1)).float()
    codes, scale = encode_signed(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == (8, 3)
    got = decode_signed(codes, scale)
    kept = got != 0
    assert kept.float().mean() > 0.99
    assert ((got - x).abs() / x.abs())[kept].max() < 0.0394
    assert (got.sign() == x.sign())[kept].all()
    v = x.square()
    codes, scale = encode_positive(v)
    got = decode_positive(codes, scale)
    assert codes.dtype == torch.uint8 and (got > 0).all()
    large = v > scale.repeat_interleave(256, dim=1)[:, :700] * 2.0**-27
    assert ((got - v).abs() / v)[large].max() < 0.0394


def test_codes_of_zeros_and_of_one_large_number() -> None:
    x = torch.zeros(2, 300)
    assert not decode_signed(*encode_signed(x)).any()
    assert not decode_positive(*encode_positive(x)).any()
    x[1, 299] = 1e30
    assert torch.equal(decode_signed(*encode_signed(x)), x)
    small = decode_positive(*encode_positive(x))
    assert not small[:, :256].any() and (small[1, 256:299] > 0).all() and small[1, 299] == 1e30


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, kind: str) -> None:
    training = Training(kind)
    training.run(0)
    (folder,) = [str(path) for path in write_checkpoint(training, tmp_path, Ranks())]
    again = Training(kind)
    load_tensors(folder, read_snapshot(folder).num_files, again.model, again.optimizer)
    assert (
        training.optimizer.state_dict()["state"].keys()
        == again.optimizer.state_dict()["state"].keys()
    )
    for each in (training, again):
        each.run(1)
    assert torch.equal(training.weights(), again.weights())


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("adamw_bf16", 6.0, 6.01), ("adamw_8bit", 2.0, 2.4), ("sharded", 8.0, 8.01)],
)
def test_bytes_a_parameter(kind: str, least: float, most: float) -> None:
    training = Training(kind)
    training.run(0)
    assert least <= training.state_bytes() <= most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw_bf16", "param_dtype": "float64"}, "leave param_dtype unset"),
        ({"optimizer": "adamw_bf16", "compute_dtype": "float32"}, "set compute_dtype: bfloat16"),
        ({"optimizer": "adamw_bf16", "beta2": 0.999}, "set beta2: 0.99 or less"),
        ({"cpu_offload": True}, "set strategy: fsdp"),
        ({"strategy": "fsdp", "shard_group_size": 3, "num_workers": 4}, "multiple of it"),
        ({"strategy": "fsdp", "shard_group_size": 2, "num_workers": [2, 4]}, "one number"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    for kind in KINDS:
        training = Training(kind)
        training.run(0)
        write_checkpoint(training, folder / f"alone {kind}", Ranks())
    return run_workers(worker_main, folder, WORKERS)


@pytest.mark.parametrize("case", CASES)
def test_four_workers_train_as_one(ranks: list[dict[str, Any]], case: str) -> None:
    alone = Training(case)
    before = alone.weights()
    for number in range(2):
        alone.run(number)
    moved = alone.weights() - before
    for rank in ranks:
        assert relative_error(rank[case]["weights"], alone.weights()) < CASES[case][1]
        assert relative_error(rank[case]["weights"] - before, moved) < 100 * CASES[case][1]
        assert torch.equal(rank[case]["weights"], ranks[0][case]["weights"])
        assert rank[case]["shards"] == CASES[case][0].get("shard_group_size", WORKERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_between_one_worker_and_four(
    ranks: list[dict[str, Any]], folder: Path, kind: str
) -> None:
    whole_run = Training(kind)
    for number in range(2):
        whole_run.run(number)
    four = next((folder / f"four {kind}" / "checkpoints").iterdir())
    again = Training(kind)
    load_tensors(four, read_snapshot(four).num_files, again.model, again.optimizer)
    again.run(1)
    bound = CASES[kind][1]
    assert relative_error(again.weights(), whole_run.weights()) < bound
    for rank in ranks:
        assert relative_error(rank[f"from one {kind}"], whole_run.weights()) < bound


def test_copies_write_each_tensor_once(ranks: list[dict[str, Any]], folder: Path) -> None:
    written = next((folder / "four copies" / "checkpoints").iterdir())
    assert read_snapshot(written).num_files == 2
    assert len(list(written.glob("*-of-00002.safetensors"))) == 4
    again = Training("copies")
    load_tensors(written, 2, again.model, again.optimizer)
    whole_run = Training("copies")
    whole_run.run(0)
    assert relative_error(again.weights(), whole_run.weights()) < 1e-6


def worker_main(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    ranks = Ranks(rank, WORKERS)
    for case in CASES:
        training = Training(case, rank)
        for number in range(2):
            training.run(number)
            with whole_weights(training.inner):
                pass
            if number == 0 and case in ("copies", *KINDS):
                write_checkpoint(training, folder / f"four {case}", ranks)
        shards = num_shards(training.inner)
        results[case] = {"weights": training.weights(), "shards": shards}
    for kind in KINDS:
        one = next((folder / f"alone {kind}" / "checkpoints").iterdir())
        training = Training(kind, rank)
        load_tensors(one, read_snapshot(one).num_files, training.model, training.optimizer)
        training.run(1)
        results[f"from one {kind}"] = training.weights()
    return results
