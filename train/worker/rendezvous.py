"""Where student workers meet: torch's key-value store, reachable at the node's own address only.

The store of rank 0 has no password, and torch lets it listen on every interface of its machine, so
that anybody who reaches it could read and change what the ranks agree on. It is given a socket
here, which listens where the other ranks look for it: for a cluster of this machine alone, which
has the address 127.0.0.1, nobody else can connect.
"""

import importlib
import os
import socket
from datetime import timedelta
from typing import Any


def meet_at_node_address() -> None:
    """Let the stores that this process opens from now on listen at the address they are given.

    An address that is none of this machine's, as of a container behind its host's, is left to
    torch, which then listens on all of them.
    """
    from torch.distributed import TCPStore

    # The name of the module in its package is that of a function.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")

    class NodeStore(TCPStore):
        """The store on a socket of the given address."""

        def __init__(
            self, host_name: str, port: int, *args: Any, is_master: bool = False, **more: Any
        ) -> None:
            listening = _listening_socket(host_name, port) if is_master else None
            if listening is not None:
                more["master_listen_fd"] = listening.detach()  # The store closes it.
            super().__init__(host_name, port, *args, is_master=is_master, **more)

    rendezvous.__dict__["TCPStore"] = NodeStore


def join_group(
    backend: str, address: tuple[str, int], rank: int, world_size: int, timeout_s: float
) -> None:
    """Make this process a member of a group that Ray Train does not place.

    address: where rank 0 opens the store. Waits until all ranks have called this.
    """
    import torch.distributed as dist

    meet_at_node_address()
    host, port = address
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    dist.init_process_group(
        backend, "env://", timedelta(seconds=timeout_s), world_size=world_size, rank=rank
    )


def free_port(host: str) -> int:
    """A port of this machine on which nobody listens now."""
    with socket.create_server(
        (host, 0), family=socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    ) as listening:
        return int(listening.getsockname()[1])


def _listening_socket(host: str, port: int) -> socket.socket | None:
    """A socket that listens at this address; None if it is not one of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError:
        return None
