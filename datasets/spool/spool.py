"""Sequences of prompts that may not fit into memory: what of them is not used is in a file.

Up to CHUNK_ROWS items stay in memory. More are written, CHUNK_ROWS at a time, to a temporary file
without a name, which only this process can open and which ends with it. Going through a sequence
in order, or through ascending numbers, reads each chunk once.
"""

import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base.errors import config_error
from raystill.datasets.rows.schema import TOKEN_IDS

CHUNK_ROWS = 2000

T = TypeVar("T")
TokenIds = NDArray[np.int32]


class Chunks(Generic[T]):
    """Objects by number: the first and the one used last are in memory, the others in a file."""

    def __init__(self) -> None:
        self._first: list[T] = []
        self._file: BinaryIO | None = None
        self._places: list[int] = []
        self._used: tuple[int, T] | None = None

    def __len__(self) -> int:
        return len(self._first) + len(self._places)

    def append(self, chunk: T) -> None:
        """Add one. Raises ConfigError where the temporary folder has no room for it."""
        if not self._first:
            self._first.append(chunk)
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="raystill-")  # noqa: SIM115 (our life)
            self._places.append(self._file.seek(0, 2))
            pickle.dump(chunk, self._file, protocol=5)
        except OSError as error:
            raise config_error(
                "TMPDIR",
                f"the prompts do not fit into the temporary folder {tempfile.gettempdir()} "
                f"({error.strerror}); set the environment variable TMPDIR to a folder with room "
                "for the prompt files and twice their token ids",
            ) from error

    def __getitem__(self, number: int) -> T:
        if number < 1:
            return self._first[number]
        if self._used is None or self._used[0] != number:
            assert self._file is not None, number
            self._used = None  # Not two at a time.
            self._file.seek(self._places[number - 1])
            self._used = number, pickle.load(self._file)  # Of a file that only we could write.
        return self._used[1]


class Spool(Sequence[T]):
    """Items in the order in which they were added."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._chunks: Chunks[list[T]] = Chunks()
        self._last: list[T] = []
        self.extend(items)

    def extend(self, items: Iterable[T]) -> None:
        """Add items at the end."""
        for item in items:
            self._last.append(item)
            if len(self._last) == CHUNK_ROWS:
                self._chunks.append(self._last)
                self._last = []

    def chunks(self) -> Iterator[list[T]]:
        """All items, CHUNK_ROWS at a time; the last list may have fewer."""
        for number in range(len(self._chunks)):
            yield self._chunks[number]
        if self._last:
            yield self._last

    def __len__(self) -> int:
        return len(self._chunks) * CHUNK_ROWS + len(self._last)

    def __iter__(self) -> Iterator[T]:
        for chunk in self.chunks():
            yield from chunk

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return Picked(self, np.array(places, np.int64))
        number, place = divmod(places, CHUNK_ROWS)
        return (self._last if number == len(self._chunks) else self._chunks[number])[place]


class Picked(Sequence[T]):
    """Some items of another sequence, by their numbers [n]; none is copied."""

    def __init__(self, items: Sequence[T], numbers: NDArray[np.int64]) -> None:
        self._items = items
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self._items, self._numbers[index])
        return self._items[int(self._numbers[index])]


class TokenLists(Sequence[TokenIds | None]):
    """Token ids int32 [P] of many rows, or None; added CHUNK_ROWS at a time but for the last."""

    def __init__(self) -> None:
        self._chunks: Chunks[pa.ListArray] = Chunks()
        self._lengths: list[NDArray[np.int32]] = []

    def append(self, rows: Sequence[TokenIds | None]) -> None:
        """Add the rows of one chunk."""
        assert len(self) == len(self._chunks) * CHUNK_ROWS, "only the last chunk may have fewer"
        self._chunks.append(token_lists(rows))
        self._lengths.append(np.array([0 if r is None else len(r) for r in rows], np.int32))

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, [n]; 0 for None."""
        return np.concatenate([np.empty(0, np.int32), *self._lengths])

    def __len__(self) -> int:
        return sum(len(lengths) for lengths in self._lengths[-1:]) + CHUNK_ROWS * max(
            0, len(self._lengths) - 1
        )

    def __iter__(self) -> Iterator[TokenIds | None]:
        for number in range(len(self._chunks)):
            chunk = self._chunks[number]
            yield from _arrays(chunk)

    @overload
    def __getitem__(self, index: int) -> TokenIds | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenIds | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Picked(self, np.arange(len(self))[index])
        number, place = divmod(range(len(self))[index], CHUNK_ROWS)
        row = self._chunks[number][place]
        return row.values.to_numpy() if row.is_valid else None

    def take(self, rows: NDArray[np.int64]) -> pa.ListArray:
        """The rows with these numbers, in this order. Fast where the numbers ascend.

        Arrow's own ``take`` would need twice the memory: its pool keeps what it frees for a while.
        """
        number, place = np.divmod(rows, CHUNK_ROWS)
        starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
        parts = list(zip(starts, [*starts[1:], len(rows)], strict=False))
        lengths, valid = np.zeros(len(rows), np.int32), np.ones(len(rows), bool)
        for start, stop in parts:
            lengths[start:stop] = self._lengths[number[start]][place[start:stop]]
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        values = np.empty(offsets[-1], np.int32)
        for start, stop in parts:
            chunk = self._chunks[int(number[start])]
            mine = place[start:stop]
            if chunk.null_count:
                valid[start:stop] = chunk.is_valid().to_numpy(zero_copy_only=False)[mine]
            shift = chunk.offsets.to_numpy()[mine].astype(np.int64) - offsets[start:stop]
            first, last = offsets[start], offsets[stop]
            at = np.arange(first, last) + np.repeat(shift, lengths[start:stop])
            values[first:last] = chunk.values.to_numpy()[at]
        mask = None if valid.all() else pa.array(~valid)
        return pa.ListArray.from_arrays(offsets, values, type=TOKEN_IDS, mask=mask)


class NoTokens(Sequence[None]):
    """None for each of many rows, as `TokenLists` has it."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        return NoTokens(len(range(self._rows)[index])) if isinstance(index, slice) else None

    def lengths(self) -> NDArray[np.int32]:
        """Zeros, all of them the same one."""
        return np.broadcast_to(np.zeros(1, np.int32), (self._rows,))

    def take(self, rows: NDArray[np.int64]) -> pa.ListArray:
        """Nulls."""
        return pa.nulls(len(rows), TOKEN_IDS)


def token_lists(rows: Sequence[TokenIds | None]) -> pa.ListArray:
    """An Arrow array of token id lists, with null for None, without a copy through Python ints."""
    lengths = [0 if ids is None else len(ids) for ids in rows]
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    valid = [ids for ids in rows if ids is not None]
    values = np.concatenate(valid) if valid else np.empty(0, np.int32)
    mask = pa.array([ids is None for ids in rows], pa.bool_()) if len(valid) < len(rows) else None
    return pa.ListArray.from_arrays(offsets, values, type=TOKEN_IDS, mask=mask)


def _arrays(lists: pa.ListArray) -> Iterator[TokenIds | None]:
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    for number in range(len(lists)):
        yield values[offsets[number] : offsets[number + 1]] if valid[number] else None
