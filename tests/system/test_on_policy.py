"""A run of which the student writes half, on real vLLM, whose sampler dies on the way.

Two workers share the student (FSDP); the sampler follows it with each step. The run is read from
its folder and from the sampler's own log. The sampler by itself is in tests/serve/test_sampler.py,
the bound of staleness in tests/datasets/test_staleness.py.
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, drive
from tests.support.synthetic_run import started, wait_for_step

pytestmark = [pytest.mark.vllm, pytest.mark.faults]

NUM_ROWS, NUM_HELD_OUT, ROWS_PER_STEP = 64, 8, 8
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
STALENESS = 1
WEIGHTS = re.compile(r"weights of step (\d+): (\S+) nats from the student's")
ENGINE = re.compile(r"EngineCore pid=(\d+)")


def write_run_file(place: Path, **training: object) -> Path:
    """configs/on_policy.yaml with twice the rows, none of which may be older than one step."""
    config = yaml.safe_load((ROOT / "configs" / "on_policy.yaml").read_text())
    config["teacher"]["model"] = str(TEACHER)
    config["prompts"]["path"] = str(ROOT / config["prompts"]["path"])
    config["prompts"]["limit"] = NUM_ROWS + NUM_HELD_OUT
    config["stream"]["group_rows"] = 2
    config["policy"]["max_staleness_steps"] = STALENESS
    config["training"] |= {"rows_per_step": ROWS_PER_STEP, "compute_dtype": "float32", **training}
    config["output"] = {"path": str(place / "run")}
    place.mkdir(exist_ok=True)
    run_file = place / "on_policy.yaml"
    run_file.write_text(yaml.safe_dump(config))
    return run_file


@dataclass(frozen=True)
class Mixed(RunFiles):
    """The finished run, its sampler's log, and how often its engine was killed."""

    stdout: str
    kills: int

    def updates(self) -> list[tuple[int, float]]:
        """Version and difference (nats) of each proof, in order."""
        text = (self.folder / "logs" / "sampler-0.log").read_text()
        return [(int(version), float(gap)) for version, gap in WEIGHTS.findall(text)]


def kill_engine(log: Path) -> None:
    """End the newest engine of a sampler, without a word."""
    os.kill(int(ENGINE.findall(log.read_text())[-1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Half the rows are the student's; its engine is killed after two steps."""
    place = tmp_path_factory.mktemp("on_policy")
    run_file = write_run_file(place, num_workers=2, cpus_per_worker=0.5, strategy="fsdp")
    files = RunFiles(place / "run")
    with started(run_file) as process:
        wait_for_step(process, files, 2, deadline_s=400)
        kill_engine(files.folder / "logs" / "sampler-0.log")
        stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stdout + stderr
    return Mixed(place / "run", stdout, kills=1)


def test_each_row_was_trained_once(mixed: Mixed) -> None:
    assert mixed.steps() == list(range(1, NUM_STEPS + 1))
    assert [line["rows"] for line in mixed.lines("metrics.jsonl")] == [ROWS_PER_STEP] * NUM_STEPS


def test_the_student_wrote_its_share(mixed: Mixed) -> None:
    written = sum(line.get("student_written_rows", 0) for line in mixed.lines("metrics.jsonl"))
    assert NUM_ROWS // 4 <= written <= NUM_ROWS * 3 // 4


def test_no_row_was_staler_than_the_bound(mixed: Mixed) -> None:
    ages: dict[int, int] = {}
    for line in mixed.lines("metrics.jsonl"):
        told = {int(k.partition("/")[2]): v for k, v in line.items() if k.startswith("staleness/")}
        assert sum(told.values()) == line.get("student_written_rows", 0)
        for age, rows in told.items():
            ages[age] = ages.get(age, 0) + rows
    assert max(age for age, rows in ages.items() if rows) <= STALENESS
    # Rows of step 3 and later cannot be the first weights' own.
    assert {version for version, _ in mixed.updates()} >= set(range(1, NUM_STEPS - 1))


def test_the_sampler_had_the_students_weights_at_each_version(mixed: Mixed) -> None:
    assert all(gap <= 1e-3 for _, gap in mixed.updates())
    versions = [version for version, _ in mixed.updates()]
    assert versions == sorted(versions)


def test_the_killed_engine_began_again_with_the_newest_weights(mixed: Mixed) -> None:
    text = (mixed.folder / "logs" / "sampler-0.log").read_text()
    pids = list(dict.fromkeys(ENGINE.findall(text)))
    assert len(pids) == 1 + mixed.kills
    proofs = WEIGHTS.findall(text[text.index(f"EngineCore pid={pids[-1]}") :])
    assert int(proofs[0][0]) >= 2


def test_nothing_was_paid_twice_but_what_was_in_flight(mixed: Mixed) -> None:
    catalogue = TeacherStore(str(mixed.folder.parent / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)


def test_a_sampler_that_does_not_follow_stops_the_run_before_a_step(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "strict")
    result = drive("run", run_file, "--set", "policy.max_logprob_gap=1e-12")
    assert result.returncode == 1
    assert "the sampler does not follow the student: with the weights of step 0" in result.stderr
    assert "policy.max_logprob_gap" in result.stderr and "Traceback" not in result.stderr
    assert RunFiles(tmp_path / "strict" / "run").steps() == []
