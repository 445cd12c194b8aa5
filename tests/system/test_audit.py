"""``make audit``: what is asked of an advisory service, and that no answer is never "no fault"."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from requirements import audit


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [
        (lambda n: {"results": [{}] * n}, 0, "no known fault"),
        (lambda n: {"results": [{"vulns": [{"id": "PYSEC-1"}]}] + [{}] * (n - 1)}, 1, "PYSEC-1"),
        (lambda n: {"results": [{}] * (n - 1)}, 2, "nothing is known"),
        (lambda n: {"error": "busy"}, 2, "nothing is known"),
        (None, 2, "nothing is known"),
    ],
    ids=["none", "one", "too few", "no results", "no server"],
)
def test_pins_are_audited_and_silence_is_no_answer(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[[int], object] | None,
    status: int,
    word: str,
) -> None:
    asked: list[dict[str, Any]] = []

    class Osv(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.extend(json.loads(body)["queries"])
            assert answer is not None
            told = json.dumps(answer(len(asked))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Osv) as server:
        monkeypatch.setenv("OSV_URL", f"http://127.0.0.1:{server.server_port}")
        if answer is None:
            server.server_close()
        else:
            threading.Thread(target=server.handle_request, daemon=True).start()
        assert audit.main([]) == status
    told = capsys.readouterr()
    assert word in told.out + told.err
    if answer is not None:
        names = {query["package"]["name"]: query["version"] for query in asked}
        assert {"torch", "ray", "pytest", "wandb"} <= set(names)
        assert all(version and "+" not in version for version in names.values())
