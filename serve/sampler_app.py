"""The Serve application of the student's sampler: its placement, the wait for it, and its end.

On a machine without GPUs it asks for no CPU of its own and runs on the teacher's cores: the two
take turns there, since a student's answer is first written and then scored.

With ``policy.num_replicas: {min, max}`` Serve adds replicas while more groups wait for a sampler
than fill its slots. A new one has the newest weights and has proven them before it is ready. How
many groups may wait follows from the bound of staleness, so no replica is added for rows that are
not to be written yet.
"""

import math
import time
from typing import Any

import ray
from ray import serve

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.config.teacher import ReplicasConfig
from raystill.datasets.stream.teacher_calls import applications
from raystill.placement.requests import sampler_resources
from raystill.run import Run
from raystill.serve.deploy import (
    DEPLOYMENT_FAILED,
    MAX_STARTS,
    OTHER_REQUESTS,
    SHUTDOWN_TIMEOUT_S,
    cause_of,
    running,
    scaling_target,
)
from raystill.serve.engine.arguments import PROBE_TIMEOUT_S
from raystill.serve.sampler import Sampler, SamplerSettings

DEPLOYMENT = "Sampler"
POLL_S = 0.5


class SamplerApp:
    """The sampler of a run, as the driver deploys, awaits and ends it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def deploy(self) -> None:
        """Start the deployment and return at once."""
        config = self._run.config
        options = deployment_options(config, ray.cluster_resources().get("GPU", 0) > 0)
        gpus = options["ray_actor_options"]["num_gpus"]
        settings = SamplerSettings(config, self._run.coordinator, str(self._run.folder.logs), gpus)
        deployment = serve.deployment(Sampler, name=DEPLOYMENT, **options)
        name = self._run.sampler_app
        target = serve.RunTarget(deployment.bind(settings), name=name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def wait(self) -> None:
        """Wait until the sampler answers. RunError where it cannot start, or not in time."""
        timeout_s = self._run.config.teacher.startup_timeout_s
        started = time.monotonic()
        hint = f"see {self._run.folder.logs}/sampler-*.log"
        while time.monotonic() - started < timeout_s:
            status: Any = applications().get(self._run.sampler_app)
            state = "NOT_STARTED" if status is None else str(status.status.value)
            if state == "RUNNING":
                return
            if state in DEPLOYMENT_FAILED:
                raise RunError(f"the student's sampler did not start: {cause_of(status)}; {hint}")
            time.sleep(POLL_S)
        raise RunError(
            f"the student's sampler was not up within teacher.startup_timeout_s ({timeout_s:.0f} "
            f"s); free or add resources, or raise the time limit; {hint}"
        )

    def num_replicas(self) -> int:
        """Number of samplers that answer now."""
        return running(applications().get(self._run.sampler_app), DEPLOYMENT)

    def end(self) -> None:
        """End the sampler; Serve stays."""
        if self._run.sampler_app in applications():
            serve.delete(self._run.sampler_app)


def deployment_options(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
    """Options of the Serve deployment: replicas, requests in flight, health, resources."""
    policy = config.policy
    options: dict[str, Any] = {
        "max_ongoing_requests": config.groups_in_flight + OTHER_REQUESTS,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": PROBE_TIMEOUT_S + 15.0,
        "graceful_shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": MAX_STARTS,
    }
    replicas = policy.num_replicas
    if isinstance(replicas, ReplicasConfig):
        full = math.ceil(config.teacher.max_num_seqs / config.stream.group_rows)
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": scaling_target(full, replicas.max),
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        }
    else:
        options["num_replicas"] = replicas
    wanted = sampler_resources(config, has_gpus)
    actor: dict[str, Any] = {"num_cpus": wanted.pop("CPU"), "num_gpus": int(wanted.pop("GPU", 0))}
    actor["resources"] = {n: v for n, v in wanted.items() if not n.startswith("accelerator_type:")}
    if policy.accelerator_type is not None:
        actor["accelerator_type"] = policy.accelerator_type
    if policy.label_selector:
        actor["label_selector"] = dict(policy.label_selector)
    return {**options, "ray_actor_options": actor}
