"""The stream on a local Ray, with a teacher that obeys its prompts: bound, order, drops, faults.

A prompt is [behaviour, row]; the answer's first token is the row. Workers take their rows as in
training (``StepRows``) and meet after every step, as the collective operations make them.
"""

import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from raystill.cluster.problems import RunError
from raystill.cluster.run_folder import HELD_OUT, HELD_OUT_PROMPTS, RunFolder
from raystill.datasets.config import SignalConfig, StreamConfig
from raystill.datasets.ledger import Ledger
from raystill.datasets.plan import epoch_order, num_steps
from raystill.datasets.schema import PROMPT_SCHEMA, answer_schema, row_schema

pytestmark = pytest.mark.ray

APP = "obedient"
GROUP_ROWS = 8
ROWS_PER_STEP = 16
TOP_K = 4
SEED = 7
PLAIN, RANDOM_DELAY, SLOW, UNUSABLE, TRUNCATED, FAILS_ONCE, HANGS, BROKEN = range(8)


class EngineDeadError(Exception):
    """Named like vLLM's: the engine is gone, the replica lives."""


class ObedientTeacher:
    """Answers each prompt at once, or does what its first token says."""

    def __init__(self):
        self.now = self.most = 0
        self.failed = set()

    async def sample(self, prompts, kind, top_k):
        rows = prompts["prompt_ids"].to_pylist()
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.behave({behaviour for behaviour, _ in rows}, rows[0][1])
        finally:
            self.now -= 1
        return answers_to(rows, kind, top_k)

    async def behave(self, behaviours, first_row):
        if RANDOM_DELAY in behaviours:
            await asyncio.sleep(np.random.default_rng().uniform(0, 0.03))
        if SLOW in behaviours:
            await asyncio.sleep(1.5)
        if HANGS in behaviours:
            await asyncio.sleep(60)
        if BROKEN in behaviours:
            raise ValueError("a mistake in the teacher")
        if FAILS_ONCE in behaviours and first_row not in self.failed:
            self.failed.add(first_row)
            raise EngineDeadError("the engine core died")

    async def most_in_flight(self):
        most, self.most = self.most, 0
        return most


def answers_to(rows, kind, top_k):
    """Answers of two tokens, [row, 1], in ``answer_schema``; none for an unusable row."""
    tokens = [[] if behaviour == UNUSABLE else [row, 1] for behaviour, row in rows]
    floats = [[-0.5] * len(t) for t in tokens]
    ids = [[list(range(top_k))] * len(t) for t in tokens]
    logprobs = [[[-1.0] * top_k] * len(t) for t in tokens]
    columns = [
        tokens,
        ["length" if behaviour == TRUNCATED else "stop" for behaviour, _ in rows],
        ["too_long" if behaviour == UNUSABLE else None for behaviour, _ in rows],
        *([floats, ids, logprobs, floats] if kind == "topk" else []),
    ]
    return pa.table(columns, schema=answer_schema(kind, top_k))


@dataclass
class Row:
    position: int


class Meeting:
    """Where the ranks of a step wait for each other; answers whether any has more."""

    def __init__(self, world_size):
        self.world_size, self.arrived = world_size, []
        self.changed = asyncio.Condition()
        self.decided = {}

    async def meet(self, step, has_more):
        async with self.changed:
            self.arrived.append(has_more)
            if len(self.arrived) == self.world_size:
                self.decided[step], self.arrived = any(self.arrived), []
                self.changed.notify_all()
            await self.changed.wait_for(lambda: step in self.decided)
            return self.decided[step]


class Rank:
    """A worker: takes its rows step by step; keeps what it saw."""

    def train(self, shard, coordinator, meeting, attempt, order, rank, world_size, num_steps=None):
        import ray

        from raystill.datasets.stream import iterate_groups
        from raystill.train.shares import StepRows

        self.tables = []
        rows = StepRows(
            iterate_groups(shard),
            order=order,
            rows_per_step=ROWS_PER_STEP,
            rank=rank,
            world_size=world_size,
            ledger=Ledger(100_000),
            to_rows=self.keep,
            taken=lambda n: coordinator.taken.remote(attempt, n),
        )
        steps = []
        more = True
        while more and len(steps) != num_steps:
            mine = rows.take(len(steps))
            steps.append([row.position for row in mine])
            more = ray.get(meeting.meet.remote(len(steps) - 1, rows.has_more))
        return steps, self.tables

    def keep(self, table):
        self.tables.append(table)
        return [Row(position) for position in table["position"].to_pylist()]


