"""Steady speed of one part, and the window of whole flights that it is taken over."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Side:
    """Steady speed of one part."""

    rows: int
    seconds: float
    tokens: int

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def __add__(self, other: "Side") -> "Side":
        return Side(
            self.rows + other.rows, self.seconds + other.seconds, self.tokens + other.tokens
        )

    def figures(self) -> dict[str, float]:
        """As stored in a result."""
        return {
            **asdict(self),
            "rows_per_s": self.rows_per_s,
            "response_tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        return f"{self.rows_per_s:6.2f} rows/s  {self.tokens_per_s:7.1f} response tokens/s"


def whole_flights(end: int, start: int, flight: int) -> slice:
    """The longest window from ``start`` to ``end`` at most of a whole number of flights.

    Rows asked for at once are answered at once, so rows come in bursts of one flight; a window that
    cuts one in two counts rows without their time, or time without its rows.
    """
    if end - start < flight:
        raise SystemExit(f"{end - start} parts are no whole flight of {flight}; ask for more rows")
    return slice(start, start + (end - start) // flight * flight)


def steady_arrivals(arrivals: Sequence[tuple[float, int, int]], flight: int) -> Side:
    """Steady speed of groups that arrived at (second, rows, tokens), ``flight`` of them at once.

    The first flight and the last are left out. A reader that fetches ahead hands the last group of
    each flight on with the next one, but that of the last with its own, as the stream ends: a
    window that begins after the first flight and ends with the stream lacks the time of one.
    """
    window = whole_flights(len(arrivals) - flight, flight, flight)
    steady = arrivals[window]
    return Side(
        rows=sum(rows for _, rows, _ in steady),
        tokens=sum(tokens for _, _, tokens in steady),
        seconds=steady[-1][0] - arrivals[window.start - 1][0],
    )
