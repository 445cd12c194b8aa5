"""The plan's arithmetic: order, groups, steps."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, num_steps, remaining_groups, step_of

ROWS = st.integers(0, 300)
GROUP = st.integers(1, 17)


@given(num_rows=ROWS, group_rows=GROUP, seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_row_has_one_position_and_groups_of_positions_are_groups_of_rows(
    num_rows, group_rows, seed, epoch
):
    order = epoch_order(num_rows, seed, epoch, group_rows)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_rows))
    for start in range(0, num_rows, group_rows):
        assert len(set(order[start : start + group_rows] // group_rows)) == 1


def test_the_order_depends_on_seed_and_epoch_and_shuffles_groups_and_rows():
    order = epoch_order(160, seed=1, epoch=0, group_rows=8)
    assert np.array_equal(order, epoch_order(160, seed=1, epoch=0, group_rows=8))
    assert not np.array_equal(order, epoch_order(160, seed=2, epoch=0, group_rows=8))
    assert not np.array_equal(order, epoch_order(160, seed=1, epoch=1, group_rows=8))
    groups = order.reshape(20, 8)
    assert not np.array_equal(np.sort(groups[:, 0] // 8), groups[:, 0] // 8)
    assert any(not np.array_equal(np.sort(group), group) for group in groups)


def test_the_order_is_what_it_was_when_checkpoints_were_written():
    order = epoch_order(10, seed=3, epoch=0, group_rows=4)
    assert order.tolist() == EXPECTED_ORDER, "resumed runs would train rows twice"


EXPECTED_ORDER = [4, 6, 5, 7, 3, 1, 0, 2, 9, 8]


def test_an_impossible_plan_is_refused():
    with pytest.raises(ValueError, match="group_rows \\(0\\)"):
        epoch_order(8, seed=0, epoch=0, group_rows=0)


def test_remaining_groups_keep_their_boundaries_and_leave_holes():
    ledger = Ledger(10)
    ledger.mark_trained([0, 2, 4, 5, 6, 7])
    ledger.mark_dropped({3: "too_long"})
    groups = [group.tolist() for group in remaining_groups(10, 4, ledger)]
    assert groups == [[1], [8, 9]]


@given(num_rows=ROWS, group_rows=GROUP, data=st.data())
def test_remaining_groups_are_just_what_the_ledger_lacks(num_rows, group_rows, data):
    ledger = Ledger(num_rows)
    trained = data.draw(st.sets(st.integers(0, max(0, num_rows - 1)), max_size=num_rows))
    ledger.mark_trained(trained if num_rows else [])
    groups = list(remaining_groups(num_rows, group_rows, ledger))
    left = np.concatenate(groups) if groups else np.array([], np.int64)
    assert left.tolist() == sorted(set(range(num_rows)) - trained)
    assert all(len(set(group // group_rows)) == 1 for group in groups)


def test_the_first_group_does_not_wait_for_the_others_to_be_cut():
    """Of ten million rows the others are a million arrays."""
    rows = 800_000
    ledger = Ledger(rows)
    tracemalloc.start()
    first = next(groups := remaining_groups(rows, 8, ledger))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert first.tolist() == list(range(8)) and next(groups).tolist() == list(range(8, 16))
    assert held < 10 * rows  # 8 bytes a row, and where each group ends


def test_nothing_is_left_of_a_finished_epoch():
    ledger = Ledger(3)
    ledger.mark_trained([0, 1, 2])
    assert list(remaining_groups(3, 2, ledger)) == []
    assert list(remaining_groups(0, 2, Ledger(0))) == []


def test_steps_are_counted_up_and_positions_belong_to_one():
    assert [num_steps(n, 16) for n in (0, 1, 16, 17, 161)] == [0, 1, 1, 2, 11]
    assert [step_of(p, 16) for p in (0, 15, 16, 160)] == [0, 0, 1, 10]
