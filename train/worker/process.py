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
from raystill.base.run_folder import RunFolder, no_space_left
from raystill.config.run import RunConfig
from raystill.placement.requests import share_of_cores, student_cores


def settle_process(config: RunConfig, folder: RunFolder, context: Any) -> torch.device:
    """Send output to ``logs/student-<rank>.log``, pin to the student's cores; the device.

    ``context`` is Ray Train's. On a CPU the workers of a node share the student's cores, and torch
    runs as many threads as it got cores: beside a teacher on the other half, unpinned threads
    would take turns with it. Threads started from here on inherit the pinning.
    """
    role = f"student-{context.get_world_rank()}"
    redirect_output(folder.logs / f"{role}.log")
    log_labelled(run_name(folder.path), role)
    device = get_device()
    assert isinstance(device, torch.device), "one device a worker"
    if device.type == "cpu":
        cores = student_cores(config, sorted(os.sched_getaffinity(0)))
        mine = share_of_cores(cores, context.get_local_rank(), context.get_local_world_size())
        os.sched_setaffinity(0, mine)
        torch.set_num_threads(len(mine))
    return device


@contextmanager
def final_errors_told(coordinator: Any, folder: RunFolder) -> Iterator[None]:
    """Errors that starting again would not mend (RunError, a full disk) end the run: it is told."""
    try:
        yield
    except (RunError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno != errno.ENOSPC:
                raise
            error = RunError(no_space_left(folder, error))
        ray.get(coordinator.failed.remote(str(error)))
        raise error
