"""One independent evaluator for every side: held-out KL over the whole vocabulary.

    python -m benchmarks.rivals.judge WORK STUDENT OUTPUT [--snapshots]    (in .venv-rivals)

KL(teacher || student) in nats a token, and how often both have the same most probable token, over
all tokens of the teacher's answers to the held-out prompts (``material.py``). Plain transformers in
float32; neither Raystill nor TRL has a hand in it.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rivals.settings import TEACHER, Folder, Settings, read_json, write_json

BATCH = 8


@torch.no_grad()
def judge(teacher: Any, student: Any, rows: list[dict[str, list[int]]]) -> dict[str, float]:
    """Mean KL and top-1 agreement over all answer tokens.

    The logits at position i predict token i + 1, so an answer that begins at position P is
    predicted from P - 1 on.
    """
    kl, same, tokens = 0.0, 0, 0
    for at in range(0, len(rows), BATCH):
        mine = rows[at : at + BATCH]
        sequences = [row["prompt_ids"] + row["answer_ids"] for row in mine]
        longest = max(map(len, sequences))
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in sequences])
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in sequences])
        ours = student(ids, attention_mask=mask).logits.float()
        theirs = teacher(ids, attention_mask=mask).logits.float()
        for i, row in enumerate(mine):
            span = slice(len(row["prompt_ids"]) - 1, len(sequences[i]) - 1)
            q = torch.log_softmax(ours[i, span], dim=-1)
            p = torch.log_softmax(theirs[i, span], dim=-1)
            kl += (p.exp() * (p - q)).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            tokens += span.stop - span.start
    return {"kl_nats_per_token": kl / tokens, "top1_agreement": same / tokens, "tokens": tokens}


def judge_snapshots(folder: Path, judged_of: Callable[[Path], dict[str, float]]) -> list[Any]:
    """Figures of every snapshot that TRL has left, with the seconds of training until it.

    Those judged earlier are kept in ``curve.json``; judged snapshots but the newest are removed,
    since each is three times a model.
    """
    path = folder / "curve.json"
    curve: list[Any] = read_json(path) if path.exists() else []
    known = {point["step"] for point in curve}
    seconds = read_json(folder / "seconds.json")
    found = {int(one.name.rpartition("-")[2]): one for one in folder.glob("checkpoint-*")}
    for step, snapshot in sorted(found.items()):
        if step not in known:
            figures = judged_of(snapshot)
            curve.append({"step": step, "training_s": seconds[str(step)], **figures})
            write_json(path, curve)
        if step != max(found):
            shutil.rmtree(snapshot)
    return curve


def main() -> None:
    """Judge one student, or all snapshots of one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--snapshots", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(Settings.load(given.work).cores)
    teacher: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    rows = read_json(Folder(given.work).held_out)

    def judged_of(folder: Path) -> dict[str, float]:
        student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        figures = judge(teacher.eval(), student.eval(), rows)
        return {**figures, "parameters": sum(p.numel() for p in student.parameters())}

    if given.snapshots:
        write_json(given.output, {"curve": judge_snapshots(given.student, judged_of)})
    else:
        write_json(given.output, judged_of(given.student))


if __name__ == "__main__":
    main()
