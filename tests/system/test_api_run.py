"""A whole run whose teacher is a real OpenAI-compatible server, behind a proxy that injects faults.

The server is vLLM's own, with the tiny teacher. The proxy counts what was answered and what it
costs; the run must have paid for each answer once, stop at its budget, and go on from there.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, drive

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

KEY = "planted-service-key-31d9be02"
UP_WITHIN_S = 240.0
PRICES = {"input": 1.0, "output": 4.0}
NUM_ROWS, NUM_HELD_OUT = 32, 8


class Proxy(ThreadingHTTPServer):
    """Passes requests on, except that every few of them fail in a way of their own."""

    faults = ("too many", None, "error", None, "cut before", None, "torn", None, None)

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.upstream = upstream
        self.lock = threading.Lock()
        self.number = 0
        self.answered: dict[str, int] = {}
        self.cost = 0.0


class Passing(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with self.server.lock:
            fault = self.server.faults[self.server.number % len(self.server.faults)]
            self.server.number += 1
        if fault == "too many":
            self.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.5"})
            return
        if fault == "error":
            self.send(500, b'{"error": {"message": "oh"}}')
            return
        if fault == "cut before":
            self.close_connection = True
            self.connection.close()
            return
        request = urllib.request.Request(
            self.server.upstream + self.path, body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                data = answer.read()
        except urllib.error.HTTPError as error:
            self.send(error.code, error.read())
            return
        if fault == "torn":
            self.send(200, data[: len(data) // 3])  # Not charged for: it gives the wrong length.
            return
        usage = json.loads(data)["usage"]
        question = json.dumps(json.loads(body)["messages"])
        with self.server.lock:
            self.server.answered[question] = self.server.answered.get(question, 0) + 1
            spent = usage["prompt_tokens"] * PRICES["input"]
            spent += usage["completion_tokens"] * PRICES["output"]
            self.server.cost += spent / 1e6
        self.send(200, data)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def vllm_server(log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    words = ["--model", str(TEACHER), "--served-model-name", "large", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "256", "--max-num-seqs", "8"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + UP_WITHIN_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with vllm_server(tmp_path_factory.mktemp("server") / "log") as url:
        server = Proxy(url)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        server.server_close()


def test_a_run_pays_each_answer_once_stops_at_its_budget_and_goes_on(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", KEY)
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["teacher"] = {
        "engine": "api",
        "model": str(TEACHER),
        "sampling": config["teacher"]["sampling"],
        "api": {
            "base_url": f"http://127.0.0.1:{proxy.server_address[1]}/v1",
            "model": "large",
            "api_key_env": "SERVICE_API_KEY",
            "max_concurrency": 4,
            "prices": PRICES,
            "max_cost": 0.0016,
        },
    }
    config["prompts"]["path"] = str(ROOT / config["prompts"]["path"])
    config["signal"] = {"kind": "text"}
    config["objective"] = {"cross_entropy": 1.0}
    config["output"] = {"path": str(tmp_path / "run")}
    run_file = tmp_path / "api.yaml"
    run_file.write_text(yaml.safe_dump(config))
    first = drive("run", run_file)
    assert first.returncode == 1, first.stdout
    assert "teacher.api.max_cost (0.0016) is reached" in first.stderr
    paid = sum(proxy.answered.values())
    assert 0 < paid < NUM_ROWS + NUM_HELD_OUT
    assert proxy.cost <= 0.0016
    second = drive("run", run_file, "--set", "teacher.api.max_cost=1.0")
    assert second.returncode == 0, second.stderr
    assert set(proxy.answered.values()) == {1}, "an answer was paid for twice"
    assert len(proxy.answered) == NUM_ROWS + NUM_HELD_OUT
    files = RunFiles(tmp_path / "run")
    summary = files.json("summary.json")
    assert summary["rows_trained"] == NUM_ROWS
    assert summary["api"]["requests"] == NUM_ROWS + NUM_HELD_OUT
    assert summary["api"]["cost"] == pytest.approx(proxy.cost, rel=0.02)
    assert summary["api"]["too_many_requests"] > 0 and summary["api"]["broken_answer"] > 0
    catalogue = TeacherStore(str(tmp_path / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in written if KEY.encode() in p.read_bytes()]
    assert KEY not in first.stdout + first.stderr + second.stdout + second.stderr
