"""The summary's totals, also over resumptions, and the closing table made from the run folder."""

import io
import json
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.summary import (
    RunResult,
    api_line,
    before_and_after,
    size_line,
    student_written_line,
    write_summary,
)
from raystill.cluster.report.tables import (
    examples,
    position_rows,
    print_comparison,
    print_report,
    question,
)
from raystill.datasets.store.store import RowCounts

BEFORE = {"step": 0, "kl_nats_per_token": 8.0, "top1_agreement": 0.05, "acceptance": 0.1}
BEFORE |= {"perplexity": 35000.0, "num_tokens": 900, "bound": "KL is a lower bound"}
BEFORE |= {"stop_rate": 0.0, "length_ratio": 1.5, "repeated_4gram_share": 0.8}
AFTER = {**BEFORE, "step": 20, "kl_nats_per_token": 1.5, "top1_agreement": 0.5}
AFTER |= {"stop_rate": 0.4, "teacher_stop_rate": 0.6, "free_running_rows": 4}
BASELINES = {
    "uniform": {"kl_nats_per_token": 9.0, "top1_agreement": 0.0},
    "bigram": {"kl_nats_per_token": 4.0, "top1_agreement": 0.2},
}


def write_lines(folder: RunFolder, name: str, records: list[dict]) -> None:
    folder.write_text(name, "".join(json.dumps(record) + "\n" for record in records))


def outcome(
    stopped_by: int = 0, rows_asked: int = 0, lives: int = 1, **counters: float
) -> RunResult:
    prepared = types.SimpleNamespace(
        num_train_rows=320,
        num_held_out_rows=8,
        duplicates=3,
        dropped={"too_long": 2},
        config=types.SimpleNamespace(training=types.SimpleNamespace(epochs=1)),
    )
    snapshot = Snapshot(
        counters=counters,
        max_rows_ahead=48,
        max_rows_ahead_seen=48,
        dropped={"too_long": 1},
        lives=lives,
        progress={"step": 20},
    )
    return RunResult(
        snapshot=snapshot,
        stopped_by=stopped_by,
        wall_s=100.0,
        phases={"training": 80.0},
        prepared=cast(Prepared, prepared),
        rows_requested={"training": RowCounts(rows_asked), "evaluation": RowCounts(8)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "runs" / "demo")).ensure()
    write_lines(
        folder, "metrics.jsonl", [{"step": i + 1, "loss": 1.0, "rows": 16} for i in range(20)]
    )
    write_lines(folder, "evaluation.jsonl", [BEFORE, {**AFTER, "baselines": BASELINES}])
    answers = [
        {"step": step, "row": row, "prompt": f"Name colour {row}", "teacher": "Blue.\nOr [red].",
         "student": f"answer of step {step}"}
        for step in (0, 10, 20)
        for row in range(5)
    ]  # fmt: skip
    write_lines(folder, "answers.jsonl", answers)
    return folder


def report_of(folder: RunFolder) -> str:
    file = io.StringIO()
    print_report(folder, Console(file=file, width=100))
    return file.getvalue()


def test_the_summary_counts_rows_tokens_and_drops(folder: RunFolder) -> None:
    summary = write_summary(
        folder, outcome(rows_asked=320, rows_answered=320, rows_truncated=80, teacher_busy_s=50.0)
    )
    assert summary == json.loads(folder.read_text("summary.json"))
    assert summary["status"] == "completed"
    assert summary["rows_asked"] == 320
    assert summary["rows_trained"] == 320
    assert summary["rows_total"] == 320
    assert summary["truncated_fraction"] == pytest.approx(0.25)
    assert summary["dropped"] == {"too_long": 3}
    assert summary["duplicates"] == 3
    assert summary["teacher"]["busy_s"] == 50.0
    assert summary["restarts"] == 0
    assert summary["evaluation"]["before"]["kl_nats_per_token"] == 8.0
    assert summary["evaluation"]["after"]["kl_nats_per_token"] == 1.5
    assert summary["baselines"] == BASELINES


