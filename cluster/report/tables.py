"""The closing table of a run; reads only the run folder.

python driver.py report runs/quickstart
"""

import json
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.base.logs import run_name
from raystill.base.records import Folder, read_lines
from raystill.cluster.report.summary import Figures, before_and_after, write_summary

__all__ = ["print_report", "write_summary"]

NUM_EXAMPLES = 3
WIDEST = 100

# Figure, what a person calls it, digits, and the teacher's own figure to hold it against.
TEACHER_FORCED = (
    ("kl_nats_per_token", "KL(teacher || student), nats/token", 3, 0.0),
    ("top1_agreement", "top-1 agreement", 3, 1.0),
    ("acceptance", "acceptance as a draft model", 3, 1.0),
    ("perplexity", "perplexity of the teacher's answers", 2, None),
)
FREE_RUNNING = (
    ("stop_rate", "stop rate", 2, "teacher_stop_rate"),
    ("length_ratio", "length, student / teacher", 2, 1.0),
    ("repeated_4gram_share", "repeated 4-grams", 2, "teacher_repeated_4gram_share"),
    ("kl_on_student_answers", "KL on the student's own answers", 3, 0.0),
)
ROWS = ("rows_trained", "rows_asked", "rows_scored", "rows_reused", "evaluation_rows_asked")
FILES = (
    ("student", "the finished model, a Hugging Face folder"),
    ("metrics.jsonl", "one line a step"),
    ("evaluation.jsonl", "the held-out figures"),
    ("answers.jsonl", "what teacher and student wrote"),
    ("held_out.parquet", "the rows they were measured on"),
    ("summary.json", "the totals of this table"),
    ("timeline.jsonl", "who was busy when"),
    ("checkpoints", "to resume from"),
    ("logs", "what Ray, Serve and vLLM printed"),
)


def print_report(folder: Folder, console: Console | None = None) -> None:
    """Print the closing table of a run that has ended, from its folder alone."""
    if not folder.exists("summary.json"):
        raise RunError(
            f"{folder.path} has no summary.json: no run has ended there yet; "
            "name the folder of a run that has, e.g. runs/quickstart"
        )
    console = console or Console(markup=False, emoji=False)
    with console.capture() as captured:
        _print_sections(console, folder)
    for line in captured.get().splitlines():  # Tables pad their last column; nobody needs that.
        console.file.write(line.rstrip() + "\n")


def print_comparison(folders: Sequence[Folder], console: Console | None = None) -> None:
    """Print the finished students of several runs side by side, from their folders alone."""
    console = console or Console(markup=False, emoji=False)
    columns = []
    for folder in folders:
        if not folder.exists("summary.json"):
            raise RunError(f"{folder.path} has no summary.json: no run has ended there yet")
        first, last = before_and_after(folder)
        summary = json.loads(folder.read_text("summary.json"))
        name = run_name(folder.path)
        columns.append((name, summary, last or first or {}))
    table = _columns(*(name for name, _, _ in columns))
    for name, label, digits, _ in (*TEACHER_FORCED, *FREE_RUNNING):
        table.add_row(
            label, *(formatting.figure(after.get(name), digits) for _, _, after in columns)
        )
    for name in ROWS:
        numbers = [summary.get(name, 0) for _, summary, _ in columns]
        if name != "rows_scored" or any(numbers):
            table.add_row(name, *map(formatting.count, numbers))
    table.add_row("time", *(formatting.duration(summary["wall_s"]) for _, summary, _ in columns))
    with console.capture() as captured:
        _section(console, "Finished students, on held-out prompts", table)
    for line in captured.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def _print_sections(console: Console, folder: Folder) -> None:
    summary = json.loads(folder.read_text("summary.json"))
    before, after = before_and_after(folder)
    console.print()
    console.print(_headline(folder, summary), soft_wrap=True)
    if before is not None:
        _section(console, "Held-out prompts", _evaluation_table(before, after))
        _footnotes(console, before)
    if summary.get("baselines"):
        title = "Models of the training answers, on the same held-out tokens"
        _section(console, title, _baseline_table(summary["baselines"], after or before or {}))
    _section(console, "Rows and tokens", _totals_table(summary))
    _section(console, "Time", _time_table(summary))
    _section(console, f"Files in {formatting.path(folder.path)}", _files_table(folder))
    for number, example in enumerate(examples(folder), start=1):
        heading = "Held-out prompts, answered" if number == 1 else None
        _section(console, heading, _example_table(example))
    console.print()


def examples(folder: Folder) -> list[Figures]:
    """Up to three prompts with ``prompt teacher before after`` texts (before: None if the same)."""
    lines = read_lines(folder, "answers.jsonl")
    if not lines:
        return []
    steps = sorted({line["step"] for line in lines})
    first = {line["row"]: line for line in lines if line["step"] == steps[0]}
    last = [line for line in lines if line["step"] == steps[-1]]
    return [
        {
            "prompt": line["prompt"],
            "teacher": line["teacher"],
            "before": first[line["row"]]["student"]
            if len(steps) > 1 and line["row"] in first
            else None,
            "after": line["student"],
        }
        for line in last[:NUM_EXAMPLES]
    ]


def question(prompt: str) -> str:
    """The person's words in a prompt that went through a chat template, for reading only.

    What a template leaves when its special tokens are not printed are the role names; a prompt
    without that shape comes back whole.
    """
    start, end = prompt.rfind("user\n"), prompt.rstrip().removesuffix("assistant")
    if start < 0 or end == prompt.rstrip():
        return prompt
    return end[start + len("user\n") :].strip() or prompt


