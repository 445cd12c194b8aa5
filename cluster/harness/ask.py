"""lm-evaluation-harness, run as a program of its own: one process a model, its results, its scores.

Where it sits: ``cluster/worth/tasks.py`` has teacher and student asked, on this machine or on a
node of the cluster; ``cluster/check`` asks the harness what its tasks are before anything is spent.
Imports neither the harness nor Ray.
"""

import ctypes
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.base.redact import redact

HARNESS = "lm_eval"
Z95 = 1.959964
"""Standard normal quantile of 0.975."""
LAST_LINES = 12
DEFAULT_TIMEOUT_S = 21_600.0
LARGEST_FOLDER = 64 << 20
"""Bytes of a folder of task files; it is sent to the node that asks."""
MOST_ENTRIES = 10_000
"""Files and folders of such a folder."""
PR_SET_PDEATHSIG = 1
Figures = dict[str, Any]


@dataclass(frozen=True)
class TaskOptions:
    """What is asked for.

    Attributes:
        names: Tasks of the harness, or of the files in ``include``.
        include: Folder of task files, in which the harness runs, so that a task file names its data
            relative to itself; None: the harness's own tasks alone.
        limit: Most documents of a task; None: all.
        backend: The harness's kind of model, ``hf`` or ``vllm``.
        batch: Rows that are asked at once.
        chat: Whether documents go through the model's chat template.
        timeout_s: Longest time with one model, seconds.
    """

    names: Sequence[str]
    include: str | None = None
    limit: int | None = None
    backend: str = "hf"
    batch: int = 8
    chat: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S


def harness_version() -> str:
    """The installed harness's. Raises RunError where there is none."""
    if importlib.util.find_spec(HARNESS) is None:
        raise RunError(
            "the tasks are those of lm-evaluation-harness, which is not installed; install it: "
            "pip install 'raystill[tasks]', in a clone: make tasks"
        )
    return metadata.version("lm-eval")


@dataclass(frozen=True)
class Loading:
    """How the harness loads a model: its dtype, on how many GPUs, and whether with its own code."""

    dtype: str
    gpus: int = 0
    own_code: bool = False

    def arguments(self, model: Path, backend: str) -> Figures:
        """The harness's ``--model_args``."""
        found: Figures = {"pretrained": str(model), "dtype": self.dtype}
        if self.own_code:
            found["trust_remote_code"] = True
        if self.gpus > 1 and backend == "vllm":
            found["tensor_parallel_size"] = self.gpus
        elif self.gpus > 1:
            found["parallelize"] = True
        return found


