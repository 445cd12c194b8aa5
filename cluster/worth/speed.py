"""``raystill speed``: how much faster and smaller the finished student is than its teacher.

Where it sits: the driver reads the run folder and calls `speed_command`, which has a `SpeedBench`
of either model in turn where a teacher replica would be, both with the run's engine settings. The
driver sees figures, and the prompts.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from raystill.base import formatting
from raystill.base.console import open_named
from raystill.base.errors import Problem, RunError
from raystill.base.run_folder import SPEED, RunFolder
from raystill.cluster.commands.as_json import print_json, say_beside
from raystill.cluster.report.page.page import page_anew
from raystill.cluster.report.worth import print_speed
from raystill.cluster.worth.bench import (
    EXIT_INTERRUPTED,
    Bench,
    Figures,
    Ids,
    Subject,
    chosen_prompts,
    find_subject,
    measure_into,
    spread,
    without_prefix_cache,
)
from raystill.config.run import RunConfig
from raystill.model.weights import size_of

RATES = ("tokens_per_s", "stream_tokens_per_s", "first_token_s")
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MODELS = ("teacher", "student")


@dataclass(frozen=True)
class SpeedOptions:
    """What is asked for.

    Attributes:
        tokens: Length of every answer.
        streams: Prompts that are answered one after the other in a pass.
        concurrency: Answers that are written at once; None: ``teacher.max_num_seqs``.
        starts: Starts of each model.
        passes: Passes of each start.
        teacher: Which of several teachers is meant.
    """

    tokens: int = 64
    streams: int = 4
    concurrency: int | None = None
    starts: int = 2
    passes: int = 3
    teacher: str | None = None


def unfit(config: RunConfig) -> list[Problem]:
    """What of a run's teacher keeps it from being measured in an engine of ours."""
    teacher = config.teacher
    if teacher.engine != "vllm":
        message = (
            f"is {teacher.engine!r}: the teacher has no engine here that could be compared with "
            "the student's; speed is told of a run with teacher.engine: vllm"
        )
        return [Problem("teacher.engine", message)]
    if teacher.pipeline_parallel_size > 1:
        message = (
            f"is {teacher.pipeline_parallel_size}, but engines are measured within one node; add "
            "--set teacher.pipeline_parallel_size=1 and enough teacher.tensor_parallel_size"
        )
        return [Problem("teacher.pipeline_parallel_size", message)]
    return []


def fitting_prompts(folder: RunFolder, subject: Subject, tokens: int, wanted: int) -> list[Ids]:
    """Held-out prompts with room for an answer of ``tokens`` in both models. Raises RunError."""
    limits = (
        subject.config.teacher.max_model_len,
        subject.teacher.context_tokens,
        subject.student.context_tokens,
    )
    context = min((limit for limit in limits if limit is not None), default=None)
    prompts = [ids for ids in chosen_prompts(folder, wanted) if len(ids)]
    if context is not None:
        prompts = [ids for ids in prompts if len(ids) + tokens <= context]
    if not prompts:
        raise RunError(
            f"no held-out prompt of {folder.path} leaves room for an answer of {tokens} tokens in "
            f"a context of {context}; ask for shorter ones with --tokens"
        )
    return prompts


def evenly(prompts: Sequence[Ids], wanted: int) -> list[Ids]:
    """At most ``wanted`` of them, from the first to the last: so each source has its share."""
    return [prompts[place] for place in spread(len(prompts), wanted)]


def turns(starts: int) -> list[str]:
    """Which model is started when: teacher, student, student, teacher, ...

    So a machine that gets slower or faster meanwhile does not favour one.
    """
    return [
        model for turn in range(starts) for model in (MODELS if turn % 2 == 0 else MODELS[::-1])
    ]


