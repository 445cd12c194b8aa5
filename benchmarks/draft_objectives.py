"""Which objective makes the better draft model: the same rows and steps, by acceptance length.

    python -m benchmarks.draft_objectives RUN [--seeds 3] [--steps 8] [--set KEY=VALUE ...]
    python -m benchmarks.draft_objectives RUN --from-start --steps 54

RUN is the folder of a finished run whose answers are all in its store, such as the demo's
(``runs/quickstart``). Its finished student, or with ``--from-start`` the one that it began with, is
trained for some steps of its own rows, by forward KL and by ``acceptance`` (and what else
``--objective`` names), by the project's own step: one process, no Ray, no engine. A seed chooses
the rows and their order, the same for all objectives.

Measured before and after: the held-out figures on the run's own (sampled) answers, and on greedy
answers of the teacher, which Hugging Face writes once, what the teacher would accept of k greedily
drafted tokens (``serve/bench/acceptance.py``).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.results import machine, write_result
from benchmarks.starts import CPU, Material, material
from raystill.base.run_folder import RunFolder
from raystill.config.objective import ObjectiveConfig
from raystill.model.sampling import own_stop_ids
from raystill.serve.bench.acceptance import count, walk
from raystill.train.batch.batch import collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.evaluation.teacher_forced import evaluate
from raystill.train.start.shape import recorded_shape
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import place_student

OBJECTIVES = {
    "forward_kl": {"forward_kl": 1.0},
    "acceptance": {"acceptance": 1.0},
    "total_variation": {"total_variation": 1.0},
    "forward_kl + total_variation": {"forward_kl": 0.1, "total_variation": 1.0},
}
LENGTHS = (1, 4, 8)
"""Drafted tokens k for which the mean acceptance length is told."""


@torch.no_grad()
def greedy_rows(given: Material) -> list[Row]:
    """The teacher's greedy answers to the held-out prompts, by Hugging Face in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
    stops = own_stop_ids(Path(given.folder))
    rows = []
    for row in given.held_out:
        ids = torch.from_numpy(row.prompt_ids.astype(np.int64))[None]
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=given.config.teacher.sampling.max_tokens,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
        answer = written[0, ids.shape[1] :].to(torch.int32).numpy()
        rows.append(Row(row.position, row.row, row.prompt_ids, answer))
    return rows


@torch.no_grad()
def lengths(student: StudentModule, rows: list[Row], vocab: int) -> dict[str, float | None]:
    """The mean acceptance length by k, and the share of tokens that the student would draft."""
    matches: list[list[bool]] = []
    for group in cut_micro_batches(rows, 512):
        batch = collate(group, "text", vocab)
        best = torch.cat([z.argmax(dim=1) for _, z in student.logit_chunks(batch)])
        same = (best == batch.targets).tolist()
        for row in group:
            matches.append(same[: row.num_targets])
            same = same[row.num_targets :]
        assert not same, "every target belongs to a row"
    drafted = [match for one in matches for match in one[1:]]
    found: dict[str, float | None] = {"greedy_agreement": float(np.mean(drafted))}
    for k in LENGTHS:
        counted = count([(len(one), walk(one, k)) for one in matches], k)
        found[f"length_{k}"] = counted.mean_length
    return found


def student_of(run: Path, given: Material, from_start: bool) -> Any:
    """The run's finished student in float32, or the one that it began with."""
    if not from_start:
        return AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    known = recorded_shape(RunFolder(str(run)))
    return build_student(given.config, given.folder, 0, known=known)


class Training:
    """A student of the run, trained on: ``model``, which is changed."""

    def __init__(self, given: Material, model: Any, greedy: list[Row]) -> None:
        self.given, self.greedy = given, greedy
        self.module = place_student(model, given.config.training, CPU, 1)
        self.vocab = num_classes(model, given.folder)

    def measure(self) -> dict[str, Any]:
        """All held-out figures."""
        self.module.eval()
        figures = evaluate(
            self.module,
            self.given.held_out,
            tokens_budget=self.given.config.training.tokens_per_micro_batch,
            student_vocab=self.vocab,
            device=CPU,
            ranks=Ranks(),
        )
        kept = ("kl_nats_per_token", "top1_agreement", "acceptance")
        told = {name: figures[name] for name in kept}
        return {**told, **lengths(self.module, self.greedy, self.vocab)}

    def train(self, objective: ObjectiveConfig, seed: int, steps: int) -> float:
        """The last step's loss after ``steps`` steps."""
        training, rows = self.given.config.training, self.given.rows
        batches = BatchMaker(
            training,
            objective,
            signal_kind=self.given.config.signal.kind,
            student_vocab=self.vocab,
            packed=self.module.packed,
            shared=self.module.shared,
        )
        optimizer = build_optimizer(self.module, training)
        order = np.random.default_rng(seed).permutation(len(rows))
        self.module.train()
        step, size = GlobalStep(self.module, optimizer, batches, total_steps=steps), 0.0
        for number in range(steps):
            mine = order[number * training.rows_per_step :][: training.rows_per_step]
            size = step.run(number, [rows[i] for i in mine], number + 1 < steps, False).loss
        return size


def main() -> None:
    """Every objective with every seed; figures to the terminal and to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run whose answers are all stored")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts measured on")
    parser.add_argument("--from-start", action="store_true", help="not the finished student")
    parser.add_argument("--objective", action="append", choices=sorted(OBJECTIVES), default=[])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/draft_objectives.json")
    )
    given = parser.parse_args()
    disable_progress_bar()
    stored = material(given.run, given.set)
    stored = replace(stored, held_out=stored.held_out[: given.prompts])
    greedy = greedy_rows(stored)
    results = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for name in given.objective or ("forward_kl", "acceptance"):
            training = Training(stored, student_of(given.run, stored, given.from_start), greedy)
            before = training.measure() if not results else results[0]["before"]
            began = time.monotonic()
            loss = training.train(ObjectiveConfig(**OBJECTIVES[name]), seed, given.steps)
            seconds = round(time.monotonic() - began, 1)
            told = {"objective": name, "seed": seed, "steps": given.steps, "loss": loss}
            told |= {"seconds": seconds, "before": before, "after": training.measure()}
            print(json.dumps(told), flush=True)
            results.append(told)
    tokens = sum(row.num_targets for row in greedy)
    write_result(
        given.output,
        {"machine": machine(), "settings": given.set, "greedy_tokens": tokens, "results": results},
    )


if __name__ == "__main__":
    main()
