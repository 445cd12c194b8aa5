"""Rows of a checked run that are stored, that the teacher scores, and that it answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raystill.cluster.check.prepared import Prepared
from raystill.cluster.check.static import check_run_file
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance, segment_schema
from raystill.datasets.store.store import TeacherStore

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
WITH_RESPONSES = {"prompts": {"response_field": "answer"}}
TEXT = {"signal": {"kind": "text"}, "objective": {"cross_entropy": 1.0}}
HELD_OUT_K = 6


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    rows = [{"prompt": f"number {i}", "answer": f"{i}"} for i in range(12)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))


def prepared(*changes: dict[str, dict[str, Any]]) -> Prepared:
    """A run of 8 rows and 4 held out, with a synthetic teacher."""
    settings: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(MODEL), "engine": "synthetic"},
        "student": {"layers": [0]},
        "prompts": {"path": "p.jsonl", "chat_template": False},
        "signal": {"top_k": 8},
        "training": {"rows_per_step": 4},
        "stream": {"group_rows": 2},
        "evaluation": {"held_out_rows": 4, "top_k": HELD_OUT_K},
        "store": {"path": "store"},
    }
    for change in changes:
        for section, values in change.items():
            settings[section] = {**settings.get(section, {}), **values}
    Path("run.yaml").write_text(json.dumps(settings))
    checked = check_run_file("run.yaml")
    assert checked.problems == []
    assert checked.prepared is not None
    return checked.prepared


def publish(run: Prepared, table: pa.Table, signal: Signal) -> None:
    """Empty answers to those rows."""
    filled = {"key": table["key"], "finish_reason": pa.array(["stop"] * len(table))}
    schema = segment_schema(signal)
    columns = [
        filled[field.name] if field.name in filled else pa.array([[]] * len(table), field.type)
        for field in schema
    ]
    rows = pa.table(columns, schema=schema)
    origin = Origin(run.teacher_identity, "t", "synthetic", "1", "float64", 100, signal)
    TeacherStore(run.store_path).publish(origin, Provenance("another", "training"), rows)


def counts(run: Prepared) -> tuple[int, int, int, bool]:
    stored = run.stored
    return stored.train_rows, stored.held_out_rows, stored.to_score, stored.covers_all


def test_a_poorer_answer_is_counted_as_one_to_score_and_needs_the_teacher() -> None:
    run = prepared()
    assert counts(run) == (0, 0, 0, False)
    publish(run, run.train, Signal("text"))
    publish(run, run.held_out, Signal("topk", HELD_OUT_K))
    run = prepared()
    assert counts(run) == (0, 4, 8, False)
    assert (
        "has 0 of 8 rows to train on, 4 of 4 held out; 8 answers are to be scored"
        in run.describe_stored()
    )
    assert counts(prepared(TEXT)) == (8, 4, 0, True)
    publish(run, run.train.slice(0, 6), Signal("topk", 9))
    publish(run, run.train.slice(6), Signal("hidden", 7))
    assert counts(prepared()) == (6, 4, 2, False)
    publish(run, run.train.slice(6), Signal("topk", 8))
    run = prepared()
    assert counts(run) == (8, 4, 0, True)
    assert "score" not in run.describe_stored()


def test_given_responses_need_the_teacher_for_a_signal_only() -> None:
    assert counts(prepared(WITH_RESPONSES)) == (0, 0, 12, False)
    # The held-out rows are measured against the teacher's probabilities all the same.
    assert counts(prepared(WITH_RESPONSES, TEXT)) == (0, 0, 4, False)
    run = prepared(WITH_RESPONSES, TEXT, {"evaluation": {"held_out_rows": 0}})
    assert counts(run) == (0, 0, 0, True)
    assert run.describe_stored().endswith("0 of 0 held out; 12 came with their response")
    run = prepared(WITH_RESPONSES)
    publish(run, run.train, Signal("topk", 8))
    assert counts(prepared(WITH_RESPONSES)) == (8, 0, 4, False)
