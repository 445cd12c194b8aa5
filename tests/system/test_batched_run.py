"""A whole run whose answers come in batches, its driver killed while one is open."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.batch_service import BatchService, batch_service
from tests.support.end_to_end import TEACHER, RunFiles, children_of, drive, wait_until_gone
from tests.support.synthetic_run import started, wait_for, write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults]

ROWS, HELD_OUT, A_BATCH = 20, 4, 8
NEVER = 1_000_000
PRICES = {"input": 1.0, "output": 4.0}


def batched_run(folder: Path, service: BatchService) -> Path:
    """A run file whose teacher is this service, asked in small batches."""
    file = write_run_file(folder)
    config = yaml.safe_load(file.read_text())
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"question {i}"} for i in range(ROWS + HELD_OUT)]
    path.write_text("\n".join(map(json.dumps, rows)))
    batch = {"max_rows": A_BATCH, "gather_s": 1.0, "poll_s": 0.5, "price_factor": 0.5}
    config["teacher"] = {
        "model": str(TEACHER),
        "engine": "api",
        "sampling": {"max_tokens": 64},
        "api": {
            **{"base_url": service.url, "model": "m", "api_key_env": None},
            **{"batch": batch, "prices": PRICES},
        },
    }
    config["prompts"] = {"path": str(path)}
    config |= {"signal": {"kind": "text"}, "objective": {"cross_entropy": 1.0}}
    config["evaluation"] = {"held_out_rows": HELD_OUT, "free_running": {"rows": 2}}
    config["store"] = {"path": str(folder / "store")}
    config["terms"] = {"teacher_licence": "apache-2.0"}
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_driver_killed_while_a_batch_is_open_pays_no_answer_twice(tmp_path: Path) -> None:
    with batch_service() as service:
        service.script.polls = NEVER
        file = batched_run(tmp_path, service)
        with started(file) as process:
            wait_for(process, "an open batch", lambda: any(service.looks.values()))
            family = children_of(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
        wait_until_gone(family)
        opened, paid = len(service.batches), Counter(service.paid)
        assert opened >= 1 and paid, "nothing was asked before the kill"
        service.script.polls = 1
        done = drive("run", file)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(service.paid) == ROWS + HELD_OUT
        assert set(service.paid.values()) == {1}, "an answer was paid for twice"
        assert len(service.batches) > opened
        files = RunFiles(tmp_path / "run")
        summary = files.json("summary.json")
        assert (summary["status"], summary["rows_trained"]) == ("completed", ROWS)
        each = (10 * PRICES["input"] + 5 * PRICES["output"]) / 1e6 * 0.5
        assert summary["api"]["requests"] == ROWS + HELD_OUT
        assert summary["api"]["cost"] == pytest.approx((ROWS + HELD_OUT) * each, rel=0.02)
        catalogue = TeacherStore(str(tmp_path / "store")).catalogue()
        assert (catalogue.rows, catalogue.duplicates) == (ROWS + HELD_OUT, 0)
