"""Teacher-forced evaluation: how close the student is to the teacher on the held-out answers.

All ranks measure their slice of ``held_out.parquet`` (teacher-written contexts, with the teacher's
top K and tail), sums are added over the ranks, and every response token counts the same. The
figures are of the partition of K ids and a tail: its KL is a lower bound of the full vocabulary's,
its acceptance an upper bound. Of a teacher that gives text alone, perplexity and agreement with its
tokens are left.

A sharded student measures as it trains: all ranks run equally many passes, in which they gather one
layer after the other; a rank with fewer rows runs dummies.

Consumes: ``held_out.parquet``. Waits for: the ranks' sums; sharded, for the others in each pass.
Imports no Ray.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raystill.train.batch.batch import (
    MicroBatch,
    collate,
    cut_micro_batches,
    dummy_micro_batch,
)
from raystill.train.batch.rows import Row
from raystill.train.loss.objective import partition_metrics
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import gathering_passes, is_sharded

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


def own_groups(
    module: StudentModule, rows: Sequence[Row], tokens_budget: int, ranks: Ranks, device: Any
) -> Iterator[list[Row]]:
    """This rank's part of ``rows``; for each group the caller runs one pass. Collective.

    rows: the same on every rank, of which each takes every world_size-th. The module is in eval
    mode, and its head whole, until the last group is taken. Of a sharded module, ranks with fewer
    groups then run dummies.
    """
    was_training = module.training
    module.eval()
    try:
        with gathering_passes(module):
            shares = [rows[rank :: ranks.world_size] for rank in range(ranks.world_size)]
            cut = [cut_micro_batches(share, tokens_budget, module.packed) for share in shares]
            mine = cut[ranks.rank]
            yield from mine
            if not is_sharded(module):
                return
            for _ in range(max(map(len, cut)) - len(mine)):
                module.hidden_states(dummy_micro_batch("text").to(device))
    finally:
        module.train(was_training)


def collate_for(
    module: StudentModule, group: Sequence[Row], kind: str, student_vocab: int
) -> MicroBatch:
    """The rows of a group of `own_groups` as ``module`` wants them, padded or packed."""
    packed, shared = module.packed, module.shared
    return collate(group, kind, student_vocab, packed=packed, shared=shared)


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
    # An API gives no distributions; the rows of one run are all of one kind.
    kind = "topk" if rows and rows[0].topk_ids is not None else "text"
    sums = dict.fromkeys((*SUMS, "tokens"), 0.0)
    for group in own_groups(module, rows, tokens_budget, ranks, device):
        batch = collate_for(module, group, kind, student_vocab)
        moved, kl = batch.to(device), []
        for chunk, logits in module.logit_chunks(moved):
            targets = moved.targets[chunk]
            if moved.partition is None:
                values = text_metrics(logits, targets)
            else:
                values = partition_metrics(logits, moved.partition[chunk], targets)
                kl.append(values["kl"])
            for name, value in values.items():
                sums[name] += value.double().sum().item()
        sums["tokens"] += batch.num_tokens
        if tokens is not None and kl:
            tokens.keep(group, kl)
    found = figures(ranks.sum(sums))
    if kind == "text":
        return {name: found[name] for name in ("top1_agreement", "perplexity", "num_tokens")}
    return found


def text_metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a teacher that gives its text alone, [N] each: ``top1`` is agreement with the token that
    it drew, ``nll`` the student's -log q of it, nats.
    """
    log_q = torch.log_softmax(logits.float(), dim=1).gather(1, targets[:, None]).squeeze(1)
    return {"top1": (logits.argmax(dim=1) == targets).to(log_q.dtype), "nll": -log_q}


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
