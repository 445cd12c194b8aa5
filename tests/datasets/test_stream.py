"""The stream on a local Ray, with a teacher that obeys its prompts: bound, order, drops, faults."""

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import ray

from raystill.base.run_folder import HELD_OUT, HELD_OUT_PROMPTS, RunFolder
from raystill.cluster.coordinator.duplicates import start_duplicates
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import ENGINE, row_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import RowCounts, TeacherStore
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, num_steps
from raystill.datasets.stream.spec import Requester
from tests.support import stream_rig as rig
from tests.support.paid import rows_requested_by
from tests.support.runs import run_of
from tests.support.stream_rig import GROUP_ROWS, PLAIN, ROWS_PER_STEP, SEED, TOP_K, Run

pytestmark = pytest.mark.ray

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def teacher(ray_serve):
    from ray import serve

    deployment = serve.deployment(
        rig.ObedientTeacher,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
    )
    yield serve.run(deployment.bind(), name=rig.APP, route_prefix=None)
    serve.delete(rig.APP)


@pytest.fixture(scope="module")
def workers(teacher):
    return ray.remote(num_cpus=0, max_concurrency=2 * sum(WORLD_SIZES))(rig.Workers).remote()


@pytest.mark.parametrize(("order", "world_sizes"), [("fixed", (2, 4)), ("arrival", (1, 3))])
def test_all_rows_arrive_within_the_smallest_bound_at_one_to_four_workers(
    workers, tmp_path, order, world_sizes
):
    num_rows = 161
    runs = []
    for world_size in world_sizes:
        run = Run(tmp_path, [rig.RANDOM_DELAY] * num_rows, order, world_size)
        assert run.bound == ROWS_PER_STEP + 2 * world_size * GROUP_ROWS
        runs.append(run.start(workers))
    for run in runs:
        streamed = run.wait()
        assert streamed.positions == list(range(num_rows))
        assert run.bound - GROUP_ROWS < streamed.snapshot.max_rows_ahead_seen <= run.bound
        assert streamed.snapshot.rows_ahead == 0
        if order == "arrival":
            assert all(len(step) == ROWS_PER_STEP for step in streamed.steps[:8])
            continue
        assert len(streamed.steps) == num_steps(num_rows, ROWS_PER_STEP)
        for step, positions in enumerate(streamed.steps):
            start = step * ROWS_PER_STEP
            assert sorted(positions) == list(range(start, min(start + ROWS_PER_STEP, num_rows)))


def test_every_row_comes_with_its_own_answer_or_the_one_that_was_given(teacher, workers, tmp_path):
    """A given answer is scored."""
    given = [[50 + row, row, 1] if row % 2 else None for row in range(40)]
    teacher.answered.remote().result()
    streamed = Run(tmp_path, [PLAIN] * 40, "fixed", 1, given=given).stream(workers)
    assert teacher.answered.remote().result() == {"sample": 20, "score": 20}
    order = epoch_order(40, SEED, 0, GROUP_ROWS)
    assert len(streamed.tables) == 5
    for table in streamed.tables:
        assert table.schema.equals(row_schema(Signal("topk", TOP_K)))
        rows = table["row"].to_numpy()
        assert np.array_equal(rows, order[table["position"].to_numpy()])
        assert table["prompt_ids"].to_pylist() == [[PLAIN, row] for row in rows]
        assert table["response_ids"].to_pylist() == [given[row] or [row, 1] for row in rows]
        assert set(table["finish_reason"].to_pylist()) == {"stop"}
        assert table["source"].to_pylist() == [f"source {row % 3}" for row in rows]
        assert set(table["epoch"].to_pylist()) == {0}
    counters = {"rows_asked": 20, "rows_scored": 20, "rows_reused": 0}
    assert streamed.snapshot.counters == counters | {"rows_answered": 40, "rows_truncated": 0}


@pytest.mark.parametrize("order", ["fixed", "arrival"])
def test_of_near_duplicates_one_is_trained_on(teacher, workers, tmp_path, order):
    """In ``fixed`` order the earliest of the plan, though groups take their time."""
    given = [[50 + row % 5, row % 5, 3, 1] for row in range(96)]
    rules = [{"similar": {"over": "run", "min_tokens": 0}}]
    filters = {"rules": rules, "max_rejected_fraction": 1.0}
    run = Run(tmp_path, [rig.RANDOM_DELAY] * 96, order, 2, given=given, filters=filters)
    run.spec = replace(run.spec, duplicates=start_duplicates(run.spec))
    for epoch in range(2):
        run.ledger = Ledger(96)
        streamed = run.stream(workers, epoch=epoch)
        kinds = [int(row) % 5 for row in epoch_order(96, SEED, epoch, GROUP_ROWS)]
        assert sorted(kinds[p] for p in streamed.positions) == list(range(5))
        if order == "fixed":
            assert streamed.positions == [p for p, k in enumerate(kinds) if k not in kinds[:p]]
        assert dict(streamed.snapshot.filtered) == {"similar": 91}


