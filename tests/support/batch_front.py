"""A batch API before a real OpenAI-compatible server, which answers each line by asking it.

A batch is in progress while the server works, and also afterwards while it is ``held``. The front
keeps the accounts that a provider would. Some lines fail at first, some lack ``usage``.
"""

import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.support.batch_service import BatchService
from tests.support.json_service import serving

AT_ONCE = 4
FAILS_EVERY, NO_USAGE_EVERY = 9, 8
"""Of the lines, in the order they are answered."""


class BatchFront(BatchService):
    """prices: of a million tokens in a batch, ``input`` and ``output``."""

    def __init__(self, upstream: str, key: str, prices: Mapping[str, float]) -> None:
        super().__init__(key)
        self.upstream, self.prices = upstream, prices
        self.held = False
        self.cost = 0.0
        self.number = self.without_usage = 0
        self.failed: Counter[str] = Counter()

    def answer(self, batch: dict[str, Any]) -> None:
        batch["worked_off"] = False
        threading.Thread(target=self._work_off, args=(batch,), daemon=True).start()

    def has_ended(self, batch: dict[str, Any]) -> bool:
        return bool(batch["worked_off"]) and not self.held

    def _work_off(self, batch: dict[str, Any]) -> None:
        asked = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            lines = list(pool.map(self._line, asked))
        good = [json.dumps(one) for one in lines if one["response"]["status_code"] == 200]
        bad = [json.dumps(one) for one in lines if one["response"]["status_code"] != 200]
        with self.lock:
            self.keep(batch, *("\n".join(some).encode() for some in (good[::-1], bad)))
            batch["worked_off"] = True

    def _line(self, asked: dict[str, Any]) -> dict[str, Any]:
        question = json.dumps(asked["body"]["messages"])
        with self.lock:
            self.number += 1
            number = self.number
            if number % FAILS_EVERY == 0 and not self.failed[question]:
                self.failed[question] += 1
                return _told(asked, 500, {"error": {"message": "oh"}})
        body = json.dumps(asked["body"]).encode()
        request = urllib.request.Request(
            self.upstream + asked["url"], body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                told = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return _told(asked, error.code, json.loads(error.read()))
        usage = told["usage"]
        with self.lock:
            self.paid[question] += 1
            self.cost += usage["prompt_tokens"] * self.prices["input"] / 1e6
            self.cost += usage["completion_tokens"] * self.prices["output"] / 1e6
            if number % NO_USAGE_EVERY == 0:
                self.without_usage += 1
                told["usage"] = None
        return _told(asked, 200, told)


def _told(asked: Mapping[str, Any], status: int, body: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "x", "custom_id": asked["custom_id"], "response": response, "error": None}


@contextmanager
def batch_front(upstream: str, key: str, prices: Mapping[str, float]) -> Iterator[BatchFront]:
    """A running front."""
    with serving(BatchFront(upstream, key, prices)) as server:
        yield server
