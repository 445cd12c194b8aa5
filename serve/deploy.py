"""Placing the teacher: its Serve application, the wait for it, and its end.

Where it sits: the driver deploys and waits; the stream finds the application by name. HTTP stays
off, and no row ever passes through the driver.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raystill.base.errors import RunError
from raystill.base.formatting import plural
from raystill.config.run import RunConfig
from raystill.config.teacher import ReplicasConfig
from raystill.datasets.stream.teacher_calls import applications
from raystill.model.on_node import ModelSource
from raystill.placement.requests import add_up, describe, teacher_bundles
from raystill.serve.engine.vllm import PROBE_TIMEOUT_S
from raystill.serve.replica import ReplicaSettings, Teacher

APP_NAME = "teacher"
DEPLOYMENT = "Teacher"
POLL_S = 0.5
MAX_STARTS = 2  # of one replica, before the deployment counts as failed
SHUTDOWN_TIMEOUT_S = 10.0
# Requests beside groups that a busy replica must still take: info, identity.
OTHER_REQUESTS = 2

_logs: Path | None = None
_asked = ""
_app = APP_NAME


def app_name(run: str) -> str:
    """The Serve application of a run, by its id: runs share a cluster, never a teacher.

    A run that is started again finds what a lost driver left of it, and replaces it.
    """
    return f"{APP_NAME}-{run}"


def use_app(name: str) -> None:
    """From now on this process deploys, watches and ends the application of this name."""
    global _app
    _app = name


def deploy_teacher(
    config: RunConfig, model_folder: str, coordinator: Any, logs: Path | None
) -> None:
    """Start the deployment and return at once; ``wait_for_teacher`` waits for its first replica.

    Args:
        config: The run's configuration.
        model_folder: The teacher's folder here; a node that lacks it fetches the same from the Hub.
        coordinator: Handle of the coordinator actor that gets the counters, or None.
        logs: Folder of ``teacher-<n>.log``, or None to leave output with Ray's own logs.
    """
    global _logs, _asked
    _logs = logs
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0 or config.teacher.accelerator_type
    settings = ReplicaSettings(
        config=config,
        model=ModelSource.of(config.teacher.model, model_folder),
        coordinator=coordinator,
        logs=None if logs is None else str(logs),
        gpus=_gpus(config, bool(has_gpus)),
        replicas_per_node=_replicas_per_node(config),
    )
    _asked = asked_for(config, bool(has_gpus))
    serve.start(proxy_location="Disabled")
    options = deployment_options(config, bool(has_gpus))
    deployment = serve.deployment(Teacher, name=DEPLOYMENT, **options)
    target = serve.RunTarget(deployment.bind(settings), name=_app, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def deployment_options(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
    """Options of the Serve deployment: replicas, requests in flight, health, resources."""
    teacher = config.teacher
    options: dict[str, Any] = {
        "max_ongoing_requests": teacher.target_ongoing_requests + OTHER_REQUESTS,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": PROBE_TIMEOUT_S + 15.0,
        "graceful_shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": MAX_STARTS,
    }
    replicas = teacher.num_replicas
    if isinstance(replicas, ReplicasConfig):
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),
            "max_replicas": replicas.max,
            "target_ongoing_requests": scaling_target(
                teacher.target_ongoing_requests, replicas.max
            ),
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        }
    else:
        options["num_replicas"] = replicas
    return {**options, **_resources(config, has_gpus)}


def scaling_target(groups: int, most: int) -> float:
    """Requests a replica from which on Serve adds one: above ``groups``, which are let in flight.

    Serve rounds (requests counted / target) up, and counts an answered one a moment longer: at a
    target of just ``groups`` any such moment would add a replica. With this slack n x ``groups``
    still ask for n replicas, for every n up to ``most``.
    """
    return groups * (1 + 1 / (2 * most))


def wait_for_teacher(
    timeout_s: float, on_wait: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Wait until a replica answers, and return its ``info()``.

    Args:
        timeout_s: The longest wait, seconds.
        on_wait: Called about twice a second with the seconds waited so far.

    Raises:
        RunError: the replica cannot start or be placed in time; names its log file.
    """
    started = time.monotonic()
    while (waited := time.monotonic() - started) < timeout_s:
        told = applications().get(_app)
        state = "NOT_STARTED" if told is None else str(told.status.value)
        if state == "RUNNING":
            remaining = max(1.0, timeout_s - waited)
            return teacher_handle().info.remote().result(timeout_s=remaining)
        if state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RunError(f"the teacher did not start: {_cause(told)}{_log_hint()}")
        if on_wait is not None:
            on_wait(waited)
        time.sleep(POLL_S)
    raise RunError(
        f"the teacher was not up within teacher.startup_timeout_s ({timeout_s:.0f} s); the cluster "
        f"has {describe(ray.cluster_resources())}, of which free "
        f"{describe(ray.available_resources())}, and the teacher asks for {_asked}; free or add "
        f"resources, or raise the time limit{_log_hint()}"
    )


