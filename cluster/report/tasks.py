"""What ``raystill tasks`` found, as rows: for its own print, the closing table and the page.

Consumes what tasks.json of a run folder holds, which anyone may have edited.
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.console import bounded_tables
from raystill.base.records import mapping, number

MODELS = ("teacher", "before", "student")
WIDTH = 110


def task_rows(found: object) -> list[list[str]]:
    """``task, metric`` | teacher | before | student | share of the teacher's score, in words."""
    tasks = found.get("tasks") if isinstance(found, dict) else None
    rows: list[list[str]] = []
    for task, metrics in _items(tasks):
        for metric, of in _items(metrics):
            if not isinstance(of, dict):
                continue
            share = of.get("share_of_teacher")
            shown = formatting.share(share) if isinstance(share, (int, float)) else "-"
            rows.append([f"{task}, {metric}", *(_score(of.get(name)) for name in MODELS), shown])
    return rows


def failures(found: object) -> list[str]:
    """``before: why it could not be asked`` of each model that failed."""
    failed = found.get("failed") if isinstance(found, dict) else None
    return [f"{name}: {formatting.one_line(reason)}" for name, reason in _items(failed)]


def shares(found: object) -> dict[str, float]:
    """The student's share of the teacher's score at each task, by its first metric that has one.

    Only metrics of which more is better have one. Each document counts once: see `_counted`.
    """
    tasks = mapping(mapping(found).get("tasks"))
    by_task: dict[str, float] = {}
    for task in _counted(tasks, mapping(found).get("names")):
        for _, of in _items(tasks[task]):
            share = of.get("share_of_teacher") if isinstance(of, dict) else None
            if isinstance(share, (int, float)) and not isinstance(share, bool):
                by_task.setdefault(str(task), float(share))
    return by_task


def _counted(tasks: dict[str, Any], names: object) -> list[str]:
    """The tasks that were named, where each of them has scores; else those that have documents.

    The harness gives a group, the groups in it and all of their tasks. A name without scores is a
    tag or a pattern; of what it stands for the tasks have scores. A group has no documents itself.
    """
    named = names if isinstance(names, list) else []
    if named and all(isinstance(name, str) and name in tasks for name in named):
        return named
    return [task for task, metrics in tasks.items() if _documents(metrics)] or list(tasks)


def _documents(metrics: object) -> float:
    """The most documents that any metric of any model is of; 0 where none says."""
    scores = [score for _, of in _items(metrics) for _, score in _items(of)]
    return max((number(mapping(score).get("n")) or 0 for score in scores), default=0)


def _items(value: object) -> list[tuple[Any, Any]]:
    """The items of a mapping; none of anything else."""
    return list(value.items()) if isinstance(value, dict) else []


def _score(score: object) -> str:
    """``0.62 [0.48, 0.76]``; ``-`` for none."""
    if not isinstance(score, dict) or not isinstance(score.get("mean"), (int, float)):
        return "-"
    low, high = score.get("low"), score.get("high")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return formatting.figure(score["mean"], 2)
    return f"{score['mean']:.2f} [{low:.2f}, {high:.2f}]"


HEADINGS = ("", "teacher", "before", "student", "of the teacher's")
CAPTION = "Tasks of lm-evaluation-harness, with its 95 % intervals"


def task_table(found: object) -> Table | None:
    """The table for a terminal; None without a score."""
    rows = task_rows(found)
    if not rows:
        return None
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_tasks(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the table."""
    console = console or Console(
        width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False
    )
    table = task_table(found)
    with bounded_tables(console):
        console.print(CAPTION)
        console.print(table if table is not None else "no scores")
        for failure in failures(found):
            console.print(f"could not be asked: {failure}")
