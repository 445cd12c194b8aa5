"""The Serve application of the student's sampler: its placement, the wait for it, and its end.

On a machine without GPUs it asks for no CPU of its own and runs on the teacher's cores: the two
take turns there, since a student's answer is first written and then scored.
"""

import time
from typing import Any

import ray
from ray import serve

from raystill.base.errors import RunError
from raystill.datasets.stream.teacher_calls import applications
from raystill.placement.requests import sampler_resources
from raystill.run import Run
from raystill.serve.deploy import DEPLOYMENT_FAILED, MAX_STARTS, SHUTDOWN_TIMEOUT_S, cause_of
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
        resources = sampler_resources(config, ray.cluster_resources().get("GPU", 0) > 0)
        gpus = int(resources.get("GPU", 0))
        settings = SamplerSettings(config, self._run.coordinator, str(self._run.folder.logs), gpus)
        deployment = serve.deployment(
            Sampler,
            name=DEPLOYMENT,
            num_replicas=config.policy.num_replicas,
            max_ongoing_requests=config.groups_in_flight + 2,
            health_check_period_s=10.0,
            health_check_timeout_s=PROBE_TIMEOUT_S + 15.0,
            graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.2,
            max_constructor_retry_count=MAX_STARTS,
            ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": gpus},
        )
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

    def end(self) -> None:
        """End the sampler; Serve stays."""
        if self._run.sampler_app in applications():
            serve.delete(self._run.sampler_app)
