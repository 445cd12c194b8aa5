#!/usr/bin/env python
"""Raystill's driver: check the run file, serve the teacher, stream its answers, fit the student.

The one command for a laptop, for ``ray job submit`` and for a cluster. It places, watches and
reports; no row ever passes through it.

    python driver.py run configs/quickstart.yaml
    python driver.py run configs/quickstart.yaml --set training.learning_rate=1e-4
    python driver.py check configs/quickstart.yaml
    python driver.py calibrate configs/quickstart.yaml
    python driver.py report runs/quickstart
    python driver.py draft runs/quickstart
    python driver.py speed runs/quickstart
    python driver.py store list runs/teacher_store
    python driver.py submit configs/quickstart.yaml --address http://127.0.0.1:8265

Installed, the same command is ``raystill``. Each command imports what it needs when it is called,
so that help, completion and refusals come at once.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from raystill import __version__
from raystill.base import formatting
from raystill.base.console import leave, nobody_reads, printable, told_usage, unexpected
from raystill.base.errors import ConfigError, RunError, print_problems, shown
from raystill.base.redact import redact_uncaught_errors
from raystill.cluster.commands import options
from raystill.cluster.store import cli as store
from raystill.cluster.worth import cli as worth

EXIT_FAILED = 1
LONGEST_ERROR = 3000
"""Characters of an error of a run, which may quote a log."""
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
WRONG_COMMAND_LINE: type[Exception] = typer.BadParameter.__mro__[2]
EXIT_CLOSED_PIPE = 141  # What a shell reports of a program that SIGPIPE ended.
STATUSES = """\b
Exit status:
  0        done
  1        failed
  2        refused before anything was spent
  130/143  stopped by a signal; the same command resumes a run

'fields' lists every setting of a run file."""


def program() -> str:
    """The command as it was typed, for messages that are to be typed again."""
    typed = Path(sys.argv[0])
    if typed.name == "driver.py":
        return f"python {shlex.quote(formatting.path(sys.argv[0]))}"
    return "raystill" if typed.stem == "raystill" else "python driver.py"


def exit_with(status: int, **_: object) -> NoReturn:
    """End with the status that a command returned."""
    raise typer.Exit(status)


# Plain help, since rich's panels double the time until it is shown. Completion for the installed
# program only: a shell cannot complete the arguments of "python driver.py".
app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    add_completion=program() == "raystill",
    result_callback=exit_with,
    epilog=STATUSES,
)
app.add_typer(store.app, name="store", help="Look after a teacher store, or exchange answers.")


def show_version(asked: bool) -> None:
    """Print the version and end, if asked."""
    if asked:
        print(f"raystill {__version__}")
        raise typer.Exit


@app.callback()
def program_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Distil a large language model into a small one on a Ray cluster."""


