"""The command line as a user meets it: what is refused, how it is said, and with which status.

What the check finds is proved function by function in ``test_check.py``; here each mistake goes
through ``driver.py`` once, and the sentences are read as a person would read them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models

import driver
from raystill.cluster.check.static import check_run_file
from raystill.config.load import config_text, load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-teacher"
SECONDS = 5
HEAVY = ("ray", "torch", "vllm", "transformers")


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A sound run file of eight prompts, named as a user in its folder would name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    prompts = [json.dumps({"prompt": f"Count to {i}."}) for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    config = {
        "teacher": {
            "model": str(TINY),
            "engine": "synthetic",
            "synthetic": {"vocab_size": 49152},
            "max_model_len": 64,
            "sampling": {"max_tokens": 8},
        },
        "student": {"layers": [1]},
        "prompts": {"path": "prompts.jsonl"},
        "training": {"rows_per_step": 4},
        "stream": {"group_rows": 2},
        "evaluation": {"held_out_rows": 2},
    }
    (tmp_path / "sound.yaml").write_text(yaml.safe_dump(config))
    return "sound.yaml"


def settings(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The problems that ``driver.py ARGUMENTS`` lists, having ended with the status of refusal."""
    capsys.readouterr()
    assert driver.main(list(arguments)) == driver.EXIT_REFUSED
    shown = capsys.readouterr()
    return listed(shown.err, shown.out)


def listed(err: str, out: str) -> list[str]:
    """The problems a user is shown on the error stream, which holds nothing else."""
    assert "Traceback" not in err + out
    assert "no problems found" not in out
    heading, *lines = err.strip().splitlines()
    problems = [line.removeprefix("  - ") for line in lines]
    assert all(line.startswith("  - ") for line in lines), err
    plural = "" if len(problems) == 1 else "s"
    assert heading == f"{len(problems)} problem{plural}, nothing was started:"
    return problems