def test_the_source_is_not_fused_into_the_answer_stage(teacher, tmp_path):
    from ray.data._internal.logical.optimizers import get_execution_plan

    from raystill.datasets.stream.stream import build_stream

    dataset = build_stream(Run(tmp_path, [PLAIN] * 8, "fixed", 1).spec)
    answer = get_execution_plan(dataset._logical_plan)[0].dag
    (source,) = answer.input_dependencies
    assert answer.name == "MapBatches(AnswerGroup)"
    assert source.name == "ReadPlan"


def test_what_blocks_fill_makes_ray_data_ask_for_no_nodes():
    """Its autoscaler goes by the blocks' share of what they may fill."""
    from ray.data import DataContext
    from ray.data._internal.execution.interfaces import ExecutionOptions, ExecutionResources
    from ray.data._internal.execution.resource_manager import ResourceManager

    from raystill.datasets.stream.stream import stream_context

    class Last:
        output_dependencies = ()

    def limit(context):
        there_is = ExecutionResources(object_store_memory=100)
        topology = {Last(): None}
        manager = ResourceManager(topology, ExecutionOptions(), lambda: there_is, context, None)
        return manager.get_global_limits().object_store_memory

    assert limit(DataContext()) <= 50
    assert limit(stream_context("fixed")) >= 100 * 1000


def test_the_source_may_run_ahead_by_the_name_that_ray_reads():
    from ray.data import DataContext

    from raystill.datasets.stream.stream import SOURCE_BUFFER_GROUPS, stream_context

    name = "_max_num_blocks_in_streaming_gen_buffer"
    assert getattr(DataContext(), name) == 2, "Ray renamed it, or passes on more by itself"
    assert getattr(stream_context("fixed"), name) == SOURCE_BUFFER_GROUPS


def test_groups_pass_each_other_in_arrival_order(teacher, workers, tmp_path):
    """That in the fixed order they do not: the steps of the first test, whose groups are late."""
    num_rows = (rig.NUM_BEFORE_LAST + 4) * GROUP_ROWS
    behaviours = np.full(num_rows, PLAIN)
    behaviours[epoch_order(num_rows, SEED, 0, GROUP_ROWS)[:GROUP_ROWS]] = rig.LAST
    teacher.restart.remote().result()
    steps = Run(tmp_path, behaviours, "arrival", 1, num_rows).stream(workers).steps
    assert next(step for step, positions in enumerate(steps) if 0 in positions) > 2


def test_all_groups_that_fit_are_in_flight_at_once(workers, tmp_path):
    num_rows = rig.NUM_TOGETHER * GROUP_ROWS
    streamed = Run(tmp_path, [rig.TOGETHER] * num_rows, "fixed", 1, num_rows).stream(workers)
    assert streamed.positions == list(range(num_rows)), "the teacher waits for all of them"


