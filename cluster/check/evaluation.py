"""The evaluation before anything is spent: functions of the user, and tasks of the harness.

Both are imported in a process of their own, so that what they bring along (torch, a broken package,
an exit) stays out of this one.
"""

import difflib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from raystill.base import formatting
from raystill.base.errors import Problem, RunError
from raystill.base.records import read_bounded
from raystill.base.run_folder import CHECKS, RunFolder, resolve_input
from raystill.base.user_function import Code, UserFunction, parse
from raystill.cluster.check.trackers import is_installed
from raystill.cluster.harness import probe
from raystill.cluster.harness.ask import HARNESS, folder_content, offline, unpacked
from raystill.config.run import RunConfig
from raystill.config.student import CheckConfig, EvaluationConfig, TasksConfig

LARGEST_BYTES = 1 << 20
TASKS = "evaluation.tasks"
PROBE = probe.__file__
PROBE_TIMEOUT_S = 900.0


def check_evaluation(config: EvaluationConfig) -> Iterator[Problem]:
    """A problem for each function of ``evaluation.checks`` that could not be called."""
    for number, check in enumerate(config.checks):
        where = f"evaluation.checks.{number}.function"
        try:
            code = read_code(check)
        except OSError as error:
            reason = error.strerror or error
            yield Problem(where, f"({check.function}) cannot be read: {reason}; name a Python file")
            continue
        except ValueError as error:
            yield Problem(where, f"({check.function}) {error}; name a Python file")
            continue
        with UserFunction(code, check.timeout_s, quiet=True) as function:
            if problem := function.load():
                yield Problem(
                    where, f"({check.function}) cannot be imported: {problem}; correct its code"
                )


def read_code(check: CheckConfig) -> Code:
    """Where the check's function is, with the file's text. Raises OSError, ValueError."""
    place, name = parse(check.function)
    if not place.endswith(".py"):
        return Code(name, module=place)
    text = read_bounded(Path(resolve_input(place)), LARGEST_BYTES).decode("utf-8")
    if not text.strip():
        raise ValueError("is empty")
    return Code(name, file=place, text=text)


def copy_functions(config: EvaluationConfig, folder: RunFolder) -> None:
    """Put the files' texts into the run folder, where every node finds them."""
    for check in config.checks:
        if text := read_code(check).text:
            folder.write_text(f"{CHECKS}/{check.label}.py", text)


def check_tasks(config: RunConfig, output: RunFolder | None) -> Iterator[Problem]:
    """Problems of ``evaluation.tasks``: its extra, its folder, its names, and their data.

    The harness itself says what it has, in a process of its own: the seconds that its import takes
    are spent only where a run names tasks.
    """
    tasks = config.evaluation.tasks
    if tasks is None:
        return
    if config.teacher.engine != "vllm":
        message = (
            f"needs the teacher's weights, and teacher.engine is {config.teacher.engine!r}; remove "
            "evaluation.tasks, or score the finished student by the harness itself"
        )
        yield Problem(TASKS, message)
        return
    if output is not None and not output.is_local:
        message = (
            f"needs the run folder on a disk of this machine, and output.path is {output.path}; "
            "name a folder, or copy the run folder later and use raystill tasks"
        )
        yield Problem(TASKS, message)
        return
    if not is_installed(HARNESS):
        yield Problem(
            TASKS,
            "needs lm-evaluation-harness, which is not installed here; pip install "
            "'raystill[tasks]' (in a clone: make tasks), or remove evaluation.tasks",
        )
        return
    folder = None if tasks.include is None else resolve_input(tasks.include)
    try:
        content = None if folder is None else folder_content(folder)
    except (RunError, OSError) as error:
        yield Problem(f"{TASKS}.include", str(error))
        return
    with unpacked(content or {}) as place:
        yield from probed(tasks, str(place))


def probed(tasks: TasksConfig, place: str) -> Iterator[Problem]:
    """What the harness says of the named tasks, run in ``place``, a folder of the task files."""
    command = [sys.executable, "-P", str(PROBE), *tasks.names]
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
        found = json.loads(done.stdout.splitlines()[-1])
        unknown, broken, included = found["unknown"], found["broken"], found["included"]
    except subprocess.TimeoutExpired:
        yield Problem(TASKS, f"could not be loaded by the harness within {PROBE_TIMEOUT_S:.0f} s")
        return
    except (IndexError, ValueError, KeyError, TypeError):
        said = formatting.one_line("\n".join(done.stderr.strip().splitlines()[-2:]))
        yield Problem(TASKS, f"cannot be checked: the harness ends with: {said}")
        return
    for name in unknown:
        near = difflib.get_close_matches(name, included, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        there = f", and include has {', '.join(included)}" if included else ""
        message = f"names {name!r}, which is no task of lm-evaluation-harness{there}{meant}"
        yield Problem(
            f"{TASKS}.names", message if meant else f"{message}; python -m lm_eval ls tasks"
        )
    for name, reason in broken.items():
        remedy = "correct its file, or see that its data can be fetched"
        if offline():
            remedy = (
                "if its data is on the Hub and not in the cache here, unset HF_HUB_OFFLINE and "
                "HF_DATASETS_OFFLINE once, or name tasks of local files"
            )
        message = (
            f"names {name!r}, which cannot be loaded ({formatting.one_line(reason)}); {remedy}"
        )
        yield Problem(f"{TASKS}.names", message)
