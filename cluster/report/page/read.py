"""A run as its folder tells it: everything the page shows, read once.

Consumes the run folder's files and nothing else, so that a page can be made anew for any run, also
one of an earlier version. What is not there is empty, what is cut off or no JSON is left out and
counted: a page of a run that died in the middle of a line is still a page.
"""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raystill.base.logs import run_name
from raystill.base.records import LARGEST_RECORDS, BrokenFile, mapping, number, require_size
from raystill.base.run_folder import (
    ANSWERS,
    CONFIG,
    DRAFT,
    EVALUATION,
    HELD_OUT,
    LAYERS,
    MANIFEST,
    METRICS,
    METRICS_DISCARDED,
    PROBE,
    SPEED,
    SPENDING,
    STATUS,
    SUMMARY,
    TASKS,
    TIMELINE,
    TRAIN_PROMPTS,
    RunFolder,
)
from raystill.cluster.report.page.curves import Curve
from raystill.cluster.report.summary import counted, with_files
from raystill.cluster.report.timeline import COUNTERS, NEW_COUNTERS
from raystill.config.load import LARGEST_FILE, parse_yaml

Record = dict[str, Any]

MOST_COUNTED_BYTES = 256 << 20
"""Size of a file of prompts from which on its lengths are not counted."""
MOST_ANSWERS = 24
FIGURES = frozenset(
    {"loss", "grad_norm", "lr", "rows", "tokens", "tokens_per_s", "student_s", "data_wait_s"}
    | {"teacher_tail_mass", "student_tail_mass", "padding_fraction", "workers"}
)
"""What is kept of a line of ``metrics.jsonl``, beside the terms of the objective."""


@dataclass(frozen=True)
class Lengths:
    """Number of rows by length in tokens, and by source; ``cut`` rows ended at the limit."""

    by_length: dict[int, int] = field(default_factory=dict)
    by_source: dict[str, int] = field(default_factory=dict)
    cut: int = 0

    @property
    def rows(self) -> int:
        """All rows counted."""
        return sum(self.by_length.values())

    def quantile(self, share: float) -> int:
        """The length that ``share`` of the rows do not exceed."""
        wanted, seen = share * self.rows, 0
        for length, rows in sorted(self.by_length.items()):
            seen += rows
            if seen >= wanted:
                return length
        return 0


@dataclass(frozen=True)
class RunData:
    """What one run folder holds. Records are as written; see docs/run-folder.md."""

    name: str
    path: str
    status: Record
    summary: Record
    api: Record
    manifest: Record
    config: Record
    layers: Record
    probe: Record
    draft: Record
    tasks: Record
    speed: Record
    metrics: dict[str, Curve]
    evaluations: list[Record]
    answers: list[Record]
    windows: list[Record]
    steps_trained_again: int
    prompts: Lengths
    responses: Lengths
    broken_lines: int
    read_at: float

    @property
    def state(self) -> str:
        """running, completed, stopped, failed, lost (its driver is gone), or unknown."""
        state = str(self.status.get("state") or self.summary.get("status") or "unknown")
        alive_until = number(self.status.get("alive_until"))
        if state == "running" and alive_until is not None and alive_until < self.read_at:
            return "lost"
        return state

    @property
    def before(self) -> Record:
        """The first evaluation; empty where there is none."""
        return self.evaluations[0] if self.evaluations else {}

    @property
    def after(self) -> Record:
        """The last evaluation, if there is more than one."""
        return self.evaluations[-1] if len(self.evaluations) > 1 else {}

    @property
    def baselines(self) -> Record:
        """The newest models of the training answers."""
        found = [e["baselines"] for e in self.evaluations if isinstance(e.get("baselines"), dict)]
        return found[-1] if found else mapping(self.summary.get("baselines"))

    @property
    def step(self) -> int:
        """The newest step of the metrics; 0 before the first."""
        newest = self.metrics["rows"].last if "rows" in self.metrics else None
        return int(newest[0]) if newest else 0


