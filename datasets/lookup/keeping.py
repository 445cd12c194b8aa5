"""Keeping a store's index: reading its parts, opening what they lack, and writing new ones.

Imports neither Ray nor torch.
"""

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raystill.base.records import open_own
from raystill.datasets.lookup.index import Index, Listing, Mask, live_in
from raystill.datasets.lookup.part import Described, Part, decoded, encoded, merged, part_of
from raystill.datasets.store.reading import (
    GoneSegment,
    UnreadableSegment,
    UnusableSegment,
    read_each,
)
from raystill.datasets.store.segment import READ_ERRORS, Origin, Provenance
from raystill.datasets.store.store import LISTINGS, READERS, SEGMENTS, Progress, TeacherStore

logger = logging.getLogger(__name__)

FOLDER = "index"
LOCK = "lock"
LOCK_WAIT_S = 1800.0
"""Longest wait for another process that looks through the same store; its work is done then."""
PART_NAME = re.compile(r"[0-9a-f]{32}\.arrow")
WORTH_A_PART = 256
"""Fewest groups of which a part is written: reading those of segments takes so many ms."""
NOTED = 1024
"""Segments of which a process that publishes writes a part; it is the loss if the process dies."""
BATCH = 4096
"""Segments whose keys are in memory one by one before they are merged."""
PART_ROWS = 1 << 21
"""Parts are merged up to so many rows, which bounds the memory that merging takes."""
MANY_PARTS = 8
"""More parts than these of less than a quarter of PART_ROWS are merged."""


class StoreIndex:
    """A process's hold of a store's index; it keeps the parts that it has read."""

    def __init__(self, store: TeacherStore) -> None:
        self._store = store
        self._parts: dict[str, Part] = {}  # by the name of the file
        self._own: list[Part] = []  # of what this process has opened, and not written
        self._distrusted: set[str] = set()

    def distrust(self, name: str) -> None:
        """A segment is not what the index says: it is opened at the next look-through."""
        self._distrusted.add(name)
        self._own = _packed(self._own, without={name})

    def look_through(
        self, without: Collection[str] = (), progress: Progress | None = None
    ) -> Index:
        """The index of the store as it is now, except the segments ``without``.

        ``progress`` is called with (segments opened, segments to open).
        """
        self._read_parts()
        listing = self._listing(without)
        live, missing = self._live(listing)
        # Of segments that are passed over, or in a folder that is away, nobody knows whether they
        # are still there: no part goes for their sake.
        known = len(listing.names) > 0 and not without
        untidy = self._untidy(live[len(self._own) :] if known else [])
        if missing.sum() < WORTH_A_PART and not untidy:
            return self._look_through(listing, without, progress)
        with self._alone() as may_write:
            self._read_parts()
            return self._look_through(self._listing(without), without, progress, may_write)

    def _look_through(
        self,
        listing: Listing,
        without: Collection[str],
        progress: Progress | None,
        may_write: bool = False,
    ) -> Index:
        refused: dict[str, UnusableSegment] = {}
        for again in range(LISTINGS):
            listing = self._listing(without) if again else listing
            missing = self._live(listing)[1] & ~_is_in(listing.names, refused)
            unread = listing.names.filter(pa.array(missing)).to_pylist()
            # A segment that is gone was merged into one that this listing may be the first to show.
            if not unread:
                break
            sizes, changed = listing.sizes[missing].tolist(), listing.changed[missing].tolist()
            stamps = dict(zip(unread, zip(sizes, changed, strict=True), strict=True))
            opened, bad = self._open(stamps, None if again else progress)
            refused |= bad
            self._own = _packed([*self._own, *opened])
        if may_write:
            self._tidy(listing)
        there = set(listing.names.filter(pa.array(_is_in(listing.names, refused))).to_pylist())
        refused = {name: error for name, error in sorted(refused.items()) if name in there}
        return Index([*self._own, *self._parts.values()], self._live(listing)[0], refused)

    def _listing(self, without: Collection[str]) -> Listing:
        files = [info for info in self._store.files() if info.base_name not in without]
        return Listing(
            pa.array([info.base_name for info in files], pa.string()),
            np.array([info.size or 0 for info in files], np.int64),
            np.array([info.mtime_ns or 0 for info in files], np.int64),
        )

    def _live(self, listing: Listing) -> tuple[list[Mask], Mask]:
        """`live_in` of what this process has opened, which comes first, and of the parts."""
        fresh, missing = live_in(listing, self._own)
        left = Listing(
            listing.names.filter(pa.array(missing)),
            listing.sizes[missing],
            listing.changed[missing],
        )
        old, lacking = live_in(left, list(self._parts.values()), self._distrusted)
        missing[missing] = lacking
        return fresh + old, missing

    def _open(
        self, stamps: dict[str, tuple[int, int]], progress: Progress | None
    ) -> tuple[list[Part], dict[str, UnusableSegment]]:
        """Open segments; parts of them, and those that cannot be used.

        stamps: size and time of change of each, by name. Unreadable ones are tried again at the
        end, all at once.
        """
        parts: list[Part] = []
        errors: dict[str, UnusableSegment] = {}

        def read(
            names: list[str], shown: Progress | None, pauses: tuple[float, ...] | None
        ) -> None:
            results = read_each(self._store.keys_of, names, shown, READERS, pauses)
            opened: list[Described] = []
            for name, result in results.items():
                if isinstance(result, UnusableSegment):
                    errors[name] = result
                else:
                    footer = result[0].footer
                    groups = [g.provenance for g in footer.groups]
                    described = list(zip(groups, result[1], strict=True))
                    opened.append((name, stamps[name], footer.origin, described))
            parts.extend(_parts_of(opened))

        names = list(stamps)
        for start in range(0, len(names), BATCH):
            shown = progress and partial(_shifted, progress, start, len(names))
            read(names[start : start + BATCH], shown, ())
        late = [name for name, error in errors.items() if isinstance(error, UnreadableSegment)]
        if late:
            for name in late:
                del errors[name]
            read(late, None, None)
        return parts, {n: e for n, e in errors.items() if not isinstance(e, GoneSegment)}

    def _read_parts(self) -> None:
        """Read the parts that were not read yet, and forget those that are gone."""
        folder = self._store.folder
        for _ in range(LISTINGS):
            names = part_files(self._store)
            self._parts = {n: part for n, part in self._parts.items() if n in names}
            gone = False
            for name in names:
                if name in self._parts:
                    continue
                try:
                    with folder.open_input(f"{FOLDER}/{name}") as file:
                        self._parts[name] = decoded(name, file.read_buffer())
                except FileNotFoundError:  # Merged into another meanwhile.
                    gone = True
                except READ_ERRORS as error:
                    logger.warning("%s of the store's index is not used: %s", name, error)
            if not gone:
                return

    def _untidy(self, live: Sequence[Mask]) -> bool:
        """Whether parts are to be merged, or to be written without what is of no use or wrong.

        live: of each part, as `live_in` has it; none where that is not known.
        """
        parts = self._parts.values()
        if sum(_is_small(part) for part in parts) > MANY_PARTS:
            return True
        if any(_is_in(part.names, self._distrusted).any() for part in parts):
            return True
        return any(self._is_worn(part, keep) for part, keep in zip(parts, live, strict=False))

    def _tidy(self, listing: Listing) -> None:
        """Write what was opened, and merge small, worn and wrong parts."""
        live, _ = self._live(listing)
        own = list(zip(self._own, live, strict=False))
        old = dict(zip(self._parts, live[len(own) :], strict=True))
        small = [name for name, part in self._parts.items() if _is_small(part)]
        merge = set(small) if len(small) > MANY_PARTS else set()
        merge |= {name for name, keep in old.items() if self._is_worn(self._parts[name], keep)}
        worth = _is_worth(self._own) or self._distrusted
        chosen = [(self._parts[name], old[name]) for name in sorted(merge)]
        try:
            written = dict(
                write_part(self._store, part) for part in _joined(chosen + (own if worth else []))
            )
            for name in merge - set(written):
                del self._parts[name]
                with suppress(FileNotFoundError):
                    self._store.folder.delete(f"{FOLDER}/{name}")
        except OSError as error:
            logger.warning("the store's index could not be written: %s", error)
            return
        self._parts |= written
        self._own = [] if worth else self._own
        self._distrusted = set()

    def _is_worn(self, part: Part, keep: Mask) -> bool:
        """Whether most of a part is of no use, or some of it is wrong."""
        rows = int(part.rows[keep[part.segment]].sum())
        wrong = _is_in(part.names, self._distrusted).any()
        return bool(rows * 2 < len(part.group) or not keep.any() or wrong)

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
            for part in _packed(parts):
                write_part(self._store, part)
        except OSError as error:
            logger.warning("the store's index could not be written: %s", error)


