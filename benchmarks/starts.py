"""What a student's start is worth: before and after the same training, from stored answers.

    python -m benchmarks.starts RUN [--seeds 3] [--start NAME ...] [--set KEY=VALUE ...]

RUN is the folder of a run whose answers are all in its store, such as the demo's
(``runs/quickstart``): its prompts, answers, held-out rows, steps and learning rate are used. For
each start and seed a student is made from the teacher, measured on the held-out rows, trained for
one epoch by the project's own step (one process, no Ray, no teacher), and measured again. A seed
chooses the order of the rows, and the rows by which layers and widths are judged.

The starts have about as many parameters: 22 of the demo's 30 layers, or all of them with fewer
feed-forward neurons.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.results import machine, write_result
from raystill.base.run_folder import HELD_OUT, TRAIN_PROMPTS, RunFolder
from raystill.config.load import load_config
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import stored_columns
from raystill.datasets.rows.signal import signal_of
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.plan import epoch_order, num_steps
from raystill.model.sampling import resolve_sampling
from raystill.train.batch.rows import Row, rows_from_table
from raystill.train.evaluation.free_running import FreeRunning, run_free
from raystill.train.evaluation.measure import text_of
from raystill.train.evaluation.teacher_forced import evaluate
from raystill.train.start.shape import NUM_JUDGED, Shape, choose_shape
from raystill.train.start.texts import Texts
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule
from raystill.train.worker.shape import ANSWER_TOKENS, REFIT_PROMPTS, REFIT_TOKENS, float32_on_cpu

STARTS: dict[str, dict[str, Any]] = {
    "even": {"layers": {"keep": 22, "by": "even"}},
    "influence": {"layers": {"keep": 22, "by": "influence"}},
    "importance": {"layers": {"keep": 22, "by": "importance"}},
    "width": {"ffn_size": 990},
    "refitted": {"layers": {"keep": 22, "by": "influence"}, "refit": True},
    "refitted width": {"ffn_size": 990, "refit": True},
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Material:
    """What all trainings share. ``rows``: the stored training rows, by their number."""

    config: RunConfig
    folder: str
    rows: list[Row]
    held_out: list[Row]


def material(run: Path, overrides: list[str]) -> Material:
    """The answers of a finished run, read from its store."""
    config = load_config(run / "config.yaml", overrides)
    folder = RunFolder(str(run))
    prompts = folder.read_table(TRAIN_PROMPTS)
    store = TeacherStore(config.store.path or str(run.parent / "teacher_store"))
    catalogue = store.catalogue()
    found = catalogue.locate(prompts["key"].combine_chunks())
    kept = np.flatnonzero(found >= 0)
    names = stored_columns(signal_of(config.signal, {}))
    answers = store.read(catalogue, found[kept], ["prompt_ids", *names])
    numbers = prompts["row"].take(pa.array(kept))
    answers = answers.append_column("position", numbers).append_column("row", numbers)
    held_out = rows_from_table(folder.read_table(HELD_OUT).combine_chunks())
    return Material(config, config.teacher.model, rows_from_table(answers), held_out)


class Training:
    """One student, from its start to its figures after training."""

    def __init__(self, given: Material, start: dict[str, Any], seed: int) -> None:
        raw = given.config.model_dump(mode="json")
        raw["student"] = {"init": "from_teacher", **start}
        raw["seed"] = given.config.seed + seed
        self.config = RunConfig.model_validate(raw)
        self.given = given
        seeds = self.config.section_seeds()
        self.order_seed, self.judge_seed = seeds["order"], seeds["student"]
        self.chosen: dict[str, Any] = {}
        model = build_student(self.config, given.folder, seeds["student"], self.choose)
        self.module = StudentModule(model)
        self.vocab = num_classes(model, given.folder)

    def choose(self, model: nn.Module) -> Shape:
        """What a run would keep, judged on a few of the stored answers."""
        rows = self.given.rows
        count, tokens = NUM_JUDGED, ANSWER_TOKENS
        if self.config.student.refit:
            count, tokens = REFIT_PROMPTS, REFIT_TOKENS
        some = np.random.default_rng(self.judge_seed).permutation(len(rows))[:count]
        texts = Texts.of(
            [rows[i].prompt_ids for i in some],
            [rows[i].response_ids[:tokens] for i in some],
        )
        with float32_on_cpu(model, CPU):
            chosen = choose_shape(self.config.student, model, texts)
        self.chosen = {"layers": chosen.shape.layers}
        if chosen.layers is not None:
            self.chosen["kl_on_judged"] = chosen.layers.kl
        return chosen.shape

    def measure(self) -> dict[str, Any]:
        """Teacher-forced figures on the held-out rows."""
        figures = evaluate(
            self.module,
            self.given.held_out,
            tokens_budget=self.config.training.tokens_per_micro_batch,
            student_vocab=self.vocab,
            device=CPU,
            ranks=Ranks(),
        )
        return {name: figures[name] for name in ("kl_nats_per_token", "top1_agreement")}

    def train(self) -> None:
        """All epochs over the rows, in the order of a run with this seed."""
        training, rows = self.config.training, self.given.rows
        signal = self.config.signal.kind
        batches = BatchMaker(
            training, self.config.objective, signal_kind=signal, student_vocab=self.vocab
        )
        optimizer = build_optimizer(self.module, training)
        steps = num_steps(len(rows), training.rows_per_step)
        total = steps * training.epochs
        self.module.train()
        step = GlobalStep(self.module, optimizer, batches, total_steps=total)
        for number in range(total):
            epoch, i = divmod(number, steps)
            order = epoch_order(len(rows), self.order_seed, epoch, self.config.stream.group_rows)
            mine = order[i * training.rows_per_step :][: training.rows_per_step]
            step.run(number, [rows[j] for j in mine], number + 1 < total, False)

    def repeated(self) -> dict[str, Any]:
        """Share of repeated 4-grams in what student and teacher write freely."""
        evaluation = self.config.evaluation.free_running
        settings = FreeRunning(
            rows=evaluation.rows,
            max_tokens=self.config.teacher.sampling.max_tokens,
            sampling=resolve_sampling(self.config.teacher, self.given.folder),
            seed=self.config.section_seeds()["evaluation"],
        )
        model: Any = self.module.model
        figures, pairs = run_free(model, self.given.held_out, settings, CPU, Ranks())
        text = text_of(self.given.folder)
        example = text(pairs[0][1]) if pairs else ""
        return {**figures, "example": example}


def run_one(given: Material, name: str, start: dict[str, Any], seed: int) -> dict[str, Any]:
    """One start with one seed: its figures before and after."""
    began = time.monotonic()
    training = Training(given, start, seed)
    chosen_s = time.monotonic() - began
    before = training.measure()
    began = time.monotonic()
    training.train()
    trained_s = time.monotonic() - began
    result = {
        "start": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in training.module.model.parameters()),
        "start_s": round(chosen_s, 1),
        "training_s": round(trained_s, 1),
        "before": before,
        "after": training.measure(),
        "free": training.repeated(),
        **training.chosen,
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Every start with every seed; figures to the terminal and to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run whose answers are all stored")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--start", action="append", choices=sorted(STARTS), default=[])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/starts.json"))
    given = parser.parse_args()
    disable_progress_bar()
    stored = material(given.run, given.set)
    results = [
        run_one(stored, name, STARTS[name], seed)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for name in given.start or STARTS
    ]
    settings = {"rows": len(stored.rows), "held_out": len(stored.held_out), "set": given.set}
    write_result(given.output, {"machine": machine(), **settings, "results": results})


if __name__ == "__main__":
    main()