def test_rows_that_the_student_wrote_are_told_with_their_age(folder: RunFolder) -> None:
    assert write_summary(folder, outcome())["student_written"] == {}
    assert "student wrote" not in report_of(folder)
    ages = [{"staleness/0": 3, "staleness/1": 0}, {"staleness/0": 1, "staleness/12": 4}]
    lines = [
        {"step": i + 1, "loss": 1.0, "rows": 16, "student_written_rows": sum(age.values()), **age}
        for i, age in enumerate(ages)
    ]
    write_lines(folder, "metrics.jsonl", lines)
    written = write_summary(folder, outcome())["student_written"]
    assert written == {"rows": 8, "staleness": {"0": 4, "12": 4}}
    assert "student wrote     8 rows, by weights at most 12 steps old" in report_of(folder)


@pytest.mark.parametrize("broken", [None, 3, [], {"rows": "x"}, {"rows": 2, "staleness": 4}, {}])
def test_a_line_about_a_broken_summary_has_no_traceback(broken: object) -> None:
    assert student_written_line(broken) in ("", "2 rows")
    assert "answers" in api_line(broken) or not broken or not isinstance(broken, dict)


def test_what_answers_that_did_not_arrive_may_cost_is_told_beside_the_cost() -> None:
    told = api_line({"requests": 3, "cost": 0.25, "lost_cost": 1.5, "timeout": 2})
    assert "cost 0.25 (at most 1.5 more for answers that did not arrive)" in told
    assert told.endswith("; 2 (timeout 2)") and "lost" not in told


def test_failures_of_a_start_that_ended_in_an_error_are_in_the_summary(folder: RunFolder) -> None:
    """It has written no summary; the file has its lines, and those of the start that did."""
    paid = {"step": 0, "api_requests": 1, "api_cost": 0.25}
    first = [paid, {"step": 0, "api_timeout": 1}, {"step": 0, "api_timeout": 1}]
    write_lines(folder, "spending.jsonl", [*first, paid, {"step": 0, "api_timeout": 1}])
    second = {"api_requests": 1, "api_cost": 0.25, "api_timeout": 1, "api_too_many_requests": 4}
    told = write_summary(folder, outcome(**second))["api"]
    assert told == {"requests": 2, "cost": 0.5, "timeout": 3, "too_many_requests": 4}
    again = write_summary(folder, outcome(api_timeout=1))["api"]
    assert again == {**told, "timeout": 4}, "an earlier version's start is in the summary alone"


def test_failures_are_kept_by_teacher_too(folder: RunFolder) -> None:
    folder.write_text("manifest.json", json.dumps({"teachers": {"one": {}, "two": {}}}))
    paid = {"step": 0, "api_requests": 1, "api_cost": 0.25}
    write_lines(folder, "spending-two.jsonl", [paid, {"step": 0, "api_timeout": 1}, paid])
    counters = {"teachers/two/api_requests": 1, "teachers/two/rows": 2, "teachers/one/rows": 3}
    summary = write_summary(folder, outcome(**counters))
    assert summary["teachers"] == {
        **{"two/rows": 2, "one/rows": 3},
        **{"two/api_requests": 2, "two/api_cost": 0.5, "two/api_timeout": 1},
    }
    assert summary["api"] == {"requests": 2, "cost": 0.5, "timeout": 1}


def test_rows_that_filters_rejected_are_told_by_filter_and_as_a_share(folder: RunFolder) -> None:
    result = outcome(rows_asked=330, rows_answered=320, rows_filtered=80)
    filtered = {"length": 50, "says-answer": 30}
    snapshot = replace(result.snapshot, filtered=filtered, filtered_by_epoch={0: 80})
    summary = write_summary(folder, replace(result, snapshot=snapshot))
    assert summary["filtered"] == {"length": 50, "says-answer": 30}
    assert summary["accepted_fraction"] == pytest.approx(1 - 80 / 319), "one row was dropped"
    assert summary["rows_reused"] == 70, "320 trained and 80 rejected, of which 330 were asked"
    assert "rejected 80 (length 50, says-answer 30), accepted 75 %" in report_of(folder)
    again = write_summary(folder, outcome(rows_answered=80, rows_filtered=20))
    assert (again["rows_filtered"], again["accepted_fraction"]) == (80, 1.0)
    assert "rejected" not in report_of(folder), "none in the last epoch"
    twice = outcome(rows_answered=640, rows_filtered=80)  # All of it answered again, by a restart.
    summary = write_summary(folder, replace(twice, snapshot=snapshot))
    assert summary["accepted_fraction"] == pytest.approx(1 - 80 / 319)
    assert write_summary(folder, outcome(stopped_by=2))["accepted_fraction"] is None


