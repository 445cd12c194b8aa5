"""``summary.json``: the totals of a run, over all its resumptions."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raystill.base import formatting
from raystill.base.records import (
    BrokenFile,
    Folder,
    mapping,
    natural,
    number,
    plain,
    read_lines,
    read_object,
)
from raystill.base.run_folder import MANIFEST, SPENDING, STUDENT, TIMELINE, named_file
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.timeline import bottleneck
from raystill.datasets.store.store import RowCounts
from raystill.model.weights import size_of

Figures = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """How one start of a run ended.

    Attributes:
        snapshot: The coordinator's last one.
        prepared: What the check found.
        rows_requested: Rows in the segments that this run published, by purpose (``training``,
            ``evaluation``).
        stopped_by: Number of the signal that stopped it; 0: it is complete.
        wall_s: Seconds from the coordinator's start to the end.
        phases: Seconds in each phase, in the order they began.
    """

    snapshot: Snapshot
    prepared: Prepared
    rows_requested: Mapping[str, RowCounts]
    stopped_by: int = 0
    wall_s: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)


def write_summary(folder: Folder, result: RunResult) -> Figures:
    """Write ``summary.json``; totals of a run that was resumed continue the earlier ones."""
    earlier = _earlier(folder)
    snapshot, prepared = result.snapshot, result.prepared
    counters = Counter(snapshot.counters)
    metrics = read_lines(folder, "metrics.jsonl")
    before, after = before_and_after(folder)
    epochs, held_out = prepared.config.training.epochs, prepared.num_held_out_rows
    trained = int(sum(line.get("rows") or 0 for line in metrics))
    training, evaluation = result.rows_requested["training"], result.rows_requested["evaluation"]
    answered = counters["rows_answered"] + earlier.get("rows_answered", 0)
    truncated = counters["rows_truncated"] + earlier.get("rows_truncated", 0)
    rejected = _rejected(earlier, snapshot)
    dropped = Counter(prepared.dropped)
    dropped.update(snapshot.dropped)
    ahead_seen = max(snapshot.max_rows_ahead_seen, earlier.get("max_rows_ahead_seen", 0))
    max_ahead = snapshot.max_rows_ahead
    summary = {
        "status": "stopped" if result.stopped_by else "completed",
        "epochs": epochs,
        "rows_asked": training.asked,
        "rows_scored": training.scored,
        "rows_reused": max(0, trained + sum(rejected.values()) - training.asked - training.scored),
        "rows_trained": trained,
        "rows_total": prepared.num_train_rows * epochs,
        "rows_answered": int(answered),
        "rows_truncated": int(truncated),
        "rows_filtered": sum(rejected.values()),
        "filtered_by_epoch": rejected,
        "evaluation_rows_asked": evaluation.asked,
        "evaluation_rows_scored": evaluation.scored,
        "evaluation_rows_reused": max(0, held_out - evaluation.asked - evaluation.scored),
        "dropped": dict(dropped),
        "filtered": dict(snapshot.filtered),
        "judged": _judged(earlier, counters),
        "personal_data": _personal(earlier, counters),
        "accepted_fraction": None if result.stopped_by else _accepted(snapshot, prepared),
        "duplicates": prepared.duplicates,
        "truncated_fraction": truncated / answered if answered else 0.0,
        "teacher": _role(
            earlier, counters, "teacher", ("rows", "prompt_tokens", "response_tokens", "busy_s")
        ),
        "teachers": _by_teacher(folder, earlier.get("teachers") or {}, counters),
        "student": _role(earlier, counters, "student", ("tokens", "busy_s", "wait_s")),
        "student_written": _student_written(metrics),
        "api": _of_api(folder, earlier.get("api", {}), counters),
        "wall_s": result.wall_s + earlier.get("wall_s", 0.0),
        "phases": _added(earlier.get("phases", {}), result.phases),
        "restarts": _restarts(earlier, snapshot),
        "max_rows_ahead_seen": ahead_seen,
        "bottleneck": bottleneck(read_lines(folder, TIMELINE), ahead_seen, max_ahead),
        "evaluation": {"before": before, "after": after},
        "baselines": _baselines(folder, snapshot),
        "size": _sizes(folder, prepared),
        "skipped_steps": sum(line.get("loss") is None for line in metrics),
    }
    folder.write_text("summary.json", json.dumps(plain(summary), indent=2) + "\n")
    return plain(summary)


def _accepted(snapshot: Snapshot, prepared: Prepared) -> float | None:
    """Share of the last epoch's answers that passed the filters, by the ledger of a finished epoch:
    counters have rows that were answered again after a restart twice.
    """
    answered = prepared.num_train_rows - sum(snapshot.dropped.values())
    return 1 - sum(snapshot.filtered.values()) / answered if answered > 0 else None


def _rejected(earlier: Figures, snapshot: Snapshot) -> dict[str, int]:
    """Rows that filters rejected, by epoch, each row once; the counters have those that were
    answered again after a restart twice.

    Earlier epochs are those of earlier starts. Of a start that ended without a summary nothing is
    known; filters decide alike in every epoch, so the next known one stands for it.
    """
    now = {int(epoch): rows for epoch, rows in snapshot.filtered_by_epoch.items()}
    before = earlier.get("filtered_by_epoch", {})
    told = {natural(epoch): number(rows) for epoch, rows in mapping(before).items()}
    known = {e: int(rows or 0) for e, rows in told.items() if e is not None} | now
    last = max(now, default=max(known, default=-1))
    found: dict[str, int] = {}
    rows = 0
    for epoch in range(last, -1, -1):
        rows = known.get(epoch, rows)
        found[str(epoch)] = rows
    return dict(reversed(found.items()))


def _personal(earlier: Figures, counters: Mapping[str, float]) -> Figures:
    """Answers that held personal data or keys, by kind, over all starts; rows that were answered
    again after a restart count again, as in ``rows_answered``.
    """
    start = "personal_data/"
    now = {n.removeprefix(start): v for n, v in counters.items() if n.startswith(start)}
    return {n: int(v) for n, v in sorted(_added(earlier.get("personal_data", {}), now).items())}


def _judged(earlier: Figures, counters: Counter[str]) -> Figures:
    """Answers that judges looked at, and the questions that they were asked for it."""
    names, before = ("verdicts", "verdicts_asked"), earlier.get("judged", {})
    return {name: int(counters[name] + before.get(name, 0)) for name in names}


def _student_written(metrics: Sequence[Figures]) -> Figures:
    """Rows that the student wrote, and how many of them by their staleness in steps; {}: none."""
    rows = int(sum(line.get("student_written_rows") or 0 for line in metrics))
    ages: Counter[str] = Counter()
    for line in metrics:
        told = {n.partition("/")[2]: v for n, v in line.items() if n.startswith("staleness/")}
        ages.update({age: int(v) for age, v in told.items() if v})
    return {"rows": rows, "staleness": dict(sorted(ages.items()))} if rows else {}


def student_written_line(written: object) -> str:
    """``41 rows, by weights at most 1 step old``; '' where the student wrote none."""
    if not isinstance(written, dict) or not isinstance(written.get("rows"), int):
        return ""
    told = written.get("staleness")
    ages = [age for age in map(natural, mapping(told)) if age is not None]
    age = f", by weights at most {formatting.plural(max(ages), 'step')} old" if ages else ""
    return formatting.plural(written["rows"], "row") + age


def judged_line(judged: object) -> str:
    """``32 answers; 20 questions asked, the others answered before``; '' without a judge."""
    told = judged if isinstance(judged, dict) else {}
    verdicts, asked = (told.get(name) for name in ("verdicts", "verdicts_asked"))
    if not (isinstance(verdicts, int) and isinstance(asked, int) and verdicts):
        return ""
    answers, questions = (
        formatting.plural(verdicts, "answer"),
        formatting.plural(asked, "question"),
    )
    return f"{answers}; {questions} asked" + (
        ", the others were answered before" if asked < verdicts else ""
    )


COSTS = ("cost", "lost_cost")
PAID = frozenset(
    {"requests", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", *COSTS}
)


def api_line(api: object) -> str:
    """Requests, tokens, cost and failures of an API teacher; '' where there is none."""
    if not isinstance(api, dict) or not api:
        return ""
    known = PAID | {"told_tokens", "unmapped_mass"}
    numbers = {name: value for name, value in api.items() if isinstance(value, int | float)}
    counts = {name: int(value) for name, value in numbers.items() if name not in COSTS}
    line = (
        f"{formatting.count(counts.get('requests', 0))} answers, "
        f"{formatting.count(counts.get('input_tokens', 0))} tokens read, "
        f"{formatting.count(counts.get('output_tokens', 0))} written"
    )
    if numbers.get("cost"):
        line += f", cost {numbers['cost']:,.4g}"
    if numbers.get("lost_cost"):
        line += f" (at most {numbers['lost_cost']:,.4g} more for answers that did not arrive)"
    if numbers.get("told_tokens"):
        lost = numbers.get("unmapped_mass", 0.0) / numbers["told_tokens"]
        line += f", {lost:.2%} of the probability in tokens that are no ids"
    failures = {name: n for name, n in counts.items() if name not in known and n}
    return line + (f"; {formatting.reasons(failures)}" if failures else "")


def _earlier(folder: Folder) -> Figures:
    """The totals of the starts before this one; what of them is broken counts as nothing.

    A run has been paid when its summary is written, and must not end in a complaint about a file.
    """
    if not folder.exists("summary.json"):
        return {}
    try:
        return {
            name: numbers
            for name, value in read_object(folder, "summary.json").items()
            if (numbers := _numbers(value)) is not None
            and isinstance(value, dict) == (name in SUMS)
        }
    except BrokenFile:
        return {}


ALL = "teachers/"  # How `of_one` begins a counter.
SUMS = frozenset(
    {"teacher", "teachers", "student", "api", "phases", "personal_data", "filtered_by_epoch"}
    | {"judged"}
)
"""Entries of a summary that are several sums."""


def _numbers(value: Any) -> Any:
    """A finite number, or those of a mapping; None for anything else."""
    if isinstance(value, dict):
        return {
            name: one for name, v in value.items() if isinstance(one := _numbers(v), int | float)
        }
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and -1e18 < value < 1e18 else None


def _sizes(folder: Folder, prepared: Prepared) -> Figures:
    """Parameters and bytes of the stored teacher and student; {} unless both are at hand."""
    student = Path(folder.path) / STUDENT
    if "://" in folder.path or not student.is_dir():
        return {}
    sizes = {"teacher": size_of(Path(prepared.teacher_folder)), "student": size_of(student)}
    return sizes if all(sizes.values()) else {}


def size_line(size: object) -> str:
    """``106 M parameters in 426 MB, 79 % of the teacher's 135 M``; '' where nothing is known."""
    sizes = size if isinstance(size, dict) else {}
    both = [sizes.get(who) for who in ("student", "teacher")]
    student, teacher = (one if isinstance(one, dict) else {} for one in both)
    held, whole = (one.get("bytes") for one in (student, teacher))
    if not (isinstance(held, int) and isinstance(whole, int) and whole):
        return ""
    parameters, of_teacher = (one.get("parameters") for one in (student, teacher))
    if not (isinstance(parameters, int) and isinstance(of_teacher, int) and of_teacher):
        return f"{formatting.size(held)}, the teacher {formatting.size(whole)} as stored"
    return (
        f"{_millions(parameters)} parameters in {formatting.size(held)}; "
        f"{formatting.share(parameters / of_teacher)} of the teacher's {_millions(of_teacher)} in "
        f"{formatting.size(whole)}"
    )


