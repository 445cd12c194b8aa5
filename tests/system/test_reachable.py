"""What a run opens, and to whom: found by connecting to every port that its processes listen on."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raystill.cluster.job import connect
from tests.support.end_to_end import ROOT, RunFiles, children_of
from tests.support.synthetic_run import started, wait_for_step, write_run_file

LOOPBACK = "127.0.0.1"
TOKEN = "a-token-of-this-test-alone-4b1d7"
STEP_WAIT_S = 300.0
PATHS = (
    "/",
    "/api/jobs/",
    "/api/job_agent/jobs/",
    "/nodes?view=summary",
    "/api/v0/tasks",
    "/api/serve/applications/",
    "/logs/",
    "/-/routes",
    "/v1/models",
)
CALL = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


def own_address() -> str:
    """An address of this machine at which others reach it."""
    for address in subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True
    ).stdout.split():
        if not address.startswith("127.") and ":" not in address:
            return address
    pytest.skip("this machine has no other address than loopback")


def listening(pids: set[int]) -> dict[int, set[str]]:
    """Ports on which processes listen, and the addresses, in hexadecimal as the kernel has them."""
    sockets: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                found.setdefault(int(port, 16), set()).add(address)
    return found


def connects(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 3):
        return True
    return False


def get(
    port: int, path: str, token: str | None = None, method: str = "GET"
) -> tuple[int, bytes] | None:
    """Status and body of an HTTP request on loopback; None where no HTTP is spoken."""
    more = "" if token is None else f"Authorization: Bearer {token}\r\n"
    asked = (
        f"{method} {path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n{more}Connection: close\r\n\r\n"
    )
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 3) as there:
        there.settimeout(5)
        there.sendall(asked.encode())
        while len(answer) < 100_000 and (part := there.recv(65536)):
            answer += part
    if not answer.startswith(b"HTTP/"):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def refuses_call(port: int) -> bool | None:
    """Whether a gRPC call without a token is refused as such; None where no gRPC is spoken."""
    import grpc

    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        try:
            channel.unary_unary(CALL)(b"", timeout=5)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            return None if error.code() in UNSPOKEN else False
    return False


def unspoken() -> tuple[object, ...]:
    import grpc

    codes = grpc.StatusCode
    return (
        codes.UNAVAILABLE,
        codes.DEADLINE_EXCEEDED,
        codes.INTERNAL,
        codes.UNKNOWN,
        codes.UNIMPLEMENTED,  # Another of Ray's services.
    )


UNSPOKEN = unspoken()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, set[str]]]:
    """What the processes of a run with two workers, tokens and a dashboard listen on."""
    folder = tmp_path_factory.mktemp("reachable")
    run_file = write_run_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        overrides = ("cluster.dashboard=true", "training.num_workers=2")
        with started(run_file, *overrides) as process:
            wait_for_step(process, RunFiles(folder / "run"), 2, STEP_WAIT_S)
            yield listening({process.pid, *children_of(process.pid)})


@pytest.mark.ray
@pytest.mark.faults
def test_nothing_of_a_run_answers_a_stranger(ports: dict[int, set[str]]) -> None:
    """At this machine's own address; on loopback only figures, unless the token is shown."""
    outside = own_address()
    assert len(ports) > 8, ports
    assert {port: at for port, at in ports.items() if connects(outside, port)} == {}
    assert all(connects(LOOPBACK, port) for port in ports)
    opened, with_token, calls = set(), set(), []
    for port in ports:
        calls.append(refuses_call(port))
        for path in PATHS:
            if (answer := get(port, path)) is None:
                break
            status, body = answer
            figures = body.lstrip().startswith(b"# HELP")
            if status == 200 and not figures:
                opened.add(path)
            shown = get(port, path, TOKEN)
            if shown is not None and shown[0] == 200 and not figures:
                with_token.add(path)
    assert opened <= {"/"}  # The frame of the dashboard, which has no data in it.
    assert "/api/jobs/" in with_token
    assert False not in calls  # Nobody lists the nodes without the token.


HEAD = """
import sys
from raystill.cluster.job import connect
from raystill.config.run import ClusterConfig
connect.connect(ClusterConfig(num_cpus=1, dashboard=True), None)
import ray
print(ray.get_runtime_context().gcs_address, file=sys.__stdout__, flush=True)
sys.stdin.readline()
connect.disconnect()
"""
CALLS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "InternalKVGcsService/InternalKVPut",
    "InternalKVGcsService/InternalKVKeys",
    "JobInfoGcsService/GetAllJobInfo",
    "ActorInfoGcsService/KillActorViaGcs",
    "NodeManagerService/GetNodeStats",
    "CoreWorkerService/GetCoreWorkerStats",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
)
"""Of the control store, a raylet, a worker, the object manager and an agent."""


