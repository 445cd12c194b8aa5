"""Rows that the student writes: which they are, their keys, and credits that bound staleness."""

import asyncio

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from raystill.cluster.check.ahead.effects import tail_notices
from raystill.cluster.coordinator.actor import Coordinator
from raystill.config.load import config_text
from raystill.config.objective import PolicyConfig
from raystill.config.run import RunConfig
from raystill.datasets.policy.calls import StudentAnswers, with_versions
from raystill.datasets.policy.plan import PolicyPlan
from raystill.datasets.rows.schema import (
    ENGINE,
    POLICY_VERSION,
    TOKEN_IDS,
    TOKEN_VERSIONS,
    row_schema,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import split_reason, versions_of, with_spans
from raystill.datasets.stream.ledger import Ledger
from raystill.train.batch.rows import rows_from_table

MINIMAL = {
    "teacher": {"model": "t"},
    "student": {"layers": [0]},
    "prompts": {"path": "p.jsonl"},
}


def plan(num_rows=100, rows_per_step=8, run="a", **policy):
    config = PolicyConfig.model_validate({"student_share": 0.5, **policy})
    return PolicyPlan(config, num_rows, rows_per_step, seed=3, run=run)


def test_the_choice_of_rows_follows_from_the_seed_and_the_position_alone():
    everything = np.arange(100)
    whole = plan().by_student(0, everything)
    parts = [plan().by_student(0, everything[i : i + 7]) for i in range(0, 100, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert 35 <= whole.sum() <= 65
    assert (plan().by_student(1, everything) != whole).any(), "each epoch chooses anew"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 100)])
def test_the_extreme_shares_are_exact(share, expected):
    assert plan(student_share=share).by_student(0, np.arange(100)).sum() == expected


def test_a_ramp_changes_the_share_with_the_step_and_only_adds_rows():
    ramp = plan(num_rows=4000, student_share={"from": 0.0, "to": 1.0, "over_steps": 250})
    written = ramp.by_student(0, np.arange(4000))
    assert written[:8].sum() == 0
    assert 850 < written[:2000].sum() < 1150, "the mean share over the ramp is a half"
    assert written[2000:].all()
    assert ramp.by_student(1, np.arange(4000)).all(), "the second epoch is beyond the ramp"


def test_a_group_needs_weights_so_new_that_its_last_row_is_not_too_stale():
    every = plan(student_share=1.0, max_staleness_steps=2)
    assert every.oldest_version(0, np.arange(8, 20)) == 19 // 8 - 2
    assert every.oldest_version(1, np.arange(4)) == 13 - 2, "epoch 0 had 13 steps"
    assert plan(student_share=0.0).oldest_version(0, np.arange(20)) is None


def test_keys_belong_to_the_run_the_epoch_and_the_prompt():
    prompts = pa.chunked_array([pa.array([bytes([i]) * 16 for i in range(5)], pa.binary(16))])
    tables = [plan().keys(0, prompts), plan().keys(1, prompts), plan(run="b").keys(0, prompts)]
    keys = [key for table in tables for key in table.to_pylist()]
    assert len(set(keys) | set(prompts.to_pylist())) == 20
    assert plan().keys(0, prompts).equals(tables[0]), "a resumed run finds its answers"


async def waits(call):
    task = asyncio.ensure_future(call)
    for _ in range(5):
        await asyncio.sleep(0)
    return task, not task.done()


def test_credits_wait_for_weights_that_are_new_enough():
    async def scenario():
        coordinator = Coordinator(100, 100, 0.0)
        await coordinator.publish_policy(0, {"files": ["f"]}, True)
        attempt = await coordinator.publish(0, 0, Ledger(100).to_dict())
        asked, waiting = await waits(coordinator.acquire(attempt, 4, 0, -3))
        assert waiting, "no sampler has loaded anything"
        await coordinator.policy_loaded(1, 0)
        assert await asked
        assert await coordinator.acquire(attempt, 4, 4), "the teacher's rows need no weights"
        later, waiting = await waits(coordinator.acquire(attempt, 4, 8, 1))
        assert waiting, "version 0 would be too old"
        await coordinator.publish_policy(1, {}, False)
        assert not later.done(), "published is not yet loaded"
        newest = await coordinator.newer_policy(1)
        assert newest["version"] == 1 and newest["files"] == ["f"]
        await coordinator.policy_loaded(newest["serial"], 1)
        assert await later

    asyncio.run(scenario())


