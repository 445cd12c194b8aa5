"""Memory shared by an engine's worker and its replica: what a worker captured, in blocks.

Where it sits: the worker (``capture.py``) writes with `BlockWriter`, the replica (``takes.py``)
reads with `BlockReader`. The memory has no name in a file system and ends with the two processes.
So captured arrays do not pass through vLLM's calls, which stop the engine while they are copied.

What a request captures is one array of T rows of ``width`` bytes. Its rows lie in blocks of
`BLOCK_BYTES`, as many whole rows in each as fit, and a block belongs to one request. The replica
gives a block back by setting a flag in the shared memory; the worker finds it when it needs one.

The bound: the worker holds the blocks of requests whose arrays were not yet read, at most one of
them not full for each request, and rows on their way from a GPU, at most `PENDING_BYTES` and one
step (``placement.memory.captured_bytes``, which ``check`` tells). Blocks given back are used again
and not returned to the system before the engine ends.

Legend: n rows of all requests in a step.
"""

import itertools
import mmap
import os
import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystill.placement.memory import CAPTURE_BLOCK_BYTES as BLOCK_BYTES
from raystill.placement.memory import CAPTURE_PENDING_BYTES as PENDING_BYTES

GROW_BLOCKS = 256
"""Blocks by which the memory grows at least."""
MAX_BLOCKS = 1 << 20
"""256 GiB. The flags of all blocks stand before the first block."""
NAME_BYTES = 16
HEADER_BYTES = MAX_BLOCKS + mmap.PAGESIZE

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class BlocksHandle:
    """Where a `BlockReader` of the same machine finds the memory.

    path: of the writer's open file. name: random bytes at its beginning, as hexadecimal digits.
    """

    path: str
    name: str

    def plain(self) -> dict[str, str]:
        """As a dictionary, which vLLM's calls can return."""
        return asdict(self)


@dataclass(frozen=True)
class TakenBlocks:
    """A request's array: ``length`` rows of ``width`` bytes in ``blocks``, once ``job`` is done."""

    job: int
    blocks: list[int]
    length: int
    width: int


class BlockWriter:
    """The worker's side. All methods are for one thread."""

    def __init__(self) -> None:
        self._file = os.memfd_create("raystill-capture", os.MFD_CLOEXEC)
        os.ftruncate(self._file, HEADER_BYTES)
        header = mmap.mmap(self._file, HEADER_BYTES)
        self._name = secrets.token_bytes(NAME_BYTES)
        header[:NAME_BYTES] = self._name
        self._progress, self._given_back = _header_arrays(header)
        self._memory = np.empty(0, np.uint8)
        self._num_blocks = 0
        self._free: list[int] = []
        self._jobs = itertools.count(1)
        self._copier = ThreadPoolExecutor(1, "raystill-capture")
        self._pending: deque[tuple[int, Future[None]]] = deque()

    @property
    def handle(self) -> BlocksHandle:
        """What `BlockReader` needs to open the memory."""
        return BlocksHandle(f"/proc/{os.getpid()}/fd/{self._file}", self._name.hex())

    @property
    def held_bytes(self) -> int:
        """Memory that the system has given for the blocks, used or given back."""
        return os.fstat(self._file).st_blocks * 512

    @property
    def used_blocks(self) -> int:
        """Blocks that belong to a request, read or not."""
        self._collect()
        return self._num_blocks - len(self._free)

    def allocate(self) -> int:
        """The number of a block that nobody uses.

        Raises:
            RuntimeError: all ``MAX_BLOCKS`` are in use.
        """
        self._collect()  # Also where others are free: those that were never used take memory.
        if not self._free:
            self._grow()
        return self._free.pop()

    def free(self, blocks: list[int]) -> None:
        """Give back blocks that no reader knows of."""
        self._free += blocks

    def put(self, values: Tensor, blocks: Indices, rows: Indices) -> int:
        """Write rows [n, ..] to row ``rows`` [n] of the blocks ``blocks`` [n]; return the job.

        From a GPU, the rows are written after the call has returned; jobs are done in order, so a
        block may be given back, and get its next owner's rows, while a job for it waits.
        """
        assert len(values) == len(blocks) == len(rows), "one place for each row"
        job = next(self._jobs)
        host, wait = _to_host(values.reshape(len(values), -1).view(torch.uint8))
        target = _as_rows(self._memory, host.shape[1])
        if wait is None and not self._pending:
            _write(target, host, blocks, rows)
            self._progress[0] = job
            return job

        def copy() -> None:
            try:
                if wait is not None:
                    wait()
                _write(target, host, blocks, rows)
                self._progress[0] = job
            except BaseException:
                self._progress[1] = 1  # The readers that wait for this job must not wait for ever.
                raise

        self._pending.append((host.nbytes, self._copier.submit(copy)))
        self._bound_pending()
        return job

    def read(self, taken: TakenBlocks) -> bytes:
        """The array as bytes, for a reader that cannot open the memory. Waits for its job."""
        while self._pending and self._progress[0] < taken.job:
            self._pending.popleft()[1].result()
        return _gather(self._memory, taken).tobytes()

    def close(self) -> None:
        """Forget the memory; a reader keeps what it has opened."""
        self._copier.shutdown()
        os.close(self._file)

    def _bound_pending(self) -> None:
        """Forget jobs that are done; wait for the oldest while too much is on its way."""
        while self._pending:
            _, job = self._pending[0]
            if not job.done() and sum(size for size, _ in self._pending) <= PENDING_BYTES:
                return
            self._pending.popleft()
            job.result()

    def _collect(self) -> None:
        """Take what readers gave back."""
        numbers = np.flatnonzero(self._given_back[: self._num_blocks])
        self._given_back[numbers] = 0
        self._free += numbers.tolist()

    def _grow(self) -> None:
        """Double the memory. What is written to the former mapping is seen in the new one."""
        before, self._num_blocks = self._num_blocks, max(GROW_BLOCKS, 2 * self._num_blocks)
        if self._num_blocks > MAX_BLOCKS:
            raise RuntimeError(
                f"{before} blocks of {BLOCK_BYTES >> 10} KiB with captured hidden states wait to "
                "be read; set a smaller teacher.max_num_seqs or teacher.sampling.max_tokens"
            )
        os.ftruncate(self._file, HEADER_BYTES + self._num_blocks * BLOCK_BYTES)
        self._memory = _map_blocks(self._file)
        self._free += range(self._num_blocks - 1, before - 1, -1)  # The lowest is used first.


