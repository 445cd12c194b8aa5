"""Keeping a store's index: reading its parts, opening what they lack, and writing new ones.

Imports neither Ray nor torch.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa

from raystill.base.records import open_own
from raystill.datasets.lookup import files
from raystill.datasets.lookup.files import (
    FOLDER,
    joined,
    packed,
    part_files,
    parts_of,
    read_part,
    rows_of,
    small,
    write_part,
)
from raystill.datasets.lookup.index import Index, Mask, live_in
from raystill.datasets.lookup.part import Described, Part, merged, part_of, rows_in
from raystill.datasets.lookup.rows import LostPart
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.reading import (
    GoneSegment,
    Listing,
    UnreadableSegment,
    UnusableSegment,
    is_in,
    read_each,
)
from raystill.datasets.store.segment import READ_ERRORS
from raystill.datasets.store.store import LISTINGS, READERS, SEGMENTS, Progress, TeacherStore

logger = logging.getLogger(__name__)

LOCK = "lock"
LOCK_WAIT_S = 1800.0
"""Longest wait for another process that looks through the same store; its work is done then."""
WORTH_A_PART = 256
"""Fewest groups of which a part is written: reading those of segments takes so many ms."""
NOTED = 1024
"""Segments of which a process that publishes writes a part; it is the loss if the process dies."""
BATCH = 4096
"""Segments whose keys are in memory one by one before they are merged."""
MANY_PARTS = 8
"""More parts than these of less than half of PART_ROWS (small ones) are merged."""


class StoreIndex:
    """A process's hold of a store's index; it keeps the parts that it has read."""

    def __init__(self, store: TeacherStore) -> None:
        self._store = store
        self._parts: dict[str, Part] = {}  # by the name of the file
        self._own: list[Part] = []  # of what this process has opened, and not written
        self._distrusted: set[str] = set()
        self._unusable: set[str] = set()  # files that are no parts

    def distrust(self, name: str) -> None:
        """A segment is not what the index says: it is opened at the next look-through."""
        self._distrusted.add(name)
        self._own = packed(self._own, without={name})

    def forget(self) -> None:
        """Files of the index can no longer be read: they are opened anew, or done without."""
        self._parts.clear()

    def look_through(
        self, without: Collection[str] = (), progress: Progress | None = None
    ) -> Index:
        """The index of the store as it is now, except the segments ``without``.

        ``progress`` is called with (segments opened, segments to open).
        """
        for _ in range(LISTINGS):
            with suppress(LostPart):
                return self._looked_through(without, progress)
            self.forget()
        return self._looked_through(without, progress)

    def _looked_through(self, without: Collection[str], progress: Progress | None) -> Index:
        if self._too_many():
            with self._alone() as may_write:
                if may_write:  # Before they are read: all of them are too many to hold.
                    self._merge_small()
        self._read_parts()
        listing = self._store.listing(without)
        if self._is_in_order(listing, without):
            return self._look_through(listing, without, progress)
        del listing  # Two of them at a time are as much as all else.
        with self._alone() as may_write:
            self._read_parts()
            return self._look_through(self._store.listing(without), without, progress, may_write)

    def _is_in_order(self, listing: Listing, without: Collection[str]) -> bool:
        """Whether nothing is to be written: few segments are in no part, and no part is worn."""
        live, missing = self._live(listing)
        # Of segments that are passed over, or in a folder that is away, nobody knows whether they
        # are still there: no part goes for their sake.
        known = len(listing.names) > 0 and not without
        old = live[len(self._own) :] if known else []
        wrong = any(is_in(part.names, self._distrusted).any() for part in self._parts.values())
        worn = any(map(self._is_worn, self._parts.values(), old))
        return missing.sum() < WORTH_A_PART and not wrong and not worn

    def _look_through(
        self,
        listing: Listing,
        without: Collection[str],
        progress: Progress | None,
        may_write: bool = False,
    ) -> Index:
        refused: dict[str, UnusableSegment] = {}
        for again in range(LISTINGS):
            listing = self._store.listing(without) if again else listing
            missing = self._live(listing)[1] & ~is_in(listing.names, refused)
            # A segment that is gone was merged into one that this listing may be the first to show.
            if not missing.any():
                break
            shown = None if again else progress
            refused |= self._open(listing.chosen(missing), shown, may_write)
        if may_write:
            self._tidy(listing)
        there = set(listing.names.chosen(is_in(listing.names, refused)))
        refused = {name: error for name, error in sorted(refused.items()) if name in there}
        return Index([*self._own, *self._parts.values()], self._live(listing)[0], refused)

    def _live(self, listing: Listing) -> tuple[list[Mask], Mask]:
        """`live_in` of what this process has opened, which comes first, and of the parts."""
        if not self._own:
            return live_in(listing, list(self._parts.values()), self._distrusted)
        fresh, missing = live_in(listing, self._own)
        left = listing.chosen(missing)
        old, lacking = live_in(left, list(self._parts.values()), self._distrusted)
        missing[missing] = lacking
        return fresh + old, missing

    def _open(
        self, listing: Listing, progress: Progress | None, may_write: bool
    ) -> dict[str, UnusableSegment]:
        """Open segments, and have parts of them; those that cannot be used.

        Unreadable ones are tried again at the end, all at once.
        """
        errors: dict[str, UnusableSegment] = {}

        def read(
            stamps: dict[str, tuple[int, int]],
            shown: Progress | None,
            pauses: tuple[float, ...] | None,
        ) -> None:
            results = read_each(self._store.keys_of, list(stamps), shown, READERS, pauses)
            opened: list[Described] = []
            for name, result in results.items():
                if isinstance(result, UnusableSegment):
                    errors[name] = result
                else:
                    footer = result[0].footer
                    groups = [g.provenance for g in footer.groups]
                    described = list(zip(groups, result[1], strict=True))
                    opened.append((name, stamps[name], footer.origin, described))
            self._own = packed([*self._own, *parts_of(opened)])

        done = 0
        for some in listing.together(BATCH):
            shown = progress and partial(_shifted, progress, done, len(listing.sizes))
            read(_stamps(some), shown, ())
            done += len(some.sizes)
            if may_write and not self._distrusted and rows_of(self._own) >= files.PART_ROWS:
                self._write_own()
        late = [name for name, error in errors.items() if isinstance(error, UnreadableSegment)]
        if late:
            for name in late:
                del errors[name]
            read(_stamps(listing.chosen(is_in(listing.names, late))), None, None)
        return {n: e for n, e in errors.items() if not isinstance(e, GoneSegment)}

    def _read_parts(self) -> None:
        """Read the parts that were not read yet, and forget those that are gone."""
        for _ in range(LISTINGS):
            names = part_files(self._store)
            self._parts = {n: part for n, part in self._parts.items() if n in names}
            gone = False
            for name in names:
                if name in self._parts:
                    continue
                try:
                    self._parts[name] = read_part(self._store, name)
                except FileNotFoundError:  # Merged into another meanwhile.
                    gone = True
                except READ_ERRORS as error:
                    logger.warning("%s of the store's index is not used: %s", name, error)
            if not gone:
                return

    def _merge_small(self) -> None:
        """Merge the small parts, some at a time."""
        batch: list[str] = []
        rows = 0
        for name in self._too_many():
            if rows + rows_in(name) > files.PART_ROWS:
                self._merge(batch)
                batch, rows = [], 0
            batch.append(name)
            rows += rows_in(name)
        self._merge(batch)

    def _too_many(self) -> list[str]:
        """Names of the small parts, if they are too many."""
        names = [n for n in small(part_files(self._store)) if n not in self._unusable]
        return names if len(names) > MANY_PARTS else []

    def _merge(self, names: list[str]) -> None:
        """Write the parts in these files as one, and remove them."""
        read: list[str] = []

        def parts() -> Iterator[tuple[Part, Mask]]:  # Each is let go of when it is merged.
            for name in names:
                try:
                    part = read_part(self._store, name)
                except READ_ERRORS as error:
                    logger.warning("%s of the store's index is not used: %s", name, error)
                    self._unusable.add(name)
                else:
                    read.append(name)
                    yield part, np.ones(len(part.names), bool)

        def whole() -> Iterator[Part]:
            each = parts()
            for first in each:
                yield merged(chain([first], each))

        self._replace(read, whole, keep=False)

    def _replace(
        self, names: Collection[str], parts: Callable[[], Iterable[Part]], keep: bool = True
    ) -> bool:
        """Write parts, and remove the files of these names; False where nothing can be written.

        They are read again before anything goes. keep: and stay in memory.
        """
        try:
            written = [write_part(self._store, part) for part in parts()]
            for name in written:
                part = read_part(self._store, name)
                if keep:
                    self._parts[name] = part
                del part
            for name in set(names) - set(written):
                self._parts.pop(name, None)
                with suppress(FileNotFoundError):
                    self._store.folder.delete(f"{FOLDER}/{name}")
        except LostPart:
            raise
        except (OSError, ValueError) as error:
            logger.warning("the store's index could not be written: %s", error)
            return False
        return True

    def _write_own(self) -> None:
        if self._replace([], lambda: self._own):
            self._own = []

    def _tidy(self, listing: Listing) -> None:
        """Write what was opened, and parts that are worn or wrong without what is of no use."""
        live, _ = self._live(listing)
        own = list(zip(self._own, live, strict=False))
        old = dict(zip(self._parts, live[len(own) :], strict=True))
        worn = [name for name, keep in old.items() if self._is_worn(self._parts[name], keep)]
        wrong = {n for n in old if is_in(self._parts[n].names, self._distrusted).any()}
        worth = _is_worth(self._own) or self._distrusted
        chosen = [(self._parts[name], old[name]) for name in sorted({*worn, *wrong})]
        whole = partial(joined, chosen + (own if worth else []))
        if self._replace({*worn, *wrong}, whole):
            self._own = [] if worth else self._own
            self._distrusted = set()

    @staticmethod
    def _is_worn(part: Part, keep: Mask) -> bool:
        """Whether most of a part is of no use."""
        rows = int(part.rows[keep[part.segment]].sum())
        return bool(rows * 2 < len(part.where) or not keep.any())

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Be the only one to open many segments of a local store; whether parts can be written.

        Another process that does so is waited for: it does the work.
        """
        folder = self._store.folder
        if not folder.is_local:
            yield folder.exists(SEGMENTS)
            return
        path = f"{folder.root}/{FOLDER}"
        try:
            os.makedirs(path, exist_ok=True)
            file = open_own(f"{path}/{LOCK}")
        except OSError as error:
            logger.warning("the store's index cannot be written: %s", error)
            yield False
            return
        with file:
            _lock(file.fileno())
            yield True


