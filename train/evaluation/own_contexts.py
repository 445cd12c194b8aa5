"""How far student and teacher are on what the student itself wrote, by position in the answer.

On the teacher's texts a student never meets its own mistakes. On its own ones each mistake changes
all that follows, so the divergence may grow with the position; averaged over all tokens that does
not show. Both directions are measured: KL(teacher || student) is large where the student misses
what the teacher would say, KL(student || teacher) where it says what the teacher would not.

Consumes: the student's answers, as rows with the teacher's ``topk`` signal. Waits for: the ranks'
sums. Imports no Ray. Values are of the partition of K ids and a tail, as in `teacher_forced`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from raystill.config.objective import ObjectiveConfig
from raystill.train.batch.rows import Row
from raystill.train.evaluation.teacher_forced import TokenKl, collate_for, own_groups
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import divergences
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule

FIRST_BIN = 32
"""Response tokens of the first bin of positions; each further bin ends at twice the position."""
BOTH = {
    "kl": divergences(ObjectiveConfig(forward_kl=1.0))["forward_kl"],
    "reverse_kl": divergences(ObjectiveConfig(reverse_kl=1.0))["reverse_kl"],
}


def bin_ends(longest: int) -> list[int]:
    """Ends of the bins for answers of at most ``longest`` tokens: 32, 64, 128, and so on."""
    ends = [FIRST_BIN]
    while ends[-1] < longest:
        ends.append(2 * ends[-1])
    return ends


@torch.no_grad()
def measure_own_contexts(
    module: StudentModule,
    rows: Sequence[Row],
    *,
    tokens_budget: int,
    student_vocab: int,
    device: torch.device,
    ranks: Ranks,
    tokens: TokenKl,
) -> dict[str, Any]:
    """Figures of ``rows``, the same on every rank, of which each takes every world_size-th.

    ``kl_on_student_answers``, ``reverse_kl_on_student_answers``: nats a token; None without a
    token. ``student_answer_tokens``: their number. ``student_answers_by_position``: both for the
    tokens from ``from`` to before ``to``. ``tokens`` keeps the forward KL of single tokens.
    """
    ends = bin_ends(max((len(row.response_ids) for row in rows), default=0))
    sums = {f"{name} {end}": 0.0 for end in ends for name in (*BOTH, "tokens")}
    for group in own_groups(module, rows, tokens_budget, ranks, device):
        batch = collate_for(module, group, "topk", student_vocab).to(device)
        assert batch.partition is not None, "the teacher has scored these answers"
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in BOTH}
        for chunk, logits in module.logit_chunks(batch):
            partition = batch.partition[chunk]
            log_q, _ = partition_log_probs(logits, partition.ids)
            for name, divergence in BOTH.items():
                value, _ = divergence(partition.log_p.to(log_q.dtype), log_q, log_q.exp())
                parts[name].append(value)
        tokens.keep(group, parts["kl"])
        _add(sums, ends, group, {name: torch.cat(each) for name, each in parts.items()})
    return _figures(ranks.sum(sums), ends)


def _add(
    sums: dict[str, float], ends: Sequence[int], group: Sequence[Row], values: dict[str, Any]
) -> None:
    """Adds the values [N] of a group's tokens to the sums of their bins."""
    places = torch.cat(
        [
            torch.arange(len(row.response_ids) - row.num_targets, len(row.response_ids))
            for row in group
        ]
    )
    which = torch.bucketize(places, torch.tensor(ends), right=True)
    for number, end in enumerate(ends):
        chosen = which == number
        sums[f"tokens {end}"] += int(chosen.sum())
        for name, value in values.items():
            sums[f"{name} {end}"] += value.double().cpu()[chosen].sum().item()


def _figures(sums: dict[str, float], ends: Sequence[int]) -> dict[str, Any]:
    total = {name: sum(sums[f"{name} {end}"] for end in ends) for name in (*BOTH, "tokens")}
    bins = []
    for start, end in zip([0, *ends], ends, strict=False):
        if count := sums[f"tokens {end}"]:
            figures = {name: sums[f"{name} {end}"] / count for name in BOTH}
            bins.append({"from": start, "to": end, **figures, "tokens": int(count)})

    def mean(name: str) -> float | None:
        return total[name] / total["tokens"] if total["tokens"] else None

    return {
        "kl_on_student_answers": mean("kl"),
        "reverse_kl_on_student_answers": mean("reverse_kl"),
        "student_answer_tokens": int(total["tokens"]),
        "student_answers_by_position": bins,
    }
