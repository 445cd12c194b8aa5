"""The cores of a student worker beside a teacher and without one, by the process's own affinity."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raystill.config.run import RunConfig
from raystill.train.worker.process import Cores

HERE = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(HERE) < 2, reason="one core is the teacher's and the student's")


@pytest.fixture(autouse=True)
def unpinned() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    os.sched_setaffinity(0, HERE)
    torch.set_num_threads(threads)


def config(**training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": "none"},
            "student": {"layers": [0]},
            "prompts": {"path": "none.jsonl"},
            "training": training,
        }
    )


def now() -> tuple[list[int], int]:
    return sorted(os.sched_getaffinity(0)), torch.get_num_threads()


def test_a_worker_takes_over_an_absent_teachers_cores_and_gives_them_back() -> None:
    cores = Cores(config(), 0, 1)
    half = HERE[len(HERE) // 2 :]
    assert cores.may_change
    assert now() == (half, len(half))
    for _ in range(2):
        cores.follow(teacher_served=False)
        assert now() == (HERE, len(HERE))
        cores.follow(teacher_served=True)
        assert now() == (half, len(half))


def test_two_workers_of_a_node_share_them() -> None:
    taken = []
    for index in range(2):
        os.sched_setaffinity(0, HERE)
        cores = Cores(config(), index, 2)
        cores.follow(teacher_served=False)
        taken.append(now()[0])
    assert sorted(taken[0] + taken[1]) == HERE


@pytest.mark.parametrize(
    "training", [{"idle_teacher_cores": False}, {"cpu_cores": [HERE[0]]}, {"cpu_cores": "all"}]
)
def test_cores_that_were_chosen_stay(training: dict[str, Any]) -> None:
    cores = Cores(config(**training), 0, 1)
    before = now()
    assert not cores.may_change
    cores.follow(teacher_served=False)
    assert now() == before
