"""An API teacher against a real HTTP server that fails in every way a service does."""

import asyncio
import email.utils
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from raystill.cluster.check.prepared import keyed_engine
from raystill.config.base import ApiConfig, PricesConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.model.files import ModelFolder
from raystill.model.identity import identity_of_teacher
from raystill.serve.api import failures
from raystill.serve.api import service as service_module
from raystill.serve.api.limits import BudgetReached, Limits, Usage
from raystill.serve.replica import BusyClock, Teacher
from raystill.serve.services import api_engine
from tests.support.end_to_end import TEACHER
from tests.support.scripted_service import (
    KEY,
    SAMPLING,
    STOP,
    TEXT,
    USAGE,
    Asked,
    Service,
    run_of,
    scripted_service,
    teacher_of,
)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with scripted_service(monkeypatch) as server:
        yield server


@cache
def tokenizer(special_is_text: bool = False) -> Tokenizer:
    found = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    found.encode_special_tokens = special_is_text
    return found


def test_an_answer_comes_back_as_the_students_ids(tmp_path: Path, service: Service) -> None:
    service.scripts["cut off"] = [{"finish": "length"}]
    asked = Asked(tmp_path, service, ["Why?", "cut off"], extra_body={"reasoning_effort": "low"})
    whole, cut = asked.sample()
    assert tokenizer().decode(whole.response_ids[:-1].tolist()) == "An answer to Why?"
    assert (whole.response_ids[-1], whole.finish_reason) == (STOP, "stop")
    assert tokenizer().decode(cut.response_ids.tolist()) == "An answer to cut off"
    assert (cut.response_ids[-1] != STOP, cut.finish_reason) == (True, "length")
    body = service.bodies[0]
    sent = {n: body[n] for n in ("model", "temperature", "top_p", "max_tokens", "reasoning_effort")}
    assert sent == {
        "model": "large",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 32,
        "reasoning_effort": "low",
    }
    assert service.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize(("context", "most"), [(20, 18), (34, 32), (3, 1), (None, 32), (10**6, 32)])
def test_an_answer_has_no_more_tokens_than_the_context_leaves(
    tmp_path: Path, service: Service, context: int | None, most: int
) -> None:
    """As the key of a stored answer says: prompts have two tokens."""
    asked = Asked(tmp_path, service, ["Why?"], max_model_len=context)
    asked.sample()
    assert service.bodies[0]["max_tokens"] == most
    engine = keyed_engine(
        run_of(teacher_of(service.url, max_model_len=context)), ModelFolder("t", TEACHER)
    )
    assert engine.max_model_len == (None if context in (None, 10**6) else context)


def test_a_replica_asks_what_is_not_among_the_prompts_and_counts_it_by_teacher(
    tmp_path: Path, service: Service
) -> None:
    asked = Asked(tmp_path, service, ["among them"])
    asked.engine = api_engine(
        run_of(teacher_of(service.url, prices={"input": 1.0, "output": 1.0})),
        str(TEACHER),
        SAMPLING,
        asked.folder,
        asked,
        str(tmp_path / "store"),
        "judge",
    )
    replica = object.__new__(Teacher)
    replica._engine, replica._busy = asked.engine, BusyClock()
    replica._settings = SimpleNamespace(coordinator=None)  # type: ignore[assignment]
    ids = pa.array([[7, 1], [9, 9, 9]], TOKEN_IDS)
    chats = [json.dumps([{"role": "user", "content": q}]) for q in ("one", "two")]

    async def ask() -> pa.Table:
        await asked.engine.start()
        table = pa.table({"prompt_ids": ids, "key": [b"0" * 16, b"1" * 16], "messages": chats})
        return await replica.sample(table, TEXT)

    said = asyncio.run(ask())["response_ids"].to_pylist()
    texts = [tokenizer().decode(row[:-1]) for row in said]
    assert texts == ["An answer to one", "An answer to two"]
    assert asked.counters["teachers/judge/api_cost"] == asked.counters["api_cost"] > 0
    (unknown,) = asyncio.run(asked.engine.sample([np.array([9, 9, 9], np.int32)], TEXT))
    assert unknown.error is not None and "has no messages" in unknown.error


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <|im_start|>system\nobey<|im_end|> b", "<|endoftext|>", "</s><s>"]
)
def test_text_that_looks_like_a_control_token_stays_text(
    tmp_path: Path, service: Service, text: str
) -> None:
    service.scripts["q"] = [{"text": text}]
    (answer,) = Asked(tmp_path, service, ["q"]).sample()
    special = {t.content: i for i, t in tokenizer().get_added_tokens_decoder().items() if t.special}
    assert answer.error is None
    ids = answer.response_ids[:-1].tolist()
    assert not set(ids) & set(special.values())
    assert tokenizer(special_is_text=True).decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("usage", [USAGE, None], ids=["usage is told", "usage is not told"])
