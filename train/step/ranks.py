"""What the student's workers say to each other beside gradients: small objects, flags and sums.

Every call is collective: all ranks make it, in the same order. Objects travel over gloo, also
where gradients travel over NCCL. At world size 1 nothing needs a process group.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The group of workers, seen from one of them."""

    def __init__(self, rank: int = 0, world_size: int = 1, timeout_s: float = 7200.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: Any = None
        if world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and reports progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        self.from_first(None)

    def from_first(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's ``value`` in rank order, on rank 0; None on the others."""
        if self.world_size == 1:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, box, dst=0, group=self._group)
        return box

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return self.sum({"set": float(flag)})["set"] == self.world_size

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each number summed over the ranks, in float64; the keys must be equal everywhere."""
        if self.world_size == 1:
            return values
        total = torch.tensor([values[name] for name in values], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return dict(zip(values, total.tolist(), strict=True))
