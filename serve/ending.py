"""The end of a replica whose engine has died: what the engine had finished is handed over first.

Where it sits: in the process of a teacher's replica, or of a sampler's. Callers see an actor that
died, and Serve starts another.
"""

import asyncio
import os
from collections.abc import Callable, Iterable

from raystill.base.logs import write_line
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.schema import LOST, NOT_STARTED
from raystill.serve.engine.lifetime import engine_is_dead

EXIT_ENGINE_DEAD = 70
HAND_OVER_S = 1.0
"""From the death of an engine to the end of its replica."""


class Ending:
    """Ends this process once, a moment after its engine died.

    who: what the log calls the replica. clean_up: what is done just before.
    """

    def __init__(self, who: str, clean_up: Callable[[], None] = lambda: None) -> None:
        self._who = who
        self._clean_up = clean_up
        self._begun = False

    def after(self, answers: Iterable[Answer]) -> None:
        """End the process soon where the answers say that their engine died."""
        if any(answer.error in (LOST, NOT_STARTED) for answer in answers):
            self._begin("")

    def after_error(self, error: BaseException) -> bool:
        """Whether the error says so; the process then ends soon, not before others have answers."""
        if engine_is_dead(error):
            self._begin(f" ({error})")
            return True
        return False

    def _begin(self, why: str) -> None:
        if self._begun:
            return
        self._begun = True
        write_line(f"the engine died{why}; this {self._who} exits")
        asyncio.get_running_loop().call_later(HAND_OVER_S, self._exit)

    def _exit(self) -> None:
        try:
            self._clean_up()
        finally:
            os._exit(EXIT_ENGINE_DEAD)
