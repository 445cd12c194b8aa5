"""What was learned: held-out figures before and after, beside baselines, and the curves."""

from collections.abc import Sequence

from raystill.base import formatting
from raystill.base.records import number
from raystill.cluster.report.page.charts import Series, line_chart
from raystill.cluster.report.page.curves import Curve
from raystill.cluster.report.page.html import Child, Html, element, join, table
from raystill.cluster.report.page.read import Record, RunData
from raystill.cluster.report.tables import (
    FREE_RUNNING,
    TEACHER_FORCED,
    check_rows,
    measured_when,
    position_rows,
)
from raystill.cluster.report.tasks import CAPTION, HEADINGS, failures, task_rows
from raystill.cluster.report.worth import SPEED_HEADINGS, speed_caption, speed_rows, verdict

MANY_POINTS = 60
"""Steps from which on a curve is drawn faint, with its mean over stretches above it."""
HELD_OUT_CURVES = (
    ("kl_nats_per_token", "Held-out KL(teacher || student)", "nats/token"),
    ("top1_agreement", "Held-out top-1 agreement", "share of tokens"),
    ("acceptance", "Held-out acceptance as a draft model", "rate"),
)


def learned(runs: Sequence[RunData]) -> Html:
    """The whole section."""
    parts: list[Child] = [_table(runs), _notes(runs)]
    parts += [_checks(run, len(runs) > 1) for run in runs]
    if len(runs) == 1:
        parts += [
            _worth(runs[0]),
            _tasks(runs[0]),
            _speed(runs[0]),
            _baselines(runs[0]),
            _draft(runs[0]),
        ]
        charts = [_loss(runs[0]), *_held_out(runs), _extra(runs[0])]
    else:
        charts = [_losses(runs), *_held_out(runs)]
    drawn = [chart for chart in charts if chart is not None]
    if drawn:
        parts.append(element("div", *drawn, class_="charts"))
    return join(parts)


def figure(record: Record, name: str, digits: int = 3) -> str:
    """A figure of a record in words; ``-`` where it holds no number of that name."""
    return formatting.figure(number(record.get(name)), digits)


def _table(runs: Sequence[RunData]) -> Html:
    if not any(run.before for run in runs):
        return element("p", "No held-out figures were recorded.", class_="nothing")
    if len(runs) == 1:
        return _before_and_after(runs[0])
    newest = [run.after or run.before for run in runs]
    rows: list[list[Child]] = [["measured", *(measured_when(record) for record in newest)]]
    for name, label, digits, _ in (*TEACHER_FORCED, *FREE_RUNNING):
        if any(number(record.get(name)) is not None for record in newest):
            rows.append([label, *(figure(record, name, digits) for record in newest)])
    headings = ["", *(element("bdi", run.name) for run in runs)]
    return table("Students on their held-out prompts", headings, rows, "figures")


def _before_and_after(run: RunData) -> Html:
    before, after = run.before, run.after
    newest = after or before
    rows: list[list[Child]] = []
    for name, label, digits, reference in (*TEACHER_FORCED, *FREE_RUNNING):
        if number(before.get(name)) is None and number(newest.get(name)) is None:
            continue
        against = number(newest.get(reference)) if isinstance(reference, str) else reference
        figures: list[Child] = [figure(before, name, digits)]
        if after:
            figures.append(element("strong", figure(after, name, digits)))
        rows.append([label, *figures, formatting.figure(against, digits)])
    for label, first, last in position_rows(before, after or {}):
        cells: list[Child] = [first, element("strong", last)] if after else [first]
        rows.append([label, *cells, ""])
    steps = [f"before (step {before.get('step')})"]
    if after:
        steps.append(f"after (step {after.get('step')})")
    return table("Figures on held-out prompts", ["", *steps, "the teacher's own"], rows, "figures")


