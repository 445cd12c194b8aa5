"""What the stream's tests run against: a teacher that obeys its prompts, and workers that meet.

A prompt is [behaviour, row]; the answer's first token is the row. Workers take their rows as in
training (``StepRows``) and meet after every step, as the collective operations make them.
"""

import asyncio
import importlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.config.stream import FiltersConfig, StreamConfig
from raystill.datasets.filters.function import read_functions
from raystill.datasets.rows.schema import ENGINE, PROMPT_SCHEMA, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.spec import Requester, StreamSpec
from raystill.datasets.stream.stream import build_stream, iterate_groups, uneven_shares
from raystill.model.on_node import ModelSource
from raystill.train.step.rows import StepRows

APP = "teacher-run"
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"
GROUP_ROWS = 8
ROWS_PER_STEP = 16
TOP_K = 4
SEED = 7
PLAIN, RANDOM_DELAY, TOGETHER, LAST, UNUSABLE, TRUNCATED, FAILS_ONCE, KILLS, BROKEN = range(9)
NUM_TOGETHER = 24
NUM_BEFORE_LAST = 20
PATIENCE_S = 180
NUM_PARTS = 4


class EngineDeadError(Exception):
    """Named like vLLM's: the engine is gone, the replica lives."""


class ObedientTeacher:
    """Answers each prompt at once, or does what its first token says."""

    def __init__(self):
        self.now = self.finished = 0
        self.changed = asyncio.Condition()
        self.together = False
        self.failed = set()
        self.rows = {"sample": 0, "score": 0}

    async def restart(self):
        self.finished = 0

    async def sample(self, prompts, signal):
        rows = prompts["prompt_ids"].to_pylist()
        await self.ask("sample", rows)
        return answers_to(rows, signal)

    async def score(self, given, signal):
        rows = given["prompt_ids"].to_pylist()
        await self.ask("score", rows)
        return answers_to(rows, signal, given["response_ids"].to_pylist())

    async def ask(self, method, rows):
        await self.count(now=1)
        try:
            await self.behave({behaviour for behaviour, _ in rows}, rows[0][1])
        finally:
            await self.count(now=-1, finished=1)
        self.rows[method] += len(rows)

    async def answered(self):
        """Rows answered by each method since it was last asked."""
        rows, self.rows = self.rows, {"sample": 0, "score": 0}
        return rows

    async def count(self, now, finished=0):
        async with self.changed:
            self.now += now
            self.finished += finished
            self.changed.notify_all()

    async def behave(self, behaviours, first_row):
        if RANDOM_DELAY in behaviours:
            await asyncio.sleep(np.random.default_rng().uniform(0, 0.03))
        if TOGETHER in behaviours:  # Answers nobody until so many groups are in flight at once.
            async with self.changed:
                await self.changed.wait_for(lambda: self.together or self.now >= NUM_TOGETHER)
                self.together = True
        if LAST in behaviours:  # Answers when so many others were answered since ``restart``.
            async with self.changed:
                await self.changed.wait_for(lambda: self.finished >= NUM_BEFORE_LAST)
            await asyncio.sleep(1.0)  # Ray Data passes on in order what it finds ready in one look.
        if KILLS in behaviours:
            await asyncio.sleep(0.3)
            raise EngineDeadError("the engine core died")
        if BROKEN in behaviours:
            raise ValueError("a mistake in the teacher")
        if FAILS_ONCE in behaviours and first_row not in self.failed:
            self.failed.add(first_row)
            raise EngineDeadError("the engine core died")


def answers_to(rows, signal, given=None):
    """Answers of two tokens, [row, 1], in ``answer_schema``; none for an unusable row.

    ``given``: what is scored instead, which never was cut off as far as the teacher can see.
    """
    told = given or [[row, 1] for _, row in rows]
    tokens = [[] if b == UNUSABLE else ids for (b, _), ids in zip(rows, told, strict=True)]
    floats = [[-0.5] * len(t) for t in tokens]
    ids = [[list(range(signal.width))] * len(t) for t in tokens]
    logprobs = [[[-1.0] * signal.width] * len(t) for t in tokens]
    columns = [
        tokens,
        ["length" if b == TRUNCATED and given is None else "stop" for b, _ in rows],
        ["too_long" if behaviour == UNUSABLE else None for behaviour, _ in rows],
        *{"text": [], "sampled": [floats], "topk": [floats, ids, logprobs, floats]}[signal.kind],
    ]
    engine = {"engine": "obedient", "version": "1", "dtype": "float32", "vocab_size": 100}
    schema = answer_schema(signal).with_metadata({ENGINE: json.dumps(engine)})
    return pa.table(columns, schema=schema)


def write_prompts(folder: RunFolder, name, behaviours, given=None, first_key=0):
    """A prompt table with one row for each behaviour; ``given``: responses they came with."""
    rows = list(range(len(behaviours)))
    prompts = [[int(b), row] for row, b in zip(rows, behaviours, strict=True)]
    sources = [f"source {row % 3}" for row in rows]
    keys = [(first_key + row).to_bytes(16, "big") for row in rows]
    columns = [rows, keys, prompts, sources, given or [None] * len(rows)]
    folder.write_table(name, pa.table(columns, schema=PROMPT_SCHEMA), row_group_size=32)


