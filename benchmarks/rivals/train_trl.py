"""A student by TRL, from answers in a file or from what the student writes.

    python -m benchmarks.rivals.train_trl WORK SIDE WHICH [--start NAME]
        [--on-policy gkd|distillation] [--epochs N --every STEPS --stop-after SECONDS]
        (in .venv-rivals)

Off-policy rows are given as token ids with their mask, so that TRL trains on the very tokens that
the teacher wrote. Its loss with ``beta=0`` is forward KL over the whole vocabulary; optimizer and
schedule are those of every side. Matrix products are in bfloat16, TRL's default, where the CPU has
instructions for it, as Raystill's are, else in float32. Gradient checkpointing, on by default, is
off, since it is slower.

``--on-policy`` names the trainer whose student writes each batch: ``GKDTrainer`` with ``lmbda=1``,
or ``DistillationTrainer``, which has no other way. Both write by Hugging Face's ``generate``, since
vLLM beside them is for GPUs, and leave ``loop.json``: tokens and seconds of the loop.

With ``--every`` the trainer stores itself every so many steps, and ``--stop-after`` ends the
process after a store once so many seconds have passed; the same command goes on from there.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.rivals.settings import (
    TEACHER,
    Folder,
    Settings,
    read_json,
    read_lines,
    write_json,
)
from datasets import Dataset  # noqa: TID251 - Hugging Face's is meant.


class Clock(TrainerCallback):
    """Notes the seconds of each step, over all processes, and stops after so many."""

    def __init__(self, path: Path, stop_after_s: float | None) -> None:
        self.path, self.stop_after_s = path, stop_after_s
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}
        self.began = time.monotonic()
        self.before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on counting from the step that was restored."""
        self.before = self.seconds.get(str(state.global_step), 0.0)
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step; ask for the end at a step that is stored."""
        here = time.monotonic() - self.began
        self.seconds[str(state.global_step)] = self.before + here
        write_json(self.path, self.seconds)
        if self.stop_after_s and here > self.stop_after_s:
            control.should_save = control.should_training_stop = True


class Counted:
    """Counts the response tokens that are trained on; before the trainer, among its bases."""

    tokens = 0

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        """The trainer's own loss."""
        labels = inputs.get("labels")
        trained = inputs["completion_mask"] if labels is None else labels != -100
        self.tokens += int(trained.sum())
        return super().compute_loss(model, inputs, *rest, **more)  # type: ignore[misc]


class CountedGkd(Counted, GKDTrainer):
    """GKD that counts."""


class CountedDistillation(Counted, DistillationTrainer):
    """The on-policy trainer that counts."""


def rows_of(given: argparse.Namespace, folder: Folder, tokenizer: Any) -> Dataset:
    """Rows for TRL's collator: exact token ids, or prompts for the student to answer."""
    if given.on_policy == "distillation":
        prompts = [row["prompt"] for row in read_lines(folder.train)]
        return Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts])
    if given.on_policy:
        turn = {"role": "assistant", "content": "-"}  # Never trained on; the collator wants one.
        prompts = [row["prompt"] for row in read_lines(folder.train)]
        return Dataset.from_list(
            [{"messages": [{"role": "user", "content": prompt}, turn]} for prompt in prompts]
        )
    return Dataset.from_list(
        [
            {
                "prompt": tokenizer.decode(row["prompt_ids"]),
                "input_ids": row["prompt_ids"] + row["answer_ids"],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"]),
            }
            for row in read_lines(folder.answers(given.answers or given.side))
        ]
    )


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; as ``raystill.train.student.module`` asks."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def config_of(
    given: argparse.Namespace, settings: Settings, out: Path
) -> GKDConfig | DistillationConfig:
    """TRL's settings for the job."""
    shared = {
        "output_dir": str(out),
        "beta": given.beta,
        "temperature": settings.temperature,
        "per_device_train_batch_size": settings.rows_per_step,
        "num_train_epochs": given.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_rate_ratio},
        "warmup_steps": settings.warmup_steps,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "seed": settings.seed,
        "bf16": cpu_has_bfloat16(),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps" if given.every else "no",
        "save_steps": given.every or 500,
    }
    if given.on_policy == "distillation":
        return DistillationConfig(max_completion_length=settings.max_tokens, **shared)
    lmbda = 1.0 if given.on_policy else 0.0
    return GKDConfig(lmbda=lmbda, max_new_tokens=settings.max_tokens, max_length=512, **shared)


def main() -> None:
    """Train one student and store it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("side")
    parser.add_argument("which")
    parser.add_argument("--start")
    parser.add_argument("--answers")
    parser.add_argument("--on-policy", choices=("gkd", "distillation"))
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--every", type=int)
    parser.add_argument("--stop-after", type=float)
    given = parser.parse_args()
    settings, folder = Settings.load(given.work), Folder(given.work)
    torch.set_num_threads(settings.cores)
    out = folder.student(given.side, given.which)
    start = folder.start(given.start or str(settings.layers[int(given.which) - 1]))
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    clock = Clock(out / "seconds.json", given.stop_after)
    kind = CountedDistillation if given.on_policy == "distillation" else CountedGkd
    trainer = kind(
        model=model,
        teacher_model=teacher,
        args=config_of(given, settings, out),
        train_dataset=rows_of(given, folder, tokenizer),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
    if not given.every:
        trainer.save_model(str(out))
        steps = trainer.state.global_step
        loop = {"steps": steps, "rows": steps * settings.rows_per_step, "tokens": trainer.tokens}
        write_json(out / "loop.json", {**loop, "loop_s": clock.seconds[str(steps)]})


if __name__ == "__main__":
    main()
