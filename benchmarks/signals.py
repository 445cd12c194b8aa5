"""How good a student each signal makes: the same rows and steps, held-out full-vocabulary KL.

    python -m benchmarks.signals [--seeds 3] [--steps 24] [--output PATH] [--plot docs/signals.svg]

The quickstart's teacher answers its training prompts once, with its hidden states. From these
follow, for the very same tokens, all signals that are compared: ``topk`` K = 8 and 64 with their
tails, ``topk`` 8 renormalised (below) and ``hidden``. Then the quickstart's student is trained with
each of them, by the project's own step: forward KL, the quickstart's learning rate and rows a step,
one process, no Ray. A seed chooses which of the rows are trained and in which order, the same for
all signals; the student's first weights are always the teacher's.

Measured on held-out answers: KL(teacher || student) over the whole vocabulary, against the teacher
run by Hugging Face in float32, so that no signal's own rounding or cut is in the yardstick.

**Renormalised**, for this comparison only, is what several public systems do: both sides are
divided by their mass on the teacher's K ids, and KL is taken between the two. What the student
believes outside the K ids then has no part in the loss at all.
"""

import argparse
import asyncio
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.results import machine, write_result
from benchmarks.signals_table import plot, summarise, table
from raystill.cluster.check.static import check_run_file
from raystill.config.objective import ObjectiveConfig
from raystill.config.run import RunConfig
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.vllm import VllmEngine
from raystill.train.batch.batch import MicroBatch, collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.calibration.positions import truncate
from raystill.train.loss import divergence
from raystill.train.loss.head_loss import head_loss
from raystill.train.loss.objective import ObjectiveSums, WeightedTerms
from raystill.train.loss.teacher_head import TeacherHead, read_teacher_head
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule

RUN_FILE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
LAYERS = [*range(3), *range(4, 12), *range(18, 25), *range(26, 30)]
"""Those that the quickstart keeps."""
SMALL, LARGE = 8, 64
RENORMALISED = f"topk {SMALL}, renormalised"
SIGNALS = {f"topk {SMALL}": SMALL, f"topk {LARGE}": LARGE, RENORMALISED: SMALL, "hidden": None}
"""K of each; None: the hidden states themselves."""
FORWARD_KL = ObjectiveConfig(forward_kl=1.0)
GROUP_ROWS = 8


class Renormalised(WeightedTerms):
    """KL(p' || q'), p' and q' the teacher and the student given that the token is one of the K."""

    def __init__(self, micro_batch: MicroBatch) -> None:
        super().__init__(FORWARD_KL, micro_batch)
        assert micro_batch.partition is not None
        self.partition = micro_batch.partition

    def differentiate(self, z: Tensor, rows: slice) -> Tensor:
        """As `head_loss.ChunkObjective`: outside the K ids the gradient is 0."""
        ids = self.partition.ids[rows]
        log_p = torch.log_softmax(self.partition.log_p[rows, :-1], dim=1)
        log_q = torch.log_softmax(z.gather(1, ids), dim=1)
        value, grad = divergence.forward_kl(log_p, log_q, log_q.exp())
        z.zero_().scatter_(1, ids, grad * self.token_weights[rows, None])
        zero = torch.zeros_like(value)
        return torch.stack([value, zero, zero, zero], dim=1)


class RenormalisedStudent(StudentModule):
    """A student that is trained that way."""

    def forward(
        self, batch: MicroBatch, objective: ObjectiveConfig, teacher: TeacherHead | None = None
    ) -> ObjectiveSums:
        """The sums over the micro-batch's tokens; ``objective`` is forward KL."""
        return head_loss(self.hidden_states(batch), self.head(), Renormalised(batch))


@dataclass(frozen=True)
class Experiment:
    """What all trainings share. ``tokens``: most tokens of an answer; ``steps``: of a training."""

    config: RunConfig
    folder: str
    steps: int
    rows: list[Row]
    held_out: list[Row]
    vocab: int
    head: TeacherHead


