"""A teacher asked by token ids: what it makes of a server's answers, and servers it refuses.

The server is a made-up one that can be wrong in one way at a time. That a real vLLM answers like
the engine in process is in tests/system/test_api_run.py.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.base import ApiConfig
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import tail_logprob
from raystill.datasets.rows.signal import Signal, held_out_signal
from raystill.model.identity import identity_of_teacher
from raystill.model.sampling import resolve_sampling
from raystill.serve.api import failures
from raystill.serve.api.ids import IdsEngine
from raystill.serve.services import api_engine
from tests.support.end_to_end import TEACHER
from tests.support.vllm_like import Kind, logprobs_of, vllm_like

TOP_K = 8
STOP = 2
PROMPT = np.array([7, 8, 9], np.int32)
RESPONSE = np.array([100, 4000, 31, 49151], np.int32)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "pause_s", lambda attempt: 0.01)
    context = ssl.create_default_context()  # Each client would read all certificates anew.
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)


def config_of(url: str, kind: str = "topk", **teacher: Any) -> RunConfig:
    api = {"base_url": url, "model": "large", "api_key_env": None, "ids": True}
    api |= teacher.pop("api", {})
    whole = {
        "model": str(TEACHER),
        "engine": "api",
        "max_model_len": 256,
        "api": api,
        "sampling": {"temperature": 0.0, "max_tokens": 5, "stop_token_ids": [STOP]},
        **teacher,
    }
    return RunConfig.model_validate(
        {
            "teacher": whole,
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"path": "prompts.jsonl"},
            "signal": {"kind": kind, "top_k": TOP_K},
            "objective": {"cross_entropy": 1.0},
        }
    )


def with_engine(
    config: RunConfig, folder: Path, ask: Callable[[IdsEngine], Awaitable[Any]] | None = None
) -> Any:
    """What ``ask`` gives of the started engine."""

    async def run() -> Any:
        sampling = resolve_sampling(config.teacher, TEACHER)
        run_folder = RunFolder(str(folder)).ensure()
        engine = api_engine(config, str(TEACHER), sampling, run_folder, None, str(folder))
        assert isinstance(engine, IdsEngine)
        await engine.start()
        return None if ask is None else await ask(engine)

    return asyncio.run(run())


def test_ids_logprobs_and_tail_are_those_of_the_distribution(tmp_path: Path) -> None:
    kind = Kind()
    with vllm_like(kind) as server:
        (answer,) = with_engine(
            config_of(server.url), tmp_path, lambda e: e.sample([PROMPT], Signal("topk", TOP_K))
        )
    assert (len(answer.response_ids), answer.finish_reason) == (5, "length")
    context = PROMPT.tolist()
    for t, token in enumerate(answer.response_ids.tolist()):
        logprobs = logprobs_of(kind, context).astype(np.float32)
        best = np.argsort(-logprobs, kind="stable")[:TOP_K]
        assert answer.topk_ids[t].tolist() == best.tolist()
        assert answer.topk_logprobs[t].tolist() == logprobs[best].tolist(), "to the last bit"
        assert answer.sampled_logprobs[t] == logprobs[token]
        context.append(token)
    assert (answer.tail_logprob == tail_logprob(answer.topk_logprobs, kind.vocab_size)).all()


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_given_responses_are_scored_with_tokens_outside_the_best(tmp_path: Path, kind: str) -> None:
    """The response's tokens are improbable ones, and the last is read by forcing it."""
    server_kind = Kind()
    with vllm_like(server_kind) as server:
        (answer,) = with_engine(
            config_of(server.url, kind),
            tmp_path,
            lambda e: e.score([PROMPT], [RESPONSE], Signal(kind, TOP_K)),
        )
    assert answer.response_ids.tolist() == RESPONSE.tolist()
    for t, token in enumerate(RESPONSE):
        context = [*PROMPT.tolist(), *RESPONSE[:t].tolist()]
        logprobs = logprobs_of(server_kind, context).astype(np.float32)
        assert answer.sampled_logprobs[t] == logprobs[token]
        if kind == "topk":
            best = np.argsort(-logprobs, kind="stable")[:TOP_K]
            assert answer.topk_ids[t].tolist() == best.tolist()
            assert answer.topk_logprobs[t].tolist() == logprobs[best].tolist()


def test_a_probability_of_zero_is_told_as_one(tmp_path: Path) -> None:
    with vllm_like(Kind(zero=4000)) as server:
        (answer,) = with_engine(
            config_of(server.url),
            tmp_path,
            lambda e: e.score([PROMPT], [RESPONSE], Signal("sampled")),
        )
    assert answer.sampled_logprobs[1] == -np.inf
    assert np.isfinite(answer.sampled_logprobs[[0, 2, 3]]).all()


def test_the_vocabulary_is_the_servers_own_whatever_the_configuration_says(tmp_path: Path) -> None:
    async def size(engine: IdsEngine) -> int:
        return engine.vocab_size

    for rows in (49152, 49280, 151_936):
        with vllm_like(Kind(vocab_size=rows)) as server:
            assert with_engine(config_of(server.url), tmp_path / str(rows), size) == rows


