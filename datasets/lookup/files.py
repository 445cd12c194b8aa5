"""The files of a store's index: reading and writing them, and packing parts into fewer.

Imports neither Ray nor torch.
"""

import logging
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from raystill.datasets.lookup.index import Mask
from raystill.datasets.lookup.part import (
    FILE_NAME,
    Described,
    Part,
    decoded,
    encoded,
    merged,
    part_of,
    rows_in,
)
from raystill.datasets.store.reading import is_in
from raystill.datasets.store.store import TeacherStore

logger = logging.getLogger(__name__)

FOLDER = "index"
PART_ROWS = 1 << 20
"""Parts are merged up to so many rows, which bounds the memory that merging takes."""


def part_files(store: TeacherStore) -> list[str]:
    """Names of the files of a store's index, sorted."""
    selector = pafs.FileSelector(f"{store.folder.root}/{FOLDER}", allow_not_found=True)
    try:
        infos = store.folder.filesystem().get_file_info(selector)
    except OSError as error:  # It is out of reach, or no folder.
        logger.warning("the store's index is not used: %s", error)
        return []
    return sorted(i.base_name for i in infos if FILE_NAME.fullmatch(i.base_name))


def read_part(store: TeacherStore, name: str) -> Part:
    """The part in a file of the index. Raises one of READ_ERRORS where it is none.

    The rows of a large one stay in a local file; those of many small ones would be as many files.
    """
    file = store.folder.open_input(f"{FOLDER}/{name}")
    if not store.folder.is_local or rows_in(name) * 8 < PART_ROWS:
        with file:
            return decoded(name, pa.BufferReader(file.read_buffer()))
    return decoded(name, file)


def write_part(store: TeacherStore, part: Part) -> str:
    """Write a part into the index; the name of its file."""
    name, data = encoded(part)
    store.folder.write_bytes(f"{FOLDER}/{name}", data)
    return name


def small(names: Sequence[str]) -> list[str]:
    """The names of small parts, of which there are to be few."""
    return [name for name in names if rows_in(name) * 2 < PART_ROWS]


def rows_of(parts: Sequence[Part]) -> int:
    """Number of rows of several parts."""
    return sum(len(part.where) for part in parts)


def packed(parts: Sequence[Part], without: Collection[str] = ()) -> list[Part]:
    """The segments of several parts in as few as PART_ROWS allows, but for those ``without``."""
    if len(parts) < 2 and not without:
        return list(parts)
    return list(joined([(part, ~is_in(part.names, without)) for part in parts]))


def parts_of(segments: Sequence[Described]) -> Iterator[Part]:
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


def joined(chosen: Sequence[tuple[Part, Mask]]) -> Iterator[Part]:
    """The segments chosen of several parts, in parts of about PART_ROWS rows at most."""
    batch: list[tuple[Part, Mask]] = []
    rows = 0
    for part, keep in chosen:
        more = int(part.rows[keep[part.segment]].sum())
        if batch and rows + more > PART_ROWS:
            yield merged(batch)
            batch, rows = [], 0
        if keep.any():
            batch.append((part, keep))
            rows += more
    if batch:
        yield merged(batch)
