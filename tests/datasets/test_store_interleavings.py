"""Upkeep beside upkeep and runs, step by step: no published answer is lost, nothing foreign goes.

A state machine runs the store's own code in threads of which only one moves at a time. Each
listing, opening, publishing, setting aside, deleting and putting back of a file is a step, and the
strategy says who takes the next. Two pairs of processes are stepped through exhaustively beside it.

These two fail on the upkeep from before the lease, which read nothing again: one ``compact``
publishes the merged segment M of X1 and X2. A second one takes its catalogue of X1, X2 and M, and
counts the rows of M as duplicates of those in X1 and X2. The first removes X1 and X2. The second
finds both gone, skips them, has nothing to keep of M, and removes M: all rows are lost. With a run:
``prune`` reads a damaged segment again, a run replaces it, ``prune`` deletes the replacement.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raystill.base.errors import RunError
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store import lease, reading, removal
from raystill.datasets.store import store as store_module
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Provenance
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from tests.datasets.test_store import TOPK, key, keys_of, origin, segment

POORER = Signal("topk", 4)
ENGINES = ("0.32.0", "0.33.0")
ROWS = range(6)
CURRENT = threading.local()


class Actor:
    """One process: its code runs in a thread that stops before each operation on a file."""

    def __init__(self, path: str, work: Callable[[TeacherStore], Any]) -> None:
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.next = "start"
        self.ended = False
        self.failed: BaseException | None = None
        self.store = TeacherStore(path)
        for name in ("names", "listing", "open", "ending", "put", "stamp"):
            setattr(self.store, name, self.stepped(name))
        self.thread = threading.Thread(target=self.run, args=(work,), daemon=True)
        self.thread.start()
        self.stopped.acquire()

    def run(self, work: Callable[[TeacherStore], Any]) -> None:
        CURRENT.actor = self
        try:
            self.pause("start")
            work(self.store)
        except BaseException as error:
            self.failed = error
        self.ended = True
        self.stopped.release()

    def pause(self, before: str) -> None:
        self.next = before
        self.stopped.release()
        self.go.acquire()

    def stepped(self, name: str) -> Callable[..., Any]:
        operation = getattr(self.store, name)

        def stops_first(*given: Any) -> Any:
            self.pause(name)
            return operation(*given)

        return stops_first

    def step(self) -> None:
        self.go.release()
        self.stopped.acquire()

    def finish(self) -> None:
        while not self.ended:
            self.step()
        self.thread.join()


@contextmanager
def stepped_world() -> Iterator[None]:
    """Removal stops before each of its steps; retries do not wait; one reader a store."""

    def stepping(name: str) -> Callable[..., Any]:
        operation = getattr(removal, name)

        def stops_first(*given: Any) -> Any:
            if (actor := getattr(CURRENT, "actor", None)) is not None:
                actor.pause(name)
            return operation(*given)

        return stops_first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "RETRY_PAUSES_S", ())
        patch.setattr(store_module, "READERS", 1)
        for name in ("set_aside", "put_back", "discard"):
            patch.setattr(removal, name, stepping(name))
        yield


@contextmanager
def no_lock(_: lease.Lease) -> Iterator[None]:
    yield


class Interleavings(RuleBasedStateMachine):
    """compact x compact x prune x runs, in any order of steps."""

    with_lease = True

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.world = stepped_world()
        self.world.__enter__()
        self.patch = pytest.MonkeyPatch()
        if not self.with_lease:
            self.patch.setattr(lease.Lease, "held", no_lock)
        self.store = TeacherStore(f"{self.root}/store")
        self.folder = Path(self.store.path) / SEGMENTS
        self.folder.mkdir(parents=True)
        self.foreign = self.folder / "notes.parquet"
        self.foreign.write_bytes(b"somebody's table")
        self.actors: list[Actor] = []
        self.seen: dict[tuple[int, int, int], list[tuple[bytes, Signal, list[int]]]] = {}
        self.published: dict[tuple[int, Signal], list[list[int]]] = {}

    def teardown(self) -> None:
        try:
            for actor in self.actors:
                actor.finish()
            for actor in self.actors:
                assert actor.failed is None or isinstance(actor.failed, RunError), actor.failed
            compact(self.store)
            self.check(self.readable())
            damaged = verify(self.store)
            prune(self.store, damaged, None, dry_run=False)
            self.check(self.readable())
            assert list(verify(self.store)) == [self.foreign.name]
        finally:
            self.patch.undo()
            self.world.__exit__(None, None, None)
            shutil.rmtree(self.root)

    @initialize(groups=st.permutations([[0], [1, 2], [3], [0, 4]]), compactions=st.integers(0, 2))
    def runs_have_published(self, groups: list[list[int]], compactions: int) -> None:
        for rows in groups[:3]:
            self.run_publishes(rows, TOPK, ENGINES[0], 0, True)
        for _ in range(compactions):
            self.compaction_starts()

    def run_publishes(
        self, rows: list[int], signal: Signal, engine: str, salt: int, at_once: bool
    ) -> None:
        source = replace(origin(signal), engine_version=engine)

        def work(store: TeacherStore) -> None:
            answers = segment(rows, signal, salt)
            _, kept = store.publish(source, Provenance("run", "training"), answers)
            for row, ids in zip(rows, kept["response_ids"].to_pylist(), strict=True):
                self.published.setdefault((row, signal), []).append(ids)

        self.start(work, at_once)

    @rule(
        rows=st.lists(st.sampled_from(ROWS), min_size=1, max_size=3, unique=True),
        signal=st.sampled_from((TOPK, POORER)),
        engine=st.sampled_from(ENGINES),
        salt=st.integers(0, 2),
        at_once=st.booleans(),
    )
    def a_run_publishes(self, **what: Any) -> None:
        self.run_publishes(**what)

    @precondition(lambda self: len(self.actors) < 4)
    @rule()
    def compaction_starts(self) -> None:
        self.start(compact)

    @precondition(lambda self: len(self.actors) < 4)
    @rule()
    def pruning_starts(self) -> None:
        self.start(lambda store: prune(store, verify(store), None, dry_run=False))

    @precondition(lambda self: self.actors)
    @rule(
        which=st.integers(0, 3),
        until=st.sampled_from(("any", "listing", "open", "put", "set_aside", "discard", "end")),
    )
    def goes_on(self, which: int, until: str) -> None:
        """One of the processes takes steps until its next one is of a kind; at least one."""
        actor = self.actors[which % len(self.actors)]
        while not actor.ended:
            actor.step()
            self.check(self.readable())
            if until in ("any", actor.next):
                break
        if actor.ended:
            self.actors.remove(actor)
            assert actor.failed is None or isinstance(actor.failed, RunError), actor.failed

    @rule(salt=st.integers(0, 2))
    def a_torn_segment_is_replaced_later(self, salt: int) -> None:
        """A file of a name that a run will want: its writer's disk lost the content."""
        rows = [0, 1 + salt]
        name = store_module.segment_name([key(row) for row in rows], TOPK)
        if not (self.folder / name).exists():
            (self.folder / name).write_bytes(b"torn")

    @invariant()
    def nothing_foreign_is_touched(self) -> None:
        assert self.foreign.read_bytes() == b"somebody's table"

    def start(self, work: Callable[[TeacherStore], Any], at_once: bool = False) -> None:
        actor = Actor(self.store.path, work)
        if at_once:
            actor.finish()
            assert actor.failed is None, actor.failed
            self.check(self.readable())
        elif len(self.actors) < 4:
            self.actors.append(actor)
        else:
            actor.finish()

    def readable(self) -> dict[tuple[bytes, Signal], list[list[int]]]:
        """Every answer in the segments, and in those set aside, by key and signal."""
        found: dict[tuple[bytes, Signal], list[list[int]]] = {}
        for path in self.folder.iterdir():
            if path == self.foreign or path.suffix not in (".parquet", ".aside"):
                continue
            stat = path.stat()
            file = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if file not in self.seen:
                self.seen[file] = self.answers_in(path.name)
            for k, signal, ids in self.seen[file]:
                found.setdefault((k, signal), []).append(ids)
        return found

    def answers_in(self, name: str) -> list[tuple[bytes, Signal, list[int]]]:
        try:
            file = self.store.open(name)
            signal = file.footer.origin.signal
            groups = range(len(file.footer.groups))
            tables = [file.read(group, ["key", "response_ids"]) for group in groups]
        except reading.DamagedSegment:
            return []
        columns = [[rows[name].to_pylist() for name in rows.column_names] for rows in tables]
        return [(k, signal, ids) for of in columns for k, ids in zip(*of, strict=True)]

    def check(self, found: dict[tuple[bytes, Signal], list[list[int]]]) -> None:
        """Each published key is there, at least as rich, with an answer that was published."""
        for (row, signal), _ in list(self.published.items()):
            good = [
                ids
                for (k, stored), all_ids in found.items()
                if k == key(row) and stored.serves(signal)
                for ids in all_ids
            ]
            assert good, f"row {row} is lost"
            given = [
                ids for (r, _), all_ids in self.published.items() if r == row for ids in all_ids
            ]
            assert all(ids in given for ids in good), f"row {row} has another answer"


