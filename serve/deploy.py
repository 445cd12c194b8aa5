"""The teacher's Serve application: its placement, the wait for it, and its end.

The driver deploys it and waits; the stream finds it by name. HTTP stays off, and no row ever
passes through the driver.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raystill.base.errors import RunError
from raystill.base.formatting import plural
from raystill.config.run import RunConfig
from raystill.config.teacher import ReplicasConfig, section_of, who_is
from raystill.datasets.stream.teacher_calls import SERVE, applications
from raystill.model.on_node import ModelSource
from raystill.placement.requests import add_up, describe, teacher_bundles
from raystill.run import Run
from raystill.serve.engine.arguments import PROBE_TIMEOUT_S
from raystill.serve.replica import ReplicaSettings, Teacher

DEPLOYMENT = "Teacher"
DEPLOYMENT_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
POLL_S = 0.5
MAX_STARTS = 2
"""Starts of one replica before Serve counts the deployment as failed."""
SHUTDOWN_TIMEOUT_S = 10.0
OTHER_REQUESTS = 2
"""Requests beside groups that a busy replica must still take: ``info`` and ``identity``."""


class TeacherApp:
    """One teacher as a Serve application, as the driver deploys, watches and ends it.

    Args:
        name: Name of the application on the cluster.
        config: The run's configuration.
        model: The teacher's files; a node that lacks them fetches the same from the Hub.
        coordinator: Handle of the coordinator actor that gets the counters, or None.
        logs: Folder of ``teacher-<n>.log``, or None to leave output with Ray's own logs.
        identity: The teacher's identity, with which each replica compares its own files'.
        run_folder: Folder of the run, for an API's messages and spending.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        model: ModelSource,
        coordinator: Any = None,
        logs: Path | None = None,
        identity: str | None = None,
        run_folder: str | None = None,
    ) -> None:
        self.name = name
        self._sampler: str | None = None  # Application of the sampler that ends with this one.
        self._config = config
        self._model = model
        self._coordinator = coordinator
        self._logs = logs
        self._identity = identity
        self._run_folder = run_folder
        self._store_path: str | None = None
        self._teacher = ""  # Its name among several.
        self._pace: tuple[Any, str] | None = None
        self._others: tuple[int, int] = (0, 0)  # Replicas on its cores: before it, in all.

    @classmethod
    def of(cls, run: Run) -> "TeacherApp":
        """The teacher of a run."""
        name, identity = run.app, run.teacher_identity
        logs, path = run.folder.logs, run.folder.path
        app = cls(name, run.config, run.teacher, run.coordinator, logs, identity, path)
        app._store_path = run.store_path
        app._sampler = run.sampler_app if run.config.policy.enabled else None
        app._teacher = run.teacher_name
        if (pace := run.paces.get(run.teacher_name)) is not None:
            app._pace = (pace, run.id)
        return app

    def deploy(self) -> None:
        """Start the deployment and return at once; ``wait`` waits for its first replica."""
        config, has_gpus = self._config, self._has_gpus()
        settings = ReplicaSettings(
            config=config,
            model=self._model,
            coordinator=self._coordinator,
            logs=None if self._logs is None else str(self._logs),
            gpus=gpus_of(config, has_gpus),
            replicas_per_node=_replicas_per_node(config, self._others[1]),
            teacher_identity=self._identity,
            run_folder=self._run_folder,
            store_path=self._store_path,
            name=self._teacher,
            cores_before=self._others[0],
            pace=self._pace,
        )
        options = deployment_options(config, has_gpus)
        with SERVE:
            serve.start(proxy_location="Disabled")
            deployment = serve.deployment(Teacher, name=DEPLOYMENT, **options)
            target = serve.RunTarget(deployment.bind(settings), name=self.name, route_prefix=None)
            serve.run_many([target], wait_for_applications_running=False)

    def wait(
        self, timeout_s: float | None = None, on_wait: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """Wait until a replica answers, and return its ``info()``.

        Args:
            timeout_s: The longest wait, seconds; default: ``teacher.startup_timeout_s``.
            on_wait: Called about twice a second with the seconds waited so far.

        Raises:
            RunError: The replica cannot start or be placed in time; names its log file.
        """
        timeout_s = self._config.teacher.startup_timeout_s if timeout_s is None else timeout_s
        started = time.monotonic()
        while (waited := time.monotonic() - started) < timeout_s:
            status = self._status()
            state = "NOT_STARTED" if status is None else str(status.status.value)
            if state == "RUNNING":
                remaining = max(1.0, timeout_s - waited)
                with SERVE:
                    asked = self.handle().info.remote()
                info: dict[str, Any] = asked.result(timeout_s=remaining)
                return info
            if state in DEPLOYMENT_FAILED:
                raise RunError(
                    f"{who_is(self._teacher)} did not start: {cause_of(status)}{self._log_hint()}"
                )
            if on_wait is not None:
                on_wait(waited)
            time.sleep(POLL_S)
        raise RunError(
            f"{who_is(self._teacher)} was not up within {section_of(self._teacher)}."
            f"startup_timeout_s ({timeout_s:.0f} s); the cluster has "
            f"{describe(ray.cluster_resources())}, of which free "
            f"{describe(ray.available_resources())}, and the teacher asks for "
            f"{first_replicas(self._config, self._has_gpus())}; free or add resources, or raise "
            f"the time limit{self._log_hint()}"
        )

    def handle(self) -> Any:
        """Serve's handle of the deployed teacher."""
        return serve.get_app_handle(self.name)

    def num_replicas(self) -> int:
        """Number of replicas that answer now; 0 where the teacher was not deployed."""
        return running(self._status(), DEPLOYMENT)

    def waits_for_resources(self) -> bool:
        """Whether Serve says that a replica has been without a place for half a minute.

        That is one of those the run starts with, or, when all have gone with their nodes, the
        next one.
        """
        status = self._status()
        if status is None or (
            status.status.value != "DEPLOYING" and running(status, DEPLOYMENT) > 0
        ):
            return False
        return any("to be scheduled" in one.message for one in status.deployments.values())

    def end(self) -> None:
        """End the teacher's replicas; Serve stays, for another life of the teacher."""
        if self.name in applications():
            serve.delete(self.name)

    def shutdown(self) -> None:
        """End the teacher's replicas, and Serve itself where nobody else uses it."""
        self.end()
        if self._sampler is not None and self._sampler in applications():
            serve.delete(self._sampler)
        if not applications():
            serve.shutdown()

    def _status(self) -> Any:
        """Serve's status of the application; None where there is none."""
        return applications().get(self.name)

    def _has_gpus(self) -> bool:
        asks_for_gpus = self._config.teacher.accelerator_type is not None
        return asks_for_gpus or ray.cluster_resources().get("GPU", 0) > 0

    def _log_hint(self) -> str:
        """Where the whole story is."""
        if self._logs is None:
            return ""
        role = f"teacher-{self._teacher}" if self._teacher else "teacher"
        written = sorted(self._logs.glob(f"{role}-[0-9]*.log"))
        return f"; the whole output is in {written[0] if written else self._logs / 'ray'}"


class TeacherApps:
    """All teachers of a run, which mostly is one."""

    def __init__(self, run: Run) -> None:
        self.by_name: dict[str, TeacherApp] = {}
        runs, before = run.by_teacher(), 0
        sharing = {n: one.config.teacher.max_replicas for n, one in runs.items() if _shares(one)}
        for name, one in runs.items():
            self.by_name[name] = app = TeacherApp.of(one)
            if name in sharing:
                app._others = (before, sum(sharing.values()) - sharing[name])
                before += sharing[name]

    def num_replicas(self) -> int:
        """Number of replicas that answer now, of all teachers."""
        return sum(app.num_replicas() for app in self.by_name.values())

    def waits_for_resources(self) -> bool:
        """`TeacherApp.waits_for_resources` of any."""
        return any(app.waits_for_resources() for app in self.by_name.values())

    def shutdown(self) -> None:
        """End all replicas, and Serve itself where nobody else uses it."""
        for app in self.by_name.values():
            app.end()
        for app in self.by_name.values():
            app.shutdown()


def _shares(run: Run) -> bool:
    """Whether a teacher computes, on cores that are not its own by ``cpu_cores``."""
    return run.config.teacher.engine == "vllm" and run.config.teacher.cpu_cores is None


def deployment_options(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
    """Options of the Serve deployment: replicas, requests in flight, health, resources."""
    groups = config.groups_per_replica
    options = engine_options(config.teacher.num_replicas, groups, groups)
    return {**options, **placement(config, has_gpus)}


def engine_options(replicas: int | ReplicasConfig, in_flight: int, full: int) -> dict[str, Any]:
    """Options of a Serve deployment of engines: replicas, requests in flight, health.

    in_flight: groups that one replica may be sent. full: groups that fill its slots, above which
    Serve adds a replica.
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": in_flight + OTHER_REQUESTS,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": PROBE_TIMEOUT_S + 15.0,
        "graceful_shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": MAX_STARTS,
    }
    if not isinstance(replicas, ReplicasConfig):
        return {**options, "num_replicas": replicas}
    scaling = {
        "min_replicas": replicas.min,
        "initial_replicas": max(1, replicas.min),
        "max_replicas": replicas.max,
        "target_ongoing_requests": scaling_target(full, replicas.max),
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
    }
    return {**options, "autoscaling_config": scaling}


def actor_options(
    resources: dict[str, float], accelerator: str | None, labels: Mapping[str, str]
) -> dict[str, Any]:
    """Ray's options of a replica that needs these resources (as `teacher_bundles` has them), on a
    node with this accelerator and these labels.
    """
    plain = {n: v for n, v in resources.items() if not n.startswith("accelerator_type:")}
    actor: dict[str, Any] = {
        "num_cpus": plain.pop("CPU"),
        "num_gpus": plain.pop("GPU", 0),
        "resources": plain,
    }
    if accelerator is not None:
        actor["accelerator_type"] = accelerator
    if labels:
        actor["label_selector"] = dict(labels)
    return actor


def scaling_target(groups: int, most: int) -> float:
    """Requests a replica from which on Serve adds one: above ``groups``, which are let in flight.

    Serve rounds (requests counted / target) up, and counts an answered one a moment longer: at a
    target of just ``groups`` any such moment would add a replica. With this slack n x ``groups``
    still ask for n replicas, for every n up to ``most``.
    """
    return groups * (1 + 1 / (2 * most))


def first_replicas(config: RunConfig, has_gpus: bool) -> str:
    """Replicas the run starts with, and what each needs: ``2 replicas of CPU: 4, GPU: 4 each``."""
    replicas = config.teacher.num_replicas
    first = max(1, replicas.min) if isinstance(replicas, ReplicasConfig) else replicas
    return (
        f"{plural(first, 'replica')} of {describe(add_up(teacher_bundles(config, has_gpus)))} each"
    )


def running(status: Any, deployment_name: str) -> int:
    """Replicas that answer, by Serve's status of the application (None: there is none)."""
    deployment = None if status is None else status.deployments.get(deployment_name)
    return 0 if deployment is None else int(deployment.replica_states.get("RUNNING", 0))


def gpus_of(config: RunConfig, has_gpus: bool) -> int:
    """GPUs that one replica sees, a shared one included; 0 on a cluster without any."""
    return math.ceil(sum(bundle.get("GPU", 0) for bundle in teacher_bundles(config, has_gpus)))


def placement(config: RunConfig, has_gpus: bool) -> dict[str, Any]:
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
    return {"ray_actor_options": actor_options(total, accelerator, selector)}


def _replicas_per_node(config: RunConfig, others: int) -> int:
    """Replicas that may come to share one node's cores, were they spread evenly.

    others: replicas of other teachers of the run that share its cores.
    """
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return math.ceil((config.teacher.max_replicas + others) / max(1, len(nodes)))


def cause_of(status: Any) -> str:
    """The last telling line of what Serve says about a failed application."""
    text = "\n".join([*(d.message for d in status.deployments.values()), status.message])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _looks_like_error(line)]
    return (errors or lines or ["no reason was given"])[-1]


def _looks_like_error(line: str) -> bool:
    name = line.split(":", 1)[0]
    return ":" in line and name.rsplit(".", 1)[-1].endswith(("Error", "Exception", "Exit"))
