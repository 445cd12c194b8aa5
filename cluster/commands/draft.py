"""``raystill draft``: what the finished student is worth as its teacher's draft model.

Where it sits: the driver reads the run folder and calls `draft_command`, which has one engine after
the other measured by a `DraftBench` where a teacher replica would be: the teacher alone, the
student alone, the teacher with the student as its draft. The driver sees figures, and the prompts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raystill.base import formatting
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.records import plain
from raystill.base.redact import redacted
from raystill.base.run_folder import CONFIG, DRAFT, HELD_OUT_PROMPTS, STUDENT, RunFolder
from raystill.cluster.check.models import check_tokenizers
from raystill.cluster.commands.as_json import print_json, say_beside
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.cluster.job.manifest import check_teacher_of
from raystill.cluster.job.run import connected
from raystill.cluster.report.drafts import print_draft
from raystill.cluster.report.page.page import page_anew
from raystill.config.load import load_config
from raystill.config.run import RunConfig, absolute_paths
from raystill.model.files import ModelFolder, fetch_model, find_model
from raystill.model.on_node import ModelSource
from raystill.placement.requests import describe
from raystill.serve.deploy import gpus_of, placement
from raystill.serve.draft.acceptance import COST_RATIOS, best_k, speed_up
from raystill.serve.draft.measure import BenchSettings, DraftBench

FORMULA = "mean acceptance length / (1 + k * cost ratio)"


@dataclass(frozen=True)
class DraftOptions:
    """What is asked for: k of each engine with a draft, prompts, and answers written at once."""

    k: Sequence[int]
    rows: int
    concurrency: int


@dataclass(frozen=True)
class Subject:
    """A finished run: its configuration, its teacher and its student on this machine."""

    config: RunConfig
    teacher: ModelFolder
    student: ModelFolder


def find_subject(folder: RunFolder, overrides: Sequence[str] = ()) -> Subject:
    """The run in the folder. Raises RunError and ConfigError where it has nothing to measure."""
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
    if problems := unfit(config):
        raise ConfigError(problems)
    found = find_model(config.teacher.model, config.teacher.revision)
    if found.model is None:
        raise ConfigError([Problem("teacher.model", str(found.problem or found.notice))])
    subject = Subject(config, found.model, student)
    if problems := mismatches(subject):
        raise ConfigError(problems)
    return subject


def unfit(config: RunConfig) -> list[Problem]:
    """What of a run's teacher keeps it from being served with a draft model."""
    teacher = config.teacher
    if teacher.engine != "vllm":
        return [
            Problem(
                "teacher.engine",
                f"is {teacher.engine!r}, and only vLLM takes a draft model; of such a teacher the "
                "acceptance is not known. It can be told of a run with teacher.engine: vllm",
            )
        ]
    problems = []
    if teacher.pipeline_parallel_size > 1:
        message = (
            f"is {teacher.pipeline_parallel_size}, but a teacher with a draft model is measured "
            "within one node; add --set teacher.pipeline_parallel_size=1 and enough "
            "teacher.tensor_parallel_size"
        )
        problems.append(Problem("teacher.pipeline_parallel_size", message))
    if teacher.engine_args.get("speculative_config"):
        message = "is set, so the teacher already has a draft model; leave it out"
        problems.append(Problem("teacher.engine_args.speculative_config", message))
    return problems


def mismatches(subject: Subject) -> list[Problem]:
    """Tokenizers that differ, or output heads of another size: vLLM compares ids, not text."""
    teacher, student = subject.teacher, subject.student
    problems = [
        Problem("student", problem.message) for problem in check_tokenizers(teacher, student)
    ]
    sizes = teacher.vocab_size, student.vocab_size
    if not problems and None not in sizes and sizes[0] != sizes[1]:
        message = (
            f"has {sizes[1]} ids and the teacher {sizes[0]}, but vLLM's draft_model needs equal "
            "vocabularies; train a student with the teacher's (student.init: from_teacher)"
        )
        problems.append(Problem("student", message))
    return problems


