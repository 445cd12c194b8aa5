"""A run on real vLLM whose teacher reads a system message that its student does not.

Half the rows are written by the student. Who has read what is seen by the logprobs: those in the
store are a plain model's after the long prompt, and the student's figures one's after the short.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from raystill.cluster.check.static import check_run_file
from raystill.config.run import RunConfig
from raystill.datasets.store.store import TeacherStore
from raystill.train.student.build import build_student
from tests.support.end_to_end import (
    TEACHER,
    KeptRow,
    RunFiles,
    divergence,
    greedy,
    kept_rows,
    load,
    log_probabilities,
    partition,
)
from tests.support.on_policy import NUM_HELD_OUT, finish, write_run_file

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(1800)]

SYSTEM = "Answer in capital letters only, and end each line with the word over."
NUM_ROWS = 16
SAME, OTHER = 1e-3, 0.02
"""Nats: at most off a plain model with the same prompt, at least off it with the other."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def distilled(place: Path) -> RunFiles:
    prompts = {"limit": NUM_ROWS + NUM_HELD_OUT, "teacher_system": SYSTEM}
    changes = {"policy": {"sampling": {"temperature": 0.0}}, "prompts": prompts}
    run_file = write_run_file(place, training={"export_dtype": "float32"}, **changes)
    finish(run_file)
    return RunFiles(place / "run")


@pytest.fixture(scope="module")
def prompts(distilled: RunFiles) -> dict[bytes, dict[str, Any]]:
    """The prompts to train on, by the keys of their answers."""
    rows = pq.read_table(distilled.folder / "prompts" / "train.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def test_the_run_ends_with_all_rows_trained(distilled: RunFiles) -> None:
    lines = distilled.lines("metrics.jsonl")
    assert sum(line["rows"] for line in lines) == NUM_ROWS
    assert 0 < sum(line.get("student_written_rows", 0) for line in lines) < NUM_ROWS


def test_the_teachers_prompt_alone_has_the_system_message(
    prompts: dict[bytes, dict[str, Any]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for row in prompts.values():
        assert SYSTEM in tokenizer.decode(row["prompt_ids"])
        assert SYSTEM not in tokenizer.decode(row["student_prompt_ids"])


@pytest.fixture(scope="module")
def answers(distilled: RunFiles, prompts: dict[bytes, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the store has of these rows, with the student's prompt."""
    store = TeacherStore(str(distilled.folder.parent / "teacher_store"))
    catalogue = store.catalogue()
    columns = ["prompt_ids", "response_ids", "sampled_logprobs", "finish_reason"]
    rows = store.read(catalogue, np.arange(catalogue.rows), columns).to_pylist()
    own = {tuple(row["prompt_ids"]): row["student_prompt_ids"] for row in prompts.values()}
    found = [
        {**row, "student_prompt_ids": own[tuple(row["prompt_ids"])]}
        for row in rows
        if tuple(row["prompt_ids"]) in own
    ]
    assert len(found) == NUM_ROWS
    return found


def test_the_teacher_answered_and_scored_after_the_long_prompt(
    answers: list[dict[str, Any]],
) -> None:
    teacher = load(TEACHER)
    for row in answers:
        told = np.array(row["sampled_logprobs"])
        long, short = (
            logprobs(teacher, row[name], row["response_ids"])
            for name in ("prompt_ids", "student_prompt_ids")
        )
        assert np.abs(told - long).max() < SAME
        assert np.abs(told - short).max() > OTHER


def test_the_student_wrote_after_the_short_prompt(
    answers: list[dict[str, Any]], place: Path
) -> None:
    config = RunConfig.model_validate(yaml.safe_load((place / "on_policy.yaml").read_text()))
    untrained = build_student(config, str(TEACHER), seed=0).float().eval()
    first = [row for row in answers if row["finish_reason"].endswith("/0")]
    assert first, "some are written before the first step"
    for row in first:
        length = len(row["response_ids"])
        assert row["response_ids"] == greedy(untrained, row["student_prompt_ids"], length)
    others = [greedy(untrained, r["prompt_ids"], len(r["response_ids"])) for r in first]
    assert others != [row["response_ids"] for row in first], "the prompt has to matter"


def test_the_figures_are_those_of_a_student_that_reads_the_short_prompt(
    distilled: RunFiles,
) -> None:
    student = load(distilled.folder / "student")
    kl = [
        divergence(row.log_p, partition(log_probabilities(student, row), row.ids))
        for row in kept_rows(distilled.folder / "held_out.parquet")
    ]
    last = distilled.lines("evaluation.jsonl")[-1]
    assert last["kl_nats_per_token"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)


def test_no_answer_of_it_serves_a_teacher_that_reads_the_students_prompt(
    place: Path, distilled: RunFiles
) -> None:
    assert len(list((place / "teacher_store" / "segments").iterdir()))
    limit = {"limit": NUM_ROWS + NUM_HELD_OUT}
    plain = write_run_file(place / "plain", prompts=limit)
    prepared = check_run_file(str(plain), [f"store.path={place / 'teacher_store'}"]).prepared
    assert prepared is not None
    told = f"has 0 of {NUM_ROWS} rows to train on, 0 of {NUM_HELD_OUT} held out"
    assert told in prepared.describe_stored()


def logprobs(model: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """A plain model's logprob of each token of a response, nats [T]."""
    row = KeptRow(prompt, response, np.empty(0), np.empty(0))
    return log_probabilities(model, row)[np.arange(len(response)), response]
