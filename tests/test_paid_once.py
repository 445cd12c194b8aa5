"""What is asked of the teacher over epochs, students and longer lists: only what is new.

The driver as a process each time, on one store; figures are of ``summary.json``. ``teacher.rows``
is what the replicas counted themselves.
"""

from pathlib import Path

import pytest

from raystill.datasets.store import TeacherStore
from tests.end_to_end import RunFiles, drive
from tests.synthetic_run import write_run_file

pytestmark = pytest.mark.ray

NUM_ROWS, MORE, EPOCHS = 24, 8, 3
WITHOUT_MEASURING = ["evaluation.held_out_rows=0", "teacher.synthetic.delay_s=0"]


def asked(place: Path, name: str, *overrides: str) -> tuple[int, int, int, int]:
    """Run; rows asked, reused and trained by the summary, and answered by the teacher's count."""
    run_file = write_run_file(place / name)
    settings = [*WITHOUT_MEASURING, f"store.path={place / 'store'}", *overrides]
    result = drive("run", run_file, *(part for s in settings for part in ("--set", s)))
    assert result.returncode == 0, result.stdout + result.stderr
    told = RunFiles(place / name / "run").json("summary.json")
    names = ("rows_asked", "rows_reused", "rows_trained")
    return *(told[n] for n in names), told["teacher"]["rows"]


def test_only_what_is_new_is_asked(tmp_path: Path) -> None:
    limit = f"prompts.limit={NUM_ROWS}"
    epochs = [f"training.epochs={EPOCHS}", "training.schedule=constant"]
    every = EPOCHS * NUM_ROWS
    first = asked(tmp_path, "three_epochs", limit, *epochs)
    assert first == (NUM_ROWS, every - NUM_ROWS, every, NUM_ROWS)
    # A second student: fewer ids of each token, another objective, and a longer list.
    longer = f"prompts.limit={NUM_ROWS + MORE}"
    objective = "objective={cross_entropy: 1.0}"
    second = asked(tmp_path, "second_student", longer, "signal.top_k=4", objective)
    assert second == (MORE, NUM_ROWS, NUM_ROWS + MORE, MORE)
    catalogue = TeacherStore(str(tmp_path / "store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + MORE, 0)