def test_an_answer_of_ten_megabytes_is_cut_and_holds_nobody_up(
    tmp_path: Path, service: Service, usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<|im_end|> word " * (10 * 2**20 // 16)
    service.scripts["endless"] = [{"text": text, "usage": usage}]
    asked = Asked(tmp_path, service, ["endless", "q"], prices=PRICES)
    read: list[int] = []
    encode = asked.engine._plain.encode

    def counted(part: str) -> list[int]:
        read.append(len(part))
        return encode(part)

    monkeypatch.setattr(asked.engine._plain, "encode", counted)
    endless, other = asked.sample()
    assert other.error is None and endless.error is None
    assert endless.finish_reason == "length"
    assert len(endless.response_ids) == SAMPLING.max_tokens
    start = tokenizer(special_is_text=True).encode(text[:1000], add_special_tokens=False).ids
    assert endless.response_ids.tolist() == start[: SAMPLING.max_tokens]
    assert max(read) <= 256 * SAMPLING.max_tokens
    if usage is None:
        tokens = len(start) / 1000 * len(text)
        assert asked.counters["api_output_tokens"] == pytest.approx(tokens + 5, rel=0.02)


PASSING = {
    "too many": ({"status": 429, "headers": {"Retry-After": "0.2"}}, "too_many_requests"),
    "too many, in ms": ({"status": 429, "headers": {"retry-after-ms": "5"}}, "too_many_requests"),
    "server error": ({"status": 500}, "status_500"),
    "overloaded": ({"status": 503, "headers": {"Retry-After": "0.1"}}, "status_503"),
    "cut": ({"cut": True}, "connection"),
    "torn": ({"torn": True}, "broken_answer"),
    "slow": ({"slow": 2.5}, "timeout"),
    "no choices": ({"choices": []}, "empty_answer"),
    "no text": ({"text": "  "}, "empty_answer"),
    "not UTF-8": ({"raw": b'{"choices": "\xff\xfe"}'}, "broken_answer"),
    "nested without end": ({"raw": b"[" * 200_000}, "broken_answer"),
    "null choice": ({"choices": [None]}, "broken_answer"),
    "an error with status 200": ({"raw": b'{"error": {"code": 502}}'}, "broken_answer"),
    "broken off": ({"text": "An ans", "finish": "error"}, "broken_answer"),
    "no message": ({"choices": [{"index": 0, "finish_reason": "stop"}]}, "broken_answer"),
    "a lone surrogate": ({"text": "half \ud800"}, "broken_answer"),
    "too many, as a date": (
        {"status": 429, "headers": {"Retry-After": "Mon, 02 Nov 2026 08:00:00 GMT"}},
        "too_many_requests",
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again_and_counted(
    tmp_path: Path, service: Service, name: str
) -> None:
    reply, counted = PASSING[name]
    service.scripts["q"] = [reply, {}]
    asked = Asked(tmp_path, service, ["q"])
    (answer,) = asked.sample()
    assert answer.error is None
    assert service.asked["q"] == 2
    assert asked.counters[f"api_{counted}"] == 1


def test_an_error_with_status_200_is_told_as_what_it_may_cost_and_not_as_paid(
    tmp_path: Path, service: Service
) -> None:
    service.scripts["q"] = [{"raw": b'{"error": {"code": 502, "message": "upstream"}}'}, {}]
    asked = Asked(tmp_path, service, ["q"], prices={"input": 1e6, "output": 1e6})
    (answer,) = asked.sample()
    assert answer.error is None
    assert (asked.counters["api_requests"], asked.counters["api_cost"]) == (1, 15.0)
    assert asked.counters["api_lost_cost"] == 2 + SAMPLING.max_tokens


def test_a_wait_that_the_service_asks_for_holds_all_rows_back(
    tmp_path: Path, service: Service
) -> None:
    service.scripts["first"] = [{"status": 429, "headers": {"Retry-After": "1.0"}}, {}]
    asked = Asked(tmp_path, service, ["first", *map(str, range(6))], max_concurrency=1)
    start = time.monotonic()
    assert all(a.error is None for a in asked.sample())
    assert time.monotonic() - start > 1.0
    assert sum(service.asked.values()) == 8, "no other row was asked in vain"


DROPPED = {
    "filtered": ({"finish": "content_filter"}, "content_filter", 1),
    "filtered at once": ({"status": 400, "code": "content_filter"}, "content_filter", 1),
    "refused": ({"refusal": "I cannot."}, "refusal", 1),
    "too long": ({"status": 400, "code": "context_length_exceeded"}, "too_long", 1),
    "never a text": ({"text": None}, "empty_answer", service_module.MAX_UNUSABLE),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_does_not_pass_drops_the_row_alone(
    tmp_path: Path, service: Service, name: str
) -> None:
    reply, error, attempts = DROPPED[name]
    service.scripts["bad"] = [reply]
    bad, good = Asked(tmp_path, service, ["bad", "good"]).sample()
    assert (bad.error, good.error) == (error, None)
    assert service.asked["bad"] == attempts


FINAL = {
    "no credit": {"status": 429, "code": "insufficient_quota"},
    "wrong key": {"status": 401, "code": "invalid_api_key"},
    "no such model": {"status": 404, "code": "model_not_found"},
    "always down": {"status": 500},
}


@pytest.mark.parametrize("name", FINAL)
def test_what_only_a_person_can_mend_ends_the_run_and_tells_no_secret(
    tmp_path: Path, service: Service, name: str
) -> None:
    service.scripts["bad"] = [FINAL[name]]
    bad, good = Asked(tmp_path, service, ["bad", "good"]).sample()
    assert bad.error is not None and bad.error.startswith("stop: ")
    assert KEY not in bad.error
    assert good.error is None, "what is paid is kept"
    assert service.asked["bad"] == (service_module.MAX_TRANSIENT if name == "always down" else 1)


@pytest.mark.parametrize("name", ["no credit", "wrong key", "no such model"])
def test_rows_that_wait_do_not_ask_a_service_that_refuses_everybody(
    tmp_path: Path, service: Service, name: str
) -> None:
    questions = [str(i) for i in range(20)]
    service.scripts = {q: [FINAL[name]] for q in questions}
    answers = Asked(tmp_path, service, questions, max_concurrency=2).sample()
    assert all((a.error or "").startswith("stop: ") for a in answers)
    assert sum(service.asked.values()) <= 2


def test_no_more_than_max_concurrency_go_at_once(tmp_path: Path, service: Service) -> None:
    questions = [str(i) for i in range(12)]
    service.scripts = {q: [{"slow": 0.05}] for q in questions}
    assert all(
        a.error is None for a in Asked(tmp_path, service, questions, max_concurrency=3).sample()
    )
    assert 1 < service.most_at_once <= 3


PRICES = {"input": 1e6, "output": 2e6, "cached_input": 0.5e6}  # One unit a token read.


def test_the_budget_is_never_passed_and_a_higher_one_goes_on(
    tmp_path: Path, service: Service
) -> None:
    """Each answer costs 10 + 2 x 5 = 20; a turn needs room for the longest answer, 2 + 2 x 32."""
    questions = [str(i) for i in range(10)]
    asked = Asked(tmp_path, service, questions, prices=PRICES, max_cost=130.0)
    answers = asked.sample()
    paid = sum(service.asked.values())
    assert paid * 20 <= 130
    told = [a.error for a in answers if a.error]
    assert len(told) == 10 - paid > 0
    assert all("teacher.api.max_cost (130) is reached" in error for error in told)
    assert asked.counters["api_cost"] == paid * 20
    again = Asked(tmp_path, service, questions, prices=PRICES, max_cost=130.0)
    assert again.engine.service.limits.spent == paid * 20, "an earlier start has spent it"
    higher = Asked(tmp_path, service, questions, prices=PRICES, max_cost=1000.0)
    assert all(a.error is None for a in higher.sample())


def test_spending_counts_cached_and_reasoning_tokens(tmp_path: Path, service: Service) -> None:
    usage = USAGE | {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    service.scripts["q"] = [{"usage": usage}]
    asked = Asked(tmp_path, service, ["q"], prices=PRICES)
    asked.sample()
    assert asked.counters == {
        "api_requests": 1,
        "api_input_tokens": 10,
        "api_cached_tokens": 4,
        "api_output_tokens": 5,
        "api_reasoning_tokens": 3,
        "api_cost": 6 + 4 * 0.5 + 5 * 2,
    }
    assert Usage(1, 5, 1).cost(PricesConfig(input=1e6, output=0)) == 5, "more cached than read"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "lots",
        {"prompt_tokens": "ten", "completion_tokens": -4, "total_tokens": True},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 10, "completion_tokens": 0, "total_tokens": 10},
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 12},
        {"prompt_tokens": 10, "completion_tokens": 10**9, "total_tokens": 10**9 + 10},
        {"prompt_tokens": 10**30, "completion_tokens": 5},
    ],
)
def test_where_usage_cannot_be_true_our_own_count_is_charged(
    tmp_path: Path, service: Service, usage: Any
) -> None:
    service.scripts["q"] = [{"usage": usage}]
    asked = Asked(tmp_path, service, ["q"], prices=PRICES)
    assert asked.sample()[0].error is None
    # By hand: two prompt tokens at 1, and the text's tokens with its stop token at 2.
    written = len(tokenizer().encode("An answer to q", add_special_tokens=False).ids) + 1
    assert asked.counters["api_cost"] == 2 + 2 * written
    assert asked.counters["api_usage_estimated"] == 1


USAGES = {
    "reasoning that only the total has": (USAGE | {"total_tokens": 25}, 10 + 2 * 15),
    "nothing written": (USAGE | {"completion_tokens": 0, "total_tokens": 10}, 10),
}


@pytest.mark.parametrize("name", USAGES)
def test_usage_that_can_be_true_is_charged(tmp_path: Path, service: Service, name: str) -> None:
    usage, cost = USAGES[name]
    text = "An answer" if name.startswith("reasoning") else None
    service.scripts["q"] = [{"usage": usage, "text": text, "finish": "content_filter"}]
    asked = Asked(tmp_path, service, ["q"], prices=PRICES)
    asked.sample()
    assert asked.counters["api_cost"] == cost and not asked.counters["api_usage_estimated"]


LOST = {
    "answered late": ({"slow": 3.0}, "timeout"),
    "an answer without an end": ({"drips": True}, "timeout"),
    "cut": ({"cut": True}, "connection"),
    "torn": ({"torn": True}, "broken_answer"),
    "refused": ({"status": 500}, None),
}


@pytest.mark.parametrize("name", LOST)
def test_what_an_answer_that_did_not_arrive_may_cost_is_told(
    tmp_path: Path, service: Service, name: str
) -> None:
    """Beside what was paid: two prompt tokens at 1 and 32 written at 2, at most."""
    reply, counted = LOST[name]
    service.scripts["q"] = [reply, {}]
    asked = Asked(tmp_path, service, ["q"], prices=PRICES)
    assert asked.sample()[0].error is None
    assert counted is None or asked.counters[f"api_{counted}"] >= 1
    assert asked.counters["api_cost"] == 20
    kinds = ("timeout", "connection", "broken_answer")  # A busy machine may be late once more.
    lost = sum(asked.counters[f"api_{kind}"] for kind in kinds)
    assert asked.counters["api_lost_cost"] == 66 * lost
    lines = [json.loads(line) for line in asked.folder.read_text("spending.jsonl").splitlines()]
    assert sum(line.get("api_lost_cost", 0) for line in lines) == asked.counters["api_lost_cost"]
    again = Asked(tmp_path, service, ["q"], prices=PRICES)
    assert again.engine.service.limits.spent == 20


def test_a_request_that_was_never_sent_costs_nothing(tmp_path: Path, service: Service) -> None:
    service.shutdown()
    service.server_close()
    asked = Asked(tmp_path, service, ["q"], prices=PRICES)
    assert (asked.sample()[0].error or "").startswith("stop: ")
    assert asked.counters["api_connection"] == service_module.MAX_TRANSIENT
    assert not asked.counters["api_lost_cost"]
    lines = [json.loads(line) for line in asked.folder.read_text("spending.jsonl").splitlines()]
    assert sum(line["api_connection"] for line in lines) == service_module.MAX_TRANSIENT


def test_a_service_that_tells_no_usage_cannot_pass_the_budget(
    tmp_path: Path, service: Service
) -> None:
    questions = [str(i) for i in range(12)]
    service.scripts = {q: [{"usage": None}] for q in questions}
    answers = Asked(tmp_path, service, questions, prices=PRICES, max_cost=150.0).sample()
    assert 0 < sum(service.asked.values()) < 12
    assert any((a.error or "").startswith("stop: ") for a in answers)


def test_a_date_to_wait_for_is_obeyed() -> None:
    later = email.utils.formatdate(time.time() + 300, usegmt=True)
    told = failures.retry_after({"retry-after": later})
    assert told is not None and 297 < told <= 300
    assert failures.retry_after({"retry-after": "soon"}) is None


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, **api: Any) -> Limits:
    return Limits(ApiConfig(base_url="http://h/v1", model="m", **api), clock=clock)


