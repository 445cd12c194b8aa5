"""Placing the student: a Ray Train run over the stream, resumable, outside the main thread.

``fit`` blocks until the workers have ended. Ray Train keeps its registered checkpoints under
``<run>/checkpoints`` and hands the newest to the workers of the next start.
"""

import atexit
import errno
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from raystill.base.errors import RunError
from raystill.base.run_folder import CHECKPOINTS, no_space_left
from raystill.datasets.stream.spec import StreamSpec
from raystill.datasets.stream.stream import UnevenShares, build_stream
from raystill.placement.requests import CPU_STUDENT_ENVIRONMENT, student_resources
from raystill.run import Run
from raystill.train.checkpoint.ray_register import repair_register
from raystill.train.worker.meeting import MeetingConfig

logger = logging.getLogger(__name__)


def student_worker(settings: dict[str, Run]) -> None:
    """``train_worker``, imported where it runs: the driver needs none of what a student does.

    The import takes seconds, in which the processes of the stream start: Ray Data's coordinator of
    it is made when rank 0 asks for its share.
    """
    Thread(target=ray.train.get_dataset_shard, args=("train",), daemon=True).start()
    from raystill.train.worker.worker import train_worker

    train_worker(settings["run"])


def fit(
    run: Run, spec: StreamSpec, loop: Callable[[dict[str, Run]], None] = student_worker
) -> None:
    """Train the student to the end of its rows, or to an orderly stop.

    A worker that dies is restarted with its group, from the last checkpoint, up to
    ``training.max_failures`` times. What a worker's code raises as RunError is final.

    Args:
        run: The run.
        spec: The stream of its training rows.
        loop: What each worker runs; it is given ``{"run": run}``.

    Raises:
        RunError: With the first reason for which a part of the run stopped.
    """
    config, folder = run.config, run.folder
    resources = student_resources(config, ray.cluster_resources().get("GPU", 0) > 0)
    if why := repair_register(folder):
        logger.warning("the list of checkpoints was made anew: %s", why)
    trainer = Trainer(
        loop,
        train_loop_config={"run": run},
        backend_config=MeetingConfig(),
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
        raise RunError(failure_message(error, run)) from error


def failure_message(error: Exception, run: Run) -> str:
    """The reason that a part of the run gave, else the first worker's own error and its log."""
    folder = run.folder
    if reason := ray.get(run.coordinator.snapshot.remote()).error:
        return str(reason)
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


class WholeGroup(WorkerGroup):
    """Workers of which none keeps its place where one dies as they are started.

    Ray 2.60 forgets a group that fails once it counts as started (as its callbacks set it up, or as
    its loop is launched): its placement group stays, and where there is no room for two the next
    one waits for ever. And a death as the loop is launched ends the run, whatever max_failures;
    before it, whatever max_failures, none does.
    """

    deaths = 0

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():
                self.abort()
            if not isinstance(error, RayActorError | WorkerGroupStartupFailedError):
                raise
            WholeGroup.deaths += 1
            most = self._train_run_context.run_config.failure_config.max_failures
            if 0 <= most < WholeGroup.deaths:
                raise RunError(
                    f"student workers died {WholeGroup.deaths} times as they were started; "
                    "training.max_failures is "
                    f"{most}; the newest of their logs say why"
                ) from error
            raise WorkerGroupStartupFailedError("a worker died as it was started") from error


class StartsWhole(ControllerCallback):
    """Has Ray Train's controller make its groups so."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller's process."""
        TrainController.worker_group_cls = WholeGroup


class Trainer(DataParallelTrainer):
    """Without Ray Train's actor that frees places should its controller die.

    The driver ends its job then, with which Ray frees them (not tested). An idle actor takes a
    hundredth of a core, on a machine of two from teacher and student.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
        return [*kept, SureExit(), StartsWhole()]
