"""Rows of an epoch that will not come, and how many may not; the coordinator's bookkeeping."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from raystill.cluster.problems import RunError


class Drops:
    """Reason of each dropped position; of ``num_rows`` a share of ``max_fraction`` may be."""

    def __init__(self, num_rows: int, max_fraction: float) -> None:
        self._num_rows = num_rows
        self._max_fraction = max_fraction
        self._most = int(max_fraction * num_rows + 1e-9)
        self.reasons: dict[int, str] = {}

    def begin(self, ledger: Mapping[str, Any]) -> None:
        """What the weights' ledger says was dropped; what came after it is forgotten."""
        self.reasons = {
            position: reason
            for reason, positions in ledger.get("dropped", {}).items()
            for position in positions
        }

    def add(self, reasons: Mapping[int, str]) -> int:
        """Note dropped positions; how many of them are new."""
        new = {p: reason for p, reason in reasons.items() if p not in self.reasons}
        self.reasons.update(new)
        return len(new)

    def by_reason(self) -> Counter[str]:
        """Rows dropped for each reason."""
        return Counter(self.reasons.values())

    def require_few(self) -> None:
        """RunError where more were dropped than may be."""
        if len(self.reasons) <= self._most:
            return
        named = ", ".join(f"{count} {reason}" for reason, count in self.by_reason().most_common())
        raise RunError(
            f"{len(self.reasons)} of {self._num_rows} rows were dropped ({named}), more than the "
            f"{self._most} that stream.max_drop_fraction ({self._max_fraction:g}) "
            "allows; mend or remove those prompts, or raise stream.max_drop_fraction"
        )
