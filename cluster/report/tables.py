"""The closing table of a run: the figures that decide whether to look closer.

Reads only the run folder. All the rest is on the run's page (`report/page/`), which it names.

    python driver.py report runs/quickstart
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.errors import ConsoleError
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raystill.base import formatting
from raystill.base.console import bounded_tables
from raystill.base.errors import RunError
from raystill.base.logs import run_name
from raystill.base.personal import mask
from raystill.base.records import BrokenFile, Folder, mapping, number, read_lines, read_object
from raystill.base.run_folder import REPORT
from raystill.cluster.report.summary import (
    Figures,
    api_line,
    before_and_after,
    judged_line,
    size_line,
    student_written_line,
    teacher_lines,
    write_summary,
)
from raystill.cluster.report.worth import sections

__all__ = ["print_report", "write_summary"]

NUM_EXAMPLES = 1
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
    ("kl_on_student_answers", "KL(teacher || student), own answers", 3, 0.0),
    ("reverse_kl_on_student_answers", "KL(student || teacher), own answers", 3, 0.0),
)
ROWS = ("rows_trained", "rows_asked", "rows_scored", "rows_reused", "evaluation_rows_asked")

WRONG_TYPES = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError),
    ConsoleError,  # Something that cannot be shown in a cell.
)


@contextmanager
def reading(*folders: Folder) -> Iterator[None]:
    """Raises BrokenFile where the files of run folders are read, and are not what a run writes.

    Their figures are used in a hundred places, and each may be missing or of another type.
    """
    try:
        yield
    except RunError:
        raise
    except WRONG_TYPES as error:
        names = ", ".join(folder.path for folder in folders)
        reason = f"{type(error).__name__}: {error}"
        raise BrokenFile(
            f"summary.json, evaluation.jsonl or answers.jsonl of {names} are not what a run writes "
            f"({reason}); restore them from a copy; the page {REPORT} shows what can be read"
        ) from error


def print_report(folder: Folder, console: Console | None = None) -> None:
    """Print the closing table of a run that has ended, from its folder alone."""
    if not folder.exists("summary.json"):
        raise RunError(
            f"{folder.path} has no summary.json: no run has ended there yet; "
            "name the folder of a run that has, e.g. runs/quickstart"
        )
    console = console or Console(markup=False, emoji=False)
    with reading(folder), bounded_tables(console):
        _print_sections(console, folder)


def print_comparison(folders: Sequence[Folder], console: Console | None = None) -> None:
    """Print the finished students of several runs side by side, from their folders alone."""
    with reading(*folders):
        _compare(folders, console)


def _compare(folders: Sequence[Folder], console: Console | None) -> None:
    console = console or Console(markup=False, emoji=False)
    columns = []
    for folder in folders:
        if not folder.exists("summary.json"):
            raise RunError(f"{folder.path} has no summary.json: no run has ended there yet")
        first, last = before_and_after(folder)
        summary = read_object(folder, "summary.json")
        name = run_name(folder.path)
        columns.append((name, summary, last or first or {}))
    table = _columns(*(name for name, _, _ in columns))
    table.add_row("measured", *(measured_when(newest) for _, _, newest in columns))
    for name, label, digits, _ in (*TEACHER_FORCED, *FREE_RUNNING):
        table.add_row(
            label, *(formatting.figure(after.get(name), digits) for _, _, after in columns)
        )
    for name in ROWS:
        numbers = [summary.get(name, 0) for _, summary, _ in columns]
        if name != "rows_scored" or any(numbers):
            table.add_row(name, *map(formatting.count, numbers))
    table.add_row("time", *(formatting.duration(summary["wall_s"]) for _, summary, _ in columns))
    with bounded_tables(console):
        _section(console, "Students on held-out prompts", table)


def measured_when(newest: Figures) -> str:
    """When a run's newest held-out figures were measured: a finished student's, or not yet."""
    step = number(newest.get("step"))
    when = f"at step {formatting.count(step)}" if step else "before training"
    return formatting.NOTHING if step is None else when


def _print_sections(console: Console, folder: Folder) -> None:
    summary = read_object(folder, "summary.json")
    before, after = before_and_after(folder)
    console.print()
    console.print(_headline(folder, summary), soft_wrap=True)
    if before is not None:
        _section(console, "Held-out prompts", _evaluation_table(before, after))
        _footnotes(console, before, summary.get("baselines") or {})
        if checks := check_rows(before, after):
            _section(console, "Checks of the answers, mean with 95 % interval", _checks(checks))
    for caption, worth in sections(folder):
        _section(console, caption, worth)
    _section(console, "Rows and time", _totals_table(summary))
    for place, example in enumerate(examples(folder)):
        heading = None if place else "Held-out prompts, answered"
        _section(console, heading, _example_table(example))
    if folder.exists(REPORT):
        console.print()
        page = formatting.path(folder.join(REPORT))
        console.print(Text(f"The whole run on one page: {page}"), soft_wrap=True)
    console.print()


def examples(folder: Folder) -> list[Figures]:
    """The first prompt, with ``prompt teacher before after`` texts (before: None if the same)."""
    lines = read_lines(folder, "answers.jsonl")
    if not lines:
        return []
    steps = sorted({line["step"] for line in lines})
    first = {line["row"]: line for line in lines if line["step"] == steps[0]}
    last = [line for line in lines if line["step"] == steps[-1]]
    return [
        {
            "prompt": mask(line["prompt"]),
            "teacher": mask(line["teacher"]),
            "before": mask(first[line["row"]]["student"])
            if len(steps) > 1 and line["row"] in first
            else None,
            "after": mask(line["student"]),
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
    for label, first, last in position_rows(before, after or {}):
        table.add_row(label, *([first, "→", last] if after else [first]), "")
    if after:
        table.columns[2].min_width = 1
        table.columns[2].justify = "center"
    return table


def position_rows(before: Figures, after: Figures) -> list[tuple[str, str, str]]:
    """KL(student || teacher) on the student's own answers by position: label, before, after.

    Empty where all tokens are in one range of positions, whose figure the table has.
    """
    ranges: dict[tuple[int, int], list[str]] = {}
    for place, figures in enumerate((before, after)):
        parts = figures.get("student_answers_by_position")
        for part in map(mapping, parts if isinstance(parts, list) else ()):
            start, end, value = (part.get(name) for name in ("from", "to", "reverse_kl"))
            if isinstance(start, int) and isinstance(end, int) and isinstance(value, float):
                cells = ranges.setdefault((start, end), [formatting.NOTHING] * 2)
                cells[place] = formatting.figure(value, 3)
    if len(ranges) < 2:
        return []
    return [
        (f"  tokens {start + 1} to {end}", first, last)
        for (start, end), (first, last) in sorted(ranges.items())
    ]


def check_rows(before: Figures, after: Figures | None) -> list[tuple[str, str, str, str, str]]:
    """For each check its name, figures before, after (or now) and of the teacher, and a remark."""
    newest = mapping((after or before).get("checks"))
    rows = []
    for name in newest:
        figures = mapping(newest[name])
        earlier = mapping(mapping(before.get("checks")).get(name))
        first = _interval(mapping(earlier.get("student"))) if after else ""
        of_student, of_teacher = mapping(figures.get("student")), mapping(figures.get("teacher"))
        rows.append(
            (
                str(name),
                first,
                _interval(of_student),
                _interval(of_teacher),
                _remark(earlier if after else figures, figures),
            )
        )
    return rows


def _interval(measured: Figures) -> str:
    """A mean with its interval, if it has one: ``0.62 [0.36, 0.83]``, ``12.1``."""
    mean, *ends = (number(measured.get(name)) for name in ("mean", "low", "high"))
    known = [value for value in (mean, *ends) if value is not None]
    if mean is None:
        return formatting.NOTHING
    digits = 2 if max(map(abs, known)) < 10 else 1
    shown, *within = (formatting.figure(value, digits) for value in known)
    return f"{shown} [{', '.join(within)}]" if len(within) == 2 else shown


def _remark(earlier: Figures, figures: Figures) -> str:
    """What went wrong with a check, or makes its figures hard to compare; mostly ''."""
    remarks = []
    for who in ("student", "teacher"):
        measured = mapping(figures.get(who))
        for kind, noun in (("errors", "error"), ("timeouts", "time-out")):
            if isinstance(count := measured.get(kind), int) and count:
                remarks.append(f"{who}: {formatting.plural(count, noun)}")
    errors = [mapping(figures.get(who)).get("first_error") for who in ("student", "teacher")]
    if first := next((error for error in errors if error), None):
        remarks.append(f"the first: {formatting.one_line(first, 160)}")
    if earlier.get("version") != figures.get("version"):
        remarks.append("its code was changed between the two")
    return "; ".join(remarks)


def _checks(rows: Sequence[tuple[str, str, str, str, str]]) -> RenderableType:
    two = any(first for _, first, _, _, _ in rows)
    headings = ("before", "after", "teacher") if two else ("now", "teacher")
    table = _columns(*headings, first_width=12)
    for column in table.columns:
        column.no_wrap = True
    for name, first, newest, teacher, _ in rows:
        table.add_row(name, *([first] if two else []), newest, Text(teacher, style="dim"))
    notes = [Text(f"{name}: {said}", style="dim") for name, _, _, _, said in rows if said]
    return Group(table, *notes)


def _footnotes(console: Console, figures: Figures, baselines: Figures) -> None:
    tokens = f"{formatting.count(figures.get('num_tokens'))} held-out tokens"
    _footnote(console, "; ".join(filter(None, [tokens, figures.get("bound")])))
    if rows := figures.get("free_running_rows"):
        prompts = formatting.plural(int(rows), "prompt")
        _footnote(console, f"stop rate and below: the student writing by itself, {prompts}")
    if bigram := baselines.get("bigram"):
        kl, top1 = (
            formatting.figure(bigram.get(n)) for n in ("kl_nats_per_token", "top1_agreement")
        )
        _footnote(
            console, f"to beat: a bigram model of the training answers, KL {kl}, top-1 {top1}"
        )


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=16, style="dim")
    table.add_column()
    return table


def _filtered_line(filtered: Mapping[str, int], accepted: float | None) -> str:
    """Rows that filters have rejected, by filter, and the share of answers that passed."""
    line = f"rejected {formatting.reasons(filtered)}"
    return line if accepted is None else f"{line}, accepted {formatting.share(accepted)}"


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
    if any(summary["dropped"].values()) or summary["duplicates"]:
        table.add_row(
            "left out",
            f"dropped {formatting.reasons(summary['dropped'])}, "
            f"duplicate prompts {formatting.count(summary['duplicates'])}",
        )
    if said := judged_line(summary.get("judged")):
        table.add_row("judged", said)
    if filtered := summary.get("filtered"):
        table.add_row("filtered", _filtered_line(filtered, summary.get("accepted_fraction")))
    table.add_row(
        "answers cut off", f"{formatting.share(summary['truncated_fraction'])} by max_tokens"
    )
    if summary.get("skipped_steps"):
        table.add_row(
            "steps skipped", f"{summary['skipped_steps']}: no token to learn, or not finite"
        )
    for name, said in (
        ("student wrote", student_written_line(summary.get("student_written"))),
        ("API teacher", api_line(summary.get("api"))),
    ):
        if said:
            table.add_row(name, said)
    for name, said in teacher_lines(summary.get("teachers")).items():
        table.add_row(f"teacher {name}", said)
    if summary.get("bottleneck"):
        table.add_row("bottleneck", summary["bottleneck"])
    if said := size_line(summary.get("size")):
        table.add_row("student", said)
    if summary["restarts"]:
        table.add_row("resumed", formatting.plural(summary["restarts"], "time"))
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
