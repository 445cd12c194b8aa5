"""``raystill speed``: what it refuses, its figures, what is shown of them, and a real engine."""

import asyncio
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import driver
from raystill.base.errors import RunError
from raystill.base.run_folder import SPEED, RunFolder
from raystill.cluster.report.page.page import write_page
from raystill.cluster.report.worth import print_speed, sections, speed_caption, speed_rows, verdict
from raystill.cluster.worth import bench, speed
from raystill.cluster.worth.speed import compared, summary, turns
from raystill.datasets.rows.answers import Answer
from tests.cluster.test_draft import API, NUM_PROMPTS, run_folder, without_ray
from tests.cluster.test_driver import drive, listed

__all__ = ["run_folder", "without_ray"]  # Fixtures.

FACTS = {"engine": "vllm", "version": "0.32.0", "dtype": "float32", "cores": 1}


def start(*rates: float, peak: int = 4 << 30) -> dict[str, Any]:
    """What an engine says after passes at these rates."""
    passes = [
        {"tokens_per_s": rate, "stream_tokens_per_s": rate / 4, "first_token_s": 1 / rate}
        for rate in rates
    ]
    return {"passes": passes, "peak_bytes": peak, "kv_cache_bytes": 2 << 30}


def figures() -> dict[str, Any]:
    """A student 1.5 times as fast as its teacher, with three quarters of its parameters."""
    teacher = summary({"parameters": 400, "bytes": 800}, "float32", [start(10, 8), start(12)])
    student = summary(
        {"parameters": 300, "bytes": 600}, "float32", [start(15, 14, 20, peak=3 << 30)]
    )
    found = {**FACTS, "gpus": 0, "concurrency": 8, "tokens": 64, "student": "s", "teacher": "t"}
    return {**found, **compared({"teacher": teacher, "student": student})}


def test_medians_are_over_all_passes_and_the_range_is_the_worst_case():
    found = figures()
    rate = found["models"]["teacher"]["tokens_per_s"]
    assert rate == {"median": 10, "low": 8, "high": 12}
    assert found["times_faster"] == {"median": 1.5, "low": 14 / 12, "high": 20 / 8}
    assert found["times_sooner"]["median"] == pytest.approx(1.5)
    assert found["share_of_parameters"] == 0.75
    assert found["share_of_peak_bytes"] == 0.75
    # Two bytes a parameter on disk, four in an engine of float32.
    assert found["models"]["teacher"]["weights_bytes"] == 1600


def test_weights_of_unknown_number_are_those_of_the_files():
    found = summary({"parameters": None, "bytes": 800}, "bfloat16", [start(1)])
    assert found["weights_bytes"] == 800
    none = compared({"teacher": summary({}, "bfloat16", [start(1)]), "student": found})
    assert none["share_of_parameters"] is None and none["share_of_weights_bytes"] is None


def test_the_models_are_started_in_turns():
    assert turns(1) == ["teacher", "student"]
    assert turns(3) == ["teacher", "student", "student", "teacher", "teacher", "student"]


def test_one_sentence_says_how_fast_how_small_and_how_good():
    assert verdict(figures(), {}) == (
        "The student: 1.50 x as fast as its teacher (8 answers at once, 1.50 x one at a time); "
        "75 % of its parameters."
    )
    score = {"share_of_teacher": 0.9}
    one = {"tasks": {"capitals": {"acc": score, "acc_norm": {"share_of_teacher": 0.1}}}}
    assert verdict(figures(), one).endswith("; 90 % of its score at capitals.")
    two = {"tasks": {**one["tasks"], "other": {"acc": {"share_of_teacher": 0.7}}}}
    assert verdict(figures(), two).endswith("; 80 % of its score at 2 tasks, on average.")
    assert verdict({}, one) == ""


