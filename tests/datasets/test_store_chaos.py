"""Faults of the data plane by the hundred: no row lost, none wrong, none paid twice but in flight.

A run without Ray: the real store and the real `StoredAnswers`, a teacher that makes its answers up
and never gives the same twice, and beside it two compactors and a pruner that come and go. Faults
are drawn by seed; which thread comes first is not. ``make chaos`` takes 1,000 of them with a fixed
seed; ``CHAOS_FAULTS`` and ``CHAOS_SEED`` set others, for a night.

On an object store, requests are also answered 503 (carried out or not), late, or not at all.
"""

import asyncio
import errno
import json
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base import object_store
from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import ENGINE
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store import reading
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.lease import LEASE
from raystill.datasets.store.reading import DamagedSegment
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from raystill.datasets.stream.answers import StoredAnswers
from raystill.datasets.stream.spec import Requester
from tests.datasets.test_store import keys_of, publish
from tests.support.s3 import KEYS, S3, Request, s3_server

SIGNAL = Signal("sampled")
ROWS, GROUP = 96, 4
FAULTS_A_LIFE = 12
TOLD = {"engine": "made-up", "version": "1", "dtype": "float32", "vocab_size": 1 << 30}
REQUESTER = Requester("run", "training", "abc", "models/teacher")


class Killed(BaseException):
    """The process is gone: nothing after this line runs. It may have ``published``."""

    published = False


