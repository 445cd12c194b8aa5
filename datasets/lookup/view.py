"""Look-up of a group's rows in the teacher store: answered, to be scored, or to be asked.

One view serves many groups from many threads. It looks through the store when it is made, again
when a segment turns out to be unusable, and again when a skipped segment is to be retried. Imports
neither Ray nor torch.

Legend: N rows of the prompt table, n rows of a group, T response tokens.
"""

import copy
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.datasets.lookup.index import Found, Index
from raystill.datasets.lookup.keeping import StoreIndex
from raystill.datasets.lookup.rows import LostPart
from raystill.datasets.rows.answers import derive_answers, stored_columns
from raystill.datasets.rows.schema import KEY_BYTES, TOKEN_IDS, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    Names,
    UnreadableSegment,
    UnusableSegment,
    places_in,
    with_retries,
)
from raystill.datasets.store.segment import SegmentFile, next_name, segment_name
from raystill.datasets.store.store import NONE_MERGED, Merged, TeacherStore

logger = logging.getLogger(__name__)

Places = NDArray[np.int64]
Part = tuple[Places, pa.Table]
"""Some of a group's rows: their places in the group, ascending, and a table with a row for each."""

RETRY_UNREADABLE_S = 300.0
"""Seconds after which an unreadable segment is tried again. Meanwhile the teacher is asked for its
rows again, which has its price; so has looking through the store, which a retry requires."""
MOST_STALE = 5
"""How often a look-up opens a segment again that is not what the index says; then it fails."""

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

    ``keys``: the table's whole key column [N], of 16 bytes each. The constructor looks through the
    store. Raises ArrowInvalid for keys of another size.
    """

    def __init__(self, store: TeacherStore, keys: pa.ChunkedArray, wanted: Signal) -> None:
        self._store = store
        self._index = StoreIndex(store)
        # Compared with the store's keys, which are of this type: Arrow's equality is of types too.
        self._keys = keys.combine_chunks().cast(pa.binary(KEY_BYTES))
        self._wanted = wanted
        self._skipped: dict[str, float] = {}  # Name -> time.monotonic() at which to retry it.
        self._damaged: frozenset[tuple[str, int]] = frozenset()
        self._due = math.inf
        self._merged: Merged = NONE_MERGED
        self._lock = threading.Lock()
        self._reload()

    def over(self, keys: pa.Array) -> "StoreView":
        """The same look at the store, over other keys [N]."""
        other = copy.copy(self)
        other._keys = keys.cast(pa.binary(KEY_BYTES))
        return other

    def keys_of(self, rows: NDArray[np.int64]) -> pa.Array:
        """Keys of rows, given as row numbers of the prompt table."""
        return self._keys.take(pa.array(rows))

    def look_through(self) -> None:
        """See what was published since. Raises OSError where the store cannot be read."""
        with self._lock:
            self._reload()

    def look_up(self, rows: NDArray[np.int64], given: pa.Array) -> Lookup:
        """Sort ``rows`` [n], numbers in the prompt table, by what the store has of them.

        given: [n] responses that came with the prompts; null where the teacher is to answer.
        """
        self._reload_if_due()
        may_be_merged = True
        stale: Counter[str] = Counter()
        while True:
            index = self._loaded  # One reference: another group's thread may reload meanwhile.
            try:
                lookup, names = self._add_earlier_attempt(rows, self._sort(index, rows, given))
                if not may_be_merged or not self._were_merged(names):
                    return lookup
                may_be_merged = False  # Once: a merged segment may be lost as well.
                with self._lock:
                    if self._loaded is index:
                        self._reload()
            except StaleIndex as error:  # The index is a cache: the segment is right.
                stale[error.name] += 1
                if stale[error.name] > MOST_STALE:
                    raise
                with self._lock:
                    if self._loaded is index:
                        logger.warning("%s; it is opened again", error)
                        self._index.distrust(error.name)
                        self._reload()
            except LostPart as error:  # Of the index, on another node's disk.
                stale["the index"] += 1
                if stale["the index"] > MOST_STALE:
                    raise
                with self._lock:
                    if self._loaded is index:
                        logger.warning("the store's index is read again: %s", error)
                        self._index.forget()
                        self._reload()
            except UnusableSegment as error:
                # Reading was retried already (``with_retries``): skip the segment, so that the
                # group goes on. If another thread has reloaded, its index is tried first.
                with self._lock:
                    if self._loaded is index:
                        self._skip(error)
                        self._reload()

    def _reload_if_due(self) -> None:
        """Look through the store again if a skipped segment is to be retried."""
        if time.monotonic() >= self._due:
            with self._lock:
                if time.monotonic() < self._due:
                    return
                try:
                    self._reload()
                except OSError as error:  # The old index is still valid.
                    logger.warning("the store could not be read again: %s", error)
                    self._due = time.monotonic() + RETRY_UNREADABLE_S

    def _skip(self, error: UnusableSegment) -> None:
        """Skip a segment: an unreadable one for ``RETRY_UNREADABLE_S``, any other permanently.

        Of one with a damaged group that group alone.
        """
        logger.warning("%s; its rows are looked up in other segments, or asked again", error)
        if isinstance(error, DamagedSegment) and error.group is not None:
            self._damaged |= {(error.name, error.group)}
        elif not isinstance(error, GoneSegment):  # A deleted one is not in the next index.
            retried = isinstance(error, UnreadableSegment)
            due = time.monotonic() + RETRY_UNREADABLE_S if retried else math.inf
            self._skipped[error.name] = due

    def _reload(self) -> None:
        """Look through the store."""
        now = time.monotonic()
        self._skipped = {name: due for name, due in self._skipped.items() if due > now}
        index = self._index.look_through(without=self._skipped)
        for error in index.refused.values():
            self._skip(error)
        self._due = min(self._skipped.values(), default=math.inf)
        self._loaded = replace(index, damaged=self._damaged)

    def _sort(self, index: Index, rows: NDArray[np.int64], given: pa.Array) -> Lookup:
        """Sort a group's rows by where the index has them."""
        keys = self.keys_of(rows)
        found = index.find(keys, self._wanted)
        is_stored = found.segment >= 0
        served, poorer = (np.flatnonzero(is_stored & (found.serves == s)) for s in (True, False))
        missing = np.flatnonzero(~is_stored)
        has_response = given.is_valid().to_numpy(zero_copy_only=False)[missing]
        with_response, to_ask = missing[has_response], missing[~has_response]
        reading = GroupReader(self._store, index, found, keys)
        answered: list[Part] = []
        if len(served):
            answered.append((served, self._read(reading, served)))
        to_score = [(with_response, _responses(given.take(pa.array(with_response))))]
        if self._wanted.kind == "text" and len(with_response):  # There is no signal to score.
            answered.append((with_response, _as_answers(to_score.pop()[1])))
        if len(poorer):
            names = RESPONSE_SCHEMA.names
            read = [(places, part) for _, places, part in reading.read(poorer, names)]
            to_score.append((poorer, in_order(read, RESPONSE_SCHEMA)[1]))
        return Lookup(answered, in_order(to_score, RESPONSE_SCHEMA), to_ask)

    def _read(self, reading: "GroupReader", served: Places) -> pa.Table:
        """Stored rows as answers with the wanted signal, in the order of ``served``."""
        parts = []
        for number, places, part in reading.read(served, stored_columns(self._wanted)):
            origin = reading.index.origin(number)
            derived = derive_answers(part, origin.signal, self._wanted, origin.vocab_size)
            parts.append((places, derived))
        return in_order(parts, answer_schema(self._wanted))[1]

    def _were_merged(self, names: list[str]) -> bool:
        """Whether one of the segments was removed by a compaction that put its rows elsewhere."""
        if not names:
            return False
        self._merged = _, listed = self._store.merged(self._merged)
        return bool((places_in(listed, Names.of(names)) >= 0).any())

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


