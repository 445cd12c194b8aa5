"""The page of a run: what it shows, that data cannot act in it, and that it stays small."""

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raystill.base.errors import RunError, RunInUseError
from raystill.base.run_folder import RunFolder
from raystill.cluster.report.page.charts import Series, line_chart, nice_ticks
from raystill.cluster.report.page.curves import MOST_POINTS, Curve
from raystill.cluster.report.page.during import (
    ALIVE_S,
    LivePage,
    close_page,
    failure_recorded,
    record_state,
)
from raystill.cluster.report.page.html import element, escape, readable
from raystill.cluster.report.page.page import page, write_page
from raystill.cluster.report.page.read import RunReader
from raystill.cluster.report.page.spent import MOST_BINS, binned, shares
from tests.support.browser import MISSING, Browser, find_browser

VOID = {"meta", "br"}
HOSTILE = (
    "<script>document.title='hacked'</script>",
    "</style></title><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "\u202e\u2066reversed\u202a",
    "\x1b[31mred\x1b]8;;http://evil\x07 \x00 \x9b2J",
    "W" * 10_000,
    "\ud800 half a pair",
)


class Outline(HTMLParser):
    """A page's tags; ``problems`` has what is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def write_lines(folder: RunFolder, name: str, records: list[dict[str, Any]]) -> None:
    folder.write_text(name, "".join(json.dumps(record) + "\n" for record in records))


def window(at: float, phase: str = "training", **more: float) -> dict[str, Any]:
    record: dict[str, Any] = {"time": at, "phase": phase, "seconds": 10.0, "replicas": 1}
    record |= {"workers": 1, "rows_ahead": 16, "teacher_rows": 8, "teacher_busy_s": 9.0}
    return record | {"student_rows": 8, "student_busy_s": 6.0, "student_wait_s": 4.0} | more


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "runs" / "demo")).ensure()
    steps = range(1, 21)
    losses = [
        {"step": s, "loss": 2.0 / s, "objective/forward_kl": 2.0 / s, "rows": 8, "tokens": 100}
        for s in steps
    ]
    write_lines(folder, "metrics.jsonl", losses)
    before = {"step": 0, "kl_nats_per_token": 4.25, "top1_agreement": 0.125, "num_tokens": 900}
    bigram = {"bigram": {"kl_nats_per_token": 3.5, "top1_agreement": 0.2}}
    after = {**before, "step": 20, "kl_nats_per_token": 0.75, "baselines": bigram}
    write_lines(folder, "evaluation.jsonl", [before, after])
    answers = [
        {"step": step, "row": 1, "prompt": "Name a colour.", "teacher": "Blue.", "student": said}
        for step, said in ((0, "cell cell"), (20, "Green."))
    ]
    write_lines(folder, "answers.jsonl", answers)
    write_lines(folder, "timeline.jsonl", [window(1000.0 + 10 * n) for n in range(20)])
    folder.write_text("config.yaml", "seed: 7\ntraining:\n  learning_rate: 0.0003\n  epochs: 1\n")
    folder.write_text("manifest.json", json.dumps({"teacher": "models/T", "run_id": "abc"}))
    summary = {"status": "completed", "wall_s": 200.0, "rows_total": 160, "rows_trained": 160}
    folder.write_text("summary.json", json.dumps(summary))
    return folder


def shown(*folders: RunFolder) -> Outline:
    return Outline(page([RunReader(folder).read() for folder in folders]))


def test_the_page_says_what_was_learned_and_where_the_time_went(folder: RunFolder) -> None:
    outline = shown(folder)
    assert outline.problems == []
    for said in ("finished", "4.250", "0.750", "bigram", "of 160 rows, 20 steps"):
        assert said in outline.text
    assert "teacher-bound: the student waits 40 %" in outline.text
    for said in ("Name a colour.", "cell cell", "Green.", "models/T", "0.0003"):
        assert said in outline.text
    assert "2.000 at step 1, 0.100 at step 20" in outline.text


def test_the_page_shows_checks_and_survives_wrong_ones(folder: RunFolder) -> None:
    side = {"mean": 0.5, "low": 0.25, "high": 0.75, "errors": 1, "first_error": "<script>x"}
    checks = {"is <b>json": {"student": side, "teacher": side | {"mean": None}, "is_share": True}}
    for wrong in (None, [], 3, {"a": []}, {"a": {"student": 3, "teacher": {"mean": "x"}}}):
        records = [{"step": 0, "checks": checks}, {"step": 20, "checks": wrong}]
        write_lines(folder, "evaluation.jsonl", records)
        assert shown(folder).problems == []
    write_lines(folder, "evaluation.jsonl", [{"step": 0}, {"step": 20, "checks": checks}])
    outline = shown(folder)
    assert outline.problems == []
    assert "is <b>json-0.50 [0.25, 0.75]-" in outline.text
    assert "student: 1 error; teacher: 1 error; the first: <script>x" in outline.text


def test_the_page_is_one_file_without_scripts_whose_parts_have_names(folder: RunFolder) -> None:
    outline = shown(folder)
    names = {name for name, _ in outline.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in outline.tags:
        assert not [key for key in attributes if key.startswith("on") or key == "src"]
        assert str(attributes.get("href", "#")).startswith("#")
    css = page([RunReader(folder).read()]).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in css and "@import" not in css
    assert outline.count("table") == outline.count("caption")
    assert outline.count("figure") == outline.count("figcaption") > 3
    pictures = [attributes for name, attributes in outline.tags if name == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in pictures)
    assert outline.count("h1") == 1


def fill_with(folder: RunFolder, text: str) -> None:
    """Put a text wherever a run folder holds one."""
    record = {"row": 1, "prompt": text, "teacher": text, "student": text}
    tokens: dict[str, Any] = {"teacher_tokens": [text, "", text], "teacher_kl": [0.5, 1.5, 9.0]}
    tokens |= {"student_tokens": [text], "student_kl": [0.2]}
    write_lines(folder, "answers.jsonl", [{"step": s, **record, **tokens} for s in (0, 20)])
    manifest = {"teacher": text, "seeds": {text: text}, "versions": {text: text}, "commit": text}
    folder.write_text("manifest.json", json.dumps(manifest))
    folder.write_text("config.yaml", json.dumps({"seed": text, text: {text: [text]}}))
    write_lines(folder, "timeline.jsonl", [window(1000.0, text), window(1010.0, text)])
    dropped = {"status": text, "dropped": {text: 1}, "bottleneck": text, "phases": {text: 3}}
    folder.write_text("summary.json", json.dumps(dropped))
    record_state(folder, "failed", error=text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_any_file_is_shown_and_never_acts(folder: RunFolder, text: str) -> None:
    harmless = shown(folder)
    fill_with(folder, text)
    written = write_page([folder])
    content = Path(written).read_text(encoding="utf-8")
    outline = Outline(content)
    assert outline.problems == []
    assert {name for name, _ in outline.tags} <= {name for name, _ in harmless.tags} | {"em"}
    attributes = {key for _, attributes in outline.tags for key in attributes}
    assert not [key for key in attributes if key.startswith("on") or key == "src"]
    for character in ("\x1b", "\x00", "\x9b", "\x07", "\u202e", "\u2066", "\u202a"):
        assert character not in content
    assert len(content) < 250_000 and "W" * 4_001 not in content


def test_the_mean_of_an_answer_is_that_of_its_tokens(folder: RunFolder) -> None:
    """Of a character of three tokens the first two have no text of their own."""
    tokens = {"teacher_tokens": ["", "", "世", "", "", "界"], "teacher_kl": [1, 1, 1, 2, 2, 2]}
    tokens |= {"student_tokens": ["a", "b", "c"], "student_kl": [0.5, None, 1.0]}
    record = {"row": 1, "prompt": "p", "teacher": "世界", "student": "abc"}
    write_lines(folder, "answers.jsonl", [{"step": 20, **record, **tokens}])
    text = shown(folder).text
    assert "the teacher's answer, after training: 1.50 nats a token" in text
    assert "the student's own answer, after training: 0.75 nats a token" in text
    assert "furthest: “界” 6.00, “世” 3.00" in text
    nothing = {"teacher_tokens": ["a"], "teacher_kl": ["x"]}
    write_lines(folder, "answers.jsonl", [{"step": 20, **record, **nothing}])
    assert "after training: - nats a token" in shown(folder).text


def test_only_html_made_here_is_html() -> None:
    assert escape("<b>") == "&lt;b&gt;"
    made = element("p", element("b", "a & b"), '"', title="x\"y'", class_="z", open=None)
    assert made == '<p title="x&quot;y&#x27;" class="z"><b>a &amp; b</b>&quot;</p>'
    assert readable("\x1b[1m\ttab\r\nline\x7f\u202e\ud800") == "␛[1m\ttab\nline␡⟨U+202E⟩\ufffd"


def test_a_folder_with_little_in_it_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "bare")).ensure()
    with pytest.raises(RunError, match="not the folder of a run"):
        write_page([folder])
    folder.write_text("config.yaml", "")
    outline = Outline(Path(write_page([folder])).read_text())
    assert outline.problems == []
    assert "no end recorded" in outline.text


def test_broken_lines_and_wrong_types_are_left_out(folder: RunFolder) -> None:
    for name in ("metrics.jsonl", "evaluation.jsonl", "answers.jsonl", "timeline.jsonl"):
        text = folder.read_text(name)
        wrong = (
            '{"step": "x", "loss": []}\n[1]\n{"step": 3, "loss": "high", "phase": 3}\n\xff\n{"st'
        )
        folder.write_text(name, text + wrong)
    strange = '{"wall_s": "long", "dropped": 3, "phases": [], "teacher": 5, "restarts": {}}'
    folder.write_text("summary.json", strange)
    folder.write_text("manifest.json", "[")
    folder.write_text("config.yaml", "a: [")
    folder.write_text("held_out.parquet", "no parquet")
    outline = shown(folder)
    assert outline.problems == []
    assert "unreadable lines left out" in outline.text


DRAFT = {"k": 3, "mean_acceptance_length": 1.966, "tokens_per_s": 5.7, "speed_up": 0.587}


def test_the_page_shows_the_student_as_a_draft_where_it_was_measured(folder: RunFolder) -> None:
    assert "draft model, greedy" not in shown(folder).text
    measured = [{**DRAFT, "identical_answers": 11, "differences": [{"row": 4}]}]
    folder.write_text("draft.json", json.dumps({"cost_ratio": 0.7, "measured": measured}))
    outline = shown(folder)
    assert outline.problems == [] and "a draft token takes 0.70 of a teacher's" in outline.text
    for said in ("3 drafted tokens", "1.97", "5.7", "0.59", "11 of 12"):
        assert said in outline.text


@pytest.mark.parametrize(
    "measured",
    ["5", '"x"', "[]", "[7, null]", '[{"k": "<b>", "differences": 3}]', '[{"k": {}}]', "{}"],
)
def test_a_draft_of_wrong_types_does_no_harm(folder: RunFolder, measured: str) -> None:
    folder.write_text("draft.json", f'{{"cost_ratio": "<i>", "measured": {measured}}}')
    outline = shown(folder)
    assert outline.problems == [] and outline.count("b") == outline.count("i") == 0


# During a run, and however it ends


def test_the_page_says_what_became_of_the_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    now = [0.0]
    live = LivePage(folder, told.append, clock=lambda: now[0])
    live.look()
    live.wait()
    assert not folder.exists("report.html")  # Nothing to see in the first seconds.
    now[0] = 61.0
    live.look()
    live.wait()
    text = folder.read_text("report.html")
    assert "running" in Outline(text).text and 'http-equiv="refresh"' in text
    fail(folder, ValueError("no space is left for <the store>"), told.append)
    text = folder.read_text("report.html")
    assert "failed; the same command resumes it" in text
    assert "no space is left for &lt;the store&gt;" in text and "refresh" not in text
    close_page(folder, stopped=True, tell=told.append)
    assert "stopped; the same command resumes it" in folder.read_text("report.html")
    close_page(folder, stopped=False, tell=told.append)
    assert "finished" in Outline(folder.read_text("report.html")).text
    assert told == []


def fail(
    folder: RunFolder, error: BaseException, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Let a run end with this error."""
    with pytest.raises(type(error)), failure_recorded(folder, tell):
        raise error


