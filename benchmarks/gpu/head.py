"""The losses at the head: right in bfloat16, fast, flat in memory."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setting import DEVICE, FORWARD_KL, GPU, SIZES, TOP_K, Bars, timed
from raystill.config.objective import TERMS, ObjectiveConfig
from raystill.train.batch.batch import MicroBatch
from raystill.train.batch.partition import topk_partition
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import TokenObjective
from raystill.train.loss.teacher_head import TeacherHead


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
