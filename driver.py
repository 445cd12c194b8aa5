#!/usr/bin/env python
"""Raystill's driver: check the run file, serve the teacher, stream its answers, fit the student.

The one command for a laptop, for ``ray job submit`` and for a cluster. It places, watches and
reports; no row ever passes through it.

    python driver.py run configs/quickstart.yaml
    python driver.py run configs/quickstart.yaml --set training.learning_rate=1e-4
    python driver.py check configs/quickstart.yaml
    python driver.py calibrate configs/quickstart.yaml
    python driver.py report runs/quickstart
    python driver.py store list runs/teacher_store
    python driver.py submit configs/quickstart.yaml --address http://127.0.0.1:8265
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from raystill.base.errors import ConfigError, RunError, print_problems
from raystill.base.redact import redact, redact_uncaught_errors
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.static import check_run_file
from raystill.config.describe import describe_fields

EXIT_FAILED = 1
EXIT_REFUSED = 2


def run(arguments: argparse.Namespace) -> int:
    """The whole job; resumes by itself where the run folder has a checkpoint."""
    checked = check_run_file(arguments.run_file, arguments.set)
    config, folder, prepared = checked.config, checked.folder, checked.prepared
    if checked.problems or config is None or folder is None or prepared is None:
        return refuse(checked.problems)

    from raystill.cluster.job import manifest
    from raystill.cluster.job import run as job
    from raystill.cluster.job.driver_process import hold_run_folder
    from raystill.cluster.report import tables

    if manifest.is_finished(folder, config.training.epochs):
        say(f"This run is finished; its report, from {folder.path}:")
        tables.print_report(folder)
        return 0
    say(prepared.describe())
    with hold_run_folder(folder):
        prepared.fetch_models()
        if problems := manifest.check_same_teacher(folder, prepared):
            return refuse(problems)
        say(prepared.describe_stored())
        with job.connected(config, folder):
            if problems := job.check_on_cluster(config):
                return refuse(problems)
            manifest.write_folder(config, folder, prepared)
            outcome = job.distil(config, folder, prepared, probe=not arguments.skip_probe)
        tables.write_summary(folder, outcome)
    if outcome.stopped_by:
        say(f"Stopped after step {outcome.step}; resume with:\n  {resume_command(arguments)}")
        return 128 + outcome.stopped_by
    tables.print_report(folder)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Everything that can be known before anything is spent."""
    checked = check_run_file(arguments.run_file, arguments.set)
    problems = checked.problems
    if checked.prepared is not None:
        say(checked.prepared.describe())
    if checked.config is not None and checked.folder is not None and not arguments.static:
        from raystill.cluster.job import run as job

        with job.connected(checked.config, checked.folder, for_check=True):
            problems = [*problems, *job.check_on_cluster(checked.config)]
    if problems:
        return refuse(problems)
    print("check: no problems found")
    return 0


def calibrate(arguments: argparse.Namespace) -> int:
    """Which signal the run needs: what each would teach, and cost, on some positions of its own
    teacher's answers. These go to the teacher store, so that a run need not pay for them again.
    """
    from raystill.cluster.commands.calibrate import calibrate_command

    return calibrate_command(arguments, say)


def submit(arguments: argparse.Namespace) -> int:
    """Run it on a cluster as a Ray job: ship this folder, show the job's log, pass signals on."""
    from raystill.cluster.commands.submit import Submission
    from raystill.cluster.commands.submit import submit as submit_job

    return submit_job(
        Submission(
            run_file=arguments.run_file,
            address=arguments.address,
            overrides=arguments.set,
            working_dir=arguments.working_dir,
            stop_wait_s=arguments.stop_wait_s,
            python=arguments.python,
            variables=arguments.env,
        )
    )


def print_report(arguments: argparse.Namespace) -> int:
    """The closing table of a run, or several runs side by side, from their folders alone."""
    from raystill.cluster.report import tables

    folders = [RunFolder(path) for path in arguments.run_folder]
    if len(folders) == 1:
        tables.print_report(folders[0])
    else:
        tables.print_comparison(folders)
    return 0


def store(arguments: argparse.Namespace) -> int:
    """List, verify, compact or prune a teacher store. Runs may read and write it meanwhile."""
    from raystill.cluster.commands.store import store_command

    return store_command(arguments.action, arguments.path, arguments.teacher, arguments.dry_run)


def fields(_: argparse.Namespace) -> int:
    """Every field of a run file: type, default, meaning, and whether it may change on resuming."""
    print(describe_fields())
    return 0


def say(text: str) -> None:
    print(redact(text), flush=True)


def refuse(problems: Sequence[object]) -> int:
    print_problems(problems)
    return EXIT_REFUSED


