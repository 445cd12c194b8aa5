"""Processes that Ray Train does not place meet at one address, where alone they are reached."""

import multiprocessing
import os
from typing import Any

import psutil
import torch
import torch.distributed as dist

from raystill.train.worker.rendezvous import free_port, join_group
from tests.support.workers import IMPORTED_ONCE, TIME_OUT_S

HOST = "127.0.0.1"


def member(rank: int, port: int, pipe: Any) -> None:
    join_group("gloo", (HOST, port), rank, 2, TIME_OUT_S)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    open_at = {
        one.laddr.ip
        for one in psutil.Process().net_connections()
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    pipe.send((total.item(), dist.get_rank(), open_at))
    pipe.recv()  # Until both have told: the store is rank 0's.
    os._exit(0)


def test_two_processes_meet_at_the_address_of_the_first() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    port, pipes, processes = free_port(HOST), [], []
    for rank in (0, 1):
        here, there = context.Pipe()
        processes.append(context.Process(target=member, args=(rank, port, there)))
        pipes.append(here)
    for process in processes:
        process.start()
    try:
        assert all(pipe.poll(TIME_OUT_S) for pipe in pipes), "they do not meet"
        assert [pipe.recv() for pipe in pipes] == [(3.0, 0, {HOST}), (3.0, 1, set())]
        for pipe in pipes:
            pipe.send("both have told")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
