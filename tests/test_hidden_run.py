"""A whole run by hidden states: real vLLM, packed rows, the full vocabulary at the worker."""

from pathlib import Path

import pytest

from tests.end_to_end import ROOT, TEACHER, RunFiles, drive

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

NUM_HELD_OUT, NUM_ROWS = 4, 16
NOISE = 1e-4
"""Nats a token: bfloat16 states of the engine against the student's own (measured: 4e-6)."""


def test_a_student_that_is_its_teacher_has_nothing_to_learn_by_hidden_states(
    tmp_path: Path,
) -> None:
    """Any row out of place, in the stream or in the packed sequence, would show in the loss."""
    overrides = {
        "teacher.model": str(TEACHER),
        "student.layers": "[0, 1]",
        "prompts.path": str(ROOT / "examples" / "prompts" / "quickstart.jsonl"),
        "prompts.limit": NUM_HELD_OUT + NUM_ROWS,
        "signal": "{kind: hidden}",
        "objective": "{forward_kl: 0.5, reverse_kl: 0.5, temperature: 2.0}",
        "training.packing": "true",
        "evaluation.held_out_rows": NUM_HELD_OUT,
        "output.path": str(tmp_path / "run"),
        "store.path": str(tmp_path / "store"),
    }
    words = [word for name, value in overrides.items() for word in ("--set", f"{name}={value}")]
    result = drive("run", ROOT / "configs" / "tiny.yaml", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    files = RunFiles(tmp_path / "run")
    summary = files.json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == NUM_ROWS
    first, second = files.lines("metrics.jsonl")
    assert first["rows"] == second["rows"] == NUM_ROWS // 2
    assert 0 <= first["objective/forward_kl"] < NOISE
    assert 0 <= first["objective/reverse_kl"] < NOISE
    assert first["padding_fraction"] == second["padding_fraction"] == 0
    assert "rows packed" in (files.folder / "logs" / "student-0.log").read_text()
    teacher_log = (files.folder / "logs" / "teacher-0.log").read_text()
    assert "run=run role=teacher-0 node=" in teacher_log
