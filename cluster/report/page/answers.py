"""What teacher and student wrote to the same held-out prompts, side by side.

Where the run recorded it, the teacher's answer is shown token by token, the darker the further the
student's probabilities are from the teacher's at that token. Colour is not alone: a token's figure
is its title, and the worst tokens are listed in words. Personal data and keys are masked.
"""

from collections.abc import Sequence
from typing import Any

from raystill.base import formatting
from raystill.base.personal import find, mark, mask
from raystill.base.records import number
from raystill.cluster.report.page.html import Child, Html, element, escape, join, shortened
from raystill.cluster.report.page.read import Record, RunData
from raystill.cluster.report.tables import question

MOST_PROMPTS = 12
MOST_TOKENS = 600
LEVELS = (0.25, 0.5, 1.0, 2.0)
"""Nats from which on a token has the next darker colour."""
WORST = 5


def answers(runs: Sequence[RunData]) -> Html:
    """The whole section."""
    parts: list[Child] = []
    shown = _aligned(runs)
    if not shown:
        return element("p", "No answers were recorded.", class_="nothing")
    if any(_tokens(record, "teacher") for run in runs for record in run.answers):
        parts.append(_legend())
    for number_, (key, by_run) in enumerate(shown[:MOST_PROMPTS]):
        parts.append(_example(key, by_run, runs, opened=number_ < 3))
    if len(shown) > MOST_PROMPTS:
        more = f"{len(shown) - MOST_PROMPTS} more prompts are in answers.jsonl."
        parts.append(element("p", more, class_="note"))
    return join(parts)


Key = tuple[str, str]
"""Prompt and the teacher's answer."""
Pair = tuple[Record | None, Record]
"""The first and the last record of one row; None where there is one only."""


def _aligned(runs: Sequence[RunData]) -> list[tuple[Key, dict[int, Pair]]]:
    """Prompts in the order of the first run that has them, with each run's records."""
    found: dict[Key, dict[int, Pair]] = {}
    for number_, run in enumerate(runs):
        steps = [number(record.get("step")) or 0.0 for record in run.answers]
        first = {
            str(record.get("row")): record
            for record, step in zip(run.answers, steps, strict=True)
            if step == min(steps)
        }
        for record, step in zip(run.answers, steps, strict=True):
            if step != max(steps):
                continue
            before = first.get(str(record.get("row"))) if min(steps) != max(steps) else None
            key = (_text(record, "prompt"), _text(record, "teacher"))
            found.setdefault(key, {})[number_] = (before, record)
    return list(found.items())


def _example(key: Key, by_run: dict[int, Pair], runs: Sequence[RunData], opened: bool) -> Html:
    prompt, teacher = key
    columns: list[Child] = [_answer("teacher", teacher)]
    strips: list[Child] = []
    for number_, (before, after) in by_run.items():
        many = len(runs) > 1
        name = runs[number_].name if many else "student after"
        if before is not None and not many:
            columns.append(_answer("student before", _text(before, "student")))
            strips.append(_coloured("the teacher's answer, before training", before, "teacher"))
        columns.append(_answer(name, _text(after, "student")))
        when = name if many else "after training"
        strips.append(_coloured(f"the teacher's answer, {when}", after, "teacher"))
        strips.append(_coloured(f"the student's own answer, {when}", after, "student"))
    asked = question(prompt)
    drawn = [one for one in strips if one is not None]
    return element(
        "details",
        element("summary", element("bdi", shortened(formatting.one_line(asked, 300)))),
        element("div", *columns, class_="answers"),
        element("div", *drawn, class_="coloured") if drawn else None,
        class_="example",
        open="open" if opened else None,
    )


def _answer(who: str, text: str) -> Html:
    said: Child = escape(shortened(text))
    if not text.strip():
        said = element("em", "(nothing)")
    return element(
        "div",
        element("h4", element("bdi", who)),
        element("div", said, class_="text", dir="auto"),
        class_="answer",
    )


def _tokens(record: Record, who: str) -> list[tuple[str, float]]:
    """(text, nats) of ``who``'s answer; a token without text of its own joins the next."""
    texts, figures = record.get(f"{who}_tokens"), record.get(f"{who}_kl")
    if not isinstance(texts, list) or not isinstance(figures, list) or len(texts) != len(figures):
        return []
    tokens: list[tuple[str, float]] = []
    waiting = 0.0
    for text, value in zip(_masked(texts)[:MOST_TOKENS], figures[:MOST_TOKENS], strict=True):
        nats = max(0.0, number(value) or 0.0) + waiting
        waiting = 0.0
        if str(text) == "":
            waiting = nats
            continue
        tokens.append((str(text), nats))
    if waiting:
        tokens.append(("∎", waiting))
    return tokens


def _mean(record: Record, who: str) -> float | None:
    """Mean nats of the tokens that are shown. Of tokens, of which a shown text may have several."""
    figures = [number(value) for value in record[f"{who}_kl"][:MOST_TOKENS]]
    known = [max(0.0, value) for value in figures if value is not None]
    return sum(known) / len(known) if known else None


def _masked(texts: Sequence[Any]) -> list[str]:
    """The texts of tokens; where they spell personal data, a mark and a dot for each other one."""
    told = [str(text) for text in texts]
    places = iter(find("".join(told)))
    place, marked, end = next(places, None), None, 0
    for number_, text in enumerate(told):
        start, end = end, end + len(text)
        while place is not None and place.end <= start:
            place = next(places, None)
        if place is not None and place.start < end and text:
            told[number_] = mark(place.kind) if marked is not place else "·"
            marked = place
    return told


def _coloured(title: str, record: Record, who: str) -> Html | None:
    tokens = _tokens(record, who)
    if not tokens:
        return None
    spans = [
        element(
            "span", escape(shortened(text, 200)), class_=f"k{_level(nats)}", title=f"{nats:.2f}"
        )
        for text, nats in tokens
    ]
    worst = sorted(tokens, key=lambda token: -token[1])[:WORST]
    listed = join(
        (
            join([element("bdi", f"“{shortened(' '.join(text.split()), 24)}”"), f" {nats:.2f}"])
            for text, nats in worst
        ),
        ", ",
    )
    return element(
        "div",
        element("h4", f"{title}: {formatting.figure(_mean(record, who), 2)} nats a token"),
        element("div", *spans, class_="text tokens", dir="auto"),
        element("p", "furthest: ", listed, class_="said"),
    )


def _level(nats: float) -> int:
    return sum(nats >= level for level in LEVELS)


def _legend() -> Html:
    bounds = [f"below {LEVELS[0]:g}", *(f"{level:g}" for level in LEVELS[:-1])]
    bounds.append(f"{LEVELS[-1]:g} and more")
    samples = (element("span", said, class_=f"k{n}") for n, said in enumerate(bounds))
    return element(
        "p",
        "Colours of tokens: KL(teacher || student) at that token, nats: ",
        join(samples, " "),
        class_="key",
    )


def _text(record: Record, name: str) -> str:
    value: Any = record.get(name)
    return "" if value is None else mask(str(value))
