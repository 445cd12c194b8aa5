"""Proof that a segment's rows are in other segments, read just before it is removed.

Imports neither Ray nor torch.
"""

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from raystill.datasets.store.catalogue import Stored
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
            name, f"{number} of {len(rows)} rows of a group have logprobs or ids that cannot be"
        )


def problem_of(store: TeacherStore, name: str) -> UnusableSegment | None:
    """The error that reading the whole segment ends with; None if it is sound."""
    try:
        file = store.open(name)
        columns = segment_schema(file.footer.origin.signal).names
        for group in range(len(file.footer.groups)):
            rows = file.read(group, columns)
            refuse_impossible(name, rows, file.footer.origin)
    except UnusableSegment as error:
        return error
    return None


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
            if stamp is not None and problem_of(self._store, name) is None:
                file = self._store.open(name)
                signal = file.footer.origin.signal
                keys: dict[Stored, list[pa.Array]] = {}
                for group, of_group in zip(file.footer.groups, file.keys(), strict=True):
                    keys.setdefault(Stored(signal, group.scored), []).append(of_group)
                self._read[name] = stamp, {k: pa.concat_arrays(v) for k, v in keys.items()}
        return self._read[name]
