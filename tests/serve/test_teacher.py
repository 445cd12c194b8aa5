"""The replica, the synthetic engine and the deployment; real vLLM is in test_vllm_parity.py."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.model.sampling import resolve_sampling
from raystill.serve.engine.arguments import (
    EngineSettings,
    engine_argument_problems,
    engine_arguments,
)
from raystill.serve.engine.synthetic import SyntheticEngine
from raystill.serve.replica import BusyClock, ReplicaSettings, Teacher, ids_of

VOCAB = 40
TOKENS = 12
TOPK = Signal("topk", 8)
PROMPTS = [[1, 2, 3], [4], [], [5] * 100, [1, 2, 3]]


def run_config(**teacher: Any) -> RunConfig:
    settings = {
        "model": "nowhere",
        "engine": "synthetic",
        "synthetic": {"vocab_size": VOCAB, "response_tokens": TOKENS},
        "max_model_len": 64,
    }
    return RunConfig.model_validate(
        {
            "teacher": {**settings, **teacher},
            "student": {"init": "from_teacher", "layer_stride": 2},
            "prompts": {"path": "prompts.jsonl"},
        }
    )


def prompt_table(prompts: list[list[int]]) -> pa.Table:
    return pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})


def synthetic(config: RunConfig) -> SyntheticEngine:
    teacher = config.teacher
    sampling = resolve_sampling(teacher, teacher.model)
    return SyntheticEngine(teacher.synthetic, sampling, teacher.max_model_len)


def ask(engine: SyntheticEngine, prompts: list[list[int]], kind: str = "topk", top_k: int = 8):
    return asyncio.run(engine.sample([np.array(p, np.int32) for p in prompts], Signal(kind, top_k)))


def test_synthetic_answers_depend_on_the_prompt_alone() -> None:
    engine = synthetic(run_config())
    together = ask(engine, PROMPTS)
    alone = ask(engine, [PROMPTS[1]], "topk", 3)[0]
    np.testing.assert_array_equal(together[0].topk_logprobs, together[4].topk_logprobs)
    np.testing.assert_array_equal(together[1].response_ids, alone.response_ids)
    np.testing.assert_array_equal(together[1].topk_ids[:, :3], alone.topk_ids)
    np.testing.assert_array_equal(
        ask(engine, [PROMPTS[1]], "text")[0].response_ids, alone.response_ids
    )


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_synthetic_signals_are_distributions(top_k: int) -> None:
    answer = ask(synthetic(run_config()), PROMPTS, "topk", top_k)[0]
    assert answer.topk_ids.shape == (TOKENS, top_k)
    assert all(len(set(ids)) == top_k for ids in answer.topk_ids.tolist())
    assert (np.diff(answer.topk_logprobs, axis=1) < 0).all()
    mass = np.exp(answer.topk_logprobs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass + np.exp(answer.tail_logprob), 1.0, atol=1e-6)
    assert (answer.tail_logprob == -np.inf).all() == (top_k == VOCAB)


def test_the_drawn_tokens_logprob_is_the_one_the_signal_gives_it() -> None:
    answer = ask(synthetic(run_config()), PROMPTS, "topk", VOCAB)[0]
    slot = (answer.topk_ids == answer.response_ids[:, None]).argmax(axis=1)
    np.testing.assert_array_equal(
        answer.topk_logprobs[np.arange(TOKENS), slot], answer.sampled_logprobs
    )


def test_synthetic_tokens_are_drawn_from_their_signal() -> None:
    prompts = [[i, i + 1] for i in range(400)]
    answers = ask(synthetic(run_config()), prompts, "topk", VOCAB)
    ranks = [np.argmax(a.topk_ids == a.response_ids[:, None], axis=1)[:-1] for a in answers]
    best = np.concatenate([np.exp(a.topk_logprobs[:-1, 0].astype(np.float64)) for a in answers])
    # 4400 draws: the standard error of the share of rank-0 tokens is below 0.008.
    assert abs((np.concatenate(ranks) == 0).mean() - best.mean()) < 0.03


@pytest.mark.parametrize("max_tokens", [TOKENS, 5])
def test_scoring_a_synthetic_answer_says_what_sampling_it_said(max_tokens: int) -> None:
    engine = synthetic(run_config(sampling={"max_tokens": max_tokens}))
    answers = ask(engine, PROMPTS)
    given = [np.array(p, np.int32) for p in PROMPTS], [a.response_ids for a in answers]
    for scored, answer in zip(asyncio.run(engine.score(*given, TOPK)), answers, strict=True):
        assert (scored.error is None) == (answer.error is None)
        for name in ("response_ids", "sampled_logprobs", "topk_ids", "topk_logprobs"):
            np.testing.assert_array_equal(getattr(scored, name), getattr(answer, name))


def test_a_synthetic_answer_ends_with_its_stop_token_or_is_cut() -> None:
    whole = ask(synthetic(run_config()), PROMPTS)[0]
    assert (whole.finish_reason, whole.response_ids[-1]) == ("stop", VOCAB - 1)
    cut = ask(synthetic(run_config(sampling={"max_tokens": 5})), PROMPTS)[0]
    assert (cut.finish_reason, len(cut.response_ids)) == ("length", 5)
    np.testing.assert_array_equal(cut.response_ids, whole.response_ids[:5])


def test_busy_time_counts_overlapping_groups_once() -> None:
    clock = BusyClock()
    started = time.monotonic()
    with clock.group(), clock.group():
        time.sleep(0.05)
    busy = clock.take()
    assert 0.05 <= busy <= time.monotonic() - started
    assert clock.take() == 0.0


def test_prompt_ids_of_a_sliced_table_are_read_right() -> None:
    table = pa.concat_tables([prompt_table(PROMPTS), prompt_table(PROMPTS[:2])]).slice(1, 5)
    assert [ids.tolist() for ids in ids_of(table, "prompt_ids")] == [*PROMPTS[1:], PROMPTS[0]]


class Counters:
    """Stands in for the coordinator's handle."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.add = self

    def remote(self, counters: dict[str, float]) -> None:
        self.seen.append(counters)