def _notes(runs: Sequence[RunData]) -> Html | None:
    notes = []
    for run in runs:
        newest = run.after or run.before
        tokens = number(newest.get("num_tokens"))
        parts = [f"{formatting.count(tokens)} held-out tokens"] if tokens else []
        if newest.get("bound"):
            parts.append(str(newest["bound"]))
        if rows := number(newest.get("free_running_rows")):
            prompts = formatting.plural(int(rows), "prompt")
            parts.append(f"stop rate and below: the student writing by itself, {prompts}")
        if said := "; ".join(parts):
            notes.append(f"{run.name}: {said}" if len(runs) > 1 else said)
    return join(element("p", note, class_="note") for note in dict.fromkeys(notes))


def _checks(run: RunData, named: bool) -> Html | None:
    """What functions of the user say of the answers; None where there are none."""
    if not run.before or not (checks := check_rows(run.before, run.after or None)):
        return None
    two = any(first for _, first, _, _, _ in checks)
    headings: list[Child] = ["", *(["before", "after"] if two else ["now"]), "the teacher"]
    rows: list[list[Child]] = [
        [name, *([first, element("strong", newest)] if two else [newest]), teacher]
        for name, first, newest, teacher, _ in checks
    ]
    caption = "Checks of the answers to held-out prompts: mean, with its 95 % interval"
    remarks = [f"{name}: {said}" for name, _, _, _, said in checks if said]
    return join(
        [
            table(caption + (f" ({run.name})" if named else ""), headings, rows, "figures"),
            *(element("p", remark, class_="note") for remark in remarks),
        ]
    )


def _baselines(run: RunData) -> Html | None:
    if not run.baselines or not run.before:
        return None
    rows: list[list[Child]] = []
    named: list[tuple[Child, Record]] = [
        (name, figures) for name, figures in run.baselines.items() if isinstance(figures, dict)
    ]
    named.append((element("strong", "the student"), run.after or run.before))
    for name, figures in named:
        rows.append([name, figure(figures, "kl_nats_per_token"), figure(figures, "top1_agreement")])
    caption = "Models that only count the training answers, on the same held-out tokens"
    return table(caption, ["", "KL, nats/token", "top-1 agreement"], rows, "figures narrow")


def _tasks(run: RunData) -> Html | None:
    """What ``raystill tasks`` has measured: the student beside its teacher."""
    rows: list[list[Child]] = [list(row) for row in task_rows(run.tasks)]
    shown = [table(CAPTION, list(HEADINGS), rows, "figures")] if rows else []
    for failure in failures(run.tasks):
        shown.append(element("p", f"Could not be asked: {failure}", class_="note"))
    return join(shown) if shown else None


def _worth(run: RunData) -> Html | None:
    """How much faster and smaller the student is, and how good, in one sentence."""
    said = verdict(run.speed, run.tasks)
    return element("p", element("strong", said)) if said else None


def _speed(run: RunData) -> Html | None:
    """What ``raystill speed`` has measured: both models in the same engine."""
    rows: list[list[Child]] = [list(row) for row in speed_rows(run.speed)]
    caption = speed_caption(run.speed)
    return table(caption, list(SPEED_HEADINGS), rows, "figures") if rows else None


def _draft(run: RunData) -> Html | None:
    """What ``raystill draft`` has measured: the student as its teacher's draft model."""
    measured = run.draft.get("measured")
    if not isinstance(measured, list):
        return None
    rows: list[list[Child]] = []
    for of in measured:
        if not isinstance(of, dict):
            continue
        others = of.get("differences")
        changed = len(others) if isinstance(others, list) else 0
        same = number(of.get("identical_answers"))
        rows.append(
            [
                f"{formatting.count(number(of.get('k')))} drafted tokens",
                figure(of, "mean_acceptance_length", 2),
                formatting.rate(number(of.get("tokens_per_s"))),
                figure(of, "speed_up", 2),
                "-" if same is None else f"{same:.0f} of {same + changed:.0f}",
            ]
        )
    if not rows:
        return None
    ratio = figure(run.draft, "cost_ratio", 2)
    headings = ["", "tokens a pass", "tokens/s", "speed-up", "identical answers"]
    caption = (
        "The student as its teacher's draft model, greedy, served by vLLM; a draft token takes "
        f"{ratio} of a teacher's"
    )
    return table(caption, headings, rows, "figures")


