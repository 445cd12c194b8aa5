"""Look-up of a group's rows in the teacher store: answered, to be scored, or to be asked.

One view serves many groups from many threads. It reads the store's catalogue when it is made, again
when a segment turns out to be unusable, and again when a skipped segment is to be retried. Imports
neither Ray nor torch.

Legend: N rows of the prompt table, n rows of a group, T response tokens.
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
from raystill.datasets.store.segment import next_name, segment_name
from raystill.datasets.store.store import Merged, TeacherStore

logger = logging.getLogger(__name__)

Places = NDArray[np.int64]
Part = tuple[Places, pa.Table]
"""Some of a group's rows: their places in the group, ascending, and a table with a row for each."""

RETRY_UNREADABLE_S = 300.0
"""Seconds after which an unreadable segment is tried again. Meanwhile the teacher is asked for its
rows again, which has its price; so has reading the catalogue, which a retry requires."""

RESPONSE_SCHEMA = pa.schema(
    [pa.field("response_ids", TOKEN_IDS), pa.field("finish_reason", pa.string())]
)
"""A response [T] without a signal; ``finish_reason`` is null if it came with its prompt."""


@dataclass(frozen=True)
class Lookup:
    """A group's rows by what the teacher still has to do. Each place is in one of the three."""

    answered: list[Part]  # ``answer_schema`` of the wanted signal
    to_score: Part  # RESPONSE_SCHEMA
    to_ask: Places


class StoreView:
    """Access to the stored answers of one prompt table, with one wanted signal.

    ``keys``: the table's whole key column [N]. The constructor reads the store's catalogue.
    """

    def __init__(self, store: TeacherStore, keys: pa.ChunkedArray, wanted: Signal) -> None:
        self._store = store
        self._keys = keys.combine_chunks()
        self._wanted = wanted
        self._skipped: dict[str, float] = {}  # Name -> time.monotonic() at which to retry it.
        self._due = math.inf
        self._merged: Merged = (None, b"")
        self._lock = threading.Lock()
        self._reload()

    def keys_of(self, rows: NDArray[np.int64]) -> pa.Array:
        """Keys of rows, given as row numbers of the prompt table."""
        return self._keys.take(pa.array(rows))

    def look_up(self, rows: NDArray[np.int64], given: pa.Array) -> Lookup:
        """Sort ``rows`` [n], numbers in the prompt table, by what the store has of them.

        given: [n] responses that came with the prompts; null where the teacher is to answer.
        """
        self._reload_if_due()
        may_be_merged = True
        while True:
            loaded = self._loaded  # One reference: another group's thread may reload meanwhile.
            catalogue, located = loaded
            try:
                lookup, names = self._add_earlier_attempt(
                    rows, self._sort(catalogue, located[rows], given)
                )
                if not may_be_merged or not self._were_merged(names):
                    return lookup
                may_be_merged = False  # Once: a merged segment may be lost as well.
                with self._lock:
                    if self._loaded is loaded:
                        self._reload()
            except UnusableSegment as error:
                # Reading was retried already (``with_retries``): skip the segment, so that the
                # group goes on. If another thread has reloaded, its catalogue is tried first.
                with self._lock:
                    if self._loaded is loaded:
                        self._skip(error)
                        self._reload()

    def _reload_if_due(self) -> None:
        """Read the catalogue again if a skipped segment is to be retried."""
        if time.monotonic() >= self._due:
            with self._lock:
                if time.monotonic() < self._due:
                    return
                try:
                    self._reload()
                except OSError as error:  # The old catalogue is still valid.
                    logger.warning("the store could not be read again: %s", error)
                    self._due = time.monotonic() + RETRY_UNREADABLE_S

    def _skip(self, error: UnusableSegment) -> None:
        """Skip a segment: an unreadable one for ``RETRY_UNREADABLE_S``, any other permanently."""
        logger.warning("%s; its rows are looked up in other segments, or asked again", error)
        if not isinstance(error, GoneSegment):  # A deleted one is not in the next catalogue.
            retried = isinstance(error, UnreadableSegment)
            due = time.monotonic() + RETRY_UNREADABLE_S if retried else math.inf
            self._skipped[error.name] = due

    def _reload(self) -> None:
        """Read the catalogue and locate all keys of the prompt table in it."""
        now = time.monotonic()
        self._skipped = {name: due for name, due in self._skipped.items() if due > now}
        catalogue = self._store.catalogue(without=self._skipped).ordered_for(self._wanted)
        for error in catalogue.refused.values():
            self._skip(error)
        self._due = min(self._skipped.values(), default=math.inf)
        self._loaded = catalogue, catalogue.locate(self._keys)

    def _sort(self, catalogue: Catalogue, where: NDArray[np.int64], given: pa.Array) -> Lookup:
        """Sort a group's rows. where: [n] the stored row of each; -1 where there is none."""
        stored = np.flatnonzero(where >= 0)
        rich_enough = catalogue.serves(self._wanted, where[stored])
        served, poorer = stored[rich_enough], stored[~rich_enough]
        missing = np.flatnonzero(where < 0)
        has_response = given.is_valid().to_numpy(zero_copy_only=False)[missing]
        with_response, to_ask = missing[has_response], missing[~has_response]
        answered: list[Part] = []
        if len(served):
            answered.append((served, self._read(catalogue, where[served])))
        to_score = [(with_response, _responses(given.take(pa.array(with_response))))]
        if self._wanted.kind == "text" and len(with_response):  # There is no signal to score.
            answered.append((with_response, _as_answers(to_score.pop()[1])))
        if len(poorer):
            responses = self._store.read(catalogue, where[poorer], RESPONSE_SCHEMA.names)
            to_score.append((poorer, responses))
        return Lookup(answered, in_order(to_score, RESPONSE_SCHEMA), to_ask)

    def _read(self, catalogue: Catalogue, where: NDArray[np.int64]) -> pa.Table:
        """Stored rows as answers with the wanted signal, in the order of ``where``."""
        segments = catalogue.segment[where]
        parts = []
        for number in np.unique(segments):
            origin = catalogue.entries[number].footer.origin
            places = np.flatnonzero(segments == number)
            part = self._store.read(catalogue, where[places], stored_columns(self._wanted))
            parts.append(
                (places, derive_answers(part, origin.signal, self._wanted, origin.vocab_size))
            )
        return in_order(parts, answer_schema(self._wanted))[1]

    def _were_merged(self, names: list[str]) -> bool:
        """Whether one of the segments was removed by a compaction that put its rows elsewhere."""
        if not names:
            return False
        self._merged = _, listed = self._store.merged(self._merged)
        return any(_lists(listed, name) for name in names)

    def _add_earlier_attempt(
        self, rows: NDArray[np.int64], lookup: Lookup
    ) -> tuple[Lookup, list[str]]:
        """The look-up with the answers that an earlier attempt of this group has published.

        Also the names of segments that it would have published and that are not there.
        """
        answered = list(lookup.answered)
        (to_score, responses), to_ask = lookup.to_score, lookup.to_ask
        absent = []
        published = self._earlier_attempt(rows[to_score])
        if isinstance(published, pa.Table):
            answered.append((to_score, published))
            to_score, responses = to_score[:0], responses.slice(0, 0)
        elif len(to_score):
            absent.append(published)
        published = self._earlier_attempt(rows[to_ask])
        if isinstance(published, pa.Table):
            answered.append((to_ask, published))
            to_ask = to_ask[:0]
        elif len(to_ask):
            absent.append(published)
        return Lookup(answered, (to_score, responses), to_ask), absent

    def _earlier_attempt(self, rows: NDArray[np.int64]) -> pa.Table | str:
        """Answers of exactly these rows that were published since the catalogue was read.

        A retried group asks for the same rows as its earlier attempt, so the name of the segment
        that the attempt published is known. This name, where there is no such segment.
        """
        keys = self.keys_of(rows)
        name = segment_name(keys.to_pylist(), self._wanted)
        while len(rows) and self._store.exists(name):
            try:
                origin, stored = self._store.rows_of(
                    name, pa.chunked_array([keys]), stored_columns(self._wanted)
                )
            except (DamagedSegment, GoneSegment) as error:
                logger.warning(
                    "%s; its rows are looked up in other segments, or asked again", error
                )
                return name
            except UnusableSegment as error:  # The answers were published under the next name.
                logger.warning(
                    "%s; its rows are looked up in other segments, or asked again", error
                )
                name = next_name(name)
            else:
                return derive_answers(stored, origin.signal, self._wanted, origin.vocab_size)
        return name


