"""What services say in other words, or untruly: ends, lengths, credit, usage; and what they are not
told.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raystill.base.records import MetricsLog, read_lines
from raystill.base.run_folder import MESSAGES
from raystill.config.base import ApiConfig, PricesConfig
from raystill.serve.api import limits as limits_module
from raystill.serve.api.engine import ApiEngine
from raystill.serve.api.failures import judge, refuses_everybody
from raystill.serve.api.limits import Limits, Spending, Usage
from raystill.serve.api.service import Service as Client
from raystill.serve.api.service import usage_of
from raystill.serve.services import text_reader
from tests.support.end_to_end import TEACHER
from tests.support.scripted_service import (
    SAMPLING,
    TEXT,
    USAGE,
    Asked,
    Service,
    scripted_service,
    teacher_of,
)

TOO_LONG = (
    "This model's maximum context length is 256 tokens. However, your prompt contains 300 input "
    "tokens. Please reduce the length of the input prompt."
)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with scripted_service(monkeypatch) as server:
        yield server


@pytest.mark.parametrize(
    ("finish", "ended", "told"),
    [
        *((word, "stop", False) for word in ("stop", "eos", "end_turn", "STOP")),
        *((word, "length", False) for word in ("length", "max_tokens", None)),
        *((word, "length", True) for word in ("done", "\x1b[8m", 7, {"a": 1}, ["stop"])),
    ],
)
def test_the_end_of_an_answer_is_known_by_many_words(
    tmp_path: Path,
    service: Service,
    finish: Any,
    ended: str,
    told: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service.scripts["q"] = [{"finish": finish}]
    with caplog.at_level(logging.WARNING):
        answers = Asked(tmp_path, service, ["q", "q"]).sample()
    assert [answer.finish_reason for answer in answers] == [ended, ended]
    said = [record.getMessage() for record in caplog.records if "finish_reason" in record.message]
    assert len(said) == told and "\x1b" not in "".join(said)


@pytest.mark.parametrize("finish", ["length", "max_tokens"])
def test_an_answer_that_its_reasoning_left_no_room_for_is_not_paid_again(
    tmp_path: Path, service: Service, finish: str
) -> None:
    service.scripts["q"] = [{"finish": finish, "text": "", "reasoning_content": "Hm."}]
    (answer,) = Asked(tmp_path, service, ["q"]).sample()
    assert (answer.error, len(service.bodies)) == ("no_answer", 1)


def error_of(status: int, path: str = "/v1/chat/completions", **told: Any) -> BaseException:
    """What the client raises for such an answer of a service."""
    import httpx2
    import openai

    client = openai.AsyncOpenAI(api_key="x", base_url="http://127.0.0.1:1/v1")
    request = httpx2.Request("POST", f"http://127.0.0.1:1{path}")
    response = httpx2.Response(status, json={"error": told}, request=request)
    return client._make_status_error_from_response(response)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            400,
            {"message": TOO_LONG, "type": "BadRequestError", "param": "input_tokens", "code": 400},
        ),
        (400, {"message": TOO_LONG, "type": "BadRequestError", "param": None, "code": 400}),
        (400, {"message": "too many", "code": "context_length_exceeded"}),
        (413, {"message": "Request Entity Too Large"}),
    ],
)
def test_a_prompt_that_is_too_long_there_drops_its_row_alone(
    status: int, told: dict[str, Any]
) -> None:
    assert judge(error_of(status, **told)) == "too_long"


def test_a_file_that_is_too_large_or_another_mistake_is_no_long_prompt() -> None:
    for error in (
        error_of(413, "/v1/files", message="too large"),
        error_of(400, message="top_k is not known", param="top_k"),
    ):
        verdict = judge(error)
        assert isinstance(verdict, str) and verdict.startswith("stop: ")


@pytest.mark.parametrize("name", ["code", "type"])
@pytest.mark.parametrize("word", ["insufficient_quota", "exceeded_current_quota_error"])
def test_used_up_credit_is_not_waited_for(name: str, word: str) -> None:
    error = error_of(429, message="pay", **{name: word})
    verdict = judge(error)
    assert isinstance(verdict, str) and verdict.startswith("stop: ")
    assert refuses_everybody(error)
    waits = judge(error_of(429, message="slow down", code="rate_limit_exceeded"))
    assert not isinstance(waits, str) and waits.too_fast


@pytest.mark.parametrize(("status", "lost"), [(500, False), (503, False), (502, True), (504, True)])
def test_what_a_gateway_gave_up_may_be_charged(status: int, lost: bool) -> None:
    verdict = judge(error_of(status, message="x"))
    assert not isinstance(verdict, str) and verdict.lost is lost


@pytest.mark.parametrize("value", [11, 10**12, 10**400, -1, 1.5, True, "3"])
def test_details_of_usage_beyond_the_usage_are_nothing(value: Any) -> None:
    details = {
        "prompt_tokens_details": {"cached_tokens": value},
        "completion_tokens_details": {"reasoning_tokens": value},
    }
    assert usage_of({"usage": USAGE | details}) == Usage(input=10, output=5)


def test_a_row_that_fails_unexpectedly_leaves_the_answers_of_the_others(
    tmp_path: Path, service: Service
) -> None:
    asked = Asked(tmp_path, service, ["one", "bad", "three"])
    read = asked.engine._read

    def broken(completion: Any, *more: Any) -> Any:
        if "bad" in completion["choices"][0]["message"]["content"]:
            raise MemoryError("no room")
        return read(completion, *more)

    asked.engine._read = broken
    one, bad, three = asked.sample()
    assert (one.error, three.error) == (None, None)
    assert bad.error is not None and bad.error.startswith("stop: a row failed unexpectedly")


def test_a_prompt_without_room_for_an_answer_is_not_asked(tmp_path: Path, service: Service) -> None:
    asked = Asked(tmp_path, service, ["q"], max_model_len=3)
    chats = ['[{"role": "user", "content": "long"}]'] * 2
    prompts = [np.array([7, 8, 9], np.int32), np.array([7, 8], np.int32)]

    async def ask() -> Any:
        await asked.engine.start()
        return await asked.engine.sample_chats(prompts, chats, TEXT)

    long, short = asyncio.run(ask())
    assert (long.error, short.error) == ("too_long", None)
    assert len(service.bodies) == 1 and service.bodies[0]["max_tokens"] == 1


@pytest.mark.parametrize(
    ("stated", "sent"), [({}, {}), ({"top_k": 0, "min_p": 0.0}, {"top_k": 0, "min_p": 0.0})]
)
def test_what_the_run_file_states_of_sampling_is_sent_though_it_is_nothing(
    tmp_path: Path, service: Service, stated: dict[str, Any], sent: dict[str, Any]
) -> None:
    """Else a server takes what its model's own settings say."""
    asked = Asked(tmp_path, service, ["q"])
    teacher = teacher_of(service.url)
    teacher = teacher.model_copy(update={"sampling": teacher.sampling.model_copy(update=stated)})
    messages, client = asked.folder.read_table(MESSAGES), Client(teacher, Limits(teacher.api))
    engine = ApiEngine(teacher, SAMPLING, text_reader(TEACHER), messages, client)
    body = engine.body([{"role": "user", "content": "q"}])
    assert {name: body[name] for name in ("top_k", "min_p") if name in body} == sent