class StaleIndex(UnusableSegment):
    """The index says of a segment what is not so."""


@dataclass(frozen=True)
class GroupReader:
    """Reads rows [n] with ``keys`` where the index has ``found`` them, and compares the keys."""

    store: TeacherStore
    index: Index
    found: Found
    keys: pa.Array

    def read(
        self, places: Places, columns: Sequence[str]
    ) -> Iterator[tuple[int, Places, pa.Table]]:
        """These columns of some of the rows: the segment's number, places among them, and rows.

        places: ascending, of the n. Raises StaleIndex and UnusableSegment.
        """
        opened: dict[str, SegmentFile] = {}
        names = ["key", *columns]
        both = np.stack([self.found.segment[places], self.found.group[places]], axis=1)
        for segment, group in np.unique(both, axis=0):
            mine = places[(both == (segment, group)).all(axis=1)]
            table = self._group(int(segment), int(group), names, opened)
            at = self.found.place[mine]
            keys = self.keys.take(pa.array(mine))
            rows = table.take(pa.array(np.minimum(at, len(table) - 1))).combine_chunks()
            if not len(table) or not rows["key"].combine_chunks().equals(keys):
                raise StaleIndex(self.index.name(int(segment)), "the index has other rows of it")
            yield int(segment), mine, rows.select(list(columns))

    def _group(
        self, segment: int, group: int, columns: Sequence[str], opened: dict[str, SegmentFile]
    ) -> pa.Table:
        """A group of a segment. ``opened``: files that are open already, by name."""
        name = self.index.name(segment)

        def read() -> pa.Table:
            file = opened.pop(name, None) or self.store.open(name)
            if not self._is_of(file, segment, group):
                raise StaleIndex(name, "the index has another origin of it")
            table = file.read(group, columns)
            opened[name] = file
            return table

        return with_retries(read)

    def _is_of(self, file: SegmentFile, segment: int, group: int) -> bool:
        """Whether a file is what the index says of the segment and the rows found in the group."""
        groups, found = file.footer.groups, self.found
        if group >= len(groups) or file.footer.origin != self.index.origin(segment):
            return False
        mine = (found.segment == segment) & (found.group == group)
        return bool((found.scored[mine] == groups[group].scored).all())


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
