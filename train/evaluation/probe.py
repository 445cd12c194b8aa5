"""The probe of a run: do the served teacher and the plain model say the same of the same tokens?

Some answered held-out rows are given to the teacher as Hugging Face runs it. A server that
renormalises, shifts by a token, loads other weights or scales its head differently shows here,
within the first steps, and not in a student that learns badly.

Where it sits: the driver asks whether it is due and starts the task when the teacher is up, so that
the plain model is loaded while the held-out prompts are answered. It gives way to the processes
that the first step needs. *Waits for* these answers. *Unblocks* the first checkpoint
(``release_saving``).
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pyarrow.compute as pc
import ray

from raystill.base.errors import RunError
from raystill.base.run_folder import HELD_OUT, HELD_OUT_PROMPTS, PROBE, named_file
from raystill.datasets.rows.schema import TEACHER
from raystill.run import Run

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
    if run.folder.exists(named_file(PROBE, run.teacher_name)):
        return False
    weights = sum(path.stat().st_size for path in Path(run.teacher.folder).glob("*.safetensors"))
    return 0 < weights <= LARGEST_WEIGHTS_BYTES


@ray.remote(num_cpus=0, max_calls=1)  # A process of its own, which ends with its memory.
def probe_teacher(run: Run) -> None:
    """Write probe.json and let the student be saved. RunError where they disagree, with figures."""
    # By the kernel's weights a thirteenth of a processor that a worker of Ray wants too: these
    # have a niceness of 15, beside which the greatest there is would get three tenths.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    import torch  # Here, since the driver imports this module and needs no model.
    from transformers import AutoModelForCausalLM

    from raystill.train.batch.rows import rows_from_table
    from raystill.train.evaluation.agreement import agreement, disagreements
    from raystill.train.evaluation.free_running import teacher_prompts
    from raystill.train.student.build import num_classes

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    teacher, teacher_folder = run.config.teacher, run.teacher.on_this_node("all")
    model = AutoModelForCausalLM.from_pretrained(
        teacher_folder,
        dtype="float32",
        trust_remote_code=teacher.trust_remote_code,
        use_safetensors=True,
    )
    ray.get(run.coordinator.wait_held_out.remote())
    table = run.folder.read_table(HELD_OUT)
    if run.teacher_name:
        prompts = run.folder.read_table(HELD_OUT_PROMPTS)
        mine = prompts["row"].filter(pc.equal(prompts[TEACHER], run.teacher_name))
        table = table.filter(pc.is_in(table["row"], value_set=mine))
    rows = rows_from_table(table.slice(0, NUM_ROWS).combine_chunks())
    if not rows:  # None of them is this teacher's to answer.
        ray.get(run.coordinator.release_saving.remote())
        return
    prompt_of = teacher_prompts(run)
    for row in rows:
        row.prompt_ids = prompt_of(row)
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
    file = named_file(PROBE, run.teacher_name)
    run.folder.write_text(file, json.dumps(asdict(agreed), indent=2) + "\n")
    ray.get(run.coordinator.release_saving.remote())
