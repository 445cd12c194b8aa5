"""The parts of the comparison, in the order in which they run, and the commands they are.

A part is one process. A side's time for a student is the sum of its parts, imports and loading
included. Sides alternate, so that a machine that becomes slower does so for all.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rivals.settings import (
    PROMPTS,
    TEACHER,
    Folder,
    Settings,
    read_json,
    read_lines,
)

SIDES = ("hf", "vllm", "policy", "raystill", "policy-distill", "policy-raystill")
ON_POLICY = {"policy": "gkd", "policy-distill": "distillation"}
"""Trainers of TRL whose student writes each batch, by side."""
RIVALS_PYTHON = ".venv-rivals/bin/python"
FIRST_WEIGHTS = re.compile(r"^(\S+) weights of step 0:", re.MULTILINE)
"""What the log of a sampler says when it may answer, with the time."""
OWN_SNAPSHOT_STEPS = 18
"""A student of either side is judged every so many steps; the demo has 108."""
OWN_STOP_AFTER_S = 330.0
OWN_TURNS = 3


@dataclass(frozen=True)
class Part:
    """One process. ``figures``: what it leaves for the record, and ``read`` says how it is read.
    ``counts`` says whether its time is part of the side's.
    """

    name: str
    command: list[str]
    side: str = ""
    which: str = ""
    figures: Path | None = None
    counts: bool = True
    read: Callable[[Path], Any] = read_json


def rival(module: str, *words: object) -> list[str]:
    """A script in the rivals' environment."""
    return [RIVALS_PYTHON, "-m", f"benchmarks.rivals.{module}", *map(str, words)]


def raystill(run_file: Path) -> list[str]:
    """A run of this project, by its command line."""
    return [sys.executable, "driver.py", "run", str(run_file)]


def run_file(settings: Settings, folder: Folder, which: int) -> Path:
    """The run file of one of Raystill's students: the job of all sides, nothing held out.

    The first student is taught by a served teacher. The later ones find every answer in the store
    that the first has filled, so the student has all cores.
    """
    kept = read_json(folder.chosen)["kept"][str(settings.layers[which - 1])]
    run = {
        "seed": settings.seed,
        "teacher": {
            "model": TEACHER,
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 32,
            "kv_cache_gib": 2,
            "target_ongoing_requests": 8,
            "sampling": {
                "temperature": settings.temperature,
                "min_p": settings.min_p,
                "max_tokens": settings.max_tokens,
            },
        },
        "student": {"init": "from_teacher", "layers": kept},
        "prompts": {"path": str(folder.train)},
        "signal": {"kind": "topk", "top_k": 64},
        "objective": {"forward_kl": 1.0},
        "stream": {"group_rows": 8, "order": "fixed"},
        "training": {
            "rows_per_step": settings.rows_per_step,
            "learning_rate": settings.learning_rate,
            "warmup_steps": settings.warmup_steps,
            "schedule": "cosine",
            "min_learning_rate_ratio": settings.min_rate_ratio,
            "tokens_per_micro_batch": 1024,
            "checkpoint_every_steps": 0,
            "export_dtype": "float32",
            **({"cpu_cores": "all"} if which > 1 else {}),
        },
        "store": {"path": str(folder.work / "teacher_store")},
        "output": {"path": str(folder.student("raystill", which))},
    }
    return written(folder.work / f"raystill-{which}.yaml", run)


def policy_run_file(settings: Settings, folder: Folder, which: int) -> Path:
    """The run file of a student that writes every row, as TRL's on-policy trainers do.

    Teacher and sampler multiply in the precision that the student and TRL multiply in.
    """
    from raystill.train.student.module import cpu_has_bfloat16  # A second, for this side alone.

    run: dict[str, Any] = yaml.safe_load(run_file(settings, folder, which).read_text())
    precision = "bfloat16" if cpu_has_bfloat16() else "float32"
    run["teacher"]["dtype"] = precision
    run["policy"] = {
        "student_share": 1.0,
        "objective": dict(run["objective"]),
        "sampling": {"temperature": settings.temperature},
        "dtype": precision,
        "kv_cache_gib": 1,
        "max_staleness_steps": 4,
    }
    run["training"].pop("cpu_cores", None)  # No answer is stored before: both halves have work.
    run["store"] = {"path": str(folder.work / f"policy_store_{which}")}
    run["output"] = {"path": str(folder.student("policy-raystill", which))}
    return written(folder.work / f"policy-raystill-{which}.yaml", run)