def _millions(parameters: int) -> str:
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.{0 if parameters >= 1e8 else 1}f} M"


def before_and_after(folder: Folder) -> tuple[Figures | None, Figures | None]:
    """First and last evaluation; figures of one step that came in several lines are joined."""
    by_step: dict[int, Figures] = {}
    for line in read_lines(folder, "evaluation.jsonl"):
        by_step.setdefault(int(line.get("step", 0)), {}).update(line)
    if not by_step:
        return None, None
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    return first, (last if last is not first else None)


def _of_api(folder: Folder, earlier: Figures, counters: Mapping[str, float]) -> Figures:
    """Requests, tokens, cost and failures at an API teacher; empty with another."""
    names = ("", *several(folder))
    files = [counted(read_lines(folder, named_file(SPENDING, name))) for name in names]
    now = {n.removeprefix("api_"): v for n, v in counters.items() if n.startswith("api_")}
    return with_files(_added(earlier, now), files)


def with_files(summed: Figures, files: Iterable[Mapping[str, float]]) -> Figures:
    """Sums over starts that ended in order, with what files of the run say of all starts.

    What was paid is what the files say. Starts of earlier versions have noted failures in the sums
    alone, so the larger count of these stands.
    """
    kept: Counter[str] = Counter()
    for one in files:
        kept.update({name.removeprefix("api_"): value for name, value in one.items()})
    found = {n: v for n, v in summed.items() if n not in kept}
    return found | {n: v if n in PAID else max(v, summed.get(n, 0.0)) for n, v in kept.items()}