def test_a_replica_answers_in_order_and_reports_what_it_did() -> None:
    async def answer() -> tuple[pa.Table, Counters]:
        counters = Counters()
        source = ModelSource("nowhere", "nowhere")
        settings = ReplicaSettings(run_config(), source, counters, None, 0, 1)
        replica = object.__new__(Teacher)
        await replica.__init__(settings, rank=(0, 0))  # type: ignore[misc]
        await replica.check_health()
        return await replica.sample(prompt_table(PROMPTS), TOPK), counters

    table, counters = asyncio.run(answer())
    assert_contract(table, TOPK)
    (seen,) = counters.seen
    assert seen["teacher_rows"] == 3 and seen["teacher_busy_s"] > 0
    assert seen["teacher_prompt_tokens"] == 7 and seen["teacher_response_tokens"] == 3 * TOKENS


def assert_contract(table: pa.Table, signal: Signal) -> None:
    assert table.schema == answer_schema(signal)
    assert table["error"].to_pylist() == [None, None, "empty", "too_long", None]
    lengths = [TOKENS, TOKENS, 0, 0, TOKENS]
    for name in table.schema.names:
        if name not in ("error", "finish_reason"):
            assert [len(row) for row in table[name].to_pylist()] == lengths, name
    assert table["finish_reason"].to_pylist() == ["stop", "stop", None, None, "stop"]
    assert table["response_ids"][0] == table["response_ids"][4]