REFUSED: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "another tokenizer": (Kind(shift_ids=1), {}, "has another tokenizer than"),
    "fewer ids": (Kind(vocab_size=30_000), {}, "does not take id 49151"),
    "no ids": (Kind(forgets=("token_ids", "prompt_token_ids")), {}, "needs a vLLM server"),
    "no scores": (Kind(forgets=("prompt_logprobs",)), {}, "needs a vLLM server"),
    "forces nothing": (Kind(forces=False), {}, "does not take id 49151.*it answered"),
    "too few logprobs": (Kind(max_logprobs=5), {}, "--max-logprobs 8"),
    "after temperature": (Kind(temperature_in_logprobs=True), {}, "--logprobs-mode raw_logprobs"),
    "logits": (Kind(logits=True), {}, "--logprobs-mode raw_logprobs"),
    "shorter": (Kind(max_model_len=128), {}, "set teacher.max_model_len: 128"),
    "another name": (Kind(), {"model": "small"}, "serves large; name one of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_is_not_what_the_run_takes_it_for_is_refused(
    tmp_path: Path, name: str
) -> None:
    kind, api, words = REFUSED[name]
    with vllm_like(kind) as server, pytest.raises(RunError, match=words):
        with_engine(config_of(server.url, api=api), tmp_path)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"http://127.0.0.1:9/v1 failed 8 times"):
        with_engine(config_of("http://127.0.0.1:9/v1"), tmp_path)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one id fewer": ({"token_ids": [5, 6, 7, STOP], "finish_reason": "stop"}, "broken_answer"),
    "ids of others": ({"token_ids": [5, 6, 7, 8, 9]}, "broken_answer"),
    "no logprobs": ({"logprobs": None}, "broken_answer"),
    "aborted": ({"finish_reason": "abort"}, "broken_answer"),
    "nothing": ({"token_ids": []}, "empty_answer"),
    "nested ids": ({"token_ids": [[1], [2]]}, "broken_answer"),
    "parts of ids": ({"token_ids": [1.7, 2.2]}, "broken_answer"),
    "ids as text": ({"token_ids": ["1"]}, "broken_answer"),
    "ids as flags": ({"token_ids": [True, False]}, "broken_answer"),
    "ids of no token": ({"token_ids": [5, 10**12]}, "broken_answer"),
    "not a number": (
        {"token_ids": [5] * 5, "logprobs": {"top_logprobs": [{"token_id:5": float("nan")}] * 5}},
        "broken_answer",
    ),
    "text": (
        {"token_ids": [5] * 5, "logprobs": {"top_logprobs": [{"five": -1.0}] * 5}},
        "broken_answer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_does_not_add_up_is_dropped_and_never_trained_on(
    tmp_path: Path, name: str
) -> None:
    breaks, error = WRONG[name]
    kind = Kind()
    with vllm_like(kind) as server:

        async def ask(engine: IdsEngine) -> Any:
            kind.breaks = breaks
            return await engine.sample([PROMPT], Signal("topk", TOP_K))

        (answer,) = with_engine(config_of(server.url), tmp_path, ask)
    assert answer.error == error


def first_id() -> int:
    return int(logprobs_of(Kind(), PROMPT.tolist()).argmax())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"own_stop": first_id()}, "is not among teacher.sampling.stop_token_ids"),
        ({"cuts_at": 3}, "cut an answer at 3 tokens, where 5 were asked for"),
    ],
)
def test_a_server_with_limits_of_its_own_ends_the_run(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with vllm_like(Kind(**changes)) as server:
        (answer,) = with_engine(
            config_of(server.url), tmp_path, lambda e: e.sample([PROMPT], Signal("text"))
        )
    assert answer.error.startswith("stop: ") and words in answer.error


def test_rows_that_do_not_fit_are_not_sent(tmp_path: Path) -> None:
    with vllm_like(Kind()) as server:

        async def ask(engine: IdsEngine) -> Any:
            before = server.asked["completions"]
            sampled = await engine.sample(
                [np.empty(0, np.int32), np.full(256, 5, np.int32), np.array([50_000], np.int32)],
                Signal("text"),
            )
            scored = await engine.score(
                [PROMPT, np.full(253, 5, np.int32)],
                [np.empty(0, np.int32), RESPONSE],
                Signal("sampled"),
            )
            assert server.asked["completions"] == before
            return [a.error for a in [*sampled, *scored]]

        errors = with_engine(config_of(server.url), tmp_path, ask)
    assert errors == ["empty", "too_long", "invalid_ids", "empty", "too_long"]


def test_the_probe_and_each_row_are_paid_for(tmp_path: Path) -> None:
    prices = {"prices": {"input": 1e6, "output": 2e6}, "max_cost": 10_000.0}
    with vllm_like(Kind()) as server:

        async def ask(engine: IdsEngine) -> float:
            before = engine.service.limits.spent
            assert 0 < before < 2000
            await engine.sample([PROMPT], Signal("topk", TOP_K))
            return engine.service.limits.spent - before

        assert with_engine(config_of(server.url, api=prices), tmp_path, ask) == 3 + 2 * 5
        tight = prices | {"max_cost": 1.0}
        with pytest.raises(RunError, match="max_cost"):
            with_engine(config_of(server.url, api=tight), tmp_path / "tight")


def test_ids_are_part_of_the_identity_and_bring_a_signal() -> None:
    by_ids, by_text = (config_of("http://h/v1", "text", api={"ids": ids}) for ids in (True, False))
    assert identity_of_teacher(by_ids.teacher, TEACHER) != identity_of_teacher(
        by_text.teacher, TEACHER
    )
    assert held_out_signal(by_ids).kind == "topk"
    assert held_out_signal(by_text).kind == "text"
    with pytest.raises(ValidationError, match="extra_body sets logprobs, n"):
        ApiConfig(ids=True, extra_body={"n": 2, "logprobs": 3})
