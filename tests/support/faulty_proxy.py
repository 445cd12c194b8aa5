"""A proxy before an OpenAI-compatible service that spoils some answers, each in its own way.

It keeps the accounts that a provider would: what each question cost, by what came back whole, and
what answers cost that nobody waited for any more.
"""

import json
import select
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tests.support.json_service import JsonHandler, Server

FAULTS = ("too many", "error", "cut before", "no usage", "torn", "no tokens", "late", "absurd")
EVERY, CYCLE = 2, 28
"""Every second request fails until each fault had its turn, then none until the cycle ends.

Where no usage that can be true is told, the run must count for itself.
"""
USAGES: dict[str, Any] = {
    "no usage": None,
    "no tokens": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    "absurd": {"prompt_tokens": 10**12, "completion_tokens": 10**12, "total_tokens": 2 * 10**12},
}
GIVEN_UP_S = 600.0
"""For which a late answer waits for its client to go."""


class Proxy(Server):
    """Passes requests on, except that every few of them fail.

    prices: of a million tokens, ``input`` and ``output``. kinds: the faults, by turns.
    """

    def __init__(
        self, upstream: str, key: str, prices: Mapping[str, Any], kinds: Sequence[str] = FAULTS
    ) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.kinds = kinds
        self.upstream, self.key, self.prices = upstream, key, prices
        self.lock = threading.Lock()
        self.number = 0
        self.faults: Counter[str | None] = Counter()
        self.answered: Counter[str] = Counter()
        """Answers that came back whole, by the question."""
        self.cost = self.unread_cost = 0.0
        """Of these, and of those that nobody waited for or could read."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self) -> str | None:
        """How the next request fails; None: it does not."""
        with self.lock:
            turn, odd = divmod(self.number % CYCLE, EVERY)
            fault = self.kinds[turn] if not odd and turn < len(self.kinds) else None
            self.number += 1
        return fault

    def note(self, fault: str | None) -> None:
        """Counts a fault that comes to pass, or a request that is answered as it should be."""
        with self.lock:
            self.faults[fault] += 1

    def charge(self, answer: Mapping[str, Any], question: str | None) -> None:
        """Notes what an answer costs. question: None where it is not read."""
        usage = answer["usage"]
        spent = usage["prompt_tokens"] * self.prices["input"]
        spent += usage["completion_tokens"] * self.prices["output"]
        with self.lock:
            if question is None:
                self.unread_cost += spent / 1e6
                return
            self.cost += spent / 1e6
            self.answered[question] += 1


class Passing(JsonHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.body()
        assert self.headers["Authorization"] == f"Bearer {self.server.key}"
        fault = self.server.next_fault()
        if fault in ("too many", "error", "cut before"):
            self.server.note(fault)
        if fault == "too many":
            self.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.5"})
            return
        if fault == "error":
            self.send(500, b'{"error": {"message": "oh"}}')
            return
        if fault == "cut before":
            self.hang_up()
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
        self.server.note(fault)
        told = json.loads(data)
        if fault == "torn":
            self.server.charge(told, None)
            self.send(200, data[: len(data) // 3])
            return
        if self.is_gone(GIVEN_UP_S if fault == "late" else 0.0):
            self.server.charge(told, None)
        else:
            self.server.charge(told, json.dumps(json.loads(body)["messages"]))
            told |= {"usage": USAGES[fault]} if fault in USAGES else {}
        with suppress(OSError):
            self.send(200, told)

    def is_gone(self, within_s: float) -> bool:
        """Whether the client has closed its connection, or does so within some time."""
        readable, _, _ = select.select([self.connection], [], [], within_s)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
