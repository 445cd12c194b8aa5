"""``raystill tasks``: the teacher and the finished student at tasks of lm-evaluation-harness.

Where it sits: the driver reads the run folder and calls `tasks_command`, which has the harness ask
one model after the other, each in a process of its own (``python -m lm_eval``), on this machine.
Its figures go to ``tasks.json`` of the run folder; the closing table and the page show them.

The harness is an optional extra (``raystill[tasks]``). Its standard error of a metric gives the
95 % interval, mean +- 1.96 standard errors.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raystill.base import formatting
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.records import plain
from raystill.base.redact import redact, redacted
from raystill.base.run_folder import CONFIG, STUDENT, TASKS, RunFolder
from raystill.cluster.commands.as_json import print_json, say_beside
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.cluster.report.page.page import page_anew
from raystill.cluster.report.tasks import print_tasks
from raystill.config.load import load_config
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder, find_model

HARNESS = "lm_eval"
Z95 = 1.959964
"""Standard normal quantile of 0.975."""
LAST_LINES = 12
EXIT_INTERRUPTED = 130
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
    """

    names: Sequence[str]
    include: str | None = None
    limit: int | None = None
    backend: str = "hf"
    batch: int = 8
    chat: bool = False


def harness_version() -> str:
    """The installed harness's. Raises RunError where there is none."""
    if importlib.util.find_spec(HARNESS) is None:
        raise RunError(
            "the tasks are those of lm-evaluation-harness, which is not installed; install it: "
            "pip install 'raystill[tasks]', in a clone: make tasks"
        )
    return metadata.version("lm-eval")


def models_of(folder: RunFolder) -> tuple[RunConfig, dict[str, Path]]:
    """The run's configuration, and the folders of its models on this machine, by what they are:
    teacher, student, and before: what the student was, where that is a model of its own.

    Raises RunError and ConfigError where there is nothing to measure.
    """
    if folder.local is None or not folder.exists(CONFIG):
        raise RunError(
            f"{folder.path} is no run folder on a disk of this machine (it has no {CONFIG}); name "
            "that of a finished run, e.g. runs/quickstart"
        )
    student = ModelFolder(STUDENT, folder.local / STUDENT)
    if not student.config or not student.has_weights:
        raise RunError(
            f"{folder.path} has no finished student ({STUDENT}/ is missing, or without config.json "
            "or weights); finish the run first: raystill run RUN.yaml"
        )
    config = load_config(folder.local / CONFIG, [])
    if config.teacher.engine != "vllm":
        message = f"is {config.teacher.engine!r}: its weights are not there to be asked"
        raise ConfigError([Problem("teacher.engine", message)])
    wished = {"teacher": (config.teacher.model, config.teacher.revision)}
    if config.student.init == "model" and config.student.model:
        wished["before"] = (config.student.model, config.student.revision)
    models = {}
    for name, (model, revision) in wished.items():
        found = find_model(model, revision)
        if found.model is None:
            field = "teacher.model" if name == "teacher" else "student.model"
            raise ConfigError([Problem(field, str(found.problem or found.notice))])
        models[name] = Path(found.model.path).absolute()
    return config, {**models, "student": Path(student.path).absolute()}


def ask(model: Path, options: TaskOptions, dtype: str, log: Path) -> Figures:
    """What the harness says of one model: its results file. Raises RunError with the end of its
    output where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="raystill-tasks-") as place:
        arguments = {"pretrained": str(model), "dtype": dtype}
        command = [sys.executable, "-m", HARNESS, "run", "--model", options.backend]
        command += ["--model_args", json.dumps(arguments), "--tasks", ",".join(options.names)]
        command += ["--batch_size", str(options.batch), "--output_path", place]
        if options.limit is not None:
            command += ["--limit", str(options.limit)]
        if options.chat:
            command.append("--apply_chat_template")
        if options.include is not None:
            command += ["--include_path", "."]
        with log.open("a") as file:
            cwd = options.include or place  # Not this folder, whose datasets/ is no package.
            code = subprocess.run(command, cwd=cwd, stdout=file, stderr=file).returncode
        found = sorted(Path(place).rglob("results_*.json"))
        if code == 0 and found:
            results: Figures = json.loads(found[-1].read_text())
            return results
    said = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise RunError(
        f"lm-evaluation-harness ended with status {code} for {formatting.path(str(model))}; all of "
        f"its output is in {formatting.path(str(log))}, which ends with:\n{redact(said)}"
    )


def scores(results: Figures) -> dict[str, dict[str, Figures]]:
    """Each task's metrics, with their intervals: ``mean low high stderr n higher_is_better``.

    A metric without a standard error (the harness says "N/A") has an interval of None.
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
            half = Z95 * stderr if known else None
            found.setdefault(task, {})[metric if kind == "none" else f"{metric} ({kind})"] = {
                "mean": mean,
                "low": None if half is None else mean - half,
                "high": None if half is None else mean + half,
                "stderr": stderr if known else None,
                "n": number,
                "higher_is_better": better.get(metric),
            }
    return found


def compare(by_model: dict[str, Figures]) -> Figures:
    """Scores by task, metric and model, and the student's share of the teacher's score."""
    tasks: Figures = {}
    for model, results in by_model.items():
        for task, metrics in scores(results).items():
            for metric, score in metrics.items():
                tasks.setdefault(task, {}).setdefault(metric, {})[model] = score
    for metrics in tasks.values():
        for of in metrics.values():
            if "teacher" in of and "student" in of:
                teacher, student = of["teacher"]["mean"], of["student"]["mean"]
                of["share_of_teacher"] = student / teacher if teacher > 0 else None
    return tasks


def measure(
    config: RunConfig,
    models: dict[str, Path],
    options: TaskOptions,
    log: Path,
    say: Callable[[str], None],
) -> Iterator[Figures]:
    """What tasks.json holds, anew after each model."""
    facts = {
        "harness": harness_version(),
        "backend": options.backend,
        "limit": options.limit,
        "chat_template": options.chat,
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    by_model: dict[str, Figures] = {}
    for name, model in models.items():
        say(f"asking the {'start' if name == 'before' else name}: {formatting.path(str(model))}")
        by_model[name] = ask(model, options, config.teacher.dtype, log)
        yield {**facts, "tasks": compare(by_model)}


def tasks_command(
    path: str, options: TaskOptions, as_json: bool, say: Callable[[str], None]
) -> int:
    """Measure, write tasks.json after each model, print; the exit status.

    Raises ConfigError and RunError before any model is loaded, where nothing can be measured.
    """
    if as_json:  # Standard output is for a program.
        say = say_beside
    harness_version()
    folder = RunFolder(path)
    config, models = models_of(folder)
    if options.include is not None and not list(Path(options.include).rglob("*.yaml")):
        raise RunError(
            f"--include is {options.include!r}, where no task file (*.yaml) is; name a folder of "
            "such, e.g. examples/tasks"
        )
    with hold_run_folder(folder), _interruptible(say) as interrupted:
        for found in measure(config, models, options, folder.logs / "tasks.log", say):
            folder.write_text(TASKS, json.dumps(redacted(plain(found)), indent=2) + "\n")
    if interrupted:
        return EXIT_INTERRUPTED
    if as_json:
        print_json(found)
    else:
        print_tasks(found)
    say(f"\nwritten to {formatting.path(folder.join(TASKS))}{page_anew(folder)}")
    return 0


@contextmanager
def _interruptible(say: Callable[[str], None]) -> Iterator[list[bool]]:
    stopped: list[bool] = []
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append(True)
        say(f"stopped; what was measured is in {TASKS}")
