"""Which rows make a step, in both orders, at 1 to 4 ranks; pure Python, blocks are lists."""

import threading
from dataclasses import dataclass

import pytest

from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import remaining_groups
from raystill.train.step.rows import StepRows

RANKS = (1, 2, 3, 4)


@dataclass
class FakeRow:
    position: int


def blocks_of(num_rows, group_rows, ledger, dropped=()):
    """The stream's blocks in plan order, holes where rows were dropped, empty ones included."""
    return [
        [FakeRow(int(p)) for p in group if p not in dropped]
        for group in remaining_groups(num_rows, group_rows, ledger)
    ]


def deal(blocks, world_size):
    """Blocks to ranks as Ray's splitter deals them: each to the rank with the fewest rows."""
    shares, sizes = [[] for _ in range(world_size)], [0] * world_size
    for block in blocks:
        rank = sizes.index(min(sizes))
        shares[rank].append(block)
        sizes[rank] += len(block)
    return shares


def step_rows(
    blocks, rank=0, world_size=1, order="fixed", rows_per_step=8, num_rows=1000, **kwargs
):
    ledger = kwargs.pop("ledger", None) or Ledger(num_rows)
    return StepRows(
        blocks,
        order=order,
        rows_per_step=rows_per_step,
        rank=rank,
        world_size=world_size,
        ledger=ledger,
        to_rows=lambda block: block,
        **kwargs,
    )


def run_all(shares, order, rows_per_step, first_step=0):
    """Positions of each step over all ranks, until no rank has more."""
    world_size = len(shares)
    ranks = [
        step_rows(blocks, rank, world_size, order, rows_per_step)
        for rank, blocks in enumerate(shares)
    ]
    steps, step = {}, first_step
    while True:
        taken = [[row.position for row in rank.take(step)] for rank in ranks]
        more = any(rank.has_more for rank in ranks)
        if any(taken) or more:
            steps[step] = taken
        if not more:
            return steps
        step += 1


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("group_rows", [1, 3, 8, 20])
def test_fixed_order_trains_the_same_rows_in_every_step_at_any_number_of_ranks(
    world_size, group_rows
):
    dropped = {0, 9, 10, 11, 30, *range(48, 56)}
    shares = deal(blocks_of(61, group_rows, Ledger(61), dropped), world_size)
    steps = run_all(shares, "fixed", rows_per_step=8)
    for step in range(8):
        expected = {p for p in range(step * 8, min(step * 8 + 8, 61)) if p not in dropped}
        together = [p for rank in steps.get(step, []) for p in rank]
        assert len(together) == len(set(together))
        assert set(together) == expected


@pytest.mark.parametrize("world_size", RANKS)
def test_fixed_order_goes_on_after_a_restart_with_the_steps_that_were_left(world_size):
    ledger = Ledger(40)
    ledger.mark_trained(range(16))
    ledger.mark_dropped({20: "too_long"})
    shares = deal(blocks_of(40, 6, ledger), world_size)
    steps = run_all(shares, "fixed", rows_per_step=8, first_step=2)
    got = {step: {p for rank in ranks for p in rank} for step, ranks in steps.items()}
    assert got == {2: set(range(16, 24)) - {20}, 3: set(range(24, 32)), 4: set(range(32, 40))}


def test_fixed_order_a_step_whose_rows_were_all_dropped_is_empty_and_shifts_nothing():
    blocks = blocks_of(24, 8, Ledger(24), dropped=set(range(8, 16)))
    rows = step_rows(blocks, num_rows=24)
    assert [[r.position for r in rows.take(s)] for s in range(3)] == [
        list(range(8)),
        [],
        list(range(16, 24)),
    ]
    assert not rows.has_more


def test_fixed_order_does_not_wait_for_the_next_step_once_the_last_row_of_this_one_is_there():
    def blocks():
        for start in range(0, 16, 4):
            yield [FakeRow(p) for p in range(start, start + 4)]
        pytest.fail("the rows of two steps are there, and a third was asked for")

    rows = step_rows(blocks(), num_rows=17)
    for step in range(2):
        assert [r.position for r in rows.take(step)] == list(range(step * 8, step * 8 + 8))
        assert rows.has_more


