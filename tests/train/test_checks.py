"""Checks of answers: intervals by hand, failures counted apart, what reaches the function."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import RunFolder
from raystill.base.user_function import Code, Result
from raystill.config.student import CheckConfig
from raystill.train.batch.rows import Row
from raystill.train.evaluation import checks
from raystill.train.evaluation.checks import (
    T95,
    Asked,
    ask,
    mean_interval,
    measured,
    run_checks,
    wilson,
)

LOOPS = "def check(prompt, answer, row):\n    while answer == 'slow': pass\n    return len(answer)"


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71674; half width
    # 1.96 * sqrt(0.016 + 0.0096037) / 1.38415 = 0.22658.
    share, low, high = wilson([1.0] * 8 + [0.0] * 2)
    assert share == 0.8
    assert (low, high) == (pytest.approx(0.49016, abs=2e-4), pytest.approx(0.94332, abs=2e-4))
    # With p = 1 the interval is [n / (n + z^2), 1]: not the single point of the normal one.
    assert wilson([1.0] * 5) == (1.0, pytest.approx(5 / (5 + 3.8415), abs=1e-4), 1.0)
    assert wilson([0.0] * 5)[1] == 0.0
    assert wilson([]) == (None, None, None)


def test_the_bootstraps_interval_is_near_the_normal_one_and_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    mean, low, high = mean_interval(values)
    assert mean is not None and low is not None and high is not None
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert mean == pytest.approx(np.mean(values))
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1),) * 2
    assert mean_interval(values) == (mean, low, high)


def test_few_numbers_have_students_interval_and_one_has_none() -> None:
    # 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, half width 4.3027 sqrt(7 / 3) = 6.5724.
    mean, low, high = mean_interval([1.0, 2.0, 6.0])
    assert (mean, low, high) == (3.0, pytest.approx(-3.5724, abs=1e-4), pytest.approx(9.5724, 1e-4))
    assert mean_interval([8.0]) == (8.0, None, None)
    assert mean_interval([]) == (None, None, None)
    one = measured([Result(8.0)], False)
    assert (one["mean"], one["low"], one["high"], one["answers"]) == (8.0, None, None, 1)


@pytest.mark.parametrize("freedom", range(1, len(T95) + 1))
def test_the_quantiles_are_those_of_students_distribution(freedom: int) -> None:
    """Its density from 0 to the quantile, by the midpoints of 100,000 parts, is 0.475."""
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    height = math.exp(scale) / math.sqrt(freedom * math.pi)
    width = T95[freedom - 1] / 100_000
    x = (np.arange(100_000) + 0.5) * width
    density = height * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert density.sum() * width == pytest.approx(0.475, abs=5e-6)


@pytest.mark.parametrize(
    ("kind", "n", "least"),
    [
        *(("normal", n, 0.93) for n in (2, 3, 5, 16, 29)),
        *(("exponential", n, 0.85) for n in (2, 3, 5)),
        *(("exponential", n, 0.89) for n in (16, 29)),
        *(("normal", 30, 0.91), ("exponential", 30, 0.89)),  # From here on the bootstrap's.
    ],
)
def test_the_interval_holds_the_true_mean_in_about_95_percent(
    kind: str, n: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 800 samples; 0.95 has a standard deviation of 0.008. Skewed values are held less often."""
    monkeypatch.setattr(checks, "RESAMPLES", 400)
    random = np.random.default_rng(n)
    drawn = random.normal(1, 1, (800, n)) if kind == "normal" else random.exponential(1, (800, n))
    intervals = [mean_interval(sample.tolist())[1:] for sample in drawn]
    held = [low <= 1 <= high for low, high in intervals if low is not None and high is not None]
    assert len(held) == 800 and least <= np.mean(held) <= 0.975


def test_answers_without_a_value_are_counted_apart() -> None:
    results = [Result(True), Result(error="KeyError: 'x'"), Result(False), Result(True)]
    figures = measured([*results, Result(error="took longer than 5 s", timed_out=True)], True)
    assert figures["mean"] == pytest.approx(2 / 3)
    assert (figures["answers"], figures["errors"], figures["timeouts"]) == (3, 1, 1)
    assert figures["first_error"] == "KeyError: 'x'"
    nothing = measured([Result(error="e")], False)
    assert (nothing["mean"], nothing["low"], nothing["answers"]) == (None, None, 0)


