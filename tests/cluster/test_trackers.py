"""Trackers, read back with their own packages (make trackers; without them these are skipped), and
what the check says before a run of one that could not take it.
"""

import json
import os
import posixpath
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raystill.base.run_folder import RunFolder
from raystill.cluster.check import trackers as check
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report import trackers
from raystill.cluster.report.trackers import MlflowTracker, Trackers, mlflow_name
from raystill.config.training import OutputConfig

RUN_ID = "0123456789abcdef0123456789abcdef"
SECRET = "tr0ub4dor-and-three"
PAGE = "<!doctype html><p>what was learned</p>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder as a run has it when it begins; secrets in the environment and the command."""
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["driver.py", "--set", f"store.path=s3://me:{SECRET}@b/x"])
    folder = RunFolder(str(tmp_path / "runs" / "demo")).ensure()
    config = {"seed": 7, "teacher": {"model": "big", "sampling": {"max_tokens": 8}}}
    folder.write_text("config.yaml", yaml.safe_dump(config))
    folder.write_text("manifest.json", json.dumps({"run_id": RUN_ID, "commit": "c0ffee"}))
    folder.write_text("status.json", json.dumps({"state": "running"}))
    return folder


def step(number: int, loss: float | None) -> Snapshot:
    evaluation = {"step": 0, "kl_nats_per_token": 2.0, "bound": "lower"}
    return Snapshot(progress={"step": number, "loss": loss, "time": 1.0}, evaluation=evaluation)


def run_once(folder: RunFolder, config: OutputConfig, steps: list[int], state: str) -> list[str]:
    """One start of a run, as the driver's: what the trackers said of themselves."""
    said: list[str] = []
    with Trackers(config, folder, said.append) as passed_on:
        passed_on.update(Snapshot())
        for number in steps:
            passed_on.update(step(number, 4.0 - number))
        if state != "failed":
            summary = {"status": state, "wall_s": 9.5, "student": {"tokens": 640}, "dropped": {}}
            summary["filtered"] = {"judge (no verdict)": 3}
            folder.write_text("summary.json", json.dumps(summary))
        folder.write_text("status.json", json.dumps({"state": state}))
        folder.write_text("report.html", PAGE)
    return said


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline file: LevelDB's log format after W&B's own seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if 32768 - at % 32768 < 7:  # No header begins in a block's last six bytes.
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # Whole, or the last part.
            yield Record.FromString(part)
            part = b""


def test_an_offline_folder_of_wandb_holds_the_run(folder: RunFolder) -> None:
    pytest.importorskip("wandb")
    config = OutputConfig.model_validate({"wandb": {"project": "p", "mode": "offline"}})
    assert run_once(folder, config, [1, 2], "stopped") == []
    time.sleep(1.1)  # Its folders are named by the second.
    assert run_once(folder, config, [2, 3], "completed") == []  # Resumed: step 2 is trained again.
    first, second = sorted(folder.logs.glob("wandb/offline-run-*"))
    seen: list[tuple[int, float]] = []
    for one, final in ((first, "stopped"), (second, "completed")):
        assert one.name.endswith(RUN_ID)
        records = list(wandb_records(one / f"run-{RUN_ID}.wandb"))
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        configured = {c.key: json.loads(c.value_json) for c in run.config.update}
        assert configured["teacher"] == {"model": "big", "sampling": {"max_tokens": 8}}
        assert (run.project, run.display_name, configured["commit"]) == ("p", "demo", "c0ffee")
        assert run.host == "driver"
        lines = [
            {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
            for r in records
            if r.WhichOneof("record_type") == "history"
        ]
        seen += [(x["train/step"], x["train/loss"]) for x in lines if "train/loss" in x]
        assert any(line.get("held_out/kl_nats_per_token") == 2.0 for line in lines)
        summary = {
            i.key: json.loads(i.value_json)
            for r in records
            if r.WhichOneof("record_type") == "summary"
            for i in r.summary.update
        }
        assert (summary["state"], summary["final/student.tokens"]) == (final, 640)
        assert (one / "files" / "report.html").read_text() == PAGE
        (panel,) = one.glob("files/media/html/report_*.html")
        assert PAGE in panel.read_text()
    assert seen == [(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)]
    kept = [path.read_bytes() for path in folder.logs.rglob("*") if path.is_file()]
    assert len(kept) >= 8
    assert not any(SECRET.encode() in data for data in kept)


def test_a_database_of_mlflow_holds_the_run(folder: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = OutputConfig.model_validate({"mlflow": {"tracking_uri": uri, "experiment": "e"}})
    assert run_once(folder, config, [1, 2], "failed") == []
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("demo", "FAILED")
    assert run_once(folder, config, [2, 3], "completed") == []
    (run,) = client.search_runs([experiment.experiment_id])  # The same one went on.
    assert run.info.status == "FINISHED"
    assert run.data.params["teacher.sampling.max_tokens"] == "8"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)]
    assert run.data.metrics["final/student.tokens"] == 640
    assert run.data.metrics["final/filtered.judge _no verdict_"] == 3
    assert run.data.metrics["held_out/kl_nats_per_token"] == 2.0
    page = client.download_artifacts(run.info.run_id, "report.html")
    assert Path(page).read_text() == PAGE
    assert run.info.artifact_uri.startswith(f"file://{tmp_path}/")  # Not in the current folder.
    assert SECRET.encode() not in (tmp_path / "mlflow.db").read_bytes()


