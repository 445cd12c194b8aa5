"""A teacher that has answered every row is let go while the student goes on, and can come back."""

import os
from pathlib import Path

import pytest

from raystill.datasets.store.store import SEGMENTS, TeacherStore
from tests.support.end_to_end import RunFiles, children_of, named
from tests.support.synthetic_run import started, wait_for, wait_for_step, write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults]

NUM_ROWS, ROWS_PER_STEP, TOKENS = 64, 4, 512
STEPS_AN_EPOCH = NUM_ROWS // ROWS_PER_STEP
REPLICA = "ray::ServeReplica:teacher"


def test_it_is_let_go_when_all_is_answered_and_comes_back_for_a_damaged_answer(
    tmp_path: Path,
) -> None:
    """The first epoch's answers are all there while most of it is still to be trained."""
    run_file = write_run_file(
        tmp_path,
        teacher={
            "synthetic": {"vocab_size": 49152, "response_tokens": TOKENS, "delay_s": 0.1},
            "sampling": {"max_tokens": TOKENS},
            "max_model_len": 1024,
        },
        prompts={"limit": NUM_ROWS},
        stream={"group_rows": 4, "order": "fixed", "max_rows_ahead": NUM_ROWS},
        training={
            "rows_per_step": ROWS_PER_STEP,
            "epochs": 2,
            "schedule": "constant",
            "checkpoint_every_steps": 0,
        },
        evaluation={"held_out_rows": 0},
    )
    files = RunFiles(tmp_path / "run")
    store = TeacherStore(str(tmp_path / "teacher_store"))
    with started(run_file) as process:

        def replicas() -> list[int]:
            return named(children_of(process.pid), REPLICA)

        wait_for_step(process, files, 1)
        assert replicas()
        wait_for(process, "the teacher's end", lambda: not replicas())
        assert files.steps()[-1] < STEPS_AN_EPOCH, "the student was too fast for this test"
        entry = store.catalogue().entries[0]
        path = Path(store.path) / SEGMENTS / entry.name
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        os.chmod(path, 0o600)
        path.write_bytes(data)
        wait_for(process, "another teacher", lambda: bool(replicas()))
        wait_for(process, "its end", lambda: not replicas())
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    summary = files.json("summary.json")
    assert (summary["rows_trained"], summary["rows_asked"]) == (2 * NUM_ROWS, NUM_ROWS)
    assert summary["teacher"]["rows"] == NUM_ROWS + entry.footer.rows
