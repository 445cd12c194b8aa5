"""The end of a real engine's process: at once for who asks it, and with a replica that is killed.

Each test is one engine in a process of its own, without Ray. Run as a script this file is that
process.
"""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.schema import LOST
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.lifetime import has_ended
from raystill.serve.engine.weights import EXTENSION
from tests.serve.test_lifetime import ends
from tests.support.end_to_end import ROOT, TEACHER

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
AT_ONCE_S = 20.0
"""The aim is a second. A row that nobody answers waits for its time, a probe for a minute."""


def test_whoever_asks_an_engine_just_after_it_was_killed_is_told() -> None:
    """vLLM had not seen its end, and never answered what was sent to it in that moment."""
    done = subprocess.run(
        [sys.executable, __file__, "kill"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["probe"] == found["weights"] == "EngineDeadError"
    assert found["row"] == LOST
    assert max(found["seconds"]) < AT_ONCE_S


def test_an_engine_that_is_being_loaded_ends_with_its_replica() -> None:
    replica = subprocess.Popen([sys.executable, __file__, "load"], env=ENVIRONMENT)
    try:
        engine = engine_of(replica)
        time.sleep(1)  # It imports vLLM now, for some seconds.
    finally:
        replica.kill()
        replica.wait()
    assert ends(engine, within_s=120)


def engine_of(replica: "subprocess.Popen[bytes]") -> psutil.Process:
    """The first process that it starts in vLLM's own way."""
    while replica.poll() is None:
        for child in psutil.Process(replica.pid).children():
            if "multiprocessing.spawn" in " ".join(child.cmdline()):
                return child
        time.sleep(0.02)
    raise AssertionError("it started no engine")


def _fork_and_sleep() -> None:
    os.fork()
    time.sleep(600)


def test_the_end_of_a_process_is_seen_though_a_child_of_it_holds_the_pipe_that_vllm_watches() -> (
    None
):
    from vllm.v1.engine.utils import CoreEngineProcManager

    process = multiprocessing.get_context("spawn").Process(target=_fork_and_sleep)
    process.start()
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.02)
    manager = object.__new__(CoreEngineProcManager)
    manager.processes = [process]
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
    engine = SimpleNamespace(errored=False, engine_core=core)
    assert not has_ended(engine)
    try:
        process.kill()
        deadline = time.monotonic() + 30
        while not has_ended(engine):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not wait([process.sentinel], timeout=0.5)
    finally:
        children[0].kill()


async def main(kill: bool) -> None:
    """Start an engine; kill it, and ask it for a row, new weights, and a sign of life."""
    from raystill.serve.engine.vllm import VllmEngine

    teacher = TeacherConfig.model_validate(
        {"model": str(TEACHER), "max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 0.1}
    )
    sampling = ResolvedSampling(0.0, 1.0, 0, 0.0, 8, ())
    engine = VllmEngine(
        EngineSettings(teacher, str(TEACHER), sampling, 1, 1, (0,), extension=EXTENSION)
    )
    await engine.start()
    assert kill, "it was to be killed while it started"
    (process,) = engine._engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)
    began, seconds = time.monotonic(), []

    async def told(work: Any) -> Any:
        try:
            return await work
        except Exception as error:
            return type(error).__name__
        finally:
            seconds.append(time.monotonic() - began)

    rows = engine.sample([np.array([5, 17], np.int32)], Signal("text"))
    weights = engine.reload(str(TEACHER / "model.safetensors"), 1)
    row, probe, weights = await asyncio.gather(told(rows), told(engine.probe()), told(weights))
    found = {"row": row[0].error, "probe": probe, "weights": weights, "seconds": seconds}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    prepare_process((0,))
    os.environ["HF_HUB_OFFLINE"] = "1"
    asyncio.run(main(sys.argv[1] == "kill"))
