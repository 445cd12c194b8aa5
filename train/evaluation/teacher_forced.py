"""Teacher-forced evaluation: how close the student is to the teacher on the held-out answers.

All ranks measure their slice of ``held_out.parquet`` (teacher-written contexts, with the teacher's
top K and tail), sums are added over the ranks, and every response token counts the same. The
figures are of the partition of K ids and a tail: its KL is a lower bound of the full vocabulary's,
its acceptance an upper bound.

Consumes: ``held_out.parquet``. Waits for: the ranks' sums. Imports no Ray.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raystill.train.batch.batch import MicroBatch, collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.loss.objective import partition_metrics
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule

BOUND = "partition of K ids and a tail: KL is a lower, acceptance an upper bound"
SUMS = ("kl", "top1", "acceptance", "nll")


@dataclass(frozen=True)
class TokenKl:
    """KL(teacher || student) at each token of some rows, kept while they are measured.

    Attributes:
        rows: Numbers of the rows whose tokens are wanted.
        nats: By row number, one value for each token with a loss; of this rank's rows.
    """

    rows: frozenset[int] = frozenset()
    nats: dict[int, list[float]] = field(default_factory=dict)

    def keep(self, group: Sequence[Row], kl: Sequence[torch.Tensor]) -> None:
        """Take the KL of a micro-batch's tokens, given in chunks, for the wanted rows in it."""
        if self.rows.isdisjoint(row.row for row in group):
            return
        values, start = torch.cat(list(kl)).tolist(), 0
        for row in group:
            if row.row in self.rows:
                self.nats[row.row] = values[start : start + row.num_targets]
            start += row.num_targets


def micro_batches(
    rows: Sequence[Row], tokens_budget: int, student_vocab: int
) -> Iterator[MicroBatch]:
    """The rows' tokens with their ``topk`` partition, in forward passes of at most the budget."""
    for group in cut_micro_batches(rows, tokens_budget):
        yield collate(group, "topk", student_vocab, "token")


@torch.no_grad()
def evaluate(
    module: StudentModule,
    rows: Sequence[Row],
    *,
    tokens_budget: int,
    student_vocab: int,
    device: torch.device,
    ranks: Ranks,
    tokens: TokenKl | None = None,
) -> dict[str, Any]:
    """Teacher-forced figures of ``module`` on ``rows``, on every rank.

    ``rows`` are all held-out rows, the same on every rank; each takes every world_size-th.
    ``tokens`` keeps the KL of single tokens on the way, of the rows that it names.
    Raises ValueError where the rows hold no token to measure.
    """
    was_training = module.training
    module.eval()
    sums = dict.fromkeys((*SUMS, "tokens"), 0.0)
    try:
        mine = rows[ranks.rank :: ranks.world_size]
        for group in cut_micro_batches(mine, tokens_budget):
            batch = collate(group, "topk", student_vocab, "token")
            moved, kl = batch.to(device), []
            assert moved.partition is not None, "held-out rows carry the topk signal"
            for chunk, logits in module.logit_chunks(moved):
                part = moved.partition[chunk]
                values = partition_metrics(logits, part, moved.targets[chunk])
                for name in SUMS:
                    sums[name] += values[name].double().sum().item()
                kl.append(values["kl"])
            sums["tokens"] += batch.num_tokens
            if tokens is not None:
                tokens.keep(group, kl)
    finally:
        module.train(was_training)
    return figures(ranks.sum(sums))


def figures(sums: dict[str, float]) -> dict[str, Any]:
    """The reported figures from sums over tokens of ``kl top1 acceptance nll`` and ``tokens``."""
    tokens = sums["tokens"]
    if tokens == 0:
        raise ValueError(
            "the held-out rows hold no response token to measure; raise evaluation.max_rows or "
            "teacher.sampling.max_tokens, or hold out other prompts"
        )
    return {
        "kl_nats_per_token": sums["kl"] / tokens,
        "top1_agreement": sums["top1"] / tokens,
        "acceptance": sums["acceptance"] / tokens,
        "perplexity": math.exp(min(sums["nll"] / tokens, 700.0)),
        "num_tokens": int(tokens),
        "bound": BOUND,
    }
