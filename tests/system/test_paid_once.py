"""What is asked of the teacher over epochs, signals, students and longer lists: only what is new.

The driver as a process each time, on one store; figures are of ``summary.json``. ``teacher.rows``
is what the replicas counted themselves.
"""

import asyncio
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import TRAIN_PROMPTS, RunFolder
from raystill.config.load import load_config
from raystill.datasets.rows.answers import answers_table, derive_answers, stored_columns
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.synthetic import SyntheticEngine
from tests.support.end_to_end import RunFiles, drive
from tests.support.synthetic_run import write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults]  # It takes minutes.

NUM_ROWS, MORE, EPOCHS = 24, 8, 3
TOPK = Signal("topk", 8)
WITHOUT_MEASURING = ["evaluation.held_out_rows=0", "teacher.synthetic.delay_s=0"]
COUNTS = ("rows_asked", "rows_scored", "rows_reused", "rows_trained")


def told(place: Path, name: str, *overrides: str) -> tuple[int, int, int, int, int]:
    """Run; COUNTS by the summary, and rows answered or scored by the teacher's count."""
    run_file = write_run_file(place / name)
    settings = [*WITHOUT_MEASURING, f"store.path={place / 'store'}", *overrides]
    result = drive("run", run_file, *(part for s in settings for part in ("--set", s)))
    assert result.returncode == 0, result.stdout + result.stderr
    summary = RunFiles(place / name / "run").json("summary.json")
    return *(summary[n] for n in COUNTS), summary["teacher"]["rows"]


def asked(place: Path, name: str) -> pa.Table:
    """The run's training prompts."""
    return RunFolder(str(place / name / "run")).read_table(TRAIN_PROMPTS)


def as_if_asked(place: Path, name: str) -> pa.Table:
    """What the run's teacher says when it is asked the run's prompts for ``TOPK``."""
    teacher = load_config(place / name / "synthetic.yaml").teacher
    engine = SyntheticEngine(
        teacher.synthetic.model_copy(update={"delay_s": 0.0}),
        resolve_sampling(teacher, teacher.model),
        teacher.max_model_len,
    )
    prompts = [np.array(ids, np.int32) for ids in asked(place, name)["prompt_ids"].to_pylist()]
    answers = asyncio.run(engine.sample(prompts, TOPK))
    return answers_table(answers, TOPK)


def test_only_what_is_new_is_asked(tmp_path: Path) -> None:
    limit = f"prompts.limit={NUM_ROWS}"
    epochs = [f"training.epochs={EPOCHS}", "training.schedule=constant"]
    text = ["signal.kind=text", "objective={cross_entropy: 1.0}"]
    every = EPOCHS * NUM_ROWS
    first = told(tmp_path, "three_epochs", limit, *epochs, *text)
    assert first == (NUM_ROWS, 0, every - NUM_ROWS, every, NUM_ROWS)
    # A richer signal and a longer list: what was said is scored, what was not is asked.
    longer = f"prompts.limit={NUM_ROWS + MORE}"
    second = told(tmp_path, "richer", longer)
    assert second == (MORE, NUM_ROWS, 0, NUM_ROWS + MORE, NUM_ROWS + MORE)
    store = TeacherStore(str(tmp_path / "store"))
    catalogue = store.catalogue().ordered_for(TOPK)
    assert (catalogue.rows, catalogue.duplicates) == (2 * NUM_ROWS + MORE, NUM_ROWS)
    where = catalogue.locate(asked(tmp_path, "richer")["key"].combine_chunks())
    found = derive_answers(store.read(catalogue, where, stored_columns(TOPK)), TOPK, TOPK, 49152)
    assert found.equals(as_if_asked(tmp_path, "richer"))
    # A second student: fewer ids of each token, another objective. Nobody needs the teacher.
    fewer = ["signal.top_k=4", "objective={reverse_kl: 1.0}"]
    third = told(tmp_path, "second_student", longer, *fewer)
    assert third == (0, 0, NUM_ROWS + MORE, NUM_ROWS + MORE, 0)
