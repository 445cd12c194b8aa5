"""Run folders whose files are broken: one sentence and the right exit status, from every reader.

What an earlier start has left is checked before a run is paid for, and never ends one that is.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import driver
from raystill.base.errors import RunError
from raystill.base.records import BrokenFile, MetricsLog, read_lines, read_object
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.check.static import check_run_file
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report import summary, tables
from raystill.config.load import config_text, load_config
from raystill.datasets.store.store import RowCounts
from tests.support.end_to_end import ROOT
from tests.support.sound_run import SOUND as SOUND_RUN

SOUND = SOUND_RUN | {"output": {"path": "run"}}
EVALUATION = {"step": 0, "kl_nats_per_token": 1.5, "top1_agreement": 0.5, "num_tokens": 9}
ANSWER = {"step": 0, "row": 0, "prompt": "[/red][bold]user\n", "teacher": "[/b]", "student": "[x]"}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    """The folder in which a run has ended, as the driver writes it; and what was prepared of it."""
    place = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("RAYSTILL_HOME", raising=False)
        rows = [{"prompt": f"Count to {i}."} for i in range(8)]
        (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (place / "sound.yaml").write_text(yaml.safe_dump(SOUND))
        folder = RunFolder("run").ensure()
        folder.write_text("config.yaml", config_text(load_config("sound.yaml")))
        folder.write_text("manifest.json", json.dumps({"run_id": "a"}))
        folder.write_text("evaluation.jsonl", json.dumps(EVALUATION) + "\n")
        folder.write_text("answers.jsonl", json.dumps(ANSWER) + "\n")
        folder.write_text("metrics.jsonl", json.dumps({"step": 1, "rows": 4, "loss": 1.0}) + "\n")
        prepared = check_run_file("sound.yaml", ["output.path=elsewhere"]).prepared
        assert prepared is not None
        write_summary(folder, prepared)
    return place, prepared


@pytest.fixture
def run(ended: tuple[Path, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder, beside its run file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    shutil.copytree(ended[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def write_summary(folder: RunFolder, prepared: Prepared) -> dict[str, Any]:
    nothing = {"training": RowCounts(), "evaluation": RowCounts()}
    return summary.write_summary(folder, summary.RunResult(Snapshot(), prepared, nothing))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    status = driver.main(words)
    out = capsys.readouterr()
    text = out.out + out.err
    assert "Traceback" not in text and "unexpected:" not in text, text
    assert len(out.err) <= 4000
    return status, text


def spoil(file: Path, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


BROKEN: dict[str, bytes | None] = {
    "empty": b"",
    "cut": b'{"status": "comp',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "a number": b"3",
    "not UTF-8": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "5,000 digits": b'{"wall_s": ' + b"9" * 5000 + b"}",
    "a folder": None,
}


def test_the_run_is_reported_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(capsys, "report", "run")
    assert status == 0 and "[/b]" in text, "what stands in brackets is data, no markup"
    assert told(capsys, "report", "--json", "run")[0] == 0
    assert told(capsys, "report", "run", "run")[0] == 0
    assert told(capsys, "check", "--static", "sound.yaml")[0] == 0


@pytest.mark.parametrize("kind", BROKEN)
def test_a_summary_that_is_broken(run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    spoil(run / "summary.json", BROKEN[kind])
    for words in (["report", "run"], ["report", "--json", "run"], ["report", "run", "run"]):
        status, text = told(capsys, *words)
        assert status == driver.EXIT_FAILED
        assert "summary.json" in text and "restore it" in text
    status, text = told(capsys, "check", "--static", "sound.yaml")
    assert status == driver.EXIT_REFUSED and "output.path" in text and "summary.json" in text


@pytest.mark.parametrize("name", ["summary.json", "answers.jsonl"])
def test_a_file_that_is_too_large_is_not_read(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It is of zeros that take no room on the disk; reading it would take all memory."""
    os.truncate(run / name, 900 << 30)
    status, text = told(capsys, "report", "run")
    assert status == driver.EXIT_FAILED
    assert name in text and "966,367,641,600 bytes, expected at most" in text