def test_the_tables_say_the_figures(capsys):
    print_speed(figures())
    shown = capsys.readouterr().out
    assert "vllm 0.32.0, float32, 1 core" in shown and "median of 3 passes" in shown
    fewer = figures()
    fewer["models"]["teacher"]["passes"].pop()
    assert "median of 2 and 3 passes" in speed_caption(fewer)
    (full,) = (line for line in shown.splitlines() if line.startswith("tokens/s, 8 at once"))
    assert "10.0 [8.0, 12.0]" in full and full.endswith("1.50 x faster")
    (peak,) = (line for line in shown.splitlines() if line.startswith("engine's peak memory"))
    assert peak.split()[-2:] == ["75", "%"]
    assert "1.50 x sooner" in shown
    print_speed({**figures(), "times_faster": {"median": 0.8}})
    assert "1.25 x slower" in capsys.readouterr().out
    print_speed({**figures(), "version": "\x1b[8m1", "dtype": "\x9b2J"})
    assert "vllm \\x1b[8m1, \\x9b2J" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"models": 3},
        {"models": {"teacher": {"passes": 3}, "student": {"tokens_per_s": [1]}}},
        {"models": {"teacher": {"parameters": "x"}, "student": {"peak_bytes": -1}}},
        {"times_faster": {"median": float("nan")}, "concurrency": 10**400},
        {"models": {"teacher": {"a": 1}, "student": {"a": 1}}, "tokens": "x", "cores": {}},
    ],
)
def test_an_edited_file_breaks_no_report(broken, tmp_path):
    for row in speed_rows(broken):
        assert set(row[1:]) <= {"-", ""}
    assert verdict(broken, broken) == ""
    folder = RunFolder(str(tmp_path))
    folder.write_text(SPEED, json.dumps(broken if isinstance(broken, dict) else {}))
    assert all(heading for heading, _ in sections(folder))


def engine(num_tokens: int) -> Any:
    """A bench whose engine answers at once."""
    from raystill.serve.bench.speed import SpeedBench

    made = SpeedBench.__new__(SpeedBench)
    clock = itertools.count()

    async def sample(prompts, _signal):
        return [Answer(np.zeros(num_tokens, np.int32), "length") for _ in prompts]

    async def token_times(_prompt, wanted):
        return [float(next(clock)) for _ in range(wanted)]

    async def rpc(_name):
        return [{"peak_bytes": 3, "kv_cache_bytes": 1}, {"peak_bytes": 4, "kv_cache_bytes": 1}]

    inner = SimpleNamespace(collective_rpc=rpc)
    made._engine = SimpleNamespace(sample=sample, token_times=token_times, _engine=inner)
    made._num_tokens = 4
    return made


def test_a_pass_counts_every_answer_and_the_memory_of_all_ranks():
    prompts = [np.array([1], np.int32)] * 3
    found = asyncio.run(engine(4).measure(prompts[:2], prompts, passes=2))
    assert len(found["passes"]) == 2, "the first one warms up"
    assert found["passes"][0]["stream_tokens_per_s"] == 1.0
    assert (found["peak_bytes"], found["kv_cache_bytes"]) == (7, 2)


def test_an_answer_of_another_length_ends_the_measurement():
    prompts = [np.array([1], np.int32)]
    with pytest.raises(RunError, match=r"answers have \[3\] tokens, each was to have 4"):
        asyncio.run(engine(3).measure(prompts, prompts, passes=1))


def test_nested_caches_are_counted_once(tmp_path):
    from raystill.serve.bench.footprint import resident_peak_bytes, tensors_in

    one, two = torch.zeros(4), torch.zeros(2)
    assert len(tensors_in([one, (two, [one[1:]]), {"a": two}])) == 4
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  12 kB\n")
    assert resident_peak_bytes(tmp_path / "status") == 12 * 1024
    assert resident_peak_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (API, "teacher.engine: is 'api': the teacher has no engine here"),
        (["teacher.engine=synthetic"], "teacher.engine: is 'synthetic'"),
        (["teacher.pipeline_parallel_size=2"], "engines are measured within one node"),
    ],
)
def test_a_teacher_without_an_engine_is_refused(overrides, said, run_folder, capsys):
    words = [word for text in overrides for word in ("--set", text)]
    assert driver.main(["speed", str(run_folder), *words]) == driver.EXIT_REFUSED
    shown = capsys.readouterr()
    assert any(said in problem for problem in listed(shown.err, shown.out))
    assert not (run_folder / SPEED).exists()


