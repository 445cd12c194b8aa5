"""Rows ahead and groups in flight of one pass of the stream; the coordinator's bookkeeping.

A row is *ahead* from the moment its group gets credits until a worker takes its block off the
iterator or it is dropped; a group is *in flight* from its credits to its answers. Plain state
without locks: the coordinator's event loop is the only one to touch it.

A teacher that is faster than the student runs into the bound. Were each row's credit handed out as
it returns, it would go on with a few rows at a time, at the price of a full batch for each of them.
So a bound once reached is left alone until ``refill_rows`` have room, which are then asked at once;
between such bursts the replicas, and the processors they share, are free.
"""

from raystill.cluster.problems import RunError


class Credits:
    """At most ``max_rows_ahead`` rows ahead, and ``max_in_flight`` groups (None: no bound).

    The rows ahead that ``refill_rows`` leave must be enough for a step to be filled from them.
    """

    def __init__(self, max_rows_ahead: int, refill_rows: int = 0) -> None:
        self._max_rows_ahead = max_rows_ahead
        self._refill_rows = refill_rows
        self.max_in_flight: int | None = None
        self.max_ahead = 0
        self.begin(0)

    def begin(self, rows_left: int) -> None:
        """A new pass, over ``rows_left`` rows that have no answer in it yet."""
        self._granted: set[int] = set()
        self._answered: set[int] = set()
        self.rows_left = rows_left
        self.ahead = 0
        self._full = False

    def require_fit(self, rows: int) -> None:
        """RunError for a group that could never get its credits."""
        if rows > self._max_rows_ahead:
            raise RunError(
                f"a group of {rows} rows can never fit into max_rows_ahead "
                f"({self._max_rows_ahead}); raise stream.max_rows_ahead or lower stream.group_rows"
            )

    def has(self, group: int) -> bool:
        """Whether a group has had its credits in this pass."""
        return group in self._granted

    def has_room(self, rows: int) -> bool:
        """Whether a group of ``rows`` may have its credits now."""
        room = self._max_rows_ahead - self.ahead
        self._full = room < (max(rows, self._refill_rows) if self._full else rows)
        in_flight, most = len(self._granted) - len(self._answered), self.max_in_flight
        return not self._full and (most is None or in_flight < most)

    def grant(self, group: int, rows: int) -> None:
        """The group's rows are ahead and in flight."""
        self._granted.add(group)
        self.ahead += rows
        self.max_ahead = max(self.max_ahead, self.ahead)

    def answer(self, group: int, rows: int) -> None:
        """The group has its answers, however often that is said."""
        if group not in self._answered:
            self._answered.add(group)
            self.rows_left -= rows

    def give_back(self, rows: int) -> None:
        """Rows that are no longer ahead."""
        self.ahead -= rows
        assert self.ahead >= 0, f"{-self.ahead} more rows came back than were handed out"
