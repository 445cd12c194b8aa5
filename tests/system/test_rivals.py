"""The comparison with rivals: its evaluator, its records, its tables; no rival is run."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.rivals.__main__ import locked, run_part, wanted
from benchmarks.rivals.judge import BATCH, judge
from benchmarks.rivals.parts import Part, loop_of, mechanics
from benchmarks.rivals.settings import Folder, Settings, write_json, write_lines
from benchmarks.rivals.table import kl_of, own_curves, records, tables, time_of, until

SMALL = Settings(rows=16, held_out=8)


class Bigram(torch.nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


def test_the_evaluator_is_the_slow_sum_over_answer_tokens_alone():
    """Rows of unequal lengths, in more than one batch; token P - 1 predicts the answer's first."""
    torch.manual_seed(0)
    teacher, student = (Bigram(torch.randn(7, 7)) for _ in range(2))
    rows = [
        {"prompt_ids": [1 + i % 5] * (1 + i % 3), "answer_ids": [2, 3, i % 7, 0][: 1 + i % 4]}
        for i in range(BATCH + 3)
    ]
    sums, same, tokens = 0.0, 0, 0
    for row in rows:
        before = [row["prompt_ids"][-1], *row["answer_ids"][:-1]]
        for token in before:
            p, q = (model.table[token].double().softmax(0) for model in (teacher, student))
            sums += float((p * (p.log() - q.log())).sum())
            same += int(p.argmax() == q.argmax())
            tokens += 1
    found = judge(teacher, student, rows)
    assert found["tokens"] == tokens == sum(len(row["answer_ids"]) for row in rows)
    assert found["kl_nats_per_token"] == pytest.approx(sums / tokens, rel=1e-5)
    assert found["top1_agreement"] == same / tokens
    assert judge(teacher, teacher, rows)["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)


def record(folder: Folder, name: str, side: str, which: str, seconds: float, **figures) -> None:
    """A finished part."""
    part = {"part": name, "side": side, "which": which, "counts": "judge" not in name}
    part |= {"date": "2026-01-02T00:00:00", "wall_s": seconds, "own_cores": 1.5}
    write_json(folder.part(name), {**part, "other_cores": 0.1, "load": 2.0, "figures": figures})


def test_a_sides_time_is_the_sum_of_its_parts_and_unknown_while_one_is_missing(tmp_path):
    folder = Folder(tmp_path)
    record(folder, "1-vllm-sample", "vllm", "1", 100)
    assert time_of(records(folder), "vllm", 1) is None
    record(folder, "1-vllm-train", "vllm", "1", 300)
    record(folder, "1-vllm-judge", "vllm", "1", 7, kl_nats_per_token=1.25)
    record(folder, "1-raystill-run", "raystill", "1", 200)
    done = records(folder)
    assert time_of(done, "vllm", 1) == 400
    assert kl_of(done, "vllm", 1) == 1.25
    assert time_of(done, "vllm", 2) is None  # Its answers are there, its student is not.
    record(folder, "2-vllm-train", "vllm", "2", 250)
    done = records(folder)
    assert time_of(done, "vllm", 2) == 250
    assert time_of(done, "hf", 2) == 250  # From a file of answers it is the same program.
    text = tables(folder, SMALL, {"cpu": "a processor"})
    line = next(line for line in text.splitlines() if line.startswith("| (b)"))
    assert line.startswith("| (b) vLLM to a file, then TRL GKD | 400 s, KL 1.25 | 2.00 | 250 s")
    assert line.endswith("| - | - |")  # No sum over students while one is missing.


def test_the_time_to_an_aim_counts_sampling_and_loading(tmp_path):
    folder = Folder(tmp_path)
    record(folder, "own-trl-sample", "trl", "own", 100)
    record(folder, "own-trl-train-1", "trl", "own", 360)
    points = [(10, 200.0, 1.4), (20, 340.0, 1.0)]
    curve = [{"step": s, "training_s": t, "kl_nats_per_token": kl} for s, t, kl in points]
    record(folder, "own-trl-judge-1", "trl", "own", 9, curve=curve)
    record(folder, "own-trl-train-2", "trl", "own", 300)
    later = [*curve, {"step": 30, "training_s": 500.0, "kl_nats_per_token": 0.85}]
    record(folder, "own-trl-judge-2", "trl", "own", 9, curve=later)
    found = own_curves(records(folder))["trl"]
    # 100 s of sampling and 20 s in which TRL was loaded, before the seconds of its training.
    assert found == [(320.0, 1.4), (460.0, 1.0), (620.0, 0.85)]
    assert (until(found, 0.9), until(found, 0.7)) == (620.0, None)
    assert "| 620 s | not in 620 s |" in tables(folder, SMALL, {"cpu": "a processor"})
    record(folder, "own-raystill-run", "raystill", "own", 300)
    ours = [{"step": 18, "training_s": 120.0, "kl_nats_per_token": 0.88}]
    record(folder, "own-raystill-curve", "raystill", "own", 5, curve=ours)
    record(folder, "own-raystill-judge", "raystill", "own", 5, kl_nats_per_token=0.69)
    assert own_curves(records(folder))["raystill"] == [(120.0, 0.88), (300.0, 0.69)]
    assert "| 120 s | 300 s |" in tables(folder, SMALL, {"cpu": "a processor"})


def test_a_folder_holds_one_job(tmp_path):
    SMALL.save(tmp_path)
    SMALL.save(tmp_path)
    assert Settings.load(tmp_path) == SMALL
    with pytest.raises(SystemExit, match=r"another job .*'rows': \(16, 32\)"):
        Settings(rows=32, held_out=8).save(tmp_path)


def script(text: str, **more) -> Part:
    """A part that runs this Python."""
    return Part("1-hf-train", [sys.executable, "-c", text], "hf", "1", **more)


def test_a_part_that_fails_leaves_no_record_and_shows_the_end_of_its_log(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(SystemExit, match=r"ended with status 3; [\s\S]*the reason"):
        run_part(script("print('the reason'); raise SystemExit(3)"), folder, SMALL, 60)
    assert not records(folder)


def test_a_part_that_takes_too_long_is_ended_with_all_its_processes(tmp_path):
    """The child has a session of its own, as an engine's workers may have."""
    mark = tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    text = "import subprocess, sys, time\n"
    text += f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
    text += "time.sleep(600)"
    for limit_s in (1.5, 15):
        with pytest.raises(SystemExit, match=f"exceeded --limit {limit_s:.0f} s"):
            run_part(script(text), Folder(tmp_path), SMALL, limit_s)
        if mark.exists() and mark.read_text():
            break  # On a busy machine its child takes longer to begin.
    pid = int(mark.read_text())
    until_s = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not alive(pid)
    assert not records(Folder(tmp_path))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_part_tells_its_time_and_what_its_processes_took(tmp_path):
    """A child of the part counts as the part's; what it wrote is in the record."""
    figures = tmp_path / "figures.json"
    busy = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\n"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])\n"
    text += (
        f"import pathlib, time; time.sleep(1.5)\npathlib.Path({str(figures)!r}).write_text('[3]')"
    )
    found = run_part(script(text, figures=figures), Folder(tmp_path), SMALL, 120)
    assert found["figures"] == [3]
    assert found["wall_s"] >= 3.0
    assert found["own_cores"] * found["wall_s"] > 0.9  # Half a second between looks.


def test_a_second_call_waits_for_the_lock_of_the_first(tmp_path):
    path = tmp_path / "lock"
    text = (
        f"import fcntl, time; f = open({str(path)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(0.5)"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with locked(path):
            assert other.wait() == 0


def test_sides_alternate_and_only_what_is_asked_for_runs(tmp_path):
    folder = Folder(tmp_path)
    kept = {str(n): list(range(n)) for n in SMALL.layers}
    write_json(folder.chosen, {"kept": kept})
    names = [part.name for part in mechanics(SMALL, folder) if part.counts]
    assert names[:8] == [
        "1-hf-sample",
        "1-hf-train",
        "1-vllm-sample",
        "1-vllm-train",
        "1-policy-train",
        "1-raystill-run",
        "1-policy-distill-train",
        "1-policy-raystill-run",
    ]
    assert names[8:11] == ["2-vllm-train", "2-policy-train", "2-raystill-run"]
    first = Part("material", [])
    given = SimpleNamespace(own=False, policy=False, only="1-raystill", students=1)
    asked = [part.name for part in wanted(first, folder, SMALL, given)]
    assert asked == ["material", "1-raystill-run", "1-raystill-judge"]
    given.only = ""
    for given.policy in (False, True):
        asked = [part.name for part in wanted(first, folder, SMALL, given)]
        assert ("1-policy-distill-train" in asked) == given.policy and "1-policy-train" in asked
        assert ("1-policy-raystill-judge" in asked) == given.policy
    given.only, given.policy = "policy", False
    asked = [part.name for part in wanted(first, folder, SMALL, given)]
    sides = ("1-policy-train", "1-policy-distill-train", "1-policy-raystill-run")
    assert [name for name in asked[1:] if "judge" not in name] == list(sides)


def test_the_loop_of_a_run_begins_when_the_sampler_has_the_first_weights(tmp_path):
    """All else is loaded by then, as it is when a loop of TRL begins."""
    steps = [
        {"time": 130.0, "student_s": 4.0, "data_wait_s": 26.0, "rows": 8, "tokens": 300},
        {"time": 140.0, "student_s": 5.0, "data_wait_s": 5.0, "rows": 8, "tokens": 200},
    ]
    write_lines(tmp_path / "metrics.jsonl", steps)
    proofs = [
        f"1970-01-01T00:0{minute}:00.500+00:00 weights of step {step}: 0.14 nats from the student's"
        for minute, step in ((1, 0), (2, 1))
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "sampler-0.log").write_text("\n".join(["loading", *proofs, ""]))
    assert loop_of(tmp_path) == {"steps": 2, "rows": 16, "tokens": 500, "loop_s": 79.5}


def test_on_policy_sides_are_compared_by_tokens_a_second(tmp_path):
    """Over all students by the sums: a side's longer answers are more tokens and more seconds."""
    folder = Folder(tmp_path)
    for n, seconds in (("1", 100), ("2", 60)):
        loop = {"steps": 2, "rows": 16, "tokens": 800, "loop_s": seconds - 20}
        record(folder, f"{n}-policy-train", "policy", n, seconds, **loop)
    for n, seconds in (("1", 80), ("2", 40)):
        loop = {"steps": 2, "rows": 16, "tokens": 1200, "loop_s": seconds / 2}
        record(folder, f"{n}-policy-raystill-run", "policy-raystill", n, seconds, **loop)
    assert time_of(records(folder), "policy-raystill", 1) == 80
    lines = tables(folder, SMALL, {"cpu": "a processor"}).splitlines()
    first = "| 1 | (c) TRL GKD on-policy | 800 | 80 | 10.0 | 3.00 | 100 | 8.0 | 1.88 |"
    assert first in lines
    ours = "| all | (f) Raystill, on-policy | 2,400 | 60 | 40.0 | 1.00 | 120 | 20.0 | 1.00 |"
    assert ours in lines
    assert (
        "| all | (c) TRL GKD on-policy | 1,600 | 120 | 13.3 | 3.00 | 160 | 10.0 | 2.00 |" in lines
    )


@pytest.mark.skipif(not Path("examples").exists(), reason="run from the repository's root")
def test_raystills_run_files_are_the_same_job(tmp_path):
    """The rows, steps and sampling of all sides, with an affordable and a store-only student."""
    from benchmarks.rivals.parts import own_run_file, policy_run_file, run_file
    from raystill.config.load import load_config

    folder = Folder(tmp_path)
    kept = {str(n): list(range(n)) for n in SMALL.layers}
    write_json(folder.chosen, {"kept": kept})
    one, two = (load_config(str(run_file(SMALL, folder, n)), []) for n in (1, 2))
    assert one.student.layers == tuple(range(22)) and two.student.layers == tuple(range(18))
    for config in (one, two):
        assert config.training.rows_per_step == SMALL.rows_per_step
        assert config.training.learning_rate == SMALL.learning_rate
        assert config.teacher.sampling.max_tokens == SMALL.max_tokens
        assert not config.evaluation.enabled
    assert one.store.path == two.store.path and one.output.path != two.output.path
    assert (one.training.cpu_cores, two.training.cpu_cores) == (None, "all")
    policy = load_config(str(policy_run_file(SMALL, folder, 2)), [])
    assert policy.policy.share_at(0) == 1.0 and policy.policy.objective == one.objective
    assert policy.policy.sampling.temperature == SMALL.temperature
    assert (policy.student, policy.training.cpu_cores) == (two.student, None)
    assert policy.store.path != one.store.path  # Nothing that another student wrote.
    own = load_config(str(own_run_file(SMALL, folder)), [])
    assert own.evaluation.enabled and own.prompts.limit == 511
    assert os.path.dirname(own.output.path) == str(tmp_path / "students")
