"""Answers in batches: what comes back is what was asked, and nothing is ever paid for twice.

The service is an HTTP server that plays files and batches. A kill is one of the process that asks:
it ends before or after any of its effects, and another starts in its place.
"""

import asyncio
import gzip
import io
import itertools
import json
import ssl
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.api import failures
from raystill.serve.api import service as service_module
from raystill.serve.api.limits import Spending
from raystill.serve.api.service import Service
from raystill.serve.batch import batches as batches_module
from raystill.serve.batch import journal as journal_module
from raystill.serve.batch import submit as submit_module
from raystill.serve.batch.engine import BatchEngine
from raystill.serve.batch.journal import BatchJournal, read_lines
from raystill.serve.services import api_engine
from tests.support.batch_service import BatchService, batch_service
from tests.support.end_to_end import TEACHER
from tests.support.json_service import completion_of, in_flight

SAMPLING = ResolvedSampling(0.7, 0.9, 0, 0.0, max_tokens=32, stop_token_ids=(2,))
TEXT = Signal("text")
PRICES = {"input": 1e6, "output": 2e6}
ROW = 0.5 * (10 + 2 * 5)
"""What an answer costs in a batch, by hand."""
MOST = 0.5 * (2 + 2 * 32)
"""The most that it may cost, of two prompt tokens."""
TOKENIZER = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchService]:
    monkeypatch.setattr(failures, "pause_s", lambda attempt: 0.01)
    monkeypatch.setattr(submit_module, "pause_s", lambda attempt: 0.01)
    monkeypatch.setattr(submit_module, "LOOK_AGAIN_S", 0.01)
    context = ssl.create_default_context()  # Each client would read all certificates anew.
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)
    with batch_service() as server:
        yield server


class Run:
    """A run's engine over some questions; another one over the same folders is its next start."""

    def __init__(
        self,
        folder: Path,
        service: BatchService,
        questions: list[str],
        name: str = "run",
        **more: Any,
    ) -> None:
        self.questions = questions
        self.path = folder / name
        self.counters: Counter[str] = Counter()
        batch = {"gather_s": 0.1, "poll_s": 0.02, **more.pop("batch", {})}
        api = {"base_url": service.url, "model": "large", "api_key_env": None, "batch": batch}
        limit_s = more.pop("request_timeout_s", 600.0)
        teacher = {
            **{"model": str(TEACHER), "engine": "api", "request_timeout_s": limit_s},
            "api": {**api, "prices": PRICES, **more},
        }
        config = RunConfig.model_validate(
            {
                "teacher": teacher,
                "student": {"init": "from_teacher", "layer_stride": 1},
                "prompts": {"path": "prompts.jsonl"},
                "signal": {"kind": "text"},
                "objective": {"cross_entropy": 1.0},
            }
        )
        run_folder = RunFolder(str(self.path)).ensure()
        self.prompts = [np.array([7, i + 1], np.int32) for i in range(len(questions))]
        self.keys = [prompt_digest(prompt) for prompt in self.prompts]
        chats = [json.dumps([{"role": "user", "content": q}]) for q in questions]
        table = pa.table({"digest": self.keys, "messages": chats})
        run_folder.write_table(MESSAGES, table)
        self.store = str(folder / "store")
        self.engine = api_engine(config, str(TEACHER), SAMPLING, run_folder, self, self.store)

    @property
    def add(self) -> Any:
        counters = self.counters

        class Remote:
            def remote(self, more: dict[str, float]) -> None:
                counters.update(more)

        return Remote()

    async def sample(self, rows: slice = slice(None)) -> list[Answer]:
        assert isinstance(self.engine, BatchEngine)
        # Tasks that a kill has ended would be told of whenever they are collected.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await self.engine.start()
        try:
            return await self.engine.sample_keyed(self.prompts[rows], self.keys[rows], TEXT)
        finally:
            self.engine.close()

    @property
    def cost(self) -> float:
        return Spending(RunFolder(str(self.path))).cost


def texts(answers: list[Answer]) -> list[str]:
    assert [a.error for a in answers] == [None] * len(answers)
    return [TOKENIZER.decode(a.response_ids[:-1].tolist()) for a in answers]


def wanted(questions: list[str]) -> list[str]:
    return [f"An answer to {question}" for question in questions]


QUESTIONS = [f"question {i}" for i in range(5)]


