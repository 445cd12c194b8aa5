"""Data, lineage and configuration: tables with a column for each run."""

from collections.abc import Callable, Sequence
from typing import Any

from raystill.base import formatting
from raystill.base.personal import told
from raystill.base.records import number
from raystill.cluster.report.page.charts import bar_chart
from raystill.cluster.report.page.html import Child, Html, element, join, shortened, table
from raystill.cluster.report.page.read import Lengths, Record, RunData
from raystill.cluster.report.summary import (
    api_line,
    judged_line,
    size_line,
    student_written_line,
    teacher_lines,
)
from raystill.config.describe import fields

NUM_BARS = 24
MOST_SOURCES = 20
MOST_OPEN_SOURCES = 8
LONGEST_VALUE = 300

Fact = tuple[str, Callable[[RunData], Child]]


def _of_teacher(name: str) -> Fact:
    """The figures of one of several teachers."""
    return f"teacher {name}", lambda r: teacher_lines(r.summary.get("teachers")).get(name, "")


def data(runs: Sequence[RunData]) -> Html:
    """Rows, lengths, sources, drops and truncation."""
    rows: list[Fact] = [
        ("rows trained", lambda r: _of(r.summary, "rows_trained", "rows_total") or _trained(r)),
        ("asked of the teacher", lambda r: _count(r.summary, "rows_asked")),
        ("scored by the teacher", lambda r: _count(r.summary, "rows_scored")),
        (
            "written by the student",
            lambda r: student_written_line(r.summary.get("student_written")),
        ),
        ("asked of the API teacher", lambda r: api_line(r.api)),
        ("read from the store", lambda r: _count(r.summary, "rows_reused")),
        ("held-out rows", lambda r: formatting.count(r.responses.rows or None)),
        ("dropped", lambda r: _counts(r.summary, "dropped")),
        ("looked at by judges", lambda r: judged_line(r.summary.get("judged"))),
        ("rejected by filters", lambda r: _counts(r.summary, "filtered")),
        ("answers that filters accepted", lambda r: _share(r.summary, "accepted_fraction")),
        ("personal data and keys in prompts", _personal),
        ("and in answers of the teacher", lambda r: _held(r.summary.get("personal_data"))),
        ("duplicate prompts left out", lambda r: _count(r.summary, "duplicates")),
        ("answers cut off by max_tokens", lambda r: _share(r.summary, "truncated_fraction")),
        ("held-out answers cut off", lambda r: _cut(r.responses)),
        ("prompt tokens", lambda r: _lengths(r.prompts)),
        ("held-out response tokens", lambda r: _lengths(r.responses)),
        ("response tokens a trained row", _tokens_a_row),
        ("steps without a token to learn", lambda r: _count(r.summary, "skipped_steps")),
    ]
    names = {name for run in runs for name in teacher_lines(run.summary.get("teachers"))}
    rows += [_of_teacher(name) for name in sorted(names)]
    parts: list[Child] = [_facts("Rows", runs, rows)]
    if len(runs) == 1:
        charts = [
            _histogram("Training prompts", runs[0].prompts),
            _histogram("Held-out answers of the teacher", runs[0].responses),
        ]
        drawn = [chart for chart in charts if chart is not None]
        if drawn:
            parts.append(element("div", *drawn, class_="charts"))
    parts.append(_sources(runs))
    return join(parts)


def _personal(run: RunData) -> str | None:
    """How many prompts hold personal data or keys, by kind, and what was done with them."""
    found = run.manifest.get("personal_data")
    if not isinstance(found, dict) or not isinstance(found.get("kinds"), dict):
        return None
    kinds = {str(kind): n for kind, n in found["kinds"].items() if isinstance(n, int)}
    number_ = found.get("prompts")
    if not isinstance(number_, int) or not number_:
        return "none"
    return f"{number_:,} ({told(kinds)}); {found.get('action')}"


def _held(found: object) -> str | None:
    """How many answers held personal data or keys, by kind."""
    if not isinstance(found, dict) or not isinstance(found.get("any"), int):
        return None
    kinds = {
        str(kind): n
        for kind, n in found.items()
        if kind not in ("any", "looked") and isinstance(n, int)
    }
    return f"{found['any']:,} ({told(kinds)})" if found["any"] else "none"


