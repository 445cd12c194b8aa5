"""A group that Ray runs again, of which some rows had no answer: nothing else is asked twice."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer, answers_table, require_none_fatal
from raystill.datasets.rows.schema import ENGINE, NOT_STARTED, PROMPT_SCHEMA, TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answer_stage import DROPPED, AnswerGroup
from raystill.datasets.stream.answers import StoredAnswers
from raystill.datasets.stream.spec import Requester
from raystill.datasets.stream.teacher_calls import POISON, TeacherCalls

TEXT = Signal("text")
NEVER = 9
"""First id of a prompt that the teacher does not answer in time."""
PLAN = [1, NEVER, 1, 1]


class Teacher:
    """Answers a prompt with its row; counts which it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    async def sample(self, prompt_ids: pa.Array, keys: Any = None) -> pa.Table:
        prompts = prompt_ids.to_pylist()
        self.asked.append([row for _, row in prompts])
        answers = [
            Answer(error="timed_out")
            if kind == NEVER
            else Answer(np.array([row, 1], np.int32), "stop")
            for kind, row in prompts
        ]
        engine = {"engine": "e", "version": "1", "dtype": "float32", "vocab_size": 100}
        return answers_table(answers, TEXT).replace_schema_metadata({ENGINE: json.dumps(engine)})


class Coordinator:
    """What it knows of the group: whether it was tried, and what was dropped."""

    def __init__(self, dropped: list[int] | None = None) -> None:
        self.dropped = dropped

    @property
    def dropped_of(self) -> Any:
        async def remote(attempt: int, positions: list[int]) -> list[int]:
            return [p for p in self.dropped or [] if p in positions]

        return SimpleNamespace(remote=remote)


def stored(place: Path, teacher: Teacher) -> StoredAnswers:
    """What this process knows of the store it has from now."""
    keys = pa.chunked_array([pa.array([bytes([i]) * 16 for i in range(4)])])
    requester = Requester("run", "training", "identity", "teacher")
    return StoredAnswers(TeacherStore(str(place)), keys, TEXT, requester, teacher)  # type: ignore[arg-type]


def ids(plan: list[int]) -> pa.Array:
    return pa.array([[kind, row] for row, kind in enumerate(plan)], TOKEN_IDS)


def test_a_group_that_was_tried_is_looked_for_anew_row_by_row(tmp_path: Path) -> None:
    teacher = Teacher()
    first, other = stored(tmp_path, teacher), stored(tmp_path, teacher)
    asyncio.run(first.get(np.arange(4), ids(PLAN)))
    for answers in (first, other):  # The same process, and one that began before the first try.
        told, counters = asyncio.run(answers.get(np.arange(4), ids(PLAN), again=True))
        assert counters == {"rows_asked": 1, "rows_scored": 0, "rows_reused": 3}
        assert told["error"].to_pylist() == [None, "timed_out", None, None]
    assert teacher.asked == [[0, 1, 2, 3], [1], [1]]


@pytest.mark.parametrize(("poison", "dropped"), [([], [21]), ([1], [21]), ([2], [21]), ([1], [])])
def test_rows_that_were_dropped_are_not_asked_at_a_later_try(
    tmp_path: Path, poison: list[int], dropped: list[int]
) -> None:
    teacher = Teacher()
    stage: Any = object.__new__(AnswerGroup)
    stage._answers, stage._written, stage._signal = stored(tmp_path, teacher), None, TEXT
    stage._coordinator, stage._poison = Coordinator(dropped), frozenset(poison)
    columns = {name: [None] * 4 for name in PROMPT_SCHEMA.names}
    columns |= {"row": list(range(4)), "prompt_ids": ids(PLAN).to_pylist()}
    prompts = pa.table({name: columns[name] for name in PROMPT_SCHEMA.names}, PROMPT_SCHEMA)
    prompts = prompts.append_column("position", pa.array([20, 21, 22, 23]))
    asyncio.run(stage._answer(1, prompts, again=False))
    told, _ = asyncio.run(stage._answer(1, prompts, again=True))
    reasons: list[str | None] = [None, "timed_out", None, None]
    for row in poison:
        reasons[row] = POISON
    for position in dropped:
        reasons[position - 20] = DROPPED
    assert told["error"].to_pylist() == reasons
    assert told["response_ids"].to_pylist() == [
        [row, 1] if reason is None else [] for row, reason in enumerate(reasons)
    ]
    again = teacher.asked[1:]
    assert again == ([] if poison == [1] or dropped else [[1]])


class Handle:
    """A teacher whose engine dies before the last row, and which then is gone for good."""

    def __init__(self, answered: int) -> None:
        self.calls, self.answered = 0, answered

    @property
    def sample(self) -> Any:
        async def remote(rows: pa.Table, signal: Signal) -> pa.Table:
            self.calls += 1
            if self.calls > 1:
                raise RunError("the teacher could not be reached")
            answers = [
                Answer(np.array([i, 1], np.int32), "stop")
                if i < self.answered
                else Answer(error=NOT_STARTED)
                for i in range(len(rows))
            ]
            engine = {"engine": "e", "version": "1", "dtype": "float32", "vocab_size": 100}
            told = answers_table(answers, TEXT)
            return told.replace_schema_metadata({ENGINE: json.dumps(engine)})

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_answers_that_came_before_a_teacher_was_gone_are_stored(
    tmp_path: Path, answered: int
) -> None:
    """And the run ends with what the others met."""
    calls = TeacherCalls("app", TEXT, 2, None)

    async def teacher() -> Any:
        return handle

    handle = Handle(answered)
    calls._teacher = teacher  # type: ignore[method-assign]
    answers = stored(tmp_path, calls)  # type: ignore[arg-type]

    async def get() -> None:
        told, _ = await answers.get(np.arange(4), ids([1, 1, 1, 1]))
        require_none_fatal(told)

    with pytest.raises(RunError, match="could not be reached"):
        asyncio.run(get())
    assert TeacherStore(str(tmp_path)).catalogue().rows == answered
