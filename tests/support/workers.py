"""Some gloo workers of a test: forks of one process, which has imported the libraries once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch

# What the workers of all tests import: seconds for each of them, were it not done before.
IMPORTED_ONCE = ["torch.distributed.fsdp", "transformers", "peft", "tests.support.tiny_student"]
TIME_OUT_S = 240.0


def run_workers(
    main: Callable[[int, Path], dict[str, Any]],
    folder: Path,
    workers: int = 2,
    time_out_s: float = TIME_OUT_S,
) -> list[dict[str, Any]]:
    """What ``main(rank, folder)`` returned in each of ``workers`` processes of one gloo group.

    ``main`` is a function of a module, ``folder`` is theirs alone. One that fails ends all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    group = folder / "group"
    group.mkdir()
    processes = [
        context.Process(target=_work, args=(main, rank, folder, group, workers))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    deadline = monotonic() + time_out_s
    try:
        running = list(processes)
        while running and all(not process.exitcode for process in processes):
            left = deadline - monotonic()
            assert wait([process.sentinel for process in running], left), "workers take too long"
            running = [process for process in running if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * workers
    return [torch.load(group / f"{rank}.pt", weights_only=True) for rank in range(workers)]


def _work(
    main: Callable[[int, Path], dict[str, Any]], rank: int, folder: Path, group: Path, workers: int
) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{group}/rendezvous", rank=rank, world_size=workers
        )
        torch.save(main(rank, folder), group / f"{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # Without shutting gloo down, which hangs now and then.