@ray.remote(num_cpus=0)
def warm() -> None:
    """Leaves behind an idle worker that has imported what the stream's parts need."""
    importlib.import_module("raystill.datasets.stream.stream")
    time.sleep(0.5)  # So that each of several calls has a process of its own.


@dataclass
class Row:
    position: int


class Meeting:
    """Where the ranks of a step wait for each other; tells each whether any has more."""

    def __init__(self, world_size):
        self.votes, self.decision = [], False
        self.barrier = threading.Barrier(world_size, action=self.decide, timeout=PATIENCE_S)

    def decide(self):
        self.decision, self.votes = any(self.votes), []

    def meet(self, has_more):
        self.votes.append(has_more)
        self.barrier.wait()
        return self.decision


class Workers:
    """Workers, a thread each: a call takes one rank's rows step by step and returns what it saw."""

    def __init__(self):
        self.meetings = {}

    def train(self, shard, coordinator, name, attempt, order, rank, world_size, num_steps):
        meeting = self.meetings.setdefault((name, attempt), Meeting(world_size))
        tables = []

        def keep(table):
            tables.append(table)
            return [Row(position) for position in table["position"].to_pylist()]

        rows = StepRows(
            iterate_groups(shard),
            order=order,
            rows_per_step=ROWS_PER_STEP,
            rank=rank,
            world_size=world_size,
            ledger=Ledger(100_000),
            to_rows=keep,
            taken=lambda n: coordinator.taken.remote(attempt, n),
        )
        steps = []
        more = True
        while more and len(steps) != num_steps:
            mine = rows.take(len(steps))
            steps.append([row.position for row in mine])
            more = meeting.meet(rows.has_more)
        return steps, tables


@dataclass
class Streamed:
    """What the ranks saw: positions of each step over all ranks, and their groups."""

    steps: list[list[int]]
    tables: list[pa.Table]
    snapshot: Snapshot

    @property
    def positions(self):
        return sorted(p for step in self.steps for p in step)


class Run:
    """One run's coordinator and stream over prompts of the given behaviours."""

    def __init__(self, folder: Path, behaviours, order, world_size, bound=None, **settings):
        self.num_rows, self.order, self.world_size = len(behaviours), order, world_size
        self.bound = bound or ROWS_PER_STEP + 2 * world_size * GROUP_ROWS
        self.ledger = Ledger(self.num_rows)
        drop_fraction = settings.pop("max_drop_fraction", 0.0)
        filters = FiltersConfig.model_validate(settings.pop("filters", []))
        # Coordinator, splitter, answer stage and source start one after the other; this way their
        # processes start together.
        for _ in range(NUM_PARTS):
            warm.remote()
        self.name = name = f"test-{time.monotonic_ns()}"
        self.coordinator = start_coordinator(
            name,
            self.bound,
            self.num_rows,
            drop_fraction,
            max_rejected_fraction=filters.max_rejected_fraction,
        )
        prompts, given = f"{name}.parquet", settings.pop("given", None)
        store = settings.pop("store", f"{name}-store")
        write_prompts(RunFolder(str(folder)), prompts, behaviours, given)
        self.spec = StreamSpec(
            prompt_table=str(folder / prompts),
            num_rows=self.num_rows,
            order_seed=SEED,
            signal=Signal(settings.pop("kind", "topk"), TOP_K),
            stream=StreamConfig(
                group_rows=GROUP_ROWS, order=order, max_drop_fraction=drop_fraction, **settings
            ),
            max_rows_ahead=self.bound,
            rows_per_step=ROWS_PER_STEP,
            coordinator=self.coordinator,
            app_name=APP,
            groups_in_flight=32,
            store_path=str(folder / store),
            requester=Requester(name, "training", "teacher", "obedient"),
            filters=filters,
            teacher=ModelSource.of("tiny", TINY),  # Its tokenizer is all that is used.
            function_texts=read_functions(filters),
        )

    def start(self, workers, num_steps=None, epoch=0) -> "Run":
        """Let the workers train, at most ``num_steps``; ``wait`` brings what they saw."""
        attempt = ray.get(self.coordinator.publish.remote(epoch, 0, self.ledger.to_dict()))
        shards = uneven_shares(build_stream(self.spec), self.world_size)
        common = (self.coordinator, self.name, attempt, self.order)
        self.calls = [
            workers.train.remote(shard, *common, rank, self.world_size, num_steps)
            for rank, shard in enumerate(shards)
        ]
        return self

    def wait(self) -> Streamed:
        """Fails instead of waiting for ever."""
        results = ray.get(self.calls, timeout=PATIENCE_S)
        steps = zip(*(steps for steps, _ in results), strict=True)
        return Streamed(
            steps=[[p for rank in step for p in rank] for step in steps],
            tables=[table for _, tables in results for table in tables],
            snapshot=ray.get(self.coordinator.snapshot.remote()),
        )

    def stream(self, workers, num_steps=None, epoch=0) -> Streamed:
        return self.start(workers, num_steps, epoch).wait()