class BlockTable:
    """Which blocks each request has, for many requests at once.

    A request has a slot from `add` to `take` or `drop`. Arrays of slots are int64 [m].
    """

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._free: list[int] = []
        self._covered = np.zeros(0, np.int64)
        self._widths = np.zeros(0, np.int64)
        self._jobs = np.zeros(0, np.int64)
        self._num_blocks = np.zeros(0, np.int64)
        self._blocks = np.zeros((0, 1), np.int64)

    def add(self) -> int:
        """A slot for a new request."""
        if not self._free:
            before = len(self._covered)
            self._resize(max(64, 2 * before), self._blocks.shape[1])
            self._free += range(len(self._covered) - 1, before - 1, -1)
        slot = self._free.pop()
        for values in (self._covered, self._widths, self._jobs, self._num_blocks):
            values[slot] = 0
        return slot

    def covered(self, slot: int) -> int:
        """Number of positions from the first on that have been stored without a gap."""
        return int(self._covered[slot])

    def put(self, values: Tensor, slots: Indices, position: Indices, count: Indices) -> None:
        """Store rows [n, ..]: of each slot in turn, ``count`` from ``position`` on.

        A preempted request starts again from its first token: positions may come twice.
        """
        width = values[0].nbytes
        rows, end = rows_per_block(width), position + count
        needed = -(-end // rows)
        if needed.max() > self._blocks.shape[1]:
            self._resize(len(self._blocks), int(2 * needed.max()))
        for i in np.flatnonzero(needed > self._num_blocks[slots]):  # Rare: a block has many rows.
            slot = slots[i]
            for number in range(self._num_blocks[slot], needed[i]):
                self._blocks[slot, number] = self._writer.allocate()
            self._num_blocks[slot] = needed[i]
        positions = consecutive(position, count)
        blocks = self._blocks[np.repeat(slots, count), positions // rows]
        self._jobs[slots] = self._writer.put(values, blocks, positions % rows)
        self._widths[slots] = width
        before = self._covered[slots]
        self._covered[slots] = np.where(position <= before, np.maximum(before, end), before)

    def take(self, slot: int, length: int) -> TakenBlocks:
        """The request's array, whose blocks are the caller's from now on."""
        blocks = self._release(slot)
        return TakenBlocks(int(self._jobs[slot]), blocks, length, int(self._widths[slot]))

    def drop(self, slot: int) -> None:
        """Forget a request, and give its blocks back."""
        self._writer.free(self._release(slot))

    def _release(self, slot: int) -> list[int]:
        self._free.append(slot)
        blocks: list[int] = self._blocks[slot, : self._num_blocks[slot]].tolist()
        return blocks

    def _resize(self, num_slots: int, num_columns: int) -> None:
        more = num_slots - len(self._covered)
        self._covered, self._widths, self._jobs, self._num_blocks = (
            np.pad(values, (0, more))
            for values in (self._covered, self._widths, self._jobs, self._num_blocks)
        )
        self._blocks = np.pad(self._blocks, ((0, more), (0, num_columns - self._blocks.shape[1])))


class BlockReader:
    """The replica's side. Methods may be called from several threads."""

    def __init__(self, handle: BlocksHandle) -> None:
        """Open the writer's memory.

        Raises:
            OSError: it is not on this machine, or belongs to another user.
        """
        self._file = os.open(handle.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = mmap.mmap(self._file, HEADER_BYTES)
        except ValueError as error:
            raise OSError(f"{handle.path} is another file: {error}") from None
        if header[:NAME_BYTES].hex() != handle.name:
            raise OSError(f"{handle.path} is another process's file")
        self._progress, self._given_back = _header_arrays(header)
        self._memory = np.empty(0, np.uint8)

    def is_written(self, taken: TakenBlocks) -> bool:
        """Whether the array can be read.

        Raises:
            RuntimeError: the writer could not copy it.
        """
        if self._progress[1]:
            raise RuntimeError(
                "captured hidden states could not be copied from the GPU; see the engine's log"
            )
        return bool(self._progress[0] >= taken.job)

    def read(self, taken: TakenBlocks) -> NDArray[np.uint8]:
        """A copy of the array, uint8 [length, width]."""
        memory = self._memory
        if taken.blocks and (max(taken.blocks) + 1) * BLOCK_BYTES > len(memory):
            memory = self._memory = _map_blocks(self._file)
        return _gather(memory, taken)

    def give_back(self, blocks: list[int]) -> None:
        """Let the writer use the blocks again; once for each time they were taken."""
        self._given_back[blocks] = 1

    def close(self) -> None:
        """Close the file. What was read stays."""
        os.close(self._file)


def rows_per_block(width: int) -> int:
    """Rows of ``width`` bytes in a block.

    Raises:
        ValueError: none fits.
    """
    if not 0 < width <= BLOCK_BYTES:
        raise ValueError(
            f"a token's hidden state or scores take {width} bytes, expected at most {BLOCK_BYTES}; "
            "set a smaller signal.top_k"
        )
    return BLOCK_BYTES // width


def consecutive(begin: Indices, count: Indices) -> Indices:
    """``count`` [m] numbers from ``begin`` [m] on, of each in turn: int64 [n]."""
    ends = np.cumsum(count)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
    return np.repeat(begin, count) + within


def _header_arrays(header: mmap.mmap) -> tuple[Indices, NDArray[np.uint8]]:
    """Of the shared memory: [jobs done, whether one failed], and a flag for each block."""
    progress = np.frombuffer(header, np.int64, 2, offset=NAME_BYTES)
    return progress, np.frombuffer(header, np.uint8, MAX_BLOCKS, offset=mmap.PAGESIZE)


def _map_blocks(file: int) -> NDArray[np.uint8]:
    """All blocks of the file, as one array of bytes."""
    size = os.fstat(file).st_size - HEADER_BYTES
    return np.frombuffer(mmap.mmap(file, size, offset=HEADER_BYTES), np.uint8)


def _as_rows(memory: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The blocks as rows, uint8 [blocks, rows of a block, width], without a copy."""
    blocks = memory.reshape(-1, BLOCK_BYTES)
    rows = rows_per_block(width)
    return blocks[:, : rows * width].reshape(len(blocks), rows, width)


def _write(target: NDArray[np.uint8], host: Tensor, blocks: Indices, rows: Indices) -> None:
    target[blocks, rows] = host.numpy()


def _gather(memory: NDArray[np.uint8], taken: TakenBlocks) -> NDArray[np.uint8]:
    """A copy of the rows, uint8 [length, width]."""
    result = np.empty((taken.length, taken.width), np.uint8)
    rows = rows_per_block(taken.width)
    for i, block in enumerate(taken.blocks):
        part = result[i * rows : (i + 1) * rows]
        start = block * BLOCK_BYTES
        part.reshape(-1)[:] = memory[start : start + part.nbytes]
    return result


def _to_host(values: Tensor) -> tuple[Tensor, Callable[[], Any] | None]:
    """The values in host memory, and what waits for them; None where they are there already."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied.synchronize