@pytest.mark.parametrize(
    ("ids", "extra"), [(True, {"top_k": 5}), (True, {"min_p": 0.1}), (False, {"stop": ["\n"]})]
)
def test_what_would_be_overwritten_or_cut_answers_is_refused(
    ids: bool, extra: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=f"extra_body sets {next(iter(extra))}"):
        ApiConfig(base_url="http://h/v1", model="m", api_key_env=None, ids=ids, extra_body=extra)


def test_the_environment_of_another_service_stays_here(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-planted")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-planted")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: planted")
    heard: list[str] = []
    handler = service.RequestHandlerClass
    reply = handler.reply  # type: ignore[attr-defined]

    def listening(self: Any, *given: Any) -> None:
        heard.append(str(self.headers))
        reply(self, *given)

    monkeypatch.setattr(handler, "reply", listening)
    (answer,) = Asked(tmp_path, service, ["q"]).sample()
    assert answer.error is None and "planted" not in heard[0].replace("planted-service-key", "")


def test_a_budget_that_is_just_enough_is_used_up() -> None:
    """Costs come and go in any order, and their sums have rests."""
    prices = {"input": 1.0, "output": 1.0}

    async def spends(budget: float, costs: list[int]) -> float:
        api = ApiConfig(
            base_url="http://h/v1", model="m", prices=prices, max_cost=budget, max_concurrency=3
        )
        limits = Limits(api)

        async def row(tokens: int) -> None:
            async with limits.turn(tokens, tokens) as turn:
                await asyncio.sleep(0)
                turn.paid(Usage(input=tokens, output=tokens))

        await asyncio.wait_for(asyncio.gather(*map(row, costs)), 5)
        return limits.spent

    for seed in range(40):
        random = np.random.default_rng(seed)
        costs = random.integers(1, 10**6, 30).tolist()
        budget = 0.0
        for cost in costs:
            budget += Usage(input=cost, output=cost).cost(PricesConfig(**prices))
        assert asyncio.run(spends(budget, costs)) == pytest.approx(budget)


