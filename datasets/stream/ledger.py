"""The ledger: which positions of an epoch the weights have learned from, and which were dropped.

Part of every checkpoint, so weights and ledger agree by construction; what it lacks is the plan.
Pure, imports no Ray.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ledger:
    """Done positions of one epoch of ``num_rows`` rows."""

    def __init__(self, num_rows: int) -> None:
        if num_rows < 0:
            raise ValueError(f"num_rows is {num_rows}; it must be 0 or more")
        self._trained = np.zeros(num_rows, dtype=bool)
        self._dropped: dict[int, str] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return self._trained.size

    @property
    def num_trained(self) -> int:
        """Rows the weights have learned from."""
        return int(self._trained.sum())

    @property
    def dropped(self) -> dict[int, str]:
        """Reason of each dropped position."""
        return dict(self._dropped)

    def mark_trained(self, positions: Iterable[int]) -> None:
        """Note positions as learned; an assertion fails if one was already."""
        marked = _positions(positions)
        self._check_range(marked)
        assert np.unique(marked).size == marked.size, "a position is named twice in one step"
        again = marked[self._trained[marked]]
        assert again.size == 0, f"positions {again[:5].tolist()} were trained on already"
        self._trained[marked] = True

    def mark_dropped(self, reasons: Mapping[int, str]) -> None:
        """Note positions that are never trained on, with the reason; again is no change."""
        marked = _positions(reasons)
        self._check_range(marked)
        both = marked[self._trained[marked]]
        assert both.size == 0, f"positions {both[:5].tolist()} are dropped, but were trained on"
        self._dropped.update({int(position): reason for position, reason in reasons.items()})

    def done(self, position: int) -> bool:
        """Whether a position is trained or dropped."""
        return bool(self._trained[position]) or position in self._dropped

    def missing(self) -> NDArray[np.int64]:
        """Positions neither trained nor dropped, ascending, int64."""
        left = ~self._trained
        left[_positions(self._dropped)] = False
        return np.flatnonzero(left).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: how far all is done, a bit a row beyond that, and what was dropped.

        In ``fixed`` order nothing is done beyond, so there are no bits: the holes of what is done
        are the dropped positions. ``dropped``: positions by reason.
        """
        missing, trained = self.missing(), np.flatnonzero(self._trained)
        done_until = int(missing[0]) if missing.size else self.num_rows
        beyond = self._trained[done_until : trained[-1] + 1 if trained.size else 0]
        bits = zlib.compress(np.packbits(beyond).tobytes()) if beyond.size else b""
        by_reason: dict[str, list[int]] = {}
        for position, reason in sorted(self._dropped.items()):
            by_reason.setdefault(reason, []).append(position)
        return {
            "num_rows": self.num_rows,
            "num_trained": self.num_trained,
            "done_until": done_until,
            "trained_beyond": base64.b64encode(bits).decode("ascii"),
            "dropped": by_reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Ledger":
        """Inverse of ``to_dict``; ValueError if the counts do not agree."""
        ledger = cls(int(data["num_rows"]))
        dropped = {p: reason for reason, ps in data["dropped"].items() for p in ps}
        done_until, beyond = int(data["done_until"]), base64.b64decode(data["trained_beyond"])
        ledger._trained[:done_until] = True
        ledger._trained[_positions(p for p in dropped if p < done_until)] = False
        if beyond:
            bits = np.unpackbits(np.frombuffer(zlib.decompress(beyond), np.uint8))
            room = ledger.num_rows - done_until
            if bits.size >= room + 8 or bits[room:].any():
                raise ValueError(f"the ledger has more bits ({bits.size}) than rows left ({room})")
            ledger._trained[done_until : done_until + bits.size] |= bits[:room].astype(bool)
        if ledger.num_trained != data["num_trained"]:
            raise ValueError(
                f"the ledger says {data['num_trained']} rows were trained on, but its bits hold "
                f"{ledger.num_trained}; the checkpoint is damaged, resume from an earlier one"
            )
        ledger.mark_dropped(dropped)
        return ledger

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ledger):
            return NotImplemented
        same = np.array_equal(self._trained, other._trained)
        return same and self._dropped == other._dropped

    __hash__ = None  # type: ignore[assignment]  # it changes as training goes on

    def _check_range(self, positions: NDArray[np.int64]) -> None:
        outside = positions[(positions < 0) | (positions >= self.num_rows)]
        assert outside.size == 0, (
            f"positions {outside[:5].tolist()} lie outside an epoch of {self.num_rows} rows"
        )


def _positions(values: Iterable[int]) -> NDArray[np.int64]:
    if isinstance(values, np.ndarray):
        return values.astype(np.int64)
    return np.array(list(values), dtype=np.int64)