def test_typed_settings_and_pass_through_reach_the_engine() -> None:
    config = run_config(
        engine="vllm",
        dtype="float32",
        kv_cache_gib=0.5,
        max_num_seqs=7,
        engine_args={"enable_prefix_caching": False},
    )
    sampling = resolve_sampling(config.teacher, "nowhere")
    on_cpu = engine_arguments(EngineSettings(config.teacher, "hub/id", sampling, 3, 64, (0,)))
    assert on_cpu["kv_cache_memory_bytes"] == 2**29 and on_cpu["enforce_eager"] is True
    assert (on_cpu["seed"], on_cpu["max_logprobs"], on_cpu["dtype"]) == (3, 64, "float32")
    assert on_cpu["enable_prefix_caching"] is False
    assert on_cpu["max_num_seqs"] == 8  # one more for the health probe
    on_gpu = engine_arguments(EngineSettings(config.teacher, "hub/id", sampling, 3, 64, None))
    assert on_gpu["enforce_eager"] is False


def test_engine_arguments_that_are_owned_or_unknown_are_named() -> None:
    arguments = {"seed": 1, "max_logprob": 5, "enable_prefix_cachin": True, "block_size": 32}
    teacher = run_config(engine="vllm", engine_args=arguments).teacher
    problems = engine_argument_problems(teacher, {"seed", "enable_prefix_caching"})
    assert "is not passed through; set teacher.seed" in problems["seed"]
    assert any("did you mean 'enable_prefix_caching'" in said for said in problems.values())
    assert engine_argument_problems(run_config().teacher, set()) == {}


def test_deployment_options_follow_the_configuration() -> None:
    from raystill.serve.deploy import deployment_options

    fixed = deployment_options(run_config(num_replicas=3), has_gpus=False)
    assert fixed["num_replicas"] == 3 and "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"]["num_cpus"] == 1
    assert fixed["ray_actor_options"]["num_gpus"] == 0
    scaled = deployment_options(
        run_config(num_replicas={"min": 0, "max": 4}, target_ongoing_requests=5), has_gpus=False
    )["autoscaling_config"]
    assert (scaled["min_replicas"], scaled["max_replicas"]) == (0, 4)
    assert scaled["initial_replicas"] == 1


@pytest.mark.parametrize(("groups", "most"), [(1, 1), (2, 3), (8, 4), (1, 64), (100, 16)])
def test_serve_wants_as_many_replicas_as_groups_are_let_in_flight_for(
    groups: int, most: int
) -> None:
    """By Serve's own rounding, also while a few requests more are counted than there are."""
    from ray.serve.autoscaling_policy import _apply_scaling_factors
    from ray.serve.config import AutoscalingConfig

    from raystill.serve.deploy import scaling_target

    config = AutoscalingConfig(min_replicas=1, max_replicas=most)
    target = scaling_target(groups, most)
    for wanted in range(1, most + 1):
        for counted in (wanted * groups, wanted * groups * (1 + 0.4 / most)):
            for running in range(1, most + 1):
                assert _apply_scaling_factors(counted / target, running, config) == wanted


def test_a_parallel_teacher_asks_for_all_its_gpus() -> None:
    from raystill.serve.deploy import deployment_options

    tensor = run_config(
        engine="vllm",
        tensor_parallel_size=4,
        accelerator_type="H100",
        resources_per_replica={"teacher": 1},
    )
    actor = deployment_options(tensor, has_gpus=True)["ray_actor_options"]
    assert actor["num_gpus"] == 4 and actor["accelerator_type"] == "H100"
    assert actor["resources"] == {"teacher": 1}
    stages = run_config(engine="vllm", tensor_parallel_size=2, pipeline_parallel_size=2)
    options = deployment_options(stages, has_gpus=True)
    assert [b["GPU"] for b in options["placement_group_bundles"]] == [1, 1, 1, 1]
    assert options["ray_actor_options"]["num_gpus"] == 0


def app(config: RunConfig, name: str = "teacher", folder: str = "nowhere", **more: Any) -> Any:
    from raystill.serve.deploy import TeacherApp

    return TeacherApp(name, config, ModelSource.of(config.teacher.model, folder), **more)


@pytest.fixture
def synthetic_teacher(ray_serve: None, tmp_path: Path) -> Iterator[dict[str, Any]]:
    from ray import serve

    teacher = app(run_config(), logs=tmp_path)
    teacher.deploy()
    yield teacher.wait(60.0)
    serve.delete(teacher.name)