class Notes:
    """Notes of the segments that a process publishes, so that nobody need open them.

    ``enough`` segments make a part. What was not yet written is lost with the process, and these
    segments are then opened.
    """

    def __init__(self, store: TeacherStore, enough: int = NOTED) -> None:
        self._store = store
        self._enough = enough
        self._parts: list[Part] = []
        self._lock = threading.Lock()

    def add(self, name: str, origin: Origin, groups: Sequence[tuple[Provenance, pa.Array]]) -> None:
        """Note a segment. groups: provenance and keys of each."""
        stamp = self._store.stamp(name)
        if stamp is None:
            return
        part = part_of([(name, stamp, origin, groups)])
        with self._lock:
            self._parts.append(part)
            if len(self._parts) < self._enough:
                return
            parts, self._parts = self._parts, []
        self._write(parts)

    def write(self) -> None:
        """Write what is noted, if that is worth a part."""
        with self._lock:
            parts, self._parts = self._parts, []
        if _is_worth(parts):
            self._write(parts)

    def _write(self, parts: list[Part]) -> None:
        try:
            for part in packed(parts):
                write_part(self._store, part)
        except OSError as error:
            logger.warning("the store's index could not be written: %s", error)


def _is_worth(parts: Sequence[Part]) -> bool:
    return sum(len(part.segment) for part in parts) >= WORTH_A_PART


def _stamps(listing: Listing) -> dict[str, tuple[int, int]]:
    """Size and time of change of each segment, by name."""
    stamps = zip(listing.sizes.tolist(), listing.changed.tolist(), strict=True)
    return dict(zip(listing.names, stamps, strict=True))


def _shifted(progress: Progress, start: int, total: int, done: int, _: int) -> None:
    progress(start + done, total)


def _lock(descriptor: int) -> None:
    """Lock a file; without it where the file system has no locks, or another takes for ever."""
    until = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return