def test_rows_of_one_batch_come_back_each_with_its_own_answer(
    tmp_path: Path, service: BatchService
) -> None:
    service.script.repeats = True
    run = Run(tmp_path, service, QUESTIONS, extra_body={"reasoning_effort": "low"})
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert len(service.batches) == 1 and set(service.paid.values()) == {1}
    asked = [json.loads(line) for line in service.files["file-0"].splitlines()]
    assert [line["custom_id"] for line in asked] == [key.hex() for key in run.keys]
    assert asked[0]["url"] == "/v1/chat/completions" and asked[0]["method"] == "POST"
    body = asked[0]["body"]
    assert (body["model"], body["max_tokens"], body["reasoning_effort"]) == ("large", 32, "low")
    assert run.cost == run.counters["api_cost"] == 5 * ROW, "half the price"
    assert run.counters["api_requests"] == 5 and run.counters["api_repeated_line"] == 5


def test_a_full_batch_goes_at_once_and_several_are_under_way(
    tmp_path: Path, service: BatchService
) -> None:
    service.script.polls = 10
    run = Run(tmp_path, service, QUESTIONS, batch={"max_rows": 2})
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert len(service.batches) == 3 and sum(service.paid.values()) == 5


class Killed(SystemExit):
    """Ends the whole process, wherever it is raised."""


class Kills:
    """Ends the process before or after its n-th effect: a file, a line of spending, a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: tuple[int, str] | None = None
        self.effects: list[str] = []
        write, add = RunFolder.write_bytes, Spending.add
        kills = self

        def write_bytes(folder: RunFolder, name: str, data: bytes) -> None:
            with kills.effect(f"write {name.partition('.')[2]}"):
                write(folder, name, data)

        def add_spending(spending: Spending, counters: Any, batch: Any = None) -> None:
            with kills.effect("spend" if batch else "count"):
                add(spending, counters, batch)

        monkeypatch.setattr(RunFolder, "write_bytes", write_bytes)
        monkeypatch.setattr(Spending, "add", add_spending)
        start = Service.start

        def start_counting(service: Service) -> None:
            start(service)
            send = service.client._client.send

            async def counted(sent: Any, **more: Any) -> Any:
                with kills.effect(f"{sent.method} {sent.url.path}"):
                    return await send(sent, **more)

            service.client._client.send = counted

        monkeypatch.setattr(Service, "start", start_counting)

    def effect(self, name: str) -> Any:
        kills = self

        class Effect:
            def __enter__(self) -> None:
                kills.effects.append(name)
                self.mine = kills.at is not None and len(kills.effects) - 1 == kills.at[0]
                if self.mine and kills.at is not None and kills.at[1] == "before":
                    raise Killed(f"before {name}")

            def __exit__(self, *_: Any) -> None:
                if self.mine and kills.at is not None and kills.at[1] == "after":
                    raise Killed(f"after {name}")

        return Effect()


def test_a_kill_at_any_point_pays_for_nothing_twice(
    tmp_path: Path, service: BatchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each effect of a whole run is where one run is killed, before it and after it."""
    kills = Kills(monkeypatch)
    asyncio.run(Run(tmp_path / "whole", service, QUESTIONS).sample())
    names = list(kills.effects)
    assert {"POST /v1/files", "POST /v1/batches", "spend"} <= set(names)
    assert any(name == "write plan.json" for name in names), names
    for number, name in enumerate(names):
        for when in ("before", "after"):
            service.paid.clear()
            folder = tmp_path / f"{number}-{when}"
            kills.effects, kills.at = [], (number, when)
            with pytest.raises(Killed):
                asyncio.run(Run(folder, service, QUESTIONS).sample())
            kills.at = None
            again = Run(folder, service, QUESTIONS)
            assert texts(asyncio.run(again.sample())) == wanted(QUESTIONS), f"{when} {name}"
            assert set(service.paid.values()) == {1}, f"paid twice when killed {when} {name}"
            assert again.cost == 5 * ROW, f"accounted {again.cost} when killed {when} {name}"