def test_the_page_of_a_failed_run_says_how_its_service_failed(folder: RunFolder) -> None:
    """Of all starts so far, by the files that outlive an error; also where some are broken."""
    paid = {"step": 0, "api_requests": 1, "api_cost": 0.25, "api_output_tokens": 9}
    lines = [paid, {"step": 0, "api_timeout": 1}, {"step": 0, "api_timeout": 1, "api_cost": "x"}]
    write_lines(folder, "spending.jsonl", lines)
    write_lines(folder, "spending-other.jsonl", [paid, {"step": 0, "api_status_500": 1}])
    folder.write_text("spending-broken.jsonl", "[1]\n{")
    fail(folder, ValueError("the service failed 8 times"))
    text = Outline(folder.read_text("report.html")).text
    assert "2 answers, 0 tokens read, 18 written, cost 0.5; 3 (status_500 1, timeout 2)" in text
    folder.write_text("summary.json", '{"api": {"timeout": 5, "requests": 1, "connection": "x"}}')
    text = shown(folder).text
    assert "2 answers, 0 tokens read, 18 written, cost 0.5; 6 (status_500 1, timeout 5)" in text


def test_a_run_that_fails_before_anything_else_has_its_reason_on_a_page(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "new"))
    folder.ensure()
    told: list[str] = []
    fail(folder, RunError("no Ray cluster answers at 10.0.0.1:6379"), told.append)
    assert json.loads(folder.read_text("status.json"))["state"] == "failed"
    assert "no Ray cluster answers at 10.0.0.1:6379" in folder.read_text("report.html")
    fail(folder, KeyboardInterrupt(), told.append)
    assert json.loads(folder.read_text("status.json"))["state"] == "stopped"
    assert told == []