class WithoutLease(Interleavings):
    """The same where no lease holds: a file system that has no locks, or two that saw none."""

    with_lease = False


@pytest.mark.parametrize("rows", [([0, 1], [1, 2]), ([3], [4], [3, 4])], ids=str)
def test_two_compactions_lose_nothing_wherever_the_second_is_stopped(
    rows: tuple[list[int], ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One stops before it removes its first input, the other after each number of its steps."""
    monkeypatch.setattr(lease.Lease, "held", no_lock)
    with stepped_world():
        for number in range(60):
            store = TeacherStore(str(tmp_path / str(number)))
            for salt, of_group in enumerate(rows):
                answers = segment(of_group, salt=salt)
                store.publish(origin(), Provenance("run", "training"), answers)
            first, second = (Actor(store.path, compact) for _ in range(2))
            while not first.ended and first.next != "set_aside":
                first.step()
            for _ in range(number):
                if not second.ended:
                    second.step()
            last = second.ended
            first.finish()
            second.finish()
            assert (first.failed, second.failed) == (None, None)
            keys = keys_of(sorted({row for of_group in rows for row in of_group}))
            assert store.catalogue().locate(keys).min() >= 0, f"lost after {number} steps"
            assert verify(store) == {}
            if last:
                break


def test_what_a_run_put_in_the_place_of_a_damaged_segment_is_never_pruned(tmp_path: Path) -> None:
    """Whatever number of steps ``prune`` has taken when the run replaces the damaged segment."""
    with stepped_world():
        for number in range(60):
            store = TeacherStore(str(tmp_path / str(number)))
            name, answers = store.publish(origin(), Provenance("run", "training"), segment([1]))
            (Path(store.path) / SEGMENTS / name).write_bytes(b"torn")
            damaged = verify(store)
            pruning = Actor(store.path, lambda s, d=damaged: prune(s, d, None, dry_run=False))
            for _ in range(number):
                if not pruning.ended:
                    pruning.step()
            last = pruning.ended
            store.publish(origin(), Provenance("run", "training"), answers)
            pruning.finish()
            assert pruning.failed is None
            assert store.catalogue().locate(keys_of([1])).min() >= 0, f"lost after {number} steps"
            assert verify(store) == {}
            if last:
                break


FEW = settings(
    max_examples=12,
    stateful_step_count=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestWithLease = Interleavings.TestCase
TestWithLease.settings = FEW
TestWithoutLease = WithoutLease.TestCase
TestWithoutLease.settings = FEW
