"""Checks: what functions of the user say of the student's answers, and of the teacher's.

*Consumes* the free-running answers on rank 0, the prompts in words with their rows' fields
(``prompts/held_out_fields.parquet``), and the functions' text (``checks/`` of the run folder,
where the driver has put it, so that no node needs the file). Each function runs in a process of
its own (`base.user_function`). An answer for which it fails or takes too long has no figure and is
counted apart; the teacher's answers are cut to the length that the student may write.

A share (true or false) has Wilson's interval: E. B. Wilson, Probable inference, 1927. A mean of
numbers has the bootstrap's percentile interval (B. Efron, 1979), of few numbers Student's t. All at
95 %.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raystill.base.run_folder import CHECKS, HELD_OUT_FIELDS, RunFolder
from raystill.base.user_function import Code, Result, UserFunction, parse
from raystill.config.student import CheckConfig
from raystill.train.batch.rows import Row

logger = logging.getLogger(__name__)

Z95 = 1.959964
"""Standard normal quantile of 0.975."""
T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484),
)
"""Quantiles of 0.975 of Student's t with 1, 2, ... degrees of freedom."""
RESAMPLES = 2000
MOST_TIMEOUTS = 5
"""Answers in a row that may take too long; after that a check is given up for this evaluation."""
MOST_S = 900.0
"""Seconds that all checks of an evaluation may take: all workers wait for the one that asks."""
GIVEN_UP = Result(error="not asked: the answers before it all took too long", timed_out=True)
OUT_OF_TIME = Result(error="not asked: the time for all checks was used up", timed_out=True)


@dataclass(frozen=True)
class Asked:
    """One answer to check: its prompt in words, the answer's text, the fields of its row."""

    prompt: str
    answer: str
    fields: dict[str, Any]


def prompts_in_words(folder: RunFolder) -> dict[int, tuple[str, dict[str, Any]]]:
    """Prompt and fields of every held-out row, by its number."""
    table = folder.read_table(HELD_OUT_FIELDS)
    return {row["row"]: (row["prompt"], json.loads(row["fields"])) for row in table.to_pylist()}


def code_of(check: CheckConfig, folder: RunFolder) -> Code:
    """The check's function: a file's text as the run folder has it, or a module's name."""
    place, name = parse(check.function)
    if not place.endswith(".py"):
        return Code(name, module=place)
    return Code(name, file=place, text=folder.read_text(f"{CHECKS}/{check.label}.py"))


def run_checks(
    checks: Sequence[CheckConfig],
    folder: RunFolder,
    pairs: Sequence[tuple[Row, list[int]]],
    text: Callable[[list[int]], str],
    max_tokens: int,
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Figures of each check by its name, and what it said of each row's two answers.

    ``pairs``: rows with the student's answers; ``text`` makes text of token ids.
    """
    words = prompts_in_words(folder)
    students = [Asked(words[r.row][0], text(ids), words[r.row][1]) for r, ids in pairs]
    teachers = [
        Asked(words[r.row][0], text(r.response_ids.tolist()[:max_tokens]), words[r.row][1])
        for r, _ in pairs
    ]
    until = time.monotonic() + MOST_S
    figures: dict[str, Any] = {}
    by_row: dict[int, dict[str, Any]] = {row.row: {} for row, _ in pairs}
    for check in checks:
        code = code_of(check, folder)
        said = {
            "student": ask(check, code, students, until),
            "teacher": ask(check, code, teachers, until),
        }
        values = [r.value for results in said.values() for r in results if r.value is not None]
        is_share = all(isinstance(value, bool) for value in values)
        figures[check.label] = {who: measured(r, is_share) for who, r in said.items()}
        figures[check.label] |= {"is_share": is_share, "version": code.version}
        for (row, _), student, teacher in zip(pairs, *said.values(), strict=True):
            by_row[row.row][check.label] = {"student": student.value, "teacher": teacher.value}
        logger.info("check %s: %s", check.label, figures[check.label])
    return figures, by_row


def ask(
    check: CheckConfig, code: Code, answers: Sequence[Asked], until: float = math.inf
) -> list[Result]:
    """What the check's function says of each answer, in their order; none is asked after ``until``,
    in seconds of the monotonic clock.
    """
    results: list[Result] = []
    with UserFunction(code, check.timeout_s) as function:
        for one in answers:
            if time.monotonic() > until:
                results.append(OUT_OF_TIME)
                continue
            late = results[-MOST_TIMEOUTS:]
            if len(late) == MOST_TIMEOUTS and all(result.timed_out for result in late):
                results.append(GIVEN_UP)
                continue
            results.append(function.call(one.prompt, one.answer, one.fields))
    return results


def measured(results: Sequence[Result], is_share: bool) -> dict[str, Any]:
    """Mean with its interval (None without a value), the answers it is of, and what went wrong."""
    values = [float(result.value) for result in results if result.value is not None]
    mean, low, high = (wilson if is_share else mean_interval)(values)
    wrong = [result for result in results if result.error]
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "answers": len(values),
        "errors": sum(not result.timed_out for result in wrong),
        "timeouts": sum(result.timed_out for result in wrong),
        "first_error": wrong[0].error if wrong else None,
    }


Interval = tuple[float | None, float | None, float | None]


def wilson(values: Sequence[float]) -> Interval:
    """Share of ones among zeros and ones, with Wilson's 95 % interval.

    With n values, share p and z the normal quantile: centre (p + z^2/2n) / (1 + z^2/n), half width
    z sqrt(p (1 - p)/n + z^2/4n^2) / (1 + z^2/n).
    """
    n = len(values)
    if n == 0:
        return None, None, None
    share, spread = sum(values) / n, Z95 * Z95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return share, max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with its 95 % interval: the 2.5 and 97.5 percentiles of means of samples drawn anew.

    Of fewer than 30 values Student's, mean +- t s / sqrt(n): samples of so few differ too little
    among themselves. Of normal values the bootstrap's interval holds the true mean in 69 % of cases
    with 3 values, in 90 % with 10. A single value has no interval.
    """
    if not values:
        return None, None, None
    array = np.array(values)
    mean, n = float(array.mean()), len(values)
    if n == 1:
        return mean, None, None
    if n - 2 < len(T95):
        half = T95[n - 2] * float(array.std(ddof=1)) / math.sqrt(n)
        return mean, mean - half, mean + half
    random = np.random.default_rng(seed)
    means = [random.choice(array, n).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return mean, float(low), float(high)