def test_an_engine_without_a_prefix_cache_is_of_the_same_teacher_among_several(run_folder):
    subject = bench.find_subject(RunFolder(str(run_folder)), [], speed.unfit)
    subject = replace(subject, name="writer")
    without = bench.without_prefix_cache(subject)
    assert without.name == "writer"
    assert without.config.teacher.engine_args == {"enable_prefix_caching": False}


def test_answers_without_room_are_refused(run_folder, capsys):
    assert driver.main(["speed", str(run_folder), "--tokens", "125"]) == driver.EXIT_FAILED
    assert "leaves room for an answer of 125 tokens in a context of 128" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_the_prompts_of_streams_and_of_a_full_batch_are_of_all_sources(run_folder, monkeypatch):
    """The table of held-out prompts is in the order of the files, so the first ones are of one."""
    given: list[Any] = []

    def run(self: Any, actor: type, arguments: tuple[Any, ...], *calls: Any) -> list[Any]:
        given.append(calls[0][1])
        return [FACTS, start(10)]

    monkeypatch.setattr(bench.Bench, "run", run)
    for concurrency, streams, expected in (
        (2, 6, ([5, 6, 7, 8, 9, 10], [5, 10])),
        (6, 3, ([5, 7, 10], [5, 6, 7, 8, 9, 10])),
        (8, 1, ([5], [5, 6, 7, 8, 9, 10, 5, 6])),
    ):
        words = [f"--concurrency={concurrency}", f"--streams={streams}", "--starts=1"]
        assert driver.main(["speed", str(run_folder), *words]) == 0
        one_by_one, at_once, _ = given[-1]
        assert ([int(i[0]) for i in one_by_one], [int(i[0]) for i in at_once]) == expected


@pytest.mark.usefixtures("without_ray")
def test_what_was_measured_before_a_stop_is_kept(run_folder, capsys, monkeypatch):
    asked = []

    def run(self: Any, actor: type, arguments: tuple[Any, ...], *calls: Any) -> list[Any]:
        asked.append((arguments[0], calls, self.settings.config.teacher))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [FACTS, start(10 * len(asked))]

    monkeypatch.setattr(bench.Bench, "run", run)
    words = ["speed", str(run_folder), "--concurrency", "8", "--streams", "2"]
    assert driver.main(words) == speed.EXIT_INTERRUPTED
    found = json.loads((run_folder / SPEED).read_text())
    assert found["times_faster"]["median"] == 2.0 and found["concurrency"] == 8
    assert [model for model, _, _ in asked] == ["teacher", "student", "student"]
    ((_, (streams, full, passes)),) = asked[0][1]
    assert (len(streams), len(full), passes) == (2, 8, 3)
    assert [int(ids[0]) for ids in streams] == [5, 5 + NUM_PROMPTS - 1], "of the first source alone"
    assert len({tuple(ids) for ids in full}) == NUM_PROMPTS, "prompts repeat where there are few"
    assert asked[0][2].engine_args["enable_prefix_caching"] is False
    assert "stopped; what was measured is in speed.json" in capsys.readouterr().out
    write_page([RunFolder(str(run_folder))])
    page = (run_folder / "report.html").read_text()
    assert "2.00 x as fast as its teacher" in page and "2.00 x faster" in page


@pytest.mark.faults
@pytest.mark.vllm
def test_both_models_are_measured_in_real_engines(run_folder):
    words = ["--tokens", "8", "--concurrency", "4", "--streams", "2", "--starts", "1"]
    done = drive("speed", str(run_folder), *words, "--passes", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((run_folder / SPEED).read_text()) == found
    teacher, student = found["models"]["teacher"], found["models"]["student"]
    assert teacher["parameters"] == student["parameters"] > 0
    assert teacher["weights_bytes"] == 4 * teacher["parameters"]
    for of in (teacher, student):
        assert len(of["passes"]) == 2
        assert 0 < of["first_token_s"]["median"] < 60
        assert of["tokens_per_s"]["median"] > of["stream_tokens_per_s"]["median"] > 0
        # teacher.kv_cache_gib is 0.25; the rest of the peak is Python, torch and vLLM.
        assert of["kv_cache_bytes"] == pytest.approx(1 << 28, rel=0.05)
        assert of["peak_bytes"] > of["kv_cache_bytes"] + of["weights_bytes"]
