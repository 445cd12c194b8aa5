"""Numbers, paths and lists as a person reads them: durations, counts, rates, sizes, shares.

Shared by the live view, the report and `check`. ``None`` is shown as ``-``.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from raystill.base.redact import redact

NOTHING = "-"


def duration(seconds: float | None) -> str:
    """Format seconds as minutes and hours: ``0:07``, ``4:05``, ``1:02:03``."""
    if seconds is None:
        return NOTHING
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def count(number: float | None) -> str:
    """Format a whole number with separators: ``1,234``."""
    return NOTHING if number is None else f"{round(number):,}"


def rate(per_second: float | None) -> str:
    """Format a rate with about three significant digits: ``0.42``, ``3.1``, ``270``, ``1,520``."""
    if per_second is None:
        return NOTHING
    digits = 2 if per_second < 1 else 1 if per_second < 100 else 0
    return f"{per_second:,.{digits}f}"


def size(num_bytes: float) -> str:
    """Format bytes in binary units: ``512 B``, ``1.4 KiB``, ``3.0 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def share(fraction: float | None) -> str:
    """Format a fraction as percent: ``43 %``."""
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"


def some(names: Sequence[str], most: int = 10) -> str:
    """Join names by commas; of many the first ones, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def figure(number: float | None, digits: int = 3) -> str:
    """Format a measured number with ``digits`` decimals; without any from 1,000 on."""
    if number is None:
        return NOTHING
    return f"{number:,.{digits if abs(number) < 1000 else 0}f}"


def path(name: str) -> str:
    """Format a path: relative if it is below the current folder, else as it is.

    A URI is shown without credentials.
    """
    if "://" in name:
        return redact(name)
    relative = os.path.relpath(name)
    return name if relative.startswith("..") else relative


def plural(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 row``, ``2 rows``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def reasons(dropped: Mapping[str, int]) -> str:
    """Format counts of dropped rows by reason: ``3 (empty 1, too_long 2)``, or ``0``."""
    total = sum(dropped.values())
    if not total:
        return "0"
    return f"{count(total)} ({', '.join(f'{name} {n}' for name, n in sorted(dropped.items()))})"


def one_line(text: Any, longest: int = 400) -> str:
    """Put text on one line; cut it between words if it is longer than ``longest`` characters."""
    flat = " ".join(redact(str(text)).split())  # Whole: a part would not be recognised.
    if len(flat) <= longest:
        return flat
    return flat[:longest].rsplit(" ", 1)[0] + " …"
