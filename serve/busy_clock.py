"""How long a replica was at work, for its share of the run's time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyClock:
    """Wall time during which at least one group was in flight."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._since = 0.0
        self._busy_s = 0.0

    @contextmanager
    def group(self) -> Iterator[None]:
        """Marks one group in flight."""
        if self._in_flight == 0:
            self._since = time.monotonic()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += time.monotonic() - self._since

    def take(self) -> float:
        """Busy seconds since the last call."""
        now = time.monotonic()
        if self._in_flight:
            self._busy_s += now - self._since
            self._since = now
        taken, self._busy_s = self._busy_s, 0.0
        return taken