def _lists(merged: bytes, name: str) -> bool:
    """Whether a segment's name is among those of `TeacherStore.merged`."""
    wanted = bytes.fromhex(name.partition(".")[0])
    place = merged.find(wanted)
    while place % len(wanted) and place >= 0:  # Across two names.
        place = merged.find(wanted, place + 1)
    return place >= 0


def in_order(parts: list[Part], schema: pa.Schema) -> Part:
    """Several parts as one, rows ascending by place."""
    if not parts:
        return np.empty(0, np.int64), schema.empty_table()
    places = np.concatenate([part for part, _ in parts])
    order = np.argsort(places)
    whole = pa.concat_tables([table.cast(schema) for _, table in parts])
    return places[order], whole.take(pa.array(order)).combine_chunks()


def _responses(responses: pa.Array) -> pa.Table:
    """Responses that came with their prompts, as RESPONSE_SCHEMA."""
    return pa.table([responses, pa.nulls(len(responses), pa.string())], schema=RESPONSE_SCHEMA)


def _as_answers(responses: pa.Table) -> pa.Table:
    """Given responses as ``answer_schema`` of ``text``; each ends with a stop token."""
    columns = {
        "response_ids": responses["response_ids"],
        "finish_reason": pa.array(["stop"] * len(responses), pa.string()),
        "error": pa.nulls(len(responses), pa.string()),
    }
    return pa.table(columns, schema=answer_schema(Signal("text")))
