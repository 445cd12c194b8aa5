"""The teacher, the student as it began, and the finished student at tasks of an evaluation harness.

Where it sits: `tasks_command` (``raystill tasks``) has one model after the other asked on this
machine; `evaluate_run` does the same at the end of a run whose file names ``evaluation.tasks``, on
the cluster, where a replica of the teacher would be. Figures go to ``tasks.json`` of the run folder
after each model; the closing table and the page show them. What was measured there before, of the
same models at the same tasks, is kept.

The harness is an optional extra (``raystill[tasks]``). Its standard error of a metric gives the
95 % interval, mean +- 1.96 standard errors.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raystill.base import formatting
from raystill.base.console import open_named
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.records import BrokenFile, plain, read_object
from raystill.base.redact import redact, redacted
from raystill.base.run_folder import CONFIG, LAYERS, STUDENT, TASKS, RunFolder
from raystill.cluster.check.folders import require_sound
from raystill.cluster.commands.as_json import print_json, say_beside
from raystill.cluster.harness.ask import (
    Figures,
    Loading,
    TaskOptions,
    ask,
    compare,
    folder_content,
    harness_version,
    scores,
    unpacked,
)
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.cluster.report.page.page import page_anew
from raystill.cluster.report.tasks import print_tasks
from raystill.cluster.worth.start import Start
from raystill.config.load import load_config, named_teacher
from raystill.config.run import RunConfig, absolute_paths
from raystill.model.files import ModelFolder, find_model
from raystill.model.identity import teacher_identity
from raystill.model.on_node import ModelSource

EXIT_INTERRUPTED = 130
ANSWERS = "tasks"
"""Folder of the harness's answers so far, in the log folder; a model's go when it is done."""
ORDER = ("teacher", "before", "student")
Model = ModelSource | Start


@dataclass(frozen=True)
class Asked:
    """What one model is asked with. Pickles: it may be asked on another node.

    Attributes:
        options: The tasks; ``include`` is set where they are asked.
        content: The folder of task files, by names in it; None: there is none.
        dtype: The teacher's precision.
        run_folder: Path of the run folder, for the log.
        own_code: Models, by what they are, that may run Python files of theirs.
        gpus: GPUs of the process that asks; 0: those that the harness finds, or none.
    """

    options: TaskOptions
    content: dict[str, bytes] | None
    dtype: str
    run_folder: str
    own_code: frozenset[str] = frozenset()
    gpus: int = 0

    @classmethod
    def of(cls, options: TaskOptions, config: RunConfig, folder: RunFolder) -> "Asked":
        """For a run; raises RunError where ``options.include`` is no folder of tasks."""
        content = None if options.include is None else folder_content(options.include)
        trusted = {"teacher"} if config.teacher.trust_remote_code else set[str]()
        from_teacher = config.student.init == "from_teacher"
        if config.student.trust_remote_code or (from_teacher and trusted):
            trusted |= {"before", "student"}
        return cls(options, content, config.teacher.dtype, folder.path, frozenset(trusted))

    def settings(self) -> Figures:
        """What figures depend on beside the model; as tasks.json keeps it."""
        digest = hashlib.sha256()
        for name, data in sorted((self.content or {}).items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return {
            "harness": harness_version(),
            "names": list(self.options.names),
            "files": None if self.content is None else digest.hexdigest(),
            "backend": self.options.backend,
            "limit": self.options.limit,
            "chat_template": self.options.chat,
            "dtype": self.dtype,
        }


def models_of(
    folder: RunFolder, before: bool = True, teacher_name: str = ""
) -> tuple[RunConfig, dict[str, Model]]:
    """The run's configuration, and its models: teacher, before (the student's start), student.

    teacher_name: of one among several; "": the first.

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
    whole = absolute_paths(load_config(folder.local / CONFIG, []))
    config = whole.by_teacher[teacher_name] if teacher_name else whole
    if config.teacher.engine != "vllm":
        message = f"is {config.teacher.engine!r}: its weights are not there to be asked"
        raise ConfigError([Problem("teacher.engine", message)])
    teacher = _found("teacher.model", config.teacher.model, config.teacher.revision)
    models: dict[str, Model] = {"teacher": teacher}
    if before and config.student.model is not None:
        models["before"] = _found("student.model", config.student.model, config.student.revision)
    elif before:
        first = _found("teacher.model", whole.teacher.model, whole.teacher.revision)
        models["before"] = Start(whole, first, folder if folder.exists(LAYERS) else None)
    require_sound("student", student)
    models["student"] = ModelSource.of(STUDENT, folder.local / STUDENT)
    return config, models


def _found(field: str, name: str, revision: str | None) -> ModelSource:
    found = find_model(name, revision)
    if found.model is None:
        raise ConfigError([Problem(field, str(found.problem or found.notice))])
    require_sound(field, found.model)
    return ModelSource.of(name, found.model.path)


def identity_of(model: Model) -> str | None:
    """What a model's figures belong to; None where its files do not say."""
    if isinstance(model, Start):
        return model.identity(identity_of(model.teacher))
    try:
        return teacher_identity(Path(model.folder))
    except (ValueError, OSError):
        return None