@pytest.mark.parametrize(
    ("starts", "rejected"),
    [
        ([{0: 10}], {"0": 10}),
        ([{0: 7}, {0: 10}], {"0": 10}),  # Stopped, and resumed in the same epoch.
        ([{0: 10, 1: 4}, {1: 10}], {"0": 10, "1": 10}),
        ([{0: 10, 1: 4}, {0: 10}], {"0": 10}),  # The checkpoint of epoch 1 was lost.
        ([{2: 10}], {"0": 10, "1": 10, "2": 10}),  # Earlier starts were killed.
        ([{0: 9}, {2: 10}], {"0": 9, "1": 10, "2": 10}),
        ([{0: 9}, {}], {"0": 9}),  # Ended before its first epoch began.
        ([{}], {}),
    ],
)
def test_rows_that_are_rejected_again_after_a_restart_count_once(
    folder: RunFolder, starts: list[dict[int, int]], rejected: dict[str, int]
) -> None:
    """The counters have each of them; so many rows would else be told as read from the store."""
    for start in starts:
        result = outcome(rows_asked=320, rows_answered=640, rows_filtered=500)
        snapshot = replace(result.snapshot, filtered_by_epoch=start)
        summary = write_summary(folder, replace(result, snapshot=snapshot))
    total = sum(rejected.values())
    assert summary["filtered_by_epoch"] == rejected
    assert (summary["rows_filtered"], summary["rows_reused"]) == (total, total)


def test_scored_rows_stand_apart_from_asked_and_reused_ones(folder: RunFolder) -> None:
    requested = {"training": RowCounts(20, 200), "evaluation": RowCounts(0, 5)}
    enriched = replace(outcome(), rows_requested=requested)
    summary = write_summary(folder, enriched)
    names = ("rows_asked", "rows_scored", "rows_reused", "evaluation_rows_scored")
    assert [summary[name] for name in names] == [20, 200, 100, 5]
    shown = report_of(folder)
    assert "rows scored" in shown
    assert "200 for training, 5 held out" in shown
    write_summary(folder, outcome(rows_asked=320))
    assert "rows scored" not in report_of(folder)


def test_a_resumed_run_adds_to_the_totals_of_its_earlier_part(folder: RunFolder) -> None:
    first = outcome(stopped_by=15, rows_asked=200, rows_answered=200, teacher_prompt_tokens=10)
    assert write_summary(folder, first)["status"] == "stopped"
    second = outcome(rows_asked=350, rows_answered=120, teacher_prompt_tokens=5)
    summary = write_summary(folder, second)
    assert summary["status"] == "completed"
    assert summary["rows_asked"] == 350
    assert summary["teacher"]["prompt_tokens"] == 15
    assert summary["wall_s"] == 200.0
    assert summary["phases"] == {"training": 160.0}
    assert summary["restarts"] == 1
    assert summary["dropped"] == {"too_long": 3}


def test_the_bottleneck_is_in_the_summary_and_in_the_table(folder: RunFolder) -> None:
    window = {"phase": "training", "seconds": 10.0, "replicas": 1, "workers": 1, "rows_ahead": 48}
    window |= {"teacher_rows": 8, "teacher_busy_s": 10.0, "student_rows": 8}
    write_lines(
        folder, "timeline.jsonl", [window | {"student_busy_s": 6.0, "student_wait_s": 4.0}] * 13
    )
    said = "teacher-bound: the student waits 40 %, the teacher idles 0 %"
    assert write_summary(folder, outcome())["bottleneck"] == said
    assert said in " ".join(report_of(folder).split())


def test_a_restart_of_the_worker_group_is_counted(folder: RunFolder) -> None:
    assert write_summary(folder, outcome(lives=3))["restarts"] == 2


def test_skipped_steps_are_those_without_a_loss(folder: RunFolder) -> None:
    write_lines(folder, "metrics.jsonl", [{"step": 1, "loss": None, "rows": 0}])
    assert write_summary(folder, outcome())["skipped_steps"] == 1


