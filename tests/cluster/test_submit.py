"""Submitting a run as a Ray job: what is sent, what is refused, and a real cluster that asks for a
token, from ``ray start --head`` on ports of its own.
"""

import asyncio
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from types import SimpleNamespace

import psutil
import pytest
from transformers import AutoModelForCausalLM

import driver
from raystill.base.errors import ConfigError, RunError
from raystill.cluster.commands import submit
from raystill.cluster.commands.submit import LogTail, Submission, exit_code, unreachable
from tests.support.end_to_end import ROOT, RunFiles
from tests.support.synthetic_run import wait_for_step, write_run_file

TOKEN = "planted-cluster-token-4f1d7c0a"
ROOMS = ("cluster", "serve", "train", "datasets")
RAY = Path(sys.executable).parent / "ray"
UP_WITHIN_S = 90.0


def submission(folder: Path, **changes: object) -> Submission:
    """A run file in a folder that looks like the project."""
    (folder / "driver.py").touch()
    (folder / "a run.yaml").touch()
    return Submission(
        **{  # type: ignore[arg-type]
            "run_file": str(folder / "a run.yaml"),
            "working_dir": str(folder),
            "address": "http://127.0.0.1:1",
            **changes,
        }
    )


def test_the_command_survives_the_shell(tmp_path: Path) -> None:
    sent = submission(tmp_path, overrides=["prompts.system=Be brief; don't.", "seed=3"])
    assert shlex.split(sent.entrypoint()) == [
        *("python", "driver.py", "run", "a run.yaml"),
        *("--set", "prompts.system=Be brief; don't.", "--set", "seed=3"),
    ]


def test_neither_models_nor_runs_nor_caches_are_shipped(tmp_path: Path) -> None:
    env = submission(tmp_path, stop_wait_s=77).runtime_env({})
    assert {"/.venv", "/models", "/runs", "/.git", "/build", "__pycache__"} <= set(env["excludes"])
    assert env["working_dir"] == str(tmp_path)
    assert env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "77"}


def test_variables_come_from_the_shell_or_the_command_line(tmp_path: Path) -> None:
    sent = submission(tmp_path, variables=["HF_TOKEN", "RAYSTILL_HOME=/shared"])
    variables = sent.runtime_env({"HF_TOKEN": "x"})["env_vars"]
    assert (variables["HF_TOKEN"], variables["RAYSTILL_HOME"]) == ("x", "/shared")
    with pytest.raises(ConfigError, match="--env HF_TOKEN: is not set here"):
        sent.runtime_env({})


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "project"
    outside.mkdir()
    with pytest.raises(ConfigError, match=r"--working-dir: .* has no driver\.py"):
        submission(tmp_path, working_dir=str(outside)).entrypoint()
    (outside / "driver.py").touch()
    with pytest.raises(ConfigError, match="outside the working directory"):
        submission(tmp_path, working_dir=str(outside)).entrypoint()
    with pytest.raises(ConfigError, match="holds credentials"):
        submission(tmp_path, overrides=["store.path=s3://me:secret@bucket/x"]).entrypoint()
    with pytest.raises(ConfigError, match="is 0; expected 1 second"):
        submission(tmp_path, stop_wait_s=0).runtime_env({})


def test_a_mistake_in_the_run_file_is_found_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run_file(tmp_path, training={"learning_rat": 1})
    words = ["submit", str(run_file), "--address", "http://127.0.0.1:1"]
    assert driver.main(words) == driver.EXIT_REFUSED
    assert "training.learning_rat: unknown key" in capsys.readouterr().err


def test_an_address_where_nobody_answers_is_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "driver.py").touch()
    words = ["submit", str(write_run_file(tmp_path)), "--working-dir", str(tmp_path)]
    address = f"http://me:hunter22@127.0.0.1:{free_port()}"
    assert driver.main([*words, "--address", address]) == driver.EXIT_FAILED
    told = capsys.readouterr().err
    assert told.startswith("error: no job server answers at http://***@127.0.0.1:")
    assert "ray dashboard ray_config.yaml" in told
    assert "hunter22" not in told
    for wrong in ("ray://127.0.0.1:10001", "127.0.0.1:8265"):
        assert driver.main([*words, "--address", wrong]) == driver.EXIT_REFUSED
        assert "expected the URL of the cluster's dashboard" in capsys.readouterr().err


