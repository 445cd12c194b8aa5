"""Answers of a group of rows: from the store where it has them, else from the teacher.

The promise: no published answer is ever asked for again. So an answer is published before it is
passed on. And before the teacher is asked, the store is searched for the segment that this group
would write: an earlier try of the same group may have published it.

An answer that is stored with a poorer signal than is wanted is *scored*: the teacher reads the
stored tokens and gives the signal for exactly these. A response that came with its prompt is scored
too.

Blocking work runs in threads. One object serves many groups at a time.
"""

import asyncio
import copy
import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.datasets.filters.reasoning import Reasoning
from raystill.datasets.lookup.keeping import Notes
from raystill.datasets.lookup.view import Part, StoreView, in_order
from raystill.datasets.policy.calls import StudentAnswers
from raystill.datasets.rows.answers import (
    derive_answers,
    require_none_fatal,
    stored_columns,
    with_foreign_ids,
)
from raystill.datasets.rows.reasoning import reasoning_rows
from raystill.datasets.rows.schema import (
    ENGINE,
    FILTERED,
    REASONING,
    TEACHER,
    TOKEN_IDS,
    answer_schema,
    of_one,
    row_schema,
    student_prompts,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.values import impossible_rows
from raystill.datasets.stream.spec import Requester
from raystill.datasets.stream.teacher_calls import InWords, TeacherCalls
from raystill.run import Run

NOT_FINITE = "not_finite"
"""Error of an answer with NaN or positive logprobs, or ids outside the vocabulary: it is dropped
and not stored, so that it is asked for again."""


class StoredAnswers:
    """Answers of the rows of one prompt table, by row number.

    ``keys``: the table's whole key column [N]. Making one looks through the store.
    """

    def __init__(
        self,
        store: TeacherStore,
        keys: pa.ChunkedArray,
        wanted: Signal,
        requester: Requester,
        teacher: "TeacherCalls | StudentAnswers | InWords",
        reasoning: Reasoning | None = None,
    ) -> None:
        self._store = store
        self._view = StoreView(store, keys, wanted)
        self._notes = Notes(store)
        self._wanted = wanted
        self._requester = requester
        self._teacher = teacher
        self._reasoning = reasoning

    def of_another(self, requester: Requester, teacher: TeacherCalls) -> "StoredAnswers":
        """Answers of the same table by another teacher; both look at the store through one view."""
        other = copy.copy(self)
        other._requester, other._teacher = requester, teacher
        return other

    def through(self, calls: StudentAnswers) -> "StoredAnswers":
        """Answers of the same rows, through other calls of the student and its teacher."""
        other = copy.copy(self)
        other._teacher, other._reasoning = calls, None  # The student's own answers stay whole.
        return other

    def over(self, keys: pa.Array, teacher: "InWords") -> "StoredAnswers":
        """Answers of other rows, by their keys [N], and through other calls of the teacher."""
        other = copy.copy(self)
        other._view, other._teacher = self._view.over(keys), teacher
        return other

    async def get(
        self,
        rows: NDArray[np.int64],
        prompt_ids: pa.Array,
        given: pa.Array | None = None,
        student_prompt_ids: pa.Array | None = None,
        again: bool = False,
    ) -> tuple[pa.Table, dict[str, float]]:
        """Answers (answer_schema of the wanted signal) in the order of ``rows``, and counters.

        ``given``: the response ids that rows came with, null where the teacher is to answer.
        ``student_prompt_ids``: what the student reads, if that is not what the teacher does.
        ``again``: some of them may have been published since the store was looked through.
        """
        given = pa.nulls(len(rows), TOKEN_IDS) if given is None else given
        if again:
            await asyncio.to_thread(self._view.look_through)
        looked_up = await asyncio.to_thread(self._view.look_up, rows, given)
        parts = list(looked_up.answered)
        scored, responses = looked_up.to_score
        asked = looked_up.to_ask
        if len(scored):
            prompts = prompt_ids.take(pa.array(scored))
            parts.append((scored, await self._score(rows[scored], prompts, responses)))
        if len(asked):
            places = pa.array(asked)
            own = None if student_prompt_ids is None else student_prompt_ids.take(places)
            parts.append((asked, await self._ask(rows[asked], prompt_ids.take(places), own)))
        if self._reasoning is not None:
            of_rows = (self._view.keys_of(rows), prompt_ids, pc.is_null(given))
            wished = (asyncio.to_thread(self._as_wished, *of_rows, part) for part in parts)
            parts = list(await asyncio.gather(*wished))
        schema = answer_schema(self._wanted)
        _, answers = in_order([(n, part.select(schema.names)) for n, part in parts], schema)
        reused = len(rows) - len(asked) - len(scored)
        return answers, {
            "rows_asked": len(asked),
            "rows_scored": len(scored),
            "rows_reused": reused,
        }

    def _as_wished(self, keys: pa.Array, prompt_ids: pa.Array, free: pa.Array, part: Part) -> Part:
        """Some of a group's answers with or without their reasoning; those given stay as they are.

        keys, prompt_ids, free: of the group; free: no response came with the row.
        """
        assert self._reasoning is not None
        mine = pa.array(part[0])
        answers = part[1].select(answer_schema(self._wanted).names)
        keys, prompt_ids, free = (values.take(mine) for values in (keys, prompt_ids, free))
        return part[0], self._reasoning.applied(answers, keys, prompt_ids, free, self._stored)

    def _stored(self, keys: pa.Array) -> list[Part]:
        """What is stored under some keys, which were published together or are in the index."""
        nothing = pa.nulls(len(keys), TOKEN_IDS)
        return self._view.over(keys).look_up(np.arange(len(keys)), nothing).answered

    async def _ask(
        self, rows: NDArray[np.int64], prompt_ids: pa.Array, own: pa.Array | None
    ) -> pa.Table:
        if isinstance(self._teacher, StudentAnswers):
            answers = await self._teacher.sample(prompt_ids, own)
        else:
            answers = await self._teacher.sample(prompt_ids, self._view.keys_of(rows))
        return await self._keep(rows, prompt_ids, answers, scored=False)

    async def _score(
        self, rows: NDArray[np.int64], prompt_ids: pa.Array, responses: pa.Table
    ) -> pa.Table:
        """The teacher's signal for given responses.

        A stored answer keeps its own ``finish_reason``: the teacher that scores it can only judge
        by the last token.
        """
        answers = await self._teacher.score(prompt_ids, responses["response_ids"].combine_chunks())
        usable = pc.is_null(answers["error"])
        assert (
            answers["response_ids"].filter(usable).equals(responses["response_ids"].filter(usable))
        ), "the teacher scored other responses than it was given"
        reasons = pc.coalesce(responses["finish_reason"], answers["finish_reason"])
        place = answers.schema.get_field_index("finish_reason")
        kept = pc.if_else(usable, reasons, pa.scalar(None, pa.string()))
        return await self._keep(
            rows, prompt_ids, answers.set_column(place, "finish_reason", kept), scored=True
        )

    async def _keep(
        self, rows: NDArray[np.int64], prompt_ids: pa.Array, answers: pa.Table, scored: bool
    ) -> pa.Table:
        """Publish the usable ones; the answers with what is published in their places.

        In one thread: values are looked at, packed and hashed by the token, and the event loop has
        many groups to see to.
        """
        return await asyncio.to_thread(self._published, rows, prompt_ids, answers, scored)

    def _published(
        self, rows: NDArray[np.int64], prompt_ids: pa.Array, answers: pa.Table, scored: bool
    ) -> pa.Table:
        origin = self._origin(answers)
        answers = without_impossible(answers, origin)
        usable = pc.is_null(answers["error"]).combine_chunks()
        if not pc.any(usable).as_py():
            return answers
        keys = self._view.keys_of(rows).filter(usable)
        answered = answers.filter(usable).select(stored_columns(self._wanted))
        columns = dict(zip(answered.column_names, answered.columns, strict=True))
        segment = pa.table({"key": keys, "prompt_ids": prompt_ids.filter(usable), **columns})
        provenance = Provenance(self._requester.run, self._requester.purpose, scored)
        if (before := reasoning_rows(segment, answers.filter(usable))) is not None:
            apart = replace(provenance, purpose=REASONING)  # First: no answer is asked for again.
            self._publish(replace(origin, signal=Signal("text")), apart, before)
        published = self._publish(origin, provenance, segment)
        if published is segment:
            return answers
        kept = derive_answers(published, origin.signal, self._wanted, origin.vocab_size)
        good = usable.to_numpy(zero_copy_only=False)
        parts: list[Part] = [
            (np.flatnonzero(good), kept),
            (np.flatnonzero(~good), answers.filter(pc.invert(usable))),
        ]
        return in_order(parts, kept.schema)[1]

    def _publish(self, origin: Origin, provenance: Provenance, rows: pa.Table) -> pa.Table:
        try:
            name, published = self._store.publish(origin, provenance, rows)
        except OSError as error:
            raise RunError(
                f"the teacher's answers could not be stored in {self._store.path} ({error}); make "
                "room or mend it, and start the run again: what is published is kept"
            ) from error
        if published is rows:
            self._notes.add(name, origin, [(provenance, rows["key"].combine_chunks())])
        return published

    def _origin(self, answers: pa.Table) -> Origin:
        engine = json.loads(answers.schema.metadata[ENGINE])
        return Origin(
            teacher_identity=self._requester.teacher_identity,
            teacher=self._requester.teacher,
            engine=engine["engine"],
            engine_version=engine["version"],
            dtype=engine["dtype"],
            vocab_size=engine["vocab_size"],
            signal=self._wanted,
        )


class RoutedAnswers:
    """Answers of the rows of one prompt table that several teachers answer: each row its own one.

    ``names``: the table's whole column of teachers [N]. ``teachers``: answers by name. Teachers are
    asked side by side: one that has to be waited for holds no other back.
    """

    def __init__(self, names: pa.ChunkedArray, teachers: Mapping[str, StoredAnswers]) -> None:
        values = pa.array(list(teachers), pa.string())
        self._teacher_of = pc.index_in(names, value_set=values).combine_chunks().to_numpy()
        self._teachers = list(teachers.values())
        self._names = list(teachers)

    async def get(
        self,
        rows: NDArray[np.int64],
        prompt_ids: pa.Array,
        given: pa.Array | None = None,
        student_prompt_ids: pa.Array | None = None,
        again: bool = False,
    ) -> tuple[pa.Table, dict[str, float]]:
        """As `StoredAnswers.get`; no student writes here, so what it reads does not matter."""
        given = pa.nulls(len(rows), TOKEN_IDS) if given is None else given
        who = self._teacher_of[rows]
        places = [np.flatnonzero(who == number) for number in np.unique(who)]
        answered = await asyncio.gather(
            *(
                self._teachers[who[mine[0]]].get(
                    rows[mine],
                    prompt_ids.take(pa.array(mine)),
                    given.take(pa.array(mine)),
                    again=again,
                )
                for mine in places
            )
        )
        parts = [
            (mine, answers.replace_schema_metadata(None))
            for mine, (answers, _) in zip(places, answered, strict=True)
        ]
        counters: dict[str, float] = {}
        for mine, (_, counted) in zip(places, answered, strict=True):
            for name, count in counted.items():
                counters[name] = counters.get(name, 0) + count
                counters[of_one(self._names[who[mine[0]]], name)] = count
        return in_order(parts, parts[0][1].schema)[1], counters

    def decided(self, rows: NDArray[np.int64], reasons: pa.Array) -> dict[str, float]:
        """Counters of each teacher's rows: accepted, rejected by filters, and dropped.

        reasons: why rows are not trained on, string [n]; null where they are.
        """
        kept = pc.is_null(reasons).to_numpy(zero_copy_only=False)
        rejected = pc.starts_with(reasons, FILTERED).fill_null(False)
        of_filters = rejected.to_numpy(zero_copy_only=False)
        who, counters = self._teacher_of[rows], dict[str, float]()
        for number in np.unique(who):
            mine, name = who == number, self._names[number]
            counters[of_one(name, "rows_accepted")] = int((mine & kept).sum())
            counters[of_one(name, "rows_rejected")] = int((mine & of_filters).sum())
            counters[of_one(name, "rows_dropped")] = int((mine & ~kept & ~of_filters).sum())
        return counters


def answers_of(
    store: TeacherStore,
    table: pa.Table,
    wanted: Signal,
    teachers: Mapping[str, tuple[Requester, TeacherCalls]],
    reasoning: Reasoning | None = None,
) -> StoredAnswers | RoutedAnswers:
    """The store's front for a prompt table with its columns ``key`` and, if any, `TEACHER`."""
    first, *_ = teachers.values()
    answers = StoredAnswers(store, table["key"], wanted, *first, reasoning)
    if TEACHER not in table.column_names:
        return answers
    by_name = {name: answers.of_another(*asked) for name, asked in teachers.items()}
    return RoutedAnswers(table[TEACHER], by_name)


def without_impossible(answers: pa.Table, origin: Origin) -> pa.Table:
    """The answers; the error of those whose values no teacher means is NOT_FINITE."""
    bad = pa.array(impossible_rows(answers, origin.signal, origin.vocab_size))
    place = answers.schema.get_field_index("error")
    errors = pc.if_else(bad, pa.scalar(NOT_FINITE), pa.scalar(None, pa.string()))
    return answers.set_column(place, "error", pc.coalesce(answers["error"], errors))


def answer_prompts(
    run: Run, prompts: pa.Table, wanted: Signal, purpose: str, epoch: int = 0
) -> pa.Table:
    """Rows (row_schema of ``wanted``) of all ``prompts`` (PROMPT_SCHEMA) that can be answered.

    They come from the store, or from the run's teacher, which must be deployed for the others.
    A row's position is its row number. Blocks; for tasks of their own, not for the stream.
    """
    config = run.config
    attempts, coordinator = config.stream.max_attempts, run.coordinator
    teachers = {
        name: (
            Requester.of(one, purpose),
            TeacherCalls(one.app, wanted, attempts, coordinator, name),
        )
        for name, one in run.by_teacher().items()
    }
    reasoning = Reasoning.of(config, run.teacher)
    answers = answers_of(TeacherStore(run.store_path), prompts, wanted, teachers, reasoning)

    async def ask(start: int, slots: asyncio.Semaphore) -> pa.Table:
        group = prompts.slice(start, config.stream.group_rows).combine_chunks()
        ids, given = (group[name].combine_chunks() for name in ("prompt_ids", "response_ids"))
        async with slots:
            answered, _ = await answers.get(np.arange(start, start + len(group)), ids, given)
            require_none_fatal(answered)
        rows = _rows_of(group, answered, wanted, epoch)
        if run.num_ids is None:
            return rows
        foreign = with_foreign_ids(rows["prompt_ids"], run.num_ids)  # Those of the student.
        foreign |= with_foreign_ids(rows["response_ids"], run.num_ids)
        return rows.filter(pa.array(~foreign))

    async def ask_all() -> list[pa.Table]:
        slots = asyncio.Semaphore(config.groups_in_flight)
        starts = range(0, len(prompts), config.stream.group_rows)
        return list(await asyncio.gather(*(ask(start, slots) for start in starts)))

    groups = asyncio.run(ask_all())
    return pa.concat_tables([row_schema(wanted).empty_table(), *groups]).combine_chunks()


def _rows_of(prompts: pa.Table, answers: pa.Table, wanted: Signal, epoch: int) -> pa.Table:
    """The answered rows of a group, with the prompts that the student reads."""
    columns = {
        "row": prompts["row"],
        "position": prompts["row"],
        "epoch": pa.array([epoch] * len(prompts), pa.int32()),
        "source": prompts["source"],
        "prompt_ids": student_prompts(prompts),
    }
    schema = row_schema(wanted)
    values = [columns[n] if n in columns else answers[n] for n in schema.names]
    return pa.table(values, schema=schema).filter(pc.is_null(answers["error"]))
