"""A run of which the student writes half, on real vLLM, whose sampler dies on the way.

Two workers share the student (FSDP); the sampler follows it with each step. The run is read from
its folder and from the sampler's own log. The sampler by itself is in tests/serve/test_sampler.py,
the bound of staleness in tests/datasets/test_staleness.py.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.end_to_end import RunFiles, drive
from tests.support.on_policy import (
    DEADLINE_S,
    ENGINE,
    NUM_STEPS,
    STALENESS,
    WEIGHTS,
    kill_engine,
    oldest_age,
    proofs,
    require_trained_once_and_paid_once,
    sampler_log,
    write_run_file,
)
from tests.support.synthetic_run import started, wait_for_step

pytestmark = [pytest.mark.vllm, pytest.mark.faults]


@dataclass(frozen=True)
class Mixed(RunFiles):
    """The finished run, and how often its sampler's engine was killed."""

    stdout: str
    kills: int


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Half the rows are the student's; its engine is killed after two steps."""
    place = tmp_path_factory.mktemp("on_policy")
    two_workers = {"num_workers": 2, "cpus_per_worker": 0.5, "strategy": "fsdp"}
    run_file = write_run_file(place, training=two_workers)
    files = RunFiles(place / "run")
    with started(run_file) as process:
        wait_for_step(process, files, 2, deadline_s=DEADLINE_S)
        kill_engine(sampler_log(files))
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stdout + stderr
    return Mixed(place / "run", stdout, kills=1)


def test_each_row_was_trained_once_and_nothing_was_paid_twice(mixed: Mixed) -> None:
    require_trained_once_and_paid_once(mixed)


def test_no_row_was_staler_than_the_bound(mixed: Mixed) -> None:
    for line in mixed.lines("metrics.jsonl"):
        told = [rows for name, rows in line.items() if name.startswith("staleness/")]
        assert sum(told) == line.get("student_written_rows", 0)
    assert oldest_age(mixed) <= STALENESS
    # Rows of step 3 and later cannot be the first weights' own.
    assert {version for version, _ in proofs(mixed)} >= set(range(1, NUM_STEPS - 1))


def test_the_sampler_had_the_students_weights_at_each_version(mixed: Mixed) -> None:
    assert all(gap <= 1e-3 for _, gap in proofs(mixed))
    versions = [version for version, _ in proofs(mixed)]
    assert versions == sorted(versions)


def test_the_killed_engine_began_again_with_the_newest_weights(mixed: Mixed) -> None:
    text = sampler_log(mixed).read_text()
    pids = list(dict.fromkeys(ENGINE.findall(text)))
    assert len(pids) == 1 + mixed.kills
    proofs = WEIGHTS.findall(text[text.index(f"EngineCore pid={pids[-1]}") :])
    assert int(proofs[0][0]) >= 2


def test_a_sampler_that_does_not_follow_stops_the_run_before_a_step(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "strict")
    result = drive("run", run_file, "--set", "policy.max_logprob_gap=1e-12")
    assert result.returncode == 1
    assert "the sampler does not follow the student: with the weights of step 0" in result.stderr
    assert "policy.max_logprob_gap" in result.stderr and "Traceback" not in result.stderr
    assert RunFiles(tmp_path / "strict" / "run").steps() == []