def test_after_a_restart_what_the_sampler_had_loaded_counts_for_nothing():
    async def scenario():
        coordinator = Coordinator(100, 100, 0.0)
        await coordinator.publish_policy(7, {"files": ["f"]}, True)
        await coordinator.policy_loaded(1, 7)
        await coordinator.publish_policy(4, {"files": ["g"]}, True)
        attempt = await coordinator.publish(0, 4, Ledger(100).to_dict())
        asked, waiting = await waits(coordinator.acquire(attempt, 4, 0, 2))
        assert waiting
        await coordinator.policy_loaded(1, 7)  # Late news of before the restart.
        _, waiting = await waits(asyncio.shield(asked))
        assert waiting
        await coordinator.policy_loaded(2, 4)
        assert await asked

    asyncio.run(scenario())


def test_news_of_a_slower_replica_take_no_credits_back():
    async def scenario():
        coordinator = Coordinator(100, 100, 0.0)
        await coordinator.publish_policy(4, {"files": ["f"]}, True)
        await coordinator.publish_policy(5, {}, False)
        attempt = await coordinator.publish(0, 4, Ledger(100).to_dict())
        await coordinator.policy_loaded(2, 5)
        await coordinator.policy_loaded(1, 4)  # The other replica, one version behind.
        assert await coordinator.acquire(attempt, 4, 0, 5)

    asyncio.run(scenario())


def test_a_run_that_is_over_lets_the_sampler_go():
    async def scenario():
        coordinator = Coordinator(100, 100, 0.0)
        asked, waiting = await waits(coordinator.newer_policy(0))
        assert waiting
        await coordinator.close()
        assert await asked is None

    asyncio.run(scenario())


class Writer:
    def __init__(self, responses, versions):
        self.responses, self.versions = responses, versions

    async def sample(self, prompt_ids, *, at_least=None):
        self.at_least = at_least
        errors = [None if r else "engine_error" for r in self.responses]
        table = pa.table(
            {
                "response_ids": pa.array(self.responses, TOKEN_IDS),
                "finish_reason": [f"length/{self.versions}" if r else None for r in self.responses],
                "error": pa.array(errors, pa.string()),
            }
        )
        return table


class Scorer:
    async def score(self, prompt_ids, response_ids):
        errors = [None if r else "empty" for r in response_ids.to_pylist()]
        return pa.table(
            {
                "response_ids": response_ids,
                "finish_reason": ["stop" if e is None else None for e in errors],
                "error": pa.array(errors, pa.string()),
                "sampled_logprobs": [[-1.0] * len(r) for r in response_ids.to_pylist()],
            }
        ).replace_schema_metadata({ENGINE: b"{}"})


def test_the_student_writes_and_the_teacher_scores_and_the_version_is_kept():
    writer = Writer([[4, 5], [], [6]], "12+1:13")
    calls = StudentAnswers(writer, Scorer(), oldest_version=9)
    answers = asyncio.run(calls.sample(pa.array([[1], [2], [3]], TOKEN_IDS)))
    assert answers["finish_reason"].to_pylist() == ["length/12+1:13", None, "length/12+1:13"]
    assert writer.at_least == 9, "an older replica is to wait for its weights"
    assert answers["error"].to_pylist() == [None, "engine_error", None]
    assert answers.schema.metadata[ENGINE] == b"{}", "the store names the engine that scored"
    plain = with_versions(answers)
    assert plain["finish_reason"].to_pylist() == ["length", None, "length"]
    assert plain[POLICY_VERSION].to_pylist() == [12, None, 12]
    assert plain[TOKEN_VERSIONS].to_pylist() == [[12, 13], [], [12]]


def test_answers_of_the_teacher_have_no_version():
    ids = pa.array([[1], [2, 3], []], TOKEN_IDS)
    table = pa.table({"finish_reason": ["stop", "length", None], "response_ids": ids})
    assert with_versions(table)[POLICY_VERSION].null_count == 3
    assert with_versions(table)[TOKEN_VERSIONS].to_pylist() == [[], [], []]


