"""The workers' process group, as Ray Train's controller has them join it: without torch there.

Ray Train's own ``TorchConfig`` imports torch wherever it is read, in the driver and in the
controller too, a second and a half of a core each, one after the other, before a worker's process
may start. Here torch is imported by the workers alone; what they do is Ray Train's.
"""

import logging
import os
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.util import TrainingFramework

from raystill.base.errors import RunError
from raystill.train.worker.rendezvous import meet_at_node_address

logger = logging.getLogger(__name__)

MEETING_TIMEOUT_S = 1800
"""Longest time until all workers have found each other; they import torch meanwhile."""
DEATH_SEEN_S = 10.0
"""Within which a worker's death is told of, after another one has lost its connection to it."""
# Ranks wait for each other while the teacher answers; a slow teacher is not a dead rank.
COLLECTIVE_TIMEOUT_S = 6 * 3600


class Meeting(Backend):
    """A group of gloo on CPUs and NCCL on GPUs, whose store only rank 0's own address reaches."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have every worker join.

        Raises RayActorError where one dies, also if it is the others' broken connection that is
        seen first; RunError where they do not find each other.
        """
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        size = len(worker_group)
        address = worker_group.execute_single(0, get_address_and_port)
        joining = [
            worker_group.execute_single_async(
                rank, join_workers, "nccl" if gpus else "gloo", address, rank, size
            )
            for rank in range(size)
        ]
        try:
            ray.get(joining, timeout=MEETING_TIMEOUT_S)
        except GetTimeoutError:
            raise RunError(
                f"the student's workers have not found each other within {MEETING_TIMEOUT_S} s at "
                f"{address[0]}, port {address[1]}; let the nodes reach each other on all ports, "
                "and make each node's host name lead to an address that the others reach"
            ) from None
        except RayTaskError:
            ended, _ = ray.wait(joining, num_returns=size, timeout=DEATH_SEEN_S)
            for one in ended:
                with suppress(RayTaskError):
                    ray.get(one)
            raise

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have every worker leave; one that does not answer is not waited for."""
        leaving = worker_group.execute_async(leave_workers, len(worker_group) > 1)
        try:
            ray.get(leaving, timeout=DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            logger.warning("a worker has not left the process group")


class OnDevice:
    """While a worker's loop runs: its GPU is the current one."""

    def __enter__(self) -> None:
        from ray.train.torch.config import TorchConfigContextManager

        TorchConfigContextManager().__enter__()

    def __exit__(self, *error: object) -> None:
        return None


class MeetingConfig(BackendConfig):
    """Settings of the process group, for Ray Train; there are none to choose."""

    @property
    def backend_cls(self) -> type[Meeting]:
        """What sets it up."""
        return Meeting

    @property
    def train_func_context(self) -> type[OnDevice]:
        """What surrounds a worker's loop."""
        return OnDevice

    @property
    def framework(self) -> TrainingFramework:
        """What Ray Train notes about the run."""
        return TrainingFramework.TORCH


def join_workers(backend: str, address: tuple[str, int], rank: int, size: int) -> None:
    """In a worker: become rank ``rank`` of the ``size`` of the group; waits for all of them."""
    from ray.train.torch import config as of_ray

    meet_at_node_address()
    host, port = address
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    of_ray._set_torch_distributed_env_vars()
    of_ray._setup_torch_process_group(backend, rank, size, "env://", COLLECTIVE_TIMEOUT_S)


def leave_workers(end_group: bool) -> None:
    """In a worker: leave the group, if it is to end, and empty the GPUs' caches."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=end_group)
