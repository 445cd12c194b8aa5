"""A whole run whose teacher is a real OpenAI-compatible server, behind a proxy that injects faults.

The server is vLLM's own, with the tiny teacher, and the run file the shipped one. The proxy counts
what was answered and what it costs; the run must have paid for each answer once, stop at its
budget, and go on from there. By token ids and in words the server must say what the engine in
process says.
"""

import asyncio
import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from raystill.base.errors import RunError
from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.model.sampling import resolve_sampling
from raystill.serve.services import api_engine
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, drive
from tests.support.faulty_proxy import FAULTS, Proxy
from tests.support.json_service import serving
from tests.support.vllm_server import MAX_LOGPROBS, MAX_MODEL_LEN, vllm_server

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

KEY = "planted-service-key-31d9be02"
RUN_FILE = ROOT / "configs" / "api.yaml"
TIME_LIMIT_S = 20
SMALL_BUDGET = 0.0015
NAMES = ("train", "held_out")


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture
def proxy(server_url: str) -> Iterator[Proxy]:
    prices = yaml.safe_load(RUN_FILE.read_text())["teacher"]["api"]["prices"]
    with serving(Proxy(server_url, KEY, prices)) as server:
        yield server


def overrides(proxy: Proxy, place: Path) -> list[str]:
    """What the shipped run file is run with: where the service is and what it has, the number of
    prompts, folders, and a time limit that a late answer is worth waiting for in a test.
    """
    settings = {
        "teacher.api.base_url": proxy.url,
        "teacher.api.model": "large",
        "teacher.model": TEACHER,
        "teacher.request_timeout_s": TIME_LIMIT_S,
        "prompts.limit": 52,
        "output.path": place / "run",
    }
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_a_run_pays_each_answer_once_stops_at_its_budget_and_goes_on(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", KEY)
    own = overrides(proxy, tmp_path)
    first = drive("run", RUN_FILE, *own, "--set", f"teacher.api.max_cost={SMALL_BUDGET}")
    assert first.returncode == 1, first.stdout + first.stderr
    assert f"teacher.api.max_cost ({SMALL_BUDGET}) is reached" in first.stderr
    files = RunFiles(tmp_path / "run")
    prompts = [pq.read_table(files.folder / "prompts" / f"{n}.parquet") for n in NAMES]
    rows, held_out = map(len, prompts)
    paid = proxy.answered.total()
    assert 0 < paid < rows + held_out
    assert proxy.cost <= 1.02 * SMALL_BUDGET  # Some of it is by the run's own count.
    second = drive("run", RUN_FILE, *own)
    assert second.returncode == 0, second.stdout + second.stderr
    assert set(proxy.answered.values()) == {1}, "an answer was paid for twice"
    assert len(proxy.answered) == rows + held_out
    assert all(proxy.faults[fault] for fault in FAULTS), "a fault did not come to pass"
    summary = files.json("summary.json")
    assert (summary["status"], summary["rows_trained"]) == ("completed", rows)
    assert not any(summary["dropped"].values())
    told = summary["api"]
    assert told["requests"] == rows + held_out
    assert told["cost"] == pytest.approx(proxy.cost, rel=0.02)
    assert told["lost_cost"] >= proxy.unread_cost > 0
    counted = ("too_many_requests", "status_500", "connection", "broken_answer", "timeout")
    assert all(told[name] > 0 for name in (*counted, "usage_estimated"))
    catalogue = TeacherStore(str(tmp_path / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (rows + held_out, 0)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in written if KEY.encode() in p.read_bytes()]
    assert KEY not in first.stdout + first.stderr + second.stdout + second.stderr


QUESTIONS = ("Name a colour.", "What is the capital of France?", "Count from one to five.")
MAX_TOKENS = 24
STOP, MODEL_IDS = 2, 49152
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


NAMED, KEPT = 20, 16
"""Tokens that a service names beside each, and of these the ones that are kept."""
WORDS = ("Name a river.", "Tell me a story.", "What is rain?", "Why do cats sleep?", "Say hello.")


@dataclass
class Counting:
    """In the place of a coordinator."""

    counters: Counter[str] = field(default_factory=Counter)

    @property
    def add(self) -> Any:
        return SimpleNamespace(remote=self.counters.update)


def texts_of_ids() -> list[str]:
    """What a server writes for each id alone."""
    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    return [tokenizer.decode([i], skip_special_tokens=False) for i in range(MODEL_IDS)]


def in_words(
    url: str, folder: Path, prompts: list[np.ndarray], chats: list[str], allowed: list[int]
) -> tuple[list[Answer], Counter[str]]:
    """Answers of the server as a common service gives them, and the counters."""
    config = ids_config(url).model_dump(mode="json")
    config["teacher"]["api"] |= {"ids": False, "top_logprobs": NAMED, "max_unmapped_mass": 1.0}
    config["teacher"]["api"]["extra_body"] = {"allowed_token_ids": allowed, "seed": 11}
    config["teacher"]["sampling"] |= {"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [STOP]}
    config["signal"]["top_k"] = config["evaluation"]["top_k"] = KEPT
    parsed, counting = RunConfig.model_validate(config), Counting()
    sampling = resolve_sampling(parsed.teacher, TEACHER)
    run_folder = RunFolder(str(folder)).ensure()
    digests = [prompt_digest(prompt) for prompt in prompts]
    run_folder.write_table(MESSAGES, pa.table({"digest": digests, "messages": chats}))

    async def run() -> list[Answer]:
        engine = api_engine(parsed, str(TEACHER), sampling, run_folder, counting, str(folder))
        await engine.start()
        return await engine.sample(prompts, Signal("topk", KEPT))

    return asyncio.run(run()), counting.counters


def test_in_words_a_server_says_what_it_says_by_ids(server_url: str, tmp_path: Path) -> None:
    """Its tokens are drawn among words, whose text the tokenizer cuts as they were drawn, and the
    end; what it says of them is compared with the scores by ids.
    """
    tokeniser = PromptTokeniser(TEACHER, PromptsConfig(path="-"))
    asked = [[{"role": "user", "content": text}] for text in (*QUESTIONS, *WORDS)]
    prompts = [tokeniser.encode(RawPrompt(None, chat, "words", "here")) for chat in asked]
    texts = texts_of_ids()
    words = [i for i, text in enumerate(texts) if re.fullmatch(" [a-z]{3,}", text)][:2000]
    answers, counters = in_words(
        server_url,
        tmp_path / "words",
        prompts,
        [json.dumps(chat) for chat in asked],
        [*words, STOP],
    )
    told = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.error is None]
    assert len(told) > len(asked) / 2, [answer.error for answer in answers]

    async def score(engine: Any) -> list[Answer]:
        given = [answer.response_ids for _, answer in told]
        scored: list[Answer] = await engine.score(
            [p for p, _ in told], given, Signal("topk", NAMED)
        )
        return scored

    scored = by_ids(ids_config(server_url), tmp_path / "ids", score)
    lost = tokens = 0.0
    for (_, answer), by_id in zip(told, scored, strict=True):
        for t in range(len(answer.response_ids)):
            lost += compare(answer, by_id, t, texts)
        tokens += len(answer.response_ids)
    assert counters["api_told_tokens"] == tokens
    print("of", tokens, "tokens", lost / tokens, "of the probability is no id")
    assert lost > 0, "nothing shows what becomes of a token without a text of its own"
    assert counters["api_unmapped_mass"] == pytest.approx(lost, rel=0.01)


def compare(answer: Answer, by_id: Answer, t: int, texts: list[str]) -> float:
    """What is told of a token in words must be what is told by ids, as far as its tokens have texts
    of their own; gives the probability of the named ones that have none.

    The server names the drawn token and the best, `NAMED` in all.
    """
    drawn = int(answer.response_ids[t])
    named = dict(zip(by_id.topk_ids[t].tolist(), by_id.topk_logprobs[t].tolist(), strict=True))
    if drawn not in named:
        named.pop(min(named, key=lambda i: named[i]))
    named[drawn] = float(by_id.sampled_logprobs[t])
    own = {i: p for i, p in named.items() if i == drawn or "\ufffd" not in texts[i]}
    kept = sorted(own.values(), reverse=True)[:KEPT]
    found = dict(zip(answer.topk_ids[t].tolist(), answer.topk_logprobs[t].tolist(), strict=True))
    found = {i: p for i, p in found.items() if p > -np.inf}
    assert found.keys() <= own.keys()
    assert sorted(found.values(), reverse=True) == pytest.approx(kept, abs=LOGPROB_TOLERANCE)
    assert found == pytest.approx({i: own[i] for i in found}, abs=LOGPROB_TOLERANCE)
    assert answer.sampled_logprobs[t] == pytest.approx(named[drawn], abs=LOGPROB_TOLERANCE)
    tail = np.log1p(-np.exp(list(found.values())).sum())
    assert answer.tail_logprob[t] == pytest.approx(tail, abs=LOGPROB_TOLERANCE)
    return float(np.exp([p for i, p in named.items() if i not in own]).sum())


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
