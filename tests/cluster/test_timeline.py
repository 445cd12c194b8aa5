"""Windows cut from snapshots, and what is said of them: only what the numbers hold."""

from typing import Any

import pytest

from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.timeline import Timeline, bottleneck


class Kept(list):
    """Records in memory."""

    def upload(self) -> None: ...


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def snapshot(phase: str, **counters: float) -> Snapshot:
    return Snapshot(phases=((1, phase),), counters=counters, rows_ahead=12, progress={"workers": 2})


def test_windows_end_with_their_time_or_their_phase_and_hold_what_grew() -> None:
    kept, clock = Kept(), Clock()
    timeline = Timeline(kept, lambda: 3, clock)
    for now, phase, busy in (
        (0, "loading", 0.0), (4, "training", 1.0), (9, "training", 3.0), (14, "training", 9.0),
        (15, "saving", 9.5),
    ):  # fmt: skip
        clock.now = float(now)
        timeline.look(snapshot(phase, teacher_busy_s=busy))
    clock.now = 16.0
    timeline.close(snapshot("saving", teacher_busy_s=9.5))
    told = [(w["phase"], w["seconds"], w["teacher_busy_s"]) for w in kept]
    assert told == [
        ("loading", 4.0, 1.0), ("training", 10.0, 8.0), ("training", 1.0, 0.5),
        ("saving", 1.0, 0.0),
    ]  # fmt: skip
    assert kept[1]["replicas"] == 3
    assert (kept[1]["workers"], kept[1]["rows_ahead"]) == (2, 12)


def test_a_run_whose_student_writes_has_its_sampler_in_each_window() -> None:
    kept, clock = Kept(), Clock()
    timeline = Timeline(kept, lambda: 3, clock, samplers=lambda: 2)
    timeline.look(snapshot("training"))
    clock.now = 10.0
    timeline.look(snapshot("training", sampler_busy_s=7.0, sampler_rows=4.0))
    clock.now = 20.0
    timeline.look(snapshot("training", sampler_busy_s=9.5, sampler_rows=6.0))
    told = [(w["samplers"], w["sampler_busy_s"], w["sampler_rows"]) for w in kept]
    assert told == [(2, 7.0, 4.0), (2, 2.5, 2.0)]
    Timeline(kept, lambda: 1, clock).close(snapshot(""))
    assert len(kept) == 2


def windows(
    count: int = 13,
    busy: float = 1.0,
    waits: float = 0.0,
    replicas: int = 1,
    workers: int = 1,
    rows: int = 8,
) -> list[dict[str, Any]]:
    """Ten seconds each; shares of the replicas' and of the workers' time."""
    return [
        {
            "phase": "training",
            "seconds": 10.0,
            "replicas": replicas,
            "workers": workers,
            "teacher_rows": rows,
            "teacher_busy_s": busy * 10 * replicas,
            "student_wait_s": waits * 10 * workers,
        }
    ] * count


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        (
            {"busy": 0.62, "waits": 0.03, "replicas": 4},
            "student-bound: the student waits 3 %, the teacher idles 38 %; one replica fewer costs "
            "nothing: the 3 others would be busy 83 %",
        ),
        (
            {"busy": 0.62, "waits": 0.03, "replicas": 2},  # The other one would need 124 %.
            "student-bound: the student waits 3 %, the teacher idles 38 %",
        ),
        ({"busy": 0.3}, "student-bound: the student waits 0 %, the teacher idles 70 %"),
        (
            {"busy": 0.97, "waits": 0.41, "workers": 8},
            "teacher-bound: the student waits 41 %, the teacher idles 3 %",
        ),
        ({"busy": 0.94, "waits": 0.04}, "balanced: the student waits 4 %, the teacher idles 6 %"),
        (
            {"busy": 0.8, "waits": 0.25},
            "neither is busy all the time: the student waits 25 %, the teacher idles 20 %",
        ),
        (
            {"busy": 0.0, "waits": 0.02, "replicas": 0, "rows": 0},
            "the student alone: nothing was asked of a teacher, and it waits 2 % for rows",
        ),
    ],
)
def test_the_bottleneck_is_named_with_its_numbers(shares: dict[str, Any], sentence: str) -> None:
    assert bottleneck(windows(**shares)) == sentence