def test_a_killed_run_waits_for_the_same_batch_and_asks_only_what_is_new(
    tmp_path: Path, service: BatchService
) -> None:
    service.script.polls = 10**6
    first = Run(tmp_path, service, QUESTIONS)

    async def killed_while_waiting() -> None:
        task = asyncio.ensure_future(first.sample(slice(0, 3)))
        while not service.looks:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(killed_while_waiting())
    service.script.polls = 1
    second = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(second.sample())) == wanted(QUESTIONS)
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches] == [3, 2]
    assert set(service.paid.values()) == {1} and second.cost == 5 * ROW


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 0, "completion_tokens": 0}])
def test_a_line_without_usage_is_charged_by_the_runs_own_count(
    tmp_path: Path, service: BatchService, usage: Any
) -> None:
    """Two prompt tokens and those of the text and its end, also where another start reads it."""
    service.script.per_row = {QUESTIONS[1]: [{"usage": usage}]}
    service.script.polls = 10**6
    first = Run(tmp_path, service, QUESTIONS)

    async def killed_while_waiting() -> None:
        task = asyncio.ensure_future(first.sample())
        while not service.looks:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(killed_while_waiting())
    service.script.polls = 1
    second = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(second.sample())) == wanted(QUESTIONS)
    text = TOKENIZER.encode(wanted(QUESTIONS)[1], add_special_tokens=False).ids
    assert second.cost == pytest.approx(4 * ROW + 0.5 * (2 + 2 * (len(text) + 1)))
    assert second.counters["api_usage_estimated"] == 1


def test_a_plan_of_an_earlier_version_has_no_prompt_tokens(
    tmp_path: Path, service: BatchService
) -> None:
    run = Run(tmp_path, service, QUESTIONS)
    asyncio.run(run.sample())
    journal = BatchJournal(run.store)
    (plan,) = journal.plans()
    assert plan.prompt_tokens == (2,) * 5
    told = json.loads(journal.folder.read_bytes(f"{plan.name}.plan.json"))
    del told["prompt_tokens"]
    journal.folder.write_text(f"{plan.name}.plan.json", json.dumps(told))
    assert journal.plans()[0].prompt_tokens == ()
    assert texts(asyncio.run(Run(tmp_path, service, QUESTIONS).sample())) == wanted(QUESTIONS)
    assert set(service.paid.values()) == {1}


def test_another_run_of_the_store_takes_what_is_paid_and_is_not_charged(
    tmp_path: Path, service: BatchService
) -> None:
    asyncio.run(Run(tmp_path, service, QUESTIONS, "one").sample())
    other = Run(tmp_path, service, QUESTIONS, "other")
    assert texts(asyncio.run(other.sample())) == wanted(QUESTIONS)
    assert len(service.batches) == 1 and other.cost == 0


def test_a_lost_answer_to_create_is_no_second_batch(tmp_path: Path, service: BatchService) -> None:
    """It is found by its name, on whatever page of the listing it is."""
    for number in range(3):
        service.batches.insert(
            0, {"id": f"old-{number}", "created_at": 2**31, "metadata": None, "end": "completed"}
        )
    service.script.cuts = Counter({"POST /batches": 1, "POST /files": 1, "GET /files": 1})
    service.script.statuses = {"GET /batches": [500, 429]}
    run = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert len(service.batches) == 4 and set(service.paid.values()) == {1}


@pytest.mark.parametrize("statuses", [[503] * 8, [401]])
def test_a_batch_that_could_not_be_looked_for_is_looked_for_at_the_next_start(
    tmp_path: Path, service: BatchService, statuses: list[int]
) -> None:
    """It was created, and the service is away before it can say so."""
    service.script.cuts["POST /batches"] = 1
    service.script.statuses = {"GET /batches": list(statuses)}
    first = asyncio.run(Run(tmp_path, service, QUESTIONS).sample())
    assert all((answer.error or "").startswith("stop: ") for answer in first)
    second = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(second.sample())) == wanted(QUESTIONS)
    assert len(service.batches) == 1 and set(service.paid.values()) == {1}
    assert second.cost == 5 * ROW


PARTIAL: dict[str, dict[str, Any]] = {
    "expired line": {"expired": True},
    "missing line": {"missing": True},
    "server error": {"status": 500},
    "too many": {"status": 429},
}


@pytest.mark.parametrize("name", PARTIAL)
def test_rows_that_a_batch_left_out_are_asked_again_alone(
    tmp_path: Path, service: BatchService, name: str
) -> None:
    replies = {"left": True}

    class Once(list):  # type: ignore[type-arg]
        """The fault at the first batch, an answer from then on."""

        def __getitem__(self, index: Any) -> Any:
            return PARTIAL[name] if len(service.batches) == 0 and replies["left"] else {}

        def __len__(self) -> int:
            return 1

    service.script.per_row = {QUESTIONS[1]: Once(), QUESTIONS[3]: Once()}
    service.script.ends = ["expired", "completed"]
    run = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches] == [5, 2]
    assert run.cost == 5 * ROW and set(service.paid.values()) == {1}
    assert run.counters["api_not_answered"] == 2


