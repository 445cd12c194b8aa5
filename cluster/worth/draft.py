"""``raystill draft``: what the finished student is worth as its teacher's draft model.

Where it sits: the driver reads the run folder and calls `draft_command`, which has one engine after
the other measured by a `DraftBench` where a teacher replica would be: the teacher alone, the
student alone, the teacher with the student as its draft. The driver sees figures, and the prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raystill.base import formatting
from raystill.base.console import open_named
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.run_folder import DRAFT, RunFolder
from raystill.cluster.check.models import check_tokenizers
from raystill.cluster.commands.as_json import print_json, say_beside
from raystill.cluster.report.drafts import print_draft
from raystill.cluster.report.page.page import page_anew
from raystill.cluster.worth.bench import (
    EXIT_INTERRUPTED,
    Bench,
    Subject,
    chosen_prompts,
    find_subject,
    measure_into,
    without_prefix_cache,
)
from raystill.config.run import RunConfig
from raystill.serve.bench.acceptance import COST_RATIOS, best_k, speed_up

FORMULA = "mean acceptance length / (1 + k * cost ratio)"


@dataclass(frozen=True)
class DraftOptions:
    """What is asked for: k of each engine with a draft, prompts, and answers written at once.

    teacher: which of several is meant.
    """

    k: Sequence[int]
    rows: int
    concurrency: int
    teacher: str | None = None


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


def measure(
    subject: Subject, folder: RunFolder, options: DraftOptions, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The figures, as draft.json holds them, anew after each engine; connected to the cluster.

    An engine with a draft that fails is told in ``failed``, so that the others go on. Raises
    RunError where teacher or student cannot be measured.
    """
    import ray  # Late, as the engine's torch: most mistakes are told without.

    from raystill.serve.bench.draft import DraftBench

    ks = sorted(set(options.k))
    prompts = ray.put(chosen_prompts(folder, options.rows))
    bench = Bench(subject, folder, "draft", options.concurrency)
    say("the teacher writes alone")
    facts, teacher, answers = bench.run(DraftBench, ("teacher",), ("answer", (prompts,)))
    say("the student reads the teacher's answers, and writes alone")
    _, agreement, student = bench.run(
        DraftBench, ("student",), ("agreement", (prompts, answers)), ("alone", (prompts,))
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
        **predicted(agreement["by_k"], student["token_s"] / teacher["token_s"]),
        "measured": [],
        "failed": {},
    }
    yield found
    for k in ks:
        say(f"the teacher writes with {formatting.plural(k, 'drafted token')} at a time")
        try:
            _, figures = bench.run(DraftBench, ("teacher", k), ("drafted", (prompts, answers)))
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
    folder = open_named(path)
    subject = without_prefix_cache(find_subject(folder, overrides, unfit, options.teacher))
    if problems := mismatches(subject):
        raise ConfigError(problems)
    chosen_prompts(folder, options.rows)
    found = measure_into(
        DRAFT, subject, folder, lambda: measure(subject, folder, options, say), say
    )
    if found is None:
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
