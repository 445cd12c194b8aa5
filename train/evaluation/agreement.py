"""How far what a served teacher said is from what the plain model says of the same tokens.

Legend: N response tokens, K teacher ids kept for each, V vocabulary. Logprobs are nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raystill.train.batch.batch import collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.loss.log_probs import partition_log_probs
from raystill.train.loss.objective import partition_metrics
from raystill.train.student.module import StudentModule

TOKENS_PER_MICRO_BATCH = 512


@dataclass(frozen=True)
class Agreement:
    """Differences over ``tokens`` response tokens, nats.

    drawn_mean, drawn_max: of the drawn token's logprob, absolute. topk_max: of the K best ids'.
    self_distillation: mean KL(served || plain) on the partition, the loss of a student that is the
    teacher; 0 but for the engine's noise.
    """

    tokens: int
    drawn_mean: float
    drawn_max: float
    topk_max: float
    self_distillation: float


ALLOWED = {
    "float32": Agreement(0, drawn_mean=2e-3, drawn_max=5e-2, topk_max=0.1, self_distillation=1e-3),
    "bfloat16": Agreement(0, drawn_mean=0.2, drawn_max=3.0, topk_max=5.0, self_distillation=0.03),
    "quantised": Agreement(0, drawn_mean=0.6, drawn_max=9.0, topk_max=15.0, self_distillation=0.2),
}
"""By the engine's precision: about 20 times (float32) and 3 to 6 times what was measured on 20
answers of a 135M model with vLLM 0.32 (float32: at most 8e-5 on the 32 best ids; bfloat16 against a
float32 model: drawn token 0.065 on average and 0.49 at most, 32 best ids 0.75, KL 0.0024). The
figures of quantised engines, which lose more by design, are a guess."""


@torch.no_grad()
def agreement(model: Any, rows: Sequence[Row], vocab: int) -> Agreement:
    """Compare rows with a ``topk`` signal with the teacher as a Hugging Face ``model``.

    vocab: ids that the tokenizer names. Raises ValueError where no row has a token to compare.
    """
    module = StudentModule(model)
    drawn, best, divergence = [], [], []
    for group in cut_micro_batches(rows, TOKENS_PER_MICRO_BATCH):
        batch = collate(group, "topk", vocab)
        assert batch.partition is not None
        stored = torch.cat([_drawn_logprobs(row) for row in group])
        for tokens, logits in module.logit_chunks(batch):
            partition, targets = batch.partition[tokens], batch.targets[tokens]
            figures = partition_metrics(logits, partition, targets)
            drawn.append((stored[tokens] + figures["nll"]).abs())
            log_q, _ = partition_log_probs(logits, partition.ids)
            both = torch.isfinite(log_q) & torch.isfinite(partition.log_p)
            both[:, -1] = False
            difference = (log_q - partition.log_p.to(log_q.dtype)).abs()
            best.append(torch.where(both, difference, 0.0).amax(dim=1))
            divergence.append(figures["kl"])
    if not drawn:
        raise ValueError("the rows have no response token to compare; expected at least one")
    of_drawn = torch.cat(drawn)
    return Agreement(
        tokens=len(of_drawn),
        drawn_mean=float(of_drawn.mean()),
        drawn_max=float(of_drawn.max()),
        topk_max=float(torch.cat(best).max()),
        self_distillation=float(torch.cat(divergence).mean()),
    )


def disagreements(agreed: Agreement, dtype: str, quantised: bool) -> list[str]:
    """What is beyond the noise of an engine of this precision, in words; nothing: they agree."""
    allowed = ALLOWED["quantised" if quantised else "float32" if dtype == "float32" else "bfloat16"]
    names = {
        "drawn_mean": "mean difference of the drawn token's logprob",
        "drawn_max": "largest difference of the drawn token's logprob",
        "topk_max": "largest difference of a best id's logprob",
        "self_distillation": "self-distillation loss",
    }
    return [
        f"{text} {getattr(agreed, name):.3g} nats (expected at most {getattr(allowed, name):.3g})"
        for name, text in names.items()
        if not getattr(agreed, name) <= getattr(allowed, name)
    ]


def _drawn_logprobs(row: Row) -> torch.Tensor:
    assert row.sampled_logprobs is not None
    return torch.from_numpy(row.sampled_logprobs[-row.num_targets :].copy())
