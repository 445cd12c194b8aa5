"""Planted secrets: what a run writes and says holds neither tokens nor passwords of URIs."""

import json
import logging
import sys
from pathlib import Path

import pytest

import driver
from raystill.base.errors import Problem
from raystill.base.formatting import path
from raystill.base.logs import quiet_driver
from raystill.base.redact import redact, redact_uncaught_errors, redacted
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.output import check_earlier_run
from raystill.cluster.check.static import check_run_file
from raystill.config.load import config_text, load_config
from raystill.datasets.store.store import RowCounts
from tests.support.synthetic_run import write_run_file

SECRETS = {
    "RAY_AUTH_TOKEN": "planted-ray-token-1",
    "HF_TOKEN": "hf_PlantedHubToken2",
    "AWS_SECRET_ACCESS_KEY": "Planted/Secret+Key3",
}
PASSWORD = "planted-password-4"
STORE = f"s3://AKIAEXAMPLE:{PASSWORD}@bucket/store?region=eu-west-1"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def assert_clean(text: str) -> None:
    for secret in (*SECRETS.values(), PASSWORD, "AKIAEXAMPLE"):
        assert secret not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://ID:SECRET@bucket/x?region=a", "s3://***@bucket/x?region=a"),
        ("no file at s3://ID:SE/CR/ET+=@bucket/x, sorry", "no file at s3://***@bucket/x, sorry"),
        ("'https://token@host:8265/a', twice", "'https://***@host:8265/a', twice"),
        ("https://h/a?X-Amz-Signature=12&n=3", "https://h/a?X-Amz-Signature=***&n=3"),
        ("https://h/a?n=3&access_token=12", "https://h/a?n=3&access_token=***"),
        ("http://127.0.0.1:8265/a@b", "http://127.0.0.1:8265/a@b"),
        ("hf://datasets/me/words@main/a.jsonl", "hf://datasets/me/words@main/a.jsonl"),
        ("write to me@example.com", "write to me@example.com"),
    ],
)
def test_credentials_leave_a_uri_and_nothing_else_does(text: str, shown: str) -> None:
    assert redact(text, {}) == shown
    assert redact(shown, {}) == shown


def test_a_secret_variable_is_named_instead_of_shown() -> None:
    shown = redact(f"401 for {SECRETS['HF_TOKEN']} and {SECRETS['AWS_SECRET_ACCESS_KEY']}")
    assert shown == "401 for $HF_TOKEN and $AWS_SECRET_ACCESS_KEY"
    ordinary = {"TOKENIZERS_PARALLELISM": "disabled", "RAY_AUTH_TOKEN_PATH": "/root/.ray/token"}
    assert redact("disabled at /root/.ray/token", ordinary) == "disabled at /root/.ray/token"


def test_settings_that_are_secrets_by_name_are_hidden_and_numbers_are_not() -> None:
    given = {"engine_args": {"hf_token": "x", "max_num_batched_tokens": 4}, "stop_token_ids": [1]}
    assert redacted(given) == {
        "engine_args": {"hf_token": "***", "max_num_batched_tokens": 4},
        "stop_token_ids": [1],
    }


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run_file(
        tmp_path, teacher={"engine_args": {"hf_token": SECRETS["HF_TOKEN"]}}, store={"path": STORE}
    )


def test_nothing_a_run_writes_holds_a_secret(run_file: Path) -> None:
    from raystill.cluster.coordinator.snapshot import Snapshot
    from raystill.cluster.job import manifest
    from raystill.cluster.report import summary

    checked = check_run_file(str(run_file))
    assert not checked.problems
    config, folder, prepared = checked.config, checked.folder, checked.prepared
    assert config is not None
    assert folder is not None
    assert prepared is not None
    assert prepared.store_path == STORE  # Used as it was given: only what is shown is redacted.
    manifest.write_folder(config, folder, prepared)
    nothing = {"training": RowCounts(), "evaluation": RowCounts()}
    summary.write_summary(folder, summary.RunResult(Snapshot(), prepared, nothing))
    written = [file for file in Path(folder.path).rglob("*") if file.is_file()]
    assert {file.name for file in written} >= {"config.yaml", "manifest.json", "summary.json"}
    for file in written:
        assert_clean(file.read_bytes().decode(errors="replace"))
    assert json.loads(folder.read_text("manifest.json"))["teacher"] == config.teacher.model
    assert check_earlier_run(config, folder) == []


def test_a_run_with_credentials_in_an_identity_is_resumed_also_with_new_ones(
    run_file: Path, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    where = "prompts.path=s3://{}@bucket/prompts.jsonl"
    first = load_config(run_file, [where.format("me:one")])
    folder.write_text("config.yaml", config_text(first))
    assert "me:one" not in folder.read_text("config.yaml")
    rotated = load_config(run_file, [where.format("me:two")])
    assert check_earlier_run(rotated, folder) == []
    other = load_config(run_file, ["prompts.path=s3://me:one@bucket/others.jsonl"])
    (problem,) = check_earlier_run(other, folder)
    assert_clean(problem.message)
    assert "s3://***@bucket/others.jsonl" in problem.message


def test_errors_name_neither_tokens_nor_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    driver.refuse([Problem("store.path", f"{STORE} cannot be written")])
    assert driver.main(["report", f"runs/{SECRETS['HF_TOKEN']}"]) == driver.EXIT_FAILED
    shown = capsys.readouterr()
    assert_clean(shown.err + shown.out)
    assert "store.path: s3://***@bucket/store?region=eu-west-1 cannot be written" in shown.err
    assert "runs/$HF_TOKEN has no summary.json" in shown.err
    assert_clean(repr(RunFolder(STORE)) + path(STORE))


def test_a_traceback_that_ends_the_process_is_redacted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    redact_uncaught_errors()
    try:
        raise OSError(f"AWS refused {SECRETS['AWS_SECRET_ACCESS_KEY']} for {STORE}")
    except OSError as error:
        sys.excepthook(OSError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "refused $AWS_SECRET_ACCESS_KEY for s3://***@bucket" in shown


def test_log_records_are_redacted(tmp_path: Path) -> None:
    restore = quiet_driver(tmp_path / "driver.log")
    try:
        logging.getLogger("ray").warning("opening %s with %s", STORE, SECRETS["RAY_AUTH_TOKEN"])
        logging.getLogger("ray").warning("100 % of a plain line")
    finally:
        restore()
    log = (tmp_path / "driver.log").read_text()
    assert_clean(log)
    assert "opening s3://***@bucket/store?region=eu-west-1 with $RAY_AUTH_TOKEN" in log
    assert "100 % of a plain line" in log
