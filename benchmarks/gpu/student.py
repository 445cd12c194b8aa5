"""The student: its step in each variant, with FSDP2 on one rank, and its checkpoint."""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.setting import DEVICE, FORWARD_KL, GPU, SIZES, TOP_K, Bars, timed
from raystill.config.training import TrainingConfig
from raystill.train.batch.rows import Row
from raystill.train.checkpoint.checkpoint import Part, load_tensors
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import GlobalStep
from raystill.train.student.module import StudentModule, parallel_module
from raystill.train.student.sharding import place_student, shard_student

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by a part of the device's name."""


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