def measure(
    subject: Subject, folder: RunFolder, options: SpeedOptions, say: Callable[[str], None]
) -> Iterator[Figures]:
    """The figures, as speed.json holds them, anew after each engine; connected to the cluster."""
    at_once = options.concurrency or subject.config.teacher.max_num_seqs
    prompts = fitting_prompts(folder, subject, options.tokens, max(at_once, options.streams))
    full = list(islice(cycle(evenly(prompts, at_once)), at_once))
    streams = evenly(prompts, options.streams)
    from raystill.serve.bench.speed import SpeedBench  # Late, as the engine's torch.

    bench = Bench(subject, folder, "speed", at_once)
    measured: dict[str, list[Figures]] = {model: [] for model in MODELS}
    sizes = {"teacher": subject.teacher.path, "student": subject.student.path}
    for model in turns(options.starts):
        say(f"the {model} writes, start {len(measured[model]) + 1} of {options.starts}")
        facts, figures = bench.run(
            SpeedBench, (model, options.tokens), ("measure", (streams, full, options.passes))
        )
        measured[model].append(figures)
        yield {
            "teacher": subject.config.teacher.model,
            "student": str(subject.student.path),
            **facts,
            "gpus": bench.settings.gpus,
            "prompts": len(prompts),
            **asdict(options),
            "concurrency": at_once,
            "decoding": "greedy",
            **compared(
                {
                    model: summary(size_of(Path(sizes[model])), facts["dtype"], starts)
                    for model, starts in measured.items()
                    if starts
                }
            ),
        }


def summary(sizes: Figures, dtype: str, starts: Sequence[Figures]) -> Figures:
    """Of one model: its size, the most memory of any start, and each rate with its spread.

    ``weights_bytes``: as the engine holds them, in its dtype; of a quantised model those of its
    files.
    """
    passes = [one for start in starts for one in start["passes"]]
    parameters, width = sizes.get("parameters"), WIDTHS.get(dtype)
    found: Figures = {
        "parameters": parameters,
        "weights_bytes": parameters * width if parameters and width else sizes.get("bytes"),
        "peak_bytes": max(start["peak_bytes"] for start in starts),
        "kv_cache_bytes": max(start["kv_cache_bytes"] for start in starts),
    }
    for rate in RATES:
        values = [one[rate] for one in passes]
        found[rate] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {**found, "passes": passes}


def compared(models: dict[str, Figures]) -> Figures:
    """The models' figures, and the student's beside the teacher's once both are there.

    ``times_*``: ratio of the medians; low and high compare the slowest pass of one with the fastest
    of the other.
    """
    found: Figures = {"models": models}
    if len(models) < len(MODELS):
        return found
    teacher, student = (models[model] for model in MODELS)
    for name, over, under, rate in (
        ("times_faster", student, teacher, "tokens_per_s"),
        ("times_faster_stream", student, teacher, "stream_tokens_per_s"),
        ("times_sooner", teacher, student, "first_token_s"),
    ):
        found[name] = {
            "median": over[rate]["median"] / under[rate]["median"],
            "low": over[rate]["low"] / under[rate]["high"],
            "high": over[rate]["high"] / under[rate]["low"],
        }
    for size in ("parameters", "weights_bytes", "peak_bytes"):
        known = student[size] is not None and teacher[size]
        found[f"share_of_{size}"] = student[size] / teacher[size] if known else None
    return found


def speed_command(
    path: str,
    overrides: Sequence[str],
    options: SpeedOptions,
    as_json: bool,
    say: Callable[[str], None],
) -> int:
    """Measure, write speed.json into the run folder after each engine, print; the exit status.

    Raises ConfigError and RunError, before any engine is started where nothing can be measured.
    """
    if as_json:  # Standard output is for a program.
        say = say_beside
    folder = open_named(path)
    subject = without_prefix_cache(find_subject(folder, overrides, unfit, options.teacher))
    fitting_prompts(folder, subject, options.tokens, options.streams)
    found: Any = measure_into(
        SPEED, subject, folder, lambda: measure(subject, folder, options, say), say
    )
    if found is None:
        return EXIT_INTERRUPTED
    if as_json:
        print_json(found)
    else:
        print_speed(found)
    say(f"\nwritten to {formatting.path(folder.join(SPEED))}{page_anew(folder)}")
    return 0
