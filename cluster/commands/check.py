"""``driver.py check``: everything that keeps a run from starting, for a person or a program.

What needs no cluster is told at once. Then the cluster is asked, unless the run file itself is
wrong: what does not fit then may be another thing once it is right.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import typer

from raystill.base.console import print_lines
from raystill.base.errors import (
    MOST_CHARACTERS,
    MOST_PROBLEMS,
    ConfigError,
    Problem,
    RunError,
    print_problems,
    shown,
    shown_together,
)
from raystill.base.redact import redact
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.check.static import Checked, check_run_file
from raystill.cluster.commands.as_json import counted, print_json
from raystill.datasets.stream.plan import num_steps

EXIT_FAILED, EXIT_REFUSED = 1, 2
LEAST_OF_PLAN = 250
"""Characters of what the run would do, beside problems of any length."""
LONGEST_PLACE = 200
"""Characters of what to edit, beside a message to a program."""


def check_command(run_file: str, overrides: Sequence[str], static: bool) -> int:
    """Check and tell; the exit status. Raises RunError where the cluster does not answer."""
    checked = check_run_file(run_file, overrides)
    if checked.prepared is not None and not checked.file_is_wrong:  # Else of another run.
        told_after = sum(len(str(problem)) for problem in checked.problems[:MOST_PROBLEMS])
        most = MOST_CHARACTERS - min(told_after, MOST_CHARACTERS - LEAST_OF_PLAN)
        print_plan(checked.prepared, most)
    if checked.problems:
        print_problems(checked.problems)
    if more := [] if static else ask_cluster(checked):
        print_problems(more)
    if checked.problems or more:
        return EXIT_REFUSED
    typer.secho("check: no problems found", fg="green")
    return 0


def print_plan(prepared: Prepared, most: int = MOST_CHARACTERS, told_by: str = "--json") -> None:
    """Print what a run will do, of at most so many characters; ``told_by`` tells the rest."""
    lines = redact(prepared.describe()).split("\n")  # Whole: a secret may have several lines.
    print_lines(lines, most, told_by)
    sys.stdout.flush()


def check_for_program(run_file: str, overrides: Sequence[str], static: bool) -> int:
    """Check and print one JSON object; the exit status. It tells of errors, too."""
    checked, more, error = Checked([]), list[Problem](), None
    with contextlib.redirect_stdout(sys.stderr):  # What is said meanwhile is for a person.
        try:
            checked = check_run_file(run_file, overrides)
            more = [] if static else ask_cluster(checked)
        except ConfigError as refused:
            more = refused.problems
        except RunError as failed:
            error = str(failed)
    problems = [*checked.problems, *more]
    print_json(
        {
            "run_file": run_file,
            **told(problems),
            **counted("notices", checked.notices[:MOST_PROBLEMS], len(checked.notices)),
            "error": error,
            **plan(checked),
        }
    )
    return EXIT_REFUSED if problems else EXIT_FAILED if error else 0


def told(problems: Sequence[Problem]) -> dict[str, Any]:
    """The problems as a person is shown them: the first ones, of as many characters."""
    first = problems[:MOST_PROBLEMS]
    messages = shown_together([problem.message for problem in first])
    items = [
        {"where": shown(problem.where, LONGEST_PLACE), "message": message}
        for problem, message in zip(first, messages, strict=True)
    ]
    return counted("problems", items, len(problems))


def plan(checked: Checked) -> dict[str, Any]:
    """What the run will do, as far as its rows are known; {} where the run file is wrong."""
    prepared = checked.prepared
    if prepared is None or checked.folder is None or checked.file_is_wrong:
        return {}
    training = prepared.config.training
    return {
        "run_folder": checked.folder.path,
        "teacher_store": prepared.store_path,
        "train_rows": prepared.num_train_rows,
        "held_out_rows": prepared.num_held_out_rows,
        "steps": training.epochs * num_steps(prepared.num_train_rows, training.rows_per_step),
        "longest_prompt_tokens": prepared.tables.longest_prompt_tokens,
        "dropped": dict(prepared.dropped),
        "duplicates": prepared.duplicates,
        "overlap": [one.record() for one in prepared.tables.overlap],
        "personal_data": found.record() if (found := prepared.tables.personal) else None,
        "space_needed_bytes": prepared.space_needed_bytes,
    }


def ask_cluster(checked: Checked) -> list[Problem]:
    """What the cluster has against the run; it is not asked where the run file is wrong."""
    if checked.file_is_wrong or checked.config is None or checked.folder is None:
        return []
    from raystill.cluster.job import run

    with run.connected(checked.config, checked.folder, for_check=True):
        return list(run.check_on_cluster(checked.config))
