"""The processes of a calibration: one on each student worker's resources, and one group of them.

Where it sits: `calibrate` starts them once the teacher has ended, and asks all of them the same
questions in the same order. *Waits for* places on the cluster, then for the slowest of them.
"""

from types import TracebackType
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from torch import cuda

from raystill.base.errors import RunError
from raystill.config.run import RunConfig, absolute_paths
from raystill.model.on_node import ModelSource
from raystill.placement.requests import student_resources
from raystill.train.calibration.calibrator import Calibrator
from raystill.train.step.ranks import Ranks
from raystill.train.worker.rendezvous import free_port, join_group

# Every large tensor is the kernel's again when it is freed, and not kept to be used unseen by the
# next: so the memory of each loss shows. Read at a process's start.
MEASURING_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
TIMEOUT_S = 6 * 3600.0
"""How long a process waits for the others; rank 0 alone reads the student and measures losses."""


class Member:
    """One process of the group; an actor."""

    def address(self) -> tuple[str, int]:
        """Where the group may meet, if this process is its first."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def start(
        self,
        address: tuple[str, int],
        place: tuple[int, int],
        inputs: tuple[RunConfig, ModelSource, int],
        rows: pa.Table,
    ) -> None:
        """Join the group; place: rank and number of ranks. The rest is the `Calibrator`'s."""
        rank, world_size = place
        if world_size > 1:
            backend = "nccl" if cuda.is_available() else "gloo"
            join_group(backend, address, rank, world_size, TIMEOUT_S)
        ranks = Ranks(rank, world_size, TIMEOUT_S)
        config, teacher, count = inputs
        self._calibrator = Calibrator(config, teacher, rows, count, ranks)

    def call(self, method: str, *args: Any) -> Any:
        """The result of a method of the `Calibrator`."""
        return getattr(self._calibrator, method)(*args)


class Calibrators:
    """As many processes as the run has student workers at least. A context, which ends them."""

    def __init__(
        self, config: RunConfig, teacher: ModelSource, rows: "ray.ObjectRef[pa.Table]", count: int
    ) -> None:
        """Place them; rows and count: the answers and the number of positions of a `Calibrator`."""
        place = ray.remote(Member).options(**options_of_worker(config))
        workers = config.training.min_workers
        self._members = [place.remote() for _ in range(workers)]
        inputs = (absolute_paths(config), teacher, count)
        address = self._members[0].address.remote()
        started = [
            member.start.remote(address, (rank, workers), inputs, rows)
            for rank, member in enumerate(self._members)
        ]
        try:
            self._wait(started)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Calibrators":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """End all processes, also those that wait for another one."""
        for member in self._members:
            ray.kill(member)

    def all(self, method: str, *args: Any) -> Any:
        """What rank 0 returns of a collective method. Raises RunError with a rank's complaint."""
        return self._wait([member.call.remote(method, *args) for member in self._members])

    def first(self, method: str) -> Any:
        """What rank 0 returns of a method that is its alone."""
        return result_of(self._members[0].call.remote(method))

    @staticmethod
    def _wait(asked: list[Any]) -> Any:
        """The first one's result; the first failure of any, for which the others would wait."""
        pending = list(asked)
        while pending:
            done, pending = ray.wait(pending)
            result_of(done[0])
        return result_of(asked[0])


def options_of_worker(config: RunConfig) -> dict[str, Any]:
    """Where a student worker would be, with memory that can be measured."""
    needed = student_resources(config, ray.cluster_resources().get("GPU", 0) > 0)
    options: dict[str, Any] = {"num_cpus": needed.pop("CPU"), "num_gpus": needed.pop("GPU", 0)}
    options["resources"] = needed
    if config.training.accelerator_type is not None:
        options["accelerator_type"] = config.training.accelerator_type
    if config.training.label_selector:
        options["label_selector"] = dict(config.training.label_selector)
    return options | {"runtime_env": {"env_vars": MEASURING_ENVIRONMENT}}


def result_of(reference: Any) -> Any:
    """A task's result; its own complaint as a RunError without the remote traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (RunError, ValueError)):
            raise RunError(str(cause)) from error
        raise
