"""A worker's process: where its output goes, which cores or device it has, what it goes on from,
and what ends the run.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from raystill.base.errors import RunError
from raystill.base.logs import log_labelled, redirect_output, run_name
from raystill.base.run_folder import no_space_left
from raystill.config.run import RunConfig
from raystill.placement.requests import share_of_cores, student_cores
from raystill.run import Run

logger = logging.getLogger(__name__)


class Cores:
    """The CPU cores of this worker's process, and a thread of torch for each.

    Beside a teacher the workers of a node share the student's cores: unpinned threads would take
    turns with the teacher's. While no teacher is served they share all cores of the node that the
    process was given. Threads started from then on inherit the pinning of the main thread.
    """

    def __init__(self, config: RunConfig, index: int, count: int) -> None:
        """This process is number ``index`` of ``count`` workers on its node."""
        everything = sorted(os.sched_getaffinity(0))
        beside = share_of_cores(student_cores(config, everything), index, count)
        training = config.training
        may_grow = training.idle_teacher_cores and training.cpu_cores is None
        self._beside = beside
        self._alone = share_of_cores(everything, index, count) if may_grow else beside
        self._mine: tuple[int, ...] = ()
        self.follow(teacher_served=True)

    @property
    def may_change(self) -> bool:
        """Whether it makes a difference if a teacher is served."""
        return self._alone != self._beside

    def follow(self, teacher_served: bool) -> None:
        """Use the cores that are this process's beside a teacher, or without one."""
        mine = self._beside if teacher_served else self._alone
        if mine != self._mine:
            logger.info("cores %s", list(mine))
            os.sched_setaffinity(0, mine)
            torch.set_num_threads(len(mine))
            self._mine = mine


def settle_process(run: Run, context: Any) -> tuple[torch.device, Cores | None]:
    """Send output to ``logs/student-<rank>.log``; the device, and on a CPU the cores.

    ``context`` is Ray Train's.
    """
    role = f"student-{context.get_world_rank()}"
    redirect_output(run.folder.logs / f"{role}.log")
    log_labelled(run_name(run.folder.path), role)
    device = get_device()
    assert isinstance(device, torch.device), "one device a worker"
    if device.type != "cpu":
        return device, None
    index, count = context.get_local_rank(), context.get_local_world_size()
    return device, Cores(run.config, index, count)


@contextmanager
def report_final_errors(run: Run) -> Iterator[None]:
    """Report an error that a restart would not mend (RunError, a full disk); it ends the run."""
    try:
        yield
    except (RunError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno != errno.ENOSPC:
                raise
            error = RunError(no_space_left(run.folder, error))
        ray.get(run.coordinator.failed.remote(str(error)))
        raise error


@contextmanager
def last_checkpoint() -> Iterator[str | None]:
    """Folder on this node of the last *registered* checkpoint; None where there is none."""
    registered = ray.train.get_checkpoint()
    if registered is None:
        yield None
        return
    with registered.as_directory() as path:
        yield path