def drive(*arguments: str, cwd: Path | str = ROOT) -> subprocess.CompletedProcess[str]:
    """``python driver.py ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def nothing() -> list[str]:
    return []


def empty_file() -> list[str]:
    Path("empty.jsonl").write_text("\n")
    return []


def broken_line() -> list[str]:
    Path("broken.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three\n')
    return []


def long_prompt() -> list[str]:
    with Path("prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "word " * 70}) + "\n")
    return []


def other_tokenizer() -> list[str]:
    folder = Path("other")
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    words = {"a": 0, "b": 1}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": 2, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return []


def file_in_the_way() -> list[str]:
    Path("results").write_text("not a folder")
    return []


def earlier_run() -> list[str]:
    folder = Path("runs/sound")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(load_config("sound.yaml", ["seed=9"])))
    return []


MISTAKES = {
    "an unknown key": (
        nothing,
        ["training.learnig_rate=0.1"],
        ["training.learnig_rate: unknown key", "did you mean", "training.learning_rate"],
    ),
    "a wrong type": (
        nothing,
        ["training.rows_per_step=many"],
        ["training.rows_per_step: is 'many'", "expected an integer"],
    ),
    "a missing prompt file": (
        nothing,
        ["prompts.path=missing.jsonl"],
        ["prompts.path: ", "no such file: 'missing.jsonl'"],
    ),
    "an empty prompt file": (
        empty_file,
        ["prompts.path=empty.jsonl"],
        ["empty.jsonl: holds no prompts"],
    ),
    "a broken line": (
        broken_line,
        ["prompts.path=broken.jsonl"],
        ["broken.jsonl, line 3: is not JSON"],
    ),
    "a prompt longer than the context": (
        long_prompt,
        [],
        [
            "prompts.path: 1 of 9 prompts are longer than 63 tokens",
            "prompts.jsonl, line 9",
            "raise teacher.max_model_len",
            "stream.max_drop_fraction",
        ],
    ),
    "a student with another tokenizer": (
        other_tokenizer,
        ["student={init: model, model: other}"],
        [
            "student.model: other has another tokenizer than",
            "id 0 is '<|endoftext|>' for the teacher and 'a' for the student",
            "choose a student with the teacher's tokenizer, or init: from_teacher",
        ],
    ),
    "K above the limit": (
        nothing,
        ["signal.top_k=50000"],
        ["signal.top_k: is 50000", "49152 or less"],
    ),
    "an output path that cannot be written": (
        file_in_the_way,
        ["output.path=results/here"],
        ["output.path: ", "results/here cannot be made", "is a file; name another folder"],
    ),
    "a run folder of another configuration": (
        earlier_run,
        [],
        [
            "output.path: ",
            "runs/sound holds a run of another configuration (seed was 9, is 0)",
            "set these back to resume it, or set output.path to a new folder",
        ],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_one_sentence(
    run_file: str, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, overrides, words = MISTAKES[mistake]
    prepare()
    before = sorted(Path().rglob("*"))
    for command in (["check", "--static"], ["run"]):
        (problem,) = refused(capsys, *command, run_file, *settings(overrides))
        for word in words:
            assert word in problem
    assert sorted(Path().rglob("*")) == before  # neither began a run


def test_mistakes_of_all_kinds_are_reported_together_in_seconds(run_file: str) -> None:
    overrides: list[str] = []
    kinds = [kind for kind in MISTAKES if kind not in ("an empty prompt file",)]
    for kind in kinds:
        prepare, wanted, _ = MISTAKES[kind]
        prepare()
        overrides += [o for o in wanted if not o.startswith("prompts.path")]
    overrides.append("prompts.path=[prompts.jsonl, missing.jsonl, broken.jsonl]")
    took = []
    for _ in range(3):  # One delay of a busy machine is not the command's.
        start = time.monotonic()
        result = drive("check", "--static", run_file, *settings(overrides), cwd=Path.cwd())
        took.append(time.monotonic() - start)
        if took[-1] < SECONDS:
            break
    assert result.returncode == driver.EXIT_REFUSED
    problems = "\n".join(listed(result.stderr, result.stdout))
    for where in (
        "training.learnig_rate: unknown key",
        "training.rows_per_step: is 'many'",
        "no such file: 'missing.jsonl'",
        "broken.jsonl, line 3: ",
        "student.model: other has another tokenizer",
        "signal.top_k: is 50000",
        "output.path: ",
    ):
        assert where in problems
    assert min(took) < SECONDS


def test_what_needs_no_cluster_imports_nothing_heavy(run_file: str) -> None:
    script = (
        "import contextlib, io, sys, driver\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):"
        "\n"
        f"    assert driver.main(['check', '--static', {run_file!r}]) == 0\n"
        f"    assert driver.main(['run', {run_file!r}, '--set', 'seed=x']) == 2\n"
        "    assert driver.main(['fields']) == 0\n"
        "    assert driver.main(['draft', '.']) == driver.main(['speed', '.']) == 1\n"
        "    assert driver.main(['run', '--help']) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_a_sound_run_file_is_told_so(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["check", "--static", run_file]) == 0
    shown = capsys.readouterr()
    assert "6 to train on (2 steps of 4 rows), 2 held out" in shown.out
    assert "no problems found" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("name", ["quickstart", "tiny"])
def test_the_shipped_run_files_are_sound(name: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    output = f"output.path={tmp_path / 'run'}"
    result = drive("check", "--static", str(path), "--set", output)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["--set seed: expected a dotted key and a value: --set a.b=value"]),
        ("=3", ["--set =3: expected a dotted key"]),
        ("training..rows_per_step=3", ["--set training..rows_per_step=3: expected a dotted key"]),
        ("student.layers=[0", ["--set student.layers: the value is not valid YAML"]),
        ("seed.root=3", ["seed is 0, which has no keys; set it whole"]),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(
    run_file: str, override: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(run_file).open("a") as stream:
        stream.write("seed: 0\n")
    (problem,) = refused(capsys, "check", "--static", run_file, "--set", override)
    for word in words:
        assert word in problem


def test_overrides_are_read_as_yaml_and_the_last_one_counts(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = settings(["training.rows_per_step=3", "training={rows_per_step: 2}"])
    assert driver.main(["check", "--static", run_file, *overrides]) == 0
    assert "3 steps of 2 rows" in capsys.readouterr().out


def test_a_run_file_that_is_not_there_is_named(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("check", "run"):
        (problem,) = refused(capsys, command, "nowhere.yaml")
        assert problem.startswith("nowhere.yaml: no such file; name a run file")


def test_a_folder_without_a_run_has_no_report(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.main(["report", "runs/nowhere"]) == driver.EXIT_FAILED
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "runs/nowhere" in shown.err
    assert "Traceback" not in shown.err + shown.out


def test_a_terminated_run_names_the_command_that_resumes_and_exits_with_143(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.cluster.coordinator.snapshot import Snapshot
    from raystill.cluster.job import run, watch
    from raystill.cluster.report import summary

    def stopped(_run: object, prepared: Any, *_threads: object) -> summary.RunResult:
        with watch.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
        snapshot = Snapshot(progress={"step": 7})
        return summary.RunResult(snapshot, prepared, {}, stopped_by=signals.received)

    monkeypatch.setattr(run, "connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(run, "check_on_cluster", lambda _: [])
    for stage in ("begin", "serve", "stream", "fit"):
        monkeypatch.setattr(run, stage, lambda *_, **__: None)
    monkeypatch.setattr(watch, "watch", stopped)
    monkeypatch.setattr(summary, "write_summary", lambda *_: {})
    assert driver.main(["run", run_file, "--set", "training.rows_per_step=2"]) == 143
    assert capsys.readouterr().out.endswith(
        "Stopped after step 7; resume with:\n"
        "  python driver.py run sound.yaml --set training.rows_per_step=2\n"
    )
    spaced = ["--set", "teacher.cpu_cores=[0, 1]", "--skip-probe"]
    assert driver.main(["run", run_file, "--set", "training.rows_per_step=2", *spaced]) == 143
    assert capsys.readouterr().out.endswith(" --set 'teacher.cpu_cores=[0, 1]' --skip-probe\n")


def test_a_resumed_run_goes_on_with_the_teacher_it_began_with(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.cluster.check.prepared import Prepared
    from raystill.cluster.job import manifest, run
    from raystill.datasets.rows.keys import KeyedEngine

    monkeypatch.setattr(run, "connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(run, "check_on_cluster", lambda _: ["the end of this test"])
    checked = check_run_file(run_file)
    manifest.write_folder(checked.config, checked.folder, checked.prepared)
    capsys.readouterr()
    assert driver.main(["run", run_file]) == 2
    assert "the end of this test" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        other = KeyedEngine({"kv_cache_dtype": "fp8"})
        patched.setattr(manifest, "keyed_engine", lambda *_: other)
        assert driver.main(["run", run_file]) == 2
        told = capsys.readouterr().err
        assert "teacher.engine_args: change the answers" in told and "{'kv_cache_dtype'" in told
        manifest.write_folder(checked.config, checked.folder, checked.prepared)
    assert driver.main(["run", run_file]) == 2
    assert "but the run began with {'kv_cache_dtype': 'fp8'}" in capsys.readouterr().err
    manifest.write_folder(checked.config, checked.folder, checked.prepared)
    monkeypatch.setattr(Prepared, "teacher_identity", "another")
    assert driver.main(["run", run_file]) == 2
    told = capsys.readouterr().err
    assert "are not those that" in told and "teacher_identity was" in told and "another" in told
    assert "the end of this test" not in told


def test_a_machine_without_git_has_no_commit_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.cluster.job import manifest

    assert len(manifest.commit() or "") == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.commit() is None


@pytest.mark.ray
@pytest.mark.faults  # test_connect holds the refusal by a real cluster, test_check the others.
def test_more_workers_than_the_cluster_can_have_are_refused_beside_other_problems(
    run_file: str,
) -> None:
    overrides = ["training.num_workers=64", "cluster.num_cpus=4", "prompts.path=missing.jsonl"]
    start = time.monotonic()
    result = drive("check", run_file, *settings(overrides), cwd=Path.cwd())
    took = time.monotonic() - start
    assert result.returncode == driver.EXIT_REFUSED
    at_once, from_the_cluster = result.stderr.split("1 problem, nothing was started:\n")[1:]
    assert "no such file: 'missing.jsonl'" in at_once
    room = from_the_cluster.removeprefix("  - ")
    assert room.startswith("training.num_workers: the run needs CPU: 65")
    for word in ("64 student workers of 1", "the cluster has 4 and cannot grow", "lower training"):
        assert word in room
    assert not Path("runs").exists()
    assert took < 120  # Nearly all of it is the local cluster's start: a quarter of a minute.


def test_a_wrong_run_file_is_told_without_a_cluster(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = refused(capsys, "check", run_file, "--set", "signal.topk=8")
    assert "signal.topk: unknown key" in problem
    assert not Path("runs").exists()


def test_a_run_that_the_cluster_refuses_leaves_room_for_another(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raystill.base.errors import Problem
    from raystill.cluster.job import run

    no_room = [Problem("training.num_workers", "the cluster cannot grow")]
    monkeypatch.setattr(run, "connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(run, "check_on_cluster", lambda _: no_room)
    assert driver.main(["run", run_file]) == driver.EXIT_REFUSED
    assert "the cluster cannot grow" in capsys.readouterr().err
    assert driver.main(["check", "--static", run_file, "--set", "seed=5"]) == 0
