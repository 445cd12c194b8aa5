"""Proof that a segment's rows are in other segments, read just before it is removed.

Imports neither Ray nor torch.
"""

from collections.abc import Collection
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc

from raystill.datasets.store.catalogue import KEYS, Stored
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.reading import ImpossibleValues, UnusableSegment
from raystill.datasets.store.segment import Footer, Origin, segment_schema
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.values import impossible_rows

Stamp = tuple[int, int]
"""Size and time of change of a file."""


def refuse_impossible(name: str, rows: pa.Table, origin: Origin) -> None:
    """Raise ImpossibleValues if some of a segment's rows have values that no teacher means."""
    if number := int(impossible_rows(rows, origin.signal, origin.vocab_size).sum()):
        raise ImpossibleValues(
            name, f"{number} of {len(rows)} rows read have logprobs or ids that cannot be"
        )


def problem_of(store: TeacherStore, name: str) -> UnusableSegment | None:
    """The error that reading the whole segment ends with; None if it is sound."""
    try:
        read_whole(store, name)
    except UnusableSegment as error:
        return error
    return None


def read_whole(store: TeacherStore, name: str) -> tuple[Footer, pa.Array]:
    """Read all of a segment; its footer, and the keys of all groups. Raises UnusableSegment."""
    file = store.open(name)
    origin, keys = file.footer.origin, []
    for rows in file.pieces(segment_schema(origin.signal).names):
        refuse_impossible(name, rows, origin)
        keys.extend(rows["key"].chunks)
    return file.footer, pa.concat_arrays([pa.array([], KEYS), *keys])


class Proof:
    """Removal of segments whose rows have just been read, without error, in other ones."""

    def __init__(self, store: TeacherStore, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._read: dict[str, tuple[Stamp, dict[Stored, pa.Array]] | None] = {}

    def remove(
        self, name: str, footer: Footer, ending: str, keys: pa.Array, held_by: Collection[str]
    ) -> bool:
        """Remove a segment if those of ``held_by`` have all of its rows; whether it was removed.

        footer, ending, keys: of the segment, as it was read. Each segment of ``held_by`` is read
        whole once, and must still be there, unchanged, after this one was set aside. So must this
        one have the same footer still, which the ``ending`` of its file tells.
        """
        held = {n: found for n in held_by if (found := self._whole(n)) is not None}
        kinds = [kind for _, of_segment in held.values() for kind in of_segment.items()]
        start = 0
        for group in footer.groups:
            wanted = Stored(footer.origin.signal, group.scored)
            mine, start = keys.slice(start, group.rows), start + group.rows
            there = [of_kind for stored, of_kind in kinds if stored.replaces(wanted)]
            found = pc.is_in(mine, value_set=pa.concat_arrays([*there, mine.slice(0, 0)]))
            if not pc.all(found, min_count=0).as_py():
                return False

        def may_go(opened: str) -> bool:
            self._lease.confirm()
            same = self._store.ending(opened) == ending
            return same and all(self._store.stamp(n) == found[0] for n, found in held.items())

        return self._store.take_away(name, may_go)

    def _whole(self, name: str) -> tuple[Stamp, dict[Stored, pa.Array]] | None:
        """A segment that can be read whole: its stamp, and the keys of its groups of each kind."""
        if name not in self._read:
            self._read[name] = None
            stamp = self._store.stamp(name)
            with suppress(UnusableSegment):
                footer, keys = read_whole(self._store, name)
                signal, start = footer.origin.signal, 0
                of_kind: dict[Stored, list[pa.Array]] = {}
                for group in footer.groups:
                    mine, start = keys.slice(start, group.rows), start + group.rows
                    of_kind.setdefault(Stored(signal, group.scored), []).append(mine)
                if stamp is not None:
                    whole = {kind: pa.concat_arrays(several) for kind, several in of_kind.items()}
                    self._read[name] = stamp, whole
        return self._read[name]
