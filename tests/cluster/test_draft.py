"""``raystill draft``: what it refuses before anything is spent, what it says, and a real engine."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml
from tokenizers import Tokenizer, models

import driver
from raystill.base.errors import RunError
from raystill.base.run_folder import DRAFT, HELD_OUT_PROMPTS, RunFolder
from raystill.cluster.job import run as job
from raystill.cluster.report.drafts import print_draft
from raystill.cluster.worth import draft
from raystill.cluster.worth.bench import chosen_prompts
from raystill.cluster.worth.draft import predicted
from raystill.model.identity import teacher_identity
from tests.cluster.test_driver import TINY, drive, listed
from tests.serve.test_draft_acceptance import geometric_length

NUM_PROMPTS = 6
API = ["teacher.engine=api", "teacher.api.base_url=http://127.0.0.1:1", "teacher.api.model=m"]
API += ["terms.teacher_licence=apache-2.0"]


def write_prompts(folder: Path, prompts: list[list[int]]) -> None:
    table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    RunFolder(str(folder)).write_table(HELD_OUT_PROMPTS, table)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of the tiny teacher, whose student is the teacher itself."""
    folder = tmp_path / "run"
    shutil.copytree(TINY, folder / "student")
    config: dict[str, Any] = {
        "teacher": {
            "model": str(TINY),
            "dtype": "float32",
            "max_model_len": 128,
            "kv_cache_gib": 0.25,
            "sampling": {"max_tokens": 24, "temperature": 0.7, "min_p": 0.05},
        },
        "student": {"layers": [0, 1]},
        "prompts": {"path": "prompts.jsonl"},
        "evaluation": {"held_out_rows": NUM_PROMPTS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {"teacher_identity": teacher_identity(TINY), "run_id": "r"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_prompts(folder, [[5 + i, 17, 300 + 7 * i, 41] for i in range(NUM_PROMPTS)])
    return folder


def no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def no_student(folder: Path) -> None:
    shutil.rmtree(folder / "student")


def no_weights(folder: Path) -> None:
    (folder / "student" / "model.safetensors").unlink()


def broken_student(folder: Path) -> None:
    (folder / "student" / "config.json").write_text("{")


def no_prompts(folder: Path) -> None:
    (folder / HELD_OUT_PROMPTS).unlink()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (no_config, "run has no config.yaml: it is no run folder"),
        (no_student, "run has no finished student (student/ is missing, or without config.json"),
        (no_weights, "run has no finished student"),
        (broken_student, "run has no finished student"),
        (
            no_prompts,
            "has no held-out prompts, on which engines are measured; run with evaluation.",
        ),
        (lambda f: write_prompts(f, []), "has no held-out prompts"),
    ],
)
def test_a_folder_with_nothing_to_measure_is_refused(broken, said, run_folder, capsys) -> None:
    broken(run_folder)
    assert driver.main(["draft", str(run_folder)]) == driver.EXIT_FAILED
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert not (run_folder / DRAFT).exists()


def other_tokenizer(folder: Path) -> list[str]:
    words = {f"w{i}": i for i in range(100)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "student/tokenizer.json"))
    return []


def other_size(folder: Path) -> list[str]:
    path = folder / "student" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    return []


def other_teacher(folder: Path) -> list[str]:
    path = folder / "manifest.json"
    path.write_text(json.dumps({"teacher_identity": "0" * 64}))
    return []


def broken_manifest(folder: Path) -> list[str]:
    (folder / "manifest.json").write_text("[7]")
    return []