def test_a_run_without_evaluation_has_neither_before_nor_after(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "bare")).ensure()
    assert before_and_after(folder) == (None, None)
    write_summary(folder, outcome(rows_asked=8))
    assert "rows asked" in report_of(folder)


def test_two_evaluations_of_one_step_are_joined_the_later_first(folder: RunFolder) -> None:
    write_lines(folder, "evaluation.jsonl", [BEFORE, {**AFTER, "acceptance": 0.3}, AFTER])
    _, after = before_and_after(folder)
    assert after is not None
    assert after["acceptance"] == AFTER["acceptance"]


def test_the_table_shows_before_and_after_and_the_baselines(folder: RunFolder) -> None:
    write_summary(folder, outcome(rows_asked=320, teacher_response_tokens=3000, teacher_busy_s=30))
    text = report_of(folder)
    lines = text.splitlines()
    kl = next(line for line in lines if "KL(teacher || student)" in line)
    assert kl.split()[-4:] == ["8.000", "→", "1.500", "0.000"]
    assert next(line for line in lines if "stop rate  " in line).split()[-1] == "0.60"
    assert "35,000" in text
    assert "a bigram model of the training answers, KL 4.000, top-1 0.200" in text
    assert "finished" in text


def on_own_answers(*values: float) -> dict[str, Any]:
    """Figures of a record on the student's own answers, by position."""
    ends = [32, 64, 128][: len(values)]
    bins = [
        {"from": start, "to": end, "kl": 9.0, "reverse_kl": value, "tokens": 5}
        for start, end, value in zip([0, *ends], ends, values, strict=False)
    ]
    mean = sum(values) / len(values)
    return {"reverse_kl_on_student_answers": mean, "student_answers_by_position": bins}


def test_the_table_shows_how_far_the_student_is_on_its_own_answers(folder: RunFolder) -> None:
    records = [BEFORE | on_own_answers(1.0, 2.0), AFTER | on_own_answers(0.25, 0.5, 0.75)]
    write_lines(folder, "evaluation.jsonl", records)
    write_summary(folder, outcome(rows_asked=320))
    text = report_of(folder)
    told = [line.split() for line in text.splitlines() if "tokens " in line and " to " in line]
    assert ["tokens", "1", "to", "32", "1.000", "→", "0.250"] in told
    assert ["tokens", "33", "to", "64", "2.000", "→", "0.500"] in told
    assert ["tokens", "65", "to", "128", "-", "→", "0.750"] in told
    assert "KL(student || teacher), own answers" in text


@pytest.mark.parametrize("bins", [7, "x", [7], [{"from": 0}], [{"from": "a", "to": 1}], [None]])
def test_figures_by_position_that_are_none_are_left_out(bins: Any) -> None:
    assert position_rows({"student_answers_by_position": bins}, {}) == []