@app.command()
def run(
    run_file: options.RunFile, overrides: options.Overrides, skip_probe: options.SkipProbe = False
) -> int:
    """Distil, or resume a run that was stopped.

    It resumes by itself where the run folder has a checkpoint. A finished run prints its report.
    """
    from raystill.cluster.check.static import check_run_file

    checked = check_run_file(run_file, overrides)
    config, folder, prepared = checked.config, checked.folder, checked.prepared
    if checked.problems or config is None or folder is None or prepared is None:
        return refuse(checked.problems)

    from raystill.cluster.commands.check import print_plan
    from raystill.cluster.job import manifest
    from raystill.cluster.job import run as job
    from raystill.cluster.job.driver_process import hold_run_folder
    from raystill.cluster.job.watch import watch
    from raystill.cluster.lineage.hub import push_finished
    from raystill.cluster.lineage.papers import leave_papers
    from raystill.cluster.report import summary, tables
    from raystill.cluster.report.page.during import close_page, failure_recorded
    from raystill.cluster.report.trackers import Trackers
    from raystill.cluster.worth import after

    if manifest.is_finished(folder, config.training.epochs):
        say(f"This run is finished; its report, from {folder.path}:")
        ended = after.complete_run(config, folder, say)
        tables.print_report(folder)
        return 0 if ended else EXIT_INTERRUPTED
    print_plan(prepared, told_by="raystill check --json")
    with (
        hold_run_folder(folder),
        Trackers(config.output, folder, say) as trackers,
        failure_recorded(folder, say),
    ):
        prepared.fetch_models()
        if problems := manifest.check_same_teacher(folder, prepared):
            return refuse(problems)
        say(prepared.describe_stored())
        with job.connected(config, folder, trains=True):
            if problems := job.check_on_cluster(config):
                return refuse(problems)
            this_run = job.begin(config, folder, prepared)
            teacher = job.serve(this_run, prepared, probe=not skip_probe)
            stream = job.stream(this_run, prepared)
            student = job.fit(this_run, stream)
            result = watch(this_run, prepared, teacher, student, trackers)
            summary.write_summary(folder, result)
            ended = result.stopped_by != 0 or after.evaluate_run(config, folder, say)
        if not result.stopped_by:
            leave_papers(folder, say)
            push_finished(folder, config, say)
        close_page(folder, stopped=result.stopped_by != 0, tell=say)
    if result.stopped_by:
        again = resume_command(run_file, overrides, skip_probe)
        say(f"Stopped after step {result.snapshot.step}; resume with:\n  {again}")
        return 128 + result.stopped_by
    tables.print_report(folder)
    return 0 if ended else EXIT_INTERRUPTED


@app.command()
def check(
    run_file: options.RunFile,
    overrides: options.Overrides,
    static: options.Static = False,
    as_json: options.AsJson = False,
) -> int:
    """Find every problem before anything is spent.

    What needs no cluster is told at once; then the cluster is asked whether the run fits on it.
    """
    from raystill.cluster.commands.check import check_command, check_for_program

    if as_json:
        return check_for_program(run_file, overrides, static)
    return check_command(run_file, overrides, static)


@app.command()
def calibrate(
    run_file: options.RunFile,
    overrides: options.Overrides,
    positions: options.Positions = 400,
    cosine: options.Cosine = 0.99,
    student: options.TrainedStudent = None,
    all_objectives: options.AllObjectives = False,
    output: options.Output = None,
) -> int:
    """Compare what each signal would teach, and cost.

    The run's own teacher answers some of its prompts. The answers go to the teacher store, so that
    a run need not pay for them again.
    """
    from raystill.cluster.check.static import check_run_file

    checked = check_run_file(run_file, overrides)
    if checked.problems:
        return refuse(checked.problems)

    from raystill.cluster.commands.calibrate import CalibrationOptions, calibrate_command

    wanted = CalibrationOptions(positions, cosine, all_objectives, student)
    return calibrate_command(checked, wanted, output, say)


@app.command()
def submit(
    run_file: options.RunFile,
    overrides: options.Overrides,
    address: options.Address,
    variables: options.Variables,
    working_dir: options.WorkingDir = ".",
    stop_wait_s: options.StopWait = 900,
    python: options.Python = "python",
) -> int:
    """Run it on a cluster, as a Ray job.

    Ships the code, shows the job's log and passes signals on to it.
    """
    from raystill.cluster.commands.submit import Submission
    from raystill.cluster.commands.submit import submit as submit_job

    return submit_job(
        Submission(run_file, address, overrides, working_dir, stop_wait_s, python, variables)
    )


@app.command()
def report(
    run_folders: options.RunFolders,
    as_json: options.AsJson = False,
    html: options.ReportPage = None,
) -> int:
    """Show a run, or several side by side.

    A short table here, and all of it on a page for a browser; made from their folders alone.
    """
    from raystill.cluster.commands.report import report_command

    return report_command(run_folders, as_json, html, say)


@app.command()
def draft(
    run_folder: options.RunFolder,
    overrides: options.Overrides,
    k: options.DraftTokens,
    rows: options.DraftRows = 32,
    concurrency: options.Concurrency = 1,
    teacher: options.NamedTeacher = None,
    as_json: options.AsJson = False,
) -> int:
    """Measure the student as its teacher's draft model.

    How many drafted tokens vLLM accepts, how fast it is, and whether the answers are the same.
    """
    from raystill.cluster.worth.draft import DraftOptions, draft_command

    wanted = DraftOptions(k, rows, concurrency, teacher)
    return draft_command(run_folder, overrides, wanted, as_json, say)


