"""Where the time went: a timeline by role, the bottleneck, tokens and seconds of each role.

The timeline shows only time in which a driver lived; between two starts of a run it has a mark.
A replica's and a worker's busy seconds are reported when a group or a step ends, so what exceeds a
window's own seconds is carried back to the windows before, where it was spent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raystill.base import formatting
from raystill.base.records import number
from raystill.cluster.report.page.charts import area, fill, strip, swatch, upright
from raystill.cluster.report.page.html import Child, Html, element, join, table
from raystill.cluster.report.page.read import Record, RunData
from raystill.cluster.report.timeline import COUNTERS, SAMPLER_COUNTERS, bottleneck

MOST_BINS = 240
"""Pieces that a drawn timeline has at most."""
MOST_GAPS = 50
GAP_S = 60.0
"""Seconds between two windows from which on the driver was away."""
COUNTED = (*COUNTERS, *SAMPLER_COUNTERS)
ADDED = ("seconds", "replica_s", "sampler_s", "worker_s", *COUNTED)


@dataclass(frozen=True)
class Bins:
    """A timeline in at most ``MOST_BINS`` pieces.

    Attributes:
        edges: Where pieces begin and end, shares of all seconds; one more than there are pieces.
        pieces: Sums of the windows' seconds and counters; ``rows_ahead`` is the greatest.
        gaps: Where a driver was away (share of all seconds), and for how long (seconds).
        phases: (phase, begin, end), shares of all seconds.
    """

    edges: list[float]
    pieces: list[dict[str, float]]
    gaps: list[tuple[float, float]]
    phases: list[tuple[str, float, float]]
    seconds: float


def spent(runs: Sequence[RunData]) -> Html:
    """The whole section."""
    parts: list[Child] = []
    for run in runs:
        sentence = run.summary.get("bottleneck") or bottleneck(run.windows)
        who = join([element("bdi", run.name), ": "]) if len(runs) > 1 else None
        said = sentence or "too short to name a bottleneck (it takes two minutes of answers)"
        parts.append(element("p", who, element("strong", said), class_="bottleneck"))
        parts.append(_timeline(run))
    beside = "pair" if len(runs) == 1 else None
    parts.append(element("div", _roles(runs), _phases(runs), class_=beside))
    return join(parts)


def binned(run: RunData) -> Bins:
    """The run's windows as pieces; totals of seconds and counters are kept exactly."""
    windows = _with_workers(run.windows)
    total = sum(w["seconds"] for w in windows)
    edges: list[float] = [0.0]
    pieces: list[dict[str, float]] = []
    gaps: list[tuple[float, float]] = []
    phases: list[tuple[str, float, float]] = []
    passed, end_of_last = 0.0, None
    for record, window in zip(run.windows, windows, strict=True):
        ended = number(record.get("time"))
        if ended is not None and end_of_last is not None:
            away = ended - window["seconds"] - end_of_last
            if away > GAP_S:
                gaps.append((passed / total, away))
        end_of_last = ended
        begin, passed = passed, passed + window["seconds"]
        if phases and phases[-1][0] == record["phase"]:
            phases[-1] = (phases[-1][0], phases[-1][1], passed / total)
        else:
            phases.append((str(record["phase"]), begin / total, passed / total))
        if pieces and edges[-1] - edges[-2] < 1 / (MOST_BINS - 1):
            for name in ADDED:
                pieces[-1][name] += window[name]
            pieces[-1]["rows_ahead"] = max(pieces[-1]["rows_ahead"], window["rows_ahead"])
            edges[-1] = passed / total
        else:
            pieces.append(dict(window))
            edges.append(passed / total)
    return Bins(edges, pieces, gaps[-MOST_GAPS:], _longest(phases), total)


