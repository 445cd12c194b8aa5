"""A whole run whose teacher is a real OpenAI-compatible server, behind a proxy that injects faults.

The server is vLLM's own, with the tiny teacher. The proxy counts what was answered and what it
costs; the run must have paid for each answer once, stop at its budget, and go on from there.
"""

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.model.sampling import resolve_sampling
from raystill.serve.services import api_engine
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, drive
from tests.support.json_service import JsonHandler, serving
from tests.support.vllm_server import MAX_LOGPROBS, MAX_MODEL_LEN, vllm_server

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

KEY = "planted-service-key-31d9be02"
PRICES = {"input": 1.0, "output": 4.0}
NUM_ROWS, NUM_HELD_OUT = 32, 8


class Proxy(ThreadingHTTPServer):
    """Passes requests on, except that every few of them fail in a way of their own."""

    faults = ("too many", None, "error", None, "cut before", None, "torn", None, None)

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.upstream = upstream
        self.lock = threading.Lock()
        self.number = 0
        self.answered: dict[str, int] = {}
        self.cost = 0.0


class Passing(JsonHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.body()
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with self.server.lock:
            fault = self.server.faults[self.server.number % len(self.server.faults)]
            self.server.number += 1
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
        if fault == "torn":
            self.send(200, data[: len(data) // 3])  # Not charged for: it gives the wrong length.
            return
        usage = json.loads(data)["usage"]
        question = json.dumps(json.loads(body)["messages"])
        with self.server.lock:
            self.server.answered[question] = self.server.answered.get(question, 0) + 1
            spent = usage["prompt_tokens"] * PRICES["input"]
            spent += usage["completion_tokens"] * PRICES["output"]
            self.server.cost += spent / 1e6
        self.send(200, data)


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture
def proxy(server_url: str) -> Iterator[Proxy]:
    with serving(Proxy(server_url)) as server:
        yield server


def test_a_run_pays_each_answer_once_stops_at_its_budget_and_goes_on(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", KEY)
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["teacher"] = {
        "engine": "api",
        "model": str(TEACHER),
        "sampling": config["teacher"]["sampling"],
        "api": {
            "base_url": f"http://127.0.0.1:{proxy.server_address[1]}/v1",
            "model": "large",
            "api_key_env": "SERVICE_API_KEY",
            "max_concurrency": 4,
            "prices": PRICES,
            "max_cost": 0.0016,
        },
    }
    config["prompts"]["path"] = str(ROOT / config["prompts"]["path"])
    config["signal"] = {"kind": "text"}
    config["objective"] = {"cross_entropy": 1.0}
    config["output"] = {"path": str(tmp_path / "run")}
    run_file = tmp_path / "api.yaml"
    run_file.write_text(yaml.safe_dump(config))
    first = drive("run", run_file)
    assert first.returncode == 1, first.stdout
    assert "teacher.api.max_cost (0.0016) is reached" in first.stderr
    paid = sum(proxy.answered.values())
    assert 0 < paid < NUM_ROWS + NUM_HELD_OUT
    assert proxy.cost <= 0.0016
    second = drive("run", run_file, "--set", "teacher.api.max_cost=1.0")
    assert second.returncode == 0, second.stderr
    assert set(proxy.answered.values()) == {1}, "an answer was paid for twice"
    assert len(proxy.answered) == NUM_ROWS + NUM_HELD_OUT
    files = RunFiles(tmp_path / "run")
    summary = files.json("summary.json")
    assert summary["rows_trained"] == NUM_ROWS
    assert summary["api"]["requests"] == NUM_ROWS + NUM_HELD_OUT
    assert summary["api"]["cost"] == pytest.approx(proxy.cost, rel=0.02)
    assert summary["api"]["too_many_requests"] > 0 and summary["api"]["broken_answer"] > 0
    catalogue = TeacherStore(str(tmp_path / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (NUM_ROWS + NUM_HELD_OUT, 0)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in written if KEY.encode() in p.read_bytes()]
    assert KEY not in first.stdout + first.stderr + second.stdout + second.stderr


QUESTIONS = ("Name a colour.", "What is the capital of France?", "Count from one to five.")
MAX_TOKENS = 24
SCORED = (5, 17, MAX_TOKENS)
LOGPROB_TOLERANCE = 1e-3  # nats, float32 on both sides; as in tests/serve/test_vllm_parity.py


def ids_config(url: str, **more: Any) -> RunConfig:
    api = {"base_url": f"{url}/v1", "model": "large", "api_key_env": None, "ids": True}
    teacher = {
        "model": str(TEACHER),
        "engine": "api",
        "max_model_len": MAX_MODEL_LEN,
        "api": api,
        "sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
        **more,
    }
    return RunConfig.model_validate(
        {
            "teacher": teacher,
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"path": "prompts.jsonl"},
            "signal": {"kind": "topk", "top_k": MAX_LOGPROBS},
        }
    )


def questions() -> list[list[int]]:
    """Prompts of some tokens, and one that with a response of MAX_TOKENS fills the context."""
    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    chats = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    prompts = [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]
    return [*prompts, (prompts[0] * 40)[: MAX_MODEL_LEN - MAX_TOKENS]]


def by_ids(config: RunConfig, folder: Path, ask: Any) -> Any:
    """What ``ask`` gives of the engine by ids."""
    sampling = resolve_sampling(config.teacher, TEACHER)
    run_folder = RunFolder(str(folder)).ensure()

    async def run() -> Any:
        engine = api_engine(config, str(TEACHER), sampling, run_folder, None, str(folder))
        await engine.start()
        return await ask(engine)

    return asyncio.run(run())


def test_asked_by_ids_a_server_says_what_the_same_teacher_says_in_process(
    server_url: str, tmp_path: Path
) -> None:
    config = ids_config(server_url)
    prompts = questions()
    generator = np.random.default_rng(5)
    lengths = [*SCORED, MAX_TOKENS]
    responses = [generator.integers(3, 49000, n).tolist() for n in lengths]
    own = {"model": str(TEACHER), "dtype": "float32", "max_model_len": MAX_MODEL_LEN}
    own |= {"kv_cache_gib": 0.5, "max_num_seqs": 4}
    own |= {"sampling": config.teacher.sampling.model_dump(exclude_none=True)}
    asked = {"teacher": own, "prompts": prompts, "responses": responses, "width": MAX_LOGPROBS}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.support.in_process_teacher"]
    files = [str(tmp_path / "asked.json"), str(tmp_path / "said.pickle")]
    subprocess.run([*command, *files], cwd=ROOT, check=True, timeout=300)
    expected = pickle.loads((tmp_path / "said.pickle").read_bytes())
    arrays = [np.array(p, np.int32) for p in prompts]
    topk = Signal("topk", MAX_LOGPROBS)

    async def ask(engine: Any) -> dict[str, Any]:
        given = [np.array(r, np.int32) for r in responses]
        return {
            "sampled": await engine.sample(arrays, topk),
            "scored": await engine.score(arrays, given, topk),
            "drawn": await engine.score(arrays[:1], given[:1], Signal("sampled")),
            "text": await engine.sample(arrays[:1], Signal("text")),
            "vocab_size": engine.vocab_size,
            "max_model_len": engine.max_model_len,
        }

    found = by_ids(config, tmp_path / "run", ask)
    assert (found["vocab_size"], found["max_model_len"]) == (expected["vocab_size"], MAX_MODEL_LEN)
    for kind in ("sampled", "scored"):
        worst = [difference(*pair) for pair in zip(found[kind], expected[kind], strict=True)]
        print(kind, "nats apart at most", max(worst))
        assert max(worst) < LOGPROB_TOLERANCE
    drawn = found["drawn"][0].sampled_logprobs
    assert np.abs(drawn - expected["scored"][0].sampled_logprobs).max() < LOGPROB_TOLERANCE
    assert found["text"][0].response_ids.tolist() == found["sampled"][0].response_ids.tolist()


def difference(found: Answer, expected: Answer) -> float:
    """Largest difference of two signals, in nats; the tokens must be the same."""
    assert (found.error, expected.error) == (None, None)
    assert found.response_ids.tolist() == expected.response_ids.tolist()
    assert found.finish_reason == expected.finish_reason
    for name in ("sampled_logprobs", "topk_logprobs", "tail_logprob"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert (found.topk_ids[:, 0] == expected.topk_ids[:, 0]).all()
    names = ("sampled_logprobs", "topk_logprobs", "tail_logprob")
    return max(float(np.abs(getattr(found, n) - getattr(expected, n)).max()) for n in names)


def test_a_server_that_is_not_what_the_run_expects_is_refused(
    server_url: str, tmp_path: Path
) -> None:
    async def nothing(engine: Any) -> None:
        return None

    cases = {
        "max_model_len: 256": ids_config(server_url, max_model_len=512),
        "--max-logprobs 65": ids_config(server_url).model_copy(
            update={"signal": ids_config(server_url).signal.model_copy(update={"top_k": 65})}
        ),
    }
    for number, (words, config) in enumerate(cases.items()):
        with pytest.raises(RunError, match=words):
            by_ids(config, tmp_path / str(number), nothing)
