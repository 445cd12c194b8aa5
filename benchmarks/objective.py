"""Loss forward and backward on hidden states and head: time and peak memory, dense and chunked.

    python -m benchmarks.objective [--tokens 512 2048 8192] [--rounds 3]
                                   [--output benchmarks/results/objective.json]

V = 49,152, D = 576 (SmolLM2-135M), K = 64; hidden states and head in one dtype, gradients of both;
the teacher of the last two has as many ids and as wide states:

- ``dense cross entropy``: ``F.cross_entropy(F.linear(h, W), y)``, what the others are held against;
- ``linear_cross_entropy``: PyTorch's own chunked one, where this torch has it;
- ``topk dense``: forward KL on the partition, from logits [N, V];
- ``topk chunked``: the same with `head_loss`, as the student is trained;
- ``cross entropy chunked``: cross entropy with `head_loss`, as a ``text`` signal is trained;
- ``hidden chunked``: forward KL over the full vocabulary from the teacher's hidden states and head,
  a fourth matrix product (4 / 3 of the arithmetic);
- ``full dense``: the same from all logits of both, by autograd.

Time: each size and dtype has a process of its own, where the ways take turns and the best of all
rounds counts, so that a busy moment of the machine falls on all alike. Memory: each way has a
process of its own that does it once (memory that an earlier one gave back would be used again
unseen); the figure is the kernel's, the peak of the resident set (VmHWM, reset through
/proc/self/clear_refs) over what was resident before. It includes the two gradients, whose size
stands beside it. Torch's allocations are invisible to tracemalloc, and its profiler does not see
the buffers of the matrix library.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import machine, write_result
from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import topk_partition
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import CPU_CHUNK_BYTES, ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import TokenObjective, divergences, on_partition
from raystill.train.loss.teacher_head import TeacherHead

VOCAB, HIDDEN, TOP_K = 49_152, 576, 64
FORWARD_KL = ObjectiveConfig(forward_kl=1.0)
CROSS_ENTROPY = ObjectiveConfig(cross_entropy=1.0)
BASE = "dense cross entropy"


def micro_batch(num_tokens: int, with_partition: bool) -> MicroBatch:
    """Targets, and the top-k signal of a peaked teacher, of some tokens."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    partition = None
    if with_partition:
        ids = (targets[:, None] + 769 * torch.arange(TOP_K)) % VOCAB
        drops = torch.empty(num_tokens, TOP_K).exponential_(3.0, generator=generator)
        logprobs = -1.0 - drops.cumsum(dim=1)
        tail = torch.log1p(-logprobs.double().exp().sum(dim=1).clamp_max(0.9999))
        partition = topk_partition(ids, logprobs, tail, VOCAB)
    none, ones = torch.zeros(0), torch.ones(num_tokens)
    return MicroBatch(
        none, None, none, none, targets, ones, partition, 1, num_tokens, num_tokens, num_tokens
    )


def ways(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The scalar loss of each way."""
    topk, text = (micro_batch(len(hidden), with_partition) for with_partition in (True, False))
    divergence = divergences(FORWARD_KL)["forward_kl"]
    assert topk.partition is not None
    partition = topk.partition
    head = OutputHead(weight, compute_dtype=weight.dtype)

    def chunked(objective: ChunkObjective) -> Tensor:
        return head_loss(hidden, head, objective).total / len(hidden)

    found = {
        BASE: lambda: F.cross_entropy(F.linear(hidden, weight), topk.targets),
        "topk dense": lambda: on_partition(divergence, F.linear(hidden, weight), partition).mean(),
        "topk chunked": lambda: chunked(TokenObjective(FORWARD_KL, topk)),
        "cross entropy chunked": lambda: chunked(TokenObjective(CROSS_ENTROPY, text)),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight, topk.targets, options=options
        )
    return found | full_ways(hidden, weight, chunked)


def full_ways(
    hidden: Tensor, weight: Tensor, chunked: Callable[[ChunkObjective], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Forward KL over the full vocabulary, from the teacher's hidden states and head."""
    states, rows = (t.detach() for t in inputs(len(hidden), weight.dtype, seed=2))
    teacher = TeacherHead(rows, compute_dtype=rows.dtype, num_classes=VOCAB)
    batch = replace(micro_batch(len(hidden), False), teacher_hidden=states.bfloat16())

    def dense() -> Tensor:
        log_p = torch.log_softmax(F.linear(states, rows), dim=1)
        log_q = torch.log_softmax(F.linear(hidden, weight), dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return {
        "hidden chunked": lambda: chunked(HiddenObjective(FORWARD_KL, batch, teacher)),
        "full dense": dense,
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def inputs(num_tokens: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and weight [V, D], both to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    # Filled in place: memory that a temporary tensor gave back would be used again unseen.
    hidden = torch.empty(num_tokens, HIDDEN, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(VOCAB, HIDDEN, dtype=dtype).normal_(std=0.1, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_()


def measure_time(num_tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of forward and backward of each way, the best of the rounds."""
    hidden, weight = inputs(num_tokens, dtype)
    losses = ways(hidden, weight)
    best = dict.fromkeys(losses, float("inf"))
    for turn in range(rounds + 1):  # The first warms up and is not counted.
        for name, loss in losses.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            loss().backward()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure_memory(num_tokens: int, dtype: torch.dtype, way: str) -> dict[str, float]:
    """MB that forward and backward of one way took at their peak, and those of the gradients."""
    hidden, weight = inputs(num_tokens, dtype)
    loss = ways(hidden, weight)[way]
    small = torch.ones(256, 256, dtype=dtype)
    torch.softmax(small @ small, dim=1)  # Loads the matrix library and its buffers.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss().backward()
    peak = resident("VmHWM") - before
    gradients = (hidden.nelement() + weight.nelement()) * dtype.itemsize
    return {"peak_mb": peak / 1e6, "gradients_mb": gradients / 1e6}


def in_child(arguments: argparse.Namespace, *words: str) -> Any:
    """What a process of its own prints, read as JSON."""
    command = [sys.executable, "-m", "benchmarks.objective", "--rounds", str(arguments.rounds)]
    command += ["--threads", str(arguments.threads), "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def child(arguments: argparse.Namespace) -> Any:
    dtype = getattr(torch, arguments.dtypes[0])
    if arguments.way is None:
        return measure_time(arguments.tokens[0], dtype, arguments.rounds)
    return measure_memory(arguments.tokens[0], dtype, arguments.way)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each dtype, size and way."""
    lines = []
    for dtype, tokens in itertools.product(arguments.dtypes, arguments.tokens):
        words = ["--tokens", str(tokens), "--dtypes", dtype]
        for way, seconds in (best := in_child(arguments, *words)).items():
            line = {"tokens": tokens, "dtype": dtype, "way": way, "seconds": seconds}
            line["of_dense_cross_entropy"] = seconds / best[BASE]
            line |= in_child(arguments, *words, "--way", way)
            lines.append(line)
            print(
                f"{tokens:>6} {dtype:>9} {way:<22}{seconds:8.3f} s"
                f"{line['of_dense_cross_entropy']:6.2f} x{line['peak_mb']:8.0f} MB"
                f" ({line['gradients_mb']:.0f} MB gradients)",
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/objective.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    sizes = {"vocab": VOCAB, "hidden": HIDDEN, "top_k": TOP_K, "chunk_bytes": CPU_CHUNK_BYTES}
    software = {"threads": arguments.threads, "torch": torch.__version__}
    found = {"machine": machine() | software, "sizes": sizes, "measured": measure(arguments)}
    write_result(arguments.output, found)


if __name__ == "__main__":
    main()