def loop_of(run: Path) -> dict[str, float]:
    """Response tokens of a run's steps, and the seconds of its loop.

    The loop is from the moment at which all is loaded to the end of the last step. The sampler is
    the last: it logs when its engine has the student's first weights.
    """
    steps = read_lines(run / "metrics.jsonl")
    last = steps[-1]
    loaded = FIRST_WEIGHTS.search((run / "logs" / "sampler-0.log").read_text())
    assert loaded is not None, f"{run}/logs/sampler-0.log does not tell of its first weights"
    began = datetime.fromisoformat(loaded[1]).timestamp()
    return {
        "steps": len(steps),
        "rows": sum(step["rows"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "loop_s": last["time"] - began,
    }


def own_run_file(settings: Settings, folder: Folder) -> Path:
    """The demo's run file, with its own measuring, but for where it reads and writes, and that it
    keeps checkpoints for the evaluator.
    """
    run = demo()
    run["prompts"]["path"] = PROMPTS
    run["store"] = {"path": str(folder.work / "own_store")}
    run["output"] = {"path": str(folder.student("raystill", "own"))}
    run["training"] |= {"checkpoint_every_steps": OWN_SNAPSHOT_STEPS, "num_checkpoints_to_keep": 6}
    return written(folder.work / "raystill-own.yaml", run)


def demo() -> dict[str, Any]:
    """The demo's run file."""
    run: dict[str, Any] = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    return run


def written(path: Path, run: dict[str, object]) -> Path:
    """A run file, stored."""
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def model_of(folder: Folder, side: str, which: str) -> Path:
    """Where a side leaves a trained student."""
    trained = folder.student(side, which)
    return trained / "student" if side.endswith("raystill") else trained


def judge(folder: Folder, side: str, which: str, model: Path) -> Part:
    """Judging a student; outside of every side's time."""
    name = f"{which}-{side}-judge"
    figures = folder.work / "figures" / f"{name}.json"
    command = rival("judge", folder.work, model, figures)
    return Part(name, command, side, which, figures, counts=False)


def mechanics(settings: Settings, folder: Folder) -> Iterator[Part]:
    """Same start, rows and steps: three students by every side.

    ``hf``'s second and third student are left out: from a file of answers it is what ``vllm`` is.
    """
    work = folder.work
    for which in range(1, len(settings.layers) + 1):
        n = str(which)
        yield judge(folder, "start", n, folder.start(str(settings.layers[which - 1])))
        for side in SIDES:
            if side == "hf" and which > 1:
                continue
            if side == "raystill":
                command = raystill(run_file(settings, folder, which))
                yield Part(f"{n}-{side}-run", command, side, n)
            elif side == "policy-raystill":
                command = raystill(policy_run_file(settings, folder, which))
                made = folder.student(side, n)
                yield Part(f"{n}-{side}-run", command, side, n, made, read=loop_of)
            elif side in ON_POLICY:
                command = rival("train_trl", work, side, n, "--on-policy", ON_POLICY[side])
                figures = folder.student(side, n) / "loop.json"
                yield Part(f"{n}-{side}-train", command, side, n, figures)
            else:
                if which == 1:
                    figures = work / "figures" / "vllm-sample.json" if side == "vllm" else None
                    sample = rival(f"sample_{side}", work)
                    yield Part(f"{n}-{side}-sample", sample, side, n, figures)
                yield Part(f"{n}-{side}-train", rival("train_trl", work, side, n), side, n)
            yield judge(folder, side, n, model_of(folder, side, n))


def own_means(settings: Settings, folder: Folder) -> Iterator[Part]:
    """Each with its own means, to the same held-out KL.

    Raystill is its shipped demo. TRL has as many of the same prompts, answered by vLLM, and as many
    epochs of them; a start of evenly spaced layers (it has no means to choose them), and the
    learning rate of all sides, which serves it better than its default of 2e-5. It trains in turns.
    The evaluator judges students of both on their way.
    """
    work, start = folder.work, folder.start("even")
    yield judge(folder, "trl-even", "own", start)
    yield Part("own-raystill-run", raystill(own_run_file(settings, folder)), "raystill", "own")
    command = [sys.executable, "-m", "benchmarks.rivals.checkpoints", str(work)]
    yield Part("own-raystill-checkpoints", command, "raystill", "own", counts=False)
    yield curve(folder, "own-raystill-curve", "raystill", folder.student("raystill-own", "curve"))
    yield judge(folder, "raystill", "own", model_of(folder, "raystill", "own"))
    run = demo()
    sample = rival("sample_vllm", work, "--demo", run["prompts"]["limit"])
    yield Part("own-trl-sample", sample, "trl", "own", work / "figures" / "own-sample.json")
    options = ["--start", "even", "--answers", "own", "--epochs", run["training"]["epochs"]]
    options += ["--every", OWN_SNAPSHOT_STEPS, "--stop-after", OWN_STOP_AFTER_S]
    for turn in range(1, OWN_TURNS + 1):
        command = rival("train_trl", work, "trl", "own", *options)
        yield Part(f"own-trl-train-{turn}", command, "trl", "own")
        yield curve(folder, f"own-trl-judge-{turn}", "trl", folder.student("trl", "own"))


def curve(folder: Folder, name: str, side: str, students: Path) -> Part:
    """Judging the students that a side has left on its way."""
    figures = folder.work / "figures" / f"{name}.json"
    command = rival("judge", folder.work, students, figures, "--snapshots")
    return Part(name, command, side, "own", figures, counts=False)


def environment(settings: Settings) -> dict[str, str]:
    """What every part sees: no network, one thread for each core."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_DISABLED": "true",
        "PYTHONPATH": os.getcwd(),
    }
