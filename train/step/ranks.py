"""Collective operations of the student's workers on small objects, flags and numbers.

Every method is collective: all ranks must call it, and in the same order. It uses gloo, also where
gradients are reduced with NCCL: the objects are on the host. A single worker needs no process
group.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The group of the student's workers, seen from one of them.

    Attributes:
        rank: Number of this worker, from 0.
        world_size: Number of workers.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout_s: float = 6 * 3600) -> None:
        """timeout_s: how long a rank waits for the others; not used where gradients use gloo. They
        wait for each other's rows, and so for the teacher, as in ``worker.fit``.
        """
        self.rank = rank
        self.world_size = world_size
        self._group: Any = None
        if world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and reports progress."""
        return self.rank == 0

    def draw_apart(self, seed: int) -> None:
        """From now on this rank draws random numbers of its own; rank 0 goes on with what it has.

        The student is built from one seed on every rank. With that state they would drop the same
        units of different rows.
        """
        if not self.first:
            torch.manual_seed(seed + self.rank)

    def barrier(self) -> None:
        """Waits until all ranks have called this."""
        self.from_first(None)

    def from_first(self, value: Any) -> Any:
        """Returns rank 0's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Returns the values of all ranks in rank order on rank 0, and None on the others."""
        if self.world_size == 1:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, box, dst=0, group=self._group)
        return box

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks in rank order on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def exchange(self, outgoing: Mapping[int, bytes], senders: Sequence[int]) -> dict[int, bytes]:
        """Sends each rank that ``outgoing`` names its bytes; returns those of ``senders``, by rank.

        Every rank calls this, with what the others expect of it.
        """
        sent = {
            to: torch.frombuffer(bytearray(one), dtype=torch.uint8) for to, one in outgoing.items()
        }
        # The sizes first, under a tag of their own.
        lengths = {to: torch.tensor([len(one)]) for to, one in sent.items()}
        works = [dist.isend(one, to, group=self._group, tag=0) for to, one in lengths.items()]
        works += [dist.isend(one, to, group=self._group, tag=1) for to, one in sent.items()]
        received = {}
        for source in senders:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, source, group=self._group, tag=0)
            received[source] = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(received[source], source, group=self._group, tag=1)
        for work in works:
            work.wait()
        return {source: one.numpy().tobytes() for source, one in received.items()}

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return self.sum({"set": float(flag)})["set"] == self.world_size

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each number summed over the ranks, in float64; all ranks must have the same keys."""
        if self.world_size == 1:
            return values
        total = torch.tensor([values[name] for name in values], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return dict(zip(values, total.tolist(), strict=True))
