"""Answers that the student writes: its sampler is asked for the response, the teacher scores it.

`StudentAnswers` stands where the store's front (`stream.answers.StoredAnswers`) expects the
teacher. So a student-written answer is published, looked up and scored like any other.

The version of the weights is stored in ``finish_reason``, as ``stop/12`` or ``length/12``: stored
segments have no other column for it, and stay readable to earlier versions.
"""

import json
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from raystill.datasets.rows.schema import ENGINE, POLICY_VERSION

SEPARATOR = "/"


class Calls(Protocol):
    """What is asked of `stream.teacher_calls.TeacherCalls`."""

    async def sample(self, prompt_ids: pa.Array) -> pa.Table: ...
    async def score(self, prompt_ids: pa.Array, response_ids: pa.Array) -> pa.Table: ...


class StudentAnswers:
    """The student's sampler and the teacher, as one that answers and scores."""

    def __init__(self, student: Calls, teacher: Calls) -> None:
        self._student = student
        self._teacher = teacher

    async def sample(
        self, prompt_ids: pa.Array, student_prompt_ids: pa.Array | None = None
    ) -> pa.Table:
        """The student's responses with the teacher's signal, in the order of the prompts.

        student_prompt_ids: what the student reads, where that is not what the teacher does.
        A row that the student could not answer, or the teacher not score, has its error.
        """
        own = prompt_ids if student_prompt_ids is None else student_prompt_ids
        written = await self._student.sample(own)
        facts = json.loads((written.schema.metadata or {}).get(ENGINE, b"{}"))
        version = facts.get(POLICY_VERSION, 0)  # Without facts no row is usable.
        scored = await self._teacher.score(prompt_ids, written["response_ids"].combine_chunks())
        errors = pc.coalesce(written["error"], scored["error"])
        reasons = pc.binary_join_element_wise(
            written["finish_reason"], pa.scalar(str(version)), SEPARATOR
        )
        usable = pc.is_null(errors)
        columns = {
            "finish_reason": pc.if_else(usable, reasons, pa.scalar(None, pa.string())),
            "error": errors,
        }
        for name, values in columns.items():
            place = scored.schema.get_field_index(name)
            scored = scored.set_column(place, scored.schema.field(name), values)
        return scored

    async def score(self, prompt_ids: pa.Array, response_ids: pa.Array) -> pa.Table:
        """The teacher's signal for responses that are stored with a poorer one."""
        return await self._teacher.score(prompt_ids, response_ids)


def with_versions(answers: pa.Table) -> pa.Table:
    """Answers with plain finish reasons and the column ``policy_version``.

    Where the version is not in ``finish_reason`` the teacher wrote the answer.
    """
    reasons, versions = [], []
    for text in answers["finish_reason"].to_pylist():
        reason, separator, version = (text or "").partition(SEPARATOR)
        reasons.append(reason or None)
        versions.append(int(version) if separator else None)
    place = answers.schema.get_field_index("finish_reason")
    answers = answers.set_column(place, "finish_reason", pa.array(reasons, pa.string()))
    return answers.append_column(POLICY_VERSION, pa.array(versions, pa.int64()))