@pytest.mark.ray
def test_the_synthetic_engine_keeps_the_contract_through_serve(
    synthetic_teacher: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    assert synthetic_teacher["engine"] == "synthetic"
    assert synthetic_teacher["vocab_size"] == VOCAB
    assert Path(synthetic_teacher["log"]).parent == tmp_path
    teacher = app(run_config())
    handle = teacher.handle()
    for signal in (Signal("text"), Signal("sampled"), TOPK):
        table = handle.sample.remote(prompt_table(PROMPTS), signal).result(timeout_s=30)
        assert_contract(table, signal)
    responses = [handle.sample.remote(prompt_table(PROMPTS), TOPK) for _ in range(20)]
    assert len({r.result(timeout_s=30)["response_ids"].to_pylist()[0][0] for r in responses}) == 1
    ended = []
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append(True))
    teacher.shutdown()
    assert teacher.name not in serve.status().applications
    assert ended or serve.status().applications


@pytest.mark.ray
def test_a_run_without_a_teacher_goes_on_when_another_has_shut_serve_down(
    ray_serve: None,
) -> None:
    """The controller goes behind this process's back, as a driver beside it would end it."""
    import ray
    from ray import serve

    teacher = app(run_config())
    assert teacher.num_replicas() == 0
    client = serve.context._get_global_client()
    client._controller.graceful_shutdown.remote()
    deadline = time.monotonic() + 30
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:
            serve.status()
            time.sleep(0.2)
    assert teacher.num_replicas() == 0 and not teacher.waits_for_resources()
    teacher.shutdown()
    serve.start(proxy_location="Disabled")


@pytest.mark.ray
def test_two_runs_on_one_cluster_have_a_teacher_each(ray_serve: None) -> None:
    from ray import serve

    lengths = {"a": 3, "b": 5}
    teachers = {}
    for run, length in lengths.items():
        synthetic = {"vocab_size": VOCAB, "response_tokens": length}
        teachers[run] = app(run_config(synthetic=synthetic), name=f"teacher-{run}")
    try:
        for teacher in teachers.values():
            teacher.deploy()
            teacher.wait(60.0)
        for run, length in lengths.items():
            asked = teachers[run].handle().sample.remote(prompt_table(PROMPTS), Signal("text"))
            said = asked.result(timeout_s=30)["response_ids"].to_pylist()
            assert max(map(len, said)) == length, "each is answered by its own teacher"
        ended, other = teachers["b"], teachers["a"]
        ended.end()
        assert ended.num_replicas() == 0 and ended.name not in serve.status().applications
        assert other.num_replicas() == 1, "the other run's goes on"
    finally:
        for teacher in teachers.values():
            serve.delete(teacher.name)


@pytest.mark.ray
def test_a_teacher_that_cannot_start_says_why_and_where(ray_serve: None, tmp_path: Path) -> None:
    from ray import serve

    from raystill.base.errors import RunError

    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "generation_config.json").write_text("{not json")
    teacher = app(run_config(), folder=str(broken), logs=tmp_path / "logs")
    try:
        teacher.deploy()
        with pytest.raises(RunError, match=r"not valid JSON.*the whole output is in .*logs"):
            teacher.wait(60.0)
    finally:
        serve.delete(teacher.name)


@pytest.mark.ray
def test_a_teacher_no_node_can_hold_says_what_there_is(
    ray_serve: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from raystill.base.errors import RunError
    from raystill.serve import deploy

    monkeypatch.setattr(deploy, "SHUTDOWN_TIMEOUT_S", 1.0)  # Serve waits for what never began.
    config = run_config(resources_per_replica={"moon": 1})
    waits: list[float] = []
    teacher = app(config)
    try:
        teacher.deploy()
        with pytest.raises(
            RunError, match=r"startup_timeout_s \(3 s\); the cluster has CPU"
        ) as told:
            teacher.wait(3.0, waits.append)
    finally:
        serve.delete(teacher.name)
    assert "the teacher asks for 1 replica of CPU: 1, moon: 1 each" in str(told.value)
    assert waits and waits == sorted(waits)