def told(status: str, code: int | None = None) -> SimpleNamespace:
    """Ray's account of a job that has ended."""
    return SimpleNamespace(status=status, driver_exit_code=code, message="Runtime env failed")


@pytest.mark.parametrize(
    ("job", "stopped_by", "code"),
    [
        (told("SUCCEEDED", 0), 0, 0),
        (told("SUCCEEDED", 0), signal.SIGINT, 0),  # It was done before the stop reached it.
        (told("FAILED", 2), 0, 2),
        (told("FAILED", 143), 0, 143),
        (told("FAILED", -9), 0, 137),
        (told("FAILED"), 0, 1),
        (told("STOPPED"), signal.SIGINT, 130),
        (told("STOPPED"), signal.SIGTERM, 143),
        (told("STOPPED"), 0, 143),  # By somebody else.
    ],
)
def test_the_exit_code_is_the_jobs_own(job: SimpleNamespace, stopped_by: int, code: int) -> None:
    assert exit_code(job, stopped_by) == code


class FlakyLog:
    """A job's log over a connection that breaks in the middle, once."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        for text in ("one\n", "two\n", "three\n"):
            yield text
            if self.connections == 1 and text == "two\n":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            await asyncio.sleep(0)


def test_a_broken_connection_neither_loses_nor_repeats_a_line() -> None:
    client, out = FlakyLog(), io.StringIO()
    log = LogTail(client, "job", out)  # type: ignore[arg-type]
    log.start()
    log.join(20)
    assert not log.is_alive()
    assert (client.connections, out.getvalue()) == (2, "one\ntwo\nthree\n")


def test_a_cluster_that_is_gone_is_given_up_with_the_way_to_look_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "LOST_AFTER_S", 0.0)

    def ask() -> None:
        raise ConnectionError("Connection refused")

    with pytest.raises(RunError, match="ray job logs --follow raysubmit_1"):
        submit.patiently(ask, "raysubmit_1")


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A running cluster that asks for ``TOKEN``, and a folder that ships the project."""

    url: str
    project: Path
    environment: dict[str, str]

    def command(self, run_file: Path, *options: str) -> list[str]:
        """``driver.py submit``, as a user types it in the project's folder."""
        words = [sys.executable, "driver.py", "submit", run_file.name, "--address", self.url]
        return [*words, "--python", sys.executable, *options]

    @contextmanager
    def started(self, command: list[str], **variables: str) -> Iterator["subprocess.Popen[str]"]:
        """The command in the project's folder; killed should the test leave it behind."""
        process = subprocess.Popen(
            command,
            cwd=self.project,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """``ray start --head`` on ports of its own, with token authentication."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    port = free_port()
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={port}", "--node-ip-address=127.0.0.1"]
    command += ["--object-store-memory=200000000", "--include-dashboard=true"]
    command += ["--labels=role=everything"]
    for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port"):
        command.append(f"--{name}={free_port()}")
    with ExitStack() as stack:
        # Sockets' paths are short: pytest's own folder is too deep.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp"))
        project = Path(folder) / "project"
        project.mkdir()
        for room in (*ROOMS, "raystill"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / room, project / room, ignore=ignored, symlinks=True)
        for name in ("driver.py", ".rayignore"):
            shutil.copy(ROOT / name, project / name)
        log = stack.enter_context(open(f"{folder}/head.log", "w"))
        process = subprocess.Popen(
            [*command, f"--temp-dir={folder}/ray"], env=environment, stdout=log, stderr=log
        )
        stack.callback(end, process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + UP_WITHIN_S
        while why := unreachable(url, 1.0):
            assert process.poll() is None, Path(f"{folder}/head.log").read_text()
            assert time.monotonic() < deadline, why
            time.sleep(0.5)
        yield Head(url, project, environment)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the head and all it started."""
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in reversed(started):
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, left = psutil.wait_procs(started, timeout=5)
    for one in left:
        one.kill()
    process.wait()


@pytest.mark.ray
@pytest.mark.faults
def test_a_submitted_run_is_stopped_by_ctrl_c_and_resumed_by_ray_job_submit(
    head: Head, tmp_path: Path
) -> None:
    synthetic = {"vocab_size": 49152, "response_tokens": 8, "delay_s": 0.5}
    written = write_run_file(
        head.project,
        teacher={"synthetic": synthetic, "label_selector": {"role": "everything"}},
        training={"label_selector": {"role": "in(everything, student)"}},
        output={"path": str(tmp_path / "run")},
    )
    files = RunFiles(tmp_path / "run")
    with head.started(head.command(written, "--stop-wait-s", "120")) as process:
        wait_for_step(process, files, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "1 teacher replica of CPU: 1 on role: everything" in out
    assert "Stopped after step" in out
    assert "submitted to http://127.0.0.1:" in err
    assert "stopping raysubmit_" in err
    done = files.steps()
    assert 0 < len(done) < 12
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint*"))

    plain = [str(RAY), "job", "submit", "--address", head.url, "--working-dir", str(head.project)]
    words = ["--", sys.executable, "driver.py", "run", written.name]
    with head.started([*plain, *words]) as process:
        again, told = process.communicate(timeout=200)
    assert process.returncode == 0, again + told
    assert files.steps() == list(range(1, 13))
    assert files.json("summary.json")["rows_trained"] == 48
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    shown = out + err + again + told
    assert TOKEN not in shown
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and not file.is_relative_to(tmp_path / "run" / "logs" / "ray"):
            assert TOKEN.encode() not in file.read_bytes(), file


SLOW_TO_STOP = """
import signal, sys, time
from pathlib import Path

def stop(*_):
    time.sleep(5)
    Path(sys.argv[-1].partition("=")[2]).touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.ray
@pytest.mark.faults
def test_a_stopped_job_has_the_time_it_was_given(head: Head, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(SLOW_TO_STOP)  # Ray's own wait is 3 seconds.
    written = write_run_file(tmp_path)
    words = head.command(written, "--working-dir", str(tmp_path), "--stop-wait-s", "30")
    words[words.index(written.name)] = str(written)
    saved = tmp_path / "saved"
    words += ["--set", f"output.path={saved}"]
    with head.started(words) as process:
        assert process.stdout is not None
        assert any("ready" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert saved.exists()


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.faults
def test_the_readmes_line_trains_the_tiny_student_with_vllm(head: Head, tmp_path: Path) -> None:
    """``ray job submit`` as the README prints it; only the address and the home are the test's."""
    readme = (ROOT / "README.md").read_text()
    [line] = [block for block in readme.split("```") if "--runtime-env-json" in block]
    line = line[line.index("ray job submit") :]
    assert "driver.py run configs/tiny.yaml" in line
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for old, new in (
        ("ray job submit", f"{RAY} job submit"),
        ("http://127.0.0.1:8265", head.url),
        ("$PWD/.venv/bin/python", sys.executable),
        ("'$PWD'", str(tmp_path)),
    ):
        assert old in line
        line = line.replace(old, new)
    job = subprocess.Popen(
        line, shell=True, cwd=ROOT, env=head.environment, stdout=PIPE, stderr=STDOUT, text=True
    )
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    run = tmp_path / "runs" / "tiny"
    summary = RunFiles(run).json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == 32
    assert AutoModelForCausalLM.from_pretrained(run / "student").config.num_hidden_layers == 1


@pytest.mark.ray
def test_what_the_job_refuses_comes_back_with_its_exit_code(head: Head, tmp_path: Path) -> None:
    written = write_run_file(head.project, output={"path": str(tmp_path / "run")})
    with head.started(head.command(written, "--set", "signal.top_k=50000")) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == driver.EXIT_REFUSED, out + err
    assert "signal.top_k: is 50000" in out


@pytest.mark.ray
def test_a_wrong_token_is_refused_without_showing_any(head: Head, tmp_path: Path) -> None:
    written = write_run_file(head.project, output={"path": str(tmp_path / "run")})
    wrong = "another-cluster-token-91ab"
    with head.started(head.command(written), RAY_AUTH_TOKEN=wrong) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == driver.EXIT_FAILED
    assert "asks for a token and did not take this one" in err
    assert wrong not in out + err
    assert TOKEN not in out + err
