"""What the teacher store knows of a group's rows: answered as wished, said but poorer, or not.

One view serves many groups, from many threads, and looks the store through again where a segment
turns out to be of no use, and where it is time to try one again. Imports neither Ray nor torch.

Legend: N rows of the prompt table, n rows of a group.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.rows.answers import derive_answers, stored_columns
from raystill.datasets.rows.schema import TOKEN_IDS, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.catalogue import Catalogue
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    UnreadableSegment,
    UnusableSegment,
)
from raystill.datasets.store.segment import beside, segment_name
from raystill.datasets.store.store import TeacherStore

logger = logging.getLogger(__name__)

Places = NDArray[np.int64]
Part = tuple[Places, pa.Table]
"""Some of a group's rows: their places in it, ascending, and a table with a row for each."""

PASSED_OVER_S = 300.0
"""How long an unreadable segment is passed over: not for good, since its rows are asked again
meanwhile, which costs; not for one group alone, since to look the store through costs, too."""

SAID = pa.schema([pa.field("response_ids", TOKEN_IDS), pa.field("finish_reason", pa.string())])
"""An answer without its signal. ``finish_reason`` is null where a prompt came with its response."""


@dataclass(frozen=True)
class Found:
    """A group's rows by what is left to do; every place [n] stands in just one of the three.

    ``answered``: ``answer_schema`` of the wish. ``to_score``: ``SAID``.
    """

    answered: list[Part]
    to_score: Part
    to_ask: Places


