"""``raystill tasks``: what is refused before a model is loaded, the figures, and a real harness."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raystill.base.errors import ConfigError, RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.check import evaluation
from raystill.cluster.harness.ask import Loading, TaskOptions, ask, compare, scores
from raystill.cluster.report.page.page import write_page
from raystill.cluster.report.tasks import shares, task_rows
from raystill.cluster.worth import after, tasks
from raystill.cluster.worth.start import Start
from raystill.cluster.worth.tasks import (
    Asked,
    earlier,
    measure,
    models_of,
    tasks_command,
    write,
)
from raystill.config.load import load_config
from raystill.train.evaluation import checks

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-teacher"
CAPITALS = TaskOptions(["capitals"], str(ROOT / "examples" / "tasks"))
FLOAT32 = Loading("float32")
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


def of_values(values: list[float], better: bool | None = True) -> dict:
    """What the harness says of these values of each document: their mean, and s / sqrt(n)."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return {
        "results": {"t": {"m,none": mean, "m_stderr,none": error}},
        "higher_is_better": {"t": {"m": better}},
        "n-samples": {"t": {"effective": n}},
    }


@pytest.mark.parametrize("right", [0, 1, 5, 9, 10])
def test_right_and_wrong_answers_have_wilsons_interval(right):
    """5 of 5 are no proof: with n right of n it begins at n / (n + z^2)."""
    found = scores(of_values([1.0] * right + [0.0] * (10 - right)))["t"]["m"]
    _, low, high = checks.wilson([1.0] * right + [0.0] * (10 - right))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert 0 <= found["low"] < found["high"] <= 1
    whole = scores(of_values([1.0] * 5))["t"]["m"]
    assert (whole["low"], whole["high"]) == (pytest.approx(5 / (5 + 3.8415), abs=1e-4), 1.0)


def test_an_interval_of_a_share_stays_between_0_and_1_and_another_is_not_cut():
    overlap = scores(of_values([1.0, 1.0, 0.9, 0.2]))["t"]["m"]
    assert overlap["high"] == 1.0
    assert overlap["low"] == pytest.approx(0.775 - 1.959964 * overlap["stderr"])
    bits = scores(of_values([0.2, 2.2, 0.1, 1.3], better=False))["t"]["m"]
    assert bits["high"] > 1 and bits["high"] - 0.95 == pytest.approx(1.959964 * bits["stderr"])
    group = of_values([1.0, 1.0, 0.9, 0.2]) | {"n-samples": {}}
    assert scores(group)["t"]["m"]["high"] == 1.0, "a group has no documents itself"


def test_the_student_has_a_share_of_its_teachers_score_where_there_is_one():
    found = compare({"teacher": scores(RESULTS), "student": scores(other(0.4))})["capitals"]
    assert found["acc"]["share_of_teacher"] == pytest.approx(0.8)
    none = compare({"teacher": scores(other(0.0)), "student": scores(RESULTS)})["capitals"]
    assert none["acc"]["share_of_teacher"] is None
    for better in (False, None):  # An edit distance, of which the harness may not know it.
        worse = {"teacher": scores(of_values([1, 2, 3], better))}
        worse["student"] = scores(of_values([3, 6, 9], better))
        assert compare(worse)["t"]["m"]["share_of_teacher"] is None
    rows = task_rows({"tasks": {"capitals": found}})
    assert rows[0] == ["capitals, acc", "0.50 [0.30, 0.70]", "-", "0.40 [0.20, 0.60]", "80 %"]
    assert rows[1] == ["capitals, exact_match (strict)", "0.25", "-", "0.25", "100 %"]


def score(share: float | None, n: int | None) -> dict:
    """A metric of a task, with the student's share of the teacher's score."""
    return {"acc": {"student": {"mean": 0.5, "n": n}, "share_of_teacher": share}}


