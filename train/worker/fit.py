"""Placing the student: a Ray Train run over the stream, resumable, outside the main thread.

``fit`` blocks until the workers have ended. Ray Train keeps its registered checkpoints under
``<run>/checkpoints`` and hands the newest to the workers of the next start.

Ray Train's trainer, as a run needs it: one part less, and one more.
"""

import atexit
import errno
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from raystill.base.errors import RunError
from raystill.base.run_folder import CHECKPOINTS, RunFolder, no_space_left
from raystill.config.run import RunConfig, absolute_paths
from raystill.datasets.stream.spec import StreamSpec
from raystill.datasets.stream.stream import UnevenShares, build_stream
from raystill.model.on_node import ModelSource
from raystill.placement.requests import CPU_STUDENT_ENVIRONMENT, student_resources
from raystill.train.checkpoint.ray_register import repair_register

logger = logging.getLogger(__name__)

# Ranks wait for each other while the teacher answers; a slow teacher is not a dead rank.
COLLECTIVE_TIMEOUT_S = 6 * 3600


def student_worker(job: dict[str, Any]) -> None:
    """``train_worker``, imported where it runs: the driver needs none of what a student does."""
    from raystill.train.worker.worker import train_worker

    train_worker(job)


def fit(
    config: RunConfig,
    folder: RunFolder,
    spec: StreamSpec,
    coordinator: Any,
    teacher_folder: str,
    loop: Callable[[dict[str, Any]], None] = student_worker,
) -> dict[str, Any]:
    """Train the student to the end of its rows, or to an orderly stop.

    ``teacher_folder`` is on this machine; a node that lacks it fetches the same. ``loop`` is what
    each worker runs. A worker that dies is restarted with its group, from the last checkpoint, up
    to ``training.max_failures`` times; what its code raises as RunError is final. Returns the
    coordinator's snapshot. Raises RunError with the first reason a part of the run stopped for.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    resources = student_resources(config, has_gpus)
    job = {
        "config": absolute_paths(config),
        "folder": folder,
        "num_rows": spec.num_rows,
        "coordinator": coordinator,
        "teacher": ModelSource.of(config.teacher.model, teacher_folder),
        "app_name": spec.app_name,
    }
    if why := repair_register(folder):
        logger.warning("the list of checkpoints was made anew: %s", why)
    trainer = Trainer(
        loop,
        train_loop_config=job,
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.training.num_workers,
            elastic_resize_monitor_interval_s=config.training.resize_every_s,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            accelerator_type=config.training.accelerator_type,
            label_selector=dict(config.training.label_selector) or None,
        ),
        run_config=TrainRunConfig(
            name=CHECKPOINTS,
            storage_path=folder.path,
            checkpoint_config=CheckpointConfig(num_to_keep=config.training.num_checkpoints_to_keep),
            failure_config=FailureConfig(max_failures=config.training.max_failures),
            worker_runtime_env={"env_vars": {} if "GPU" in resources else CPU_STUDENT_ENVIRONMENT},
        ),
        datasets={"train": partial(build_stream, spec)},
        dataset_config=UnevenShares(),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(failure_message(error, coordinator, folder)) from error
    return ray.get(coordinator.snapshot.remote())


def failure_message(error: Exception, coordinator: Any, folder: RunFolder) -> str:
    """The reason a part of the run gave, else the first worker's own error, and its log file."""
    told = ray.get(coordinator.snapshot.remote())["error"]
    if told:
        return str(told)
    if os.strerror(errno.ENOSPC) in str(error):  # In Ray Train's controller.
        return no_space_left(folder, error)
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return f"the student's workers could not run: {error}; see {folder.logs}/"
    rank, failure = min(failures.items())
    cause = root_cause(failure)
    if isinstance(cause, RunError):
        return str(cause)
    return (
        f"student worker {rank} failed: {type(cause).__name__}: {cause}; its whole output is in "
        f"{folder.logs}/student-{rank}.log"
    )


def root_cause(error: BaseException) -> BaseException:
    """The error inside Ray's wrappings (worker failure, remote call)."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
        if isinstance(inner, BaseException):
            error = inner
    return error


EXIT_S = 10


class SureExit(ControllerCallback):
    """Ends the process of Ray Train's controller where its own exit hangs.

    Ray 2.60 can lock itself up as it takes the controller's core worker down: the destructor of an
    object's publisher posts to the queue whose lock its caller holds. Without this, 4 of 11 runs
    with two workers left a process of 400 MB behind that nothing ends. The kernel's alarm, set as
    the interpreter begins to exit, needs neither it nor a thread.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller's process."""
        atexit.register(signal.alarm, EXIT_S)


class Trainer(TorchTrainer):
    """With `SureExit`, without Ray Train's actor that frees places should its controller die.

    The driver ends its job then, with which Ray frees them (not tested). An idle actor takes a
    hundredth of a core, on a machine of two from teacher and student.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
        return [*kept, SureExit()]
