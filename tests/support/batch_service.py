"""An HTTP service with ``/files`` and ``/batches`` that answers chats by a script, and keeps books.

A batch is worked off when it is created, which is when its requests are paid for, and told after
``polls`` looks. Faults: how it ends, which lines are missing, and connections that are cut after
the effect.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.parser import BytesParser
from typing import Any

from tests.support.json_service import JsonHandler, Server, completion_of, serving


@dataclass
class Script:
    """How the service behaves; lists are used up one batch after another, the last stays."""

    ends: list[str] = field(default_factory=lambda: ["completed"])
    polls: int = 1
    per_row: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By question: a ``text``, a ``usage``, a ``status`` with ``code``, ``missing``, ``expired`` or
    ``torn``.
    """
    refuses: list[list[dict[str, Any]]] = field(default_factory=list)
    """Errors of the first batches, which then fail as a whole."""
    shuffles: bool = True
    repeats: bool = False
    cuts: Counter[str] = field(default_factory=Counter)
    """By "METHOD /path": answers that are lost on the way, after the effect."""
    drips: Counter[str] = field(default_factory=Counter)
    """By "METHOD /path": answers that begin and never end, after the effect."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """By "METHOD /path": statuses of the next requests, before any effect."""
    page: int = 2
    pours: list[tuple[dict[str, str], Callable[[bytes], Iterable[bytes]]]] = field(
        default_factory=list
    )
    """Headers and parts of the next files that are asked for, made of their content."""


class BatchService(Server):
    """key: what clients must show; None: anything."""

    def __init__(self, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key
        self.script = Script()
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.paid: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.poured = 0
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def add_file(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        number, script = len(self.batches), self.script
        end = script.ends[min(number, len(script.ends) - 1)]
        batch: dict[str, Any] = {
            "id": f"batch-{number}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "completion_window": body["completion_window"],
            "input_file_id": body["input_file_id"],
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "status": "validating",
            "end": end,
        }
        if script.refuses:
            batch |= {"end": "failed", "errors": {"object": "list", "data": script.refuses.pop(0)}}
        else:
            self.answer(batch)
        self.batches.append(batch)
        return batch

    def answer(self, batch: dict[str, Any]) -> None:
        """Works the batch off."""
        self.keep(batch, *self.work_off(self.files[batch["input_file_id"]]))

    def keep(self, batch: dict[str, Any], answers: bytes, errors: bytes) -> None:
        """What the batch has brought."""
        batch["output_file_id"] = self.add_file(answers) if answers else None
        batch["error_file_id"] = self.add_file(errors) if errors else None

    def work_off(self, data: bytes) -> tuple[bytes, bytes]:
        answers, errors = [], []
        for line in data.splitlines():
            asked = json.loads(line)
            question = asked["body"]["messages"][-1]["content"]
            script = self.script.per_row.get(question, [{}])
            reply = script[min(self.paid[question], len(script) - 1)]
            if reply.get("missing"):
                continue
            head = {"id": "x", "custom_id": asked["custom_id"], "error": None}
            if reply.get("expired"):
                error = {"code": "batch_expired", "message": "too late"}
                errors.append(json.dumps({**head, "response": None, "error": error}).encode())
            elif "status" in reply:
                body = {"error": {"code": reply.get("code"), "message": "no"}}
                told = {**head, "response": {"status_code": reply["status"], "body": body}}
                errors.append(json.dumps(told).encode())
            else:
                self.paid[question] += 1
                said = completion_of(reply.get("text", f"An answer to {question}"))
                said |= {"usage": reply["usage"]} if "usage" in reply else {}
                told = {**head, "response": {"status_code": 200, "body": said}}
                written = json.dumps(told).encode()
                answers.append(written[: len(written) // 2] if reply.get("torn") else written)
        if self.script.repeats:
            answers += answers
        if self.script.shuffles:
            random.Random(1).shuffle(answers)
        return b"\n".join(answers), b"\n".join(errors)

    def told(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as it is told: in progress for some looks, with files at its end only."""
        shown = {n: v for n, v in batch.items() if n != "end"}
        if self.has_ended(batch):
            return {**shown, "status": batch["end"]}
        return {**shown, "status": "in_progress", "output_file_id": None, "error_file_id": None}

    def has_ended(self, batch: dict[str, Any]) -> bool:
        return self.looks[batch["id"]] > self.script.polls


class Handler(JsonHandler):
    server: BatchService

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        path = self.path.removeprefix("/v1")
        raw = self.body()
        shown = self.headers["Authorization"]
        assert self.server.key is None or shown == f"Bearer {self.server.key}"
        name = f"{method} /{path.split('?')[0].split('/')[1]}"
        server = self.server
        with server.lock:
            server.requests[name] += 1
            planned = server.script.statuses.get(name)
            if planned:
                self.send(planned.pop(0), json.dumps({"error": {"message": "no"}}).encode())
                return
            status, content = self.effect(method, path, raw)
            lost, endless = (
                faults[name] > 0 for faults in (server.script.cuts, server.script.drips)
            )
            server.script.cuts[name] -= lost
            server.script.drips[name] -= endless
        if lost:
            self.hang_up()
        elif endless:
            self.drip()
        elif name == "GET /files" and server.script.pours:
            self.pour(*server.script.pours.pop(0), content)
        else:
            self.send(status, content)

    def pour(
        self, headers: dict[str, str], parts: Callable[[bytes], Iterable[bytes]], content: bytes
    ) -> None:
        """Sends parts until they end or nobody reads any more."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            for part in parts(content):
                self.wfile.write(part)
                self.server.poured += len(part)
        self.hang_up()

    def effect(self, method: str, path: str, raw: bytes) -> tuple[int, bytes]:
        server, parts = self.server, path.split("?")[0].strip("/").split("/")
        told: dict[str, Any]
        if (method, parts) == ("POST", ["files"]):
            told = {"id": server.add_file(self.uploaded(raw)), "object": "file"}
        elif (method, parts) == ("POST", ["batches"]):
            told = server.told(server.create(json.loads(raw)))
        elif parts == ["batches"]:
            told = self.listing(path)
        elif parts[0] == "batches":
            found = [b for b in server.batches if b["id"] == parts[1]]
            if not found:
                return 404, b'{"error": {"message": "no such batch"}}'
            server.looks[parts[1]] += 1
            told = server.told(found[0])
        else:
            return 200, server.files[parts[1]]
        return 200, json.dumps(told).encode()

    def listing(self, path: str) -> dict[str, Any]:
        """One page, the newest first."""
        newest = [self.server.told(batch) for batch in reversed(self.server.batches)]
        after = path.partition("after=")[2].split("&")[0]
        ids = [batch["id"] for batch in newest]
        start = ids.index(after) + 1 if after else 0
        page = newest[start : start + self.server.script.page]
        more = start + len(page) < len(newest)
        last = page[-1]["id"] if page else None
        return {"object": "list", "data": page, "has_more": more, "last_id": last}

    def uploaded(self, raw: bytes) -> bytes:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        for part in BytesParser().parsebytes(head + raw).get_payload():
            if part.get_filename():
                content: bytes = part.get_payload(decode=True)
                return content
        raise AssertionError("no file was uploaded")


@contextmanager
def batch_service() -> Iterator[BatchService]:
    """A running service."""
    with serving(BatchService()) as server:
        yield server
