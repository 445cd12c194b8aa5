"""``driver.py calibrate``: its options, and the order of what it does.

Imports nothing heavy before the run file has passed the check.
"""

import argparse
from collections.abc import Callable

from raystill.cluster.check import check_run_file
from raystill.cluster.problems import ConfigError
from raystill.cluster.run_folder import CALIBRATION, RunFolder

EXIT_INTERRUPTED = 130


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


def calibrate_command(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Check, compare, write, print; the exit status. Raises ConfigError and RunError."""
    checked = check_run_file(arguments.run_file, arguments.set)
    config, folder, prepared = checked.config, checked.folder, checked.prepared
    if checked.problems or config is None or folder is None or prepared is None:
        raise ConfigError(checked.problems)

    from raystill.cluster import calibrate, calibrate_report, job

    student = calibrate.trained_student(folder, arguments.student)
    if problems := calibrate.unfit(config, prepared, student):
        raise ConfigError(problems)
    output = RunFolder(arguments.output or folder.join(CALIBRATION)).ensure()
    wish = calibrate.Wish(arguments.positions, arguments.cosine, arguments.all_objectives, student)
    prepared.fetch_models()
    with job.connected(config, output):
        if problems := job.check_on_cluster(config):
            raise ConfigError(problems)
        try:
            found = calibrate.calibrate(config, prepared, wish, output.logs, say)
        except KeyboardInterrupt:
            say("stopped; what the teacher has answered is kept in the store")
            return EXIT_INTERRUPTED
    calibrate_report.write_calibration(output, found)
    calibrate_report.print_calibration(found)
    say(f"\nwritten to {output.path}")
    return 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number:g} is not between 0 and 1")
    return number
