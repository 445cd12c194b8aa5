"""Commands that tell what a finished student is worth; their arguments and their help.

Imports what a command needs when it is called, so that help comes at once.
"""

from typing import Annotated

import typer

from raystill.base.console import printable
from raystill.cluster.commands import options

TaskNames = Annotated[
    list[str],
    typer.Option("--task", metavar="NAME", help="A task of the harness. Repeatable."),
]
Include = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        show_default="the harness's own tasks",
        help="Folder of task files; data is named relative to it.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default="all", help="Most documents of a task."),
]
Backend = Annotated[
    str, typer.Option(metavar="hf|vllm", help="What runs the models: transformers, or vLLM.")
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Rows that are asked at once.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the models' chat templates.")]

TimeOut = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="Longest time with one model.")
]
Before = Annotated[
    bool, typer.Option("--before/--no-before", help="Ask the student as it began, too.")
]
Tokens = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of every answer.")]
Streams = Annotated[
    int, typer.Option(min=1, metavar="N", help="Prompts that are answered one after the other.")
]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        min=1,
        metavar="N",
        show_default="teacher.max_num_seqs",
        help="Answers that are written at once.",
    ),
]
Starts = Annotated[int, typer.Option(min=1, metavar="N", help="Starts of each model, in turn.")]
Passes = Annotated[int, typer.Option(min=1, metavar="N", help="Passes of each start.")]


def tasks(
    run_folder: options.RunFolder,
    task: TaskNames,
    include: Include = None,
    limit: Limit = None,
    backend: Backend = "hf",
    batch: Batch = 8,
    chat: Chat = False,
    before: Before = True,
    timeout: TimeOut = 21_600,
    teacher: options.NamedTeacher = None,
    as_json: options.AsJson = False,
) -> int:
    """Score teacher and student at tasks of lm-evaluation-harness.

    With its intervals; its own tasks, or those of files of yours.
    """
    from raystill.base.errors import RunError
    from raystill.cluster.harness.ask import TaskOptions
    from raystill.cluster.worth.tasks import tasks_command

    if backend not in ("hf", "vllm"):
        raise RunError(f"--backend is {backend!r}; expected hf or vllm")
    wanted = TaskOptions(task, include, limit, backend, batch, chat, timeout)
    return tasks_command(run_folder, wanted, as_json, _say, before, teacher)


def speed(
    run_folder: options.RunFolder,
    overrides: options.Overrides,
    tokens: Tokens = 64,
    streams: Streams = 4,
    concurrency: AtOnce = None,
    starts: Starts = 2,
    passes: Passes = 3,
    teacher: options.NamedTeacher = None,
    as_json: options.AsJson = False,
) -> int:
    """Measure how much faster and smaller the student is.

    Teacher and student in the same engine, in turn: tokens/s, time to first token, memory.
    """
    from raystill.cluster.worth.speed import SpeedOptions, speed_command

    wanted = SpeedOptions(tokens, streams, concurrency, starts, passes, teacher)
    return speed_command(run_folder, overrides, wanted, as_json, _say)


def _say(text: str) -> None:
    print(printable(text), flush=True)