class Remote:
    """A run folder in an object store."""

    path, is_local, local = "s3://bucket/run", False, None

    def __init__(self, logs: Path) -> None:
        self.files: dict[str, str] = {}
        self.logs = logs

    def exists(self, name: str) -> bool:
        return name in self.files

    def join(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read_text(self, name: str) -> str:
        return self.files[name]

    def write_text(self, name: str, text: str) -> None:
        self.files[name] = text


def spent_in(folder: Any) -> float:
    return sum(line["api_cost"] for line in read_lines(folder, "spending.jsonl"))


def test_what_is_spent_reaches_a_remote_folder_soon_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Any = Remote(tmp_path)
    spending = Spending(folder)
    spending.add({"api_cost": 1.0})
    spending.add({"api_cost": 2.0})
    spending.close()
    spending.close()
    assert spent_in(folder) == 3.0
    monkeypatch.setattr(limits_module, "UPLOAD_S", 0.0)
    spending.add({"api_cost": 4.0})
    for _ in range(500):
        if spent_in(folder) == 7.0:
            break
        time.sleep(0.01)
    assert spent_in(folder) == 7.0


def test_a_start_after_a_kill_knows_what_this_node_had_noted(tmp_path: Path) -> None:
    folder: Any = Remote(tmp_path)
    first = Spending(folder)
    first.add({"api_cost": 1.0})
    first.close()
    first.add({"api_cost": 2.0})
    if first._timer is not None:
        first._timer.cancel()  # The process is killed.
    assert spent_in(folder) == 1.0
    again = Spending(folder)
    assert again.cost == spent_in(folder) == 3.0


@pytest.mark.parametrize(
    "there", ["", '{"step": 1, "x": 2}\n', '{"step": 0, "x": 1}\n{"step": 9}\n']
)
def test_a_copy_of_another_run_or_an_older_one_is_not_kept(tmp_path: Path, there: str) -> None:
    folder: Any = Remote(tmp_path)
    (tmp_path / "spending.jsonl").write_text('{"step": 0, "x": 1}\n{"step": 0, "x": 3}\n')
    if there:
        folder.files["spending.jsonl"] = there
    MetricsLog(folder, "spending.jsonl", keep_more=True)
    assert (tmp_path / "spending.jsonl").read_text() == there
