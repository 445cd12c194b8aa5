"""Two models in vLLM in one run: each row its own teacher's; one that is killed holds no other."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
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

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

ENGINE = re.compile(r"EngineCore pid=(\d+)")
ROWS, HELD_OUT = 60, 6  # of each teacher
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


def two_teachers(place: Path) -> Path:
    """A run file: each teacher its own source, an engine each, rows trained as they come."""
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    teacher = config.pop("teacher") | {"target_ongoing_requests": 1, "max_num_seqs": 4}
    teacher["sampling"] |= {"max_tokens": 48}
    models = {"first": TEACHER, "second": perturbed(place / "second")}
    config["teachers"] = {name: teacher | {"model": str(model)} for name, model in models.items()}
    lines = (ROOT / "examples" / "prompts" / "quickstart.jsonl").read_text().splitlines()
    size = ROWS + HELD_OUT
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
    config["stream"] = {"group_rows": 4, "order": "arrival", "max_rows_ahead": 40}
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
    identities: dict[str, str]
    meanwhile: int


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    place = tmp_path_factory.mktemp("two")
    files = RunFiles(place / "run")
    log = place / "run" / "logs" / "teacher-second-0.log"
    with started(two_teachers(place)) as process:
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
    return Ended(place, identities, len(published))


def rows_of(ended: Ended) -> list[dict[str, Any]]:
    """All prompts with their teachers and keys."""
    folder = RunFolder(str(ended.place / "run"))
    tables = [folder.read_table(f"prompts/{name}.parquet") for name in ("train", "held_out")]
    return [row for table in tables for row in table.to_pylist()]


def test_one_teacher_goes_on_while_the_other_is_dead(ended: Ended) -> None:
    assert ended.meanwhile > 0
    summary = RunFiles(ended.place / "run").json("summary.json")
    assert summary["status"] == "completed" and not any(summary["dropped"].values())
    assert summary["rows_trained"] == 2 * ROWS and summary["restarts"] == 0


def test_each_row_is_its_own_teachers_in_store_figures_and_lineage(ended: Ended) -> None:
    rows, identities = rows_of(ended), ended.identities
    assert {(row["source"], row["teacher"]) for row in rows} == {(f"of {n}", n) for n in NAMES}
    asked = {row["key"]: identities[row["teacher"]] for row in rows}
    assert len(asked) == 2 * (ROWS + HELD_OUT) and len(set(identities.values())) == 2
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
    models = {"first": load(TEACHER), "second": load(ended.place / "second")}
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