def test_a_second_driver_leaves_the_state_of_the_first_alone(folder: RunFolder) -> None:
    LivePage(folder, print)
    fail(folder, RunInUseError("the run is under way on another machine"))
    assert RunReader(folder).read().state == "running" and not folder.exists("report.html")


def test_a_run_whose_driver_was_killed_is_not_running_for_ever(folder: RunFolder) -> None:
    LivePage(folder, print)
    assert RunReader(folder).read().state == "running"
    status = json.loads(folder.read_text("status.json"))
    status["alive_until"] -= 2 * ALIVE_S
    folder.write_text("status.json", json.dumps(status))
    assert "its driver is gone" in shown(folder).text


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    now = [0.0]
    live = LivePage(folder, told.append, clock=lambda: now[0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_text", full)
    for _ in range(3):
        now[0] += 100.0
        live.look()
        live.wait()
    assert len(told) == 1 and "No space left" in told[0]
    fail(folder, RunError("the run's own error"), told.append)
    close_page(folder, stopped=False, tell=told.append)
    assert len(told) == 3


def test_the_main_thread_does_not_wait_for_a_page_and_an_old_one_replaces_no_later_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, go, began = [0.0], threading.Event(), threading.Event()
    live = LivePage(folder, print, clock=lambda: now[0])
    read = RunReader.read

    def slow(reader: RunReader) -> Any:
        data = read(reader)
        if not began.is_set():
            began.set()
            assert go.wait(20)
        return data

    monkeypatch.setattr(RunReader, "read", slow)
    now[0] = 61.0
    live.look()
    live.look()  # Returns though the first is not done, and starts no second one.
    assert began.wait(20) and not folder.exists("report.html")
    threading.Timer(0.3, go.set).start()
    live.wait()
    fail(folder, RunError("the end"))
    assert "failed" in Outline(folder.read_text("report.html")).text


# Long runs


def test_a_curve_of_any_length_keeps_its_spikes_in_a_bounded_number_of_points() -> None:
    for steps in (1, 2, 399, 401, 5_000, 100_003):
        curve = Curve()
        for step in range(1, steps + 1):
            curve.add(step, {steps // 3: 99.0, steps // 2: -99.0}.get(step, step % 7))
        points = curve.points()
        assert len(points) <= MOST_POINTS
        assert points == sorted(points)
        assert points[0] == curve.first and points[-1] == curve.last
        assert curve.first is not None and curve.first[0] == 1
        if steps > 2:
            assert (steps // 3, 99.0) in points and (steps // 2, -99.0) in points
        assert curve.known == steps
        means = curve.means()
        assert len(means) <= 80
        assert all(-99 <= (y or 0) <= 99 for _, y in means)


def test_gaps_of_a_curve_are_counted_and_stay_gaps() -> None:
    curve = Curve()
    for step, value in enumerate([1.0, None, float("nan"), 3.0], start=1):
        curve.add(step, value)
    assert (curve.known, curve.gaps, curve.mean) == (2, 2, 2.0)
    assert curve.points() == [(1, 1.0), (2, None), (3, None), (4, 3.0)]


def test_a_timeline_of_any_length_keeps_its_totals(folder: RunFolder) -> None:
    windows, at = [], 1000.0
    for n in range(20_000):
        at += 10.0 + (7200.0 if n == 9_000 else 0.0)
        windows.append(window(at, "training" if n % 5 else "measuring", teacher_busy_s=n % 11))
    write_lines(folder, "timeline.jsonl", windows)
    bins = binned(RunReader(folder).read())
    assert len(bins.pieces) <= MOST_BINS and len(bins.phases) <= MOST_BINS
    assert sum(p["teacher_busy_s"] for p in bins.pieces) == sum(n % 11 for n in range(20_000))
    assert bins.seconds == 200_000.0
    assert bins.edges[0] == 0 and bins.edges[-1] == pytest.approx(1)
    assert bins.gaps == [(pytest.approx(0.45), pytest.approx(7200.0))]
    assert {name for name, _, _ in bins.phases} == {"training"}
    content = page([RunReader(folder).read()])
    assert len(content) < 150_000 and "away for 2:00:00" in content


def test_the_timeline_has_the_sampler_where_the_student_wrote_rows(folder: RunFolder) -> None:
    assert "sampler" not in page([RunReader(folder).read()])
    written = [
        window(1000.0 + 10 * n, samplers=2, sampler_rows=4, sampler_busy_s=5.0) for n in range(20)
    ]
    write_lines(folder, "timeline.jsonl", written)
    content = page([RunReader(folder).read()])
    assert "the sampler idles 75 %" in content, "of two samplers"
    assert "sampler: replicas held" in content and "6:40 (replicas × time)" in content
    assert content.count('aria-label="sampler') <= 1 and "busy 25 %" in content


def test_what_a_window_has_no_room_for_was_spent_before_it() -> None:
    pieces = [{"busy": 0.0, "there": 10.0}, {"busy": 0.0, "there": 10.0}]
    pieces += [{"busy": 25.0, "there": 10.0}, {"busy": 3.0, "there": 10.0}]
    assert shares(pieces, "busy", "there") == [0.5, 1.0, 1.0, 0.3]


def test_several_runs_share_one_page_and_are_told_apart(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(str(tmp_path / "elsewhere" / "demo")).ensure()
    for name in ("metrics.jsonl", "evaluation.jsonl", "answers.jsonl", "summary.json"):
        other.write_text(name, folder.read_text(name).replace("Green.", "Red."))
    settings = folder.read_text("config.yaml").replace("0.0003", "0.001")
    other.write_text("config.yaml", settings)
    outline = shown(folder, other)
    assert outline.problems == []
    assert "runs/demo and elsewhere/demo compared" in outline.text
    apart = outline.text.partition("Settings in which the runs differ")[2].partition("Settings")[0]
    assert "training.learning_rate0.00030.001" in apart and "seed" not in apart
    answers = outline.text.partition("Answers to held-out prompts teacher")[2] or outline.text
    assert answers.count("Green.") == answers.count("Red.") == 1
    assert Path(write_page([folder, other])) == Path(folder.path) / "comparison.html"


def test_a_run_that_has_not_trained_yet_is_told_among_several(
    folder: RunFolder, tmp_path: Path
) -> None:
    other = RunFolder(str(tmp_path / "elsewhere" / "begun")).ensure()
    other.write_text("config.yaml", folder.read_text("config.yaml"))
    write_lines(other, "evaluation.jsonl", [{"step": 0, "kl_nats_per_token": 9.25}])
    text = shown(folder, other).text
    assert "measuredat step 20before training" in text
    assert "KL(teacher || student), nats/token0.7509.250" in text


ODD_HEIGHTS = {
    "one bit apart": (0.1, math.nextafter(0.1, 1)),
    "one bit apart, below 0": (-3.0, math.nextafter(-3.0, 0)),
    "near the largest": (-1e308, 1e308),
    "the largest": (0.0, sys.float_info.max),
    "the smallest": (5e-324, 1e-323),
    "a million million": (1e12, 3e12),
    "all 0": (0.0, 0.0),
    "-0 and 0": (-0.0, 0.0),
}


@pytest.mark.parametrize("heights", ODD_HEIGHTS.values(), ids=ODD_HEIGHTS)
def test_values_of_any_size_have_a_chart(folder: RunFolder, heights: tuple[float, float]) -> None:
    low, high = heights
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    if max(-low, high) < 1e300:  # Up to the last digits, by which rounding moves a tick.
        slack = 1e-9 * max(-low, high) + 1e-300
        assert ticks[0] <= low + slack and high - slack <= ticks[-1]
    chart = line_chart("x", [Series("x", [(0, low), (1, high)])])
    assert "nan" not in chart and "inf" not in chart and len(Outline(chart).text) < 200
    lines = [{"step": s, "loss": v, "lr": v, "rows": 8} for s, v in enumerate(heights, start=1)]
    write_lines(folder, "metrics.jsonl", lines)
    figures = [{"step": s, "kl_nats_per_token": v} for s, v in enumerate(heights)]
    write_lines(folder, "evaluation.jsonl", figures)
    assert shown(folder).problems == []


def test_a_learning_rate_that_rounding_alone_changes_is_a_level() -> None:
    assert nice_ticks(3e-4, 3e-4 * (1 + 1e-12)) == nice_ticks(3e-4, 3e-4)
    assert nice_ticks(0.5, 0.5 * (1 + 1e-6))[0] > 0.49, "a difference that can be seen is drawn"


# In a real browser

CONTRAST = """
(() => {
  const line = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const channel = v => line(v / 255);
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest('svg')) continue;
    const a = luminance(parse(getComputedStyle(e).color)), b = luminance(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(`${ratio.toFixed(2)} ${e.className} ${e.textContent.slice(0, 30)}`);
  }
  return weak;
})()
"""
"""Elements whose own text has a contrast below 4.5 (WCAG 2, level AA)."""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROWSERS = pytest.mark.skipif(find_browser() is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@BROWSERS
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_at_any_width_light_and_dark(
    folder: RunFolder, browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    tokens = {"teacher_tokens": list("abcde"), "teacher_kl": [0.0, 0.3, 0.6, 1.5, 3.0]}
    record = {"row": 1, "prompt": "Name a colour.", "teacher": "abcde", "student": "abc"}
    write_lines(folder, "answers.jsonl", [{"step": s, **record, **tokens} for s in (0, 20)])
    browser.open(Path(write_page([folder])), width, scheme)
    assert browser.evaluate("document.title") == "demo · Raystill"
    assert browser.evaluate(WIDER) == 0
    assert browser.evaluate(CONTRAST) == []
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(251, 251, 249)", "dark": "rgb(20, 23, 26)"}[scheme]
    sizes = "[...document.querySelectorAll('svg.plot, svg.strip')].map(e => e.clientWidth)"
    assert min(w for w in browser.evaluate(sizes) if w) > 200
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    said = [e["method"] for e in browser.events if e["method"].startswith(("Log.", "Runtime.exc"))]
    assert said == []


@BROWSERS
def test_hostile_text_does_nothing_in_a_browser(folder: RunFolder, browser: Browser) -> None:
    watch = "window.alert = window.open = () => { window.hacked = true }"
    added = browser.ask("Page.addScriptToEvaluateOnNewDocument", source=watch)
    try:
        for text in ("\n".join(HOSTILE), "W" * 10_000, "<script>alert(1)</script>" * 50):
            fill_with(folder, text)
            for width in (1280, 400):
                browser.open(Path(write_page([folder])), width)
                assert browser.evaluate("window.hacked") is None
                assert browser.evaluate(WIDER) == 0
                assert browser.evaluate("document.scripts.length + document.images.length") == 0
            asked = [
                event["params"]["request"]["url"]
                for event in browser.events
                if event["method"] == "Network.requestWillBeSent"
            ]
            assert all(url.startswith("file://") for url in asked) and len(asked) == 1
    finally:
        browser.ask("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


@BROWSERS
def test_what_is_folded_is_printed(folder: RunFolder, browser: Browser) -> None:
    folder.write_text("config.yaml", "seed: 7\nteacher:\n  dtype: auto\n")
    browser.open(Path(write_page([folder])), 1280, "dark")
    tables = "[...document.querySelectorAll('details:not([open]) table')]"
    folded = f"{tables}.map(e => e.checkVisibility())"
    assert browser.evaluate(folded) and not any(browser.evaluate(folded))
    browser.media("print", "dark")
    assert all(browser.evaluate(folded))
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert browser.pdf().startswith(b"%PDF")
