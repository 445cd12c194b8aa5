"""What ``raystill draft`` found, for a person: acceptance by position, speed, and what follows.

Consumes what draft.json of a run folder holds.
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.console import bounded_tables

WIDTH = 110
LOSSLESS_NOTE = (
    "A verification reads k + 1 tokens where the teacher alone reads one, so sums are rounded in "
    "another order; where two tokens are nearly as probable, the other one may then be the first."
)


def print_draft(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables and the lines around them."""
    console = console or Console(
        width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False
    )
    with bounded_tables(console):
        for line in _setting(found):
            console.print(line)
        console.print(_acceptance(found))
        console.print(_measured(found))
        for line in _verdict(found):
            console.print(line)
        console.print(_predicted(found))
        console.print(
            "speed-up = mean acceptance length / (1 + k c), c the time of a draft token divided by "
            "that of a teacher's token, where reading k + 1 tokens takes the teacher no longer "
            "than reading one (Leviathan et al. 2023, arXiv:2211.17192)"
        )


def _setting(found: dict[str, Any]) -> list[str]:
    teacher, student = found["teacher_alone"], found["student_alone"]
    where = formatting.plural(found["gpus"], "GPU")
    if not found["gpus"]:
        where = formatting.plural(found["cores"], "core")
    return [
        f"{found['teacher']} with {formatting.path(found['student'])} as its draft model: vLLM "
        f"{found['version']}, {found['dtype']}, {where}, greedy, "
        f"{formatting.plural(found['rows'], 'held-out prompt')}, {found['concurrency']} at a time",
        f"teacher alone {formatting.rate(teacher['tokens_per_s'])} tokens/s, student alone "
        f"{formatting.rate(student['tokens_per_s'])}; a token after the first takes the teacher "
        f"{1000 * teacher['token_s']:.3g} ms, the student {1000 * student['token_s']:.3g} ms: "
        f"cost ratio c = {found['cost_ratio']:.2f}",
        f"the student's most probable token is the teacher's for "
        f"{formatting.share(found['top1_agreement'])} of {formatting.count(teacher['tokens'])} "
        "tokens",
    ]


def _acceptance(found: dict[str, Any]) -> Table:
    table = _table("Acceptance by position, from one pass of the student over the answers")
    longest = max(len(of["acceptance_by_position"]) for of in found["computed"].values())
    for heading in ("k", "mean length", *(str(i + 1) for i in range(longest))):
        table.add_column(heading, justify="right")
    for k, of in found["computed"].items():
        rates = [formatting.figure(rate) for rate in of["acceptance_by_position"]]
        table.add_row(k, formatting.figure(of["mean_acceptance_length"], 2), *rates)
    return table


def _measured(found: dict[str, Any]) -> Table:
    table = _table("Served with the draft")
    for heading in ("k", "mean length", "tokens/s", "speed-up", "identical answers"):
        table.add_column(heading, justify="right")
    for of in found["measured"]:
        answers = of["identical_answers"] + len(of["differences"])
        table.add_row(
            str(of["k"]),
            formatting.figure(of["mean_acceptance_length"], 2),
            formatting.rate(of["tokens_per_s"]),
            f"{of['speed_up']:.2f}",
            f"{of['identical_answers']} of {answers}",
        )
    for k in found["failed"]:
        table.add_row(k, "failed", "-", "-", "-")
    return table


def _verdict(found: dict[str, Any]) -> list[str]:
    """Whether the draft left the answers as they were, and by how little they differ if not."""
    if not found["measured"]:
        return []
    differences = [one for of in found["measured"] for one in of["differences"]]
    if not differences:
        return ["With every k all answers are the teacher's own, token by token."]
    margins = [one["margin_nats"] for one in differences if one["margin_nats"] is not None]
    text = f"{formatting.plural(len(differences), 'answer')} became another one. {LOSSLESS_NOTE}"
    if margins:
        text += (
            " At the first token that differs the teacher's best was ahead of its second by "
            f"{max(margins):.2g} nats at most."
        )
    return [text]


def _predicted(found: dict[str, Any]) -> Table:
    table = _table("Speed-up that follows for other cost ratios c")
    ks = list(found["predicted"][0]["speed_up"])
    for heading in ("c", *(f"k = {k}" for k in ks), "best"):
        table.add_column(heading, justify="right")
    for of in found["predicted"]:
        is_measured = of["cost_ratio"] == found["cost_ratio"]
        table.add_row(
            f"{of['cost_ratio']:.2f}" + (" (here)" if is_measured else ""),
            *(f"{of['speed_up'][k]:.2f}" for k in ks),
            f"k = {of['best_k']}: {of['best_speed_up']:.2f}" if of["best_k"] else "no draft",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="", box=None, pad_edge=False)
