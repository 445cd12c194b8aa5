"""The ledger: what counts as done, and that it survives being written as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystill.datasets.stream.ledger import Ledger


@given(num_rows=st.integers(0, 200), data=st.data())
def test_a_ledger_survives_json(num_rows, data):
    ledger = Ledger(num_rows)
    positions = st.sets(st.integers(0, max(0, num_rows - 1)), max_size=num_rows)
    trained = data.draw(positions)
    dropped = data.draw(positions) - trained
    ledger.mark_trained(trained)
    ledger.mark_dropped({p: ("empty", "too_long")[p % 2] for p in dropped})
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again == ledger
    assert again.missing().tolist() == sorted(set(range(num_rows)) - trained - dropped)
    assert again.num_trained == len(trained)


def test_done_means_trained_or_dropped():
    ledger = Ledger(4)
    ledger.mark_trained([1])
    ledger.mark_dropped({2: "empty"})
    assert [ledger.done(p) for p in range(4)] == [False, True, True, False]
    assert ledger.dropped == {2: "empty"}
    assert ledger.num_trained == 1


def test_a_row_is_never_trained_twice():
    ledger = Ledger(4)
    ledger.mark_trained([1, 2])
    with pytest.raises(AssertionError, match="trained on already"):
        ledger.mark_trained([2, 3])
    with pytest.raises(AssertionError, match="named twice"):
        ledger.mark_trained([3, 3])
    assert ledger.num_trained == 2


def test_a_trained_row_is_not_dropped_and_a_drop_may_be_named_again():
    ledger = Ledger(4)
    ledger.mark_trained([1])
    ledger.mark_dropped({0: "empty"})
    ledger.mark_dropped({0: "empty"})
    with pytest.raises(AssertionError, match="were trained on"):
        ledger.mark_dropped({1: "empty"})
    assert ledger.dropped == {0: "empty"}


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(AssertionError, match="outside an epoch of 4 rows"):
        Ledger(4).mark_trained([4])


def test_a_damaged_ledger_is_refused():
    ledger = Ledger(16)
    ledger.mark_trained([1])
    data = ledger.to_dict() | {"num_trained": 2}
    with pytest.raises(ValueError, match="resume from an earlier one"):
        Ledger.from_dict(data)
    ledger.mark_trained([12])
    with pytest.raises(ValueError, match="more bits"):
        Ledger.from_dict(ledger.to_dict() | {"num_rows": 4})


def test_in_fixed_order_it_is_a_number_and_the_holes():
    ledger = Ledger(1000)
    ledger.mark_trained(p for p in range(600) if p != 7)
    ledger.mark_dropped({7: "empty"})
    told = ledger.to_dict()
    assert (told["done_until"], told["trained_beyond"]) == (600, "")
    assert told["dropped"] == {"empty": [7]}
    assert Ledger.from_dict(told) == ledger


def test_a_million_rows_fit_in_a_small_file():
    ledger = Ledger(1_000_000)
    ledger.mark_trained(range(0, 500_000))
    assert len(json.dumps(ledger.to_dict())) < 2_000
