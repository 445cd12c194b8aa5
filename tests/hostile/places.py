"""What the folder of a hostile case begins with: a run file, a model, a run, or a store; all sound.

Each is made once a process, and copied for a case with hard links where files are large.
"""

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from raystill.base.run_folder import RunFolder
from raystill.cluster.check.static import check_run_file
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.lineage.graph import Lineage, Model
from raystill.cluster.report import summary
from raystill.config.load import config_text, load_config
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.store import RowCounts, TeacherStore
from tests.hostile.judge import SECRET, inside, sound_place
from tests.support.end_to_end import TEACHER
from tests.support.sound_run import SOUND

EVALUATION = {"step": 0, "kl_nats_per_token": 1.5, "top1_agreement": 0.5, "num_tokens": 9}
ANSWER = {"step": 0, "row": 0, "prompt": "user\n2 + 2?", "teacher": "4", "student": "5"}
METRICS = {"step": 1, "rows": 4, "loss": 1.0}
IDENTITY = "ab" * 32


def model_place(place: Path) -> None:
    """A model's folder, ``student.yaml`` that trains it and ``teacher.yaml`` that asks it."""
    sound_place(place)
    shutil.copytree(TEACHER, place / "model", copy_function=os.link)
    student: dict[str, Any] = SOUND | {"student": {"init": "model", "model": "model"}}
    (place / "student.yaml").write_text(yaml.safe_dump(student))
    teacher = SOUND | {"teacher": SOUND["teacher"] | {"model": "model"}}
    (place / "teacher.yaml").write_text(yaml.safe_dump(teacher))


def run_place(place: Path) -> None:
    """The folder ``run`` of a run of ``sound.yaml`` that has ended, with a student's lineage."""
    sound_place(place)
    (place / "sound.yaml").write_text(yaml.safe_dump(SOUND | {"output": {"path": "run"}}))
    with inside(place):
        folder = RunFolder("run").ensure()
        folder.write_text("config.yaml", config_text(load_config("sound.yaml")))
        folder.write_text("manifest.json", json.dumps({"run_id": "a", "terms": {}}))
        folder.write_text("evaluation.jsonl", json.dumps(EVALUATION) + "\n")
        folder.write_text("answers.jsonl", json.dumps(ANSWER) + "\n")
        folder.write_text("metrics.jsonl", json.dumps(METRICS) + "\n")
        prepared = check_run_file("sound.yaml", ["output.path=elsewhere"]).prepared
        assert prepared is not None
        counts = {"training": RowCounts(), "evaluation": RowCounts()}
        summary.write_summary(folder, summary.RunResult(Snapshot(), prepared, counts))
        models = {"me": Model("me", "student", learned_from=("it",)), "it": Model("it", "teacher")}
        folder.write_text("student/lineage.json", Lineage("me", models).to_json())


def segment(rows: range, teacher: str = "models/teacher") -> tuple[Origin, pa.Table]:
    """Rows of a segment of text answers."""
    signal = Signal("text")
    answers = [Answer(np.array([row % 7 + 3, 2], np.int32), "stop") for row in rows]
    answered = answers_table(answers, signal).drop_columns(["error"])
    columns = dict(zip(answered.column_names, answered.columns, strict=True))
    keys = pa.array([row.to_bytes(16, "big") for row in rows], pa.binary(16))
    prompts = pa.array([[row, 1] for row in rows], pa.list_(pa.int32()))
    origin = Origin(IDENTITY, teacher, "vllm", "1", "float32", 300, signal)
    return origin, pa.table({"key": keys, "prompt_ids": prompts, **columns})


def store_place(place: Path) -> None:
    """A store ``store`` with two segments, beside a run; the second teacher has a hostile name."""
    sound_place(place)
    store = TeacherStore(str(place / "store"))
    for rows, name in ((range(4), "models/teacher"), (range(4, 6), f"a\x1b[2J[/red]{SECRET}")):
        origin, table = segment(rows, name)
        store.publish(origin, Provenance("a", "training"), table)


LATE = ("worth.draft", "commands.submit", "commands.report")
PLACES: dict[str, Callable[[Path], None]] = {
    "run_file": sound_place,
    "model": model_place,
    "run": run_place,
    "store": store_place,
}


class Bases:
    """The bases, made in a folder once each and copied for every case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in LATE:  # Before the first case, whose time is to be its own.
            importlib.import_module(f"raystill.cluster.{name}")

    def fresh(self, base: str) -> Path:
        """A copy of a base; the copy before is gone."""
        made = self._folder / "bases" / base
        if not made.exists():
            made.mkdir(parents=True)
            PLACES[base](made)
        place = self._folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        # Linked: what a case writes replaces the name, and `write` removes it first.
        shutil.copytree(made, place, copy_function=os.link, symlinks=True)
        return place