class StoreView:
    """The rows of one prompt table in a store, as one wish sees them.

    ``keys``: the table's whole key column [N]. Making one looks through the store.
    """

    def __init__(self, store: TeacherStore, keys: pa.ChunkedArray, wanted: Signal) -> None:
        self._store = store
        self._keys = keys.combine_chunks()
        self._wish = wanted
        self._refused: dict[str, float] = {}  # name -> the moment (monotonic) to try it again
        self._due = math.inf
        self._lock = threading.Lock()
        self._look_through()

    def keys_of(self, rows: NDArray[np.int64]) -> pa.Array:
        """Keys of rows, by row number."""
        return self._keys.take(pa.array(rows))

    def look_up(self, rows: NDArray[np.int64], given: pa.Array) -> Found:
        """Sort ``rows`` [n] by what the store has of them.

        ``given`` [n]: the response a row came with, null where the teacher is to answer.
        """
        self._try_again()
        while True:
            view = self._view  # Another group's thread may look through again.
            catalogue, located = view
            try:
                return self._without_first_try(rows, self._sort(catalogue, located[rows], given))
            except UnusableSegment as error:
                # Bytes that did not come were waited for where they are read (``patiently``), which
                # is as long as a group should stand still: then the others' rows go on.
                with self._lock:
                    if self._view is view:
                        self._refuse(error)
                        self._look_through()

    def _try_again(self) -> None:
        """Look through again where it is time for a segment that was passed over."""
        if time.monotonic() >= self._due:
            with self._lock:
                if time.monotonic() < self._due:
                    return
                try:
                    self._look_through()
                except OSError as error:  # What was seen before still serves.
                    logger.warning("the store could not be looked through again: %s", error)
                    self._due = time.monotonic() + PASSED_OVER_S

    def _refuse(self, error: UnusableSegment) -> None:
        """Leave a segment out: for the life of the view, or for a while where it may come back."""
        logger.warning("%s; its rows are looked for elsewhere, or asked again", error)
        if not isinstance(error, GoneSegment):  # That has left by itself.
            passing = isinstance(error, UnreadableSegment)
            self._refused[error.name] = time.monotonic() + PASSED_OVER_S if passing else math.inf

    def _look_through(self) -> None:
        now = time.monotonic()
        self._refused = {name: due for name, due in self._refused.items() if due > now}
        catalogue = self._store.catalogue(without=self._refused).serving(self._wish)
        for error in catalogue.refused.values():
            self._refuse(error)
        self._due = min(self._refused.values(), default=math.inf)
        self._view = catalogue, catalogue.locate(self._keys)

    def _sort(self, catalogue: Catalogue, where: NDArray[np.int64], given: pa.Array) -> Found:
        """``where`` [n]: the stored row of each, -1 where there is none."""
        serves = [e.footer.origin.signal.serves(self._wish) for e in catalogue.entries]
        held = np.flatnonzero(where >= 0)
        as_asked = np.array(serves, bool)[catalogue.segment[where[held]]]
        served, poorer = held[as_asked], held[~as_asked]
        missing = np.flatnonzero(where < 0)
        comes_along = given.is_valid().to_numpy(zero_copy_only=False)[missing]
        along, to_ask = missing[comes_along], missing[~comes_along]
        answered: list[Part] = []
        if len(served):
            answered.append((served, self._read(catalogue, where[served])))
        said = [(along, _said(given.take(pa.array(along))))]
        if self._wish.kind == "text" and len(along):
            answered.append((along, _as_answers(said.pop()[1])))
        if len(poorer):
            said.append((poorer, self._store.read(catalogue, where[poorer], SAID.names)))
        return Found(answered, in_order(said, SAID), to_ask)

    def _read(self, catalogue: Catalogue, where: NDArray[np.int64]) -> pa.Table:
        """Stored rows as wished, in order."""
        segments = catalogue.segment[where]
        parts = []
        for number in np.unique(segments):
            origin = catalogue.entries[number].footer.origin
            mine = np.flatnonzero(segments == number)
            part = self._store.read(catalogue, where[mine], stored_columns(self._wish))
            parts.append((mine, derive_answers(part, origin.signal, self._wish, origin.vocab_size)))
        return in_order(parts, answer_schema(self._wish))[1]

    def _without_first_try(self, rows: NDArray[np.int64], found: Found) -> Found:
        """Less is left to do where an earlier try of these very rows has published it since."""
        answered = list(found.answered)
        (scored, said), to_ask = found.to_score, found.to_ask
        if (first := self._first_try(rows[scored])) is not None:
            answered.append((scored, first))
            scored, said = scored[:0], said.slice(0, 0)
        if (first := self._first_try(rows[to_ask])) is not None:
            answered.append((to_ask, first))
            to_ask = to_ask[:0]
        return Found(answered, (scored, said), to_ask)

    def _first_try(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """What has been published of just these rows since the store was looked through.

        Only all of them together are looked for: a retried group asks for what its first try did.
        """
        keys = self.keys_of(rows)
        name = segment_name(keys.to_pylist(), self._wish)
        while len(rows) and self._store.exists(name):
            try:
                origin, found = self._store.rows_of(
                    name, pa.chunked_array([keys]), stored_columns(self._wish)
                )
            except (DamagedSegment, GoneSegment) as error:
                logger.warning("%s; its rows are asked again", error)
                return None
            except UnusableSegment as error:  # Then they were published beside it.
                logger.warning("%s; its rows are looked for beside it, or asked again", error)
                name = beside(name)
            else:
                return derive_answers(found, origin.signal, self._wish, origin.vocab_size)
        return None


def in_order(parts: list[Part], schema: pa.Schema) -> Part:
    """Several parts as one."""
    if not parts:
        return np.empty(0, np.int64), schema.empty_table()
    places = np.concatenate([part for part, _ in parts])
    back = np.argsort(places)
    whole = pa.concat_tables([table.cast(schema) for _, table in parts])
    return places[back], whole.take(pa.array(back)).combine_chunks()


def _said(responses: pa.Array) -> pa.Table:
    return pa.table([responses, pa.nulls(len(responses), pa.string())], schema=SAID)


def _as_answers(said: pa.Table) -> pa.Table:
    """Given responses as the ``answer_schema`` of ``text``; they end with a stop token."""
    columns = {
        "response_ids": said["response_ids"],
        "finish_reason": pa.array(["stop"] * len(said), pa.string()),
        "error": pa.nulls(len(said), pa.string()),
    }
    return pa.table(columns, schema=answer_schema(Signal("text")))