def ask_here(name: str, model: Model, asked: Asked) -> dict[str, dict[str, Figures]]:
    """The scores of one model, asked on this node. Raises RunError where the harness fails."""
    folder = RunFolder(asked.run_folder)
    answers, identity = None, identity_of(model)
    if identity is not None:
        key = json.dumps([asked.settings(), identity], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        answers = folder.logs / ANSWERS / f"{name}-{digest}"
        answers.parent.mkdir(parents=True, exist_ok=True)
    loading = Loading(asked.dtype, asked.gpus, name in asked.own_code)
    with model_here(model) as path, unpacked(asked.content) as include:
        options = replace(asked.options, include=include)
        found = scores(ask(path, options, loading, folder.logs / "tasks.log", answers))
    if answers is not None:
        _remove(answers)
    return found


def _remove(answers: Path) -> None:
    """Remove the harness's answers of one model that is done; those of others stay."""
    for file in answers.parent.glob(f"{answers.name}*"):  # The harness adds a rank and an ending.
        file.unlink(missing_ok=True)
    with suppress(OSError):  # Others' answers are in it.
        answers.parent.rmdir()


@contextmanager
def model_here(model: Model) -> Iterator[Path]:
    """A folder on this node with the model."""
    if isinstance(model, Start):
        with model.made() as folder:
            yield folder
    else:
        yield Path(model.on_this_node("all"))


AskModel = Callable[[str, Model, Asked], dict[str, dict[str, Figures]]]


def measure(
    models: Mapping[str, Model],
    asked: Asked,
    earlier: object,
    ask_model: AskModel,
    say: Callable[[str], None],
) -> Iterator[Figures]:
    """What tasks.json holds, anew after each model. ``earlier``: what it held before.

    A model that cannot be asked is told in ``failed``, and the others are asked all the same.
    """
    settings = asked.settings()
    identities = {name: identity_of(model) for name, model in models.items()}
    by_model = kept(earlier, settings, identities)
    failed: dict[str, str] = {}
    for name, model in models.items():
        shown = "student as it began" if name == "before" else name
        if name in by_model:
            say(f"the {shown}: asked before")
            continue
        say(f"asking the {shown}")
        try:
            by_model[name] = ask_model(name, model, asked)
        except RunError as error:
            failed[name] = redact(str(error))
            say(f"the {shown} could not be asked: {error}")
        yield _record(settings, identities, by_model, failed)
    yield _record(settings, identities, by_model, failed)


def _record(
    settings: Figures,
    identities: Mapping[str, str | None],
    by_model: Mapping[str, Any],
    failed: Mapping[str, str],
) -> Figures:
    in_order = {name: by_model[name] for name in ORDER if name in by_model}
    return {
        **settings,
        "models": {name: identities[name] for name in in_order},
        "failed": dict(failed),
        "tasks": compare(in_order),
    }


def kept(
    earlier: object, settings: Figures, identities: Mapping[str, str | None]
) -> dict[str, dict[str, dict[str, Figures]]]:
    """The scores that tasks.json has already, of the same models asked the same."""
    if not isinstance(earlier, dict) or any(earlier.get(k) != v for k, v in settings.items()):
        return {}
    models, tasks = earlier.get("models"), earlier.get("tasks")
    if not isinstance(models, dict) or not isinstance(tasks, dict):
        return {}
    found: dict[str, dict[str, dict[str, Figures]]] = {}
    for name, identity in identities.items():
        if identity is None or models.get(name) != identity:
            continue
        scored: dict[str, dict[str, Figures]] = {}
        for task, metrics in tasks.items():
            for metric, of in metrics.items() if isinstance(metrics, dict) else ():
                score = of.get(name) if isinstance(of, dict) else None
                if isinstance(score, dict) and set(score) >= {"mean", "higher_is_better"}:
                    scored.setdefault(task, {})[metric] = score
        if scored:
            found[name] = scored
    return found


def tasks_command(
    path: str,
    options: TaskOptions,
    as_json: bool,
    say: Callable[[str], None],
    before: bool = True,
    teacher: str | None = None,
) -> int:
    """Measure, write tasks.json after each model, print; the exit status.

    teacher: which of several is meant. Raises ConfigError and RunError before any model is loaded,
    where nothing can be measured;
    RunError also where a model could not be asked, after the others' figures are written.
    """
    if as_json:  # Standard output is for a program.
        say = say_beside
    harness_version()
    folder = open_named(path)
    named = (
        named_teacher(load_config(folder.local / CONFIG, []), teacher)
        if (folder.local is not None and folder.exists(CONFIG))
        else ""
    )
    config, models = models_of(folder, before, named)
    asked = Asked.of(options, config, folder)
    found: Figures = {}
    with hold_run_folder(folder):
        try:
            for found in measure(models, asked, earlier(folder), ask_here, say):
                write(folder, found)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on, what was measured is in {TASKS}")
            return EXIT_INTERRUPTED
    if as_json:
        print_json(found)
    else:
        print_tasks(found)
    say(f"\nwritten to {formatting.path(folder.join(TASKS))}{page_anew(folder)}")
    if found["failed"]:
        name, reason = next(iter(found["failed"].items()))
        raise RunError(f"the {name} could not be asked: {reason}")
    return 0


def earlier(folder: RunFolder) -> object:
    """What tasks.json holds; None where it is not there, or was broken by hand."""
    with suppress(BrokenFile, OSError, ValueError):
        if folder.exists(TASKS):
            return read_object(folder, TASKS)
    return None


def write(folder: RunFolder, found: Figures) -> None:
    """Write tasks.json, whole or not at all."""
    folder.write_text(TASKS, json.dumps(redacted(plain(found)), indent=2) + "\n")