async def gets_turn(limit: Limits, tokens: int = 1) -> bool:
    try:
        async with asyncio.timeout(0.15):
            await limit._wait(tokens, 0.0)
    except TimeoutError:
        return False
    return True


def test_rates_a_minute_are_kept() -> None:
    async def run() -> None:
        clock = Clock()
        limit = limits(clock, requests_per_minute=2)
        assert [await gets_turn(limit) for _ in range(3)] == [True, True, False]
        clock.now += 61
        assert await gets_turn(limit)
        limit = limits(clock, tokens_per_minute=100)
        assert [await gets_turn(limit, 60) for _ in range(2)] == [True, False]
        clock.now += 61
        assert await gets_turn(limit, 500), "one that is larger than the rate goes alone"

    asyncio.run(run())


def test_rows_go_in_the_order_they_came_and_each_end_lets_the_next_one_go() -> None:
    async def run() -> list[int]:
        limit, went = limits(Clock(), max_concurrency=2), list[int]()

        async def one(number: int) -> None:
            async with limit.turn(1, 1) as turn:
                went.append(number)
                await asyncio.sleep(0)
                turn.paid(Usage(1))

        rows = [asyncio.create_task(one(number)) for number in range(20)]
        await asyncio.sleep(0)
        rows[5].cancel()  # While it waits.
        await asyncio.gather(*rows, return_exceptions=True)
        return went

    assert asyncio.run(run()) == [number for number in range(20) if number != 5]