def lost_teacher(folder: Path) -> list[str]:
    return ["teacher.model=/nowhere/model"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda _: API, "teacher.engine: is 'api', and only vLLM takes a draft model"),
        (lambda _: ["teacher.engine=synthetic"], "teacher.engine: is 'synthetic'"),
        (
            lambda _: ["teacher.pipeline_parallel_size=2"],
            "teacher.pipeline_parallel_size: is 2, but a teacher with a draft model is measured "
            "within one node",
        ),
        (
            lambda _: ["teacher.engine_args.speculative_config={method: ngram}"],
            "teacher.engine_args.speculative_config: is set",
        ),
        (other_tokenizer, "student: student has another tokenizer than"),
        (other_size, "needs equal vocabularies"),
        (other_teacher, "are not those that"),
        (broken_manifest, "manifest.json: is not the JSON object that a run writes"),
        (lost_teacher, "teacher.model: there is no folder '/nowhere/model'"),
        (lambda _: ["teacher.modle=x"], "teacher.modle"),
    ],
)
def test_a_teacher_or_student_that_does_not_fit_is_refused(
    broken, said, run_folder, capsys
) -> None:
    overrides = [word for text in broken(run_folder) for word in ("--set", text)]
    assert driver.main(["draft", str(run_folder), *overrides]) == driver.EXIT_REFUSED
    shown = capsys.readouterr()
    assert any(said in problem for problem in listed(shown.err, shown.out))
    assert not (run_folder / DRAFT).exists() and not (run_folder / "logs").exists()


@pytest.mark.parametrize("words", [["--k", "0"], ["--k", "9"], ["--rows", "0"], ["--k", "x"]])
def test_wrong_numbers_are_refused(words, run_folder, capsys) -> None:
    assert driver.main(["draft", str(run_folder), *words]) == driver.EXIT_REFUSED
    assert f"'{words[0]}'" in capsys.readouterr().err


def test_prompts_are_spread_over_all_sources(run_folder) -> None:
    folder = RunFolder(str(run_folder))
    assert [int(ids[0]) for ids in chosen_prompts(folder, 3)] == [5, 7, 10]
    assert len(chosen_prompts(folder, 100)) == NUM_PROMPTS
    assert len(chosen_prompts(folder, 1)) == 1


def found() -> dict[str, Any]:
    """Figures of a student whose every token is accepted at 0.6."""
    computed = {
        k: {
            "acceptance_by_position": [0.6**i for i in range(1, k + 1)],
            "mean_acceptance_length": geometric_length(0.6, k),
        }
        for k in range(1, 9)
    }
    measured = {"k": 2, "tokens_per_s": 30.0, "speed_up": 0.75, "mean_acceptance_length": 1.96}
    near_tie = {"row": 0, "position": 3, "margin_nats": 2e-5}
    return {
        "teacher": "models/t",
        "student": "runs/x/student",
        "version": "0.32.0",
        "dtype": "float32",
        "cores": 1,
        "gpus": 0,
        "rows": 12,
        "concurrency": 1,
        "top1_agreement": 0.6,
        "teacher_alone": {"tokens": 768, "tokens_per_s": 40.0, "token_s": 0.02},
        "student_alone": {"tokens": 768, "tokens_per_s": 50.0, "token_s": 0.016},
        "computed": {str(k): figures for k, figures in computed.items()},
        "measured": [{**measured, "identical_answers": 11, "differences": [near_tie]}],
        "failed": {"4": "out of memory"},
        **predicted(computed, 0.8),
    }


def test_the_tables_say_what_is_measured_and_what_follows(capsys) -> None:
    print_draft(found())
    shown = capsys.readouterr().out
    times = (
        "a token after the first takes the teacher 20 ms, the student 16 ms: cost ratio c = 0.80"
    )
    assert f"student alone 50.0; {times}" in " ".join(shown.split())
    assert "11 of 12" in shown and "failed" in shown
    assert "1 answer became another one" in shown and "2e-05 nats at most" in shown
    # c = 0.02: k = 5 gives (1 - 0.6^6) / 0.4 / 1.1 = 2.3834 / 1.1 = 2.167; k = 6 2.4300 / 1.12 =
    # 2.170; k = 7 2.4580 / 1.14 = 2.156.
    lines = {line.split()[0]: line.strip() for line in shown.splitlines() if " k = " in line[-20:]}
    assert lines["0.02"].endswith("k = 6: 2.17")
    (here,) = (line for line in shown.splitlines() if "0.80 (here)" in line)
    assert here.endswith("no draft")
    print_draft({**found(), "measured": [{**found()["measured"][0], "differences": []}]})
    assert "all answers are the teacher's own, token by token" in capsys.readouterr().out


def test_answers_too_short_to_tell_leave_no_prediction() -> None:
    nothing = {1: {"mean_acceptance_length": None}}
    for of in predicted(nothing, 0.5)["predicted"]:
        assert (of["speed_up"], of["best_k"], of["best_speed_up"]) == ({}, 0, 1.0)