def resume_command(arguments: argparse.Namespace) -> str:
    words = ["python", "driver.py", "run", arguments.run_file]
    for override in arguments.set:
        words += ["--set", override]
    if arguments.skip_probe:
        words.append("--skip-probe")
    return shlex.join(words)


def add_run_command(
    commands: Any, name: str, function: Callable[..., int], sentence: str
) -> argparse.ArgumentParser:
    """A command on a run file and its overrides."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=sentence, description=function.__doc__
    )
    command.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override one setting, e.g. training.rows_per_step=64 (value read as YAML)",
    )
    command.set_defaults(function=function)
    return command


def add_calibrate_options(command: argparse.ArgumentParser) -> None:
    """What the command takes beside the run file and its overrides."""
    command.add_argument(
        "--positions",
        type=_positive,
        default=400,
        metavar="N",
        help="response positions compared, 16 an answer (default: 400)",
    )
    command.add_argument(
        "--cosine",
        type=_share,
        default=0.99,
        metavar="C",
        help="what a signal's gradient must have with the whole vocabulary's (default: 0.99)",
    )
    command.add_argument(
        "--student",
        metavar="FOLDER",
        help="a trained student to compare beside the untrained one (default: the run's own, "
        "if it has finished)",
    )
    command.add_argument(
        "--all-objectives",
        action="store_true",
        help="every divergence, not only those of the run file",
    )
    command.add_argument(
        "--output", metavar="FOLDER", help="where to write (default: RUN_FOLDER/calibration)"
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number:g} is not between 0 and 1")
    return number


def add_submit_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", required=True, metavar="URL", help="its dashboard, e.g. http://127.0.0.1:8265"
    )
    command.add_argument(
        "--working-dir", default=".", metavar="FOLDER", help="the code that is shipped (default: .)"
    )
    command.add_argument(
        "--stop-wait-s",
        type=int,
        default=900,
        metavar="N",
        help="seconds a stopped job has for its checkpoint before Ray kills it (default: 900)",
    )
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of the job; without a value this shell's, e.g. HF_TOKEN",
    )
    command.add_argument(
        "--python", default="python", help="the cluster's Python with the pinned packages"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="driver.py",
        description="Distil a large language model into a small one on a Ray cluster.",
        epilog="'driver.py fields' lists every setting of a run file. Exit status: 0 done, "
        "1 failed, 2 refused before anything was spent, 130/143 stopped by a signal "
        "(a checkpoint was written; the same command resumes).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = add_run_command(
        commands, "run", run, "distil; resumes by itself; a finished run prints its report"
    )
    command.add_argument(
        "--skip-probe",
        action="store_true",
        help="train without comparing the served teacher with the plain model first",
    )
    command = add_run_command(
        commands, "check", check, "find every problem before anything is spent (exit 2)"
    )
    command.add_argument("--static", action="store_true", help="only what needs no cluster")
    add_calibrate_options(
        add_run_command(
            commands, "calibrate", calibrate, "compare what each signal would teach, and cost"
        )
    )
    add_submit_options(add_run_command(commands, "submit", submit, "run it on a cluster, as a job"))
    command = commands.add_parser(
        "report", help="print a run's closing table again, or compare several runs"
    )
    command.add_argument("run_folder", metavar="RUN_FOLDER", nargs="+", help="e.g. runs/quickstart")
    command.set_defaults(function=print_report)
    command = commands.add_parser(
        "store", help="list, verify, compact or prune a teacher store", description=store.__doc__
    )
    command.add_argument(
        "action",
        choices=("list", "verify", "compact", "prune"),
        help="list: teachers, signals, sizes; verify: read all, exit 1: damaged, 3: unreadable "
        "now, 4: of a newer version; compact: merge small segments, leave duplicates out; prune: "
        "remove what is damaged, never what is merely out of reach or newer",
    )
    command.add_argument("path", metavar="STORE", help="e.g. runs/teacher_store, or a URI")
    command.add_argument(
        "--teacher", metavar="IDENTITY", help="prune: also all of this teacher (first digits)"
    )
    command.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    command.set_defaults(function=store)
    command = commands.add_parser("fields", help="list every setting of a run file")
    command.set_defaults(function=fields)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return int(arguments.function(arguments))
    except ConfigError as error:
        return refuse(error.problems)
    except RunError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return EXIT_FAILED


def leave(code: int) -> NoReturn:
    """End this process; at once where a thread of a failed run is still inside a call to Ray, whose
    clean-up at exit would crash under it.
    """
    job = sys.modules.get("raystill.cluster.job.run")
    if job is not None and job.threads_left():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    redact_uncaught_errors()
    leave(main())
