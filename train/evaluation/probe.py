"""The probe of a run: do the served teacher and the plain model say the same of the same tokens?

Before step 1 some answered held-out rows are given to the teacher as Hugging Face runs it. A server
that renormalises, shifts by a token, loads other weights or scales its head differently shows here,
in half a minute, and not in a student that learns badly.

Where it sits: the driver asks whether it is due and starts the task beside the student's first
evaluation. *Waits for* the held-out answers. *Unblocks* the first step (``release_training``).

Legend: N response tokens, K teacher ids kept for each, V vocabulary. Logprobs are nats.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raystill.base.errors import RunError
from raystill.base.run_folder import HELD_OUT, PROBE
from raystill.run import Run
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


NUM_ROWS = 8
LARGEST_WEIGHTS_BYTES = 8 << 30


def is_due(run: Run) -> bool:
    """Whether the teacher of this start is to be compared.

    Not a second time in one run folder; and not without held-out rows, with the synthetic engine,
    or with weights too large for a node to hold beside its other work.
    """
    config = run.config
    if config.teacher.engine != "vllm" or not config.evaluation.enabled:
        return False
    if run.folder.exists(PROBE):
        return False
    weights = sum(path.stat().st_size for path in Path(run.teacher.folder).glob("*.safetensors"))
    return 0 < weights <= LARGEST_WEIGHTS_BYTES


@ray.remote(num_cpus=0)
def probe_teacher(run: Run) -> None:
    """Write probe.json and let the training begin. RunError where they disagree, with figures."""
    from transformers import AutoModelForCausalLM

    from raystill.train.batch.rows import rows_from_table
    from raystill.train.student.build import num_classes

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    ray.get(run.coordinator.wait_held_out.remote())
    rows = rows_from_table(run.folder.read_table(HELD_OUT).slice(0, NUM_ROWS).combine_chunks())
    teacher, teacher_folder = run.config.teacher, run.teacher.on_this_node("all")
    model = AutoModelForCausalLM.from_pretrained(
        teacher_folder,
        dtype="float32",
        trust_remote_code=teacher.trust_remote_code,
        use_safetensors=True,
    )
    agreed = agreement(model, rows, num_classes(model, teacher_folder))
    dtype = teacher.dtype if teacher.dtype != "auto" else "bfloat16"
    quantised = bool(teacher.quantization or getattr(model.config, "quantization_config", None))
    wrong = disagreements(agreed, dtype, quantised)
    if wrong:
        raise RunError(
            "the served teacher and the same model run by Hugging Face disagree on "
            f"{agreed.tokens} tokens of {len(rows)} held-out answers: {'; '.join(wrong)}; see that "
            "teacher.model, teacher.engine_args and teacher.quantization name what you mean, or go "
            "on with --skip-probe"
        )
    run.folder.write_text(PROBE, json.dumps(asdict(agreed), indent=2) + "\n")
    ray.get(run.coordinator.release_training.remote())