class Life:
    """One store from its first row to its last fault."""

    faults = FAULTS_A_LIFE

    def __init__(self, path: str, seed: int) -> None:
        self.path, self.dice = path, random.Random(seed)
        self.left = self.faults
        self.kinds: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.asked: Counter[int] = Counter()
        self.excused: Counter[int] = Counter()
        """Times that a row may have been asked again: it was in flight at a fault, or damaged."""
        self.damaged: set[int] = set()
        self.given: dict[int, set[tuple[int, ...]]] = {}
        self.first: dict[int, tuple[int, ...]] = {}
        self.threads: list[threading.Thread] = []
        self.problems: list[BaseException] = []

    def strikes(self, kind: str, probability: float) -> bool:
        """Whether this fault happens here and now."""
        with self.lock:  # Of all threads.
            if self.left <= 0 or self.dice.random() >= probability:
                return False
            self.left -= 1
            self.kinds[kind] += 1
            return True

    def store(self, who: str) -> TeacherStore:
        """The store, on a disk that gets full, for a process that may be killed as it writes."""
        store = TeacherStore(self.path)
        put = store.put

        def faulty(name: str, data: bytes) -> bool:
            if self.strikes(f"{who}: disk full", 0.03):
                raise OSError(errno.ENOSPC, "No space left on device", name)
            if self.strikes(f"{who}: killed before a file", 0.03):
                if store.folder.is_local:
                    store.folder.write_bytes(f"{SEGMENTS}/.{name}.part", data[: len(data) // 2])
                raise Killed
            done = put(name, data)
            if self.strikes(f"{who}: killed after a file", 0.03):
                killed = Killed()
                killed.published = done
                raise killed
            return done

        store.put = faulty  # type: ignore[method-assign]
        return store

    def upkeep(self, name: str, work: Callable[[TeacherStore], Any]) -> None:
        """Let another process keep the store, beside the run."""
        self.beside(lambda: work(self.store(name)))

    def other_run(self) -> None:
        """Ask for the same rows at once. The answers that are published first are for both."""
        asyncio.run(self.attempt(set(), self.answers(self)))

    def beside(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                work()
            except (RunError, OSError, Killed):
                pass  # Another has the lease; the disk is full; it is dead.
            except BaseException as error:
                self.problems.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)

    def damage(self) -> None:
        """Change a byte of a segment. Its rows have to be paid again, and are not served."""
        store = TeacherStore(self.path)
        try:
            names = store.names()
            if not names:
                return
            name = self.dice.choice(names)
            found = store.keys_of(name)
            data = bytearray(store.folder.read_bytes(f"{SEGMENTS}/{name}"))
        except (OSError, RunError):
            return
        data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        if isinstance(found, tuple):
            for key in pa.chunked_array(found[1], pa.binary(16)).to_pylist():
                row = int.from_bytes(key[8:], "big")
                self.excused[row] += 1
                self.damaged.add(row)
        with suppress(OSError):
            if store.exists(name):  # In place, as a disk does it; not if it was removed meanwhile.
                store.folder.write_bytes(f"{SEGMENTS}/{name}", bytes(data))

    async def sample(self, prompts: pa.Array, keys: pa.Array) -> pa.Table:
        """The teacher. It may die with what it was asked."""
        rows = [ids[0] for ids in prompts.to_pylist()]
        told = []
        for row in rows:
            with self.lock:
                self.asked[row] += 1
                ids = (row, self.asked[row])
            self.given.setdefault(row, set()).add(ids)
            told.append(Answer(np.array(ids, np.int32), "stop", np.array([-1, -2], np.float32)))
        await asyncio.sleep(0)
        if self.strikes("teacher dies", 0.05):
            raise ConnectionError("the teacher died")
        return answers_table(told, SIGNAL).replace_schema_metadata({ENGINE: json.dumps(TOLD)})

    async def attempt(self, done: set[int], answers: StoredAnswers) -> None:
        """Answer what the epoch lacks, until all of it is there or the driver ends."""
        in_flight: dict[asyncio.Task[pa.Table], int] = {}
        groups = [start for start in range(0, ROWS, GROUP) if start not in done]
        random.Random(len(done)).shuffle(groups)
        while groups or in_flight:
            while groups and len(in_flight) < 3:
                start = groups.pop()
                rows = np.arange(start, start + GROUP)
                prompts = pa.array([[int(row), 1] for row in rows], pa.list_(pa.int32()))
                in_flight[asyncio.ensure_future(whole(answers.get(rows, prompts)))] = start
            await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in in_flight if task.done()]:
                start = in_flight.pop(task)
                result = task.result()
                if isinstance(result, pa.Table):
                    self.deliver(start, result)
                    done.add(start)
                    continue
                if not getattr(result, "published", False):  # Else it is never asked for again.
                    self.excuse([start])
                if not isinstance(result, ConnectionError):  # The whole driver ends.
                    self.excuse(in_flight.values())
                    await asyncio.gather(*in_flight)
                    return
                groups.append(start)
            if self.strikes("driver killed", 0.03):
                self.excuse(in_flight.values())
                for task in in_flight:
                    task.cancel()
                await asyncio.gather(*in_flight, return_exceptions=True)
                return

    def excuse(self, starts: Any) -> None:
        """Let the rows of these groups be asked once more."""
        with self.lock:
            for start in starts:
                for row in range(start, start + GROUP):
                    self.excused[row] += 1

    def deliver(self, start: int, answers: pa.Table) -> None:
        """Hold an answered group against what the teacher said."""
        assert answers["error"].null_count == GROUP
        for row, ids in enumerate(answers["response_ids"].to_pylist(), start):
            assert tuple(ids) in self.given[row], f"row {row} has the answer {ids}"
            if row not in self.damaged:
                assert self.first.setdefault(row, tuple(ids)) == tuple(ids), "the first counts"

    def epoch(self) -> None:
        """Every row once, by as many drivers as it takes."""
        done: set[int] = set()
        while len(done) < ROWS // GROUP:
            if self.dice.random() < 0.5:
                self.upkeep("first compactor", compact)
                self.upkeep("second compactor", compact)
            if self.dice.random() < 0.3:
                self.upkeep("pruner", lambda s: prune(s, verify(s), None, dry_run=False))
            if not self.damaged and self.strikes("segment damaged", 0.05):
                self.damage()
            if self.strikes("another run", 0.1):
                mine = set(range(ROWS)) - (self.first.keys() - self.damaged)
                self.excuse({row // GROUP * GROUP for row in mine})  # Both may ask for them.
                self.beside(self.other_run)
            with suppress(OSError):  # The store is away, and the driver does not even begin.
                asyncio.run(self.attempt(done, self.answers(self)))
            self.end_upkeep()
        assert done == set(range(0, ROWS, GROUP))

    def answers(self, teacher: Any) -> StoredAnswers:
        keys = pa.chunked_array([keys_of(list(range(ROWS)))])
        return StoredAnswers(self.store("run"), keys, SIGNAL, REQUESTER, teacher)

    def end_upkeep(self) -> None:
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        self.leases_end()
        assert not self.problems, self.problems

    def leases_end(self) -> None:
        """Let the time pass in which an upkeep that could not give its lease back still has it."""
        folder = TeacherStore(self.path).folder
        while not folder.is_local:
            with suppress(OSError):  # The store may be away.
                if not folder.exists(LEASE):
                    return
                folder.delete(LEASE)

    def run(self) -> None:
        """Epochs until all faults have happened, and what must hold after them."""
        while self.left > 0:
            self.epoch()
        store = self.store("run")
        prune(store, verify(store), None, dry_run=False)  # What is sound of a damaged one goes too.
        self.epoch()
        for row in range(ROWS):
            paid_again = self.asked[row] - 1
            assert paid_again <= self.excused[row], f"row {row}: asked {self.asked[row]} times"
        before = self.asked.copy()
        compact(store)
        self.epoch()
        assert self.asked == before, "what is whole is never asked again"
        # Where the byte was the version's name, the segment is taken for a newer one, and stays.
        assert not [p for p in verify(store).values() if isinstance(p, DamagedSegment)]


class RemoteLife(Life):
    """The same on an object store, with a network before it."""

    faults = 3 * FAULTS_A_LIFE
    away = 0
    """Requests that the store has still to leave unanswered."""

    def trouble(self, _: Request) -> str | None:
        """What becomes of a request."""
        if self.strikes("object store: away", 0.002):
            # A segment that cannot be read is passed over, and each run asks for its rows once
            # more: their answers are stored beside those that were there.
            self.excuse([*range(0, ROWS, GROUP)] * 2)
            self.damaged |= set(range(ROWS))
            self.away = 200
        if self.away > 0 and self.left > 0:
            self.away -= 1
            return "busy"
        for kind in ("busy", "late", "cut", "lost"):
            if self.strikes(f"object store: {kind}", 0.01):
                return kind
        if self.strikes("object store: slow", 0.005):
            time.sleep(0.3)
        return None


async def whole(answering: Any) -> pa.Table | BaseException:
    """The answers, or what ended them: a killed process must not end the test's."""
    try:
        return (await answering)[0]
    except (OSError, RunError, Killed) as error:
        return error


def live(place: Path, seed: int, faults: int) -> Counter[str]:
    """Lives until there were so many faults; how many of each kind."""
    kinds: Counter[str] = Counter()
    while kinds.total() < faults:
        life = Life(f"{place}/store-{seed}", seed)
        try:
            life.run()
        except BaseException as error:
            error.add_note(f"seed {seed}; faults {dict(life.kinds)}")
            raise
        kinds += life.kinds
        seed += 1
    return kinds


def test_a_dozen_faults_cost_nothing_but_what_was_in_flight(tmp_path: Path) -> None:
    assert live(tmp_path, 1, FAULTS_A_LIFE).total() == FAULTS_A_LIFE


@pytest.mark.chaos
@pytest.mark.timeout(3_600)
def test_compactions_that_are_killed_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    """By the system, in processes of their own; nobody puts back what they had set aside."""
    dice = random.Random(int(os.environ.get("CHAOS_SEED", 1)))
    store, killed = TeacherStore(str(tmp_path / "store")), 0
    rows = list(range(240))
    for start in rows[::2]:
        publish(store, [start, start + 1])
    while killed < 20:
        for start in dice.sample(rows[::2], 20):  # Of some rows other answers, too.
            publish(store, [start, start + 1, 1000 + start], salt=killed)
        process = multiprocessing.get_context("fork").Process(target=compact, args=(store,))
        process.start()
        process.join(dice.random())
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        assert store.catalogue().locate(keys_of(rows)).min() >= 0
        assert verify(store) == {}
    compact(store)
    assert verify(store) == {} and store.catalogue().duplicates == 0
    assert not [path for path in (tmp_path / "store" / SEGMENTS).glob("*.aside")]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for module in (reading, object_store):
        monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.01,) * 8)
    with s3_server() as running:
        running.make_bucket("bucket")
        yield running


def remote_lives(s3: S3, seed: int, faults: int) -> Counter[str]:
    """Lives on an object store until there were so many faults."""
    kinds: Counter[str] = Counter()
    while kinds.total() < faults:
        life = RemoteLife(s3.uri(f"bucket/store-{seed}"), seed)
        s3.proxy.clear()
        s3.proxy.trouble = life.trouble
        try:
            life.run()
        except BaseException as error:
            error.add_note(f"seed {seed}; faults {dict(life.kinds)}")
            raise
        finally:
            s3.proxy.trouble = lambda _: None
        kinds += life.kinds
        seed += 1
    return kinds


@pytest.mark.chaos
@pytest.mark.timeout(36_000)
def test_faults_of_an_object_store_cost_nothing_but_what_was_in_flight(s3: S3) -> None:
    """A quarter of the faults of a disk: each request goes through a server in this process."""
    seed, faults = (
        int(os.environ.get(f"CHAOS_{n}", d)) for n, d in (("SEED", 1), ("FAULTS", 1000))
    )
    kinds = remote_lives(s3, seed, faults // 4)
    print(
        f"{kinds.total()} faults: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    )
    assert len(kinds) >= 12 or faults < 500, kinds


@pytest.mark.chaos
@pytest.mark.timeout(36_000)
def test_a_thousand_faults_cost_nothing_but_what_was_in_flight(tmp_path: Path) -> None:
    seed, faults = (
        int(os.environ.get(f"CHAOS_{n}", d)) for n, d in (("SEED", 1), ("FAULTS", 1000))
    )
    kinds = live(tmp_path, seed, faults)
    print(
        f"{kinds.total()} faults: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    )
    assert len(kinds) >= 9 or faults < 500, kinds