def test_a_check_that_is_always_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_TIMEOUTS", 2)
    check = CheckConfig(function="c.py:check", timeout_s=0.5)
    code = Code("check", file="c.py", text=LOOPS)
    answers = ["slow", "ok", "slow", "slow", "ok", "slow"]
    results = ask(check, code, [Asked("p", answer, {}) for answer in answers])
    assert [result.value for result in results] == [None, 2.0, None, None, None, None]
    assert [result.timed_out for result in results] == [True, False, True, True, True, True]
    assert results[4].error.startswith("not asked")  # Else 1,000 rows could take hours.


def test_all_checks_of_an_evaluation_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MOST_S", 1.5)
    slow = "import time\ndef check(p, answer, r):\n    time.sleep(1)\n    return True"
    folder = folder_with(tmp_path, check=slow)
    pairs = [(row(number, [1]), [1]) for number in range(3)]
    wanted = [CheckConfig(function="c.py:check")]
    figures, by_row = run_checks(wanted, folder, pairs, str, max_tokens=4)
    assert figures["check"]["student"]["mean"] == 1.0  # Of those that were asked in time.
    assert figures["check"]["student"]["answers"] < 3
    assert figures["check"]["teacher"]["answers"] == 0
    assert "the time for all checks was used up" in figures["check"]["teacher"]["first_error"]
    assert by_row[2]["check"] == {"student": None, "teacher": None}


def row(number: int, response: list[int]) -> Row:
    ids = (np.array([1], np.int32), np.array(response, np.int32))
    return Row(position=number, row=number, prompt_ids=ids[0], response_ids=ids[1])


def folder_with(tmp_path: Path, **texts: str) -> RunFolder:
    """A run folder with three held-out rows and the texts of checks."""
    folder = RunFolder(str(tmp_path / "run")).ensure()
    columns = [json.dumps({"expected": n, "source": "s"}) for n in range(3)]
    table = {"row": [0, 1, 2], "prompt": ["p0", "p1", "p2"], "fields": columns}
    folder.write_table("prompts/held_out_fields.parquet", pa.table(table))
    for name, text in texts.items():
        folder.write_text(f"checks/{name}.py", text)
    return folder


def test_prompt_answer_and_fields_of_the_row_reach_the_function(tmp_path: Path) -> None:
    text = (
        "def check(prompt, answer, row):\n"
        "    assert prompt == f'p{row[\"expected\"]}' and row['source'] == 's'\n"
        "    return answer == str(row['expected'])\n"
        "def size(prompt, answer, row):\n    return len(answer)\n"
    )
    folder = folder_with(tmp_path, check=text, size=text)
    wanted = [CheckConfig(function="c.py:check"), CheckConfig(function="c.py:size")]
    pairs = [(row(0, [0, 9]), [0]), (row(2, [7]), [2]), (row(1, [1]), [8, 8])]
    said = "{}".format
    figures, by_row = run_checks(
        wanted, folder, pairs, lambda ids: "".join(map(said, ids)), max_tokens=1
    )
    assert by_row == {
        0: {"check": {"student": True, "teacher": True}, "size": {"student": 1.0, "teacher": 1.0}},
        2: {"check": {"student": True, "teacher": False}, "size": {"student": 1.0, "teacher": 1.0}},
        1: {"check": {"student": False, "teacher": True}, "size": {"student": 2.0, "teacher": 1.0}},
    }  # The teacher's first answer was cut to one token, as the student's is.
    share = figures["check"]
    assert share["is_share"] and share["student"]["mean"] == pytest.approx(2 / 3)
    assert share["student"]["low"] == pytest.approx(wilson([1, 1, 0])[1])
    assert not figures["size"]["is_share"]
    assert figures["size"]["student"]["mean"] == pytest.approx(4 / 3)
    assert len(share["version"]) == 12


def test_the_shipped_example_can_be_checked(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples" / "checks"
    rows = [json.loads(line) for line in (examples / "sums.jsonl").read_text().splitlines()]
    text = (examples / "json_answer.py").read_text()
    for name, answer, expected in (
        ("is_json", '{"answer": 1}', True),
        ("is_json", "It is 1.", False),
        ("is_right", f'{{"answer": {rows[0]["expected"]}}}', True),
        ("is_right", '{"answer": "x"}', False),
        ("names_the_result", f"It is {rows[0]['expected']}.", True),
        ("length_words", "one two three", 3.0),
    ):
        check = CheckConfig(function=f"json_answer.py:{name}")
        code = Code(name, file="json_answer.py", text=text)
        (result,) = ask(check, code, [Asked(rows[0]["prompt"], answer, rows[0])])
        assert result == Result(expected), name
    assert len({one["prompt"] for one in rows}) == len(rows) == 96
    assert all(eval(one["prompt"][8:].split("?")[0]) == one["expected"] for one in rows)