def _longest(phases: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The phases; where they are too many to draw, the longest one of each stretch of time."""
    if len(phases) <= MOST_BINS:
        return phases
    slots: list[dict[str, float]] = [{} for _ in range(MOST_BINS)]
    for name, begin, end in phases:
        for slot in range(int(begin * MOST_BINS), min(MOST_BINS, int(end * MOST_BINS) + 1)):
            inside = min(end, (slot + 1) / MOST_BINS) - max(begin, slot / MOST_BINS)
            slots[slot][name] = slots[slot].get(name, 0.0) + max(0.0, inside)
    drawn: list[tuple[str, float, float]] = []
    for number_, inside_of in enumerate(slots):
        name = max(inside_of.items(), key=lambda item: item[1])[0]
        begin = drawn.pop()[1] if drawn and drawn[-1][0] == name else number_ / MOST_BINS
        drawn.append((name, begin, (number_ + 1) / MOST_BINS))
    return drawn


def _with_workers(records: Sequence[Record]) -> list[dict[str, float]]:
    """The numbers of each window, with what there was to spend: ``replica_s``, ``sampler_s`` and
    ``worker_s``.
    """
    known = next((w for r in records if (w := number(r.get("workers")))), 0.0)
    windows = []
    for record in records:
        window = {n: number(record.get(n)) or 0.0 for n in ("seconds", "rows_ahead", *COUNTED)}
        window["replica_s"] = (number(record.get("replicas")) or 0.0) * window["seconds"]
        window["sampler_s"] = (number(record.get("samplers")) or 0.0) * window["seconds"]
        window["worker_s"] = (number(record.get("workers")) or known) * window["seconds"]
        windows.append(window)
    return windows


def shares(
    pieces: Sequence[dict[str, float]], used: str, there: str, room: Sequence[float] | None = None
) -> list[float]:
    """Share of each piece's time that a role spent; ``room`` is what others left of it.

    What a piece has no room for is carried back to the pieces before it.
    """
    result, carried = [], 0.0
    for number_, piece in reversed(list(enumerate(pieces))):
        most = piece[there] * (1.0 if room is None else room[number_])
        wanted = piece[used] + carried
        spent_here = min(wanted, most)
        carried = wanted - spent_here
        result.append(spent_here / piece[there] if piece[there] else 0.0)
    return result[::-1]


def _timeline(run: RunData) -> Html | None:
    if not run.windows:
        return element("p", "No timeline was recorded.", class_="nothing")
    bins = binned(run)
    pieces, edges = bins.pieces, bins.edges
    zeros = [0.0] * len(pieces)
    teaching = shares(pieces, "teacher_busy_s", "replica_s")
    training = shares(pieces, "student_busy_s", "worker_s")
    waiting = shares(pieces, "student_wait_s", "worker_s", [1 - t for t in training])
    ahead = [piece["rows_ahead"] for piece in pieces]
    most_ahead = max(ahead)
    marks = [upright(at, f"no driver for {formatting.duration(s)}", "gap") for at, s in bins.gaps]
    names = list(dict.fromkeys(name for name, _, _ in bins.phases))
    phases = [
        area([begin, end], [1.0], [0.0], fill(names.index(name)))
        for name, begin, end in bins.phases
    ]
    idle = join([swatch(0, "area"), " computing ", swatch(3, "area"), " waiting for rows"])
    rows = [
        strip("phase", [*phases, *marks], ""),
        strip(
            "teacher",
            [area(edges, teaching, zeros, "c1"), *marks],
            f"busy {formatting.share(_busy(pieces, 'teacher_busy_s', 'replica_s'))}",
        ),
        *_sampler(bins, marks),
        strip(
            "student",
            [area(edges, training, zeros, "c1"), area(edges, waiting, training, "c4"), *marks],
            f"busy {formatting.share(_busy(pieces, 'student_busy_s', 'worker_s'))}",
        ),
        strip(
            "rows ahead",
            [area(edges, [a / (most_ahead or 1) for a in ahead], zeros, "c2"), *marks],
            f"at most {formatting.count(most_ahead)}",
        ),
    ]
    legend = [
        element("li", swatch(number_, "area"), element("bdi", name))
        for number_, name in enumerate(names)
    ]
    return element(
        "figure",
        element(
            "figcaption", "Timeline", element("span", "share of each role's time", class_="unit")
        ),
        *rows,
        element(
            "div",
            element("span", "0:00"),
            element("span", formatting.duration(bins.seconds)),
            class_="x-axis timeline-axis",
        ),
        element("ul", *legend, class_="legend"),
        element("p", "Teacher and student: ", idle, class_="said"),
        *_away(bins),
        class_="chart timeline",
    )


def _sampler(bins: Bins, marks: Sequence[Html]) -> list[Html]:
    """The strip of the student's sampler, where there was one."""
    if not any(piece["sampler_s"] for piece in bins.pieces):
        return []
    writing = shares(bins.pieces, "sampler_busy_s", "sampler_s")
    zeros = [0.0] * len(writing)
    said = f"busy {formatting.share(_busy(bins.pieces, 'sampler_busy_s', 'sampler_s'))}"
    return [strip("sampler", [area(bins.edges, writing, zeros, "c1"), *marks], said)]


def _away(bins: Bins) -> list[Html]:
    said = "The driver was away for {} (dashed line)."
    return [
        element("p", said.format(formatting.duration(s)), class_="said") for _, s in bins.gaps[:3]
    ]


def _busy(pieces: Sequence[dict[str, float]], used: str, there: str) -> float | None:
    all_there = sum(piece[there] for piece in pieces)
    return min(1.0, sum(piece[used] for piece in pieces) / all_there) if all_there else None


def _roles(runs: Sequence[RunData]) -> Html:
    """Totals by role, from the summary, or from the timeline where no end was recorded."""
    totals = [_totals(run) for run in runs]
    names = list(dict.fromkeys(name for total in totals for name in total))
    rows: list[list[Child]] = [
        [name, *(total.get(name, formatting.NOTHING) for total in totals)] for name in names
    ]
    headings = ["", *(element("bdi", run.name) for run in runs)] if len(runs) > 1 else ["", "total"]
    return table("Time and tokens by role", headings, rows, "figures narrow")


def _totals(run: RunData) -> dict[str, str]:
    summary, pieces = run.summary, _with_workers(run.windows)
    teacher, student = (_part(summary, role) for role in ("teacher", "student"))

    def from_timeline(name: str) -> float:
        return sum(piece[name] for piece in pieces)

    wall = number(summary.get("wall_s")) or from_timeline("seconds")
    asked = number(teacher.get("busy_s"))
    busy = from_timeline("teacher_busy_s") if asked is None else asked
    trained = number(student.get("busy_s"))
    worked = from_timeline("student_busy_s") if trained is None else trained
    waited = number(student.get("wait_s"))
    replica_s, worker_s = from_timeline("replica_s"), from_timeline("worker_s")
    totals = {"whole run": formatting.duration(wall)}
    if replica_s:
        totals["teacher: replicas held"] = f"{formatting.duration(replica_s)} (replicas × time)"
    totals["teacher: busy"] = formatting.duration(busy)
    if (read := number(teacher.get("prompt_tokens"))) is not None:
        totals["teacher: prompt tokens read"] = formatting.count(read)
    if (written := number(teacher.get("response_tokens"))) is not None:
        totals["teacher: response tokens written"] = formatting.count(written) + _pace(
            written, busy
        )
    if sampler_s := from_timeline("sampler_s"):
        totals["sampler: replicas held"] = f"{formatting.duration(sampler_s)} (replicas × time)"
        totals["sampler: busy"] = formatting.duration(from_timeline("sampler_busy_s"))
    if worker_s:
        totals["student: workers held"] = f"{formatting.duration(worker_s)} (workers × time)"
    totals["student: busy"] = formatting.duration(worked)
    waits = from_timeline("student_wait_s") if waited is None else waited
    totals["student: waiting for rows"] = formatting.duration(waits)
    tokens = run.metrics["tokens"].total if "tokens" in run.metrics else None
    if (trained_tokens := number(student.get("tokens")) or tokens) is not None:
        said = formatting.count(trained_tokens) + _pace(trained_tokens, worked)
        totals["student: response tokens trained"] = said
    return totals


def _pace(tokens: float, busy_s: float) -> str:
    return f" ({formatting.rate(tokens / busy_s)} a second while busy)" if busy_s else ""


def _phases(runs: Sequence[RunData]) -> Html | None:
    spent_in = [_phase_seconds(run) for run in runs]
    names = list(dict.fromkeys(name for seconds in spent_in for name in seconds))
    if not names:
        return None
    rows: list[list[Child]] = [
        [name, *(formatting.duration(seconds.get(name)) for seconds in spent_in)] for name in names
    ]
    headings = ["", *(element("bdi", run.name) for run in runs)] if len(runs) > 1 else ["", "time"]
    return table("Time by phase", headings, rows, "figures narrow")


def _phase_seconds(run: RunData) -> dict[str, float]:
    said = _part(run.summary, "phases")
    known = {str(name): s for name, v in said.items() if (s := number(v)) is not None}
    if known:
        return known
    for record in run.windows:
        name = str(record["phase"])
        known[name] = known.get(name, 0.0) + (number(record["seconds"]) or 0.0)
    return known


def _part(summary: Record, name: str) -> Record:
    part = summary.get(name)
    return part if isinstance(part, dict) else {}
