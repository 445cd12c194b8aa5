"""What the benchmarks of overlap, scale and start-up work out from what they saw; no Ray."""

import json

import pytest

from benchmarks.on_policy import FIGURES, policy_of, read_results, share_of, table
from benchmarks.on_policy_plot import columns
from benchmarks.processes import Sample, Sampler
from benchmarks.scale import case, figures
from benchmarks.startup import LOG_LINE, compare
from benchmarks.steady import steady_arrivals
from raystill.config.objective import PolicyConfig


def sampler(*looks):
    """One with these looks: (second, CPU seconds of the driver, of the coordinator)."""
    role = {1: "driver", 2: "coordinator"}
    samples = [Sample(at, {1: a, 2: b}, role, 100.0 + at) for at, a, b in looks]
    return Sampler(driver=1, samples=samples)


def test_cores_and_rates_are_those_of_the_steady_time_alone():
    """Two replicas, 8 groups of 8 rows each in 4 s: 32 rows/s were ideal; 30 came."""
    looks = sampler((0, 9.0, 9.0), (10, 10.0, 10.0), (20, 10.5, 14.0), (30, 99.0, 99.0))
    told = {"start": 9.5, "end": 21.5, "rows": 360, "teachers_up_s": 3.0}
    found = figures(case("two", 2), told, looks)
    assert found["ideal_rows_per_s"] == 32.0
    assert found["of_ideal"] == pytest.approx(30 / 32)
    assert found["groups_per_s"] == pytest.approx(30 / 8)
    assert found["parts"]["coordinator"] == {"cores": pytest.approx(0.4), "processes": 1}
    assert found["parts"]["driver"]["cores"] == pytest.approx(0.05)
    assert found["driver_mb"] == {"first": 110.0, "last": 120.0}


@pytest.mark.parametrize("fetches_ahead", [0, 1])
@pytest.mark.parametrize("partial", [0, 3])
def test_a_teachers_speed_is_that_of_its_flights_whatever_the_reader_fetches_ahead(
    fetches_ahead, partial
):
    """Four groups of 8 rows every 10 s; a group is handed on when the one after it is there."""
    groups = 5 * 4 + partial
    answered = [10.0 * (1 + group // 4) for group in range(groups)]
    handed_on = [answered[min(group + fetches_ahead, groups - 1)] for group in range(groups)]
    side = steady_arrivals([(second, 8, 80) for second in handed_on], flight=4)
    assert side.rows_per_s == pytest.approx(3.2)
    assert side.tokens_per_s == pytest.approx(32.0)


def test_one_after_the_other_is_the_sum_of_what_was_alone(capsys):
    run = {
        "checked on the cluster": 10.0,
        "teacher up": 50.0,
        "student loaded": 40.0,
        "held-out answered": 70.0,
        "first step": 95.0,
    }
    found = compare(run, 30.0, {"checked on the cluster": 10.0, "student loaded": 22.0})
    assert found["serial_s"]["first step"] == 10.0 + 30.0 + 20.0 + 12.0 + 25.0
    assert "against 95.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2026-01-02 03:04:05,678\tINFO worker.py:2038 -- Started Ray.", "Started Ray."),
        ("2026-01-02 03:04:05,678 INFO raystill.train.worker.worker: training", "training"),
    ],
)
def test_a_log_line_is_its_time_and_its_message(line, message):
    match = LOG_LINE.match(line)
    assert match is not None and match.group(2) == message


def on_policy_result(arm, seed, kl):
    figures = {name: kl for name in FIGURES}
    sizes = {"teacher_tokens": 1000 * kl, "training_s": 10.0}
    return {"arm": arm, "seed": seed, "steps": 3, "before": figures, "after": figures, **sizes}


def test_the_table_of_student_written_rows_has_means_and_names_the_seeds(tmp_path):
    results = [on_policy_result("pure", 0, 4.0), on_policy_result("off", 1, 3.0)]
    results.append(on_policy_result("off", 0, 1.0))
    for number, result in enumerate([*results, {**results[0], "steps": 5}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    lines = table(read_results(tmp_path, 3)).splitlines()
    assert lines[0] == "| | before | off | pure |"
    assert lines[2].endswith("| 2.000 (1 to 3) | 2.000 (1 to 3) | 4.000 |")
    assert lines[-1] == "seeds that ran: off: [0, 1], pure: [0]"
    assert table([]) == "nothing has finished yet"
    assert columns(results, "reverse_kl") == {"before": [1, 3], "off": [1, 3], "pure": [4]}


def test_shares_of_the_arms_are_settings_of_a_run_file():
    for arm, first, last in (("off", 0, 0), ("mixed", 0, 0.5), ("ramp", 0, 1), ("pure", 1, 1)):
        policy = PolicyConfig.model_validate({"student_share": share_of(arm, 28)})
        assert (policy.share_at(0), policy.share_at(27)) == (first, last)
    reverse = PolicyConfig.model_validate(policy_of("reverse", 28))
    assert reverse.share_at(0) == 1 and reverse.objective.divergences == ["reverse_kl"]
