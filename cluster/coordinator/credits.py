"""The coordinator's bookkeeping of one pass of the stream: rows ahead, groups in flight, drops.

A row is *ahead* from the moment its group gets credits until a worker takes its block off the
iterator or it is dropped; a group is *in flight* from its credits to its answers. Plain state
without locks: the coordinator's event loop is the only one to touch it.

A teacher that is faster than the student runs into the bound. Were each row's credit handed out as
it returns, it would go on with a few rows at a time, at the price of a full batch for each of them.
So a bound once reached is left alone until ``refill_rows`` have room, which are then asked at once;
between such bursts the replicas, and the processors they share, are free. The last of a pass is as
large as what is left.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raystill.base.errors import RunError
from raystill.datasets.rows.schema import FILTERED


def parts_of(max_rows_ahead: int, at_once: Mapping[str, int]) -> dict[str, int]:
    """Each teacher's part of the bound on rows ahead, by the rows that its replicas work on."""
    whole = sum(at_once.values())
    return {name: max_rows_ahead * rows // whole for name, rows in at_once.items()}


class Credits:
    """At most ``max_rows_ahead`` rows ahead, and ``max_in_flight`` groups (None: no bound).

    ``beside_held_out``: a bound on groups in flight of its own, while held-out rows are answered.
    ``before_held_out``: so many groups are answered before these are asked for, and may be in
    flight until then.

    ``refill_rows``: the bound less these must be enough for a step to be filled. Of a bounded
    flight half is refilled at most. ``parts``: rows that each of several teachers may have in
    flight (`parts_of`), so that one that does not answer leaves the others theirs.
    """

    def __init__(
        self,
        max_rows_ahead: int,
        refill_rows: int = 0,
        parts: Mapping[str, int] | None = None,
        beside_held_out: int | None = None,
        before_held_out: int = 0,
    ) -> None:
        self.max_rows_ahead = max_rows_ahead
        self._refill_rows = refill_rows
        self._parts = dict(parts or {})
        self.max_in_flight: int | None = None
        self.beside_held_out = beside_held_out
        self.before_held_out = before_held_out
        self.max_ahead_seen = 0
        self.begin(0)

    def begin(self, rows_left: int) -> None:
        """A new pass, over ``rows_left`` rows that have no answer in it yet."""
        self._granted: set[int] = set()
        self._answered: set[int] = set()
        self._of_teacher: dict[int, tuple[str, int]] = {}  # Of groups in flight, with their rows.
        self._in_flight: Counter[str] = Counter()
        self.rows_left = rows_left
        self.ahead = 0
        self._full = False  # The bound was reached, and a burst has no room yet.

    @property
    def may_ask_held_out(self) -> bool:
        """Whether the groups that come before the held-out rows are answered, or none are left."""
        return len(self._answered) >= self.before_held_out or self.rows_left <= 0

    def require_fit(self, rows: int) -> None:
        """RunError for a group that could never get its credits."""
        if rows > self.max_rows_ahead:
            raise RunError(
                f"a group of {rows} rows can never fit into max_rows_ahead "
                f"({self.max_rows_ahead}); raise stream.max_rows_ahead or lower stream.group_rows"
            )

    def may_have(self, group: int, rows: int) -> bool:
        """Whether a group of ``rows`` has its credits or may have them now."""
        return group in self._granted or self._has_room(rows)

    def first_of(self, offers: Sequence[tuple[int, int, str]]) -> tuple[int, int, str] | None:
        """The first group whose teacher may be asked for it now; None: there is none.

        offers: number, rows and teacher of each. One that is larger than the part goes alone.
        """
        for group, rows, name in offers:
            flying, part = self._in_flight[name], self._parts[name]
            if (not flying or flying + rows <= part) and self.may_have(group, rows):
                return group, rows, name
        return None

    def _has_room(self, rows: int) -> bool:
        in_flight = len(self._granted) - len(self._answered)
        beside = self.beside_held_out
        if beside is not None and not self.may_ask_held_out:
            beside = max(beside, self.before_held_out)
        bounds = [n for n in (self.max_in_flight, beside) if n is not None]
        most = min(bounds, default=None)
        refill = min(self._refill_rows, self.rows_left - self._in_flight.total())
        if most is not None:
            refill = min(refill, most * rows // 2)
        room = self.max_rows_ahead - self.ahead
        self._full = room < (max(rows, refill) if self._full else rows)
        return not self._full and (most is None or in_flight < most)

    def grant(self, group: int, rows: int, teacher: str = "") -> None:
        """The group's rows are ahead and in flight, however often that is said."""
        if group not in self._granted:
            self._granted.add(group)
            self._of_teacher[group] = (teacher, rows)
            self._in_flight[teacher] += rows
            self.ahead += rows
            self.max_ahead_seen = max(self.max_ahead_seen, self.ahead)

    def answer(self, group: int, rows: int) -> None:
        """The group has its answers, however often that is said."""
        if group not in self._answered:
            self._answered.add(group)
            self.rows_left -= rows
            teacher, flying = self._of_teacher.pop(group, ("", 0))
            self._in_flight[teacher] -= flying

    def give_back(self, rows: int) -> None:
        """Rows that are no longer ahead; an assertion fails where more come back than are."""
        too_many = max(0, rows - self.ahead)
        self.ahead -= rows - too_many  # Also then: those who wait must not wait for ever.
        assert too_many == 0, f"{too_many} more rows came back than were handed out"


class Drops:
    """Reason of each dropped position, of an epoch of ``num_rows``.

    A share of ``max_fraction`` may have no usable answer, and a share of ``max_rejected`` may be
    rejected by filters.
    """

    def __init__(self, num_rows: int, max_fraction: float, max_rejected: float = 1.0) -> None:
        self._num_rows = num_rows
        self._max_fraction = max_fraction
        self._max_rejected = max_rejected
        self.begin({})

    def begin(self, ledger: Mapping[str, Any]) -> None:
        """What the weights' ledger says was dropped; what came after it is forgotten."""
        self.reasons = {
            position: reason
            for reason, positions in ledger.get("dropped", {}).items()
            for position in positions
        }
        self._counts = Counter(self.reasons.values())

    def among(self, positions: Sequence[int]) -> list[int]:
        """Those of the positions that are dropped."""
        return [position for position in positions if position in self.reasons]

    def add(self, reasons: Mapping[int, str]) -> int:
        """Note dropped positions; how many of them are new."""
        new = {p: reason for p, reason in reasons.items() if p not in self.reasons}
        self.reasons.update(new)
        self._counts.update(new.values())
        return len(new)

    def by_reason(self) -> Counter[str]:
        """Rows without a usable answer, for each reason."""
        return Counter({r: n for r, n in self._counts.items() if not r.startswith(FILTERED)})

    def by_filter(self) -> Counter[str]:
        """Rows that filters have rejected, for each filter's name."""
        start = len(FILTERED)
        return Counter({r[start:]: n for r, n in self._counts.items() if r.startswith(FILTERED)})

    def require_few(self) -> None:
        """RunError where more were dropped or rejected than may be."""
        self._require(
            self.by_reason(),
            self._max_fraction,
            "dropped",
            "stream.max_drop_fraction",
            "mend or remove those prompts, or raise stream.max_drop_fraction",
        )
        self._require(
            self.by_filter(),
            self._max_rejected,
            "rejected by filters",
            "filters.max_rejected_fraction",
            "loosen those filters (in a new run folder: the answers are stored and are not asked "
            "again), or raise filters.max_rejected_fraction",
        )

    def _require(
        self, counts: Counter[str], share: float, what: str, setting: str, remedy: str
    ) -> None:
        total, most = counts.total(), int(share * self._num_rows + 1e-9)
        if total <= most:
            return
        named = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise RunError(
            f"{total} of {self._num_rows} rows were {what} ({named}), more than the {most} that "
            f"{setting} ({share:g}) allows; {remedy}"
        )


class RejectedByEpoch:
    """Rows that filters rejected in each epoch, each row once however often it was answered."""

    def __init__(self) -> None:
        self._finished: dict[int, int] = {}
        self._running: int | None = None

    def begin(self, epoch: int, rejected: int) -> None:
        """An epoch begins or is restored; ``rejected``: rows of the one that was running so far.

        What is known of a later one is forgotten: a restored run comes to it again.
        """
        if self._running is not None:
            self._finished[self._running] = rejected
        self._finished = {e: rows for e, rows in self._finished.items() if e < epoch}
        self._running = epoch

    def with_running(self, rejected: int) -> dict[int, int]:
        """Rows by epoch, with those of the running one."""
        return self._finished | ({} if self._running is None else {self._running: rejected})
