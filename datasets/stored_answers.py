"""A group's answers: from the store what it has, from the teacher the rest, which is then stored.

The promise: no published answer is ever asked for again. So an answer is published before it is
passed on, and before anything is asked the name that its segment would get is looked for, since an
earlier try of this very group may have published it.

Blocking work runs in threads; one object serves many groups at a time.
"""

import asyncio
import json
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.cluster.problems import RunError
from raystill.datasets.schema import answer_schema
from raystill.datasets.segment import DamagedSegment, Origin, segment_name
from raystill.datasets.signal import Signal
from raystill.datasets.store import Catalogue, TeacherStore
from raystill.datasets.stored_signal import as_wished, require_served, stored_columns
from raystill.datasets.teacher_calls import TeacherCalls

logger = logging.getLogger(__name__)

ENGINE = b"raystill.engine"
"""Metadata of the teacher's answers: JSON with engine, version, dtype, vocab_size."""


@dataclass(frozen=True)
class Paying:
    """Who pays for what is asked: written into segments. ``purpose``: training or evaluation."""

    run: str
    purpose: str
    teacher_identity: str
    teacher: str


class StoredAnswers:
    """Answers of the rows of one prompt table, by row number.

    ``keys``: the table's whole key column [N]. Making one looks through the store.
    """

    def __init__(
        self,
        store: TeacherStore,
        keys: pa.ChunkedArray,
        wish: Signal,
        paying: Paying,
        teacher: TeacherCalls,
    ) -> None:
        self._store = store
        self._keys = keys.combine_chunks()
        self._wish = wish
        self._paying = paying
        self._teacher = teacher
        self._refused: set[str] = set()
        self._look_through()

    async def get(
        self, rows: NDArray[np.int64], prompt_ids: pa.Array
    ) -> tuple[pa.Table, dict[str, float]]:
        """Answers (answer_schema of the wish) in the order of ``rows``, and what to count."""
        stored, held = await asyncio.to_thread(self._from_store, rows)
        parts, places = [], []
        if stored is not None:
            parts.append(stored)
            places.append(np.flatnonzero(held))
        if not held.all():
            missing = np.flatnonzero(~held)
            prompts = prompt_ids.take(pa.array(missing))
            parts.append(await self._ask(rows[missing], prompts))
            places.append(missing)
        back = np.argsort(np.concatenate(places))
        schema = answer_schema(self._wish.kind, self._wish.width)
        whole = pa.concat_tables([part.cast(schema) for part in parts])
        asked = len(rows) - int(held.sum())
        return whole.take(pa.array(back)), {"rows_asked": asked, "rows_reused": int(held.sum())}

    def _look_through(self) -> None:
        catalogue = self._store.catalogue(without=self._refused)
        for name, why in catalogue.refused.items():
            logger.warning("%s; its rows are looked for elsewhere, or asked again", why)
            self._refused.add(name)
        self._view = catalogue, catalogue.locate(self._keys)

    def _from_store(self, rows: NDArray[np.int64]) -> tuple[pa.Table | None, NDArray[np.bool_]]:
        """The stored answers of those rows that have one, and which they are."""
        while True:
            catalogue, located = self._view  # Another group's thread may look through again.
            where = located[rows]
            held = where >= 0
            if not held.any():
                return self._first_try(rows)
            try:
                return self._read(catalogue, where[held]), held
            except DamagedSegment as damage:
                logger.warning("%s; its rows are looked for elsewhere, or asked again", damage)
                self._refused.add(damage.name)
                self._look_through()

    def _read(self, catalogue: Catalogue, where: NDArray[np.int64]) -> pa.Table:
        """Stored rows as wished, in order."""
        segments = catalogue.segment[where]
        parts, places = [], []
        for number in np.unique(segments):
            origin = catalogue.entries[number].footer.origin
            require_served(origin.signal, self._wish)
            mine = np.flatnonzero(segments == number)
            columns = stored_columns(self._wish)
            part = self._store.read(catalogue, where[mine], columns)
            parts.append(as_wished(part, origin.signal, self._wish, origin.vocab_size))
            places.append(mine)
        back = np.argsort(np.concatenate(places))
        return pa.concat_tables(parts).take(pa.array(back))

    def _first_try(self, rows: NDArray[np.int64]) -> tuple[pa.Table | None, NDArray[np.bool_]]:
        """What an earlier try of just these rows has published since the store was looked through.

        Only whole groups are looked for: a retried group asks for what its first try asked for.
        """
        none = np.zeros(len(rows), bool)
        keys = self._keys.take(pa.array(rows))
        name = segment_name(keys.to_pylist(), self._wish)
        if not self._store.exists(name):
            return None, none
        try:
            file = self._store.open(name)
            found = file.rows_of(pa.chunked_array([keys]), stored_columns(self._wish))
        except DamagedSegment as damage:
            logger.warning("%s; its rows are asked again", damage)
            return None, none
        origin = file.footer.origin
        return as_wished(found, origin.signal, self._wish, origin.vocab_size), ~none

    async def _ask(self, rows: NDArray[np.int64], prompt_ids: pa.Array) -> pa.Table:
        answers = await self._teacher.sample(prompt_ids)
        usable = pc.is_null(answers["error"]).combine_chunks()
        if not pc.any(usable).as_py():
            return answers
        keys = self._keys.take(pa.array(rows)).filter(usable)
        answered = answers.filter(usable).select(stored_columns(self._wish))
        columns = dict(zip(answered.column_names, answered.columns, strict=True))
        segment = pa.table({"key": keys, "prompt_ids": prompt_ids.filter(usable), **columns})
        origin = self._origin(answers)
        published = await asyncio.to_thread(self._publish, origin, segment)
        if published is segment:
            return answers
        kept = as_wished(published, origin.signal, self._wish, origin.vocab_size)
        good = usable.to_numpy(zero_copy_only=False)
        back = np.argsort(np.concatenate([np.flatnonzero(good), np.flatnonzero(~good)]))
        unusable = answers.filter(pc.invert(usable)).cast(kept.schema)
        return pa.concat_tables([kept, unusable]).take(pa.array(back))

    def _publish(self, origin: Origin, rows: pa.Table) -> pa.Table:
        try:
            _, published = self._store.publish(
                origin, (self._paying.run, self._paying.purpose), rows
            )
        except OSError as error:
            raise RunError(
                f"the teacher's answers could not be stored in {self._store.path} ({error}); make "
                "room or mend it, and start the run again: what is published is kept"
            ) from error
        return published

    def _origin(self, answers: pa.Table) -> Origin:
        told = json.loads(answers.schema.metadata[ENGINE])
        return Origin(
            teacher_identity=self._paying.teacher_identity,
            teacher=self._paying.teacher,
            engine=told["engine"],
            engine_version=told["version"],
            dtype=told["dtype"],
            vocab_size=told["vocab_size"],
            signal=self._wish,
        )