def lineage(runs: Sequence[RunData]) -> Html:
    """Where the run came from: teacher, prompts, seeds, versions, parents."""
    rows: list[Fact] = [
        ("run id", lambda r: _code(r.manifest.get("run_id"))),
        ("folder", lambda r: _code(formatting.path(r.path))),
        ("teacher", lambda r: _code(r.manifest.get("teacher"))),
        ("teacher's identity", lambda r: _code(r.manifest.get("teacher_identity"))),
        ("what is learned", lambda r: _said(r.manifest.get("target"))),
        ("sampling", lambda r: _pairs(r.manifest.get("sampling"))),
        ("served teacher and plain model", _probe),
        ("student from", _student),
        ("student's size", lambda r: size_line(r.summary.get("size")) or None),
        ("layers of the teacher", lambda r: _layers(r.layers)),
        ("prompts", _prompts),
        ("answers of other runs", lambda r: _reused(r.summary)),
        ("seeds", lambda r: _pairs(r.manifest.get("seeds"))),
        ("commit", lambda r: _code(r.manifest.get("commit"))),
        ("versions", lambda r: _versions(r.manifest)),
        ("resumed", lambda r: _count(r.summary, "restarts")),
        ("steps trained again after a restart", lambda r: f"{r.steps_trained_again:,}"),
    ]
    return _facts("Where it came from", runs, rows)


def configuration(runs: Sequence[RunData]) -> Html:
    """Settings: what runs differ in, what differs from the defaults, and all the rest folded."""
    configs = [flat(run.config) for run in runs]
    if not any(configs):
        return element("p", "No config.yaml is there.", class_="nothing")
    known = {field.name: field for field in fields()}
    order = {name: number_ for number_, name in enumerate(known)}
    names = sorted({n for c in configs for n in c}, key=lambda n: (order.get(n, len(order)), n))
    apart = [n for n in names if len({repr(c.get(n)) for c in configs}) > 1]
    changed: list[str] = []
    default: list[str] = []
    for name in (n for n in names if n not in apart):
        field = known.get(name)
        value = configs[0].get(name)
        is_default = field is not None and not field.required and value == field.default_value
        (default if is_default else changed).append(name)
    headings = ["setting", *(element("bdi", run.name) for run in runs)]
    if len(runs) == 1:
        headings = ["setting", "value", "default"]

    def row(name: str) -> list[Child]:
        cells: list[Child] = [element("code", name)]
        cells += [_value(config[name]) if name in config else "(not set)" for config in configs]
        if len(runs) == 1:
            cells.append(known[name].default if name in known else "no setting of this version")
        return cells

    parts: list[Child] = []
    if apart:
        parts.append(table("Settings in which the runs differ", headings, map(row, apart), "facts"))
    if changed:
        caption = "Settings that differ from the defaults"
        parts.append(table(caption, headings, map(row, changed), "facts"))
    if default:
        whole = table("Settings at their defaults", headings, map(row, default), "facts")
        said = formatting.plural(len(default), "setting")
        parts.append(element("details", element("summary", f"{said} at the defaults"), whole))
    return join(parts)