def asked_for(config: RunConfig, has_gpus: bool) -> str:
    """The first replicas and their resources, in words: ``2 replicas of CPU: 4, GPU: 4 each``."""
    replicas = config.teacher.num_replicas
    first = max(1, replicas.min) if isinstance(replicas, ReplicasConfig) else replicas
    return (
        f"{plural(first, 'replica')} of {describe(add_up(teacher_bundles(config, has_gpus)))} each"
    )


def waits_for_resources() -> bool:
    """Whether a replica has been without a place for half a minute, as Serve tells it: one of those
    the run starts with, or, when all have gone with their nodes, the next one.
    """
    told = applications().get(_app)
    if told is None or (told.status.value != "DEPLOYING" and _running(told) > 0):
        return False
    return any("to be scheduled" in deployment.message for deployment in told.deployments.values())


def num_replicas() -> int:
    """Replicas that answer now; 0 where the teacher was not deployed."""
    return _running(applications().get(_app))


def _running(told: Any) -> int:
    """Replicas that answer, as Serve tells of the application (None: there is none)."""
    deployment = None if told is None else told.deployments.get(DEPLOYMENT)
    return 0 if deployment is None else int(deployment.replica_states.get("RUNNING", 0))


def teacher_handle() -> Any:
    """Serve's handle of the deployed teacher."""
    return serve.get_app_handle(_app)


def end_teacher() -> None:
    """End the teacher's replicas; Serve stays for another life."""
    if _app in applications():
        serve.delete(_app)


def shutdown_teacher() -> None:
    """End the teacher's replicas, and Serve itself where nobody else uses it."""
    end_teacher()
    if not applications():
        serve.shutdown()


def _gpus(config: RunConfig, has_gpus: bool) -> int:
    """GPUs that one replica sees, a shared one included; 0 on a cluster without any."""
    return math.ceil(sum(bundle.get("GPU", 0) for bundle in teacher_bundles(config, has_gpus)))


def _resources(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
    """Where a replica's processes go.

    A replica that stays within one node holds everything itself and starts vLLM's workers as its
    children. With pipeline stages, which may lie on several nodes, it holds a placement group, and
    vLLM places one Ray worker in each bundle.
    """
    bundles = teacher_bundles(config, has_gpus)
    accelerator, selector = config.teacher.accelerator_type, dict(config.teacher.label_selector)
    if config.teacher.pipeline_parallel_size > 1 and len(bundles) > 1:
        return {
            "ray_actor_options": {"num_cpus": 1, "num_gpus": 0},
            "placement_group_bundles": bundles,
            "placement_group_strategy": "PACK",
            **({"placement_group_bundle_label_selector": [selector]} if selector else {}),
        }
    total = {name: sum(b.get(name, 0.0) for b in bundles) for name in bundles[0]}
    actor: dict[str, Any] = {"num_cpus": total.pop("CPU"), "num_gpus": total.pop("GPU", 0)}
    actor["resources"] = {n: v for n, v in total.items() if not n.startswith("accelerator_type:")}
    if accelerator is not None:
        actor["accelerator_type"] = accelerator
    if selector:
        actor["label_selector"] = selector
    return {"ray_actor_options": actor}


def _replicas_per_node(config: RunConfig) -> int:
    """Replicas that may come to share one node's cores, were they spread evenly."""
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return math.ceil(config.teacher.max_replicas / max(1, len(nodes)))


def _cause(told: Any) -> str:
    """The last telling line of what Serve says about a failed application."""
    text = "\n".join([*(d.message for d in told.deployments.values()), told.message])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _looks_like_error(line)]
    return (errors or lines or ["no reason was given"])[-1]


def _looks_like_error(line: str) -> bool:
    name = line.split(":", 1)[0]
    return ":" in line and name.rsplit(".", 1)[-1].endswith(("Error", "Exception", "Exit"))


def _log_hint() -> str:
    """Where the whole story is."""
    if _logs is None:
        return ""
    written = sorted(_logs.glob("teacher-*.log"))
    return f"; the whole output is in {written[0] if written else _logs / 'ray'}"
