"""vLLM's signals, decoded and scored, against Hugging Face on the same tokens, through real Serve.

A chain: what the replica says of a token equals what the plain model says of it, to a tolerance
that float32 kernels of two libraries allow.
"""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import RayActorError

from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import LOST, NOT_STARTED, TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream.teacher_calls import TeacherCalls
from raystill.model.on_node import ModelSource

pytestmark = pytest.mark.vllm

APP = "teacher"
MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
TOP_K = 64
MAX_TOKENS = 24
MAX_MODEL_LEN = 256
LOGPROB_TOLERANCE = 1e-3  # nats, float32 against float32; differences of 1e-4 are usual
TAIL_TOLERANCE = 1e-5  # probability mass
# bfloat16 rounds each of D components by up to 2^-9 of its size. Measured on these tokens: 0.02
# nats at most, 0.003 on average.
REBUILT_TOLERANCE = 0.3
REBUILT_MEAN_TOLERANCE = 0.03
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
def teacher(
    ray_serve: None, stop_ids: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    from raystill.serve.deploy import TeacherApp

    config = run_config(stop_ids)
    model = ModelSource.of(config.teacher.model, MODEL)
    app = TeacherApp(APP, config, model, logs=tmp_path_factory.mktemp("logs"))
    app.deploy()
    yield app
    app.end()


@pytest.fixture(scope="module")
def info(teacher: Any) -> dict[str, Any]:
    found: dict[str, Any] = teacher.wait(300.0)
    return found


@pytest.fixture(scope="module")
def answers(info: dict[str, Any], prompts: list[list[int]]) -> list[dict[str, Any]]:
    return ask(prompts, "topk")


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def ask_table(prompts: list[list[int]], kind: str, width: int = TOP_K) -> pa.Table:
    from ray import serve

    table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    handle = serve.get_app_handle(APP)
    return handle.sample.remote(table, Signal(kind, width)).result(timeout_s=120)


def ask(prompts: list[list[int]], kind: str, width: int = TOP_K) -> list[dict[str, Any]]:
    return ask_table(prompts, kind, width).to_pylist()


def score(
    pairs: list[tuple[list[int], list[int]]],
    kind: str,
    width: int = TOP_K,
    ids: list[list[list[int]]] | None = None,
) -> list[dict[str, Any]]:
    from ray import serve

    columns = {
        name: pa.array([pair[i] for pair in pairs], pa.list_(pa.int32()))
        for i, name in enumerate(("prompt_ids", "response_ids"))
    }
    if ids is not None:
        columns["ids"] = pa.array(ids, pa.list_(pa.list_(pa.int32(), width)))
    handle = serve.get_app_handle(APP)
    scored = handle.score.remote(pa.table(columns), Signal(kind, width))
    return scored.result(timeout_s=120).to_pylist()


def logprobs_of(model: Any, prompt: list[int], response: list[int]) -> Any:
    """Of every response token over the vocabulary: from the logits at position P + t - 1."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


def states_of(answer: dict[str, Any]) -> Any:
    """float32 [T, D] of an answer's ``hidden``."""
    import torch

    bits = np.frombuffer(b"".join(answer["hidden"]), "<i2").reshape(len(answer["hidden"]), -1)
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float()


def pairs_of(
    prompts: list[list[int]], answers: list[dict[str, Any]]
) -> list[tuple[list[int], list[int]]]:
    both = zip(prompts, answers, strict=True)
    return [(p, a["response_ids"]) for p, a in both if a["error"] is None]


def usable(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if answer["error"] is None]


def test_the_replica_loads_the_model_on_its_own_cores(info: dict[str, Any]) -> None:
    assert (info["engine"], info["dtype"], info["vocab_size"]) == ("vllm", "float32", 49152)
    assert info["cores"] == [0] and info["max_model_len"] == MAX_MODEL_LEN
    assert "vllm" in Path(info["log"]).read_text().lower()


def test_the_engine_has_its_memory_in_huge_pages(
    info: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this machine has none")
    engines = re.findall(r"EngineCore pid=(\d+)", Path(info["log"]).read_text())
    memory = Path(f"/proc/{engines[-1]}/smaps_rollup").read_text()
    huge = {line.split()[0]: int(line.split()[1]) for line in memory.splitlines()[1:]}
    assert huge["AnonHugePages:"] > huge["Anonymous:"] / 2


def test_logprobs_from_decoding_are_those_of_the_plain_model(
    answers: list[dict[str, Any]], prompts: list[list[int]], model: Any
) -> None:
    import torch

    checked = 0
    for (prompt, response), answer in zip(pairs_of(prompts, answers), usable(answers), strict=True):
        logprobs = logprobs_of(model, prompt, response)
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


def test_scoring_an_answer_says_what_decoding_it_said(
    answers: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    said = usable(answers)
    for scored, answer in zip(score(pairs_of(prompts, answers), "topk"), said, strict=True):
        assert scored["response_ids"] == answer["response_ids"]
        assert scored["finish_reason"] == answer["finish_reason"]
        for name in ("sampled_logprobs", "topk_logprobs"):
            difference = np.abs(np.array(scored[name]) - np.array(answer[name]))
            assert difference.max() < LOGPROB_TOLERANCE
        # Ids of nearly equal probability may change places; the best one does not here.
        assert (
            np.array(scored["topk_ids"])[:, 0].tolist()
            == np.array(answer["topk_ids"])[:, 0].tolist()
        )
        tails = [np.exp(np.array(row["tail_logprob"])) for row in (scored, answer)]
        assert np.abs(tails[0] - tails[1]).max() < LOGPROB_TOLERANCE
    poorer = score(pairs_of(prompts, answers)[:1], "sampled")[0]
    assert set(poorer) == {"response_ids", "finish_reason", "error", "sampled_logprobs"}


def test_the_teacher_names_its_logprobs_at_ids_of_the_callers_choice(
    answers: list[dict[str, Any]], prompts: list[list[int]], model: Any
) -> None:
    import torch

    pairs, width = pairs_of(prompts, answers)[:3], 5
    generator = np.random.default_rng(3)
    ids = [
        [generator.choice(49152, width, False).tolist() for _ in response] for _, response in pairs
    ]
    for (prompt, response), mine, scored in zip(
        pairs, ids, score(pairs, "topk", width, ids), strict=True
    ):
        logprobs = logprobs_of(model, prompt, response)
        expected = logprobs.gather(1, torch.tensor(mine))
        assert scored["topk_ids"] == mine
        np.testing.assert_allclose(scored["topk_logprobs"], expected, atol=LOGPROB_TOLERANCE)
        outside = torch.log1p(-expected.exp().sum(dim=1))
        np.testing.assert_allclose(scored["tail_logprob"], outside, atol=LOGPROB_TOLERANCE)


def test_hidden_states_rebuild_the_plain_models_whole_vocabulary(
    info: dict[str, Any], prompts: list[list[int]], model: Any
) -> None:
    """Sampled and scored alike; the relative error of KL is a hundredth of a per cent or so."""
    import torch

    head, size = model.get_output_embeddings().weight.double(), model.config.hidden_size
    sampled = ask(prompts, "hidden", size)
    assert [a["error"] for a in sampled] == [None] * len(QUESTIONS) + ["empty", "too_long"]
    pairs = pairs_of(prompts, sampled)
    scored = score(pairs, "hidden", size)
    errors, divergences = [], []
    for (prompt, response), *both in zip(pairs, usable(sampled), scored, strict=True):
        logprobs = logprobs_of(model, prompt, response)
        drawn = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        said = torch.tensor(both[0]["sampled_logprobs"], dtype=torch.float64)
        assert (drawn - said).abs().max() < LOGPROB_TOLERANCE
        assert np.isnan(both[1]["sampled_logprobs"]).all()  # The head was not run.
        # A student unlike its teacher: the same logits, much flatter.
        student = torch.log_softmax(0.5 * logprobs, dim=-1)
        for answer in both:
            assert len(answer["hidden"]) == len(response)
            rebuilt = torch.log_softmax(states_of(answer).double() @ head.T, dim=-1)
            errors.append((rebuilt - logprobs).abs())
            kl = [(p.exp() * (p - student)).sum(dim=1) for p in (rebuilt, logprobs)]
            divergences.append(torch.stack(kl))
    error, (found, expected) = torch.cat(errors), torch.cat(divergences, dim=1).mean(dim=1)
    print(f"max {error.max():.4f} mean {error.mean():.5f} KL {found:.6f} {expected:.6f}")
    assert error.max() < REBUILT_TOLERANCE and error.mean() < REBUILT_MEAN_TOLERANCE
    assert abs(found / expected - 1) < 1e-3


# Self-distillation's loss is the engine's noise alone: of float32 with the signals that hold its
# logprobs (measured 7e-9 at most; a float32 sum may end below 0), of the states' rounding to
# bfloat16 with `hidden` (measured 2.4e-5).
SELF_DISTILLATION = {"sampled": 1e-6, "topk": 1e-6, "hidden": 2e-4}


@pytest.mark.parametrize("kind", SELF_DISTILLATION)
def test_a_student_that_is_its_teacher_has_no_loss_but_the_engines_noise(
    info: dict[str, Any], prompts: list[list[int]], model: Any, kind: str
) -> None:
    import torch

    from raystill.config.objective import ObjectiveConfig
    from raystill.train.batch.batch import collate
    from raystill.train.batch.rows import rows_from_table
    from raystill.train.loss.teacher_head import read_teacher_head
    from raystill.train.student.module import StudentModule

    width = model.config.hidden_size if kind == "hidden" else TOP_K
    table = ask_table(prompts[: len(QUESTIONS)], kind, width)
    numbers = pa.array(range(len(table)), pa.int64())
    given = pa.array(prompts[: len(QUESTIONS)], pa.list_(pa.int32()))
    for name, column in (("row", numbers), ("position", numbers), ("prompt_ids", given)):
        table = table.append_column(name, column)
    rows = rows_from_table(table)
    batch = collate(rows, kind, 49152)
    teacher = read_teacher_head(MODEL, 49152) if kind == "hidden" else None
    terms = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
    with torch.no_grad():
        sums = StudentModule(model)(batch, ObjectiveConfig(**dict.fromkeys(terms, 1.0)), teacher)
    losses = {name: float(value) / batch.num_tokens for name, value in sums.terms.items()}
    print(kind, losses)
    assert set(losses) == set(terms)
    assert all(abs(loss) < SELF_DISTILLATION[kind] for loss in losses.values()), losses


def test_a_response_that_cannot_be_scored_names_its_reason(
    info: dict[str, Any], prompts: list[list[int]]
) -> None:
    long, whole = [5] * (MAX_MODEL_LEN - 3), prompts[0]
    pairs = [(whole, []), ([], [7]), (long, [7] * 4), (long, [7] * 3), (whole, [60_000])]
    errors = [row["error"] for row in score(pairs, "hidden", 576)]
    assert errors == ["empty", "empty", "too_long", None, "invalid_ids"]


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


@pytest.mark.faults  # In `make test` an engine of tests/serve/test_sampler.py is killed.
def test_a_killed_engine_ends_its_replica_and_every_row_is_answered(
    teacher: Any, info: dict[str, Any], prompts: list[list[int]]
) -> None:
    """Groups are in flight when the engine's process is killed; the next replica answers them.

    Last in this module, since it costs the next replica's start.
    """
    from ray import serve

    engines = engine_processes(info["pid"])
    assert engines
    groups = [pa.array(prompts[i : i + 3], TOKEN_IDS) for i in range(4)]
    table = pa.table({"prompt_ids": groups[0]})

    async def ask_all() -> tuple[list[pa.Table], Any]:
        calls = TeacherCalls(APP, Signal("topk", 8), max_attempts=10, coordinator=None)
        plain = serve.get_app_handle(APP).sample.remote(table, Signal("text"))
        tasks = [asyncio.create_task(calls.sample(group)) for group in [*groups, *groups]]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert not all(task.done() for task in tasks)
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        later = serve.get_app_handle(APP).sample.remote(table, Signal("text"))
        told = await asyncio.gather(plain, later, return_exceptions=True)
        return await asyncio.gather(*tasks), told

    answers, told = asyncio.run(ask_all())
    lost = [a for a in told if isinstance(a, RayActorError) or LOST in a["error"].to_pylist()]
    assert lost or NOT_STARTED in told[1]["error"].to_pylist(), "as callers are told of it"
    assert teacher.wait(300.0)["pid"] != info["pid"]
    assert not Path(f"/proc/{info['pid']}").exists()
    for table, group in zip(answers, [*groups, *groups], strict=True):
        assert len(table) == len(group)
        assert table["error"].null_count == len(table)
        assert min(map(len, table["response_ids"].to_pylist())) > 0


def engine_processes(replica: int) -> list[int]:
    """The replica's own children that hold vLLM's engine."""
    threads = Path(f"/proc/{replica}/task").glob("*/children")
    children = [pid for thread in threads for pid in thread.read_text().split()]
    return [int(pid) for pid in children if "VLLM" in Path(f"/proc/{pid}/comm").read_text()]
