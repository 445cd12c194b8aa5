"""An autoscaled cluster whose nodes are processes of this machine, and who was there when.

Ray's own fake provider starts and ends the nodes; its ``AutoscalingCluster`` would be ready made,
but the wheel lacks a file of it, and it stops every Ray on the machine. So the head is started
here, on free ports, with a configuration written as ``ray up`` would write it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._raylet import GcsClient

from tests.support.end_to_end import children_of

HEAD_ID = "f" * 51 + "00000"
HEAD = "ray.head.default"
FIRST_LOOK_S = 30.0
IDLE_S = 6.0
START_S = 60.0
END_S = 20.0
LOOK_EVERY_S = 0.25
OBJECT_STORE_BYTES = 100 << 20
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)

Counts = dict[str, int]


@dataclass
class Nodes:
    """How many nodes of each kind were there, each time it changed: (seconds, counts)."""

    address: str
    began: float = field(default_factory=time.monotonic)
    seen: list[tuple[float, Counts]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Look until ``over``."""
        client = GcsClient(address=self.address)
        while not self.over.wait(LOOK_EVERY_S):
            counts = alive(client)
            if not self.seen or self.seen[-1][1] != counts:
                self.seen.append((round(time.monotonic() - self.began, 1), counts))

    def now(self) -> Counts:
        """The newest counts."""
        return self.seen[-1][1] if self.seen else {}

    def most(self, kind: str) -> int:
        """Most nodes of a kind at a time."""
        return max((counts.get(kind, 0) for _, counts in self.seen), default=0)

    def begin_anew(self) -> None:
        """Forget what was seen, but for the present; waits for the first look."""
        deadline = time.monotonic() + FIRST_LOOK_S
        while not self.seen:
            assert time.monotonic() < deadline, f"no node was seen in {FIRST_LOOK_S:.0f} s"
            time.sleep(LOOK_EVERY_S)
        self.seen = self.seen[-1:]

    def wait_for_head_alone(self, patience_s: float) -> float:
        """Seconds until only the head was left; fails after ``patience_s``."""
        began = time.monotonic()
        while self.now() != {HEAD: 1}:
            assert time.monotonic() < began + patience_s, f"nodes stayed: {self}"
            time.sleep(LOOK_EVERY_S)
        return time.monotonic() - began

    def __str__(self) -> str:
        return "; ".join(f"{second:.1f} s: {counts}" for second, counts in self.seen)


def alive(client: GcsClient) -> Counts:
    """Nodes alive, by the resource that names their kind."""
    counts: Counter[str] = Counter()
    for info in client.get_all_node_info().values():
        if info.state == 0:  # GcsNodeInfo.ALIVE
            kinds = [name for name in ("teacher", "student") if name in info.resources_total]
            counts[kinds[0] if kinds else HEAD] += 1
    return dict(counts)


@contextmanager
def autoscaled_cluster(kinds: Mapping[str, int], head_cpus: int = 2) -> Iterator[Nodes]:
    """A head alone, which grows to ``kinds`` (most nodes of each) and shrinks again.

    A node of a kind has one CPU and one of a resource of the kind's name.
    """
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder:
        address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        config = Path(folder) / "cluster.yaml"
        config.write_text(yaml.safe_dump(cluster_file(kinds, address, head_cpus)))
        head = start_head(config, address, head_cpus)
        nodes = Nodes(address)
        watcher = threading.Thread(target=nodes.watch, daemon=True)
        try:
            wait_for_head(head, address)
            watcher.start()
            yield nodes
        finally:
            nodes.over.set()
            end(head, folder)


def cluster_file(kinds: Mapping[str, int], address: str, head_cpus: int) -> dict[str, Any]:
    """What ``ray up`` would put on the head."""
    types: dict[str, Any] = {
        HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    }
    for kind, most in kinds.items():
        resources = {"CPU": 1, kind: 1, "object_store_memory": OBJECT_STORE_BYTES}
        types[kind] = {
            "resources": resources,
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        }
    return {
        "cluster_name": "fake",
        "max_workers": sum(kinds.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "head_node_type": HEAD,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": types,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in COMMANDS},
    }


def start_head(config: Path, address: str, num_cpus: int) -> subprocess.Popen[bytes]:
    """``ray start --head``, its output beside the configuration."""
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_AUTH_MODE": "disabled",
    }
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        f"--port={address.rpartition(':')[2]}",
        f"--autoscaling-config={config}",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={config.parent}",
        "--include-dashboard=false",
        f"--ray-client-server-port={free_port()}",
    ]
    with (config.parent / "head.log").open("w") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def wait_for_head(head: subprocess.Popen[bytes], address: str) -> None:
    """Until the head answers."""
    deadline = time.monotonic() + START_S
    while True:
        assert head.poll() is None, "the head ended"
        assert time.monotonic() < deadline, f"no head in {START_S:.0f} s"
        with contextlib.suppress(Exception):
            if alive(GcsClient(address=address)):
                return
        time.sleep(0.5)


def end(head: subprocess.Popen[bytes], folder: str) -> None:
    """End the head and what it started; nodes were started by its autoscaler, so by ``folder``."""
    mine = {head.pid, *children_of(head.pid)}
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(END_S)
    for pid in {*mine, *naming(folder)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()


def naming(folder: str) -> set[int]:
    """Processes whose command line names a folder."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder in (process / "cmdline").read_text(errors="replace"):
                found.add(int(process.name))
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
