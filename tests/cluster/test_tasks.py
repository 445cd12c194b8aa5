"""``raystill tasks``: what is refused before a model is loaded, the figures, and a real harness."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

from raystill.base.errors import ConfigError, RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.report.page.page import write_page
from raystill.cluster.report.tasks import task_rows
from raystill.cluster.worth import tasks
from raystill.cluster.worth.tasks import TaskOptions, ask, compare, scores, tasks_command

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-teacher"
CAPITALS = TaskOptions(["capitals"], str(ROOT / "examples" / "tasks"))
RESULTS = {
    "results": {
        "capitals": {
            "alias": "capitals",
            "sample_len": 32,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": "N/A",
        }
    },
    "higher_is_better": {"capitals": {"acc": True, "exact_match": True}},
    "n-samples": {"capitals": {"original": 32, "effective": 20}},
}


def other(accuracy: float) -> dict:
    """The same results with another accuracy."""
    found = json.loads(json.dumps(RESULTS))
    found["results"]["capitals"]["acc,none"] = accuracy
    return found


def test_the_intervals_are_the_harnesss_standard_errors():
    found = scores(RESULTS)["capitals"]
    assert set(found) == {"acc", "exact_match (strict)"}
    assert found["acc"] == {
        "mean": 0.5,
        "low": pytest.approx(0.5 - 0.1959964),
        "high": pytest.approx(0.5 + 0.1959964),
        "stderr": 0.1,
        "n": 20,
        "higher_is_better": True,
    }
    assert found["exact_match (strict)"]["low"] is None


def test_the_student_has_a_share_of_its_teachers_score_where_there_is_one():
    found = compare({"teacher": RESULTS, "student": other(0.4)})["capitals"]
    assert found["acc"]["share_of_teacher"] == pytest.approx(0.8)
    none = compare({"teacher": other(0.0), "student": RESULTS})["capitals"]
    assert none["acc"]["share_of_teacher"] is None
    rows = task_rows({"tasks": {"capitals": found}})
    assert rows[0] == ["capitals, acc", "0.50 [0.30, 0.70]", "-", "0.40 [0.20, 0.60]", "80 %"]
    assert rows[1] == ["capitals, exact_match (strict)", "0.25", "-", "0.25", "100 %"]


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"tasks": 3},
        {"tasks": {"a": [1]}},
        {"tasks": {"a": {"acc": 3}}},
        {"tasks": {"a": {"acc": {"student": {"mean": "x"}, "share_of_teacher": "x"}}}},
    ],
)
def test_an_edited_file_breaks_no_report(broken):
    assert all(set(row[1:]) == {"-"} for row in task_rows(broken))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder like that of a finished run, whose student is its teacher."""
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["teacher"]["model"] = str(TINY)
    config["output"] = {"path": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(TINY, tmp_path / "run" / "student")
    return tmp_path / "run"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the harness were there; no model is asked."""
    monkeypatch.setattr(tasks, "harness_version", lambda: "0")


def test_without_the_harness_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'raystill\[tasks\]', in a clone: make tasks"):
        tasks_command(str(run), CAPITALS, False, print)


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(run, tmp_path):
    with pytest.raises(RunError, match="where no task file"):
        tasks_command(str(run), TaskOptions(["a"], str(tmp_path / "nothing")), False, print)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"]["engine"] = "synthetic"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="its weights are not there"):
        tasks_command(str(run), CAPITALS, False, print)
    shutil.rmtree(run / "student")
    with pytest.raises(RunError, match="no finished student"):
        tasks_command(str(run), CAPITALS, False, print)
    with pytest.raises(RunError, match="no run folder"):
        tasks_command(str(tmp_path / "nothing"), CAPITALS, False, print)
    assert not (run / "tasks.json").exists()


def test_a_harness_that_fails_is_told_with_the_end_of_its_output(tmp_path, monkeypatch):
    package = tmp_path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    secret = "hf_" + "a1B2" * 9
    (package / "__main__.py").write_text(f"raise SystemExit('no such task: {secret}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match=r"ended with status 1[\s\S]*no such task") as error:
        ask(TINY, TaskOptions(["a"]), "float32", tmp_path / "log")
    assert secret not in str(error.value)


def by_hand() -> float:
    """The accuracy by plain transformers: the most probable choice after the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    right = rows = 0
    for line in (ROOT / "examples" / "tasks" / "capitals.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = f"Question: What is the capital of {row['country']}?\nAnswer:"
        before = tokenizer(asked, add_special_tokens=False)["input_ids"]
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(f"{asked} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            span = range(len(before), len(ids))
            sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in span))
        right += sums.index(max(sums)) == row["answer"]
        rows += 1
    return right / rows


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs make tasks")
def test_the_shipped_task_is_scored_without_a_network(run, monkeypatch, capsys):
    """Teacher and student are the same model here; the accuracy is that of plain transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert tasks_command(str(run), CAPITALS, False, print) == 0
    found = json.loads((run / "tasks.json").read_text())
    accuracy = found["tasks"]["capitals"]["acc"]
    assert accuracy["teacher"]["n"] == 32
    assert accuracy["teacher"] == accuracy["student"]
    assert accuracy["teacher"]["mean"] == pytest.approx(by_hand())
    assert "capitals, acc" in capsys.readouterr().out
    assert "capitals, acc" in (run / "report.html").read_text()


def test_the_page_shows_the_scores(run):
    found = {"tasks": compare({"teacher": RESULTS, "student": other(0.4)})}
    (run / "tasks.json").write_text(json.dumps(found))
    write_page([RunFolder(str(run))])
    page = (run / "report.html").read_text()
    assert "0.40 [0.20, 0.60]" in page and "80 %" in page
