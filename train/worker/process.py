"""A worker's process: where its output goes, which cores or device it has, what ends the run."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from raystill.base.errors import RunError
from raystill.base.logs import log_labelled, redirect_output, run_name
from raystill.base.run_folder import no_space_left
from raystill.placement.requests import share_of_cores, student_cores
from raystill.run import Run


def settle_process(run: Run, context: Any) -> torch.device:
    """Send output to ``logs/student-<rank>.log``, pin to the student's cores; the device.

    ``context`` is Ray Train's. On a CPU the workers of a node share the student's cores, and torch
    runs as many threads as it got cores: beside a teacher on the other half, unpinned threads
    would take turns with it. Threads started from here on inherit the pinning.
    """
    role = f"student-{context.get_world_rank()}"
    redirect_output(run.folder.logs / f"{role}.log")
    log_labelled(run_name(run.folder.path), role)
    device = get_device()
    assert isinstance(device, torch.device), "one device a worker"
    if device.type == "cpu":
        cores = student_cores(run.config, sorted(os.sched_getaffinity(0)))
        mine = share_of_cores(cores, context.get_local_rank(), context.get_local_world_size())
        os.sched_setaffinity(0, mine)
        torch.set_num_threads(len(mine))
    return device


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
