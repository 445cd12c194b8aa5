"""Whether rows that the student writes make a better student: four shares of them, several seeds.

    python -m benchmarks.on_policy RUN [--seeds 0 1 2] [--arms off mixed ramp pure] [--steps 35]
    python -m benchmarks.on_policy RUN --student RUN/student --arms off pure reverse ...

RUN is the folder of a finished run whose answers are all in its store, such as the demo's
(``runs/quickstart``): its prompts, teacher answers, held-out rows, and the weights that its student
began with are used. All arms have the same steps, the same prompts in each step, and the same
limit of tokens a response; a row that the student writes costs the teacher one prefill instead of
one answer, so its response tokens are counted for every arm. Arms:

    off     the teacher writes every row
    mixed   the student's share rises from 0 to a half in the first third of the steps
    ramp    its share rises from 0 to 1 over all steps
    pure    the student writes every row
    reverse as pure, with reverse KL alone on them

With ``--student`` all arms begin with these weights, such as those that the run has trained: what
is compared is then what to do after all of the teacher's answers were learned from.

One process, no Ray, no engine: Hugging Face writes the student's rows, for one or more steps at
once (``--written-at-once``: as old as a run's may be), and scores them with the teacher; choice of
rows, objectives, losses and the step are those of a run. Measured before and after, on the same
held-out prompts: both KLs on what the student itself writes, over the whole vocabulary; repeated
4-grams, stop rate and length of it; and KL on the teacher's text. Each finished run is one JSON
file in the output folder and is not run again; a table is printed at the end, and by ``--table``
alone.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.results import machine, write_result
from benchmarks.starts import CPU, Material, material
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.policy.plan import PolicyPlan
from raystill.datasets.stream.plan import epoch_order
from raystill.model.sampling import ResolvedSampling, resolve_sampling
from raystill.train.batch.batch import collate, cut_micro_batches
from raystill.train.batch.rows import Row
from raystill.train.evaluation.free_running import FreeRunning, generate, repeated_ngrams
from raystill.train.evaluation.teacher_forced import evaluate
from raystill.train.start.shape import Shape, recorded_shape
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule

ARMS = ("off", "mixed", "ramp", "pure", "reverse")
FIGURES = {
    "reverse_kl": "KL(student || teacher), own writing",
    "forward_kl": "KL(teacher || student), own writing",
    "repeated_4grams": "repeated 4-grams",
    "stop_rate": "stop rate",
    "mean_tokens": "tokens an answer",
    "held_out_kl": "KL(teacher || student), teacher's text",
}


def share_of(arm: str, steps: int) -> float | dict[str, float]:
    """``policy.student_share`` of an arm."""
    ramps = {
        "mixed": {"from": 0.0, "to": 0.5, "over_steps": max(1, steps // 3)},
        "ramp": {"from": 0.0, "to": 1.0, "over_steps": max(1, steps - 1)},
    }
    return ramps.get(arm, 0.0 if arm == "off" else 1.0)


def policy_of(arm: str, steps: int) -> dict[str, Any]:
    """The section ``policy`` of an arm."""
    policy: dict[str, Any] = {"student_share": share_of(arm, steps)}
    return policy | ({"objective": {"reverse_kl": 1.0}} if arm == "reverse" else {})


@dataclass(frozen=True)
class Setting:
    """What all runs share: the run's material, the teacher, the student's start, and sizes.

    student: the run file's section. shape: what the student keeps of the teacher, or None.
    written_at_once: steps whose rows the student writes with the same weights.
    """

    given: Material
    teacher: StudentModule
    student: dict[str, Any]
    shape: Shape | None
    steps: int
    prompts: int
    written_at_once: int


def with_signal(teacher: StudentModule, rows: Sequence[Row], top_k: int, vocab: int) -> None:
    """Give rows the teacher's ``topk`` signal, as a teacher that scores them does."""
    for group in cut_micro_batches(rows, 1024):
        parts = []
        for _, z in teacher.logit_chunks(collate(group, "text", vocab)):
            log_p = torch.log_softmax(z.float(), dim=1)
            top = log_p.topk(top_k, dim=1)
            rest = log_p.double().exp().scatter(1, top.indices, 0.0).sum(dim=1)
            parts.append((top.indices.int(), top.values, rest.log().float()))
        ids, logprobs, tail = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        start = 0
        for row in group:
            tokens = slice(start, start + row.num_targets)
            row.topk_ids, row.topk_logprobs = ids[tokens], logprobs[tokens]
            row.tail_logprob = tail[tokens]
            start = tokens.stop


@torch.no_grad()
def divergences(
    student: StudentModule, teacher: StudentModule, rows: Sequence[Row], vocab: int
) -> Iterator[tuple[Row, Tensor, Tensor]]:
    """Each row with KL(teacher || student) and its reverse at its tokens, [T] nats each, exact."""
    for group in cut_micro_batches(rows, 1024):
        batch = collate(group, "text", vocab)
        found = []
        both = zip(student.logit_chunks(batch), teacher.logit_chunks(batch), strict=True)
        for (own, z), (others, y) in both:
            assert own == others, "heads of one size are cut into the same chunks"
            log_q, log_p = torch.log_softmax(z.float(), 1), torch.log_softmax(y.float(), 1)
            forward = (log_p.exp() * (log_p - log_q)).sum(dim=1)
            found.append(torch.stack([forward, (log_q.exp() * (log_q - log_p)).sum(dim=1)]))
        start, values = 0, torch.cat(found, dim=1)
        for row in group:
            yield row, *values[:, start : start + row.num_targets]
            start += row.num_targets


