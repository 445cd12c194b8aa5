"""Loss curves of a student with its residual stream in float32 and in bfloat16, on a CPU.

    python -m benchmarks.residual [STEPS] [LAYERS]

SmolLM2-135M-Instruct (models/), or as many of its layers, evenly, is trained with cross entropy on
the text of docs/decisions.md, four rows of 96 tokens a step, from the same weights: in float32 by
one process, under autocast by one, and sharded over two processes (gloo) with either stream.
Printed: the loss of each step, and the largest difference from float32, as a share of the loss.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.rows import Row
from raystill.train.start.cut import keep_layers
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.step import GlobalStep
from raystill.train.student.module import parallel_module
from raystill.train.student.sharding import place_student
from tests.support.workers import run_workers

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "models" / "SmolLM2-135M-Instruct")
ROWS, TOKENS, CPU = 4, 96, torch.device("cpu")
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "float32": (1, {"compute_dtype": "float32"}),
    "autocast": (1, {"compute_dtype": "bfloat16"}),
    "fsdp, float32 stream": (
        2,
        {"compute_dtype": "bfloat16", "strategy": "fsdp", "residual_dtype": "float32"},
    ),
    "fsdp": (2, {"compute_dtype": "bfloat16", "strategy": "fsdp"}),
}


def arguments() -> list[int]:
    """STEPS and LAYERS; 0 layers: all."""
    given = [int(one) for one in sys.argv[1:]]
    return [*given, *(10, 0)[len(given) :]]


def rows_of(step: int) -> list[Row]:
    """The rows of a step: consecutive pieces of a text."""
    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    ids = np.array(tokenizer.encode((ROOT / "docs" / "decisions.md").read_text()).ids, np.int32)
    pieces = [ids[(step * ROWS + i) * TOKENS :][:TOKENS] for i in range(ROWS)]
    return [Row(step * ROWS + i, 0, piece[:1], piece[1:]) for i, piece in enumerate(pieces)]


def losses(case: str, steps: int, layers: int, rank: int = 0) -> list[float]:
    """The loss of each step."""
    workers, settings = CASES[case]
    training = TrainingConfig(
        learning_rate=1e-4, tokens_per_micro_batch=2 * TOKENS, num_workers=workers, **settings
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    number = model.config.num_hidden_layers
    if layers:
        keep_layers(model, [i * number // layers for i in range(layers)])
    student = place_student(model, training, CPU, workers)
    objective = ObjectiveConfig(cross_entropy=1.0)
    batches = BatchMaker(training, objective, signal_kind="text", student_vocab=student.vocab_size)
    module = parallel_module(student, CPU, workers, compiled=False)
    step = GlobalStep(
        module,
        build_optimizer(student, training),
        batches,
        total_steps=steps,
        world_size=workers,
    )
    found = []
    for number in range(steps):
        mine = rows_of(number)[rank::workers]
        found.append(step.run(number, mine, has_more=True, stop=False).loss or 0.0)
    return found


def worker_main(rank: int, folder: Path) -> dict[str, Any]:
    """The cases with two processes; the folder holds what to do."""
    steps, layers = map(int, (folder / "what").read_text().split())
    return {
        case: losses(case, steps, layers, rank)
        for case, (workers, _) in CASES.items()
        if workers == 2
    }


def main() -> None:
    """Train all, and print the curves."""
    steps, layers = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "what").write_text(f"{steps} {layers}")
        found = run_workers(worker_main, Path(scratch), time_out_s=1800.0)[0]
    found = {c: losses(c, steps, layers) for c, (n, _) in CASES.items() if n == 1} | found
    exact = np.array(found["float32"])
    for case, curve in found.items():
        apart = np.abs(np.array(curve) / exact - 1).max()
        print(f"{case:22s} {' '.join(f'{loss:.4f}' for loss in curve)}  apart {apart:.2e}")


if __name__ == "__main__":
    main()
