"""A row that ends the process of a real vLLM engine, among others of two that ask.

Run as a script this file is the process with the replica; see `told`. Instead of Serve, it starts
the next engine itself when those that asked have been told.
"""

import asyncio
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.schema import ONE_BY_ONE, TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream.teacher_calls import TeacherCalls
from raystill.model.sampling import ResolvedSampling
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.replica import BusyClock, Teacher
from tests.support.end_to_end import ROOT, TEACHER
from tests.support.killing_worker import EXTENSION, KILLS

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(1800)]

SLOTS, TOKENS = 4, 24
GROUPS = [[[5, 17 + 4 * group + row] for row in range(4)] for group in range(5)]
GROUPS[1][1] = [5, KILLS]
NUM_ROWS = sum(map(len, GROUPS))


@pytest.mark.parametrize("method", ["sample", "score"])
def test_one_killer_costs_two_engines_and_is_poison_alone(method: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, method],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    wanted = [["poison" if KILLS in row else None for row in group] for group in GROUPS]
    assert told["errors"] == wanted
    assert (told["engines"], told["one_by_one"] >= 1) == (3, True)
    assert told["asked"] <= NUM_ROWS + SLOTS, "only what was in the first engine is asked again"


class Replicas:
    """One replica after the other, with a real engine each; what a handle of Serve's is."""

    def __init__(self) -> None:
        self.engines = self.asked = self.one_by_one = 0
        self.open = 0
        self.ended = self.changed = False
        self.starting = asyncio.Lock()
        self.sample = SimpleNamespace(remote=lambda *of: self.ask("sample", *of))
        self.score = SimpleNamespace(remote=lambda *of: self.ask("score", *of))

    async def start(self) -> None:
        """The next replica."""
        from raystill.serve.engine.vllm import VllmEngine

        teacher = TeacherConfig.model_validate(
            {
                "model": str(TEACHER),
                "dtype": "float32",
                "max_model_len": 64,
                "max_num_seqs": SLOTS,
                # Three steps of a scored row, too.
                "max_num_batched_tokens": 16,
                "kv_cache_gib": 0.1,
            }
        )
        sampling = ResolvedSampling(0.0, 1.0, 0, 0.0, TOKENS, ())
        engine = VllmEngine(
            EngineSettings(teacher, str(TEACHER), sampling, 1, 8, (0,), extension=EXTENSION)
        )
        await engine.start()
        answered = engine._answered

        async def counted(*of: Any) -> Any:
            self.asked += 1
            return await answered(*of)

        engine._answered = counted  # type: ignore[method-assign]
        self.replica = object.__new__(Teacher)
        self.replica._engine, self.replica._busy = engine, BusyClock()
        self.replica._settings = SimpleNamespace(coordinator=None)  # type: ignore[assignment]
        self.replica._sampling = sampling
        self.replica._ending = SimpleNamespace(  # type: ignore[assignment]
            after=self.end_after, after_error=lambda error: True
        )
        self.engines += 1

    def end_after(self, answers: Any) -> None:
        """As `Ending.after`."""
        self.ended |= self.replica._engine.died  # type: ignore[attr-defined]

    async def ask(self, method: str, rows: pa.Table, signal: Signal) -> pa.Table:
        """A question; the first one that finds the replica ended starts another."""
        async with self.starting:
            if self.ended:
                while self.open:
                    await asyncio.sleep(0.01)
                self.replica._engine.close()
                await self.start()
                self.ended = False
        self.one_by_one += ONE_BY_ONE in rows.column_names
        self.open += 1
        try:
            told: pa.Table = await getattr(self.replica, method)(rows, signal)
            return told
        finally:
            self.open -= 1


async def main(method: str) -> dict[str, Any]:
    """All groups at once, asked by two processes' worth of calls."""
    replicas = Replicas()
    await replicas.start()

    async def teacher() -> Any:
        return replicas

    signal = Signal("topk", 8)
    calls = [TeacherCalls("app", signal, 3, None) for _ in range(2)]
    for one in calls:
        one._teacher = teacher  # type: ignore[method-assign]
    asked = []
    for number, group in enumerate(GROUPS):
        columns = [pa.array(group, TOKEN_IDS)]
        if method == "score":
            columns = [
                pa.array([row + [7] * 20 for row in group], TOKEN_IDS),
                pa.array([[9] * 20 for _ in group], TOKEN_IDS),
            ]
        asked.append(getattr(calls[number % 2], method)(*columns))
    answers = await asyncio.gather(*asked)
    lengths = {len(ids) for table in answers for ids in table["response_ids"].to_pylist()}
    assert lengths == {0, TOKENS if method == "sample" else 20}, lengths
    return {
        "errors": [table["error"].to_pylist() for table in answers],
        "engines": replicas.engines,
        "asked": replicas.asked,
        "one_by_one": replicas.one_by_one,
    }


if __name__ == "__main__":
    prepare_process((0,))
    found = asyncio.run(main(sys.argv[1]))
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)