def figures_of(k: int) -> dict[str, Any]:
    """What an engine with k drafted tokens says."""
    counted = {"mean_acceptance_length": 1.5, "acceptance_by_position": [0.5] * k}
    return {"k": k, "tokens_per_s": 20.0, "identical_answers": 6, "differences": [], **counted}


def engines(fails: int | None, stops: int | None = None) -> Any:
    """In place of `Bench.run`: one engine fails, a person stops at another."""

    def run(self: Any, actor: type, arguments: tuple[Any, ...], *calls: Any) -> list[Any]:
        assert self.settings.config.teacher.engine_args["enable_prefix_caching"] is False
        model, k = (*arguments, 0)[:2]
        if k == fails:
            raise RunError("no memory")
        if k == stops:
            raise KeyboardInterrupt
        speed = {"tokens": 60, "tokens_per_s": 10.0, "seconds": 6.0, "dropped": 0}
        speed["token_s"] = 0.08 if model == "teacher" else 0.02
        if k:
            return [{}, figures_of(k)]
        if model == "teacher":
            facts = {"engine": "vllm", "version": "0", "dtype": "float32", "cores": 1}
            return [facts, {**speed, "read_otherwise": 0}, "answers"]
        by_k = {n: figures_of(n) for n in range(1, 9)}
        return [{}, {"top1_agreement": 0.5, "by_k": by_k}, speed]

    return run


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of one core that holds what is put into it."""
    monkeypatch.setattr(job, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})


@pytest.mark.usefixtures("without_ray")
def test_an_engine_that_fails_leaves_the_figures_of_the_others(
    run_folder, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(draft.Bench, "run", engines(fails=2))
    words = ["draft", str(run_folder), "--k", "4", "--k", "2", "--k", "1", "--json"]
    assert driver.main(words) == driver.EXIT_FAILED
    shown = capsys.readouterr()
    assert "with 2 drafted tokens: no memory" in shown.err
    found = json.loads(shown.out)
    assert [of["k"] for of in found["measured"]] == [1, 4] and found["failed"] == {"2": "no memory"}
    assert [of["speed_up"] for of in found["measured"]] == [2.0, 2.0]
    assert found["cost_ratio"] == 0.25, "of the times of a token, not of tokens/s of whole answers"
    assert json.loads((run_folder / DRAFT).read_text()) == found
    assert "4 drafted tokens" in (run_folder / "report.html").read_text()


@pytest.mark.usefixtures("without_ray")
def test_what_was_measured_before_a_stop_is_kept(run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(draft.Bench, "run", engines(fails=None, stops=4))
    assert driver.main(["draft", str(run_folder)]) == draft.EXIT_INTERRUPTED
    found = json.loads((run_folder / DRAFT).read_text())
    assert [of["k"] for of in found["measured"]] == [1, 2] and found["k"] == [1, 2, 4, 8]
    assert "stopped; what was measured is in draft.json" in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.vllm
def test_a_served_draft_changes_no_answer_and_is_accepted_as_computed(run_folder) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    # A student that agrees with its teacher on some tokens: the teacher with noise on its weights.
    weights = run_folder / "student" / "model.safetensors"
    torch.manual_seed(0)
    noisy = {
        name: t + 0.05 * t.float().std() * torch.randn(t.shape).to(t.dtype) if t.dim() == 2 else t
        for name, t in load_file(weights).items()
    }
    save_file(noisy, weights, metadata={"format": "pt"})
    done = drive("draft", str(run_folder), "--k", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((run_folder / DRAFT).read_text()) == found
    (measured,) = found["measured"]
    assert (measured["k"], measured["identical_answers"]) == (2, NUM_PROMPTS)
    assert measured["differences"] == [] and measured["answers_not_counted"] == 0
    assert measured["tokens"] == found["teacher_alone"]["tokens"]
    # The engine's own counts are those of one pass of the student over the answers.
    assert {name: measured[name] for name in found["computed"]["2"]} == found["computed"]["2"]
    assert 0 < measured["acceptance_by_position"][0] < 1
    assert 0 < found["top1_agreement"] < 1
    assert found["cost_ratio"] > 0 and found["failed"] == {}