@pytest.mark.parametrize(
    ("spans", "text", "versions"),
    [
        (((0, 12),), "stop/12", [12] * 5),  # As earlier releases wrote it.
        (((0, 12), (4, 13)), "stop/12+4:13", [12, 12, 12, 12, 13]),
        (((0, 7), (1, 8), (3, 7)), "stop/7+1:8+3:7", [7, 8, 8, 7, 7]),  # A worker was restored.
    ],
)
def test_the_version_of_each_token_is_kept_in_the_finish_reason(spans, text, versions):
    assert with_spans("stop", spans) == text
    assert split_reason(text) == ("stop", spans)
    assert versions_of(spans, 5).tolist() == versions


def test_delivered_rows_have_the_version_of_each_token():
    answers = pa.table(
        {
            "finish_reason": ["stop/4+1:5", "stop"],
            "response_ids": pa.array([[1, 2, 3], [4]], TOKEN_IDS),
        }
    )
    schema = row_schema(Signal("text"), policy=True)
    given = with_versions(answers)
    numbers = {"row": [0, 1], "position": [0, 1], "epoch": [0, 0], "source": ["", ""]}
    prompts = {"prompt_ids": [[9], [9]]}
    columns = {**numbers, **prompts, **dict(zip(given.column_names, given.columns, strict=True))}
    rows = rows_from_table(pa.table([columns[n] for n in schema.names], schema=schema))
    assert [row.token_versions.tolist() for row in rows] == [[4, 5, 5], []]
    assert [row.policy_version for row in rows] == [4, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"signal": {"kind": "text"}, "objective": {"cross_entropy": 1}}, "signal.kind is 'text'"),
        ({"stream": {"order": "arrival"}}, "stream.order: fixed"),
        ({"policy": {"student_share": 0.5, "max_staleness_steps": 0}}, "max_staleness_steps"),
        ({"policy": {"student_share": 1.5}}, "expected 0 to 1"),
        ({"policy": {"student_share": 1, "num_replicas": {"min": 0, "max": 2}}}, "min: 1"),
        ({"policy": {"student_share": 1, "objective": {"cross_entropy": 1}}}, "its own samples"),
        ({"teacher": {"model": "t", "engine": "synthetic"}}, "teacher.engine: vllm"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate({**MINIMAL, "policy": {"student_share": 0.5}, **change})


def test_reverse_kl_alone_on_a_few_ids_is_told_of():
    policy = {"student_share": 0.5, "objective": {"reverse_kl": 1.0}}
    (told,) = tail_notices(RunConfig.model_validate({**MINIMAL, "policy": policy}))
    assert "reverse_kl alone" in told and "signal.kind: hidden" in told
    others = [
        {"policy": {**policy, "objective": {"forward_kl": 0.5, "reverse_kl": 0.5}}},
        {"policy": {**policy, "student_share": 0.0}},
        {"policy": policy, "signal": {"kind": "hidden"}},
    ]
    for other in others:
        assert not list(tail_notices(RunConfig.model_validate({**MINIMAL, **other})))


@pytest.mark.parametrize(
    ("objective", "bound"),
    [({}, 4), ({"forward_kl": 1}, 8), ({"reverse_kl": 1}, 4), ({"jsd": 1, "forward_kl": 1}, 4)],
)
def test_forward_kl_alone_bears_older_texts(objective, bound):
    policy = {"student_share": 0.5} | ({"objective": objective} if objective else {})
    assert PolicyConfig.model_validate(policy).staleness_bound == bound
    chosen = PolicyConfig.model_validate({**policy, "max_staleness_steps": 2})
    assert chosen.staleness_bound == 2
    # Credits follow it: the first rows whose weights must be newer than the first.
    plan_of = plan(**{**policy, "student_share": 1.0})
    assert plan_of.oldest_version(0, np.arange(8 * bound, 8 * bound + 8)) == 0


def test_without_a_share_nothing_of_a_policy_is_asked_for():
    config = RunConfig.model_validate({**MINIMAL, "stream": {"order": "arrival"}})
    assert not config.policy.enabled
    assert PolicyPlan.of(config, 10, "a") is None


def test_a_ramp_is_written_into_the_run_folder_so_that_it_loads_back():
    ramp = {"from": 0.25, "to": 1.0, "over_steps": 10}
    config = RunConfig.model_validate({**MINIMAL, "policy": {"student_share": ramp}})
    again = RunConfig.model_validate(yaml.safe_load(config_text(config)))
    assert again == config
    assert again.policy.share_at(0) == 0.25