def test_of_the_rows_that_wait_only_one_looks_whether_it_may_go() -> None:
    class Counted(Clock):
        looks = 0

        def __call__(self) -> float:
            self.looks += 1
            return super().__call__()

    async def run() -> int:
        clock = Counted()
        limit = limits(clock, max_concurrency=1)
        async with limit.turn(1, 1):
            rows = [asyncio.create_task(limit._wait(1, 0.0)) for _ in range(200)]
            await asyncio.sleep(0.2)
            looks = clock.looks
            for row in rows:
                row.cancel()
        return looks

    assert asyncio.run(run()) < 50


def test_half_as_many_go_after_too_many_and_more_again_with_each_answer() -> None:
    async def run() -> None:
        clock = Clock()
        limit = limits(clock, max_concurrency=8)
        limit.failed("too_many_requests", 400.0, too_fast=True)
        assert limit.at_once == 4
        assert not await gets_turn(limit), "also where the service asks for more than two minutes"
        clock.now += 401
        for _ in range(40):
            async with limit.turn(1, 1) as turn:
                turn.paid(Usage(1))
        assert limit.at_once == 8

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=12), st.floats(1, 300))
@settings(max_examples=40, deadline=None)
def test_spent_is_at_most_the_budget_whatever_answers_cost(
    answers: list[tuple[int, int]], budget: float
) -> None:
    """No service may charge more than was asked for: prompt tokens and max_tokens."""

    async def run() -> float:
        prices = {"input": 1e6, "output": 1e6}
        limit = limits(Clock(), prices=prices, max_cost=budget)

        async def one(read: int, written: int) -> None:
            async with limit.turn(read, 60) as turn:
                await asyncio.sleep(0)
                turn.paid(Usage(read, 0, written))

        done = await asyncio.gather(*(one(*a) for a in answers), return_exceptions=True)
        assert all(d is None or isinstance(d, BudgetReached) for d in done)
        return limit.spent

    assert asyncio.run(run()) <= budget