class RunReader:
    """Reads a run's folder; keeps what does not change while the run goes on."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lengths: dict[str, Lengths] = {}
        self._broken = 0

    def read(self) -> RunData:
        """Read all files as they are now."""
        self._broken = 0
        metrics: dict[str, Curve] = {}
        for record in self._lines(METRICS):
            _add_figures(metrics, record)
        summary = self._json(SUMMARY)
        data = RunData(
            name=run_name(self.folder.path),
            path=self.folder.path,
            status=self._json(STATUS),
            summary=summary,
            api=mapping(summary.get("api")),
            manifest=self._json(MANIFEST),
            config=self._yaml(CONFIG),
            layers=self._json(LAYERS),
            probe=self._json(PROBE),
            draft=self._json(DRAFT),
            tasks=self._json(TASKS),
            speed=self._json(SPEED),
            metrics=metrics,
            evaluations=_joined(self._lines(EVALUATION)),
            answers=_first_and_last(self._lines(ANSWERS)),
            windows=[w for w in self._lines(TIMELINE) if _is_window(w)],
            steps_trained_again=sum(1 for _ in self._lines(METRICS_DISCARDED)),
            prompts=self._counted(TRAIN_PROMPTS, "prompt_ids"),
            responses=self._counted(HELD_OUT, "response_ids"),
            broken_lines=self._broken,
            read_at=time.time(),
        )
        if data.state in ("running", "completed", "stopped"):
            return data
        return replace(data, api=self._spent(data), broken_lines=self._broken)

    def _spent(self, data: RunData) -> Record:
        """What an API teacher was paid and how it failed, of a run that has ended in an error: its
        summary is that of an earlier start, if there is one.
        """
        start, _, ending = SPENDING.rpartition(".")
        names = [name for name in self.folder.names() if name.startswith((SPENDING, f"{start}-"))]
        files = [counted(self._lines(name)) for name in names if name.endswith(ending)]
        summed = {n: v for n, v in data.api.items() if isinstance(v, int | float)}
        return with_files(summed, files)

    def _lines(self, name: str) -> Iterator[Record]:
        if not self.folder.exists(name):
            return
        try:
            require_size(self.folder, name, LARGEST_RECORDS)
        except BrokenFile:
            self._broken += 1
            return
        with self.folder.open_input(name) as stream:
            for line in io.BufferedReader(stream):
                try:
                    record = json.loads(line.decode(errors="replace"))
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    yield record
                elif line.strip():
                    self._broken += 1

    def _json(self, name: str) -> Record:
        if not self.folder.exists(name):
            return {}
        try:
            require_size(self.folder, name)
            return mapping(json.loads(self.folder.read_text(name)))
        except (ValueError, RecursionError):
            self._broken += 1
            return {}

    def _yaml(self, name: str) -> Record:
        if not self.folder.exists(name):
            return {}
        try:
            require_size(self.folder, name, LARGEST_FILE)
            return mapping(parse_yaml(self.folder.read_text(name)))
        except (yaml.YAMLError, ValueError, RecursionError):
            self._broken += 1
            return {}

    def _counted(self, name: str, column: str) -> Lengths:
        if name not in self._lengths:
            if not self.folder.exists(name):
                return Lengths()
            self._lengths[name] = self._count(name, column)
        return self._lengths[name]

    def _count(self, name: str, column: str) -> Lengths:
        by_length: dict[int, int] = {}
        by_source: dict[str, int] = {}
        cut = 0
        try:
            with self.folder.open_input(name) as stream:
                if stream.size() > MOST_COUNTED_BYTES:
                    return Lengths()
                file = pq.ParquetFile(stream)
                wanted = {column, "source", "finish_reason"} & set(file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=4096, columns=sorted(wanted)):
                    for row in batch.select([n for n in wanted if n != column]).to_pylist():
                        source = str(row.get("source") or "")
                        by_source[source] = by_source.get(source, 0) + 1
                        cut += row.get("finish_reason") == "length"
                    lists = batch.column(column)
                    if not pa.types.is_list(lists.type):
                        raise ValueError(f"the column {column!r} has no lists")
                    for length in lists.value_lengths().to_pylist():
                        by_length[length or 0] = by_length.get(length or 0, 0) + 1
        except (OSError, ValueError, KeyError):  # Also Arrow's own errors: not a Parquet file.
            self._broken += 1
            return Lengths()
        return Lengths(by_length, by_source, cut)


def _add_figures(metrics: dict[str, Curve], record: Record) -> None:
    step = number(record.get("step"))
    if step is None:
        return
    for name, value in record.items():
        if name in FIGURES or name.startswith("objective/"):
            metrics.setdefault(name, Curve()).add(step, number(value))


def _first_and_last(lines: Iterator[Record]) -> list[Record]:
    """The answers of the first and of the last step, at most ``MOST_ANSWERS`` of each."""
    kept: dict[float, list[Record]] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is None:
            continue
        answers = kept.setdefault(step, [])
        if len(answers) < MOST_ANSWERS:
            answers.append(line)
        if len(kept) > 2:
            kept = {s: kept[s] for s in (min(kept), max(kept))}
    return [answer for step in sorted(kept) for answer in kept[step]]


def _joined(lines: Iterator[Record]) -> list[Record]:
    """Evaluations in the order of their steps; lines of one step are one."""
    by_step: dict[int, Record] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is not None:
            by_step.setdefault(int(step), {}).update(line)
    return [by_step[step] for step in sorted(by_step)]


def _is_window(record: Record) -> bool:
    counters = [name for name in COUNTERS if name in record or name not in NEW_COUNTERS]
    names = ("seconds", "replicas", "workers", "rows_ahead", *counters)
    whole = all(number(record.get(name)) is not None for name in names)
    return whole and record["seconds"] > 0 and isinstance(record.get("phase"), str)