def several(folder: Folder) -> list[str]:
    """Names of a run's teachers; none where there is one without a name."""
    manifest = read_object(folder, MANIFEST) if folder.exists(MANIFEST) else {}
    return list(manifest.get("teachers") or {})


def counted(lines: Iterable[Figures]) -> Counter[str]:
    """What a teacher's file of spending counts, over all starts."""
    found: Counter[str] = Counter()
    for line in lines:
        found.update({n: v for n, v in line.items() if n.startswith("api_") and number(v)})
    return found


def _role(
    earlier: Mapping[str, Any], counters: Counter[str], role: str, names: Sequence[str]
) -> Figures:
    past = earlier.get(role, {})
    return {name: counters[f"{role}_{name}"] + past.get(name, 0) for name in names}


def _by_teacher(folder: Folder, earlier: Mapping[str, float], counters: Counter[str]) -> Figures:
    """Figures of several teachers, ``NAME/rows`` and so on, over all starts; {} where one is.

    What a service was paid, and how it failed (``NAME/api_...``), is in files of the run.
    """
    now = {name.removeprefix(ALL): n for name, n in counters.items() if name.startswith(ALL)}
    found = _added(earlier, now)
    for name in several(folder):
        start = f"{name}/api_"
        of_it = {n.removeprefix(start): v for n, v in found.items() if n.startswith(start)}
        told = with_files(of_it, [counted(read_lines(folder, named_file(SPENDING, name)))])
        found |= {start + one: count for one, count in told.items()}
    return found