def part_files(store: TeacherStore) -> list[str]:
    """Names of the files of a store's index, sorted."""
    selector = pafs.FileSelector(f"{store.folder.root}/{FOLDER}", allow_not_found=True)
    try:
        infos = store.folder.filesystem().get_file_info(selector)
    except OSError as error:  # It is out of reach, or no folder.
        logger.warning("the store's index is not used: %s", error)
        return []
    return sorted(i.base_name for i in infos if PART_NAME.fullmatch(i.base_name))


def write_part(store: TeacherStore, part: Part) -> tuple[str, Part]:
    """Write a part into the index; the name of its file, and the part."""
    name, data = encoded(part)
    store.folder.write_bytes(f"{FOLDER}/{name}", data)
    return name, part


def _is_worth(parts: Sequence[Part]) -> bool:
    return sum(len(part.segment) for part in parts) >= WORTH_A_PART


def _is_small(part: Part) -> bool:
    return len(part.group) * 4 < PART_ROWS


def _is_in(names: pa.Array, among: Collection[str]) -> Mask:
    found = pc.is_in(names, value_set=pa.array(list(among), pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _packed(parts: Sequence[Part], without: Collection[str] = ()) -> list[Part]:
    """The segments of several parts in as few as PART_ROWS allows, but for those ``without``."""
    if len(parts) < 2 and not without:
        return list(parts)
    return list(_joined([(part, ~_is_in(part.names, without)) for part in parts]))


def _parts_of(segments: Sequence[Described]) -> Iterator[Part]:
    """Parts of segments, each of about PART_ROWS rows at most."""
    batch: list[Described] = []
    rows = 0
    for segment in segments:
        more = sum(len(keys) for _, keys in segment[3])
        if batch and rows + more > PART_ROWS:
            yield part_of(batch)
            batch, rows = [], 0
        batch.append(segment)
        rows += more
    if batch:
        yield part_of(batch)


def _joined(chosen: Sequence[tuple[Part, Mask]]) -> Iterator[Part]:
    """The segments chosen of several parts, in parts of about PART_ROWS rows at most."""
    batch: list[tuple[Part, Mask]] = []
    rows = 0
    for part, keep in chosen:
        more = int(part.rows[keep[part.segment]].sum())
        if batch and rows + more > PART_ROWS:
            yield merged(*zip(*batch, strict=True))
            batch, rows = [], 0
        if keep.any():
            batch.append((part, keep))
            rows += more
    if batch:
        yield merged(*zip(*batch, strict=True))


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
