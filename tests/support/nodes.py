"""Several Ray nodes on this machine, and a run's driver on the head of them.

Unlike those of `fake_nodes` they come and go when a test says so.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.support.end_to_end import ROOT, RunFiles, children_of

PATIENCE_S = 300.0


@contextmanager
def cluster_of_nodes() -> Iterator[Callable[..., Any]]:
    """A head for the driver; yields what adds a node with one of each resource that is named.

    The head alone has this machine's address, so that the driver joins there.
    """
    address = iter(f"127.0.0.{n}" for n in range(2, 20))
    memory = 100 << 20
    head = {"num_cpus": 2, "object_store_memory": memory}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)

    def add(*kinds: str) -> Any:
        return cluster.add_node(
            num_cpus=len(kinds),
            resources=dict.fromkeys(kinds, 1),
            node_ip_address=next(address),
            object_store_memory=memory,
        )

    add.cluster = cluster
    try:
        yield add
    finally:
        cluster.shutdown()


class Watched:
    """The driver on the cluster, and what its metrics say so far."""

    def __init__(self, run_file: Path, address: str, patience_s: float = PATIENCE_S) -> None:
        self.patience_s = patience_s
        self.files = RunFiles(run_file.parent / "run")
        self.output = run_file.parent / "output"
        environment = {**os.environ, "RAY_ADDRESS": address}
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, what: str, reached: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until the metrics show it; fails where the driver ends before, or after a long time."""
        deadline = time.monotonic() + self.patience_s
        while not reached(self.files.lines("metrics.jsonl")):
            assert self.process.poll() is None, f"ended before {what}: {self.output.read_text()}"
            assert time.monotonic() < deadline, f"no {what}: {self.output.read_text()}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Until a step is in the metrics."""
        self.wait(f"step {step}", lambda lines: bool(lines) and lines[-1]["step"] >= step)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        code = self.process.wait(timeout=self.patience_s)
        assert code == 0, self.output.read_text()

    def end(self) -> None:
        """Kill the driver, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_for_workers(self, count: int) -> None:
        """Until three steps were made by so many workers."""
        self.wait(
            f"three steps of {count} workers",
            lambda lines: [line["workers"] for line in lines[-3:]] == [count] * 3,
        )


def on_node(node: Any) -> set[int]:
    """Processes that a node's raylet has started."""
    [raylet] = node.all_processes["raylet"]
    return children_of(raylet.process.pid)
