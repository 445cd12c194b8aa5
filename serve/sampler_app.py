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
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.datasets.stream.teacher_calls import SERVE, applications
from raystill.model.files import ModelFolder
from raystill.placement.requests import sampler_resources
from raystill.run import Run
from raystill.serve.deploy import (
    DEPLOYMENT_FAILED,
    actor_options,
    cause_of,
    engine_options,
    running,
)
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
        gpus = int(options["ray_actor_options"]["num_gpus"])
        logs = str(self._run.folder.logs)
        settings = SamplerSettings(config, self._run.coordinator, logs, gpus, context_of(self._run))
        name = self._run.sampler_app
        with SERVE:  # A teacher is started at the same time.
            deployment = serve.deployment(Sampler, name=DEPLOYMENT, **options)
            target = serve.RunTarget(deployment.bind(settings), name=name, route_prefix=None)
            serve.run_many([target], wait_for_applications_running=False)

    def wait(self) -> None:
        """Wait until the sampler answers, or the run is over and it was ended. RunError where it
        cannot start, or not in time.
        """
        timeout_s = self._run.config.teacher.startup_timeout_s
        started = time.monotonic()
        hint = f"see {self._run.folder.logs}/sampler-*.log"
        seen = False
        while time.monotonic() - started < timeout_s:
            status: Any = applications().get(self._run.sampler_app)
            state = "NOT_STARTED" if status is None else str(status.status.value)
            if state == "RUNNING" or (seen and status is None):
                return
            seen = status is not None
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


def context_of(run: Run) -> int | None:
    """Most tokens of a prompt and its answer that every teacher reads, by their models' files."""
    sources = [one.teacher for one in run.by_teacher().values()]
    contexts = [ModelFolder(one.name, Path(one.folder)).context_tokens for one in sources]
    return min((one for one in contexts if one is not None), default=None)


def deployment_options(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
    """Options of the Serve deployment: replicas, requests in flight, health, resources."""
    policy, groups = config.policy, config.groups_in_flight
    full = math.ceil(config.teacher.max_num_seqs / config.stream.group_rows)
    wanted = sampler_resources(config, has_gpus)
    actor = actor_options(wanted, policy.accelerator_type, policy.label_selector)
    return {**engine_options(policy.num_replicas, groups, full), "ray_actor_options": actor}