def chosen_prompts(folder: RunFolder, rows: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """The token ids of at most ``rows`` held-out prompts, evenly spread over all. Raises RunError.

    So every source has its share: the table is in the order of the prompt files.
    """
    prompts = []
    if folder.exists(HELD_OUT_PROMPTS):
        prompts = folder.read_table(HELD_OUT_PROMPTS, ["prompt_ids"])["prompt_ids"].to_pylist()
    if not prompts:
        raise RunError(
            f"{folder.path} has no held-out prompts, on which a draft is measured; run with "
            "evaluation.held_out_rows or evaluation.held_out_sources"
        )
    places = np.unique(np.linspace(0, len(prompts) - 1, min(rows, len(prompts))).round())
    return [np.asarray(prompts[int(i)], np.int32) for i in places]


class Bench:
    """Runs one engine after the other on the cluster this process is connected to."""

    def __init__(self, subject: Subject, folder: RunFolder, options: DraftOptions) -> None:
        config = absolute_paths(subject.config)
        teacher = config.teacher.model_copy(update={"max_num_seqs": options.concurrency})
        config = config.model_copy(update={"teacher": teacher})
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self._options = placement(config, has_gpus)["ray_actor_options"]
        self._timeout_s = config.teacher.startup_timeout_s
        self._log = str(folder.logs / "draft.log")
        self.settings = BenchSettings(
            config=config,
            teacher=ModelSource.of(config.teacher.model, subject.teacher.path),
            student=ModelSource.of(STUDENT, subject.student.path),
            gpus=gpus_of(config, has_gpus),
            log=self._log,
        )

    def run(self, model: str, num_drafted: int, *calls: tuple[str, Any]) -> list[Any]:
        """Start an engine, call its methods one after the other, end it.

        calls: name of a method and its arguments; ``num_returns`` 2 for "answer", whose second
        result stays a reference. The first result is what ``start`` says.
        """
        actor = (
            ray.remote(DraftBench)
            .options(**self._options)
            .remote(self.settings, model, num_drafted)
        )
        try:
            results: list[Any] = [self._result(actor.start.remote(), self._timeout_s)]
            for name, arguments in calls:
                method = getattr(actor, name)
                if name == "answer":
                    figures, answers = method.options(num_returns=2).remote(*arguments)
                    results += [self._result(figures), answers]
                else:
                    results.append(self._result(method.remote(*arguments)))
            self._result(actor.close.remote())
            return results
        finally:
            ray.kill(actor)

    def _result(self, reference: Any, timeout_s: float | None = None) -> Any:
        """What the actor returns; its failure as a RunError that names the log."""
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


def measure(
    subject: Subject, folder: RunFolder, options: DraftOptions, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The figures, as draft.json holds them, anew after each engine; connected to the cluster.

    An engine with a draft that fails is told in ``failed``, so that the others go on. Raises
    RunError where teacher or student cannot be measured.
    """
    ks = sorted(set(options.k))
    prompts = ray.put(chosen_prompts(folder, options.rows))
    bench = Bench(subject, folder, options)
    say("the teacher writes alone")
    facts, teacher, answers = bench.run("teacher", 0, ("answer", (prompts,)))
    say("the student reads the teacher's answers, and writes alone")
    _, agreement, student = bench.run(
        "student", 0, ("agreement", (prompts, answers)), ("alone", (prompts,))
    )
    found = {
        "teacher": subject.config.teacher.model,
        "student": str(subject.student.path),
        **facts,
        "gpus": bench.settings.gpus,
        "rows": len(ray.get(prompts)),
        "concurrency": options.concurrency,
        "decoding": "greedy",
        "k": ks,
        "teacher_alone": teacher,
        "student_alone": student,
        "top1_agreement": agreement["top1_agreement"],
        "computed": {str(k): figures for k, figures in agreement["by_k"].items()},
        **predicted(agreement["by_k"], teacher["tokens_per_s"] / student["tokens_per_s"]),
        "measured": [],
        "failed": {},
    }
    yield found
    for k in ks:
        say(f"the teacher writes with {formatting.plural(k, 'drafted token')} at a time")
        try:
            _, figures = bench.run("teacher", k, ("drafted", (prompts, answers)))
        except RunError as error:
            found["failed"][str(k)] = str(error)
        else:
            figures["speed_up"] = figures["tokens_per_s"] / teacher["tokens_per_s"]
            found["measured"].append(figures)
        yield found


def predicted(by_k: dict[int, dict[str, Any]], measured_ratio: float) -> dict[str, Any]:
    """The speed-ups that the formula gives for the measured cost ratio and for others."""
    lengths = {
        k: figures["mean_acceptance_length"]
        for k, figures in by_k.items()
        if figures["mean_acceptance_length"] is not None
    }
    rows = []
    for ratio in sorted({*COST_RATIOS, measured_ratio}):
        k, speed = best_k(lengths, ratio)
        by = {str(k): speed_up(length, k, ratio) for k, length in lengths.items()}
        rows.append({"cost_ratio": ratio, "speed_up": by, "best_k": k, "best_speed_up": speed})
    return {"cost_ratio": measured_ratio, "formula": FORMULA, "predicted": rows}


EXIT_INTERRUPTED = 130


def draft_command(
    path: str,
    overrides: Sequence[str],
    options: DraftOptions,
    as_json: bool,
    say: Callable[[str], None],
) -> int:
    """Measure, write draft.json into the run folder after each engine, print; the exit status.

    Raises ConfigError and RunError; RunError also where an engine with a draft failed, after the
    others' figures are written and printed.
    """
    if as_json:  # Standard output is for a program.
        say = say_beside
    folder = RunFolder(path)
    subject = find_subject(folder, overrides)
    chosen_prompts(folder, options.rows)
    fetch_model(subject.config.teacher.model, subject.config.teacher.revision)
    if problems := check_teacher_of(folder, subject.config.teacher, subject.teacher.path):
        raise ConfigError(problems)
    with hold_run_folder(folder), connected(subject.config, folder):
        try:
            for found in measure(subject, folder, options, say):
                folder.write_text(DRAFT, json.dumps(redacted(plain(found)), indent=2) + "\n")
        except KeyboardInterrupt:
            say(f"stopped; what was measured is in {DRAFT}")
            return EXIT_INTERRUPTED
    if as_json:
        print_json(found)
    else:
        print_draft(found)
    say(f"\nwritten to {formatting.path(folder.join(DRAFT))}{page_anew(folder)}")
    if found["failed"]:
        k, reason = next(iter(found["failed"].items()))
        raise RunError(f"with {k} drafted tokens: {reason}")
    return 0
