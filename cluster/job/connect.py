"""Connecting the driver to its Ray cluster: an existing one, or one started on this machine.

Inside ``ray job submit`` and wherever ``RAY_ADDRESS`` is set, the driver joins that cluster and
brings no resources of its own. Otherwise it starts a cluster that only this machine can reach
and that ends with the driver. Libraries' chatter goes to ``logs/driver.log``, and the cluster's
own log folder appears as ``logs/ray``.
"""

import filecmp
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import raystill
from raystill.base.errors import RunError
from raystill.base.logs import quiet_driver
from raystill.config.run import ClusterConfig

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train's watcher for preempted nodes is an actor on any node: on a teacher's it would keep
    # that one, its GPUs with it, to the end of the run. A lost worker's group restarts without it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# On a cluster of this machine alone Ray's polling takes a third of a core from teacher and student:
# Serve's controller looks ten times a second, its routers and replicas report as often what Ray
# exports every ten seconds.
QUIET_LOCALLY = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1.0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}
# Without its dashboard nobody looks at such a cluster: its processes need not tell of every task
# each second, nor of themselves and their node as often as where Prometheus reads.
QUIET_UNWATCHED = {
    "RAY_task_events_report_interval_ms": "0",  # Not at all.
    "RAY_metrics_report_interval_ms": "30000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
# Where a cluster of this machine alone lets its processes listen: gloo, NCCL and vLLM choose an
# address of their own, mostly one that other machines reach.
LOCAL_ADDRESS = "127.0.0.1"
LOOPBACK = "lo"
LISTEN_LOCALLY = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "TP_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "VLLM_HOST_IP": LOCAL_ADDRESS,
    "VLLM_LOOPBACK_IP": LOCAL_ADDRESS,
}
# What a job does not need. A leading slash: beside driver.py only, no deeper folder of that name.
NOT_SHIPPED = [
    *("/.git", "/.venv", "/models", "/runs", "/build", "/tests", "/docs"),
    *("/benchmarks/results", "/requirements"),
    *("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "*.egg-info"),
    # Ray packs a link as the folder it leads to: each room goes once, as raystill/<room>.
    *("/cluster", "/serve", "/train", "/datasets"),
]


# Ray's libraries read these when they are imported, so they are set before.
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

_restore_output: Callable[[], None] | None = None


def connect(cluster: ClusterConfig, logs: Path | None) -> None:
    """Join or start the cluster. ``logs``: the run's log folder; None drops the chatter.

    Raises RunError where the cluster does not answer or cannot be started.
    """
    import ray

    global _restore_output
    if _restore_output is None:
        _restore_output = quiet_driver(os.devnull if logs is None else logs / "driver.log")
    # Errors that the cluster publishes would be printed amid the live view, whatever log_to_driver.
    ray._private.worker.print_to_stdstream = _log_published
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(ray, address)
        else:
            _start_local(ray, cluster)
    except RunError:
        _give_back_output()
        raise
    except Exception as error:
        _give_back_output()
        raise RunError(_why_not(address, error)) from error
    if logs is not None:
        _link_session_logs(ray, logs)


def disconnect(in_use: bool = False) -> None:
    """Leave the cluster, ending it if this process started it; the output is as before.

    in_use: a thread of this process is inside a call to Ray. Shutting down under it would crash
    the process, so the connection, and a cluster of this process's own, end with the process.
    """
    import ray

    try:
        if not in_use:
            ray.shutdown()
    finally:
        _give_back_output()


def project_root() -> Path:
    """The folder that holds the package: what workers need on their import path."""
    return Path(raystill.__file__).resolve().parent.parent


def _log_published(data: dict[str, Any], **_: Any) -> None:
    for line in data["lines"]:
        logging.getLogger("ray").warning("(%s) %s", data["pid"], line)


def _join(ray: Any, address: str) -> None:
    if address.startswith("ray://"):
        raise RunError(
            f"cluster.address is {address!r}, a Ray client address, and the driver must run on a "
            "machine of the cluster; use: ray job submit --working-dir . -- python driver.py run "
            "RUN.yaml"
        )
    ray.init(address=address, log_to_driver=False, runtime_env=_runtime_env())


def _runtime_env() -> dict[str, Any]:
    """How workers find the code: the job has shipped it, or this process ships it.

    What the job has set stays: Ray refuses a field that both the job and the driver set.
    """
    root = project_root()
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
    env: dict[str, Any] = {}
    if "working_dir" not in job and _is_project(root):
        env = {"working_dir": str(root), "excludes": NOT_SHIPPED}
    elif root != Path.cwd():  # The driver of a job starts in the folder that was shipped with it.
        # The package alone, e.g. a wheel's: no node needs to have it installed.
        env = {"py_modules": [str(root / "raystill")], "excludes": ["__pycache__"]}
    env = {name: value for name, value in env.items() if name not in job}
    taken = job.get("env_vars") or {}
    return env | {"env_vars": {name: os.environ[name] for name in QUIET if name not in taken}}


def _is_project(root: Path) -> bool:
    """Whether this folder is Raystill's, or a copy of it: its driver is the package's own.

    Packages are installed beside many others, one of which may bring another driver.py.
    """
    beside, inside = root / "driver.py", root / "raystill" / "driver.py"
    return beside.is_file() and inside.is_file() and filecmp.cmp(beside, inside)


def quiet_locally(dashboard: bool) -> dict[str, str]:
    """Settings of a cluster of this machine alone, as environment variables."""
    return QUIET_LOCALLY if dashboard else QUIET_LOCALLY | QUIET_UNWATCHED


def listen_locally() -> dict[str, str]:
    """Where processes of such a cluster listen, as environment variables.

    An interface is named only where there is one of that name.
    """
    interfaces = {name for _, name in socket.if_nameindex()}
    return {
        name: value
        for name, value in LISTEN_LOCALLY.items()
        if value != LOOPBACK or LOOPBACK in interfaces
    }


def _start_local(ray: Any, cluster: ClusterConfig) -> None:
    # Ray replaces 127.0.0.1 by an address that others reach, and its processes then listen to
    # everybody; not so where it is told that a node is a cluster of its own.
    constants = ray._private.ray_constants
    os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # The nodes' processes read it.
    constants.ENABLE_RAY_CLUSTER = False
    # The workers inherit the environment of the node they are started by.
    for name, value in (quiet_locally(cluster.dashboard) | listen_locally()).items():
        os.environ.setdefault(name, value)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(project_root()) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project_root()), *known]))
    memory = cluster.object_store_memory_gib
    ray.init(
        address="local",
        num_cpus=cluster.num_cpus or local_cpus(),
        object_store_memory=None if memory is None else int(memory * 2**30),
        include_dashboard=cluster.dashboard,
        dashboard_host=LOCAL_ADDRESS,
        _node_ip_address=LOCAL_ADDRESS,
        log_to_driver=False,
    )
    # It only carries workers' output to the driver, which does not want it.
    ray._private.worker._global_node.kill_log_monitor()


def local_cpus() -> int:
    """CPUs a local cluster offers: this process's cores, and never less than teacher + student."""
    return max(2, len(os.sched_getaffinity(0)))


def _why_not(address: str | None, error: Exception) -> str:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    reason = reason.strip() or type(error).__name__
    if address:
        return (
            f"no Ray cluster answers at {address} ({reason}); start one (ray up ray_config.yaml, "
            "or ray start --head), or unset RAY_ADDRESS and cluster.address to use this machine"
        )
    return (
        f"a local Ray cluster could not be started ({reason}); see /tmp/ray/session_latest/logs, "
        "and check free memory and the space of /tmp and /dev/shm"
    )


def _link_session_logs(ray: Any, logs: Path) -> None:
    """Let ``logs/ray`` lead to the session's log folder, where this machine holds it."""
    node = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path()) if node is not None else None
    if folder is None or not folder.is_dir():
        return
    link = logs / "ray"
    logs.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(folder)


def _give_back_output() -> None:
    global _restore_output
    if _restore_output is not None:
        _restore_output()
        _restore_output = None
