"""The shipped run file in batches, against a real server, its driver killed while one is open.

The server is vLLM's own, with the tiny teacher, which has no batches: a front takes them and asks
it line by line. It counts what was answered and what that costs.
"""

import os
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.batch_front import batch_front
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, children_of, wait_until_gone
from tests.support.synthetic_run import started, wait_for
from tests.support.vllm_server import vllm_server

pytestmark = [
    *(pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults),
    pytest.mark.timeout(1200),
]

KEY = "planted-batch-key-7c41fa90"
RUN_FILE = ROOT / "configs" / "api.yaml"
NAMES = ("train", "held_out")
HALF = 0.5  # The price of a batch.
ENDS_WITHIN_S = 900


def test_batches_of_a_real_server_are_paid_once_across_a_killed_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", KEY)
    prices = yaml.safe_load(RUN_FILE.read_text())["teacher"]["api"]["prices"]
    in_batches = {name: HALF * prices[name] for name in ("input", "output")}
    with (
        vllm_server(tmp_path / "server.log") as url,
        batch_front(url, KEY, in_batches) as front,
    ):
        settings = {
            "teacher.api.base_url": front.url,
            "teacher.api.model": "large",
            "teacher.api.batch": "{max_rows: 16, gather_s: 2, poll_s: 0.5, price_factor: 0.5}",
            "teacher.model": TEACHER,
            "prompts.limit": 52,
            "output.path": tmp_path / "run",
        }
        changes = [f"{name}={value}" for name, value in settings.items()]
        front.held = True
        with started(RUN_FILE, *changes, own_group=True) as process:
            wait_for(process, "an open batch", lambda: any(front.looks.values()))
            wait_for(process, "an answer", lambda: bool(front.paid))
            family = children_of(process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        wait_until_gone(family)
        opened, looks = len(front.batches), Counter(front.looks)
        front.script.cuts = Counter({"GET /batches": 1, "GET /files": 1})  # Of the next start.
        with started(RUN_FILE, *changes) as process:
            waits = [name for name, number in looks.items() if number]
            wait_for(
                process,
                "a look at the same batches",
                lambda: all(front.looks[name] > looks[name] for name in waits),
            )
            front.held = False
            stdout, stderr = process.communicate(timeout=ENDS_WITHIN_S)
            assert process.returncode == 0, stdout + stderr
    files = RunFiles(tmp_path / "run")
    tables = [pq.read_table(files.folder / "prompts" / f"{n}.parquet") for n in NAMES]
    rows, held_out = map(len, tables)
    assert len(front.paid) == rows + held_out
    assert set(front.paid.values()) == {1}, "an answer was paid for twice"
    assert len(front.batches) > opened >= 1
    assert front.without_usage and front.failed, "a fault did not come to pass"
    summary = files.json("summary.json")
    assert (summary["status"], summary["rows_trained"]) == ("completed", rows)
    assert not any(summary["dropped"].values())
    told = summary["api"]
    assert told["requests"] == rows + held_out
    assert told["cost"] == pytest.approx(front.cost, rel=0.02)
    assert told["usage_estimated"] == front.without_usage
    assert told["not_answered"] == front.failed.total()
    catalogue = TeacherStore(str(tmp_path / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (rows + held_out, 0)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in written if KEY.encode() in p.read_bytes()]
    assert KEY not in stdout + stderr
