"""Functions of the user before anything is spent: are they there, and can they be imported?

They are imported in a process of their own, so that what they bring along (torch, a broken package,
an exit) stays out of this one.
"""

import os
from collections.abc import Iterator

from raystill.base.errors import Problem
from raystill.base.run_folder import CHECKS, RunFolder, resolve_input
from raystill.base.user_function import Code, UserFunction, parse
from raystill.config.training import CheckConfig, EvaluationConfig

LARGEST_BYTES = 1 << 20


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
        with UserFunction(code, check.timeout_s) as function:
            if problem := function.load():
                yield Problem(
                    where, f"({check.function}) cannot be imported: {problem}; correct its code"
                )


def read_code(check: CheckConfig) -> Code:
    """Where the check's function is, with the file's text. Raises OSError, ValueError."""
    place, name = parse(check.function)
    if not place.endswith(".py"):
        return Code(name, module=place)
    path = resolve_input(place)
    if (size := os.path.getsize(path)) > LARGEST_BYTES:
        raise ValueError(f"has {size:,} bytes; expected at most {LARGEST_BYTES:,}")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if not text.strip():
        raise ValueError("is empty")
    return Code(name, file=place, text=text)


def copy_functions(config: EvaluationConfig, folder: RunFolder) -> None:
    """Put the files' texts into the run folder, where every node finds them."""
    for check in config.checks:
        if text := read_code(check).text:
            folder.write_text(f"{CHECKS}/{check.label}.py", text)