async def answer(
    config: RunConfig, folder: str, prompts: list[np.ndarray], cores: list[int]
) -> list[Row]:
    """The teacher's answers to all prompts, with its hidden states, from an engine of its own."""
    sampling = resolve_sampling(config.teacher, folder)
    seed = config.section_seeds()["engine"]
    engine = VllmEngine(EngineSettings(config.teacher, folder, sampling, seed, 1, tuple(cores)))
    await engine.start()
    try:
        groups = [prompts[i : i + GROUP_ROWS] for i in range(0, len(prompts), GROUP_ROWS)]
        signal = Signal("hidden", engine.hidden_size)
        calls = (engine.sample(group, signal) for group in groups)
        answers = [a for group in await asyncio.gather(*calls) for a in group]
    finally:
        engine.close()
    return [
        Row(
            number,
            number,
            prompt,
            said.response_ids,
            said.finish_reason,
            said.sampled_logprobs,
            hidden=said.hidden,
        )
        for number, (prompt, said) in enumerate(zip(prompts, answers, strict=True))
        if said.error is None
    ]


def with_topk(row: Row, head: TeacherHead, size: int) -> Row:
    """The row with a ``topk`` signal in place of its hidden states."""
    hidden = torch.from_numpy(row.hidden.copy()).view(torch.bfloat16)
    drawn = torch.from_numpy(row.response_ids).long()
    signal = truncate(head, hidden, drawn, [size]).topk[size]
    return replace(
        row,
        hidden=None,
        topk_ids=signal.ids.int().numpy(),
        topk_logprobs=signal.logprobs.numpy(),
        tail_logprob=signal.tail.numpy(),
    )


class Yardstick:
    """Figures of a student on the held-out answers, against the teacher as Hugging Face runs it."""

    def __init__(self, experiment: Experiment) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(experiment.folder, dtype=torch.float32)
        budget = experiment.config.training.tokens_per_micro_batch
        groups = cut_micro_batches(experiment.held_out, budget)
        teacher = StudentModule(model)
        self.head = teacher.head()
        self.batches = [collate(group, "hidden", experiment.vocab) for group in groups]
        with torch.no_grad():  # float32 [N, D]: what the teacher's own head is given.
            self.states = [teacher.hidden_states(batch) for batch in self.batches]
        self.tokens = sum(batch.num_tokens for batch in self.batches)

    @torch.no_grad()
    def measure(self, student: StudentModule) -> dict[str, float]:
        """Means over tokens; ``outside``: the student's mass outside the teacher's 8 best ids."""
        student.eval()
        sums = dict.fromkeys(("kl", "acceptance", "top1", "outside"), 0.0)
        for batch, states in zip(self.batches, self.states, strict=True):
            for rows, z in student.logit_chunks(batch):
                log_q, q = torch.log_softmax(z, dim=1), torch.softmax(z, dim=1)
                (_, t), *more = self.head.logit_chunks(states[rows])
                assert not more, "both heads have as many rows, so one chunk holds them"
                log_p = torch.log_softmax(t, dim=1)
                best = log_p.topk(SMALL, dim=1).indices
                sums["kl"] += divergence.forward_kl(log_p, log_q, q)[0].double().sum().item()
                sums["acceptance"] += torch.minimum(log_p, log_q).exp_().double().sum().item()
                sums["top1"] += (log_q.argmax(dim=1) == best[:, 0]).sum().item()
                sums["outside"] += (1 - q.gather(1, best).sum(dim=1)).sum().item()
        student.train()
        return {name: value / self.tokens for name, value in sums.items()}