GROUP = {
    "mmlu": score(0.8, None),
    "mmlu_stem": score(0.5, None),
    "mmlu_algebra": score(0.4, 100),
    "mmlu_physics": score(0.6, 102),
    "mmlu_law": score(1.1, 1534),
    "capitals": score(0.9, 32),
    "likelihood": score(None, 20),
}


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        (["mmlu"], {"mmlu": 0.8}),
        (["mmlu", "capitals", "likelihood"], {"mmlu": 0.8, "capitals": 0.9}),
        (["likelihood"], {}),
        (
            ["mmlu_*", "capitals"],
            {"mmlu_algebra": 0.4, "mmlu_physics": 0.6, "mmlu_law": 1.1, "capitals": 0.9},
        ),
    ],
)
def test_a_group_and_the_tasks_in_it_count_once(names, counted):
    assert shares({"names": names, "tasks": GROUP}) == counted


@pytest.mark.parametrize("names", [None, 3, [3], [[]], "capitals", []])
def test_without_names_the_tasks_that_have_documents_count(names):
    leaves = {"mmlu_algebra", "mmlu_physics", "mmlu_law", "capitals"}
    assert set(shares({"names": names, "tasks": GROUP})) == leaves


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
    with pytest.raises(RunError, match="has no task file"):
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
        ask(TINY, TaskOptions(["a"]), FLOAT32, tmp_path / "log")
    assert secret not in str(error.value)


