"""Placing the student: a Ray Train run over the stream, resumable, outside the main thread.

``fit`` blocks until the workers have ended. Ray Train keeps its registered checkpoints under
``<run>/checkpoints`` and hands the newest to the workers of the next start.
"""

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from raystill.cluster.config import RunConfig
from raystill.cluster.model_source import ModelSource
from raystill.cluster.placement import CPU_STUDENT_ENVIRONMENT, student_resources
from raystill.cluster.problems import RunError
from raystill.cluster.run_folder import CHECKPOINTS, RunFolder, no_space_left
from raystill.datasets.stream import StreamSpec, UnevenShares, build_stream
from raystill.train.register import mend_register
from raystill.train.trainer import Trainer

logger = logging.getLogger(__name__)

# Ranks wait for each other while the teacher answers; a slow teacher is not a dead rank.
COLLECTIVE_TIMEOUT_S = 6 * 3600


def student_worker(job: dict[str, Any]) -> None:
    """``train_worker``, imported where it runs: the driver needs none of what a student does."""
    from raystill.train.worker import train_worker

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
    if why := mend_register(folder):
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


def absolute_paths(config: RunConfig) -> RunConfig:
    """``config`` with a local ``student.model`` made absolute: workers run in another folder."""
    model = config.student.model
    if model is None or not os.path.isdir(model):
        return config
    student = config.student.model_copy(update={"model": os.path.abspath(model)})
    return config.model_copy(update={"student": student})


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