def code_of(port: int, call: str, token: str | None = None) -> str:
    """The status of an empty gRPC call, shown this token."""
    import grpc

    shown = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=60, metadata=shown)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[int, dict[int, set[str]]]]:
    """A cluster as the driver starts one, with a token: the control store's port, and all ports."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    # A socket's path has 107 characters at most, so not in the folder of a test.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder,
        subprocess.Popen(
            [sys.executable, "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment | {"RAY_TMPDIR": folder},
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            port = int(process.stdout.readline().rpartition(":")[2])
            yield port, listening({process.pid, *children_of(process.pid)})
        finally:
            process.stdin.close()
            process.wait()


@pytest.mark.ray
@pytest.mark.parametrize("token", [None, "", "another-token-of-nobody-77-12ab"])
def test_the_control_store_refuses_who_has_no_token(
    head: tuple[int, dict[int, set[str]]], token: str | None
) -> None:
    """And so does every other process of the cluster that speaks gRPC; and HTTP, but for figures
    and the frame of a page.
    """
    store, ports = head
    refused = {}
    for port in ports:
        codes = {call: code_of(port, call, token) for call in CALLS}
        spoken = {call: code for call, code in codes.items() if code != "UNAVAILABLE"}
        if spoken:
            assert set(spoken.values()) == {"UNAUTHENTICATED", "UNIMPLEMENTED"}, codes
            refused[port] = {call for call, code in spoken.items() if code == "UNAUTHENTICATED"}
            continue
        for path in PATHS:
            status, body = get(port, path, token) or (0, b"")
            assert status != 200 or path == "/" or body.lstrip().startswith(b"# HELP"), (port, path)
        status, body = get(port, "/api/jobs/", token, "POST") or (0, b"")
        no = (0, 401, 403, 404, 405)
        assert status in no or body.lstrip().startswith(b"# HELP"), (port, body)
    assert refused[store] == set(CALLS[:5])
    assert set().union(*refused.values()) == set(CALLS)


@pytest.mark.ray
def test_the_control_store_answers_who_has_the_token(
    head: tuple[int, dict[int, set[str]]],
) -> None:
    store, ports = head
    for call in (CALLS[0], CALLS[2], CALLS[3]):
        assert code_of(store, call, TOKEN) == "OK"
    shown = {port: answer[0] for port in ports if (answer := get(port, "/api/jobs/", TOKEN))}
    assert 200 in shown.values()


@pytest.mark.ray
def test_a_cluster_of_this_machine_is_on_no_other_interface(
    head: tuple[int, dict[int, set[str]]],
) -> None:
    store, ports = head
    outside = own_address()
    assert store in ports and len(ports) > 8
    assert all(connects(LOOPBACK, port) for port in ports)
    assert {port: at for port, at in ports.items() if connects(outside, port)} == {}


MEET = """
import os, socket, sys
import torch.distributed as dist
from raystill.train.worker.rendezvous import meet_at_node_address
for whose in ("torch", "ours"):
    if whose == "ours":
        meet_at_node_address()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", init_method="env://", rank=0, world_size=1)
    print(port, flush=True)
    sys.stdin.readline()
    dist.destroy_process_group()
"""


def test_student_workers_meet_where_only_they_look() -> None:
    """The store of rank 0, and gloo's sockets; as torch opens it, anybody connects to it."""
    outside = own_address()
    environment = os.environ | connect.listen_locally() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", MEET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            of_torch = int(process.stdout.readline())
            assert connects(outside, of_torch), "torch listens at its address alone by itself"
            before = set(listening({process.pid}))
            print(file=process.stdin, flush=True)
            of_ours = int(process.stdout.readline())
            opened = set(listening({process.pid})) - before
            assert of_ours in opened and len(opened) == 2  # The store's, and gloo's.
            assert all(connects(LOOPBACK, port) for port in opened)
            assert not any(connects(outside, port) for port in opened)
        finally:
            process.stdin.close()


def test_an_address_of_another_machine_is_left_to_torch() -> None:
    from raystill.train.worker import rendezvous

    assert rendezvous._listening_socket("203.0.113.7", 0) is None
    with rendezvous._listening_socket(LOOPBACK, 0) as found:  # type: ignore[union-attr]
        assert found.getsockname()[0] == LOOPBACK
