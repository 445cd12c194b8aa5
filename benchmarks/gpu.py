"""The student on one GPU: numbers right, losses fast, a step busy, a checkpoint whole.

    python -m benchmarks.gpu [--output benchmarks/results/gpu.json] [--only PART ...]

Needs torch, transformers, pyarrow, pydantic and PyYAML (Python 3.11 and 3.12), no Ray and no vLLM,
and ends within eight minutes on one GPU. Without a GPU it runs small, to show that all of it runs;
bars of speed are then printed and not held. The parts:

- ``numerics``: every term of the objective, by both chunked losses, in bfloat16 against float64;
- ``loss``: time and peak memory of the chunked losses, dense cross entropy, PyTorch's
  ``linear_cross_entropy`` and, where it is installed, Liger's, at V = 151,936, D = 4,096;
- ``step``: a student of 1B parameters padded, packed, with recomputed layers, compiled, and with
  each optimizer: tokens/s, model FLOPs utilisation, bytes a parameter, how often the host waits;
- ``sharded``: one rank of FSDP2 trains as no sharding does;
- ``checkpoint``: written and read again, bit for bit.

It exits with 1 where a bar fails, after all parts have run and the result is written.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import machine, write_result
from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import topk_partition
from raystill.train.batch.rows import Row
from raystill.train.checkpoint.checkpoint import Part, load_tensors
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import TokenObjective
from raystill.train.loss.teacher_head import TeacherHead
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import GlobalStep
from raystill.train.student.module import StudentModule, parallel_module
from raystill.train.student.sharding import place_student, shard_student

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOP_K = 64
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by a part of the device's name."""
FORWARD_KL = ObjectiveConfig(forward_kl=1.0)


@dataclass
class Bars:
    """What was wanted and what was found; ``held`` of a bar is None where it is only printed."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def most(self, name: str, value: float, bound: float, held: bool = True) -> None:
        """A figure that should be at most ``bound``; infinity and NaN are not."""
        self._add(name, value, f"<= {bound:g}", value <= bound, held)

    def least(self, name: str, value: float, bound: float, held: bool = True) -> None:
        """A figure that should be at least ``bound``."""
        self._add(name, value, f">= {bound:g}", value >= bound, held)

    def _add(self, name: str, value: float, wanted: str, fits: bool, held: bool) -> None:
        line = {"name": name, "value": value, "wanted": wanted, "held": fits if held else None}
        self.lines.append(line)
        word = ("ok" if fits else "FAILS") if held else "not held here"
        print(f"  {name:<58} {value:10.4g}  {wanted:<10} {word}", flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the bars that fail."""
        return [line["name"] for line in self.lines if line["held"] is False]


@dataclass(frozen=True)
class Sizes:
    """Of the loss, and of the student."""

    vocab: int
    hidden: int
    tokens: int
    student: dict[str, int]
    micro_batch: int
    rows: int
    row_tokens: int


LARGE = Sizes(
    vocab=151_936,
    hidden=4096,
    tokens=8192,
    student={
        **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192},
        **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    },
    micro_batch=16_384,
    rows=64,
    row_tokens=1024,
)
SMALL = Sizes(
    vocab=2048,
    hidden=64,
    tokens=256,
    student={
        **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    },
    micro_batch=256,
    rows=8,
    row_tokens=48,
)
SIZES = LARGE if GPU else SMALL