def test_a_harness_that_takes_too_long_is_ended_and_what_it_answered_is_kept(tmp_path, monkeypatch):
    package, answers = tmp_path / "lm_eval", tmp_path / "answers"
    package.mkdir()
    (package / "__init__.py").touch()
    code = "import os, sys, time\nopen('pid', 'w').write(str(os.getpid()))\n"
    code += "open(sys.argv[sys.argv.index('--use_cache') + 1], 'w').write('one')\ntime.sleep(600)"
    (package / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = TaskOptions(["a"], str(tmp_path), timeout_s=5)
    with pytest.raises(RunError, match=r"ended after 5 s[\s\S]*evaluation.tasks.timeout_s"):
        ask(TINY, wanted, FLOAT32, tmp_path / "log", answers)
    assert answers.read_text() == "one"
    assert not _lives(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("options", "loading", "words", "arguments"),
    [
        (CAPITALS, FLOAT32, ["--include_path ."], {"dtype": "float32"}),
        (
            TaskOptions(["a", "b"], limit=3, batch=4, chat=True),
            Loading("bfloat16", gpus=2, own_code=True),
            ["--tasks a,b", "--limit 3", "--batch_size 4", "--apply_chat_template", "--model hf"],
            {"dtype": "bfloat16", "parallelize": True, "trust_remote_code": True},
        ),
        (
            TaskOptions(["a"], backend="vllm"),
            Loading("bfloat16", gpus=4),
            ["--model vllm"],
            {"dtype": "bfloat16", "tensor_parallel_size": 4},
        ),
    ],
)
def test_the_harness_is_told_what_was_asked_for(
    options, loading, words, arguments, tmp_path, monkeypatch
):
    package = tmp_path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import json, sys; from pathlib import Path; words = sys.argv[1:]\n"
        "place = Path(words[words.index('--output_path') + 1])\n"
        "(place / 'm').mkdir()\n"
        "found = {'words': words, 'files': sorted(map(str, Path().iterdir()))}\n"
        "(place / 'm' / 'results_1.json').write_text(json.dumps(found))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = ask(TINY, options, loading, tmp_path / "log", tmp_path / "answers" / "teacher-1")
    said = " ".join(found["words"])
    assert all(word in said for word in words)
    assert f"--use_cache {tmp_path}/answers/teacher-1" in said
    given = json.loads(found["words"][found["words"].index("--model_args") + 1])
    assert given == {"pretrained": str(TINY), **arguments}
    assert ("capitals.jsonl" in found["files"]) == (options.include is not None)


ACCURACY = {"teacher": 0.5, "before": 0.1, "student": 0.4}


class Asking:
    """In place of the harness: says `ACCURACY`, and which model it was asked. ``fails`` at one."""

    def __init__(self, fails: str | None = None, error: BaseException | None = None) -> None:
        self.asked: list[str] = []
        self.fails, self.error = fails, error or RunError("no memory")

    def __call__(self, name, model, asked):
        self.asked.append(name)
        if name == self.fails:
            raise self.error
        return scores(other(ACCURACY[name]))


def run_tasks(run, options=CAPITALS, asking=None, before=True):
    """tasks.json after the models of a run were asked, and who was."""
    asking = asking or Asking()
    folder = RunFolder(str(run))
    config, models = models_of(folder, before)
    asked = Asked.of(options, config, folder)
    for found in measure(models, asked, earlier(folder), asking, print):
        write(folder, found)
    return json.loads((run / "tasks.json").read_text()), getattr(asking, "asked", [])


@pytest.mark.usefixtures("installed")
def test_what_was_asked_before_is_not_asked_again(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):  # As a kill would, in the middle of the second model.
        run_tasks(run, asking=Asking("before", KeyboardInterrupt()))
    assert set(json.loads((run / "tasks.json").read_text())["models"]) == {"teacher"}
    found, asked = run_tasks(run)
    assert asked == ["before", "student"]
    assert list(found["models"]) == ["teacher", "before", "student"]
    of = found["tasks"]["capitals"]["acc"]
    assert {name: of[name]["mean"] for name in ACCURACY} == ACCURACY
    assert of["share_of_teacher"] == pytest.approx(0.8)
    assert run_tasks(run) == (found, [])
    limited = TaskOptions(["capitals"], CAPITALS.include, limit=3)
    assert run_tasks(run, limited)[1] == ["teacher", "before", "student"], "another question"
    run_tasks(run)
    copy = tmp_path / "tasks"
    shutil.copytree(str(CAPITALS.include), copy)
    assert run_tasks(run, TaskOptions(["capitals"], str(copy)))[1] == [], "the same files"
    (copy / "capitals.jsonl").write_text("{}")
    assert len(run_tasks(run, TaskOptions(["capitals"], str(copy)))[1]) == 3, "other data"


@pytest.mark.usefixtures("installed")
def test_what_one_model_answered_outlives_the_success_of_the_next(run, monkeypatch):
    """The harness keeps answers beside each other, one file a model; the one that is done goes."""
    asked: list[Path] = []

    def ask(model, options, loading, log, answers):
        asked.append(answers)
        Path(f"{answers}_rank0.db").write_text("answers")
        if len(asked) == 1:
            raise RunError("ended after 21600 s; what it answered is kept")
        return RESULTS

    monkeypatch.setattr(tasks, "ask", ask)
    found, _ = run_tasks(run, asking=tasks.ask_here, before=False)
    assert set(found["failed"]) == {"teacher"}
    assert [path.name for path in (run / "logs" / "tasks").iterdir()] == [
        f"{asked[0].name}_rank0.db"
    ]
    found, _ = run_tasks(run, asking=tasks.ask_here, before=False)
    assert asked[2] == asked[0], "the teacher goes on with what it answered"
    assert not found["failed"] and not (run / "logs" / "tasks").exists()


@pytest.mark.usefixtures("installed")
def test_a_student_that_was_trained_on_is_asked_again(run):
    run_tasks(run)
    weights = run / "student" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run_tasks(run)[1] == ["student"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("text", ["{", "[1]", '{"tasks": 3, "models": {}}', "null"])
def test_a_broken_file_is_measured_anew(text, run):
    (run / "tasks.json").write_text(text)
    assert len(run_tasks(run)[1]) == 3


@pytest.mark.usefixtures("installed")
def test_a_model_that_fails_is_told_and_asked_again_the_next_time(run, capsys):
    found, asked = run_tasks(run, asking=Asking("before"))
    assert asked == ["teacher", "before", "student"]
    assert found["failed"] == {"before": "no memory"}
    assert "the student as it began could not be asked: no memory" in capsys.readouterr().out
    write_page([RunFolder(str(run))])
    assert "before: no memory" in (run / "report.html").read_text()
    found, asked = run_tasks(run)
    assert asked == ["before"] and found["failed"] == {}


def config_of(run, **tasks):
    """The run's configuration with ``evaluation.tasks``."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.setdefault("evaluation", {})["tasks"] = {"names": ["capitals"], **tasks}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return load_config(run / "config.yaml", [])


@pytest.mark.usefixtures("installed")
def test_a_finished_run_is_due_until_every_model_has_its_scores(run, monkeypatch, capsys):
    config, folder = config_of(run, include=CAPITALS.include), RunFolder(str(run))
    assert after.due(config, folder)
    asking = Asking("student")
    monkeypatch.setattr(after, "ClusterAsk", lambda config: asking)
    assert after.evaluate_run(config, folder, print)
    assert after.due(config, folder), "one has failed"
    asking.fails = None
    assert after.evaluate_run(config, folder, print)
    assert asking.asked == ["teacher", "before", "student", "student"]
    assert "capitals, acc" in (run / "report.html").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert not after.due(config, folder)
    assert after.complete_run(config, folder, print), "and so nothing is connected"
    assert after.due(config_of(run, include=CAPITALS.include, limit=2), folder)
    asking.fails, asking.error = "teacher", KeyboardInterrupt()
    config = config_of(run, include=CAPITALS.include, limit=2)
    assert not after.evaluate_run(config, folder, print)
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_what_goes_wrong_at_the_end_does_not_fail_the_run(run, monkeypatch, capsys):
    config, folder = config_of(run, include=str(run / "gone")), RunFolder(str(run))
    assert after.evaluate_run(config, folder, print)
    assert "the tasks could not be asked: '" in capsys.readouterr().out
    monkeypatch.setattr(after, "models_of", lambda *_: 1 / 0)
    assert after.evaluate_run(config, folder, print)
    assert "division by zero" in capsys.readouterr().out


def test_the_start_of_a_cut_student_is_made_again(run):
    """Its layers are the teacher's own, those that the run file names."""
    from safetensors.torch import load_file

    config, models = models_of(RunFolder(str(run)))
    start = models["before"]
    assert isinstance(start, Start)
    kept = config.student.kept_layers(
        json.loads((TINY / "config.json").read_text())["num_hidden_layers"]
    )
    teacher = load_file(TINY / "model.safetensors")
    with start.made() as folder:
        made = load_file(folder / "model.safetensors")
        assert (folder / "tokenizer.json").exists()
    assert not folder.exists()
    numbers = {int(name.split(".")[2]) for name in made if ".layers." in name}
    assert numbers == set(range(len(kept)))
    for name, tensor in made.items():
        parts = name.split(".")
        if ".layers." in name:
            parts[2] = str(kept[int(parts[2])])
        assert tensor.equal(teacher[".".join(parts)].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"names": []}, "names is empty; name at least one task"),
        ({"names": ["a,b"]}, "names has 'a,b'; name one task in each entry"),
        ({"names": ["a", "a"]}, "names has 'a' twice"),
        ({"backend": "tgi"}, "'hf' or 'vllm'"),
    ],
)
def test_tasks_that_say_nothing_are_refused(tasks, said, run):
    with pytest.raises(ConfigError) as error:
        config_of(run, **tasks)
    assert said in str(error.value.problems)