def train(
    experiment: Experiment, yardstick: Yardstick, name: str, seed: int, look_every: int
) -> dict[str, Any]:
    """One training: its figures at some steps, and the seconds its steps took."""
    size, config = SIGNALS[name], experiment.config
    model = build_student(config, experiment.folder, config.section_seeds()["student"])
    student = (RenormalisedStudent if name == RENORMALISED else StudentModule)(model)
    student.train()
    batches = BatchMaker(
        config.training,
        FORWARD_KL,
        signal_kind="hidden" if size is None else "topk",
        student_vocab=experiment.vocab,
        teacher=experiment.head if size is None else None,
    )
    optimizer = build_optimizer(student, config.training)
    step = GlobalStep(student, optimizer, batches, total_steps=experiment.steps)
    per_step = config.training.rows_per_step
    order = np.random.default_rng(seed).permutation(len(experiment.rows))
    curve, seconds = [], 0.0
    for number in range(experiment.steps):
        rows = [experiment.rows[i] for i in order[number * per_step : (number + 1) * per_step]]
        if size is not None:
            rows = [with_topk(row, experiment.head, size) for row in rows]
        result = step.run(number, rows, has_more=True, stop=False)
        seconds += result.student_s
        if (number + 1) % look_every == 0 or number + 1 == experiment.steps:
            curve.append({"step": number + 1, "loss": result.loss, **yardstick.measure(student)})
    told = {"signal": name, "seed": seed, "steps_s": seconds, "curve": curve}
    print(f"{name:<22} seed {seed}  KL {curve[-1]['kl']:.4f}  {seconds:.0f} s", flush=True)
    return told


def prepare(arguments: argparse.Namespace) -> Experiment:
    """Answer the prompts, and read the teacher's head."""
    overrides = [
        f"teacher.sampling.max_tokens={arguments.tokens}",
        "output.path=/tmp/none",
        f"student.layers={LAYERS}",  # Which a run would choose; no signal should have a say in it.
        "student.refit=false",
    ]
    checked = check_run_file(str(RUN_FILE), overrides)
    config, prepared = checked.config, checked.prepared
    assert config is not None and prepared is not None, checked.problems
    needed = arguments.steps * config.training.rows_per_step
    count = max(needed, round(needed * arguments.spare))
    tables = prepared.tables
    train_ids, held_ids = (
        [np.array(ids, np.int32) for ids in table["prompt_ids"].to_pylist()]
        for table in (tables.train, tables.held_out.slice(0, arguments.held_out))
    )
    assert count <= len(train_ids), f"{count} rows wanted, {len(train_ids)} prompts to train on"
    chosen = np.random.default_rng(0).permutation(len(train_ids))[:count]
    prompts = [train_ids[i] for i in chosen] + held_ids
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    prepare_process(cores)
    started = time.perf_counter()
    rows = asyncio.run(answer(config, prepared.teacher_folder, prompts, cores))
    print(f"{len(rows)} rows answered in {time.perf_counter() - started:.0f} s", flush=True)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    model = build_student(config, prepared.teacher_folder, 0)
    vocab = num_classes(model, prepared.teacher_folder)
    head = read_teacher_head(prepared.teacher_folder, vocab, engine_dtype="float32")
    trained, held_out = ([r for r in rows if (r.row < count) == kind] for kind in (True, False))
    folder = prepared.teacher_folder
    return Experiment(config, folder, arguments.steps, trained, held_out, vocab, head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--held-out", type=int, default=32, help="held-out rows")
    parser.add_argument("--spare", type=float, default=1.25, help="rows answered, of those trained")
    parser.add_argument("--looks", type=int, default=3, help="times the student is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/signals.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/signals.svg"))
    arguments = parser.parse_args()
    experiment = prepare(arguments)
    yardstick = Yardstick(experiment)
    config, paths = experiment.config, ("output", "plot")
    settings = {name: value for name, value in vars(arguments).items() if name not in paths}
    first = build_student(config, experiment.folder, config.section_seeds()["student"])
    before, runs = yardstick.measure(StudentModule(first)), []
    print(f"before training: KL {before['kl']:.3f} on {yardstick.tokens} held-out tokens")
    for seed in range(arguments.seeds):
        for name in SIGNALS:
            every = max(1, arguments.steps // arguments.looks)
            runs.append(train(experiment, yardstick, name, seed, every))
        summary = summarise(runs)
        sizes = {
            "rows_answered": len(experiment.rows),
            "response_tokens": sum(row.num_targets for row in experiment.rows),
            "held_out_tokens": yardstick.tokens,
        }
        found = {"sizes": sizes, "before": before, "summary": summary, "runs": runs}
        write_result(arguments.output, {"machine": machine(), "settings": settings, **found})
    print(table(summary))
    plot(runs, before, arguments.plot)


if __name__ == "__main__":
    main()
