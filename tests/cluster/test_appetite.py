"""How many replicas the student can eat from, from its waiting alone; no Ray."""

import pytest

from raystill.cluster.job.autoscale import ReplicaDemand
from raystill.config.run import RunConfig

GROUP_ROWS, GROUPS_EACH = 4, 2
FLIGHT = GROUP_ROWS * GROUPS_EACH  # rows that one replica answers at once


class Rig:
    """An appetite with a clock, counters and a number of replicas that the test moves."""

    def __init__(self, num_replicas):
        self.now, self.running = 0.0, 1
        self.counters = {"student_rows": 0.0, "student_wait_s": 0.0, "student_busy_s": 0.0}
        teacher = {"model": "m", "num_replicas": num_replicas}
        teacher["target_ongoing_requests"] = GROUPS_EACH
        sections = {"teacher": teacher, "student": {"layers": [0]}, "prompts": {"path": "p"}}
        config = RunConfig.model_validate({**sections, "stream": {"group_rows": GROUP_ROWS}})
        self.appetite = ReplicaDemand(config, lambda: self.running, lambda: self.now)

    def train(self, rows, wait_s, busy_s):
        """The student takes so many rows; whether the bound changed."""
        self.now += wait_s + busy_s
        for name, by in (("rows", rows), ("wait_s", wait_s), ("busy_s", busy_s)):
            self.counters[f"student_{name}"] += by
        return self.appetite.look(self.counters)


def bounds(least, most, **delays):
    return {"min": least, "max": most, "upscale_delay_s": 10.0, **delays}


def test_a_pool_of_a_fixed_size_is_left_alone():
    rig = Rig(4)
    assert rig.appetite.groups_in_flight is None
    assert not rig.train(1, 0, 1) and not rig.train(100, 99, 1)
    assert rig.appetite.groups_in_flight is None


@pytest.mark.parametrize(("least", "groups"), [(0, 2), (1, 2), (3, 6), (4, None)])
def test_it_begins_with_the_fewest_replicas_work(least, groups):
    assert Rig(bounds(least, 4)).appetite.groups_in_flight == groups


def test_a_student_that_does_not_wait_gets_no_further_replica():
    rig = Rig(bounds(1, 4))
    assert not rig.train(FLIGHT, 300.0, 1.0), "everybody waits for the first rows"
    for _ in range(20):
        assert not rig.train(FLIGHT, 0.5, 20.0)
    assert rig.appetite.groups_in_flight == GROUPS_EACH


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.05, 1), (0.10, 2), (0.45, 2), (0.60, 3), (0.74, 4), (0.99, 8)]
)
def test_one_that_waits_gets_what_it_would_eat(share, wanted):
    """A student that waits for 60 % of its time eats 1 / 0.4 = 2.5 replicas' answers."""
    rig = Rig(bounds(1, 8))
    rig.train(FLIGHT, 5.0, 1.0)
    assert rig.train(FLIGHT, 20 * share, 20 * (1 - share)) == (wanted > 1)
    assert rig.appetite.wanted == wanted
    assert rig.appetite.groups_in_flight == (None if wanted == 8 else wanted * GROUPS_EACH)


def test_replicas_that_are_on_their_way_are_not_asked_for_again():
    rig = Rig(bounds(1, 64))
    rig.train(FLIGHT, 5.0, 1.0)
    assert rig.train(FLIGHT, 15.0, 5.0)
    assert rig.appetite.wanted == 4
    for _ in range(5):  # Nodes take minutes.
        assert not rig.train(4 * FLIGHT, 15.0, 5.0)
    rig.running = 4
    assert rig.train(4 * FLIGHT, 10.0, 10.0)
    assert rig.appetite.wanted == 8


def test_drained_replicas_are_not_filled_again_unless_it_waits():
    rig = Rig(bounds(1, 4))
    rig.running = 3
    rig.train(FLIGHT, 5.0, 1.0)
    assert rig.train(3 * FLIGHT, 5.0, 15.0)
    assert rig.appetite.wanted == 4
    rig.running = 2
    assert rig.train(4 * FLIGHT, 0.0, 20.0)
    assert rig.appetite.wanted == 2


def test_a_window_is_a_flight_and_the_delay_at_least():
    rig = Rig(bounds(1, 4))
    rig.train(1, 5.0, 1.0)
    assert not rig.train(FLIGHT, 8.0, 1.0), "nine seconds"
    rig = Rig(bounds(1, 4))
    rig.train(1, 5.0, 1.0)
    assert not rig.train(FLIGHT - 1, 80.0, 10.0), "seven of eight rows"
    assert rig.train(1, 1.0, 0.0)
    assert "waits" in rig.appetite.sentence and "4 teacher replicas" in rig.appetite.sentence
