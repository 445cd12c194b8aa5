"""The probe of a run: eight held-out answers compared with the plain teacher before step 1.

Where it sits: the driver asks whether it is due and starts the task beside the student's first
evaluation. *Waits for* the held-out answers. *Unblocks* the first step (``release_training``).
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from raystill.cluster.config import RunConfig
from raystill.cluster.model_source import ModelSource
from raystill.cluster.problems import RunError
from raystill.cluster.run_folder import HELD_OUT, PROBE, RunFolder

NUM_ROWS = 8
LARGEST_WEIGHTS_BYTES = 8 << 30


def is_due(config: RunConfig, folder: RunFolder, teacher_folder: str) -> bool:
    """Whether the teacher of this start is to be compared.

    Not a second time in one run folder; and not without held-out rows, with the synthetic engine,
    or with weights that no node may be expected to hold beside its work.
    """
    if config.teacher.engine != "vllm" or not config.evaluation.enabled or folder.exists(PROBE):
        return False
    weights = sum(path.stat().st_size for path in Path(teacher_folder).glob("*.safetensors"))
    return 0 < weights <= LARGEST_WEIGHTS_BYTES


@ray.remote(num_cpus=0)
def probe_teacher(
    folder: RunFolder, config: RunConfig, source: ModelSource, coordinator: Any
) -> None:
    """Write probe.json and let the training begin. RunError where they disagree, with figures."""
    import torch
    from transformers import AutoModelForCausalLM

    from raystill.train.probe import agreement, disagreements
    from raystill.train.row_views import rows_from_table
    from raystill.train.student import num_outcomes

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    ray.get(coordinator.wait_held_out.remote())
    rows = rows_from_table(folder.read_table(HELD_OUT).slice(0, NUM_ROWS).combine_chunks())
    teacher, teacher_folder = config.teacher, source.on_this_node("all")
    model = AutoModelForCausalLM.from_pretrained(
        teacher_folder, dtype="float32", trust_remote_code=teacher.trust_remote_code
    )
    found = agreement(model, rows, num_outcomes(model, teacher_folder))
    dtype = teacher.dtype if teacher.dtype != "auto" else "bfloat16"
    quantised = bool(teacher.quantization or getattr(model.config, "quantization_config", None))
    wrong = disagreements(found, dtype, quantised)
    if wrong:
        raise RunError(
            f"the served teacher and the same model run by Hugging Face disagree on {found.tokens} "
            f"tokens of {len(rows)} held-out answers: {'; '.join(wrong)}; see that teacher.model, "
            "teacher.engine_args and teacher.quantization name what you mean, or go on with "
            "--skip-probe"
        )
    folder.write_text(PROBE, json.dumps(asdict(found), indent=2) + "\n")
    ray.get(coordinator.release_training.remote())
