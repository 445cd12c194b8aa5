"""Figures of the untrained student, for which training need not wait.

They need the teacher's answers to the held-out prompts, which come beside its first answers to
train on, and may take minutes. Until they are there the student trains, and the weights that it
began with are kept in host memory; then they are put back for as long as they are measured.

Waits for: the held-out answers, where figures or a checkpoint would be written before them.
Unblocked by: ``held_out_ready``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from torch import Tensor, nn

from raystill.train.step.ranks import Ranks
from raystill.train.student.sharding import own_rows


class Untrained:
    """Measures a student as it was before its first step, once. Every rank calls every method.

    The kept weights are those that training changes, on this rank: as many bytes as its share of
    them. They are gone before the first checkpoint copies more than that.
    """

    def __init__(
        self,
        ranks: Ranks,
        answered: Any,
        write: Callable[[], None],
        measure: Callable[[], None],
    ) -> None:
        """answered: a Ray reference that is there when the held-out rows are. write, measure: of
        the weights as they are, the answers that need no held-out rows, and then all figures.
        """
        self._ranks, self._answered = ranks, answered
        self._write, self._measure = write, measure
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._written = False

    def write(self) -> None:
        """Have the student answer, which takes a while, unless it has."""
        if not self._written:
            with self._as_they_were():
                self._write()
            self._written = True

    @torch.no_grad()
    def keep(self, model: nn.Module) -> None:
        """Keep the weights as they are before the first step."""
        changing = [w.detach() for w in model.parameters() if w.requires_grad]
        mine = [own_rows(weight)[0] for weight in changing]  # They share the weights' memory.
        self._kept = [(weight, weight.to("cpu", copy=True)) for weight in mine]

    def take(self, *, wait: bool = False) -> bool:
        """Measure the weights that are kept, else the present ones, which stay as they are.

        False: the rows are not answered yet, for which it does not ``wait``.
        """
        there = wait or bool(ray.wait([self._answered], timeout=0)[0])
        if not self._ranks.from_first(there):
            return False
        ray.get(self._answered)
        with self._as_they_were():
            self._measure()
        return True

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the kept weights where the present ones are, which are kept instead."""
        for weight, kept in self._kept:
            present = weight.to("cpu", copy=True)
            weight.copy_(kept)
            kept.copy_(present)