def flat(config: Record, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _facts(caption: str, runs: Sequence[RunData], rows: Sequence[Fact]) -> Html:
    """Rows of which some run has something to say."""
    made: list[list[Child]] = []
    for label, said in rows:
        cells = [said(run) or formatting.NOTHING for run in runs]
        if any(cell != formatting.NOTHING for cell in cells):
            made.append([label, *cells])
    if not made:
        return element("p", f"{caption}: nothing recorded.", class_="nothing")
    headings = ["", *(element("bdi", run.name) for run in runs)] if len(runs) > 1 else ["", "value"]
    return table(caption, headings, made, "facts")


def _histogram(title: str, lengths: Lengths) -> Html | None:
    if lengths.rows < 2:
        return None
    low, high = min(lengths.by_length), max(lengths.by_length)
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    bars = []
    for start in range(low, high + 1, width):
        rows = sum(lengths.by_length.get(n, 0) for n in range(start, start + width))
        end = min(start + width - 1, high)
        bars.append((f"{start}–{end}" if end > start else f"{start}", float(rows)))
    return bar_chart(title, bars, _lengths(lengths))


def _lengths(lengths: Lengths) -> str:
    if not lengths.rows:
        return formatting.NOTHING
    median, most, longest = (lengths.quantile(share) for share in (0.5, 0.9, 1.0))
    return f"half have at most {median:,}, nine tenths {most:,}, the longest {longest:,}"


def _sources(runs: Sequence[RunData]) -> Html | None:
    names: dict[str, float] = {}
    for run in runs:
        for lengths in (run.prompts, run.responses):
            for name, count in lengths.by_source.items():
                names[name] = names.get(name, 0) + count
    if not names or set(names) == {""}:
        return None
    most = sorted(names, key=lambda name: (-names[name], name))
    headings: list[Child] = [""]
    for run in runs:
        who = join([element("bdi", run.name), ": "]) if len(runs) > 1 else ""
        headings += [join([who, "training"]), join([who, "held out"])]
    rows: list[list[Child]] = []
    for name in most[:MOST_SOURCES]:
        cells: list[Child] = [element("bdi", shortened(name, 80)) if name else "(none)"]
        for run in runs:
            for lengths in (run.prompts, run.responses):
                cells.append(formatting.count(lengths.by_source.get(name)))
        rows.append(cells)
    if len(most) > MOST_SOURCES:
        cells = [f"{len(most) - MOST_SOURCES:,} other sources"]
        for run in runs:
            for lengths in (run.prompts, run.responses):
                others = sum(lengths.by_source.get(name, 0) for name in most[MOST_SOURCES:])
                cells.append(formatting.count(others))
        rows.append(cells)
    whole = table("Rows by source", headings, rows, "figures narrow")
    if len(most) <= MOST_OPEN_SOURCES:
        return whole
    return element("details", element("summary", f"{len(most):,} sources"), whole)


def _count(record: Record, name: str) -> str:
    return formatting.count(number(record.get(name)))


def _share(record: Record, name: str) -> str:
    return formatting.share(number(record.get(name)))


def _of(record: Record, part: str, whole: str) -> str:
    done, total = number(record.get(part)), number(record.get(whole))
    if done is None:
        return ""
    return formatting.count(done) + ("" if total is None else f" of {formatting.count(total)}")


def _trained(run: RunData) -> str:
    return formatting.count(run.metrics["rows"].total) if "rows" in run.metrics else ""


def _tokens_a_row(run: RunData) -> str:
    tokens, rows = run.metrics.get("tokens"), run.metrics.get("rows")
    if tokens is None or rows is None or not rows.total:
        return formatting.NOTHING
    return f"{tokens.total / rows.total:,.1f} on average"


def _counts(summary: Record, name: str) -> str:
    by_reason = summary.get(name)
    if not isinstance(by_reason, dict):
        return formatting.NOTHING
    counts = {str(k): int(n) for k, v in by_reason.items() if (n := number(v)) is not None}
    return formatting.reasons(counts)


def _cut(lengths: Lengths) -> str:
    if not lengths.rows:
        return formatting.NOTHING
    return f"{lengths.cut:,} of {lengths.rows:,}"


def _code(value: Any) -> Child:
    return element("code", shortened(str(value), LONGEST_VALUE)) if value else None


def _said(value: Any) -> Child:
    return shortened(str(value), LONGEST_VALUE) if value else None


def _pairs(value: Any) -> Child:
    if not isinstance(value, dict) or not value:
        return None
    return shortened(", ".join(f"{k} {v}" for k, v in value.items()), LONGEST_VALUE)


def _versions(manifest: Record) -> Child:
    versions = manifest.get("versions")
    packages = versions if isinstance(versions, dict) else {}
    return _pairs(({"python": manifest["python"]} if "python" in manifest else {}) | packages)


def _probe(run: RunData) -> Child:
    kl = number(run.probe.get("self_distillation"))
    if kl is None:
        return None
    return f"{kl:.2g} nats apart on {formatting.count(number(run.probe.get('tokens')))} tokens"


def _student(run: RunData) -> Child:
    student = run.config.get("student")
    if not isinstance(student, dict):
        return None
    model = student.get("model")
    if model:
        return _code(model)
    return "the teacher" if student.get("init") == "from_teacher" else _said(student.get("init"))


def _layers(layers: Record) -> Child:
    chosen = layers.get("layers")
    if not isinstance(chosen, list):
        return None
    said = f"{len(chosen)}: {', '.join(map(str, chosen))}"
    if layers.get("by"):
        said += f" (by {layers['by']})"
    if isinstance(layers.get("refit"), dict):
        said += f"; {len(layers['refit'])} of them fitted"
    return shortened(said, LONGEST_VALUE)


def _prompts(run: RunData) -> Child:
    prompts = run.config.get("prompts")
    if not isinstance(prompts, dict):
        return None
    sources = prompts.get("sources")
    entries = sources if isinstance(sources, list) and sources else [prompts]
    paths = [str(entry.get("path")) for entry in entries if isinstance(entry, dict)]
    return _code(", ".join(paths))


def _reused(summary: Record) -> Child:
    reused = number(summary.get("rows_reused"))
    return f"{formatting.count(reused)} rows, from the teacher store" if reused else None


def _value(value: Any) -> Child:
    if value is None:
        return element("span", "null", class_="null")
    text = "true" if value is True else "false" if value is False else str(value)
    return element("code", shortened(text, LONGEST_VALUE))
