"""The engine's slots stay filled: the run's own bookkeeping in virtual time; no Ray, no model."""

import math

import numpy as np
import pytest

from benchmarks.slots import LENGTHS, config_of, simulate
from raystill.cluster.check.teachers import check_rows_ahead, slots_notices
from raystill.serve.deploy import deployment_options


def filled(name, *overrides, rows=1600):
    """Share of slots filled; every group is passed on once, and the row bound is kept."""
    config = config_of(overrides)
    lengths = LENGTHS[name](np.random.default_rng(1), rows)
    share, simulation = simulate(config, lengths)
    groups = list(range(0, rows, config.stream.group_rows))
    assert sorted(simulation.delivered) == groups
    if config.stream.order == "fixed":
        assert simulation.delivered == groups
    assert simulation.credits.max_ahead_seen <= config.rows_ahead
    return share


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("order", ["fixed", "arrival"])
def test_by_default_the_slots_stay_filled_whatever_the_lengths(order, name):
    assert filled(name, f"stream.order={order}") >= 0.95


@pytest.mark.parametrize(("slots", "group_rows"), [(8, 8), (16, 1), (16, 6), (64, 4)])
def test_also_with_other_engines_and_groups(slots, group_rows):
    settings = f"teacher.max_num_seqs={slots}", f"stream.group_rows={group_rows}"
    assert filled("lognormal, cut at 4096", *settings, rows=25 * slots + 400) >= 0.95


def test_one_row_a_slot_leaves_half_of_them_empty_which_is_what_the_default_is_for():
    assert filled("exponential", "teacher.target_ongoing_requests=8") < 0.5
    assert filled("equal", "teacher.target_ongoing_requests=8") >= 0.95


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ([], 48),
        (["teacher.max_num_seqs=20"], 15),
        (["teacher.max_num_seqs=21"], 16),
        (["stream.group_rows=1000"], 1),
        (["signal.kind=hidden"], 8),
        (["teacher.target_ongoing_requests=3"], 3),
        (["teacher.target_ongoing_requests=3", "stream.max_rows_ahead=2000"], 3),
        (["teacher.target_ongoing_requests=99", "stream.max_rows_ahead=2000"], 99),
        # Room for two steps of 32 rows is kept first.
        (["stream.max_rows_ahead=448"], 48),
        (["stream.max_rows_ahead=447"], 47),
        (["stream.max_rows_ahead=200"], 17),
        (["stream.max_rows_ahead=60"], 1),
        (["stream.max_rows_ahead=448", "teacher.num_replicas=4"], 12),
        (["stream.max_rows_ahead=448", "teacher.num_replicas={min: 0, max: 3}"], 16),
        (["teacher.engine=api", "teacher.api={base_url: 'http://x/v1', model: m}"], 12),
    ],
)
def test_the_groups_of_a_replica_follow_its_slots_and_the_bound(overrides, groups):
    config = config_of(overrides)
    assert config.groups_per_replica == groups
    assert config.groups_in_flight == groups * config.teacher.max_replicas
    assert config.rows_in_flight == config.groups_in_flight * config.stream.group_rows
    assert deployment_options(config, has_gpus=False)["max_ongoing_requests"] == groups + 2
    assert config.rows_ahead - config.refill_rows >= min(
        config.rows_ahead, config.advised_rows_ahead
    )


def test_the_check_says_when_the_bound_starves_the_engine():
    config = config_of(["stream.max_rows_ahead=200"])
    (told,) = slots_notices(config)
    assert "max_rows_ahead (200) leaves room for 136 rows in flight, of the 384" in told
    assert "set it to 448 or more" in told
    assert not list(check_rows_ahead(config)), "it is slow, not wrong"
    assert not list(slots_notices(config_of(["stream.max_rows_ahead=448"])))
    assert not list(slots_notices(config_of())), "the default bound has room"


@pytest.mark.parametrize("bound", [48, 63, 64, 65, 71, 72])
def test_a_bound_below_two_steps_and_a_group_is_told_and_not_refused(bound):
    config = config_of([f"stream.max_rows_ahead={bound}"])
    assert not list(check_rows_ahead(config)) and list(slots_notices(config))


def test_a_bound_below_what_was_asked_for_is_refused():
    settings = ["stream.max_rows_ahead=200", "teacher.target_ongoing_requests=48"]
    (problem,) = check_rows_ahead(config_of(settings))
    assert "lower teacher.target_ongoing_requests" in str(problem)
    assert not list(slots_notices(config_of(settings))), "said once"


def test_every_bound_leaves_the_student_two_steps():
    for bound in range(1, 900, 13):
        config = config_of([f"stream.max_rows_ahead={bound}"])
        spare = bound - 2 * config.training.rows_per_step
        assert config.rows_in_flight <= max(config.stream.group_rows, spare)
        assert config.groups_per_replica >= 1
        assert config.full_groups == math.ceil(6 * 64 / 8)