@pytest.fixture(scope="module")
def teacher(ray_serve):
    import ray
    from ray import serve

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deployment = serve.deployment(
        ObedientTeacher, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    handle = serve.run(deployment.bind(), name=APP, route_prefix=None)
    yield handle
    serve.delete(APP)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def ranks(teacher):
    import ray

    actor = ray.remote(num_cpus=0)(Rank)
    return [actor.remote() for _ in range(4)]


@dataclass
class Streamed:
    steps: list[list[int]]
    by_rank: list[list[list[int]]]
    tables: list[pa.Table]
    snapshot: dict
    seconds: float

    @property
    def positions(self):
        return sorted(p for step in self.steps for p in step)


class Run:
    """One run's coordinator and stream over prompts of the given behaviours."""

    def __init__(self, folder, behaviours, order, world_size, bound=None, **settings):
        from raystill.cluster.coordinator import start_coordinator
        from raystill.datasets.stream import StreamSpec

        self.num_rows, self.order, self.world_size = len(behaviours), order, world_size
        self.bound = bound or ROWS_PER_STEP + 2 * world_size * GROUP_ROWS
        self.ledger = Ledger(self.num_rows)
        drop_fraction = settings.pop("max_drop_fraction", 0.0)
        self.coordinator = start_coordinator(
            f"test-{time.monotonic_ns()}", self.bound, self.num_rows, drop_fraction
        )
        write_prompts(RunFolder(str(folder)), "prompts.parquet", behaviours)
        self.spec = StreamSpec(
            prompt_table=str(folder / "prompts.parquet"),
            num_rows=self.num_rows,
            order_seed=SEED,
            signal=SignalConfig(kind=settings.pop("kind", "topk"), top_k=TOP_K),
            stream=StreamConfig(
                group_rows=GROUP_ROWS, order=order, max_drop_fraction=drop_fraction, **settings
            ),
            max_rows_ahead=self.bound,
            rows_per_step=ROWS_PER_STEP,
            coordinator=self.coordinator,
            app_name=APP,
            groups_in_flight=32,
            request_timeout_s=30.0,
        )

    def stream(self, ranks, num_steps=None):
        """Let the workers train (at most ``num_steps``); fails instead of waiting for ever."""
        import ray

        from raystill.datasets.stream import build_stream, uneven_shares

        attempt = ray.get(self.coordinator.publish.remote(0, 0, self.ledger.to_dict()))
        shards = uneven_shares(build_stream(self.spec), self.world_size)
        meeting = ray.remote(num_cpus=0)(Meeting).remote(self.world_size)
        start = time.monotonic()
        calls = [
            worker.train.remote(
                shard,
                self.coordinator,
                meeting,
                attempt,
                self.order,
                rank,
                self.world_size,
                num_steps,
            )
            for rank, (worker, shard) in enumerate(zip(ranks, shards, strict=False))
        ]
        results = ray.get(calls, timeout=60)
        by_rank = [steps for steps, _ in results]
        return Streamed(
            steps=[[p for rank in step for p in rank] for step in zip(*by_rank, strict=True)],
            by_rank=by_rank,
            tables=[table for _, tables in results for table in tables],
            snapshot=ray.get(self.coordinator.snapshot.remote()),
            seconds=time.monotonic() - start,
        )


def write_prompts(folder, name, behaviours):
    rows = list(range(len(behaviours)))
    table = pa.table(
        [
            rows,
            [bytes(16)] * len(rows),
            [[int(b), row] for row, b in zip(rows, behaviours, strict=True)],
            [f"source {row % 3}" for row in rows],
        ],
        schema=PROMPT_SCHEMA,
    )
    folder.write_table(name, table, row_group_size=32)


@pytest.mark.parametrize("order", ["fixed", "arrival"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_rows_arrive_within_the_smallest_bound(ranks, tmp_path, order, world_size):
    num_rows = 161
    run = Run(tmp_path, [RANDOM_DELAY] * num_rows, order, world_size)
    streamed = run.stream(ranks)
    assert streamed.positions == list(range(num_rows))
    assert streamed.snapshot["max_ahead"] <= run.bound
    assert streamed.snapshot["max_ahead"] > run.bound - GROUP_ROWS
    assert streamed.snapshot["ahead"] == 0
    if order == "fixed":
        assert len(streamed.steps) == num_steps(num_rows, ROWS_PER_STEP)
        for step, positions in enumerate(streamed.steps):
            start = step * ROWS_PER_STEP
            assert sorted(positions) == list(range(start, min(start + ROWS_PER_STEP, num_rows)))
    else:
        assert all(len(step) == ROWS_PER_STEP for step in streamed.steps[:8])


def test_every_row_comes_with_its_own_answer(ranks, tmp_path):
    run = Run(tmp_path, [PLAIN] * 40, "fixed", 1)
    streamed = run.stream(ranks)
    order = epoch_order(40, SEED, 0, GROUP_ROWS)
    assert len(streamed.tables) == 5
    for table in streamed.tables:
        assert table.schema.equals(row_schema("topk", TOP_K))
        rows = table["row"].to_numpy()
        assert np.array_equal(rows, order[table["position"].to_numpy()])
        assert table["prompt_ids"].to_pylist() == [[PLAIN, row] for row in rows]
        assert table["response_ids"].to_pylist() == [[row, 1] for row in rows]
        assert table["source"].to_pylist() == [f"source {row % 3}" for row in rows]
        assert set(table["epoch"].to_pylist()) == {0}
    assert streamed.snapshot["counters"] == {
        "rows_asked": 40,
        "rows_answered": 40,
        "rows_truncated": 0,
    }


def test_the_source_is_not_fused_into_the_answer_stage(teacher, tmp_path):
    from ray.data._internal.logical.optimizers import get_execution_plan

    from raystill.datasets.stream import build_stream

    dataset = build_stream(Run(tmp_path, [PLAIN] * 8, "fixed", 1).spec)
    answer = get_execution_plan(dataset._logical_plan)[0].dag
    (source,) = answer.input_dependencies
    assert answer.name == "MapBatches(AnswerGroup)"
    assert source.name == "ReadPlan"


def test_many_groups_are_in_flight_and_pass_each_other_in_arrival_order_only(
    teacher, ranks, tmp_path
):
    num_groups = 24
    first = set(epoch_order(num_groups * GROUP_ROWS, SEED, 0, GROUP_ROWS)[:GROUP_ROWS])
    behaviours = [SLOW if row in first else RANDOM_DELAY for row in range(num_groups * GROUP_ROWS)]
    bound = num_groups * GROUP_ROWS
    arrival = Run(tmp_path, behaviours, "arrival", 1, bound).stream(ranks)
    assert set(arrival.steps[-1]) & set(range(GROUP_ROWS)), "the slow group holds no other back"
    assert arrival.positions == list(range(bound))
    fixed = Run(tmp_path, behaviours, "fixed", 1, bound).stream(ranks)
    assert fixed.steps[0] == list(range(ROWS_PER_STEP))

    teacher.most_in_flight.remote().result()
    Run(tmp_path, [SLOW] * bound, "fixed", 1, bound).stream(ranks)
    assert teacher.most_in_flight.remote().result() == num_groups


def test_dropped_rows_return_their_credits_and_are_counted(ranks, tmp_path):
    num_rows = 120
    order = epoch_order(num_rows, SEED, 0, GROUP_ROWS)
    behaviours = np.full(num_rows, PLAIN)
    gone = sorted({*range(16, 48), *range(50, 120, 7)})  # Whole groups, and rows here and there.
    behaviours[order[gone]] = UNUSABLE
    run = Run(tmp_path, behaviours, "fixed", 2, max_drop_fraction=0.5)
    streamed = run.stream(ranks)
    assert streamed.positions == sorted(set(range(num_rows)) - set(gone))
    assert streamed.snapshot["dropped"] == {"too_long": len(gone)}
    assert streamed.snapshot["ahead"] == 0
    for step, positions in enumerate(streamed.steps):
        assert {p // ROWS_PER_STEP for p in positions} <= {step}, "a hole shifts nothing"


def test_truncated_rows_are_kept_and_counted_or_dropped(ranks, tmp_path):
    behaviours = [TRUNCATED] * 5 + [PLAIN] * 19
    kept = Run(tmp_path, behaviours, "fixed", 1, kind="text").stream(ranks)
    assert len(kept.positions) == 24
    assert kept.snapshot["counters"]["rows_truncated"] == 5
    dropping = Run(
        tmp_path, behaviours, "arrival", 1, on_truncated="drop", max_drop_fraction=0.25
    ).stream(ranks)
    assert len(dropping.positions) == 19
    assert dropping.snapshot["dropped"] == {"truncated": 5}


def test_too_many_dropped_rows_stop_the_run(ranks, tmp_path):
    import ray

    run = Run(tmp_path, [UNUSABLE] * 3 + [PLAIN] * 29, "fixed", 1, max_drop_fraction=0.05)
    with pytest.raises(ray.exceptions.RayTaskError, match="RunError"):
        run.stream(ranks)
    error = ray.get(run.coordinator.snapshot.remote())["error"]
    assert error.startswith("3 of 32 rows were dropped (3 too_long), more than the 1 that")


def test_a_new_attempt_asks_only_for_what_the_ledger_lacks(ranks, tmp_path):
    num_rows = 96
    run = Run(tmp_path, [PLAIN] * num_rows, "fixed", 2)
    first = run.stream(ranks, num_steps=3)
    assert first.positions == list(range(3 * ROWS_PER_STEP))
    learned = first.positions[: 2 * ROWS_PER_STEP]  # The last step is lost with its weights.
    run.ledger.mark_trained([*learned, 60, 61])
    second = run.stream(ranks)
    assert second.positions == sorted(set(range(num_rows)) - set(learned) - {60, 61})
    assert second.snapshot["attempt"] == 2
    assert second.snapshot["ahead"] == 0


def test_a_dead_engine_is_asked_again_and_a_hanging_one_ends_the_run(teacher):
    from raystill.datasets.answer import TeacherCalls

    async def ask(behaviour, **limits):
        calls = TeacherCalls(APP, "text", 1, **limits)
        return await calls.sample(pa.array([[behaviour, 1000]], pa.list_(pa.int32())))

    answers = asyncio.run(ask(FAILS_ONCE, timeout_s=30, max_attempts=2))
    assert answers["response_ids"].to_pylist() == [[1000, 1]]
    with pytest.raises(RunError, match=r"failed 2 times .* 1 rows .*TimeoutError.*\(0.2\)"):
        asyncio.run(ask(HANGS, timeout_s=0.2, max_attempts=2))
    with pytest.raises(ValueError, match="a mistake in the teacher"):
        asyncio.run(ask(BROKEN, timeout_s=30, max_attempts=2))


def test_held_out_rows_are_answered_once_and_kept(teacher, tmp_path):
    import ray

    from raystill.cluster.coordinator import start_coordinator
    from raystill.datasets.held_out import answer_held_out

    folder = RunFolder(str(tmp_path))
    write_prompts(folder, HELD_OUT_PROMPTS, [PLAIN] * 20 + [UNUSABLE])
    coordinator = start_coordinator("held-out", 64, 10, 0.0)
    arguments = (folder, APP, coordinator, TOP_K, GROUP_ROWS)
    assert ray.get(answer_held_out.remote(*arguments)) == 20
    ray.get(coordinator.wait_held_out.remote(), timeout=5)
    rows = folder.read_table(HELD_OUT)
    assert rows.schema.equals(row_schema("topk", TOP_K))
    assert rows["row"].to_pylist() == rows["position"].to_pylist() == list(range(20))
    assert rows["response_ids"].to_pylist() == [[row, 1] for row in range(20)]
    assert set(rows["epoch"].to_pylist()) == {-1}
    assert ray.get(answer_held_out.remote(*arguments)) == 20
    counters = ray.get(coordinator.snapshot.remote())["counters"]
    assert counters == Counter(evaluation_rows_asked=21, evaluation_rows_dropped=1)