def _headline(folder: Folder, summary: Figures) -> Text:
    completed = summary["status"] == "completed"
    status = "finished" if completed else "stopped; the same command resumes it"
    text = Text("Raystill  ", style="bold")
    text.append(formatting.path(folder.path))
    text.append(f"  {status}", style="green" if completed else "yellow")
    text.append(f"  after {formatting.duration(summary['wall_s'])}")
    return text


def _footnote(console: Console, text: str) -> None:
    console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False))


def _section(console: Console, title: str | None, body: RenderableType) -> None:
    console.print()
    if title is not None:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(Padding(body, (0, 0, 0, 2), expand=False), width=min(WIDEST, console.width))


def _columns(*headings: str, first_width: int = 36) -> Table:
    """A borderless table: a wide first column, the others right-aligned figures."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", min_width=first_width)
    for heading in headings:
        table.add_column(heading, justify="right", min_width=9)
    return table


def _evaluation_table(before: Figures, after: Figures | None) -> Table:
    table = _columns("before", "", "after", "teacher") if after else _columns("now", "teacher")
    for name, label, digits, reference in (*TEACHER_FORCED, *FREE_RUNNING):
        newest = after or before
        if before.get(name) is None and newest.get(name) is None:
            continue
        if name == FREE_RUNNING[0][0]:
            table.add_row(Text(""))
        held_against = newest.get(reference) if isinstance(reference, str) else reference
        figures = [formatting.figure(before.get(name), digits)]
        if after:
            figures += ["→", formatting.figure(after.get(name), digits)]
        table.add_row(label, *figures, Text(formatting.figure(held_against, digits), style="dim"))
    if after:
        table.columns[2].min_width = 1
        table.columns[2].justify = "center"
    return table


def _footnotes(console: Console, figures: Figures) -> None:
    tokens = f"{formatting.count(figures.get('num_tokens'))} held-out tokens"
    _footnote(console, "; ".join(filter(None, [tokens, figures.get("bound")])))
    if rows := figures.get("free_running_rows"):
        prompts = formatting.plural(int(rows), "prompt")
        _footnote(console, f"stop rate and below: the student writing by itself, {prompts}")


def _baseline_table(baselines: Figures, student: Figures) -> Table:
    table = _columns("KL", "top-1")
    for name, figures in [*baselines.items(), ("the student", student)]:
        style = "bold" if name == "the student" else ""
        table.add_row(
            Text(name, style=style),
            Text(formatting.figure(figures.get("kl_nats_per_token")), style=style),
            Text(formatting.figure(figures.get("top1_agreement")), style=style),
        )
    return table


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=16, style="dim")
    table.add_column()
    return table


def _totals_table(summary: Figures) -> Table:
    table = _facts()
    trained, total = summary["rows_trained"], summary.get("rows_total")
    of_all = "" if total is None else f" of {formatting.count(total)}"
    table.add_row("rows trained", f"{formatting.count(trained)}{of_all}")
    for done in ("asked", "scored"):
        numbers = [summary.get(f"{kind}_{done}", 0) for kind in ("rows", "evaluation_rows")]
        if done == "asked" or any(numbers):
            train, held_out = map(formatting.count, numbers)
            table.add_row(f"rows {done}", f"{train} for training, {held_out} held out")
    table.add_row(
        "left out",
        f"dropped {formatting.reasons(summary['dropped'])}, "
        f"duplicate prompts {formatting.count(summary['duplicates'])}",
    )
    table.add_row(
        "answers cut off", f"{formatting.share(summary['truncated_fraction'])} by max_tokens"
    )
    teacher, student = summary["teacher"], summary["student"]
    table.add_row(
        "teacher",
        f"{formatting.count(teacher['prompt_tokens'])} prompt tokens read, "
        f"{formatting.count(teacher['response_tokens'])} written"
        f"{_pace(teacher['response_tokens'], teacher['busy_s'])}",
    )
    table.add_row(
        "student",
        f"{formatting.count(student['tokens'])} response tokens trained"
        f"{_pace(student['tokens'], student['busy_s'])}",
    )
    if summary.get("skipped_steps"):
        table.add_row("steps skipped", f"{summary['skipped_steps']}, which held no token to learn")
    return table


def _pace(tokens: float, busy_s: float) -> str:
    return f", {formatting.rate(tokens / busy_s)} tokens/s while busy" if busy_s else ""


def _time_table(summary: Figures) -> Table:
    table = _facts()
    teacher, student = summary["teacher"], summary["student"]
    table.add_row("whole run", formatting.duration(summary["wall_s"]))
    table.add_row("teacher busy", formatting.duration(teacher["busy_s"]))
    table.add_row(
        "student busy",
        f"{formatting.duration(student['busy_s'])}, "
        f"waiting for rows {formatting.duration(student['wait_s'])}",
    )
    for phase, seconds in summary["phases"].items():
        table.add_row(Text(f"  {phase}"), formatting.duration(seconds))
    if summary.get("bottleneck"):
        table.add_row("bottleneck", summary["bottleneck"])
    if summary["restarts"]:
        table.add_row("resumed", formatting.plural(summary["restarts"], "time"))
    return table


def _files_table(folder: Folder) -> Table:
    table = _facts()
    for name, meaning in FILES:
        if folder.exists(name):
            table.add_row(Text(name, style="default"), meaning)
    return table


def _example_table(example: Figures) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=8, style="dim", no_wrap=True)
    table.add_column(ratio=1)
    table.add_row("prompt", Text(formatting.one_line(question(example["prompt"])), style="bold"))
    for name in ("teacher", "before", "after"):
        if example[name] is not None:
            table.add_row(name, Text(formatting.one_line(example[name])))
    return table