class Training:
    """One student of one arm and seed, from the common start."""

    def __init__(self, shared: Setting, arm: str, seed: int) -> None:
        raw = shared.given.config.model_dump(mode="json")
        raw["student"] = shared.student
        raw["seed"] = shared.given.config.seed + seed
        raw["policy"] = policy_of(arm, shared.steps)
        self.config = RunConfig.model_validate(raw)
        self.shared, self.seed = shared, seed
        model = build_student(self.config, shared.given.folder, 0, known=shared.shape)
        self.module = StudentModule(model)
        self.vocab = num_classes(model, shared.given.folder)
        self.own_tokens = self.teacher_tokens = self.own_rows = 0
        self.writing_s = self.scoring_s = 0.0

    def write(self, rows: Sequence[Row], sampling: ResolvedSampling, seed: int) -> list[list[int]]:
        """The student's responses, as its weights are now."""
        longest = self.config.policy.max_tokens or self.config.teacher.sampling.max_tokens
        settings = FreeRunning(rows=0, max_tokens=longest, sampling=sampling, seed=seed)
        model: Any = self.module.model
        return generate(model, [row.prompt_ids for row in rows], settings, CPU)

    def own(self, rows: Sequence[Row], step: int) -> list[Row]:
        """Rows with the student's response in place of the teacher's, scored by the teacher."""
        began = time.monotonic()
        sampling = resolve_sampling(self.config.teacher, self.shared.given.folder)
        drawn = self.config.policy.sampling.model_dump()
        sampling = replace(sampling, min_p=0.0, **drawn)
        texts = self.write(rows, sampling, seed=1000 * self.seed + step)
        self.writing_s += time.monotonic() - began
        mine = [
            Row(row.position, row.row, row.prompt_ids, np.array(text, np.int32))
            for row, text in zip(rows, texts, strict=True)
        ]
        for row in mine:
            row.policy_version = step
            ended = row.response_ids[-1] in sampling.stop_token_ids
            row.finish_reason = "stop" if ended else "length"
        began = time.monotonic()
        with torch.no_grad():
            with_signal(self.shared.teacher, mine, self.config.signal.top_k, self.vocab)
        self.scoring_s += time.monotonic() - began
        self.own_rows += len(mine)
        self.own_tokens += sum(len(row.response_ids) for row in mine)
        return mine

    def rows_of(self, first: int, last: int) -> list[list[Row]]:
        """The rows of steps ``first`` to ``last``, those of the student written with the weights of
        ``first``; which these are is a run's own choice.
        """
        rows, size = self.shared.given.rows, self.config.training.rows_per_step
        order = epoch_order(
            len(rows), self.config.section_seeds()["order"], 0, self.config.stream.group_rows
        )
        positions = np.arange(first * size, last * size)
        plan = PolicyPlan.of(self.config, len(rows), "benchmark")
        by_student = plan.by_student(0, positions) if plan else positions < 0
        chosen = [rows[int(order[position])] for position in positions]
        mine = [row for row, own in zip(chosen, by_student, strict=True) if own]
        written = iter(self.own(mine, first) if mine else [])
        found = [next(written) if own else row for row, own in zip(chosen, by_student, strict=True)]
        return [found[start : start + size] for start in range(0, len(found), size)]

    def train(self) -> None:
        """All steps, by a run's own step."""
        training, steps = self.config.training, self.shared.steps
        enabled = self.config.policy.enabled
        batches = BatchMaker(
            training,
            self.config.objective,
            signal_kind=self.config.signal.kind,
            student_vocab=self.vocab,
            student_written=self.config.policy.objective if enabled else None,
        )
        optimizer = build_optimizer(self.module, training)
        step = GlobalStep(self.module, optimizer, batches, total_steps=steps)
        self.module.train()
        for first in range(0, steps, self.shared.written_at_once):
            last = min(steps, first + self.shared.written_at_once)
            for number, batch in enumerate(self.rows_of(first, last), first):
                self.teacher_tokens += sum(len(row.response_ids) for row in batch)
                loss = step.run(number, batch, number + 1 < steps, False).loss
                own = sum(row.student_written for row in batch)
                print(f"  step {number + 1}/{steps}  loss {loss:.3f}  own {own}", flush=True)

    def measure(self) -> dict[str, float]:
        """All figures on the held-out prompts; the same prompts and drawing for every student."""
        held_out = self.shared.given.held_out
        asked = held_out[:: max(1, len(held_out) // self.shared.prompts)][: self.shared.prompts]
        sampling = resolve_sampling(self.config.teacher, self.shared.given.folder)
        self.module.eval()
        texts = self.write(asked, sampling, seed=self.seed)
        mine = [
            Row(row.position, row.row, row.prompt_ids, np.array(text, np.int32))
            for row, text in zip(asked, texts, strict=True)
        ]
        found: dict[str, float] = {}
        values = list(divergences(self.module, self.shared.teacher, mine, self.vocab))
        for index, name in ((1, "forward_kl"), (2, "reverse_kl")):
            tokens = [value[index] for value in values]
            found[name] = torch.cat(tokens).mean().item()
            found[f"{name}/first_32"] = torch.cat([v[:32] for v in tokens]).mean().item()
        repeated, ngrams = np.sum([repeated_ngrams(text) for text in texts], axis=0)
        stops = sum(text[-1] in sampling.stop_token_ids for text in texts)
        figures = evaluate(
            self.module,
            asked,
            tokens_budget=1024,
            student_vocab=self.vocab,
            device=CPU,
            ranks=Ranks(),
        )
        return {
            **found,
            "repeated_4grams": float(repeated / max(1, ngrams)),
            "stop_rate": stops / len(texts),
            "mean_tokens": float(np.mean([len(text) for text in texts])),
            "teachers_mean_tokens": float(np.mean([len(row.response_ids) for row in asked])),
            "held_out_kl": figures["kl_nats_per_token"],
        }


def run_one(
    shared: Setting, arm: str, seed: int, known: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """One arm with one seed: its figures before and after.

    known: results by seed, whose figures before training are those of all arms.
    """
    training = Training(shared, arm, seed)
    kept = known.get(seed)
    before = kept["before"] if kept else training.measure()
    print(f"{arm} seed {seed} before {json.dumps(before)}", flush=True)
    began = time.monotonic()
    training.train()
    seconds = time.monotonic() - began
    result = {
        "arm": arm,
        "seed": seed,
        "steps": shared.steps,
        "prompts": shared.prompts,
        "steps_written_at_once": shared.written_at_once,
        "student_share": share_of(arm, shared.steps),
        "rows": shared.steps * training.config.training.rows_per_step,
        "student_written_rows": training.own_rows,
        "student_tokens_written": training.own_tokens,
        "teacher_tokens": training.teacher_tokens,
        "training_s": round(seconds, 1),
        "writing_s": round(training.writing_s, 1),
        "scoring_s": round(training.scoring_s, 1),
        "before": before,
        "after": training.measure(),
    }
    print(f"{arm} seed {seed} after {json.dumps(result['after'])}", flush=True)
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds of each arm, with the smallest and the largest; Markdown."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda one: (ARMS.index(one["arm"]), one["seed"])):
        by_arm[result["arm"]].append(result)
    if not by_arm:
        return "nothing has finished yet"
    before = list({result["seed"]: result["before"] for result in results}.values())
    columns = {"before": before}
    columns |= {arm: [one["after"] for one in found] for arm, found in by_arm.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, title in FIGURES.items():
        cells = []
        for found in columns.values():
            values = [one[name] for one in found]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        escaped = title.replace("|", "\\|")
        lines.append(f"| {escaped} | " + " | ".join(cells) + " |")
    tokens = [
        f"{np.mean([one['teacher_tokens'] for one in found]):,.0f}" for found in by_arm.values()
    ]
    lines.append("| teacher tokens | - | " + " | ".join(tokens) + " |")
    seeds = ", ".join(f"{arm}: {[one['seed'] for one in found]}" for arm, found in by_arm.items())
    return "\n".join([*lines, "", f"seeds that ran: {seeds}"])


def read_results(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The finished runs of an output folder with this number of steps."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in files if result["steps"] == steps]


def main() -> None:
    """Every seed with every arm; finished ones are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run whose answers are all stored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:4]))
    parser.add_argument("--student", type=Path, help="folder of the weights to begin with")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts measured on")
    parser.add_argument(
        "--written-at-once", type=int, default=1, help="steps whose rows are written at once"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/on_policy_benchmark"))
    parser.add_argument("--table", action="store_true", help="print what has finished, and end")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/on_policy.json"))
    given = parser.parse_args()
    disable_progress_bar()
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.table:
        stored = material(given.run, given.set)
        teacher = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32)
        student, shape = {"init": "model", "model": str(given.student)}, None
        if given.student is None:
            student = stored.config.student.model_dump(mode="json")
            shape = recorded_shape(RunFolder(str(given.run)))
        teacher.config.use_cache = False
        sizes = (given.steps, given.prompts, given.written_at_once)
        shared = Setting(stored, StudentModule(teacher).eval(), student, shape, *sizes)
        for seed in given.seeds:
            for arm in given.arms:
                path = given.folder / f"{arm}-{seed}-{given.steps}.json"
                if not path.exists():
                    known = {one["seed"]: one for one in read_results(given.folder, given.steps)}
                    result = run_one(shared, arm, seed, known)
                    partial = path.with_suffix(".tmp")
                    partial.write_text(json.dumps(result, indent=2))
                    partial.rename(path)
    results = read_results(given.folder, given.steps)
    print(table(results))
    write_result(given.output, {"machine": machine(), "set": given.set, "results": results})


if __name__ == "__main__":
    main()
