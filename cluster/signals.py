"""Signals that ask a run to end: the first is a wish, the second an order."""

import os
import signal
from typing import Any


class StopSignals:
    """Turns the first SIGINT/SIGTERM into a flag, and lets the second end the process."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
