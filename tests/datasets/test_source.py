"""The prompt table's random access and the blocks cut from it, without a cluster."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.actor import Coordinator
from raystill.config.stream import StreamConfig
from raystill.datasets.rows import prompt_table
from raystill.datasets.rows.schema import PROMPT_SCHEMA, answer_schema, prompt_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream import source
from raystill.datasets.stream.answer_stage import dropped_reasons, unpack_group, with_foreign
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order
from raystill.datasets.stream.spec import Requester, StreamSpec


@pytest.fixture
def prompts(tmp_path):
    rows = list(range(50))
    prompts = [[row] * (row % 4) for row in rows]
    given = [[row, 1] if row % 2 else None for row in rows]
    columns = [rows, [bytes(16)] * 50, prompts, ["a", "b"] * 25, given]
    folder = RunFolder(str(tmp_path))
    folder.write_table("prompts.parquet", pa.table(columns, schema=PROMPT_SCHEMA), 7)
    return prompt_table.PromptReader(folder.join("prompts.parquet"))


def test_rows_come_in_the_order_asked_across_row_groups(prompts):
    assert prompts.num_rows == 50
    rows = np.array([49, 0, 6, 7, 20])
    taken = prompts.take(rows)
    assert taken["row"].to_pylist() == rows.tolist()
    assert taken["prompt_ids"].to_pylist() == [[row] * (row % 4) for row in rows]


def test_only_as_much_is_held_as_allowed(prompts, monkeypatch):
    monkeypatch.setattr(prompt_table, "CACHE_BYTES", 400)
    for start in range(0, 48, 8):
        prompts.take(np.arange(start, start + 8))
    held = sum(part.nbytes for part in prompts._held.values())
    assert held == prompts._held_bytes <= 400


def test_a_group_travels_as_one_row_and_comes_out_whole(prompts):
    rows, positions = np.array([5, 3, 4]), np.array([8, 9, 11])
    block = source.group_block(prompts.take(rows), positions, attempt=2, epoch=1)
    assert len(block) == 1
    assert block["attempt"].to_pylist() == [2]
    group = unpack_group(pa.concat_tables([block, block]).slice(1, 1))
    assert group["row"].to_pylist() == [5, 3, 4]
    assert group["position"].to_pylist() == [8, 9, 11]
    assert group["epoch"].to_pylist() == [1, 1, 1]
    assert group["prompt_ids"].to_pylist() == [[5], [3, 3, 3], []]
    assert group["source"].to_pylist() == ["b", "b", "a"]
    assert group["response_ids"].to_pylist() == [[5, 1], [3, 1], None]


class Handle:
    """A coordinator's handle whose calls are answered in this thread."""

    def __init__(self, coordinator: Coordinator, loop: asyncio.AbstractEventLoop) -> None:
        self._coordinator, self._loop = coordinator, loop

    def __getattr__(self, name):
        method = getattr(self._coordinator, name)

        def remote(*arguments):
            return self._loop.run_until_complete(asyncio.wait_for(method(*arguments), 60))

        return SimpleNamespace(remote=remote)