def test_the_student_is_sized_beside_its_teacher(folder: RunFolder, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", Path(folder.path) / "student"
    student.mkdir()
    for place, rows in ((teacher, 3), (student, 1)):
        place.mkdir(exist_ok=True)
        weights = {"a.weight": np.zeros((rows, 500), np.float32), "b": np.zeros(500, np.float16)}
        save_file(weights, str(place / "model.safetensors"))
    (teacher / "consolidated.safetensors").write_bytes(b"another copy")
    result = outcome()
    result.prepared.teacher_folder = str(teacher)  # type: ignore[misc]
    summary = write_summary(folder, result)
    assert summary["size"] == {
        "teacher": {"parameters": 2000, "bytes": 7000},
        "student": {"parameters": 1000, "bytes": 3000},
    }
    said = "0.0 M parameters in 2.9 KiB; 50 % of the teacher's 0.0 M in 6.8 KiB"
    assert said in " ".join(report_of(folder).split())
    (teacher / "model.safetensors").unlink()  # Not on this machine.
    assert write_summary(folder, result)["size"] == {}


def test_the_size_is_worded_for_models_of_any_kind() -> None:
    def line(student: tuple[int | None, int], teacher: tuple[int | None, int]) -> str:
        named = [dict(zip(("parameters", "bytes"), one, strict=True)) for one in (student, teacher)]
        return size_line({"student": named[0], "teacher": named[1]})

    small, large = (106_203_456, 424_813_824), (8_030_261_248, 16_060_522_496)
    assert line(small, large) == (
        "106 M parameters in 405.1 MiB; 1 % of the teacher's 8.03 B in 15.0 GiB"
    )
    assert line(small, (None, 5 << 30)) == "405.1 MiB, the teacher 5.0 GiB as stored"
    for wrong in (None, [], {}, {"student": 3}, {"student": {"bytes": 1}, "teacher": {}}):
        assert size_line(wrong) == ""


def side(mean: float | None, **more: object) -> dict:
    low, high = (None, None) if mean is None else (mean - 0.1, mean + 0.1)
    return {"mean": mean, "low": low, "high": high, "answers": 16} | more


def checked(share: float, words: float, version: str = "v") -> dict:
    """What an evaluation records of two checks."""
    slow = {"timeouts": 2, "first_error": "took longer than 5 s"}
    return {
        "is_json": {
            "student": side(share, **slow),
            "teacher": side(0.9),
            "is_share": True,
            "version": version,
        },
        "words": {"student": side(words), "teacher": side(None, errors=1), "version": "w"},
    }


def test_checks_are_shown_with_their_intervals_and_what_went_wrong(folder: RunFolder) -> None:
    before, after = BEFORE | {"checks": checked(0.25, 30)}, AFTER | {"checks": checked(0.5, 12)}
    write_lines(folder, "evaluation.jsonl", [before, after])
    summary = write_summary(folder, outcome())
    assert summary["evaluation"]["after"]["checks"]["is_json"]["student"]["low"] == 0.4
    lines = report_of(folder).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Checks of the answers"))
    table = [" ".join(line.split()) for line in lines[start + 1 : start + 7]]
    assert table[0] == "before after teacher"
    assert table[1] == "is_json 0.25 [0.15, 0.35] 0.50 [0.40, 0.60] 0.90 [0.80, 1.00]"
    assert table[2] == "words 30.0 [29.9, 30.1] 12.0 [11.9, 12.1] -"
    assert table[3] == "is_json: student: 2 time-outs; the first: took longer than 5 s"
    assert table[4] == "words: teacher: 1 error"


def test_figures_of_a_check_whose_code_was_changed_say_so(folder: RunFolder) -> None:
    before, after = checked(0.25, 30, "old"), checked(0.5, 12, "new")
    records = [BEFORE | {"checks": before}, AFTER | {"checks": after}]
    write_lines(folder, "evaluation.jsonl", records)
    write_summary(folder, outcome())
    assert "5 s; its code was changed between the two" in " ".join(report_of(folder).split())


def test_the_table_has_no_trailing_blanks(folder: RunFolder) -> None:
    write_summary(folder, outcome(rows_asked=320))
    lines = report_of(folder).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(len(line) for line in lines) <= max(100, len(folder.path) + 60)


def test_a_prompt_is_answered_before_and_after(folder: RunFolder) -> None:
    shown = examples(folder)
    assert len(shown) == 1
    assert shown[0]["before"] == "answer of step 0"
    assert shown[0]["after"] == "answer of step 20"
    write_summary(folder, outcome())
    assert report_of(folder).count("Blue. Or [red].") == 1


def test_a_stopped_run_says_so(folder: RunFolder) -> None:
    write_summary(folder, outcome(stopped_by=2))
    assert "stopped; the same command resumes it" in report_of(folder)


def test_the_table_is_short_and_names_the_page_where_there_is_one(folder: RunFolder) -> None:
    write_summary(folder, outcome(rows_asked=320))
    assert "report.html" not in report_of(folder)
    folder.write_text("report.html", "")
    text = report_of(folder)
    assert f"The whole run on one page: {folder.join('report.html')}" in text
    assert len(text.splitlines()) <= 36


def test_a_folder_without_a_summary_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no summary\.json"):
        print_report(RunFolder(str(tmp_path)))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("system\nBe brief.\nuser\nName a colour.\nassistant\n", "Name a colour."),
        ("user\n\nName a colour.assistant\n\n", "Name a colour."),
        ("Once upon a time", "Once upon a time"),
        ("The user\nwrote", "The user\nwrote"),
    ],
)
def test_the_persons_words_are_found_in_a_templated_prompt(prompt: str, asked: str) -> None:
    assert question(prompt) == asked