def ask(
    model: Path, options: TaskOptions, loading: Loading, log: Path, answers: Path | None = None
) -> Figures:
    """What the harness says of one model: its results file.

    answers: where the harness keeps each answer as it comes, so that an ask that was killed goes
    on. Raises RunError with the end of the harness's output where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="raystill-tasks-") as place:
        arguments = loading.arguments(model, options.backend)
        command = [sys.executable, "-m", HARNESS, "run", "--model", options.backend]
        command += ["--model_args", json.dumps(arguments), "--tasks", ",".join(options.names)]
        command += ["--batch_size", str(options.batch), "--output_path", place]
        if options.limit is not None:
            command += ["--limit", str(options.limit)]
        if options.chat:
            command.append("--apply_chat_template")
        if options.include is not None:
            command += ["--include_path", "."]
        if answers is not None:
            command += ["--use_cache", str(answers.absolute())]
        try:
            code = run_harness(command, options.include or place, log, options.timeout_s)
        except subprocess.TimeoutExpired:
            raise RunError(
                f"lm-evaluation-harness was ended after {options.timeout_s:.0f} s with "
                f"{formatting.path(str(model))}; what it answered is kept: ask again to go on, or "
                "give it more time (--timeout, in the run file evaluation.tasks.timeout_s). Its "
                f"output is in {formatting.path(str(log))}"
            ) from None
        found = sorted(Path(place).rglob("results_*.json"))
        if code == 0 and found:
            results: Figures = json.loads(found[-1].read_text())
            return results
    said = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise RunError(
        f"lm-evaluation-harness ended with status {code} for {formatting.path(str(model))}; all of "
        f"its output is in {formatting.path(str(log))}, which ends with:\n{redact(said)}"
    )


def run_harness(command: Sequence[str], folder: str, log: Path, timeout_s: float) -> int:
    """Run it in ``folder``, never in this one, whose ``datasets/`` is no package; its status.

    It ends with this process, however that ends. Raises subprocess.TimeoutExpired where it was
    ended for its time.
    """
    with log.open("a") as file:
        return subprocess.run(
            command,
            cwd=folder,
            stdout=file,
            stderr=file,
            preexec_fn=_end_with_parent,
            timeout=timeout_s,
        ).returncode


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def folder_content(folder: str) -> dict[str, bytes]:
    """The files of a folder of tasks by their names in it. Raises RunError where it is no such."""
    root, files, size = Path(folder), [], 0
    for number, path in enumerate(root.rglob("*"), 1):
        if path.is_file():
            files.append(path)
            size += path.stat().st_size
        if size > LARGEST_FOLDER or number > MOST_ENTRIES:  # A home, or the whole disk.
            raise RunError(
                f"{folder!r} has more than {MOST_ENTRIES:,} files and folders, or more than "
                f"{formatting.size(LARGEST_FOLDER)} of files: name a folder of task files and "
                "their data alone"
            )
    if not any(path.suffix == ".yaml" for path in files):
        raise RunError(
            f"{folder!r} has no task file (*.yaml); name a folder of such, e.g. examples/tasks"
        )
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}


@contextmanager
def unpacked(content: Mapping[str, bytes] | None) -> Iterator[str | None]:
    """A temporary folder with these files; None for None."""
    if content is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="raystill-task-files-") as folder:
        for name, data in content.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield folder


def offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the harness may not ask the Hub for a task's data."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(environment.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in names)


def scores(results: Figures) -> dict[str, dict[str, Figures]]:
    """Each task's metrics, with their intervals: ``mean low high stderr n higher_is_better``.

    The interval is that of `interval`; None of a metric without a standard error (the harness says
    "N/A").
    """
    found: dict[str, dict[str, Figures]] = {}
    for task, figures in results["results"].items():
        better = results.get("higher_is_better", {}).get(task) or {}
        number = (results.get("n-samples", {}).get(task) or {}).get("effective")
        for key, mean in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(mean, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            known = isinstance(stderr, (int, float))
            is_share = better.get(metric) is True
            low, high = interval(mean, stderr, number, is_share) if known else (None, None)
            found.setdefault(task, {})[metric if kind == "none" else f"{metric} ({kind})"] = {
                "mean": mean,
                "low": low,
                "high": high,
                "stderr": stderr if known else None,
                "n": number,
                "higher_is_better": better.get(metric),
            }
    return found


def interval(
    mean: float, stderr: float, n: int | None, more_is_better: bool
) -> tuple[float, float]:
    """The 95 % interval of a mean over ``n`` documents (None: not known, as of a group of tasks).

    Of right and wrong answers it is `wilson`'s: where 5 of 5 are right the standard error is 0.
    That they are such is seen by the harness's standard error, whose square is
    sum (x - mean)^2 / (n (n - 1)): times n - 1 it is mean (1 - mean) for zeros and ones, and less
    for other values between 0 and 1. Else it is mean +- 1.96 standard errors, and ends at 0 and 1
    where the values may lie between them: more is better, and they vary no more than that.
    """
    most = mean * (1 - mean)
    varies = None if n is None or n < 2 else (n - 1) * stderr**2
    if n is not None and varies is not None and abs(varies - most) <= 1e-6 * most:
        return wilson(mean, n)
    low, high = mean - Z95 * stderr, mean + Z95 * stderr
    if more_is_better and most >= 0 and (varies is None or varies <= most):
        low, high = max(low, 0.0), min(high, 1.0)
    return low, high


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of ``n`` (E. B. Wilson, Probable inference, 1927).

    With z the normal quantile: centre (share + z^2/2n) / (1 + z^2/n), half width
    z sqrt(share (1 - share)/n + z^2/4n^2) / (1 + z^2/n).
    """
    spread = Z95 * Z95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(by_model: Mapping[str, dict[str, dict[str, Figures]]]) -> Figures:
    """Scores by task, metric and model, and the student's share of the teacher's score.

    by_model: what `scores` says of each. No share of a metric of which less is better, or of which
    the harness does not say which is better.
    """
    tasks: Figures = {}
    for model, found in by_model.items():
        for task, metrics in found.items():
            for metric, score in metrics.items():
                tasks.setdefault(task, {}).setdefault(metric, {})[model] = score
    for metrics in tasks.values():
        for of in metrics.values():
            if "teacher" in of and "student" in of:
                teacher, student = of["teacher"]["mean"], of["student"]["mean"]
                says = teacher > 0 and of["student"]["higher_is_better"] is True
                of["share_of_teacher"] = student / teacher if says else None
    return tasks