app.command()(worth.tasks)
app.command()(worth.speed)


@app.command()
def lineage(folder: options.StudentFolder, as_json: options.AsJson = False) -> int:
    """Show who taught a student, back through generations.

    From lineage.json in its folder. Exit status 1 if the weights were changed since.
    """
    from raystill.cluster.commands.lineage import lineage_command

    return lineage_command(folder, as_json)


@app.command()
def push(
    run_folder: options.RunFolder,
    repo: options.Repository = None,
    public: options.Public = False,
    replace: options.Replace = False,
    as_json: options.AsJson = False,
) -> int:
    """Push a finished run's student to the Hugging Face Hub."""
    from raystill.cluster.commands.lineage import push_command

    return push_command(run_folder, repo, public, replace, as_json)


@app.command()
def revoke(
    path: options.StorePath,
    teacher: options.RevokedTeacher,
    runs: options.RunsFolders,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> int:
    """Remove a teacher's answers from a store.

    And name the runs whose students learned from it, or from a student of it.
    """
    from raystill.cluster.store.revoke import revoke_command

    return revoke_command(path, teacher, runs, dry_run, as_json)


@app.command()
def fields(
    section: options.Section = None, as_json: options.AsJson = False, schema: options.Schema = False
) -> int:
    """List every setting of a run file.

    Its type, default and meaning, and whether it may change when a run is resumed.
    """
    from raystill.cluster.commands.as_json import print_json
    from raystill.config import describe

    if schema:
        print(describe.schema_text(), end="")
    elif as_json:
        print_json(describe.fields_json(section))
    else:
        print(describe.describe_fields(section))
    return 0


def say(text: str) -> None:
    """Print a line without credentials, at once."""
    print(printable(text), flush=True)


def refuse(problems: Sequence[object]) -> int:
    """Print the problems; the exit status."""
    print_problems(problems)
    return EXIT_REFUSED


def resume_command(run_file: str, overrides: Sequence[str], skip_probe: bool) -> str:
    """The command that resumes a run, for a shell."""
    words = [run_file, *(word for override in overrides for word in ("--set", override))]
    return f"{program()} run {shlex.join(words + ['--skip-probe'] * skip_probe)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names; the exit status, also of a wrong command line."""
    try:
        status = call(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if nobody_reads(stream)]
        if not unread:  # Another pipe, such as one to Ray.
            raise
        for stream in unread:  # At its end Python writes what is still buffered.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_CLOSED_PIPE


def call(argv: Sequence[str] | None) -> int:
    """Parse ``argv`` and run the command; its exit status. Errors for a person are shown."""
    color = False if os.environ.get("NO_COLOR") else None
    try:
        main = typer.main.get_command(app).main
        return int(main(argv, program(), standalone_mode=False, color=color) or 0)
    except (SystemExit, typer.Abort) as end:
        # Typer takes these for a person who has left. They may come from anywhere in a run.
        error = end.__cause__ or end.__context__
        if isinstance(error, BrokenPipeError | EOFError):
            raise error from None
        return int(getattr(end, "code", 1) or 0)
    except WRONG_COMMAND_LINE as error:
        return told_usage(error)
    except ConfigError as error:
        return refuse(error.problems)
    except RunError as error:
        typer.secho("error:", fg="red", err=True, nl=False, color=color)
        print(f" {shown(str(error), LONGEST_ERROR)}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except MemoryError:
        print("error: this process may use no more memory; name smaller files", file=sys.stderr)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A mistake of ours, of a library in Rust, or of nobody.
        print(f"error: {unexpected(error)}", file=sys.stderr)
    return EXIT_FAILED


def command() -> NoReturn:
    """The whole program: ``python driver.py``, and ``raystill`` where it is installed."""
    redact_uncaught_errors()
    leave(main())


if __name__ == "__main__":
    command()
