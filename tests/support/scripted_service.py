"""An HTTP service that answers chats by a script, and an engine that asks it some questions."""

import asyncio
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.api import failures
from raystill.serve.services import api_engine
from tests.support.end_to_end import TEACHER
from tests.support.json_service import JsonHandler, Server, completion_of, serving

STOP = 2
KEY = "planted-service-key-8c1f0a77"
TEXT = Signal("text")
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


class Service(Server):
    """Answers each question by its script: a list of replies, the last of which stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[str, list[dict[str, Any]]] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[tuple[float, str | None]] = []
        """When each request came, and with which key."""
        self.keys: set[str | None] = set()
        self.encodings: set[str | None] = set()
        self.poured: list[int] = []
        """Bytes of each answer in parts that the client has taken, or its connection."""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Served(Protocol):
    """What has a URL to be asked at."""

    @property
    def url(self) -> str: ...


class Handler(JsonHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.body())
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.times.append((time.monotonic(), self.headers.get("Authorization")))
            self.server.encodings.add(self.headers.get("Accept-Encoding"))
            script = self.server.scripts.get(question, [{}])
            reply = script[min(self.server.asked[question], len(script) - 1)]
            self.server.asked[question] += 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.reply(reply, question)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def reply(self, reply: dict[str, Any], question: str) -> None:
        time.sleep(reply.get("slow", 0.0))
        if reply.get("drips"):
            self.drip()
            return
        if "parts" in reply:
            self.pour(reply["parts"](), reply.get("status", 200), reply["headers"])
            return
        if reply.get("cut"):
            self.hang_up()
            return
        status = reply.get("status", 200)
        if status == 200:
            text = reply.get("text", f"An answer to {question}")
            content = completion_of(text, finish_reason=reply.get("finish", "stop"))
            of_message = ("refusal", "reasoning_content", "reasoning")
            content["choices"][0]["message"] |= {n: reply[n] for n in of_message if n in reply}
            content["choices"][0] |= {n: reply[n] for n in ("logprobs",) if n in reply}
            content |= {n: reply[n] for n in ("choices", "usage") if n in reply}
        else:
            content = {"error": {"message": f"refused for {KEY}", "code": reply.get("code")}}
        data = reply.get("raw", json.dumps(content).encode())
        if reply.get("torn"):
            data = data[: len(data) // 2]
        self.send(status, data, reply.get("headers"))

    def pour(self, parts: Iterable[bytes], status: int, headers: Mapping[str, str]) -> None:
        """Sends parts until they end or nobody reads any more; counts what was taken."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        taken = 0
        with suppress(OSError):
            for part in parts:
                self.wfile.write(part)
                taken += len(part)
        self.server.poured.append(taken)
        self.close_connection = True


@contextmanager
def scripted_service(patch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A running service, whose client pauses next to nothing."""
    patch.setenv("SERVICE_API_KEY", KEY)
    patch.setattr(failures, "pause_s", lambda attempt: 0.01)
    context = ssl.create_default_context()  # Each client would read all certificates anew.
    patch.setattr(ssl, "create_default_context", lambda **_: context)
    with serving(Service()) as server:
        yield server


def teacher_of(url: str, **api: Any) -> TeacherConfig:
    limit_s, context = api.pop("request_timeout_s", 2.0), api.pop("max_model_len", None)
    section = {"base_url": url, "model": "large", "api_key_env": "SERVICE_API_KEY", **api}
    return TeacherConfig.model_validate(
        {
            **{"model": str(TEACHER), "engine": "api", "api": section},
            **{"request_timeout_s": limit_s, "max_model_len": context},
        }
    )


def run_of(teacher: TeacherConfig) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": teacher,
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"path": "prompts.jsonl"},
            "signal": {"kind": "text"},
            "objective": {"cross_entropy": 1.0},
        }
    )


SAMPLING = ResolvedSampling(0.7, 0.9, 0, 0.0, max_tokens=32, stop_token_ids=(STOP,))


class Asked:
    """An engine over some questions, its counters, and its run folder."""

    def __init__(
        self,
        folder: Path,
        service: Served,
        questions: list[str],
        model: Path = TEACHER,
        sampling: ResolvedSampling = SAMPLING,
        name: str = "",
        pace: tuple[Any, str] | None = None,
        **api: Any,
    ) -> None:
        self.folder = RunFolder(str(folder)).ensure()
        self.prompts = [np.array([7, i + 1], np.int32) for i in range(len(questions))]
        chats = [json.dumps([{"role": "user", "content": q}]) for q in questions]
        table = pa.table({"digest": [prompt_digest(p) for p in self.prompts], "messages": chats})
        self.folder.write_table(MESSAGES, table)
        self.counters: Counter[str] = Counter()
        self.engine = api_engine(
            run_of(teacher_of(service.url, **api)),
            str(model),
            sampling,
            self.folder,
            self,
            str(folder / "store"),
            name,
            pace,
        )

    @property
    def add(self) -> Any:
        asked = self

        class Remote:
            def remote(self, counters: dict[str, float]) -> None:
                asked.counters.update(counters)

        return Remote()

    def sample(self) -> list[Answer]:
        async def run() -> list[Answer]:
            await self.engine.start()
            return await self.engine.sample(self.prompts, TEXT)

        return asyncio.run(run())
