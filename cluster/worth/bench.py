"""A finished run as a subject of measurement, and engines run one after the other on the cluster.

Where it sits: `draft` and `speed` find their run by `find_subject` and have a `Bench` run an actor
of ``serve/bench/`` where a replica of the run's teacher would be. The driver sees figures, and the
prompts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.base import formatting
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.records import plain
from raystill.base.redact import redacted
from raystill.base.run_folder import CONFIG, HELD_OUT_PROMPTS, STUDENT, RunFolder
from raystill.cluster.check.folders import require_sound
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.cluster.job.manifest import check_teacher_of
from raystill.config.load import load_config, named_teacher
from raystill.config.run import RunConfig, absolute_paths
from raystill.model.files import ModelFolder, fetch_model, find_model
from raystill.model.on_node import ModelSource
from raystill.placement.requests import describe

EXIT_INTERRUPTED = 130
Figures = dict[str, Any]
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Subject:
    """A finished run: its configuration, its teacher and its student on this machine.

    config: as the teacher has it. name: that of the teacher among several, else "".
    """

    config: RunConfig
    teacher: ModelFolder
    student: ModelFolder
    name: str = ""


def find_subject(
    folder: RunFolder,
    overrides: Sequence[str],
    unfit: Callable[[RunConfig], list[Problem]],
    teacher: str | None = None,
) -> Subject:
    """The run in the folder. ``unfit``: problems of its settings for what is to be measured.

    teacher: which of several is meant.

    Raises RunError and ConfigError where it has nothing to measure.
    """
    if not folder.exists(CONFIG):
        raise RunError(
            f"{folder.path} has no {CONFIG}: it is no run folder; name that of a finished run, "
            "e.g. runs/quickstart"
        )
    if folder.local is None:
        raise RunError(
            f"{folder.path} is not on a disk of this machine, and an engine loads the student from "
            "one; copy the run folder here and name the copy"
        )
    student = ModelFolder(STUDENT, folder.local / STUDENT)
    if not student.config or not student.has_weights:
        raise RunError(
            f"{folder.path} has no finished student ({STUDENT}/ is missing, or without config.json "
            "or weights); finish the run first: raystill run RUN.yaml"
        )
    config = load_config(folder.local / CONFIG, overrides)
    name = named_teacher(config, teacher)
    config = config.by_teacher[name]
    if problems := unfit(config):
        raise ConfigError(problems)
    found = find_model(config.teacher.model, config.teacher.revision)
    if found.model is None:
        raise ConfigError([Problem("teacher.model", str(found.problem or found.notice))])
    require_sound("teacher.model", found.model)
    require_sound("student", student)
    return Subject(config, found.model, student, name)


def chosen_prompts(folder: RunFolder, rows: int) -> list[Ids]:
    """The token ids of at most ``rows`` held-out prompts, evenly spread over all. Raises RunError.

    So every source has its share: the table is in the order of the prompt files.
    """
    prompts = _held_out_ids(folder) if folder.exists(HELD_OUT_PROMPTS) else pa.array([])
    if not len(prompts):
        raise RunError(
            f"{folder.path} has no held-out prompts, on which engines are measured; run with "
            "evaluation.held_out_rows or evaluation.held_out_sources"
        )
    return [np.asarray(prompts[i].as_py(), np.int32) for i in spread(len(prompts), rows)]


def spread(number: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the places 0 to ``number`` - 1, evenly over all; in their order."""
    places = np.unique(np.linspace(0, number - 1, min(wanted, number)).round())
    return [int(place) for place in places]


def without_prefix_cache(subject: Subject) -> Subject:
    """The same run, whose engines compute a prompt anew each time that it is asked."""
    teacher = subject.config.teacher
    arguments = {**teacher.engine_args, "enable_prefix_caching": False}
    teacher = teacher.model_copy(update={"engine_args": arguments})
    return replace(subject, config=subject.config.model_copy(update={"teacher": teacher}))


