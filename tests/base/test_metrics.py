"""The run's JSONL records: whole lines, surviving steps only, uploads for remote folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from raystill.base.records import MetricsLog, plain, read_lines
from raystill.base.run_folder import RunFolder


class RemoteFolder:
    """A run folder that, like an object store, only takes whole files."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = "s3://bucket/run"
        self.local = None
        self.is_local = False
        self.logs = tmp_path / "logs"
        self.files: dict[str, str] = {}

    def exists(self, name: str) -> bool:
        return name in self.files

    def read_text(self, name: str) -> str:
        return self.files[name]

    def write_text(self, name: str, data: str) -> None:
        self.files[name] = data


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run")).ensure()


def test_appended_lines_are_read_back_in_order(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1 / step})
    assert [line["step"] for line in read_lines(folder, "metrics.jsonl")] == [1, 2, 3]


def test_a_missing_file_has_no_lines(folder: RunFolder) -> None:
    assert read_lines(folder, "evaluation.jsonl") == []


def test_numpy_scalars_become_numbers_and_non_finite_ones_null(folder: RunFolder) -> None:
    MetricsLog(folder).append(
        {"step": np.int64(1), "loss": np.float32(0.5), "norm": float("nan"), "x": (np.inf, "a")}
    )
    text = folder.read_text("metrics.jsonl")
    assert json.loads(text) == {"step": 1, "loss": 0.5, "norm": None, "x": [None, "a"]}


def test_torch_scalars_become_numbers() -> None:
    torch = pytest.importorskip("torch")
    assert plain({"loss": torch.tensor(0.25)}) == {"loss": 0.25}


def test_steps_beyond_the_restored_one_move_to_the_discarded_file(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    for step in range(1, 6):
        log.append({"step": step})
    assert log.discard_beyond(3) == 2
    log.append({"step": 4, "again": True})
    kept = read_lines(folder, "metrics.jsonl")
    assert [line["step"] for line in kept] == [1, 2, 3, 4]
    assert kept[-1]["again"]
    assert [line["step"] for line in read_lines(folder, "metrics.discarded.jsonl")] == [4, 5]


def test_discarding_twice_keeps_what_was_discarded_first(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    log.append({"step": 2, "life": 1})
    log.discard_beyond(1)
    log.append({"step": 2, "life": 2})
    log.discard_beyond(1)
    lives = [line["life"] for line in read_lines(folder, "metrics.discarded.jsonl")]
    assert lives == [1, 2]


def test_nothing_to_discard_leaves_no_discarded_file(folder: RunFolder) -> None:
    log = MetricsLog(folder)
    log.append({"step": 1})
    assert log.discard_beyond(1) == 0
    assert not folder.exists("metrics.discarded.jsonl")


def test_an_evaluation_of_the_untrained_student_survives_a_restart_from_the_start(
    folder: RunFolder,
) -> None:
    log = MetricsLog(folder, "evaluation.jsonl")
    log.append({"step": 0})
    log.append({"step": 12})
    log.discard_beyond(0)
    assert read_lines(folder, "evaluation.jsonl") == [{"step": 0}]
    assert folder.exists("evaluation.discarded.jsonl")


def test_half_a_line_left_by_a_crash_does_not_spoil_the_next(folder: RunFolder) -> None:
    MetricsLog(folder).append({"step": 1})
    with open(folder.join("metrics.jsonl"), "a") as file:
        file.write('{"step": 2, "lo')
    assert read_lines(folder, "metrics.jsonl") == [{"step": 1}]
    log = MetricsLog(folder)
    log.discard_beyond(1)
    log.append({"step": 2})
    assert read_lines(folder, "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_named(folder: RunFolder) -> None:
    folder.write_text("metrics.jsonl", '{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_lines(folder, "metrics.jsonl")


def test_a_remote_folder_gets_the_whole_file_at_each_upload(tmp_path: Path) -> None:
    folder = RemoteFolder(tmp_path)
    log = MetricsLog(folder)
    log.append({"step": 1})
    assert folder.files == {}
    log.upload()
    log.append({"step": 2})
    log.upload()
    assert [line["step"] for line in read_lines(folder, "metrics.jsonl")] == [1, 2]


def test_a_restart_elsewhere_continues_the_uploaded_file(tmp_path: Path) -> None:
    folder = RemoteFolder(tmp_path)
    folder.files["metrics.jsonl"] = '{"step": 1}\n{"step": 2}\n'
    log = MetricsLog(folder)
    assert log.discard_beyond(1) == 1
    log.append({"step": 2, "again": True})
    log.upload()
    assert [line["step"] for line in read_lines(folder, "metrics.jsonl")] == [1, 2]
    assert "metrics.discarded.jsonl" in folder.files