def test_workers_that_wait_for_each_other_are_told() -> None:
    idle = [{**window, "student_idle_s": 0.22 * 10 * 4} for window in windows(workers=4)]
    told = "; its workers wait 22 % for each other"
    assert bottleneck(idle) == f"balanced: the student waits 0 %, the teacher idles 0 %{told}"
    little = [{**window, "student_idle_s": 0.05 * 10 * 4} for window in windows(workers=4)]
    assert bottleneck(little) == bottleneck(windows(workers=4))
    alone = [{**window, "teacher_rows": 0} for window in idle]
    assert (bottleneck(alone) or "").endswith(f"for rows{told}")


@pytest.mark.parametrize(
    ("busy", "writes", "waits", "sentence"),
    [
        (0.5, 0.95, 0.4, "sampler-bound: the student waits 40 %, the teacher idles 50 %"),
        (0.95, 0.5, 0.4, "teacher-bound: the student waits 40 %, the teacher idles 5 %"),
        (0.95, 1.0, 0.4, "teacher- and sampler-bound: the student waits 40 %, the teacher idles 5"),
        (0.5, 0.6, 0.4, "none is busy all the time: the student waits 40 %, the teacher idles 50"),
        (0.95, 0.6, 0.0, "student-bound: the student waits 0 %, the teacher idles 5 %"),
        (0.95, 0.95, 0.0, "balanced: the student waits 0 %, the teacher idles 5 %"),
    ],
)
def test_the_sampler_is_the_third_role(
    busy: float, writes: float, waits: float, sentence: str
) -> None:
    three = [
        {**window, "samplers": 2, "sampler_busy_s": writes * 20}
        for window in windows(busy=busy, waits=waits)
    ]
    told = bottleneck(three)
    assert told is not None and told.startswith(sentence)
    assert told.endswith(f", the sampler idles {round(100 * (1 - writes))} %")


def test_the_bound_on_rows_ahead_is_named_where_it_was_reached() -> None:
    both = windows(busy=0.8, waits=0.25)
    assert bottleneck(both, ahead_seen=63, max_ahead=64) == bottleneck(both)
    told = bottleneck(both, ahead_seen=64, max_ahead=64)
    assert told is not None
    assert told.endswith("; rows ahead were at their bound (64, stream.max_rows_ahead)")


def test_before_the_first_and_after_the_last_answer_the_teacher_does_not_idle() -> None:
    nothing = windows(count=2, busy=0.0, rows=0)
    assert bottleneck([*nothing, *windows(waits=0.4), *nothing]) == bottleneck(windows(waits=0.4))


def test_a_training_that_mostly_replays_the_store_says_so() -> None:
    told = bottleneck([*windows(), *windows(count=20, busy=0.0, rows=0)])
    assert told == (
        "balanced: the student waits 0 %, the teacher idles 0 %; for 3:30 of the training nothing "
        "was asked"
    )


def test_a_pool_whose_size_changed_gives_no_advice_on_it() -> None:
    told = bottleneck(windows(replicas=4, busy=0.5) + windows(replicas=3, busy=0.5))
    assert told == "student-bound: the student waits 0 %, the teacher idles 50 %"


def test_nothing_is_said_of_a_few_seconds_or_of_other_phases() -> None:
    assert bottleneck([]) is None
    assert bottleneck(windows(count=12)) is None
    unknown = [{**window, "workers": 0} for window in windows(count=2)]
    assert bottleneck(unknown) is None
    assert bottleneck([*unknown, *windows()]) == bottleneck(windows())
    assert bottleneck([{**window, "phase": "saving"} for window in windows()]) is None
