"""vLLM's decoded signal against Hugging Face logits on the same tokens, through real Serve.

A chain: what the replica says of a token equals what the plain model says of it, to a tolerance
that float32 kernels of two libraries allow.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.cluster.config import RunConfig

pytestmark = pytest.mark.vllm

MODEL = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"
TOP_K = 64
MAX_TOKENS = 24
MAX_MODEL_LEN = 256
LOGPROB_TOLERANCE = 1e-3  # nats, float32 against float32; differences of 1e-4 are usual
TAIL_TOLERANCE = 1e-5  # probability mass
QUESTIONS = [
    "Name a colour.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to five.",
    "Give me a synonym of happy.",
    "Why is the sky blue?",
]


def run_config(stop_ids: list[int]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {
                "model": str(MODEL),
                "dtype": "float32",
                "max_model_len": MAX_MODEL_LEN,
                "kv_cache_gib": 0.5,
                "max_num_seqs": 4,
                "sampling": {"max_tokens": MAX_TOKENS, "stop_token_ids": stop_ids},
            },
            "student": {"init": "from_teacher", "layer_stride": 2},
            "prompts": {"path": "prompts.jsonl"},
            "signal": {"kind": "topk", "top_k": TOP_K},
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def stop_ids(tokenizer: Any) -> list[int]:
    """The model's own end, and punctuation, so that some answers stop within few tokens."""
    return [2, *(tokenizer.encode(mark, add_special_tokens=False).ids[0] for mark in ".!?")]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS
    ]
    answerable = [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]
    return [*answerable, [], [5] * MAX_MODEL_LEN]


@pytest.fixture(scope="module")
def info(
    ray_serve: None, stop_ids: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    from ray import serve

    from raystill.serve import deploy

    deploy.deploy_teacher(run_config(stop_ids), str(MODEL), None, tmp_path_factory.mktemp("logs"))
    yield deploy.wait_for_teacher(300.0)
    serve.delete(deploy.APP_NAME)


@pytest.fixture(scope="module")
def answers(info: dict[str, Any], prompts: list[list[int]]) -> list[dict[str, Any]]:
    return ask(prompts, "topk")


def ask(prompts: list[list[int]], kind: str) -> list[dict[str, Any]]:
    from raystill.serve import deploy

    table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    answered = deploy.teacher_handle().sample.remote(table, kind, TOP_K)
    return answered.result(timeout_s=120).to_pylist()


def usable(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if answer["error"] is None]


def test_the_replica_loads_the_model_on_its_own_cores(info: dict[str, Any]) -> None:
    assert (info["engine"], info["dtype"], info["vocab_size"]) == ("vllm", "float32", 49152)
    assert info["cores"] == [0] and info["max_model_len"] == MAX_MODEL_LEN
    assert "vllm" in Path(info["log"]).read_text().lower()


def test_logprobs_from_decoding_are_those_of_the_plain_model(
    answers: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    checked = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer["error"] is not None:
            continue
        response = answer["response_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        # Response token t was drawn from the logits at position P + t - 1.
        rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        logprobs = torch.log_softmax(rows, dim=-1)
        ids = torch.tensor(answer["topk_ids"])
        theirs = torch.tensor(answer["topk_logprobs"], dtype=torch.float64)
        assert (logprobs.gather(1, ids) - theirs).abs().max() < LOGPROB_TOLERANCE
        assert (logprobs.topk(TOP_K).values - theirs).abs().max() < LOGPROB_TOLERANCE
        drawn = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        sampled = torch.tensor(answer["sampled_logprobs"], dtype=torch.float64)
        assert (drawn - sampled).abs().max() < LOGPROB_TOLERANCE
        tail = 1 - logprobs.gather(1, ids).exp().sum(dim=1)
        said = torch.tensor(answer["tail_logprob"], dtype=torch.float64).exp()
        assert (tail - said).abs().max() < max(TAIL_TOLERANCE, LOGPROB_TOLERANCE * tail.max())
        checked += len(response)
    assert checked >= 20


def test_a_stop_token_is_included_with_its_signal_and_a_cut_row_has_none(
    answers: list[dict[str, Any]], stop_ids: list[int]
) -> None:
    reasons = {answer["finish_reason"] for answer in usable(answers)}
    assert "stop" in reasons, "no answer reached one of the stop tokens"
    for answer in usable(answers):
        ids, num_tokens = answer["response_ids"], len(answer["response_ids"])
        assert not set(ids[:-1]) & set(stop_ids)
        assert (ids[-1] in stop_ids) == (answer["finish_reason"] == "stop")
        if answer["finish_reason"] == "length":
            assert num_tokens == MAX_TOKENS
        for name in ("sampled_logprobs", "topk_ids", "topk_logprobs", "tail_logprob"):
            assert len(answer[name]) == num_tokens


def test_unusable_rows_name_their_reason_and_leave_the_others_alone(
    answers: list[dict[str, Any]],
) -> None:
    assert [a["error"] for a in answers] == [None] * len(QUESTIONS) + ["empty", "too_long"]
    assert answers[-1]["response_ids"] == []


def test_poorer_signals_leave_their_columns_out(
    info: dict[str, Any], prompts: list[list[int]]
) -> None:
    sampled, text = ask(prompts[:2], "sampled"), ask(prompts[:2], "text")
    assert set(text[0]) == {"response_ids", "finish_reason", "error"}
    assert set(sampled[0]) == {*text[0], "sampled_logprobs"}
    assert (np.array(sampled[0]["sampled_logprobs"]) <= 0).all()


def test_a_replica_whose_engine_died_leaves_its_callers_an_actor_error(
    info: dict[str, Any], prompts: list[list[int]]
) -> None:
    """Last in this module: Serve starts another replica meanwhile, which nobody waits for."""
    from ray.exceptions import RayActorError

    engines = engine_processes(info["pid"])
    assert engines
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        ask(prompts[:2], "text")


def engine_processes(replica: int) -> list[int]:
    """The replica's own children that hold vLLM's engine."""
    threads = Path(f"/proc/{replica}/task").glob("*/children")
    children = [pid for thread in threads for pid in thread.read_text().split()]
    return [int(pid) for pid in children if "VLLM" in Path(f"/proc/{pid}/comm").read_text()]
