"""What a student is worth beside its teacher, in words: speed, size, and its share of the score.

Consumes what speed.json and tasks.json of a run folder hold, which anyone may have edited. For the
prints of `speed`, the closing table and the page.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.console import bounded_tables
from raystill.base.records import Folder, mapping, number, read_object
from raystill.base.run_folder import SPEED, TASKS
from raystill.cluster.report.tasks import CAPTION, failures, shares, task_table

SPEED_HEADINGS = ("", "teacher", "student", "student's")
WIDTH = 110
Figures = dict[str, Any]


def speed_rows(found: object) -> list[list[str]]:
    """Figure | teacher | student | the student beside the teacher, in words; [] for none."""
    found = mapping(found)
    models = [mapping(mapping(found.get("models")).get(name)) for name in ("teacher", "student")]
    if not all(models):
        return []
    at_once = number(found.get("concurrency"))
    many = "-" if at_once is None else formatting.count(at_once)
    rows = [
        ["parameters", *(_in_millions(number(of.get("parameters"))) for of in models)],
        ["weights in memory", *(_size(of.get("weights_bytes")) for of in models)],
        ["engine's peak memory", *(_size(of.get("peak_bytes")) for of in models)],
        ["of it KV cache", *(_size(of.get("kv_cache_bytes")) for of in models)],
        ["tokens/s, one stream", *_spread(models, "stream_tokens_per_s", formatting.rate)],
        [f"tokens/s, {many} at once", *_spread(models, "tokens_per_s", formatting.rate)],
        ["time to first token, ms", *_spread(models, "first_token_s", _milliseconds)],
    ]
    beside = (
        *(_share(found.get(f"share_of_{size}")) for size in ("parameters", "weights_bytes")),
        _share(found.get("share_of_peak_bytes")),
        "",
        _times(found.get("times_faster_stream"), "faster", "slower"),
        _times(found.get("times_faster"), "faster", "slower"),
        _times(found.get("times_sooner"), "sooner", "later"),
    )
    return [[*row, last] for row, last in zip(rows, beside, strict=True)]


def speed_caption(found: object) -> str:
    """What was measured with which engine."""
    found = mapping(found)
    where = [
        f"{found.get('engine', 'vllm')} {found.get('version', '')}".strip(),
        str(found.get("dtype", "")),
        _placed(found),
    ]
    tokens = number(found.get("tokens"))
    settings = ", ".join(filter(None, where))
    answers = f"answers of {formatting.count(tokens)} tokens to held-out prompts"
    return (
        f"Speed and size in the same engine ({settings}): {answers}, median of "
        f"{_passes(found)} passes [least, most]"
    )


def verdict(speed: object, tasks: object) -> str:
    """One sentence: how much faster, how much smaller, how good. "" where speed is not known."""
    speed = mapping(speed)
    times = number(mapping(speed.get("times_faster")).get("median"))
    if times is None:
        return ""
    at_once = number(speed.get("concurrency"))
    one = number(mapping(speed.get("times_faster_stream")).get("median"))
    parts = [f"{_factor(times)} as fast as its teacher"]
    if at_once is not None and at_once > 1:
        alone = "" if one is None else f", {_factor(one)} one at a time"
        parts[0] += f" ({formatting.count(at_once)} answers at once{alone})"
    smaller = number(speed.get("share_of_parameters"))
    if smaller is not None:
        parts.append(f"{formatting.share(smaller)} of its parameters")
    if scored := shares(tasks):
        mean = sum(scored.values()) / len(scored)
        names = next(iter(scored)) if len(scored) == 1 else f"{len(scored)} tasks, on average"
        parts.append(f"{formatting.share(mean)} of its score at {names}")
    return f"The student: {'; '.join(parts)}."


def sections(folder: Folder) -> Iterator[tuple[str, Table | str]]:
    """Headings and bodies for the closing table, of what was measured of the finished student."""
    tasks = read_object(folder, TASKS) if folder.exists(TASKS) else {}
    speed = read_object(folder, SPEED) if folder.exists(SPEED) else {}
    if scores := task_table(tasks):
        yield CAPTION, scores
    if failed := failures(tasks):
        yield "Tasks that could not be asked", "\n".join(failed)
    if table := speed_table(speed):
        yield speed_caption(speed), table
    if said := verdict(speed, tasks):
        yield "What the student is worth", said


def speed_table(found: object) -> Table | None:
    """The table for a terminal; None without figures."""
    rows = speed_rows(found)
    if not rows:
        return None
    table = Table(box=None, pad_edge=False)
    for column, heading in enumerate(SPEED_HEADINGS):
        table.add_column(heading, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_speed(found: Figures, console: Console | None = None) -> None:
    """Print the table and the sentence."""
    console = console or Console(
        width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False
    )
    with bounded_tables(console):
        console.print(speed_caption(found))
        console.print(speed_table(found) or "no figures")
        console.print(verdict(found, {}))


def _placed(found: Figures) -> str:
    gpus, cores = number(found.get("gpus")), number(found.get("cores"))
    if gpus:
        return formatting.plural(int(gpus), "GPU")
    return "" if cores is None else formatting.plural(int(cores), "core")


def _passes(found: Figures) -> str:
    """``4``, or ``2 and 4`` of teacher and student where a measurement was stopped between."""
    models = mapping(found.get("models"))
    passes = [mapping(models.get(name)).get("passes") for name in ("teacher", "student")]
    numbers = [str(len(of)) if isinstance(of, list) else formatting.NOTHING for of in passes]
    return " and ".join(dict.fromkeys(numbers))


def _in_millions(number: float | None) -> str:
    if number is None:
        return formatting.NOTHING
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(value: object) -> str:
    size = number(value)
    return formatting.NOTHING if size is None or size < 0 else formatting.size(size)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if seconds >= 0.1 else 1}f}"


def _spread(models: list[Figures], name: str, shown: Callable[[float], str]) -> list[str]:
    """``31.2 [30.8, 31.9]`` of each model."""
    cells = []
    for of in models:
        rate = mapping(of.get(name))
        median, low, high = (number(rate.get(part)) for part in ("median", "low", "high"))
        cell = formatting.NOTHING if median is None else shown(median)
        if median is not None and low is not None and high is not None:
            cell += f" [{shown(low)}, {shown(high)}]"
        cells.append(cell)
    return cells


def _share(value: object) -> str:
    return formatting.share(number(value))


def _factor(times: float) -> str:
    return f"{times:.{2 if times < 10 else 0}f} x"


def _times(value: object, more: str, less: str) -> str:
    """``1.31 x faster``, ``1.43 x slower``."""
    median = number(mapping(value).get("median"))
    if median is None or median <= 0:
        return formatting.NOTHING
    return f"{_factor(median)} {more}" if median >= 1 else f"{_factor(1 / median)} {less}"