GROUP, BOUND, GROUPS = 4, 16, 40


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The stream's settings for two teachers with every second group each, and its coordinator."""
    rows = list(range(GROUP * GROUPS))
    names = ["away", "here"] * (GROUPS // 2)
    teacher = [name for name in names for _ in range(GROUP)]
    schema = prompt_schema(["teacher"])
    columns = {"row": rows, "key": [bytes(16)] * len(rows), "prompt_ids": [[row] for row in rows]}
    columns |= {"source": ["s"] * len(rows), "teacher": teacher}
    columns |= {"response_ids": [None] * len(rows)}
    folder = RunFolder(str(tmp_path))
    folder.write_table("two.parquet", pa.table([columns[n] for n in schema.names], schema=schema))
    loop = asyncio.new_event_loop()
    parts = {"away": BOUND // 2, "here": BOUND // 2}
    coordinator = Coordinator(BOUND, len(rows), 0.1, parts=parts)
    monkeypatch.setattr(source.ray, "get", lambda result: result)
    requester = Requester("run", "training", "identity", "name")
    spec = StreamSpec(
        prompt_table=folder.join("two.parquet"),
        num_rows=len(rows),
        order_seed=3,
        signal=Signal("text"),
        stream=StreamConfig(group_rows=GROUP, order="arrival"),
        max_rows_ahead=BOUND,
        rows_per_step=GROUP,
        coordinator=Handle(coordinator, loop),
        app_name="app",
        groups_in_flight=2,
        store_path=folder.join("store"),
        requester=requester,
        teachers={name: ("app", requester) for name in parts},
    )
    loop.run_until_complete(coordinator.publish(0, 0, Ledger(len(rows)).to_dict()))
    yield spec, coordinator, loop
    loop.close()


def emitted(spec, coordinator, loop, most):
    """First positions of so many blocks, and their teachers; those of "here" are answered at once
    and taken.
    """
    found = []
    for block in source.emit_plan(spec):
        position, row = block["position"][0][0].as_py(), block["row"][0][0].as_py()
        name = ("away", "here")[row // GROUP % 2]
        found.append((position, name))
        if name == "here":
            loop.run_until_complete(coordinator.answered(1, position, GROUP, {}))
            loop.run_until_complete(coordinator.taken(1, GROUP))
        if len(found) == most:
            break
    return found


def test_groups_of_a_teacher_that_does_not_answer_are_overtaken_by_so_many_rows(two):
    spec, coordinator, loop = two
    order = epoch_order(spec.num_rows, spec.order_seed, 0, GROUP)
    plan = [("away", "here")[row // GROUP % 2] for row in order[::GROUP].tolist()]
    waits = [number for number, name in enumerate(plan) if name == "away"][2]
    window = plan[: waits + source.OVERTAKEN * BOUND // GROUP + 1]
    expected = window.count("here") + 2
    found = emitted(spec, coordinator, loop, expected)
    assert [name for _, name in found].count("away") == 2, "half of the bound"
    for name in ("away", "here"):
        mine = [position // GROUP for position, whose in found if whose == name]
        assert mine == [n for n, whose in enumerate(plan) if whose == name][: len(mine)]
    snapshot = loop.run_until_complete(coordinator.snapshot())
    assert snapshot.max_rows_ahead_seen <= BOUND
    assert max(position for position, _ in found) <= (waits * GROUP) + source.OVERTAKEN * BOUND

    async def next_one():
        plan_left = source.routed_plan(
            spec, order, [np.arange(n * GROUP, (n + 1) * GROUP) for n in range(GROUPS)]
        )
        for position, _ in found:
            plan_left.take(position)
        await asyncio.wait_for(coordinator.acquire_one(1, len(found), plan_left.offers()), 0.2)

    with pytest.raises(TimeoutError):
        loop.run_until_complete(next_one())


def test_a_read_that_ray_repeats_emits_the_same_blocks(two):
    spec, coordinator, loop = two
    first = emitted(spec, coordinator, loop, 9)
    blocks = source.emit_plan(spec)
    again = [next(blocks)["position"][0][0].as_py() for _ in range(9)]
    assert again == [position for position, _ in first]
    assert again != [GROUP * n for n in range(9)], "nothing was overtaken"


def test_in_a_fixed_order_nothing_is_overtaken(two):
    spec, coordinator, loop = two
    fixed = replace(spec, stream=spec.stream.model_copy(update={"order": "fixed"}))
    found = emitted(fixed, coordinator, loop, 6)
    assert [position for position, _ in found] == [GROUP * n for n in range(6)]


def test_truncated_rows_are_dropped_only_on_request_and_errors_always():
    columns = [[[1], [2], []], ["length", "stop", None], [None, None, "too_long"]]
    answers = pa.table(columns, schema=answer_schema(Signal("text")))
    assert dropped_reasons(answers, "keep").to_pylist() == [None, None, "too_long"]
    assert dropped_reasons(answers, "drop").to_pylist() == ["truncated", None, "too_long"]


def test_rows_with_an_id_that_the_student_has_not_are_dropped_by_that_reason():
    """A model may draw an id that its tokenizer does not name, from a padded row of its head."""
    columns = [[[1, 9], [2], [10], []], ["stop"] * 3 + [None], [None] * 3 + ["too_long"]]
    answers = pa.table(columns, schema=answer_schema(Signal("text")))
    prompts = pa.table({"prompt_ids": pa.array([[3], [12, 3], [4], [5]], pa.list_(pa.int32()))})
    reasons = dropped_reasons(answers, "keep")
    told = with_foreign(reasons, prompts, answers, 10).to_pylist()
    assert told == [None, "foreign_id", "foreign_id", "too_long"]
    assert with_foreign(reasons, prompts, answers, None).to_pylist() == [None] * 3 + ["too_long"]
    # Slices keep their own rows apart.
    sliced = with_foreign(reasons.slice(1), prompts.slice(1), answers.slice(1), 10)
    assert sliced.to_pylist() == told[1:]
