"""An API teacher behind a proxy that spoils answers and keeps accounts as a provider would."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.end_to_end import TEACHER
from tests.support.faulty_proxy import CYCLE, FAULTS, Proxy
from tests.support.json_service import serving
from tests.support.scripted_service import KEY, Asked, Service, scripted_service

PRICES = {"input": 1e6, "output": 2e6}
PROMPT_TOKENS, MAX_TOKENS = 2, 32  # As in `Asked`.
KINDS = tuple(kind for kind in FAULTS if kind != "late")
TIME_LIMIT_S = 600.0
"""Late answers are in test_api_teacher.py; here no machine is so busy that others are."""
QUESTIONS = [str(number) for number in range(2 * CYCLE)]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TEACHER / "tokenizer.json"))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Tells what it charges by the student's tokenizer, so that the run's own count is the same."""
    with scripted_service(monkeypatch) as server:
        for question in QUESTIONS:
            text = f"An answer to {question}"
            written = len(tokenizer().encode(text, add_special_tokens=False).ids) + 1
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": written}
            server.scripts[question] = [{"usage": usage}]
        yield server


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with serving(Proxy(service.url.removesuffix("/v1"), KEY, PRICES, KINDS)) as server:
        yield server


def through(proxy: Proxy, folder: Path, **api: Any) -> Asked:
    """The questions, asked of the proxy."""
    settings = {"prices": PRICES, "request_timeout_s": TIME_LIMIT_S, **api}
    return Asked(folder, proxy, QUESTIONS, **settings)


def test_whatever_fails_each_answer_is_paid_for_once_and_lost_ones_are_told(
    proxy: Proxy, tmp_path: Path
) -> None:
    asked = through(proxy, tmp_path, max_concurrency=32)
    answers = asked.sample()
    assert not [answer.error for answer in answers if answer.error]
    assert all(proxy.faults[kind] >= 2 for kind in KINDS), "a fault did not come to pass"
    assert len(proxy.answered) == len(QUESTIONS) and set(proxy.answered.values()) == {1}
    told = asked.counters
    assert told["api_requests"] == len(QUESTIONS)
    assert told["api_cost"] == pytest.approx(proxy.cost)
    estimated = sum(proxy.faults[kind] for kind in ("no usage", "no tokens", "absurd"))
    assert told["api_usage_estimated"] == estimated
    lost = sum(proxy.faults[kind] for kind in ("cut before", "torn"))
    most = PROMPT_TOKENS + 2 * MAX_TOKENS
    assert told["api_lost_cost"] >= lost * most > proxy.unread_cost > 0
    assert told["api_lost_cost"] % most == 0


def test_the_budget_holds_and_a_higher_one_pays_for_no_answer_again(
    proxy: Proxy, tmp_path: Path
) -> None:
    budget = 400.0
    first = through(proxy, tmp_path, max_cost=budget)
    answered = [answer.error is None for answer in first.sample()]
    assert 0 < sum(answered) < len(QUESTIONS)
    assert proxy.cost == pytest.approx(first.counters["api_cost"]) and proxy.cost <= budget
    second = through(proxy, tmp_path, max_cost=1e6)
    second.prompts = [p for p, done in zip(second.prompts, answered, strict=True) if not done]
    assert not [answer.error for answer in second.sample() if answer.error]
    assert set(proxy.answered.values()) == {1} and len(proxy.answered) == len(QUESTIONS)
    assert second.engine.service.limits.spent == pytest.approx(proxy.cost)