def test_a_database_of_trackio_holds_the_run(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "trackio" not in sys.modules:  # It reads this when it is imported.
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config = OutputConfig.model_validate({"trackio": {"project": "p"}})
    assert run_once(folder, config, [1, 2], "stopped") == []
    assert run_once(folder, config, [2, 3], "completed") == []
    name = f"demo-{RUN_ID[:8]}"
    assert SQLiteStorage.get_runs("p") == [name]
    logs = SQLiteStorage.get_logs("p", name)
    seen = [(line["step"], line["train/loss"]) for line in logs if "train/loss" in line]
    assert seen == [(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)]
    assert any(line.get("final/student.tokens") == 640 for line in logs)
    assert SQLiteStorage.get_run_config("p", name)["teacher"]["model"] == "big"
    blobs = [p.read_bytes() for p in (tmp_path / "trackio").rglob("*") if p.is_file()]
    assert PAGE.encode() in blobs
    assert not any(SECRET.encode() in data for data in blobs)


class MlflowClient:
    """MLflow's client, as far as a run uses it; refuses what MLflow refuses, and what ``fails``."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.metrics: dict[str, float] = {}
        self.artifacts: list[str] = []
        self.ended = ""

    def log_batch(self, run: str, metrics: Any) -> None:
        if self.fails == "figures":
            raise ConnectionError("no such server")
        for name, value, _, _ in metrics:
            assert re.match(r"^[/\w.\- :]*$", name), name
            assert posixpath.normpath(name) == name and len(name) <= 250, name
            self.metrics[name] = value

    def log_artifact(self, run: str, path: str) -> None:
        if self.fails == "files":
            raise OSError("no space")
        self.artifacts.append(path)

    def set_terminated(self, run: str, status: str) -> None:
        self.ended = status


def mlflow_of(client: MlflowClient) -> MlflowTracker:
    made = MlflowTracker.__new__(MlflowTracker)
    made._client, made._id, made._metric = client, "r", lambda *given: given
    return made


def test_a_figure_whose_name_mlflow_refuses_gets_another() -> None:
    client = MlflowClient()
    odd = {"filtered.judge (no verdict)": 2.0, "dropped.größe/100 %": 1.0, "wall_s": 9.5}
    odd |= {"a//b/../c": 1.0, "x" * 300: 1.0, "filtered.f.py:keep": 1.0, "line\n": 1.0}
    mlflow_of(client).finish(odd, [Path("report.html")], "completed")
    names = ["final/filtered.judge _no verdict_", "final/dropped.größe/100 _", "final/wall_s"]
    names += ["final/a/c", f"final/{'x' * 244}", "final/filtered.f.py:keep", "final/line_"]
    assert list(client.metrics) == names
    assert (client.artifacts, client.ended) == (["report.html"], "FINISHED")
    assert [mlflow_name(name) for name in ("", "..", "/")] == ["_", "_", "_"]


@pytest.mark.parametrize(("fails", "sent"), [("figures", ["report.html"]), ("files", [])])
def test_a_run_of_mlflow_ends_whatever_could_not_be_sent(fails: str, sent: list[str]) -> None:
    client = MlflowClient(fails)
    with pytest.raises(OSError, match="no s"):
        mlflow_of(client).finish({"wall_s": 9.5}, [Path("report.html")], "stopped")
    assert (client.artifacts, client.ended) == (sent, "KILLED")


class Fake:
    """A tracker that fails, or waits, where it is told to."""

    def __init__(self, fails: str = "", waits: threading.Event | None = None) -> None:
        self.fails, self.waits = fails, waits
        self.written: list[tuple[str, int]] = []
        self.finished: list[str] = []

    def write(self, group: str, figures: dict[str, float], step: int) -> None:
        if self.waits is not None:
            self.waits.wait()
        if self.fails == "write":
            raise ConnectionError(f"{SECRET} was refused by https://me:pw@host")
        self.written.append((group, step))

    def finish(self, figures: dict[str, float], files: list[Path], state: str) -> None:
        self.finished.append(state)
        if self.fails == "finish":
            raise OSError("no such server")


@pytest.mark.parametrize("fails", ["open", "write", "finish"])
def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    bad, good = Fake(fails), Fake()

    def open_bad(_: RunFolder) -> Fake:
        if fails == "open":
            raise ValueError("the key is refused")
        return bad

    made = {"Bad": open_bad, "Good": lambda _: good}
    monkeypatch.setattr(trackers, "makers", lambda _: made)
    said = run_once(folder, OutputConfig(), [1, 2, 3], "completed")
    (line,) = said
    assert line.startswith("Bad is left out from here on (")
    assert SECRET not in line and "me:pw" not in line
    assert good.written == [("train", 1), ("held_out", 0), ("train", 2), ("train", 3)]
    assert good.finished == ["completed"]


def test_a_tracker_that_hangs_neither_delays_a_run_nor_its_end_for_long(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(trackers, "makers", lambda _: {"Slow": lambda _: Fake(waits=release)})
    monkeypatch.setattr(trackers, "FINISH_S", 0.3)
    monkeypatch.setattr(trackers, "MOST_WAITING", 4)
    began = time.monotonic()
    said = run_once(folder, OutputConfig(), list(range(1, 40)), "completed")
    release.set()
    assert time.monotonic() - began < 5
    assert len(said) == 2
    assert "does not keep up" in said[0]
    assert "is left; the run is complete in" in said[1]


def test_nothing_is_started_without_a_tracker(folder: RunFolder) -> None:
    before = threading.active_count()
    with Trackers(OutputConfig(), folder, print) as passed_on:
        passed_on.update(step(1, 1.0))
        assert threading.active_count() == before


def found(output: dict[str, Any], **environment: str) -> dict[str, str]:
    """The problems of an ``output`` section, by setting."""
    config = OutputConfig.model_validate(output)
    environment.setdefault("HOME", "/nowhere")
    return {p.where: p.message for p in check.check_trackers(config, environment)}


def test_a_missing_package_is_found_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "is_installed", lambda name: name == "mlflow")
    database = {"tracking_uri": "sqlite:////tmp/x.db"}
    said = found({"wandb": {"mode": "offline"}, "mlflow": database, "trackio": {}})
    assert set(said) == {"output.wandb", "output.mlflow", "output.trackio"}
    assert "pip install 'raystill[wandb]'" in said["output.wandb"]
    assert "needs the package sqlalchemy and alembic, which" in said["output.mlflow"]
    assert found({"mlflow": {"tracking_uri": "http://host:5000"}}) == {}


def test_a_folder_that_a_tracker_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not check.is_installed("left_behind")
    assert check.is_installed("json")
    assert not check.is_installed("no_such_package")


def test_wandb_online_needs_a_key_that_nobody_has_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "is_installed", lambda _: True)
    home = str(tmp_path)
    assert "no key for api.wandb.ai" in found({"wandb": {}}, HOME=home)["output.wandb.mode"]
    own = {"HOME": home, "WANDB_BASE_URL": "https://wandb.example.org:8080/api"}
    assert "no key for wandb.example.org" in found({"wandb": {}}, **own)["output.wandb.mode"]
    assert found({"wandb": {"mode": "offline"}}, HOME=home) == {}
    assert found({"wandb": {}}, HOME=home, WANDB_API_KEY="k") == {}
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password k\n")
    assert found({"wandb": {}}, **own) == {}
    assert found({"wandb": {}}, HOME=home) != {}
    assert found({"wandb": {}}, **own, NETRC=str(tmp_path / "none")) != {}


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        (None, "neither is MLFLOW_TRACKING_URI"),
        ("./mlruns", "(./mlruns) is a folder, which MLflow no longer writes to"),
        ("file:///mlruns", "is a folder"),
        ("sqlite:////no/such/folder/m.db", "folder /no/such/folder, which does not exist"),
    ],
)
def test_mlflow_needs_a_place_that_it_writes_to(
    uri: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "is_installed", lambda _: True)
    (message,) = found({"mlflow": {"tracking_uri": uri}}).values()
    assert sentence in message
    assert found({"mlflow": {}}, MLFLOW_TRACKING_URI="http://host:5000") == {}


def test_a_relative_database_is_refused_in_a_copy_that_ray_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "is_installed", lambda _: True)
    relative = {"mlflow": {"tracking_uri": "sqlite:///m.db"}}
    assert found(relative) == {}
    job = tmp_path / "runtime_resources" / "working_dir_files" / "package"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert "a copy that Ray deletes" in found(relative)["output.mlflow.tracking_uri"]
    assert os.path.isdir(job)