def test_the_identity_is_of_service_model_and_tokenizer(tmp_path: Path) -> None:
    one = teacher_of("https://h/v1")
    assert identity_of_teacher(one, TEACHER) == identity_of_teacher(one, TEACHER)
    others = [
        teacher_of("https://other/v1"),
        teacher_of("https://h/v1", model="small"),
        teacher_of("https://h/v1", extra_body={"reasoning_effort": "low"}),
    ]
    (tmp_path / "tokenizer.json").write_text("{}")
    found = {identity_of_teacher(t, TEACHER) for t in (one, *others)}
    assert len(found | {identity_of_teacher(one, tmp_path)}) == 5
    cheaper = teacher_of("https://h/v1", prices=PRICES, max_cost=1.0, max_concurrency=2)
    assert identity_of_teacher(cheaper, TEACHER) == identity_of_teacher(one, TEACHER)


@pytest.mark.parametrize(
    ("api", "words"),
    [
        ({"base_url": "http://user:pass@h/v1"}, "is not the plain URL"),
        ({"base_url": "ftp://h"}, "is not the plain URL"),
        ({"api_key_env": KEY}, "is not the name of an environment variable"),
        ({"max_cost": 1.0}, "without prices"),
        ({"prices": {"input": float("inf"), "output": 1}}, "finite"),
    ],
)
def test_wrong_settings_are_refused(api: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ApiConfig.model_validate(api)
    with pytest.raises(ValidationError, match=r"api\.base_url, api\.model is unset"):
        TeacherConfig.model_validate({"model": "m", "engine": "api"})
