"""``summary.json``: the totals of a run, over all its resumptions."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from raystill.base.records import Folder, plain, read_lines
from raystill.base.run_folder import TIMELINE
from raystill.cluster.report.timeline import bottleneck

Figures = dict[str, Any]


class RunOutcome(Protocol):
    """What is needed of how the run ended (``cluster/job.py``).

    ``paid``: rows in segments that this run published, by purpose (training, evaluation): ``asked``
    and ``scored`` ones (``datasets.store.Paid``).
    """

    snapshot: dict[str, Any]
    stopped_by: int
    wall_s: float
    phases: dict[str, float]
    prepared: Any
    paid: dict[str, Any]


def write_summary(folder: Folder, outcome: RunOutcome) -> Figures:
    """Write ``summary.json``; totals of a run that was resumed continue the earlier ones."""
    earlier = json.loads(folder.read_text("summary.json")) if folder.exists("summary.json") else {}
    snapshot, prepared = outcome.snapshot, outcome.prepared
    counters = Counter(snapshot.get("counters") or {})
    metrics = read_lines(folder, "metrics.jsonl")
    before, after = before_and_after(folder)
    held_out = prepared.num_held_out_rows if prepared is not None else 0
    trained = int(sum(line.get("rows") or 0 for line in metrics))
    training, evaluation = outcome.paid["training"], outcome.paid["evaluation"]
    answered = counters["rows_answered"] + earlier.get("rows_answered", 0)
    truncated = counters["rows_truncated"] + earlier.get("rows_truncated", 0)
    dropped = Counter(getattr(prepared, "dropped", None) or {})
    dropped.update(snapshot.get("dropped") or {})
    ahead_seen = max(int(snapshot.get("max_ahead") or 0), earlier.get("max_rows_ahead_seen", 0))
    max_ahead = None if prepared is None else prepared.config.rows_ahead
    summary = {
        "status": "stopped" if outcome.stopped_by else "completed",
        "epochs": prepared.config.training.epochs if prepared is not None else 1,
        "rows_asked": training.asked,
        "rows_scored": training.scored,
        "rows_reused": max(0, trained - training.asked - training.scored),
        "rows_trained": trained,
        "rows_total": _rows_total(prepared),
        "rows_answered": int(answered),
        "rows_truncated": int(truncated),
        "evaluation_rows_asked": evaluation.asked,
        "evaluation_rows_scored": evaluation.scored,
        "evaluation_rows_reused": max(0, held_out - evaluation.asked - evaluation.scored),
        "dropped": dict(dropped),
        "duplicates": getattr(prepared, "duplicates", 0),
        "truncated_fraction": truncated / answered if answered else 0.0,
        "teacher": _role(
            earlier, counters, "teacher", ("rows", "prompt_tokens", "response_tokens", "busy_s")
        ),
        "student": _role(earlier, counters, "student", ("tokens", "busy_s", "wait_s")),
        "wall_s": outcome.wall_s + earlier.get("wall_s", 0.0),
        "phases": _added(earlier.get("phases", {}), outcome.phases),
        "restarts": _restarts(earlier, snapshot),
        "max_rows_ahead_seen": ahead_seen,
        "bottleneck": bottleneck(read_lines(folder, TIMELINE), ahead_seen, max_ahead),
        "evaluation": {"before": before, "after": after},
        "baselines": _baselines(folder, snapshot),
        "skipped_steps": sum(line.get("loss") is None for line in metrics),
    }
    folder.write_text("summary.json", json.dumps(plain(summary), indent=2) + "\n")
    return plain(summary)


def before_and_after(folder: Folder) -> tuple[Figures | None, Figures | None]:
    """First and last evaluation; figures of one step that came in several lines are joined."""
    by_step: dict[int, Figures] = {}
    for line in read_lines(folder, "evaluation.jsonl"):
        by_step.setdefault(int(line.get("step", 0)), {}).update(line)
    if not by_step:
        return None, None
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    return first, (last if last is not first else None)


def _rows_total(prepared: Any) -> int | None:
    """Rows that all epochs train together."""
    return None if prepared is None else prepared.num_train_rows * prepared.config.training.epochs


def _role(
    earlier: Mapping[str, Any], counters: Counter[str], role: str, names: Sequence[str]
) -> Figures:
    past = earlier.get(role, {})
    return {name: counters[f"{role}_{name}"] + past.get(name, 0) for name in names}


def _restarts(earlier: Mapping[str, Any], snapshot: Mapping[str, Any]) -> int:
    """Lives of the worker group beyond the first, over all drivers of the run."""
    lives = max(1, int(snapshot.get("lives") or 1))
    return lives + (earlier["restarts"] if earlier else -1)


def _added(past: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: past.get(name, 0.0) + now.get(name, 0.0) for name in [*past, *now]}


def _baselines(folder: Folder, snapshot: Mapping[str, Any]) -> Figures:
    """The newest baselines that an evaluation came with."""
    records = [*read_lines(folder, "evaluation.jsonl"), snapshot.get("evaluation") or {}]
    return next((r["baselines"] for r in reversed(records) if r.get("baselines")), {})
