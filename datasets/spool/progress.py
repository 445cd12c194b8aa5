"""How far the reading and tokenising of prompts is, for whoever waits for it.

40,000 prompts take some seconds. Who wants to show that passes a ``Progress`` to the functions of
``datasets/prompts``, which call it now and then; nothing there prints.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

Progress = Callable[[str, int, int | None], None]
"""Takes the phase in words, the prompts done, and their total (None while it is not known)."""

BATCH_PROMPTS = 1000

T = TypeVar("T")


class Meter:
    """Counts the prompts of one phase, and reports at its start and after each batch."""

    def __init__(self, progress: Progress | None, phase: str, total: int | None = None) -> None:
        self.progress = progress
        self.phase = phase
        self.total = total
        self.done = 0
        self._report()

    def batches(self, prompts: Iterable[T]) -> Iterator[list[T]]:
        """The prompts in lists of BATCH_PROMPTS. Counting single ones would slow reading down."""
        rest = iter(prompts)
        while batch := list(islice(rest, BATCH_PROMPTS)):
            yield batch
            self.done += len(batch)
            self._report()

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.phase, self.done, self.total)