DROPPED = {
    "filtered": ({"status": 400, "code": "content_filter"}, "content_filter"),
    "too long": ({"status": 400, "code": "context_length_exceeded"}, "too_long"),
    "never a text": ({"text": ""}, "empty_answer"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_does_not_pass_drops_the_row_alone(
    tmp_path: Path, service: BatchService, name: str
) -> None:
    reply, error = DROPPED[name]
    service.script.per_row = {QUESTIONS[2]: [reply]}
    answers = asyncio.run(Run(tmp_path, service, QUESTIONS).sample())
    assert [a.error for a in answers] == [None, None, error, None, None]


def test_a_batch_that_is_refused_ends_the_run_with_the_reason(
    tmp_path: Path, service: BatchService
) -> None:
    service.script.refuses = [[{"code": "invalid_url", "message": "no such endpoint"}]]
    answers = asyncio.run(Run(tmp_path, service, QUESTIONS).sample())
    assert all((a.error or "").startswith("stop: ") for a in answers)
    assert "invalid_url: no such endpoint" in (answers[0].error or "")
    service.paid.clear()
    again = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(again.sample())) == wanted(QUESTIONS)


def test_a_batch_too_large_for_the_service_goes_in_halves(
    tmp_path: Path, service: BatchService
) -> None:
    service.script.refuses = [[{"code": "token_limit_exceeded", "message": "enqueued"}]] * 2
    run = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    sizes = [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches]
    assert sizes[0] == 5 and max(sizes[1:]) <= 2 and run.cost == 5 * ROW


def test_a_batch_that_the_service_does_not_know_is_not_paid_for_again(
    tmp_path: Path, service: BatchService
) -> None:
    """It may be another key that is asked with: nobody but a person can tell."""
    run = Run(tmp_path, service, QUESTIONS)
    asyncio.run(run.sample())
    journal = BatchJournal(run.store)
    (plan,) = journal.plans()
    journal.folder.delete(f"{plan.name}.end.json")
    service.batches.clear()
    answers = asyncio.run(Run(tmp_path, service, QUESTIONS).sample())
    assert all("batch-0" in (a.error or "") and "remove that file" in a.error for a in answers)
    assert not service.batches


def test_the_budget_holds_over_batches_and_starts(tmp_path: Path, service: BatchService) -> None:
    """Each row may cost 33 and costs 10: one fits while 60, 50 or 40 are left, and none of 30."""
    run = Run(tmp_path, service, QUESTIONS, max_cost=60.0)
    answers = asyncio.run(run.sample())
    paid = sum(service.paid.values())
    assert MOST == 33 and paid == 3 and run.cost == paid * ROW
    refused = [a.error for a in answers if a.error]
    assert len(refused) == 5 - paid
    assert all("teacher.api.max_cost (60) is reached" in error for error in refused)
    higher = Run(tmp_path, service, QUESTIONS, max_cost=1000.0)
    assert texts(asyncio.run(higher.sample())) == wanted(QUESTIONS)
    assert set(service.paid.values()) == {1} and higher.cost == 5 * ROW


def test_lines_may_be_in_any_order_repeated_torn_or_of_others() -> None:
    def line(key: str, status: int, text: str = "a") -> bytes:
        response = {"status_code": status, "body": {"text": text}}
        return json.dumps({"custom_id": key, "response": response}).encode()

    good = [line("b", 200, "first"), line("a", 500), line("a", 200, "second"), line("b", 200, "x")]
    bad = [b"{", b'"text"', b"[]", b"\xff", b"[" * 100_000, line("c", 200), b'{"custom_id": []}']
    data = b"\n".join([*bad, *good, b""])
    lines = read_lines(lambda: io.BytesIO(data), ["a", "b", "d"])
    assert {key: one.body["text"] for key, one in lines.each()} == {"a": "second", "b": "first"}
    (a, b), d = (lines.line(key) for key in "ab"), lines.line("d")
    assert a is not None and a.body == {"text": "second"} and b is not None and d is None
    assert (lines.repeated, lines.broken) == (2, len(bad))


MIB = 1 << 20
GZIP = {"Content-Encoding": "gzip"}


def test_a_file_that_is_cut_on_the_way_is_read_again_whole(
    tmp_path: Path, service: BatchService
) -> None:
    """By its length, in the middle of a chunk, and packed without its end."""
    service.script.pours = [
        ({"Content-Length": "10000000"}, lambda data: [data[:300]]),
        ({"Transfer-Encoding": "chunked"}, lambda data: [b"fff\r\n" + data[:200]]),
        (GZIP, lambda data: [gzip.compress(data)[:-9]]),
        (GZIP, lambda data: [gzip.compress(data)]),
    ]
    run = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert run.counters["api_connection"] == 2 and run.counters["api_broken_answer"] == 1
    assert set(service.paid.values()) == {1} and run.cost == 5 * ROW
    assert run.counters["api_broken_line"] == run.counters["api_repeated_line"] == 0


def test_a_file_without_end_ends_the_run_at_a_bound(tmp_path: Path, service: BatchService) -> None:
    """Of five rows with 32 tokens; the next start reads what then comes."""
    zeros = gzip.compress(bytes(64 * MIB))
    service.script.pours = [
        ({}, lambda data: itertools.repeat(b" " * 65_536)),
        (GZIP, lambda data: [zeros]),
    ]
    for _ in range(2):
        answers = asyncio.run(Run(tmp_path, service, QUESTIONS).sample())
        assert all((a.error or "").startswith("stop: ") for a in answers)
        assert "more than 17," in (answers[0].error or "")
    assert service.poured < 18 * MIB + in_flight()
    third = Run(tmp_path, service, QUESTIONS)
    assert texts(asyncio.run(third.sample())) == wanted(QUESTIONS)
    assert set(service.paid.values()) == {1} and third.cost == 5 * ROW


@pytest.mark.parametrize("call", ["POST /files", "POST /batches", "GET /batches", "GET /files"])
def test_an_answer_that_never_ends_is_given_up_and_asked_for_again(
    tmp_path: Path, service: BatchService, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Each part comes soon after the one before, so that none of them is late."""
    monkeypatch.setattr(service_module, "SLOWEST_FILE", 10**9)
    service.script.drips[call] = 1
    run = Run(tmp_path, service, QUESTIONS, request_timeout_s=0.5)
    assert texts(asyncio.run(run.sample())) == wanted(QUESTIONS)
    assert run.counters["api_timeout"] == 1 and service.script.drips[call] == 0
    assert set(service.paid.values()) == {1} and run.cost == 5 * ROW
    assert len(service.batches) == 1


@pytest.mark.parametrize("spoilt", [None, b"", b"other\n" * 999])
def test_lines_that_are_taken_away_meanwhile_end_the_run_with_the_reason(
    tmp_path: Path, service: BatchService, monkeypatch: pytest.MonkeyPatch, spoilt: bytes | None
) -> None:
    run = Run(tmp_path, service, QUESTIONS)
    read = journal_module.read_lines

    def and_spoil(*words: Any) -> Any:
        found = read(*words)
        (file,) = (tmp_path / "store" / "batches").glob("*.lines.jsonl")
        if spoilt is None:
            file.unlink()
        else:
            file.write_bytes(spoilt)
        return found

    monkeypatch.setattr(journal_module, "read_lines", and_spoil)
    monkeypatch.setattr(batches_module.Batches, "_charge", lambda *_: asyncio.sleep(0))
    answers = asyncio.run(run.sample())
    assert all("stop: a batch's lines cannot be read" in (a.error or "") for a in answers)


def test_lines_stay_on_disk_and_are_read_one_at_a_time(
    tmp_path: Path, service: BatchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty rows with answers of eight megabytes each, after a line that is longer than any."""
    monkeypatch.setattr(batches_module, "LEAST_BYTES", 512 * MIB)
    monkeypatch.setattr(journal_module, "LONGEST_LINE", 16 * MIB)
    questions = [f"question {i}" for i in range(20)]
    run = Run(tmp_path, service, questions)

    def parts(_: bytes) -> Iterator[bytes]:
        yield from (b"[" * MIB for _ in range(33))
        yield b"\n"
        for question, key in zip(questions, run.keys, strict=True):
            body = completion_of(question + " a" * 4 * MIB)
            told = {"custom_id": key.hex(), "response": {"status_code": 200, "body": body}}
            yield json.dumps(told).encode() + b"\n"

    service.script.pours = [({}, parts)]
    tracemalloc.start()
    answers = asyncio.run(run.sample())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = [TOKENIZER.decode(a.response_ids.tolist()) for a in answers]
    assert [one.split(" a")[0] for one in said] == questions
    assert run.counters["api_broken_line"] == 1 and service.poured > 190 * MIB
    assert peak < 100 * MIB, "all of a file is in memory"