def problems_of(config, output=None):
    return [f"{p.where}: {p.message}" for p in evaluation.check_tasks(config, output)]


def test_the_check_refuses_what_could_not_be_asked(run, tmp_path, monkeypatch):
    config = config_of(run, include=str(tmp_path / "nothing"))
    monkeypatch.setattr(evaluation, "is_installed", lambda name: False)
    (said,) = problems_of(config)
    assert "evaluation.tasks: needs lm-evaluation-harness" in said and "make tasks" in said
    monkeypatch.setattr(evaluation, "is_installed", lambda name: True)
    (said,) = problems_of(config)
    assert said.startswith("evaluation.tasks.include: ") and "has no task file" in said
    (said,) = problems_of(config, RunFolder("s3://bucket/run"))
    assert "needs the run folder on a disk" in said
    teacher = config.teacher.model_copy(update={"engine": "synthetic"})
    (said,) = problems_of(config.model_copy(update={"teacher": teacher}))
    assert "needs the teacher's weights" in said


def test_what_the_harness_says_of_its_tasks_becomes_problems(run, tmp_path, monkeypatch):
    config = config_of(run, include=CAPITALS.include, names=["capital", "arc_easy"])
    program = tmp_path / "probe.py"
    monkeypatch.setattr(evaluation, "PROBE", str(program))
    monkeypatch.setattr(evaluation, "is_installed", lambda name: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {
        "unknown": ["capital"],
        "broken": {"arc_easy": "ConnectionError: no network"},
        "included": ["capitals"],
    }
    program.write_text(
        "import json, os, sys; assert sys.argv[1:] == ['capital', 'arc_easy']\n"
        "assert os.path.exists('capitals.jsonl'), 'runs in the folder of the task files'\n"
        f"print('noise'); print(json.dumps({found!r}))"
    )
    unknown, broken = problems_of(config)
    assert "names 'capital', which is no task" in unknown and "mean capitals?" in unknown
    assert "'arc_easy', which cannot be loaded (ConnectionError: no network)" in broken
    assert "unset HF_HUB_OFFLINE" in broken
    program.write_text("raise SystemExit('the harness is broken')")
    (said,) = problems_of(config)
    assert "cannot be checked: the harness ends with: the harness is broken" in said
    program.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(evaluation, "PROBE_TIMEOUT_S", 0.5)
    (said,) = problems_of(config)
    assert "could not be loaded by the harness within" in said


def test_the_harness_ends_with_the_process_that_started_it(tmp_path):
    """A killed evaluation leaves nothing behind that asks on."""
    package = tmp_path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    code = (
        "from pathlib import Path\nfrom raystill.cluster.harness.ask import *\n"
        f"ask(Path('m'), TaskOptions(['a'], {str(tmp_path)!r}), Loading('float32'), Path('log'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        child = int((tmp_path / "pid").read_text())
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while _lives(child):
        assert time.monotonic() < until, "the harness goes on alone"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


@pytest.mark.faults  # A minute: the harness is loaded for each of three models.
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
    found = {"tasks": compare({"teacher": scores(RESULTS), "student": scores(other(0.4))})}
    (run / "tasks.json").write_text(json.dumps(found))
    write_page([RunFolder(str(run))])
    page = (run / "report.html").read_text()
    assert "0.40 [0.20, 0.60]" in page and "80 %" in page


def until(found, process: subprocess.Popen, seconds: float = 600) -> None:
    """Wait for something that a running driver brings about."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs make tasks")
def test_a_run_that_is_killed_in_its_tasks_goes_on_with_them(tmp_path, monkeypatch):
    """A whole run with a real teacher, a real harness, and a kill after the first model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "run"
    tasks = "evaluation.tasks={names: [capitals], include: examples/tasks}"
    command = [sys.executable, "driver.py", "run", "configs/tiny.yaml", "--set", tasks]
    command += ["--set", f"output.path={folder}"]
    with (tmp_path / "first").open("w") as output:
        first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            until((folder / "tasks.json").exists, first)
        finally:
            first.kill()
            first.wait()
    kept = json.loads((folder / "tasks.json").read_text())
    assert list(kept["models"]) == ["teacher"]
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "the teacher: asked before" in second.stdout
    found = json.loads((folder / "tasks.json").read_text())
    assert list(found["models"]) == ["teacher", "before", "student"] and not found["failed"]
    of = found["tasks"]["capitals"]["acc"]
    assert of["teacher"] == kept["tasks"]["capitals"]["acc"]["teacher"]
    assert of["teacher"]["mean"] == pytest.approx(by_hand())
    assert {of[name]["n"] for name in ACCURACY} == {32}
    assert "capitals, acc" in second.stdout, "in the closing table"
    assert "capitals, acc" in (folder / "report.html").read_text()
    assert not (folder / "logs" / "tasks").exists(), "answers so far are removed"
