"""The answer stage: a group of prompts goes in, the stream's rows come back.

*Consumes* groups from the source. *Waits for* the store and the teacher. *Unblocked by* their
answers, one Serve call a group, many groups in flight in one process; each is passed on as soon as
it is done and published. Rows without a usable answer, and those that a filter rejects, are dropped
here and their credits returned.
"""

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from raystill.base.errors import RunError
from raystill.base.logs import log_labelled, run_name
from raystill.datasets.policy.calls import StudentAnswers, with_versions
from raystill.datasets.rows.answers import require_none_fatal, unusable_answers, with_foreign_ids
from raystill.datasets.rows.prompt_table import open_table
from raystill.datasets.rows.schema import (
    FILTERED,
    POLICY_VERSION,
    STUDENT_PROMPT,
    TEACHER,
    row_schema,
    student_prompts,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answers import RoutedAnswers, StoredAnswers, answers_of
from raystill.datasets.stream.filtering import GroupFilters
from raystill.datasets.stream.teacher_calls import (
    POISON,
    TeacherCalls,
    first_line,
)

if TYPE_CHECKING:
    from raystill.datasets.stream.spec import StreamSpec


TRUNCATED = "length"
FOREIGN = "foreign_id"
DROPPED = "dropped_before"
"""A row that an earlier try of the same group has dropped; it keeps the reason it had then."""


class AnswerGroup:
    """Ray Data's async map over groups; one instance works on many groups at a time."""

    def __init__(self, spec: "StreamSpec") -> None:
        log_labelled(run_name(spec.prompt_table.rpartition("/prompts/")[0]), "answers", "raystill")
        self._coordinator = spec.coordinator
        self._on_truncated = spec.stream.on_truncated
        self._num_ids = spec.num_ids
        self._signal = spec.signal
        self._schema = row_schema(spec.signal, policy=spec.policy is not None)
        looks = bool(spec.filters.rules or spec.counts_personal) and spec.teacher is not None
        self._filters = GroupFilters(spec) if looks else None
        columns = ["key", TEACHER] if spec.teachers else ["key"]
        table = open_table(spec.prompt_table).read(columns)
        store = TeacherStore(spec.store_path)
        asked = dict(spec.teachers) or {"": (spec.app_name, spec.requester)}
        attempts = spec.stream.max_attempts
        teachers = {
            name: (requester, TeacherCalls(app, spec.signal, attempts, spec.coordinator, name))
            for name, (app, requester) in asked.items()
        }
        self._answers = answers_of(store, table, spec.signal, teachers, spec.reasoning)
        self._written: StudentWritten | None = None
        if spec.policy is not None:
            assert isinstance(self._answers, StoredAnswers), "the student writes for one teacher"
            (_, teacher), *_ = teachers.values()
            self._written = StudentWritten(spec, store, table["key"], teacher)
        self._poison = frozenset(ray.get(spec.coordinator.poison_rows.remote()))

    async def __call__(self, block: pa.Table) -> pa.Table:
        """A group (GROUP_SCHEMA) becomes its answered rows (row_schema), in plan order."""
        prompts = unpack_group(block)
        attempt = block["attempt"][0].as_py()
        try:
            first = prompts["position"][0].as_py()
            again = bool(await self._coordinator.begins.remote(attempt, first))
            answers, counters = await self._answer(attempt, prompts, again)
            require_none_fatal(answers)
            if self._written is not None:
                answers = with_versions(answers)
            reasons = await self._reasons(attempt, prompts, answers)
            if self._filters is not None:
                filtered = await self._filters.applied(prompts, answers, reasons, attempt)
                answers, reasons, held = filtered
                counters |= held
            rows = self._join(prompts, answers, reasons)
            await self._drop(attempt, prompts, reasons)
        except Exception as error:
            message = sentence_of(error)
            await self._coordinator.failed.remote(message)
            raise RunError(message) from None if isinstance(error, RunError) else error
        truncated = pc.sum(pc.equal(rows["finish_reason"], TRUNCATED)).as_py() or 0
        counters |= {"rows_answered": len(rows), "rows_truncated": truncated}
        if self._filters is not None:
            counters["rows_filtered"] = pc.sum(pc.starts_with(reasons, FILTERED)).as_py() or 0
        if isinstance(self._answers, RoutedAnswers):
            counters |= self._answers.decided(prompts["row"].to_numpy(), reasons)
        self._coordinator.answered.remote(attempt, first, len(prompts), counters)
        return rows

    async def _answer(
        self, attempt: int, prompts: pa.Table, again: bool
    ) -> tuple[pa.Table, dict[str, float]]:
        """The group's answers.

        Rows that were poison in this run are not asked again, nor are those that an earlier try of
        the group has dropped. again: there was one, which may have published others.
        """
        gone = await self._dropped(attempt, prompts) if again else []
        dropped = np.isin(prompts["position"].to_numpy(), gone)
        poison = np.isin(prompts["row"].to_numpy(), list(self._poison)) & ~dropped
        if not (poison | dropped).any():
            return await self._get(prompts, again)
        kinds = [np.flatnonzero(mask) for mask in (~poison & ~dropped, poison, dropped)]
        good, parts, counters = kinds[0], list[pa.Table](), dict[str, float]()
        if len(good):
            answers, counters = await self._get(prompts.take(pa.array(good)), again)
            parts.append(answers)
        for places, reason in zip(kinds[1:], (POISON, DROPPED), strict=True):
            parts.append(unusable_answers(len(places), reason, self._signal))
        back = np.argsort(np.concatenate(kinds))
        return pa.concat_tables(parts).take(pa.array(back)), counters

    async def _reasons(self, attempt: int, prompts: pa.Table, answers: pa.Table) -> pa.Array:
        """Why each row is dropped, string; null: it is kept.

        A row that an earlier try of this group has dropped stays so.
        """
        reasons = dropped_reasons(answers, self._on_truncated)
        reasons = with_foreign(reasons, prompts, answers, self._num_ids)
        gone = await self._dropped(attempt, prompts)
        positions = prompts["position"].combine_chunks()
        before = pc.is_in(positions, value_set=pa.array(gone, positions.type))
        return _or_reason(reasons, before, DROPPED)

    async def _dropped(self, attempt: int, prompts: pa.Table) -> list[int]:
        """Positions of the group that an earlier try of it has dropped."""
        positions = prompts["position"].to_pylist()
        return list(await self._coordinator.dropped_of.remote(attempt, positions))

    async def _get(self, prompts: pa.Table, again: bool) -> tuple[pa.Table, dict[str, float]]:
        """Answers by the teacher and, where the plan says so, by the student."""
        if self._written is None:
            return await get_from(self._answers, prompts, again)
        assert isinstance(self._answers, StoredAnswers), "the student writes for one teacher"
        return await self._written.get(prompts, self._answers, again)

    def _join(self, prompts: pa.Table, answers: pa.Table, reasons: pa.Array) -> pa.Table:
        columns = {**_columns(prompts), "prompt_ids": student_prompts(prompts), **_columns(answers)}
        rows = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        if reasons.null_count < len(reasons):
            rows = rows.filter(pc.is_null(reasons))
        return rows

    async def _drop(self, attempt: int, prompts: pa.Table, reasons: pa.Array) -> None:
        gone = pc.is_valid(reasons)
        positions = prompts["position"].filter(gone).to_pylist()
        if positions:
            named = reasons.filter(gone).to_pylist()
            rows = prompts["row"].filter(gone).to_pylist()
            poison = [row for row, reason in zip(rows, named, strict=True) if reason == POISON]
            await self._coordinator.dropped.remote(attempt, positions, named, poison)


class StudentWritten:
    """The rows of a group that the student writes, beside those of the teacher."""

    def __init__(
        self, spec: "StreamSpec", store: TeacherStore, keys: pa.ChunkedArray, teacher: TeacherCalls
    ) -> None:
        assert spec.policy is not None
        self._plan = spec.policy
        self._spec = spec
        self._store = store
        self._keys = keys
        attempts = spec.stream.max_attempts
        self._sampler = TeacherCalls(spec.sampler_name, Signal("text"), attempts, None)
        self._teacher = teacher
        self._epochs: dict[int, StoredAnswers] = {}
        self._opening = asyncio.Lock()

    async def get(
        self, prompts: pa.Table, teacher: StoredAnswers, again: bool = False
    ) -> tuple[pa.Table, dict[str, float]]:
        """Answers in the order of ``prompts``, whichever of the two writes them."""
        epoch = prompts["epoch"][0].as_py()
        positions = prompts["position"].to_numpy()
        mine = self._plan.by_student(epoch, positions)
        if not mine.any():
            return await get_from(teacher, prompts, again)
        places = [np.flatnonzero(mine), np.flatnonzero(~mine)]
        written = prompts.take(pa.array(places[0]))
        # A response that came with its prompt is left aside: the student is to write its own.
        nothing = pa.nulls(len(written), prompts.schema.field("response_ids").type)
        place = prompts.schema.get_field_index("response_ids")
        written = written.set_column(place, "response_ids", nothing)
        oldest = self._plan.oldest_version(epoch, positions)
        calls = StudentAnswers(self._sampler, self._teacher, oldest)
        asked = [get_from((await self._of(epoch)).through(calls), written, again)]
        if not mine.all():
            asked.append(get_from(teacher, prompts.take(pa.array(places[1])), again))
        parts = await asyncio.gather(*asked)
        back = np.argsort(np.concatenate(places[: len(parts)]))
        answers = pa.concat_tables([part.replace_schema_metadata(None) for part, _ in parts])
        counters: dict[str, float] = {}
        for _, each in parts:
            for name, count in each.items():
                counters[name] = counters.get(name, 0) + count
        return answers.take(pa.array(back)), counters

    async def _of(self, epoch: int) -> StoredAnswers:
        """The store's front for an epoch, in which each row is written anew."""
        async with self._opening:
            if epoch not in self._epochs:
                keys = await asyncio.to_thread(self._plan.keys, epoch, self._keys)
                spec, calls = self._spec, StudentAnswers(self._sampler, self._teacher)
                self._epochs = {
                    epoch: await asyncio.to_thread(
                        StoredAnswers, self._store, keys, spec.signal, spec.requester, calls
                    )
                }
            return self._epochs[epoch]


async def get_from(
    answers: StoredAnswers | RoutedAnswers, prompts: pa.Table, again: bool = False
) -> tuple[pa.Table, dict[str, float]]:
    """The answers of ``prompts`` from the store or from who answers for it."""
    ids, given = (prompts[n].combine_chunks() for n in ("prompt_ids", "response_ids"))
    own = student_prompts(prompts).combine_chunks()
    return await answers.get(prompts["row"].to_numpy(), ids, given, own, again)


def dropped_reasons(answers: pa.Table, on_truncated: str) -> pa.Array:
    """Why each row is dropped, string; null: it is kept."""
    reasons = answers["error"].combine_chunks()
    if on_truncated == "drop":
        truncated = pc.equal(answers["finish_reason"].combine_chunks(), TRUNCATED)
        if POLICY_VERSION in answers.column_names:  # The limit of the student's is a choice.
            written = pc.is_valid(answers[POLICY_VERSION].combine_chunks())
            truncated = pc.and_(truncated, pc.invert(written))
        reasons = _or_reason(reasons, truncated, "truncated")
    return reasons


def with_foreign(
    reasons: pa.Array, prompts: pa.Table, answers: pa.Table, num_ids: int | None
) -> pa.Array:
    """The same reasons, and ``foreign_id`` where the student has no embedding for an id."""
    if num_ids is None:
        return reasons
    foreign = with_foreign_ids(student_prompts(prompts), num_ids)
    foreign |= with_foreign_ids(answers["response_ids"], num_ids)
    return _or_reason(reasons, pa.array(foreign), FOREIGN)


def _or_reason(reasons: pa.Array, where: pa.Array, reason: str) -> pa.Array:
    """The reasons, and ``reason`` for rows that have none and where ``where`` is true."""
    mark = pc.if_else(where, pa.scalar(reason), pa.scalar(None, pa.string()))
    return pc.coalesce(reasons, mark)


def unpack_group(block: pa.Table) -> pa.Table:
    """The rows of a one-row group block: position, row, epoch, source, prompt and response ids."""
    assert len(block) == 1, f"a group is one row, but the block has {len(block)}"
    names = ("position", "row", "source", "prompt_ids", "response_ids", STUDENT_PROMPT)
    columns = {name: block[name].combine_chunks().flatten() for name in names}
    epoch = pa.array([block["epoch"][0].as_py()] * len(columns["row"]), pa.int32())
    return pa.table({**columns, "epoch": epoch})


def sentence_of(error: BaseException) -> str:
    """What stopped the stage, in a sentence, without the remote traceback Ray wraps around it."""
    cause = getattr(error, "cause", None) or error
    if isinstance(error, RunError) or isinstance(cause, RunError):
        return str(cause)
    return (
        f"answering a group failed with {type(cause).__name__}: {first_line(cause)}; the teacher's "
        "log files in the run folder say more"
    )


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))