def test_figures_are_worded_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert formatting.duration(7) == "0:07"
    assert formatting.duration(3723) == "1:02:03"
    assert formatting.duration(None) == "-"
    assert formatting.rate(0.423) == "0.42"
    assert formatting.rate(1520.4) == "1,520"
    assert formatting.share(0.426) == "43 %"
    assert formatting.reasons({}) == "0"
    assert formatting.one_line("a  b\nc") == "a b c"
    assert formatting.one_line("word " * 200, 20) == "word word word word …"
    monkeypatch.chdir(tmp_path)
    assert formatting.path(str(tmp_path / "runs" / "x")) == "runs/x"
    assert formatting.path("/elsewhere/x") == "/elsewhere/x"
    assert formatting.path("s3://bucket/x") == "s3://bucket/x"


def test_several_runs_are_put_side_by_side(folder: RunFolder, tmp_path: Path) -> None:
    write_summary(folder, outcome(rows_asked=320))
    other = RunFolder(str(tmp_path / "runs" / "text")).ensure()
    write_lines(other, "evaluation.jsonl", [BEFORE, {**AFTER, "kl_nats_per_token": 2.25}])
    write_lines(other, "metrics.jsonl", [{"step": 1, "loss": 1.0, "rows": 320}])
    write_summary(other, outcome(rows_asked=0))
    file = io.StringIO()
    print_comparison([folder, other], Console(file=file, width=120))
    shown = file.getvalue()
    (kl,) = (line for line in shown.splitlines() if "KL(teacher || student), nats" in line)
    assert kl.split()[-2:] == ["1.500", "2.250"]
    (asked,) = (line for line in shown.splitlines() if line.strip().startswith("rows_asked"))
    assert asked.split() == ["rows_asked", "320", "0"]
    assert measured_of(shown) == "at step 20  at step 20"
    write_lines(other, "evaluation.jsonl", [BEFORE])  # It was stopped before its end.
    file = io.StringIO()
    print_comparison([folder, other], Console(file=file, width=120))
    assert measured_of(file.getvalue()) == "at step 20  before training"
    write_lines(other, "evaluation.jsonl", [])
    file = io.StringIO()
    print_comparison([folder, other], Console(file=file, width=120))
    assert measured_of(file.getvalue()).split()[-1] == "-"
    with pytest.raises(RunError, match=r"nowhere has no summary\.json"):
        print_comparison([folder, RunFolder(str(tmp_path / "nowhere"))])


def measured_of(shown: str) -> str:
    """The row of a comparison that says when the figures were measured."""
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("measured"))
    return row.strip().removeprefix("measured").strip()


HIDDEN = "Paris \x1b[8mhidden\x1b[0m \x1b[1;31;5mERROR\x1b[0m \x1b]0;title\x07 \x9b2J \x1b[2J"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_text_of_a_model_has_no_colour_on_a_terminal(
    folder: RunFolder, on_terminal: bool
) -> None:
    """Nor is it hidden, nor does it blink: colours that are left are those of the table."""
    write_summary(folder, outcome())
    answer = {"row": 1, "prompt": f"Name it. {HIDDEN}", "teacher": HIDDEN, "student": HIDDEN}
    write_lines(folder, "answers.jsonl", [{"step": step, **answer} for step in (0, 20)])
    check = {"student": {"mean": 0.5}, "teacher": {"mean": 0.5}, "is_share": True}
    checks = {"checks": {f"c{HIDDEN}": check}}
    write_lines(folder, "evaluation.jsonl", [BEFORE | checks, AFTER | checks])
    file = io.StringIO()
    given: dict[str, Any] = {"force_terminal": on_terminal, "legacy_windows": False}
    print_report(folder, Console(file=file, width=200, color_system="standard", **given))
    shown = file.getvalue()
    assert shown.count("\\x1b[8mhidden\\x1b[0m") >= 3 and "\x9b" not in shown
    colours = set(re.findall("\x1b.[^a-zA-Z]*.?", shown))
    assert all(re.fullmatch("\x1b\\[[0-37;]*m", one) for one in colours)  # Bold, faint, colours.
    assert bool(colours) == on_terminal
