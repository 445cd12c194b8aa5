"""Tasks at the end of a run whose file names them, while the cluster is still there.

Where it sits: the driver calls `evaluate_run` after the student is saved, and again where a run
that has finished is started once more and something is missing. Each model is asked in an actor
where a replica of the teacher would be. Whatever goes wrong here is told and recorded, and never
fails the run.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raystill.base.errors import ConfigError, RunError
from raystill.base.redact import redact
from raystill.base.run_folder import TASKS, RunFolder, resolve_input
from raystill.cluster.harness.ask import Figures, TaskOptions
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.cluster.job.run import connected
from raystill.cluster.report.page.during import close_page
from raystill.cluster.worth.tasks import (
    Asked,
    Model,
    ask_here,
    earlier,
    measure,
    models_of,
    write,
)
from raystill.config.run import RunConfig
from raystill.config.student import TasksConfig
from raystill.placement.requests import describe
from raystill.serve.deploy import gpus_of, placement


class Asker:
    """An actor that asks one model. ``gpus``: it may use; 0: it uses all cores of its node."""

    def __init__(self, gpus: int) -> None:
        if gpus == 0:  # Ray's own setting is one thread for each core that was asked for.
            os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))

    def ready(self) -> None:
        """Answer."""

    def ask(self, name: str, model: Model, asked: Asked) -> dict[str, dict[str, Figures]]:
        """The model's scores. Raises RunError."""
        return ask_here(name, model, asked)


def evaluate_run(config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> bool:
    """Ask what is missing, and write tasks.json after each model; connected to the cluster.

    Whether it went to its end: False where a person has stopped it. Raises nothing else: what fails
    is told, and in ``failed`` of tasks.json.
    """
    tasks = config.evaluation.tasks
    if tasks is None:
        return True
    close_page(folder, stopped=False, tell=say)  # The run is complete, however long this takes.
    try:
        _, models = models_of(folder, tasks.before)
        asked = Asked.of(options_of(tasks), config, folder)
        for found in measure(models, asked, earlier(folder), ClusterAsk(config), say):
            write(folder, found)
            close_page(folder, stopped=False, tell=say)
    except KeyboardInterrupt:
        say(
            f"the tasks were stopped; what was measured is in {TASKS}, and the same command goes on"
        )
        return False
    except ConfigError as error:
        for problem in error.problems:
            say(f"the tasks could not be asked: {problem.where}: {problem.message}")
    except Exception as error:
        say(f"the tasks could not be asked: {redact(str(error) or type(error).__name__)}")
    return True


def complete_run(config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> bool:
    """Ask what a finished run lacks; connects only where something is. As `evaluate_run`."""
    if not due(config, folder):
        return True
    with hold_run_folder(folder), connected(config, folder):
        return evaluate_run(config, folder, say)


def options_of(tasks: TasksConfig) -> TaskOptions:
    """As the run file has them, with the folder of task files where it lies here."""
    include = None if tasks.include is None else os.path.abspath(resolve_input(tasks.include))
    limit, backend = tasks.limit, tasks.backend
    more = (tasks.batch, tasks.chat, tasks.timeout_s)
    return TaskOptions(tasks.names, include, limit, backend, *more)


def due(config: RunConfig, folder: RunFolder) -> bool:
    """Whether a finished run lacks a score that its run file asks for."""
    tasks = config.evaluation.tasks
    if tasks is None:
        return False
    found: Any = earlier(folder)
    if not isinstance(found, dict) or found.get("failed"):
        return True
    try:
        _, models = models_of(folder, tasks.before)
        asked = Asked.of(options_of(tasks), config, folder)
        return next(measure(models, asked, found, _refuse, lambda _: None), None) != found
    except (_AnyMissing, ConfigError, RunError, OSError):
        return True


class _AnyMissing(Exception):
    """A model has no scores yet."""


def _refuse(*_: object) -> dict[str, dict[str, Figures]]:
    raise _AnyMissing


class ClusterAsk:
    """Has a model asked on the cluster; a failure is a RunError."""

    def __init__(self, config: RunConfig) -> None:
        self._timeout_s = config.teacher.startup_timeout_s
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self._options = placement(config, has_gpus)["ray_actor_options"]
        self._gpus = int(gpus_of(config, has_gpus))

    def __call__(self, name: str, model: Model, asked: Asked) -> dict[str, dict[str, Figures]]:
        asked = replace(asked, gpus=self._gpus)
        asker = ray.remote(Asker).options(**self._options).remote(self._gpus)
        try:
            ray.get(asker.ready.remote(), timeout=self._timeout_s)
            found: dict[str, dict[str, Figures]] = ray.get(asker.ask.remote(name, model, asked))
        except RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, RunError):
                raise RunError(str(cause)) from error
            raise RunError(f"{type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise RunError(f"its process has ended: {str(error).splitlines()[-1]}") from error
        except GetTimeoutError as error:
            raise RunError(
                f"no place within teacher.startup_timeout_s ({self._timeout_s:.0f} s); the cluster "
                f"has {describe(ray.cluster_resources())}, and a teacher's replica is asked for"
            ) from error
        finally:
            ray.kill(asker)
        return found
