"""Shared fixtures: a local Ray for each process of tests, started only where a test asks for it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports Ray: they are read at import, and workers inherit them.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The dashboard's agent measures every process of the node each 2.5 s, which no test reads.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Where files are spread over processes: those of minutes first, so that none is the last alone.
IN_ORDER = ("train", "hostile", "system", "serve", "datasets", "cluster", "base")

NUM_CPUS = 4
OBJECT_STORE_BYTES = 300 << 20


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {folder: number for number, folder in enumerate(IN_ORDER)}
        items.sort(key=lambda item: place.get(item.path.relative_to(ROOT).parts[1], 0))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four logical CPUs, shut down at the end of the session."""
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 1000},  # One test waits for them.
    )
    # It only carries workers' output to this process, which does not want it.
    ray._private.worker._global_node.kill_log_monitor()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_serve(ray_cluster: None) -> Iterator[None]:
    """Ray Serve on the shared cluster, without a proxy; each test deletes what it deployed."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