def signal(tokens: int, vocab: int) -> MicroBatch:
    """Targets and a peaked teacher's top K of some tokens, as a micro-batch for the head alone."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    ids = (targets[:, None] + 7 * torch.arange(TOP_K)) % vocab
    drops = torch.empty(tokens, TOP_K).exponential_(3.0, generator=generator)
    logprobs = -1.0 - drops.cumsum(dim=1)
    tail = torch.log1p(-logprobs.double().exp().sum(dim=1).clamp_max(0.9999))
    none, ones = torch.zeros(0), torch.ones(tokens)
    partition = topk_partition(ids, logprobs, tail, vocab)
    sizes = (1, tokens, tokens, tokens)
    batch = MicroBatch(none, None, none, none, targets, ones, partition, *sizes)
    return batch.to(DEVICE)


def inputs(tokens: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and a head [V, D] whose logits are of the size of real ones."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(tokens, SIZES.hidden, device=DEVICE, generator=generator)
    weight = torch.randn(SIZES.vocab, SIZES.hidden, device=DEVICE, generator=generator)
    weight *= 2.0 / SIZES.hidden**0.5
    return hidden.bfloat16().to(dtype).requires_grad_(), weight.bfloat16().to(
        dtype
    ).requires_grad_()


def chunked(kind: str, objective: ObjectiveConfig, batch: MicroBatch, dtype: torch.dtype) -> Any:
    """A function of hidden states and head: the mean loss by ``topk`` or by ``hidden``."""
    states, rows = (t.detach() for t in inputs(batch.num_tokens, dtype, seed=2))
    teacher = TeacherHead(rows, compute_dtype=dtype, num_classes=SIZES.vocab)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        tokens: ChunkObjective
        if kind == "topk":
            tokens = TokenObjective(objective, batch)
        else:
            full = replace(batch, partition=None, teacher_hidden=states.bfloat16())
            tokens = HiddenObjective(objective, full, teacher)
        return head_loss(hidden, OutputHead(weight, compute_dtype=dtype), tokens).total / len(
            hidden
        )

    return loss


def numerics(bars: Bars) -> dict[str, Any]:
    """Every term by both losses in bfloat16, against the same in float64 on the same inputs."""
    found = {}
    tokens = min(SIZES.tokens, 512)
    batch = signal(tokens, SIZES.vocab)
    for kind in ("topk", "hidden"):
        for term in TERMS:
            objective = ObjectiveConfig.model_validate({term: 1.0})
            results = []
            for dtype in (torch.bfloat16, torch.float64):
                hidden, weight = inputs(tokens, dtype)
                loss = chunked(kind, objective, batch, dtype)(hidden, weight)
                loss.backward()
                assert hidden.grad is not None and weight.grad is not None
                results.append((loss.item(), hidden.grad.double(), weight.grad.double()))
            (mine, *gradients), (exact, *references) = results
            loss_error = abs(mine / exact - 1)
            errors = [
                float((g - r).norm() / r.norm()) for g, r in zip(gradients, references, strict=True)
            ]
            found[f"{kind} {term}"] = {"loss": loss_error, "gradient": max(errors)}
            bars.most(f"{kind}, {term}: loss, relative error", loss_error, 0.01)
            # Where teacher and student are close, a rounding decides which of both is smaller.
            bound = 0.1 if term in ("total_variation", "acceptance") else 0.03
            bars.most(f"{kind}, {term}: gradients, relative error", max(errors), bound)
    return found


def timed(work: Callable[[], Any], rounds: int = 5) -> tuple[float, float]:
    """Seconds of the fastest round, and bytes at the peak above those before (0 on a CPU)."""
    work()
    best, peak = float("inf"), 0.0
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
            peak = float(torch.cuda.max_memory_allocated() - before)
        best = min(best, time.perf_counter() - started)
    return best, peak


def losses(tokens: int) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of forward and backward of each way."""
    hidden, weight = inputs(tokens, torch.bfloat16)
    batch = signal(tokens, SIZES.vocab)
    ways: dict[str, Callable[[], Tensor]] = {
        "dense cross entropy": lambda: F.cross_entropy(F.linear(hidden, weight), batch.targets)
    }
    for kind in ("topk", "hidden"):
        way = chunked(kind, FORWARD_KL, batch, torch.bfloat16)
        ways[f"{kind} chunked"] = lambda way=way: way(hidden, weight)  # type: ignore[misc]
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        ways["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight, batch.targets, options=options
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        ways["Liger"] = lambda: liger(weight, hidden, batch.targets)

    def run(way: Callable[[], Tensor]) -> None:
        hidden.grad = weight.grad = None
        way().backward()

    return {name: timed(lambda way=way: run(way)) for name, way in ways.items()}  # type: ignore[misc]


def loss(bars: Bars) -> dict[str, Any]:
    """The losses at two numbers of tokens: memory should not grow with them."""
    half, whole = losses(SIZES.tokens // 2), losses(SIZES.tokens)
    base = whole["dense cross entropy"][0]
    for name, (seconds, peak) in whole.items():
        ratio = seconds / base
        print(f"  {name:<24}{seconds * 1e3:10.2f} ms {ratio:6.2f} x{peak / 1e9:8.2f} GB")
    for name, bound in (("topk chunked", 1.15), ("hidden chunked", 1.5)):
        bars.most(f"{name}: time of dense cross entropy", whole[name][0] / base, bound, GPU)
        # Twice the tokens are twice the hidden states' gradients, and nothing else.
        states = SIZES.tokens // 2 * SIZES.hidden * 2 * 2
        growth = (whole[name][1] - states) / max(1.0, half[name][1])
        bars.most(f"{name}: memory with twice the tokens", growth, 1.1, GPU)
    columns = ("seconds", "peak_bytes")
    return {n: dict(zip(columns, pair, strict=True)) for n, pair in whole.items()}


def make_rows() -> list[Row]:
    """Rows of unequal lengths with a top-K signal."""
    random = np.random.default_rng(0)
    vocab, rows = SIZES.student["vocab_size"], []
    for number in range(SIZES.rows):
        length = int(random.integers(SIZES.row_tokens // 4, SIZES.row_tokens))
        prompt, response = (random.integers(3, vocab, length // 2 + i) for i in (1, 2))
        shape = (len(response), TOP_K)
        ids = (response[:, None] + 5 * np.arange(TOP_K)) % vocab
        logprobs = np.log(np.sort(random.dirichlet(np.ones(TOP_K + 1), len(response)), axis=1))
        logprobs = logprobs[:, ::-1].astype(np.float32)
        row = Row(number, number, prompt.astype(np.int32), response.astype(np.int32))
        row.topk_ids, row.topk_logprobs = ids.astype(np.int32), logprobs[:, :TOP_K].copy()
        row.tail_logprob, row.sampled_logprobs = logprobs[:, TOP_K].copy(), logprobs[:, 0].copy()
        assert row.topk_ids.shape == shape
        rows.append(row)
    return rows


def student_step(settings: dict[str, Any], sharded: bool = False) -> tuple[StudentModule, Any]:
    """A student with random weights on the device, and its step."""
    training = TrainingConfig(
        compute_dtype="bfloat16", tokens_per_micro_batch=SIZES.micro_batch, **settings
    )
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES.student, tie_word_embeddings=True, use_cache=False)
    model = LlamaForCausalLM(config).to(getattr(torch, training.weights_dtype))
    student = place_student(model, training, DEVICE, 1)
    if sharded:
        shard_student(student, DEVICE, 1, training)
    batches = BatchMaker(
        training,
        FORWARD_KL,
        signal_kind="topk",
        student_vocab=student.vocab_size,
        device=DEVICE,
        packed=student.packed,
    )
    module = parallel_module(student, DEVICE, 1, training.compile)
    return student, GlobalStep(module, build_optimizer(student, training), batches, total_steps=99)


def flops(rows: list[Row]) -> float:
    """Of forward and backward pass: 6 for each weight of a product and token, and attention's."""
    s = SIZES.student
    width = s["hidden_size"] // s["num_attention_heads"]
    keys = width * s["num_key_value_heads"]
    layer = (
        2 * s["hidden_size"] * (s["hidden_size"] + keys)
        + 3 * s["hidden_size"] * (s["intermediate_size"])
    )
    total = 0.0
    for row in rows:
        attention = 6 * s["hidden_size"] * row.num_inputs * row.num_inputs
        total += s["num_hidden_layers"] * (6 * layer * row.num_inputs + attention)
        total += 6 * s["vocab_size"] * s["hidden_size"] * row.num_targets
    return total


def waits(one: Any, rows: list[Row]) -> int | None:
    """How often the host waits for the GPU within the passes of a step; None without a GPU."""
    if not GPU:
        return None
    batches = [one.batches.make(group) for group in one.batches.cut(rows)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches:
                one._forward_backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one.optimizer.zero_grad(set_to_none=True)
    return sum("synchroniz" in str(each.message) for each in caught)


VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "packed, recomputed": {"packing": True, "activation_checkpointing": True},
    "padded, compiled": {"packing": False, "compile": True},
    "packed, adamw_8bit": {"packing": True, "optimizer": "adamw_8bit"},
    "packed, adamw_bf16": {"packing": True, "optimizer": "adamw_bf16"},
}


def step(bars: Bars) -> dict[str, Any]:
    """Steps of the student in each variant."""
    rows, found = make_rows(), {}
    name = torch.cuda.get_device_name() if GPU else "cpu"
    peak = next((p for part, p in PEAK_FLOPS.items() if part in name), None)
    for variant, settings in VARIANTS.items():
        if not GPU and settings.get("compile"):
            continue  # Compiling takes longer than all the rest.
        student, one = student_step(settings)
        numbers = iter(range(99))
        first = one.run(next(numbers), rows, has_more=True, stop=False)

        def again(one: Any = one, numbers: Any = numbers) -> None:
            one.run(next(numbers), rows, has_more=True, stop=False)

        seconds, _ = timed(again, rounds=3)
        last = one.run(next(numbers), rows, has_more=True, stop=False)
        parameters = sum(p.numel() for p in student.parameters())
        inputs_of_step = sum(row.num_inputs for row in rows)
        line: dict[str, Any] = {"tokens_per_s": inputs_of_step / seconds, "seconds": seconds}
        line["waits_in_passes"] = waits(one, rows)
        line["padding"] = last.padding_fraction
        if GPU:
            line["bytes_a_parameter"] = torch.cuda.memory_allocated() / parameters
            line["peak_bytes"] = torch.cuda.max_memory_allocated()
        if peak is not None:
            line["utilisation"] = flops(rows) / seconds / peak
        found[variant] = line
        print(f"  {variant:<20}", {k: v and round(v, 4) for k, v in line.items()}, flush=True)
        bars.most(f"{variant}: loss after five steps, of the first", last.loss / first.loss, 1.0)
        if line["waits_in_passes"] is not None and variant in ("padded", "packed"):
            bars.most(f"{variant}: waits within the passes", line["waits_in_passes"], 0)
        del student, one, again
        if GPU:
            torch.cuda.empty_cache()
    if peak is not None:
        held = "H100" in name or "H200" in name
        bars.least("packed: utilisation", found["packed"]["utilisation"], 0.45, held)
    return found


def sharded(bars: Bars) -> dict[str, Any]:
    """FSDP2 over one rank, against no sharding: the same loss, the same weights."""
    rows, results = make_rows(), []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/r", rank=0, world_size=1)
        for is_sharded in (False, True):
            _, one = student_step({"strategy": "fsdp", "packing": False}, is_sharded)
            results.append([one.run(n, rows, has_more=True, stop=False) for n in range(2)])
        dist.destroy_process_group()
    (_, plain), (_, parts) = results
    assert plain.loss and parts.loss and plain.grad_norm and parts.grad_norm
    bars.most("sharded: loss, relative difference", abs(parts.loss / plain.loss - 1), 5e-3)
    norm = abs(parts.grad_norm / plain.grad_norm - 1)
    bars.most("sharded: gradient norm, relative difference", norm, 2e-2)
    return {"loss": parts.loss, "loss_unsharded": plain.loss}


def checkpoint(bars: Bars) -> dict[str, Any]:
    """Write the state after a step, read it into another student, compare, and go on."""
    rows = make_rows()
    student, one = student_step({"packing": False, "optimizer": "adamw_8bit"})
    one.run(0, rows, has_more=True, stop=False)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        part = Part.copied(student.model, one.optimizer, Ranks())
        copied = time.perf_counter()
        part.write(Path(folder))
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        again, other = student_step({"packing": False, "optimizer": "adamw_8bit"})
        began = time.perf_counter()
        load_tensors(folder, part.num_files, again.model, other.optimizer)
        read = time.perf_counter()
    pairs = zip(student.parameters(), again.parameters(), strict=True)
    differing = sum(not torch.equal(a, b) for a, b in pairs)
    bars.most("checkpoint: tensors that differ when read again", differing, 0)
    seconds = {"copy": copied - started, "write": written - copied, "read": read - began}
    print(f"  {size / 1e9:.2f} GB", {name: round(s, 2) for name, s in seconds.items()})
    return {"bytes": size, "seconds": seconds}


PARTS: dict[str, Callable[[Bars], dict[str, Any]]] = {
    "numerics": numerics,
    "loss": loss,
    "step": step,
    "sharded": sharded,
    "checkpoint": checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    bars, found, started = Bars(), {}, time.perf_counter()
    for name in arguments.only:
        print(f"{name}:", flush=True)
        found[name] = PARTS[name](bars)
        if GPU:
            torch.cuda.empty_cache()
    software = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if GPU else None}
    result = {"machine": machine() | software, "seconds": time.perf_counter() - started}
    write_result(arguments.output, result | {"bars": bars.lines, "measured": found})
    if bars.failed:
        sys.exit(f"{len(bars.failed)} bars fail: {'; '.join(bars.failed)}")


if __name__ == "__main__":
    main()
