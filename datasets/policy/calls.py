"""Answers that the student writes: its sampler is asked for the response, the teacher scores it.

`StudentAnswers` stands where the store's front (`stream.answers.StoredAnswers`) expects the
teacher. So a student-written answer is published, looked up and scored like any other.

The sampler says in ``finish_reason`` which weights wrote which tokens: see `rows.versions`.
"""

from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from raystill.datasets.rows.schema import POLICY_VERSION, TOKEN_VERSIONS
from raystill.datasets.rows.versions import split_reason, token_versions


class Calls(Protocol):
    """What is asked of `stream.teacher_calls.TeacherCalls`."""

    async def sample(self, prompt_ids: pa.Array, *, at_least: int | None = None) -> pa.Table: ...
    async def score(self, prompt_ids: pa.Array, response_ids: pa.Array) -> pa.Table: ...


class StudentAnswers:
    """The student's sampler and the teacher, as one that answers and scores."""

    def __init__(self, student: Calls, teacher: Calls, oldest_version: int | None = None) -> None:
        """oldest_version: the student's weights that may answer, and newer ones; None: any."""
        self._student = student
        self._teacher = teacher
        self._oldest_version = oldest_version

    async def sample(
        self, prompt_ids: pa.Array, student_prompt_ids: pa.Array | None = None
    ) -> pa.Table:
        """The student's responses with the teacher's signal, in the order of the prompts.

        student_prompt_ids: what the student reads, where that is not what the teacher does.
        A row that the student could not answer, or the teacher not score, has its error.
        """
        own = prompt_ids if student_prompt_ids is None else student_prompt_ids
        written = await self._student.sample(own, at_least=self._oldest_version)
        scored = await self._teacher.score(prompt_ids, written["response_ids"].combine_chunks())
        errors = pc.coalesce(written["error"], scored["error"])
        none = pa.scalar(None, pa.string())
        columns = {
            "finish_reason": pc.if_else(pc.is_null(errors), written["finish_reason"], none),
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
    """Answers with plain finish reasons, and the columns `POLICY_VERSION` and `TOKEN_VERSIONS`."""
    parts = [split_reason(text) for text in answers["finish_reason"].to_pylist()]
    reasons, spans = [reason for reason, _ in parts], [each for _, each in parts]
    first = pa.array([each[0][1] if each else None for each in spans], pa.int64())
    versions = token_versions(spans, answers["response_ids"])
    place = answers.schema.get_field_index("finish_reason")
    answers = answers.set_column(place, "finish_reason", pa.array(reasons, pa.string()))
    return answers.append_column(POLICY_VERSION, first).append_column(TOKEN_VERSIONS, versions)