def _held_out_ids(folder: RunFolder) -> pa.Array:
    """The ids of each held-out prompt, list<int32>; RunError where the file is no table of them."""
    try:
        found = folder.read_table(HELD_OUT_PROMPTS, ["prompt_ids"])["prompt_ids"]
        prompts = found.cast(pa.list_(pa.int32())).combine_chunks()
        ids = prompts.flatten()
        if prompts.null_count or ids.null_count or (pc.min(ids).as_py() or 0) < 0:
            raise ValueError("it has prompts that are none")
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        where = formatting.path(folder.join(HELD_OUT_PROMPTS))
        raise RunError(f"{where} cannot be read ({reason}); restore it from a copy") from None
    return prompts


class Bench:
    """Runs one engine after the other on the cluster this process is connected to.

    name: of the log file. concurrency: answers that an engine writes at once.
    """

    def __init__(self, subject: Subject, folder: RunFolder, name: str, concurrency: int) -> None:
        import ray  # Late, as torch: what is wrong with a run folder is told without.

        from raystill.serve.bench.engine import BenchSettings
        from raystill.serve.deploy import gpus_of, placement

        config = absolute_paths(subject.config)
        teacher = config.teacher.model_copy(update={"max_num_seqs": concurrency})
        config = config.model_copy(update={"teacher": teacher})
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self._options = placement(config, has_gpus)["ray_actor_options"]
        self._timeout_s = config.teacher.startup_timeout_s
        self._log = str(folder.logs / f"{name}.log")
        self.settings = BenchSettings(
            config=config,
            teacher=ModelSource.of(config.teacher.model, subject.teacher.path),
            student=ModelSource.of(STUDENT, subject.student.path),
            gpus=gpus_of(config, has_gpus),
            log=self._log,
        )

    def run(self, actor: type, arguments: tuple[Any, ...], *calls: tuple[str, Any]) -> list[Any]:
        """Start an engine, call its methods one after the other, end it.

        actor: an `EngineBench`, made with the settings and ``arguments``. calls: name of a method
        and its arguments; ``num_returns`` 2 for "answer", whose second result stays a reference.
        The first result is what ``start`` says.
        """
        import ray

        bench = ray.remote(actor).options(**self._options).remote(self.settings, *arguments)
        try:
            results: list[Any] = [self._result(bench.start.remote(), self._timeout_s)]
            for name, given in calls:
                method = getattr(bench, name)
                if name == "answer":
                    figures, answers = method.options(num_returns=2).remote(*given)
                    results += [self._result(figures), answers]
                else:
                    results.append(self._result(method.remote(*given)))
            self._result(bench.close.remote())
            return results
        finally:
            ray.kill(bench)

    def _result(self, reference: Any, timeout_s: float | None = None) -> Any:
        """What the actor returns; its failure as a RunError that names the log."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, RunError):
                raise cause from error
            raise RunError(f"the engine failed ({_reason(cause)}); {self._hint()}") from error
        except RayActorError as error:
            raise RunError(
                f"the engine's process has ended ({_reason(error)}); {self._hint()}"
            ) from error
        except GetTimeoutError as error:
            raise RunError(
                f"no engine was up within teacher.startup_timeout_s ({timeout_s:.0f} s); the "
                f"cluster has {describe(ray.cluster_resources())}; {self._hint()}"
            ) from error

    def _hint(self) -> str:
        return f"the engines' output is in {self._log}"


def _reason(error: BaseException) -> str:
    """The last line of an error; Ray's begin with a report of the process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def measure_into(
    name: str,
    subject: Subject,
    folder: RunFolder,
    measure: Callable[[], Iterator[Figures]],
    say: Callable[[str], None],
) -> Figures | None:
    """Connect, and write the figures into the run folder as ``name``, anew after each engine.

    Returns the last ones; None where a person stopped it. Raises ConfigError where the teacher's
    files are no longer those of the run.
    """
    from raystill.cluster.job.run import connected

    fetch_model(subject.config.teacher.model, subject.config.teacher.revision)
    teacher, path = subject.config.teacher, subject.teacher.path
    if problems := check_teacher_of(folder, teacher, path, subject.name):
        raise ConfigError(problems)
    found: Figures = {}
    with hold_run_folder(folder), connected(subject.config, folder):
        try:
            for found in measure():
                folder.write_text(name, json.dumps(redacted(plain(found)), indent=2) + "\n")
        except KeyboardInterrupt:
            say(f"stopped; what was measured is in {name}")
            return None
    return found