@pytest.mark.parametrize("world_size", RANKS)
def test_fixed_order_the_last_step_takes_the_stream_to_its_end(world_size):
    ended = []

    def blocks(share):
        yield from share
        ended.append(True)

    shares = deal(blocks_of(24, 8, Ledger(24), dropped={15, 23}), world_size)
    ranks = [
        step_rows(blocks(share), rank, world_size, num_rows=24) for rank, share in enumerate(shares)
    ]
    taken = [[r.position for rank in ranks for r in rank.take(step)] for step in range(3)]
    assert [len(step) for step in taken] == [8, 7, 7]
    assert len(ended) == world_size and not any(rank.has_more for rank in ranks)


def test_fixed_order_where_all_that_is_left_was_dropped_the_next_step_is_empty_and_the_last():
    rows = step_rows(blocks_of(24, 8, Ledger(24), dropped=set(range(8, 24))), num_rows=24)
    assert len(rows.take(0)) == 8 and rows.has_more
    assert rows.take(1) == [] and not rows.has_more


def test_fixed_order_refuses_a_row_that_comes_after_its_step():
    rows = step_rows([[FakeRow(8)], [FakeRow(3)]])
    rows.take(0)
    with pytest.raises(RuntimeError, match="after their own step"):
        rows.take(1)


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("rows_per_step", [1, 3, 6, 8])
def test_arrival_order_trains_every_row_once_in_steps_of_the_set_size(world_size, rows_per_step):
    shares = deal(blocks_of(161, 4, Ledger(161), dropped={5, 6, 7, 4, 100}), world_size)
    steps = run_all(shares, "arrival", rows_per_step)
    everything = [p for ranks in steps.values() for rank in ranks for p in rank]
    assert sorted(everything) == sorted(set(range(161)) - {4, 5, 6, 7, 100})
    sizes = [sum(len(rank) for rank in ranks) for ranks in steps.values()]
    assert max(sizes) <= rows_per_step
    full = [size for size in sizes if size == rows_per_step]
    assert len(full) >= len(everything) // rows_per_step - 4 * world_size


@pytest.mark.parametrize("world_size", RANKS)
def test_arrival_shares_sum_to_the_step_and_are_equal_over_a_round(world_size):
    ranks = [
        step_rows([], rank, world_size, "arrival", rows_per_step=6) for rank in range(world_size)
    ]
    for step in range(8):
        assert sum(rank.share(step) for rank in ranks) == 6
    totals = {sum(rank.share(step) for step in range(world_size)) for rank in ranks}
    assert totals == {6}


def test_a_rank_without_any_block_has_empty_steps_and_no_more_rows():
    for order in ("fixed", "arrival"):
        rows = step_rows([], order=order)
        assert rows.has_more
        assert rows.take(0) == []
        assert not rows.has_more


def test_blocks_are_reported_as_taken_when_they_leave_the_stream_and_empty_ones_are_not():
    taken = []
    rows = step_rows(
        [[FakeRow(0), FakeRow(1)], [], [FakeRow(8)], [FakeRow(16)]], taken=taken.append
    )
    rows.take(0)
    assert taken == [2, 1]
    rows.take(1)
    assert taken == [2, 1, 1]


def test_a_row_that_was_trained_before_stops_the_run():
    ledger = Ledger(10)
    ledger.mark_trained([3])
    rows = step_rows([[FakeRow(2), FakeRow(3)]], ledger=ledger)
    with pytest.raises(RuntimeError, match="nothing was trained twice"):
        rows.take(0)


def test_starting_early_asks_for_the_first_block_once_and_loses_nothing():
    asked = threading.Event()

    def blocks():
        asked.set()
        yield [FakeRow(0)]
        yield [FakeRow(1)]

    rows = step_rows(blocks())
    assert not asked.is_set()
    rows.start()
    rows.start()
    assert asked.wait(5)
    assert [row.position for row in rows.take(0)] == [0, 1]


def test_an_error_of_the_stream_reaches_the_rank_that_waits():
    def blocks():
        raise ValueError("broken")
        yield

    rows = step_rows(blocks())
    rows.start()
    with pytest.raises(ValueError, match="broken"):
        rows.take(0)