def teacher_lines(teachers: object) -> dict[str, str]:
    """What became of each teacher's rows, its tokens, time and cost, by name; {} where one is."""
    told = teachers if isinstance(teachers, dict) else {}
    by_name: dict[str, dict[str, float]] = {}
    for key, value in told.items():
        name, _, figure = str(key).partition("/")
        if isinstance(value, int | float):
            by_name.setdefault(name, {})[figure] = value
    return {name: _teacher_line(figures) for name, figures in sorted(by_name.items())}


def _teacher_line(figures: Mapping[str, float]) -> str:
    parts = [f"{formatting.count(int(figures.get('rows', 0)))} answers"]
    for name, said in (
        ("rows_accepted", "accepted"),
        ("rows_rejected", "rejected"),
        ("rows_dropped", "dropped"),
        ("rows_reused", "from the store"),
    ):
        if name in figures and (figures[name] or name == "rows_accepted"):
            parts.append(f"{formatting.count(int(figures[name]))} {said}")
    parts.append(f"{formatting.count(int(figures.get('response_tokens', 0)))} tokens written")
    parts.append(f"busy {formatting.duration(figures.get('busy_s', 0.0))}")
    if figures.get("api_cost"):
        parts.append(f"cost {figures['api_cost']:,.4g}")
    return ", ".join(parts)


def _restarts(earlier: Mapping[str, Any], snapshot: Snapshot) -> int:
    """Lives of the worker group beyond the first, over all drivers of the run."""
    lives = max(1, snapshot.lives)
    return lives + (earlier.get("restarts", 0) if earlier else -1)


def _added(past: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: past.get(name, 0.0) + now.get(name, 0.0) for name in [*past, *now]}


def _baselines(folder: Folder, snapshot: Snapshot) -> Figures:
    """The newest baselines that an evaluation came with."""
    records = [*read_lines(folder, "evaluation.jsonl"), snapshot.evaluation]
    return next((r["baselines"] for r in reversed(records) if r.get("baselines")), {})