def _loss(run: RunData) -> Html:
    terms = _terms(run)
    curves = [("loss", "loss"), *terms]
    title = "Training loss, and each term of the objective" if terms else "Training loss"
    series: list[Series] = []
    for colour, (name, label) in enumerate(curves):
        curve = run.metrics.get(name, Curve())
        if curve.known > MANY_POINTS:
            series.append(Series("", curve.points(), colour, "faint"))
            series.append(Series(f"{label}, mean", curve.means(), colour))
        else:
            series.append(Series(label, curve.points(), colour))
    said = _course(run.metrics.get("loss", Curve()))
    return line_chart(title, series, unit="nats", note=said)


def _terms(run: RunData) -> list[tuple[str, str]]:
    """The terms of the objective; a single one of weight 1 is the loss itself."""
    names = sorted(name for name in run.metrics if name.startswith("objective/"))
    if len(names) == 1 and (curve := run.metrics[names[0]]).known:
        loss = run.metrics.get("loss")
        if loss and loss.known == curve.known and abs(loss.total - curve.total) < 1e-3 * loss.known:
            return []
    return [(name, name.removeprefix("objective/")) for name in names]


def _course(curve: Curve) -> str:
    if curve.first is None or curve.last is None or curve.least is None:
        return ""
    said = (
        f"{formatting.figure(curve.first[1])} at step {curve.first[0]:,.0f}, "
        f"{formatting.figure(curve.last[1])} at step {curve.last[0]:,.0f}; "
        f"least {formatting.figure(curve.least[1])} at step {curve.least[0]:,.0f}"
    )
    if curve.greatest is not None and curve.greatest[1] > curve.first[1]:
        greatest, step = curve.greatest[1], curve.greatest[0]
        said += f", greatest {formatting.figure(greatest)} at step {step:,.0f}"
    if curve.known > MANY_POINTS:
        said += "; faint: single steps, cut at the chart's edge"
    if curve.gaps:
        said += f"; {formatting.plural(curve.gaps, 'step')} without a loss"
    return said


def _losses(runs: Sequence[RunData]) -> Html:
    series = []
    for colour, run in enumerate(runs):
        curve = run.metrics.get("loss", Curve())
        points = curve.means() if curve.known > MANY_POINTS else curve.points()
        series.append(Series(run.name, points, colour))
    note = "Objectives may differ: compare losses only between runs that minimise the same."
    return line_chart("Training loss", series, unit="nats", note=note)


def _held_out(runs: Sequence[RunData]) -> list[Html]:
    charts = []
    for name, title, unit in HELD_OUT_CURVES:
        series = []
        for colour, run in enumerate(runs):
            curve = Curve()
            for record in run.evaluations:
                curve.add(number(record.get("step")) or 0, number(record.get(name)))
            if curve.known:
                label = run.name if len(runs) > 1 else "the student"
                series.append(Series(label, curve.points(), colour))
        if not any(len(s.points) > 1 for s in series):
            continue
        if len(runs) == 1 and (level := _bigram(runs[0], name)) is not None:
            edge = series[0].points[0][0]
            series.append(Series("bigram model", [(edge, level)], 3, "level"))
        charts.append(line_chart(title, series, unit=unit))
    return charts


def _bigram(run: RunData, name: str) -> float | None:
    figures = run.baselines.get("bigram")
    return number(figures.get(name)) if isinstance(figures, dict) else None


def _extra(run: RunData) -> Html | None:
    """Gradient norm and learning rate, folded: who needs them knows to look."""
    charts = [
        line_chart(title, [Series(title.lower(), curve.points(), colour)], unit=unit)
        for name, title, unit, colour in (
            ("grad_norm", "Gradient norm before clipping", "", 1),
            ("lr", "Learning rate", "", 2),
            ("tokens_per_s", "Speed, waits included", "response tokens/s", 4),
            ("padding_fraction", "Padding", "share of positions", 5),
        )
        if (curve := run.metrics.get(name)) and curve.known
    ]
    if not charts:
        return None
    summary = element("summary", "Gradient norm, learning rate, speed, padding")
    inner = element("div", *charts, class_="charts")
    return element("details", summary, inner, class_="wide")