def test_dropped_rows_return_their_credits_and_are_counted(workers, tmp_path):
    """Answers that were cut off are kept by one run, and dropped by the other."""
    num_rows = 120
    gone = {*range(16, 48), *range(50, 120, 7)}  # Whole groups, and rows here and there.
    cut = set(range(0, 120, 11)) - gone
    behaviours, order = np.full(num_rows, PLAIN), epoch_order(num_rows, SEED, 0, GROUP_ROWS)
    behaviours[order[sorted(gone)]] = rig.UNUSABLE
    behaviours[order[sorted(cut)]] = rig.TRUNCATED
    common = {"world_size": 2, "max_drop_fraction": 0.5}
    runs = [
        Run(tmp_path, behaviours, "fixed", kind="text", **common).start(workers),
        Run(tmp_path, behaviours, "arrival", on_truncated="drop", **common).start(workers),
    ]
    fixed, arrival = (run.wait() for run in runs)
    assert fixed.positions == sorted(set(range(num_rows)) - gone)
    assert arrival.positions == sorted(set(range(num_rows)) - gone - cut)
    assert fixed.snapshot.dropped == {"too_long": len(gone)}
    assert arrival.snapshot.dropped == {"too_long": len(gone), "truncated": len(cut)}
    assert fixed.snapshot.counters["rows_truncated"] == len(cut)
    assert fixed.snapshot.rows_ahead == arrival.snapshot.rows_ahead == 0
    for step, positions in enumerate(fixed.steps):
        assert {p // ROWS_PER_STEP for p in positions} <= {step}, "a hole shifts nothing"


def test_too_many_dropped_rows_stop_the_run(workers, tmp_path):
    behaviours = [rig.UNUSABLE] * 3 + [PLAIN] * 29
    run = Run(tmp_path, behaviours, "fixed", 1, max_drop_fraction=0.05)
    with pytest.raises(ray.exceptions.RayTaskError, match="RunError"):
        run.stream(workers)
    error = ray.get(run.coordinator.snapshot.remote()).error
    assert error.startswith("3 of 32 rows were dropped (3 too_long), more than the 1 that")


def test_filters_reject_rows_in_both_orders_and_others_read_their_answers_later(
    workers, teacher, tmp_path
):
    """Rows keep their decisions after a restart, and what was rejected is never asked again."""
    behaviours = np.full(64, PLAIN)
    behaviours[5:25] = rig.TRUNCATED
    common = {"store": "shared", "filters": [{"finished": True}]}
    run = Run(tmp_path, behaviours, "fixed", 1, **common)
    cut = [p for p, row in enumerate(epoch_order(64, SEED, 0, GROUP_ROWS)) if 5 <= row < 25]
    left = sorted(set(range(64)) - set(cut))
    first = run.stream(workers, num_steps=1)
    assert first.positions == [p for p in left if p < ROWS_PER_STEP]
    whole = run.stream(workers)  # The step is lost with its worker group: all is filtered again.
    assert whole.positions == left
    assert whole.snapshot.filtered == {"finished": 20}
    assert whole.snapshot.dropped == {}, "a quota of their own"
    assert whole.snapshot.rows_ahead == 0
    gone = ray.get(run.coordinator.dropped_positions.remote())
    assert gone == dict.fromkeys(cut, "filtered: finished"), "what the ledger is told"

    teacher.answered.remote().result()
    file = tmp_path / "mine.py"
    file.write_text("def ended(row):\n    return row['finish_reason'] == 'stop'\n")
    mine = [{"name": "mine", "function": {"path": f"{file}:ended"}}, {"finished": True}]
    run = Run(tmp_path, behaviours, "arrival", 2, store="shared", filters=mine)
    file.unlink()  # Its text travels with the stream.
    none = Run(tmp_path, behaviours, "arrival", 1, store="shared").start(workers)
    other, unfiltered = run.stream(workers), none.wait()
    assert len(other.positions) == 44
    assert other.snapshot.filtered == {"mine": 20}, "the first that rejects a row is told"
    assert other.snapshot.counters["rows_filtered"] == 20
    assert len(unfiltered.positions) == 64
    assert teacher.answered.remote().result() == {"sample": 0, "score": 0}


def test_a_new_attempt_asks_only_for_what_the_ledger_lacks(workers, tmp_path):
    num_rows = 96
    run = Run(tmp_path, [PLAIN] * num_rows, "fixed", 2)
    first = run.stream(workers, num_steps=3)
    assert first.positions == list(range(3 * ROWS_PER_STEP))
    learned = first.positions[: 2 * ROWS_PER_STEP]  # The last step is lost with its weights.
    run.ledger.mark_trained([*learned, 60, 61])
    second = run.stream(workers)
    assert second.positions == sorted(set(range(num_rows)) - set(learned) - {60, 61})
    assert second.snapshot.lives == 2
    assert second.snapshot.rows_ahead == 0


def ask(*prompts):
    from raystill.datasets.stream.teacher_calls import TeacherCalls

    async def sample():
        calls = TeacherCalls(rig.APP, Signal("text"), 2, None)
        return await calls.sample(pa.array(prompts, pa.list_(pa.int32())))

    return asyncio.run(sample())


def test_a_dead_engine_is_asked_again_and_a_mistake_is_passed_on(teacher):
    assert ask([rig.FAILS_ONCE, 1000])["response_ids"].to_pylist() == [[1000, 1]]
    with pytest.raises(ValueError, match="a mistake in the teacher"):
        ask([rig.BROKEN, 1001])


def test_a_row_that_kills_the_engine_each_time_is_poison_and_the_others_are_answered(teacher):
    answers = ask([PLAIN, 7], [rig.KILLS, 8], [PLAIN, 9])
    assert answers["response_ids"].to_pylist() == [[7, 1], [], [9, 1]]
    assert answers["error"].to_pylist() == [None, "poison", None]
    assert b"obedient" in answers.schema.metadata[ENGINE]


def test_further_epochs_are_read_from_the_store_in_another_order(workers, tmp_path):
    """A row that kills its engine each time is dropped once, and not asked in the next epoch."""
    behaviours, poison = np.full(100, PLAIN), 12
    behaviours[poison] = rig.KILLS
    run = Run(tmp_path, behaviours, "fixed", 2, max_drop_fraction=0.1)
    epochs = [run.stream(workers, epoch=epoch) for epoch in range(2)]
    for epoch, streamed in enumerate(epochs):
        order = epoch_order(100, SEED, epoch, GROUP_ROWS)
        assert streamed.positions == [p for p in range(100) if order[p] != poison]
        assert streamed.snapshot.dropped == {"poison": 1}
        for table in streamed.tables:
            assert table["row"].to_pylist() == order[table["position"].to_numpy()].tolist()
            assert table["response_ids"].to_pylist() == [[r, 1] for r in table["row"].to_pylist()]
    counters = epochs[-1].snapshot.counters
    assert (counters["rows_asked"], counters["rows_reused"]) == (100, 99)
    rows = {tuple(t["row"].to_pylist()) for s in epochs for t in s.tables}
    assert len(rows) > 100 // GROUP_ROWS + 1, "the rows within groups were not shuffled anew"


def test_poorer_stored_answers_are_scored_and_never_sampled_again(teacher, workers, tmp_path):
    behaviours = [rig.TRUNCATED] * 5 + [PLAIN] * 35
    Run(tmp_path, behaviours, "fixed", 1, kind="text", store="s").stream(workers)
    teacher.answered.remote().result()
    run = Run(tmp_path, behaviours, "fixed", 2, store="s")
    streamed = run.stream(workers)
    counters = {"rows_asked": 0, "rows_scored": 40, "rows_reused": 0, "rows_answered": 40}
    assert streamed.snapshot.counters == counters | {"rows_truncated": 5}  # As it was stored.
    assert teacher.answered.remote().result() == {"sample": 0, "score": 40}
    for table in streamed.tables:
        assert table.schema.equals(row_schema(Signal("topk", TOP_K)))
        assert table["response_ids"].to_pylist() == [[row, 1] for row in table["row"].to_pylist()]
    catalogue = TeacherStore(run.spec.store_path).catalogue()
    assert (catalogue.rows, catalogue.duplicates) == (80, 40)  # The poorer ones are not needed.
    assert rows_requested_by(catalogue, run.name)["training"] == RowCounts(0, 40)
    longer = Run(tmp_path, [*behaviours, *[PLAIN] * 8], "arrival", 1, store="s").stream(workers)
    counters = longer.snapshot.counters
    assert (counters["rows_asked"], counters["rows_scored"], counters["rows_reused"]) == (8, 0, 40)


def stored_answers(place, rows, kind):
    """The answers of so many rows; what it knows of the store it has from now."""
    from raystill.datasets.stream.answers import StoredAnswers
    from raystill.datasets.stream.teacher_calls import TeacherCalls

    keys = pa.chunked_array([pa.array([row.to_bytes(16, "big") for row in range(rows)])])
    calls = TeacherCalls(rig.APP, Signal(kind, TOP_K), 2, None)
    requester = Requester("run", "training", "teacher", "obedient")
    return StoredAnswers(TeacherStore(str(place)), keys, Signal(kind, TOP_K), requester, calls)


def test_a_given_response_costs_nothing_where_text_is_all_that_is_wished(teacher, tmp_path):
    rows = np.arange(12)
    prompts = pa.array([[PLAIN, row] for row in rows], pa.list_(pa.int32()))
    given = pa.array([None] * 8 + [[70, row] for row in rows[8:]], pa.list_(pa.int32()))
    teacher.answered.remote().result()
    told, counters = asyncio.run(stored_answers(tmp_path, 12, "text").get(rows, prompts, given))
    assert told["response_ids"].to_pylist() == [[r, 1] for r in rows[:8]] + given[8:].to_pylist()
    assert (counters["rows_asked"], counters["rows_scored"]) == (8, 0)
    assert teacher.answered.remote().result() == {"sample": 8, "score": 0}


def test_a_retried_group_finds_all_that_its_first_try_published(teacher, tmp_path):
    rows = np.arange(12)
    prompts = pa.array([[PLAIN, row] for row in rows], pa.list_(pa.int32()))
    given = pa.array([None] * 8 + [[70, row] for row in rows[8:]], pa.list_(pa.int32()))

    def get(answers, count=12):
        return asyncio.run(answers.get(rows[:count], prompts[:count], given[:count]))

    get(stored_answers(tmp_path, 12, "text"), 4)
    first, retried = (stored_answers(tmp_path, 12, "topk") for _ in range(2))
    teacher.answered.remote().result()
    told, counters = get(first)
    assert counters == {"rows_asked": 4, "rows_scored": 8, "rows_reused": 0}
    assert told["response_ids"].to_pylist() == [[r, 1] for r in rows[:8]] + given[8:].to_pylist()
    again, counters = get(retried)
    assert counters == {"rows_asked": 0, "rows_scored": 0, "rows_reused": 12}
    assert again.equals(told)
    assert teacher.answered.remote().result() == {"sample": 4, "score": 8}
    # A scored answer that was damaged is scored again, not sampled.
    store = TeacherStore(str(tmp_path))
    found = store.catalogue()
    for entry in found.entries:
        if entry.footer.groups[0].scored:
            store.folder.write_bytes(f"segments/{entry.name}", b"torn")
    told, counters = get(stored_answers(tmp_path, 12, "topk"))
    assert counters == {"rows_asked": 0, "rows_scored": 8, "rows_reused": 4}
    assert told.equals(again)


def test_a_row_that_cannot_be_scored_is_unusable_and_the_others_are_published(teacher, tmp_path):
    behaviours = [PLAIN, rig.UNUSABLE, rig.KILLS, PLAIN]
    prompts = pa.array([[b, row] for row, b in enumerate(behaviours)], pa.list_(pa.int32()))
    given = pa.array([[row, 5] for row in range(4)], pa.list_(pa.int32()))
    answers = stored_answers(tmp_path, 4, "sampled")
    told, counters = asyncio.run(answers.get(np.arange(4), prompts, given))
    assert told["error"].to_pylist() == [None, "too_long", "poison", None]
    assert told["response_ids"].to_pylist() == [[0, 5], [], [], [3, 5]]
    assert told["finish_reason"].to_pylist() == ["stop", None, None, "stop"]
    assert counters["rows_scored"] == 4
    assert TeacherStore(str(tmp_path)).catalogue().rows == 2


def held_out_config():
    return RunConfig.model_validate(
        {
            "teacher": {"model": "none"},
            "student": {"layers": [0]},
            "prompts": {"path": "none.jsonl"},
            "stream": {"group_rows": GROUP_ROWS},
            "evaluation": {"top_k": TOP_K},
        }
    )


def test_held_out_rows_are_answered_once_and_kept(teacher, tmp_path):
    from raystill.cluster.coordinator.actor import start_coordinator
    from raystill.datasets.stream.held_out import answer_held_out

    folder = RunFolder(str(tmp_path))
    given = [[70 + row, 1] if row % 5 == 0 else None for row in range(21)]
    rig.write_prompts(folder, HELD_OUT_PROMPTS, [PLAIN] * 20 + [rig.UNUSABLE], given)
    coordinator = start_coordinator("held-out", 64, 10, 0.0)
    config = held_out_config()
    run = run_of(config, folder, coordinator=coordinator)
    assert ray.get(answer_held_out.remote(run)) == 20
    ray.get(coordinator.wait_held_out.remote(), timeout=5)
    rows = folder.read_table(HELD_OUT)
    assert rows.schema.equals(row_schema(Signal("topk", TOP_K)))
    assert rows["row"].to_pylist() == rows["position"].to_pylist() == list(range(20))
    assert rows["response_ids"].to_pylist() == [given[row] or [row, 1] for row in range(20)]
    assert set(rows["epoch"].to_pylist()) == {-1}
    assert ray.get(answer_held_out.remote(run)) == 20
    counters = ray.get(coordinator.snapshot.remote()).counters
    assert counters == {"evaluation_rows_dropped": 1}
    paid = rows_requested_by(TeacherStore(run.store_path).catalogue(), "run")
    assert paid == {"training": RowCounts(), "evaluation": RowCounts(16, 4)}
    # As many others are not the same: they are asked.
    others = [[90 + row, 1] for row in range(21)]
    rig.write_prompts(folder, HELD_OUT_PROMPTS, [PLAIN] * 21, others, first_key=100)
    assert ray.get(answer_held_out.remote(run)) == 21
    assert folder.read_table(HELD_OUT)["response_ids"].to_pylist() == others
