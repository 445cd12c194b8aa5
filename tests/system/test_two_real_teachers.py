"""Two models in vLLM in one run: each row its own teacher's; one that is killed holds no other.

Once with the tiny teacher and a copy with other weights, once with SmolLM2-135M-Instruct and a copy
that was tuned for a few steps.
"""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raystill.base.run_folder import RunFolder
from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import (
    ROOT,
    TEACHER,
    RunFiles,
    kept_rows,
    load,
    log_probabilities,
    partition,
)
from tests.support.synthetic_run import started, wait_for

pytestmark = [
    *(pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults),
    pytest.mark.timeout(900),
]

ENGINE = re.compile(r"EngineCore pid=(\d+)")
SMALL = ROOT / "models" / "SmolLM2-135M-Instruct"
HELD_OUT = 6  # of each teacher
SAME, OTHER = 2e-3, 0.05
"""Nats: at most between a stored distribution and its own model's, at least to the other's."""
NAMES = ("first", "second")


def perturbed(folder: Path) -> Path:
    """A copy of the tiny teacher with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(TEACHER, folder)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for values in weights.values():
        if values.dim() == 2:
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
            values += (noise * values.float().std()).to(values.dtype)
    (folder / "model.safetensors").unlink()  # copytree keeps hard links apart, but not their mode.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tuned(folder: Path) -> Path:
    """A copy of SmolLM2-135M-Instruct after a few optimizer steps on one short text."""
    import torch
    from tokenizers import Tokenizer

    shutil.copytree(SMALL, folder)
    (folder / "model.safetensors").unlink()
    text = "Ships sail at night. The harbour sleeps, and every lamp is out." * 3
    ids = torch.tensor([Tokenizer.from_file(str(SMALL / "tokenizer.json")).encode(text).ids])
    model = load(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for _ in range(4):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pair:
    """Two teachers, and how much each is asked. rows: to be trained on, of each."""

    first: Path
    second: Callable[[Path], Path]
    rows: int
    max_tokens: int
    max_rows_ahead: int
    student_layers: tuple[int, ...]


PAIRS = {
    "tiny": Pair(TEACHER, perturbed, 60, 48, 40, (0,)),
    "135M": Pair(SMALL, tuned, 40, 24, 24, (0, 1)),
}


def two_teachers(place: Path, pair: Pair) -> Path:
    """A run file: each teacher its own source, an engine each, rows trained as they come."""
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    teacher = config.pop("teacher") | {"target_ongoing_requests": 1, "max_num_seqs": 4}
    teacher["sampling"] |= {"max_tokens": pair.max_tokens}
    models = {"first": pair.first, "second": pair.second(place / "second")}
    config["teachers"] = {name: teacher | {"model": str(model)} for name, model in models.items()}
    lines = (ROOT / "examples" / "prompts" / "quickstart.jsonl").read_text().splitlines()
    size = pair.rows + HELD_OUT
    for number, name in enumerate(NAMES):
        rows = [json.loads(one) for one in lines[number * size : (number + 1) * size]]
        text = "\n".join(json.dumps({**row, "source": f"of {name}"}) for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    config["prompts"] = {
        "sources": [
            {"name": f"of {name}", "path": str(place / f"{name}.jsonl"), "teacher": name}
            for name in NAMES
        ]
    }
    config["stream"] = {"group_rows": 4, "order": "arrival"}
    config["stream"] |= {"max_rows_ahead": pair.max_rows_ahead}
    config["student"]["layers"] = list(pair.student_layers)
    config["evaluation"] = {"held_out_rows": 2 * HELD_OUT, "top_k": 16, "free_running": {"rows": 2}}
    config["training"] |= {"checkpoint_every_steps": 100}
    config["output"] = {"path": str(place / "run")}
    config["store"] = {"path": str(place / "store")}
    config["cluster"] = {"num_cpus": 4}
    file = place / "two.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@dataclass(frozen=True)
class Ended:
    """The finished run. meanwhile: what the first teacher published until the second was back."""

    place: Path
    pair: Pair
    identities: dict[str, str]
    meanwhile: int


@pytest.fixture(scope="module", params=PAIRS)
def ended(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ended:
    pair = PAIRS[request.param]
    place = tmp_path_factory.mktemp("two")
    files = RunFiles(place / "run")
    log = place / "run" / "logs" / "teacher-second-0.log"
    with started(two_teachers(place, pair)) as process:
        wait_for(process, "the first step", lambda: bool(files.steps()), 300)
        before = len(ENGINE.findall(log.read_text()))
        os.kill(int(ENGINE.findall(log.read_text())[-1]), signal.SIGKILL)
        killed = time.time()

        def is_back() -> bool:
            pids = [ENGINE.findall(p.read_text()) for p in log.parent.glob("teacher-second-*.log")]
            return len({pid for some in pids for pid in some}) > min(before, 1)

        wait_for(process, "the second teacher's next engine", is_back, 200)
        back = time.time()
        output = process.communicate(timeout=300)
        assert process.returncode == 0, output
    manifest = files.json("manifest.json")
    identities = {name: one["identity"] for name, one in manifest["teachers"].items()}
    store = TeacherStore(str(place / "store"))
    published = [
        file
        for file in (place / "store" / "segments").glob("*")
        if killed < file.stat().st_mtime < back
        and store.open(file.name).footer.origin.teacher_identity == identities["first"]
    ]
    return Ended(place, pair, identities, len(published))


def rows_of(ended: Ended) -> list[dict[str, Any]]:
    """All prompts with their teachers and keys."""
    folder = RunFolder(str(ended.place / "run"))
    tables = [folder.read_table(f"prompts/{name}.parquet") for name in ("train", "held_out")]
    return [row for table in tables for row in table.to_pylist()]


def test_one_teacher_goes_on_while_the_other_is_dead(ended: Ended) -> None:
    assert ended.meanwhile > 0
    summary = RunFiles(ended.place / "run").json("summary.json")
    assert summary["status"] == "completed" and not any(summary["dropped"].values())
    assert summary["rows_trained"] == 2 * ended.pair.rows and summary["restarts"] == 0


def test_each_row_is_its_own_teachers_in_store_figures_and_lineage(ended: Ended) -> None:
    rows, identities = rows_of(ended), ended.identities
    assert {(row["source"], row["teacher"]) for row in rows} == {(f"of {n}", n) for n in NAMES}
    asked = {row["key"]: identities[row["teacher"]] for row in rows}
    assert len(asked) == 2 * (ended.pair.rows + HELD_OUT) and len(set(identities.values())) == 2
    store, stored = TeacherStore(str(ended.place / "store")), {}
    for name in store.names():
        segment = store.open(name)
        for group in range(len(segment.footer.groups)):
            for key in segment.read(group, ["key"])["key"].to_pylist():
                assert key not in stored, "an answer was paid twice"
                stored[key] = segment.footer.origin.teacher_identity
    assert stored == asked
    files = RunFiles(ended.place / "run")
    figures, trained = files.json("summary.json")["teachers"], Counter(r["teacher"] for r in rows)
    held_out = RunFolder(str(files.folder)).read_table("prompts/held_out.parquet")["teacher"]
    trained.subtract(held_out.to_pylist())
    for name in NAMES:
        assert figures[f"{name}/rows_accepted"] == trained[name]
        assert figures[f"{name}/rows"] >= trained[name]
    lineage = files.json("student/lineage.json")
    learned = [one["learned_from"] for one in lineage["models"].values() if one["learned_from"]]
    assert [sorted(one) for one in learned] == [sorted(identities.values())]


def test_each_stored_distribution_is_that_of_its_own_model(ended: Ended) -> None:
    folder = RunFolder(str(ended.place / "run"))
    table = folder.read_table("prompts/held_out.parquet").to_pylist()
    teacher_of = {tuple(row["prompt_ids"]): row["teacher"] for row in table}
    models = {"first": load(ended.pair.first), "second": load(ended.place / "second")}
    seen = set()
    for row in kept_rows(ended.place / "run" / "held_out.parquet"):
        name = teacher_of[tuple(row.prompt)]
        gaps = {}
        for other, model in models.items():
            log_q = partition(log_probabilities(model, row), row.ids)
            gaps[other == name] = float(np.abs(log_q - row.log_p)[:, :-1].max())
        assert gaps[True] < SAME and gaps[False] > OTHER, (name, gaps)
        seen.add(name)
    assert seen == set(NAMES)
