"""A replica's place at Serve: its rank, and that it listens at the loopback address alone.

In every replica Ray Serve 2.60 starts a gRPC server on all interfaces, for calls between
deployments: it asks for no token, and unpickles what it is sent. Such calls go another way unless
Serve is told otherwise (``RAY_SERVE_USE_GRPC_BY_DEFAULT``), so nobody connects to it.
"""

import importlib
from typing import Any

LOOPBACK = "127.0.0.1"


def listen_at_loopback() -> None:
    """Let this replica's gRPC server listen at 127.0.0.1; called before the replica is ready.

    Where the cluster's handles use that server, it is left as Ray Serve opens it.
    """
    replica = importlib.import_module("ray.serve._private.replica")
    constants = importlib.import_module("ray.serve._private.constants")
    add_port = replica.add_port_to_grpc_server
    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT or getattr(add_port, "at_loopback", False):
        return

    def add_port_at_loopback(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", LOOPBACK))

    add_port_at_loopback.at_loopback = True  # type: ignore[attr-defined]
    replica.__dict__["add_port_to_grpc_server"] = add_port_at_loopback


def rank_at_serve() -> tuple[int, int]:
    """This replica's number in the deployment, and on its node; from now on it listens locally."""
    from ray import serve

    listen_at_loopback()
    rank = serve.get_replica_context().rank
    return rank.rank, rank.local_rank
