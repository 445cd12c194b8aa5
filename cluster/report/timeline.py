"""Who was busy when: windows of a few seconds in ``timeline.jsonl``, and the bottleneck they show.

Consumes the coordinator's snapshots that the driver's main thread polls. A replica, of the teacher
or of the student's sampler, is busy while it has a group in flight; a worker waits while it is
blocked on the stream, and idles while it waits for the others. All are reported when a group or a
step ends, so a window may hold what began before it; over a run that evens out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from raystill.base import formatting
from raystill.cluster.coordinator.snapshot import Snapshot

TRAINING = "training"
WINDOW_S = 10.0
LEAST_S = 120.0
"""Seconds under which the first answers' delay and half-reported steps would weigh too much."""
NOTICEABLE = 0.10
"""Share of the time from which on a wait counts."""
FULL = 0.90
"""A replica that is to be this busy has no room for a claim."""
COUNTERS = (
    *("teacher_rows", "teacher_busy_s"),
    *("student_rows", "student_busy_s", "student_wait_s", "student_idle_s"),
)
NEW_COUNTERS = frozenset({"student_idle_s"})
"""Windows of earlier versions are without."""
SAMPLER_COUNTERS = ("sampler_rows", "sampler_busy_s")
"""Of runs whose student writes rows."""

Windows = Sequence[Mapping[str, Any]]


class Lines(Protocol):
    """Where the windows go (``cluster/metrics.py``)."""

    def append(self, record: dict[str, Any]) -> None: ...
    def upload(self) -> None: ...


class Timeline:
    """Cuts a run into windows; ``replicas`` tells how many answer now, ``samplers`` how many of the
    student's sampler do (None: the student writes no rows).
    """

    def __init__(
        self,
        lines: Lines,
        replicas: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        samplers: Callable[[], int] | None = None,
    ) -> None:
        self._lines = lines
        self._replicas = replicas
        self._samplers = samplers
        self._counters = COUNTERS + (SAMPLER_COUNTERS if samplers is not None else ())
        self._clock = clock
        self._began = clock()
        self._phase = ""
        self._before: dict[str, float] = {}

    def look(self, snapshot: Snapshot) -> dict[str, Any] | None:
        """Take a snapshot; the window that it ends, if it does. A phase ends one as well."""
        phase = snapshot.phases[-1][1] if snapshot.phases else ""
        now = self._clock()
        if phase == self._phase and now - self._began < WINDOW_S:
            return None
        return self._cut(snapshot, now, phase)

    def close(self, snapshot: Snapshot) -> None:
        """Write the last window."""
        self._cut(snapshot, self._clock(), "")
        self._lines.upload()

    def _cut(self, snapshot: Snapshot, now: float, phase: str) -> dict[str, Any] | None:
        counters = snapshot.counters
        seconds = now - self._began
        window = None
        if self._phase and seconds > 0:
            window = {
                "time": time.time(),
                "phase": self._phase,
                "seconds": seconds,
                "replicas": self._replicas(),
                "workers": int(snapshot.progress.get("workers") or 0),
                "rows_ahead": snapshot.rows_ahead,
            } | {n: counters.get(n, 0.0) - self._before.get(n, 0.0) for n in self._counters}
            if self._samplers is not None:
                window["samplers"] = self._samplers()
            self._lines.append(window)
        self._before = {name: counters.get(name, 0.0) for name in self._counters}
        self._began, self._phase = now, phase
        return window


def bottleneck(windows: Windows, ahead_seen: int = 0, max_ahead: int | None = None) -> str | None:
    """What held the training back, in one sentence of measured shares; None: too short to tell.

    Only the time from the first to the last answer counts: before it the stream starts, after it
    the teacher has nothing to do. ``ahead_seen``: most rows that were ahead, of ``max_ahead``.
    """
    training = [window for window in windows if window["phase"] == TRAINING]
    known = [window["workers"] for window in training if window["workers"]]
    if not known:
        return None
    # A window before the first step does not know the number of workers yet.
    training = [{**window, "workers": window["workers"] or known[0]} for window in training]
    asked = _from_first_to_last_answer(training)
    if not any(window["teacher_rows"] for window in training):
        return _without_teacher(training)
    seconds = _total(asked, "seconds")
    if seconds < LEAST_S:
        return None
    replica_s = sum(w["replicas"] * w["seconds"] for w in asked)
    busy = min(1.0, _total(asked, "teacher_busy_s") / replica_s) if replica_s else 1.0
    waits, idles = _waiting_share(asked), {"teacher": 1.0 - busy}
    if sampler_s := sum(w.get("samplers", 0) * w["seconds"] for w in asked):
        writing = sum(w.get("sampler_busy_s", 0.0) for w in asked)
        idles["sampler"] = 1.0 - min(1.0, writing / sampler_s)
    shares = f"the student waits {formatting.share(waits)}"
    shares += "".join(f", the {who} idles {formatting.share(idle)}" for who, idle in idles.items())
    full = [who for who, idle in idles.items() if idle < NOTICEABLE]
    if waits >= NOTICEABLE and not full:
        sentence = f"{'none' if len(idles) > 1 else 'neither'} is busy all the time: {shares}"
        if max_ahead is not None and ahead_seen >= max_ahead:
            sentence += f"; rows ahead were at their bound ({max_ahead}, stream.max_rows_ahead)"
    elif waits >= NOTICEABLE:
        sentence = f"{'- and '.join(full)}-bound: {shares}"
    elif len(full) < len(idles):
        fewer = "" if "teacher" in full else _one_replica_fewer(asked, busy)
        sentence = f"student-bound: {shares}{fewer}"
    else:
        sentence = f"balanced: {shares}"
    sentence += _each_other(asked)
    rest = _total(training, "seconds") - seconds
    if rest > seconds:
        sentence += f"; for {formatting.duration(rest)} of the training nothing was asked"
    return sentence


def _without_teacher(training: Windows) -> str | None:
    if _total(training, "seconds") < LEAST_S:
        return None
    waits = formatting.share(_waiting_share(training))
    told = f"the student alone: nothing was asked of a teacher, and it waits {waits} for rows"
    return told + _each_other(training)


def _from_first_to_last_answer(training: Windows) -> Windows:
    """Without the window of the first answer, in most of which there was none."""
    answered = [number for number, window in enumerate(training) if window["teacher_rows"] > 0]
    return training[answered[0] + 1 : answered[-1] + 1] if answered else []


def _one_replica_fewer(asked: Windows, busy: float) -> str:
    """Whether the others could have done its work, where their number never changed."""
    counts = {window["replicas"] for window in asked}
    if len(counts) != 1 or (count := counts.pop()) < 2:
        return ""
    then = busy * count / (count - 1)
    if then > FULL:
        return ""
    others = formatting.plural(count - 1, "other")
    return f"; one replica fewer costs nothing: the {others} would be busy {formatting.share(then)}"


def _waiting_share(windows: Windows) -> float:
    worker_s = sum(w["workers"] * w["seconds"] for w in windows)
    return min(1.0, _total(windows, "student_wait_s") / worker_s) if worker_s else 0.0


def _each_other(windows: Windows) -> str:
    """Whether workers of the student wait for each other; earlier versions did not count it."""
    worker_s = sum(w["workers"] * w["seconds"] for w in windows)
    idle_s = sum(window.get("student_idle_s", 0.0) for window in windows)
    if not worker_s or idle_s / worker_s < NOTICEABLE:
        return ""
    return f"; its workers wait {formatting.share(min(1.0, idle_s / worker_s))} for each other"


def _total(windows: Windows, name: str) -> float:
    return float(sum(window[name] for window in windows))
