"""Does a student without the system prompt answer as the teacher with it? A format that is checked.

    python -m benchmarks.context_distillation [--model FOLDER] [--rows 32] [--held-out 16]

The teacher reads a system message and four examples, by which it answers in JSON, as
``{"answer": "..."}``; its student, the same model with all layers, reads the question alone
(``prompts.teacher_messages_field``). Questions are those of the quickstart. Counted on held-out
questions, before and after: answers that begin in the format, and answers that are whole JSON
objects with that one key; and the same of the teacher, with and without its context.

One process, no Ray, no engine: Hugging Face writes and scores the teacher's answers; prompts, rows,
losses and the step are those of a run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.on_policy import with_signal
from benchmarks.results import machine, write_result
from raystill.config.run import RunConfig
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.model.sampling import resolve_sampling
from raystill.train.batch.rows import Row
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.evaluation.measure import text_of
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.step import GlobalStep
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule

CPU = torch.device("cpu")
QUESTIONS = Path("examples/prompts/quickstart.jsonl")
BEGINNING = '{"answer": "'
EXAMPLES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Give me an idea for dinner.", "Bake salmon with lemon, rice and green beans."),
    ("How do plants make food?", "They turn light, water and air into sugar."),
    ("Which is faster, a train or a bicycle?", "A train is much faster than a bicycle."),
)
SYSTEM = 'Answer with one line of JSON: {"answer": "..."}. Use at most ten words.'
CONTEXT = [{"role": "system", "content": SYSTEM}] + [
    {"role": role, "content": content}
    for question, answer in EXAMPLES
    for role, content in (("user", question), ("assistant", json.dumps({"answer": answer})))
]


def run_config(path: Path, given: argparse.Namespace) -> RunConfig:
    """A run of the questions in ``path``, each with the teacher's chat."""
    return RunConfig.model_validate(
        {
            "seed": given.seed,
            "teacher": {
                "model": str(given.model),
                "dtype": "float32",
                "sampling": {"temperature": 0, "max_tokens": given.max_tokens},
            },
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"path": str(path), "teacher_messages_field": "for_teacher"},
            "signal": {"kind": "topk", "top_k": 64},
            "objective": {"forward_kl": 1.0},
            "training": {
                "rows_per_step": 4,
                "epochs": given.epochs,
                "learning_rate": given.learning_rate,
                "warmup_steps": 2,
                "tokens_per_micro_batch": 512,
            },
            "evaluation": {"held_out_rows": given.held_out},
        }
    )


def write_questions(path: Path, count: int, seed: int) -> None:
    """``count`` of the quickstart's questions, each with what the teacher reads."""
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    lines = []
    for i in chosen:
        question = rows[i]["prompt"]
        chat = [*CONTEXT, {"role": "user", "content": question}]
        lines.append(json.dumps({"prompt": question, "for_teacher": chat}))
    path.write_text("\n".join(lines))


def formatted(texts: Sequence[str]) -> dict[str, float]:
    """Shares of the answers that begin in the format, and that are whole."""

    def whole(text: str) -> bool:
        try:
            said = json.loads(text)
        except ValueError:
            return False
        return isinstance(said, dict) and list(said) == ["answer"]

    begun = [text.startswith(BEGINNING) for text in texts]
    return {"begun": float(np.mean(begun)), "whole": float(np.mean([whole(t) for t in texts]))}


class Writer:
    """Greedy answers, as token ids and in words."""

    def __init__(self, config: RunConfig, folder: str) -> None:
        sampling = resolve_sampling(config.teacher, folder)
        self._settings = FreeRunning(0, sampling.max_tokens, sampling, seed=0)
        self.text: Callable[[list[int]], str] = text_of(folder)

    def answers(self, model: Any, prompts: Sequence[np.ndarray]) -> list[list[int]]:
        """One answer to each prompt."""
        return generate(model, prompts, self._settings, CPU)

    def rate(self, model: Any, prompts: Sequence[np.ndarray]) -> dict[str, Any]:
        """`formatted` of the answers, and one of them."""
        texts = [self.text(answer) for answer in self.answers(model, prompts)]
        return {**formatted(texts), "example": texts[0]}


def prompts_of(tables: PromptTables, name: str, column: str) -> list[np.ndarray]:
    """One column of prompts, int32 [P] each."""
    return [np.array(ids, np.int32) for ids in getattr(tables, name)[column].to_pylist()]


def rows_to_train(
    tables: PromptTables, teacher: StudentModule, writer: Writer, vocab: int
) -> list[Row]:
    """The teacher's answers with its signal after its own prompts, as rows of the student's."""
    asked = prompts_of(tables, "train", "prompt_ids")
    answers = writer.answers(teacher.model, asked)
    rows = [
        Row(i, i, prompt, np.array(answer, np.int32), "stop")
        for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    with torch.no_grad():
        with_signal(teacher, rows, 64, vocab)
    for row, own in zip(rows, prompts_of(tables, "train", "student_prompt_ids"), strict=True):
        row.prompt_ids = own
    return rows


def train(config: RunConfig, student: StudentModule, rows: Sequence[Row], vocab: int) -> None:
    """All epochs, in the rows' order."""
    training = config.training
    batches = BatchMaker(training, config.objective, signal_kind="topk", student_vocab=vocab)
    per_epoch = len(rows) // training.rows_per_step
    total = per_epoch * training.epochs
    optimizer = build_optimizer(student, training)
    student.train()
    step = GlobalStep(student, optimizer, batches, total_steps=total)
    for number in range(total):
        first = number % per_epoch * training.rows_per_step
        batch = list(rows[first : first + training.rows_per_step])
        loss = step.run(number, batch, number + 1 < total, False).loss
        print(f"step {number + 1}/{total}  loss {loss:.3f}", flush=True)
    student.eval()


def main() -> None:
    """Train one student; its rate of the format before and after, beside the teacher's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-tokens", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/context_distillation.json")
    )
    given = parser.parse_args()
    disable_progress_bar()
    folder = str(given.model)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "questions.jsonl"
        write_questions(path, given.rows + given.held_out, given.seed)
        config = run_config(path, given)
        tables = build_prompt_tables(config, PromptTokeniser(folder, config.prompts), 1024)
    teacher = StudentModule(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    teacher.eval()
    writer, vocab = Writer(config, folder), num_classes(teacher.model, folder)
    own = prompts_of(tables, "held_out", "student_prompt_ids")
    rates = {
        "teacher": writer.rate(teacher.model, prompts_of(tables, "held_out", "prompt_ids")),
        "before": writer.rate(teacher.model, own),  # All layers: the student begins as the teacher.
    }
    print(json.dumps(rates), flush=True)
    rows = rows_to_train(tables, teacher, writer, vocab)
    student = StudentModule(build_student(config, folder, given.seed))
    began = time.monotonic()
    train(config, student, rows, vocab)
    seconds = round(time.monotonic() - began, 1)
    rates["after"] = writer.rate(student.model, own)
    for name in ("begun", "whole"):
        shown = "  ".join(f"{who} {rates[who][name]:.2f}" for who in ("before", "after", "teacher"))
        print(f"answers in the format, {name}: {shown}")
    sizes = {"rows": len(rows), "held_out": len(own), "epochs": given.epochs}
    write_result(
        given.output, {"machine": machine(), **sizes, "training_s": seconds, "format": rates}
    )


if __name__ == "__main__":
    main()