def test_a_copy_of_settings_with_aliases_of_aliases_is_left_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written out, it has 9 ** 9 values."""
    tens = [f"c{i}: &c{i} [{', '.join([f'*c{i - 1}' if i else 'x'] * 9)}]" for i in range(9)]
    (run / "config.yaml").write_text("\n".join(tens))
    start = time.process_time()
    assert told(capsys, "report", "run")[0] == 0
    assert time.process_time() - start < 5


WRONG = ["x", [], {}, [1], None, True, -1, 1e308, {"a": "b"}, "[/red]"]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_summary_of_other_types(
    run: Path, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    """Each of its entries in turn: reported, or refused in a sentence."""
    whole = json.loads((run / "summary.json").read_text())
    for name in whole:
        (run / "summary.json").write_text(json.dumps(whole | {name: value}))
        with suppress(RunError):
            tables.print_report(RunFolder("run"))
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(whole, value)))
    assert told(capsys, "report", "run")[0] in (0, 1)  # The page too.
    (run / "summary.json").write_text("{}")
    status, text = told(capsys, "report", "run")
    assert status == 1 and "not what a run writes" in text


@pytest.mark.parametrize("name", ["evaluation.jsonl", "answers.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("kind", BROKEN)
def test_records_that_are_broken(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    content = BROKEN[kind]
    spoil(run / name, content if content is None else content + b"\n{}\n")
    status, text = told(capsys, "report", "run")
    assert status in (0, 1) and (status == 0 or name in text or "not what a run writes" in text)


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_records_of_other_types(run: Path, capsys: pytest.CaptureFixture[str], value: Any) -> None:
    for name, record in (("evaluation.jsonl", EVALUATION), ("answers.jsonl", ANSWER)):
        before = (run / name).read_bytes()
        for key in record:
            (run / name).write_text(json.dumps(record | {key: value}) + "\n")
            with suppress(RunError):
                tables.print_report(RunFolder("run"))
        (run / name).write_text(json.dumps(dict.fromkeys(record, value)) + "\n")
        assert told(capsys, "report", "run")[0] in (0, 1), name
        (run / name).write_bytes(before)


EARLIER = ["config.yaml", "manifest.json", "prompts/train.parquet"]


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("kind", BROKEN)
def test_what_an_earlier_start_has_left(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    if (name, kind) == ("config.yaml", "5,000 digits"):
        return  # YAML, of another run: the test of other runs has it.
    spoil(run / name, BROKEN[kind])
    status, text = told(capsys, "check", "--static", "sound.yaml")
    assert status == driver.EXIT_REFUSED
    assert name in text and "output.path" in text


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "a folder"])
def test_a_run_that_is_paid_writes_its_summary(
    ended: tuple[Path, Prepared], run: Path, kind: str
) -> None:
    """Whatever stands in the way: what cannot be read of it counts as nothing."""
    spoil(run / "summary.json", BROKEN[kind])
    assert write_summary(RunFolder("run"), ended[1])["status"] == "completed"


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_nor_do_earlier_totals_of_other_types_end_it(
    ended: tuple[Path, Prepared], run: Path, value: Any
) -> None:
    whole = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(whole, value)))
    assert write_summary(RunFolder("run"), ended[1])["status"] == "completed"


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 300, "/".join(["x" * 200] * 30), "\udcff"], ids=ascii
)
@pytest.mark.parametrize("command", [["report"], ["report", "--json"], ["store", "list"]])
def test_a_path_that_no_folder_has(
    run: Path, capsys: pytest.CaptureFixture[str], command: list[str], path: str
) -> None:
    status, text = told(capsys, *command, path)
    assert status == driver.EXIT_FAILED and text.startswith("error: the path ")


def test_readers_say_which_file_and_line(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(BrokenFile, match=r"a\.json is a list"):
        read_object(folder, "a.json")
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n3\n{"step": 2}\n')
    with pytest.raises(BrokenFile, match=r"a\.jsonl, line 2, is not JSON"):
        read_lines(folder, "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"st')
    assert read_lines(folder, "a.jsonl") == [{"step": 1}]


def test_a_restart_moves_lines_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    log = MetricsLog(RunFolder(str(tmp_path)))
    assert log.discard_beyond(1) == 2
    assert read_lines(RunFolder(str(tmp_path)), "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("words", [["fields"], ["report", "--json", "run"], ["report", "run"]])
def test_a_reader_that_leaves_sees_no_traceback(run: Path, words: list[str]) -> None:
    """``| head -1``: what a shell calls 141, and nothing on standard error."""
    command = [sys.executable, str(ROOT / "driver.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(60) == driver.EXIT_CLOSED_PIPE
    assert error == ""
