"""Starting and leaving a local cluster: quiet, reachable from here only, and asked before use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raystill.base.errors import RunError
from raystill.cluster.job.connect import connect, quiet_locally
from raystill.config.run import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]

SESSION = """
import os, sys
from pathlib import Path
from raystill.cluster.job import connect
from raystill.cluster.check.cluster import check_cluster
from raystill.config.run import ClusterConfig, RunConfig

logs = Path(sys.argv[1])
connect.connect(ClusterConfig(num_cpus=2, object_store_memory_gib=0.1), logs)
import ray
print("cpus", ray.cluster_resources()["CPU"])
print("linked", (logs / "ray").is_dir())

@ray.remote(num_cpus=0)
def room():
    import raystill.base.formatting
    print("a worker's chatter")
    return raystill.base.formatting.share(0.5)

print("worker", ray.get(room.remote()))
def problems(workers):
    config = RunConfig.model_validate({
        "teacher": {"model": "x"}, "student": {"layers": [0]}, "prompts": {"path": "x"},
        "training": {"num_workers": workers}})
    return check_cluster(config)
print("fits", problems(1))
for problem in problems(64):
    print("refused", problem)
connect.disconnect()
print("left", ray.is_initialized())
"""


@pytest.mark.ray
def test_a_local_cluster_is_quiet_and_says_what_it_cannot_hold(tmp_path: Path) -> None:
    quiet = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # Not the project's folder: workers must find the rooms all the same.
        env=quiet,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:4] == ["cpus 2.0", "linked True", "worker 50 %", "fits []"]
    assert lines[4].startswith("refused training.num_workers: the run needs CPU: 65")
    assert lines[5:] == ["left False"]
    assert (tmp_path / "logs" / "driver.log").exists()


def test_a_ray_client_address_is_refused_with_the_way_to_submit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunError, match="ray job submit"):
        connect(ClusterConfig(address="ray://10.0.0.1:10001"), None)


def test_a_local_cluster_with_a_dashboard_tells_it_of_its_tasks():
    """Only without one are task events off and figures exported less often."""
    watched, unwatched = quiet_locally(dashboard=True), quiet_locally(dashboard=False)
    assert not any(name.startswith("RAY_task_events") for name in watched)
    assert unwatched["RAY_task_events_report_interval_ms"] == "0"
    assert watched.items() < unwatched.items()
