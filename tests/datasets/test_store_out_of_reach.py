"""A store that cannot be read at the moment, and segments of a newer version: never deleted."""

import io
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.commands.store import store_command
from raystill.datasets.lookup import view as store_view
from raystill.datasets.lookup.view import Lookup, StoreView
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.store import reading
from raystill.datasets.store import segment as segments
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    NewerSegment,
    UnreadableSegment,
    UnusableSegment,
)
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from tests.datasets.test_store import TOPK, answers, keys_of, path_of, publish, rewritten, segment

COLUMNS = ["key", "response_ids", "topk_ids"]
OTHER_FOOTERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda footer: footer.update(schema_version=2),
    "field": lambda footer: footer["groups"][0].update(paid_at="noon"),
    "kind": lambda footer: footer["origin"]["signal"].update(kind="attention"),
    "column": lambda footer: footer["groups"][0]["checksums"].update(attention="00"),
}


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RETRY_PAUSES_S", (0.001, 0.001, 0.001))


class Stuttering(io.FileIO):
    """A file whose reads fail, or come short, once ``sound`` have come: the first is the footer."""

    def __init__(self, path: Path, how: str, sound: int) -> None:
        super().__init__(path)
        self.how, self.sound, self.reads = how, sound, 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        data = super().read(size)
        if self.reads <= self.sound:
            return data
        if self.how == "short":
            return data[:-1]
        raise OSError(5, "SlowDown: please reduce your request rate")


class Network:
    """Opening or reading the files named fails so many more times; counts the tries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, int] = {}
        self.how = "read"
        self.sound = 1
        self.tried: list[str] = []
        self._lock = threading.Lock()
        opened = RunFolder.open_input

        def open_input(folder: RunFolder, name: str) -> pa.NativeFile:
            base = name.removeprefix(f"{SEGMENTS}/")
            with self._lock:
                self.tried.append(base)
                fails = self.failing.get(base, 0)
                self.failing[base] = max(0, fails - 1)
            if not fails:
                return opened(folder, name)
            if self.how == "open":
                raise OSError(5, "SlowDown: please reduce your request rate")
            return pa.PythonFile(
                Stuttering(Path(folder.path) / name, self.how, self.sound), mode="r"
            )

        monkeypatch.setattr(RunFolder, "open_input", open_input)
        # As of large ones, footer and rows come apart.
        monkeypatch.setattr(segments, "READ_WHOLE_BYTES", 0)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def view_of(store: TeacherStore, rows: list[int]) -> StoreView:
    return StoreView(store, pa.chunked_array([keys_of(rows)]), TOPK)


def look_up(view: StoreView, rows: list[int]) -> Lookup:
    return view.look_up(np.arange(len(rows)), pa.nulls(len(rows), TOKEN_IDS))


def make_newer(store: TeacherStore, name: str, change: str = "version") -> bytes:
    data = rewritten(path_of(store, name).read_bytes(), OTHER_FOOTERS[change]).to_pybytes()
    path_of(store, name).write_bytes(data)
    return data


@pytest.mark.parametrize("kind", [DamagedSegment, UnreadableSegment, NewerSegment, GoneSegment])
def test_what_cannot_be_used_says_so_in_another_process_too(kind: type[UnusableSegment]) -> None:
    again = pickle.loads(pickle.dumps(kind("a.parquet", "torn")))
    assert (type(again), again.name, again.why) == (kind, "a.parquet", "torn")
    assert str(again) == "segment a.parquet: torn"


@pytest.mark.parametrize("whole", [False, True])
def test_arrows_threads_never_hold_a_file_of_pythons(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """One that lets go of it while the interpreter ends aborts the process (status 134)."""
    monkeypatch.setattr(segments, "THREADS_BYTES", 0)
    monkeypatch.setattr(segments, "READ_WHOLE_BYTES", (1 << 20) * whole)
    name = publish(store, list(range(8)))
    threads: list[int] = []
    read_buffer = reading.WatchedSource.read_buffer

    def seen(source: reading.WatchedSource, nbytes: int = -1) -> pa.Buffer:
        threads.append(threading.get_ident())
        return read_buffer(source, nbytes)

    monkeypatch.setattr(reading.WatchedSource, "read_buffer", seen)
    file = store.open(name)
    opening = len(threads)
    assert file.read(0, ["key", *COLUMNS]).num_rows == 8
    assert opening and len(threads) == opening, "the rows came another way"
    assert set(threads) == {threading.get_ident()}


def test_segments_are_read_by_many_threads_only_where_reading_waits() -> None:
    names = [f"{number}.parquet" for number in range(40)]
    shown: list[tuple[int, int]] = []

    def at_once(name: str) -> tuple[str, int]:
        return name, threading.get_ident()

    def waiting(name: str) -> tuple[str, int]:
        time.sleep(0.002)
        return at_once(name)

    for read, alone in ((at_once, True), (waiting, False)):
        shown.clear()
        found = reading.read_each(read, names, lambda *done: shown.append(done), threads=8)
        assert list(found) == names == [name for name, _ in found.values()]
        assert shown == [(number, 40) for number in range(1, 41)]
        assert ({ident for _, ident in found.values()} == {threading.get_ident()}) == alone
    tried: list[str] = []

    def failing(name: str) -> UnreadableSegment:
        tried.append(name)
        return UnreadableSegment(name, "busy")

    assert set(map(type, reading.read_each(failing, names, threads=8).values())) == {
        UnreadableSegment
    }
    assert sorted(tried) == sorted(names * (1 + len(reading.RETRY_PAUSES_S)))


def test_what_is_damaged_is_so_whichever_way_it_is_read(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "THREADS_BYTES", 0)
    name = publish(store, list(range(8)))
    data = path_of(store, name).read_bytes()
    for whole in (0, 1 << 20):
        monkeypatch.setattr(segments, "READ_WHOLE_BYTES", whole)
        for place in range(10, len(data) // 2, 97):
            altered = bytearray(data)
            altered[place] ^= 1
            path_of(store, name).write_bytes(altered)
            assert isinstance(verify(store).get(name), DamagedSegment | None)
        assert isinstance(verify(store).get(name), DamagedSegment)
        path_of(store, name).write_bytes(data)
        assert verify(store) == {}


class TestUnreadable:
    @pytest.fixture(params=["open", "read", "short", "read whole", "short whole", "read threads"])
    def how(
        self, request: pytest.FixtureRequest, network: Network, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        network.how, _, way = request.param.partition(" ")
        if way == "threads":
            monkeypatch.setattr(segments, "THREADS_BYTES", 0)
        if way == "whole":
            monkeypatch.setattr(segments, "READ_WHOLE_BYTES", 1 << 20)
            network.sound = 0
        yield network.how

    def test_it_is_no_damage_and_is_never_deleted(
        self, store: TeacherStore, network: Network, how: str, capsys
    ) -> None:
        name, other = publish(store, [1, 2]), publish(store, [3])
        network.failing = {name: 999}
        assert {n: type(flaw) for n, flaw in verify(store).items()} == {name: UnreadableSegment}
        pruned = prune(store, verify(store), "abc", dry_run=False)
        assert (pruned.files, list(pruned.refused)) == ([other], [name])
        assert store_command("verify", store.path) == 3
        shown = capsys.readouterr().out
        assert "0 damaged, 1 unreadable" in shown
        assert "bytes came" in shown if how == "short" else "SlowDown" in shown
        assert "see to the connection, the disk and the rights, and run this again" in shown
        assert store_command("prune", store.path) == 3
        assert "1 segment unreadable" in (shown := capsys.readouterr().out)
        assert "0 files removed" in shown
        network.failing = {}
        assert verify(store) == {}
        assert store.catalogue().rows == 2

    @pytest.mark.usefixtures("how")
    def test_one_that_is_reached_at_a_later_try_is_read(
        self, store: TeacherStore, network: Network
    ) -> None:
        rows = [1, 2, 3]
        name = publish(store, rows)
        network.failing = {name: 3}
        assert store.catalogue().refused == {}
        network.failing = {name: 3}
        assert verify(store) == {}
        view = view_of(store, rows)
        network.failing = {name: 3}
        lookup = look_up(view, rows)
        assert len(lookup.to_ask) == 0
        assert lookup.answered[0][1].equals(answers(rows))
        network.failing = {name: 3}
        assert publish(store, rows, salt=1) == name
        assert store.open(name).read(0, COLUMNS).equals(segment(rows).select(COLUMNS))

    @pytest.mark.usefixtures("how")
    def test_one_that_stays_away_is_passed_over_for_a_while(
        self, store: TeacherStore, network: Network, monkeypatch: pytest.MonkeyPatch, caplog
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(store_view, "time", SimpleNamespace(monotonic=lambda: now))
        rows, other = [1, 2], [3]
        name = publish(store, [*rows, 4])
        publish(store, other)
        view = view_of(store, [*rows, *other])
        network.failing = {name: 999}
        lookup = look_up(view, [*rows, *other])
        assert lookup.to_ask.tolist() == [0, 1]
        assert lookup.answered[0][1].equals(answers(other))
        assert name in caplog.text
        network.failing, network.tried = {}, []
        now += store_view.RETRY_UNREADABLE_S - 1
        assert look_up(view, [*rows, *other]).to_ask.tolist() == [0, 1]
        assert network.tried.count(name) == 0
        now += 1
        with monkeypatch.context() as patch:
            patch.setattr(store, "_files", Path("/nowhere").read_text)  # Cannot be listed either.
            assert look_up(view, [*rows, *other]).to_ask.tolist() == [0, 1]
        now += store_view.RETRY_UNREADABLE_S
        assert len(look_up(view, [*rows, *other]).to_ask) == 0

    def test_one_out_of_reach_from_the_start_comes_back_too(
        self, store: TeacherStore, network: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_view, "RETRY_UNREADABLE_S", 0.0)
        name = publish(store, [1, 2])
        network.failing = {name: 4}
        view = view_of(store, [1, 2])
        assert len(look_up(view, [1, 2]).to_ask) == 0

    def test_many_groups_at_once_look_the_store_through_once(
        self, store: TeacherStore, network: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = publish(store, [1, 2])
        publish(store, [3])
        view = view_of(store, [1, 2, 3])
        looks = []
        looked = view._index.look_through
        monkeypatch.setattr(
            view._index, "look_through", lambda **o: (looks.append(o), looked(**o))[1]
        )
        network.failing = {name: 999}
        with ThreadPoolExecutor(8) as pool:
            lookups = list(pool.map(lambda _: look_up(view, [1, 2, 3]), range(8)))
        assert [f.to_ask.tolist() for f in lookups] == [[0, 1]] * 8
        assert len(looks) == 1

    def test_it_keeps_its_name_and_the_answers_are_published_under_the_next(
        self, store: TeacherStore, network: Network
    ) -> None:
        rows = [1, 2]
        name = publish(store, rows)
        data = path_of(store, name).read_bytes()
        network.failing = {name: 999}
        other = publish(store, rows, salt=1)
        assert other != name
        assert path_of(store, name).read_bytes() == data
        lookup = look_up(view_of(store, rows), rows)
        assert lookup.answered[0][1].equals(answers(rows, salt=1))
        network.failing = {}
        assert (store.catalogue().rows, store.catalogue().duplicates) == (4, 2)
        assert compact(store).duplicates == 2

    def test_compacting_leaves_it_and_counts_without_it(
        self, store: TeacherStore, network: Network, capsys
    ) -> None:
        rows = list(range(6))
        name = publish(store, rows)
        for row in rows:
            publish(store, [row], salt=1)
        network.failing = {name: 9999}
        assert store_command("compact", store.path) == 0
        assert "6 segments merged into 1, 0 duplicate rows left out" in capsys.readouterr().out
        network.failing = {}
        assert verify(store) == {}
        assert (store.catalogue().rows, store.catalogue().duplicates) == (12, 6)
        assert compact(store).duplicates == 6

    def test_a_folder_that_cannot_be_listed_ends_in_words(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, [1])

        def names(self: TeacherStore) -> list[str]:
            raise OSError("AWS Error NETWORK_CONNECTION during ListObjectsV2")

        monkeypatch.setattr(TeacherStore, "names", names)
        for action in ("list", "verify", "prune", "compact"):
            with pytest.raises(RunError, match=r"NETWORK_CONNECTION.*run this again"):
                store_command(action, store.path)


class TestNewer:
    @pytest.mark.parametrize("change", OTHER_FOOTERS)
    def test_it_is_reported_and_neither_deleted_nor_used(
        self, store: TeacherStore, change: str, capsys
    ) -> None:
        rows = [1, 2]
        name = publish(store, rows)
        data = make_newer(store, name, change)
        assert {n: type(flaw) for n, flaw in verify(store).items()} == {name: NewerSegment}
        assert look_up(view_of(store, rows), rows).to_ask.tolist() == [0, 1]
        assert store_command("verify", store.path) == 4
        shown = capsys.readouterr().out
        assert "0 damaged, 1 of a newer version" in shown
        assert f"schema version {2 if change == 'version' else 1}" in shown
        assert "use the version that wrote them, or a later one" in shown
        assert store_command("prune", store.path, teacher="abc") == 4
        assert store_command("list", store.path) == 0
        assert "schema version" in capsys.readouterr().out
        publish(store, [3])
        publish(store, [4])
        done = compact(store)
        assert (done.merged, list(done.refused)) == (2, [name])
        assert path_of(store, name).read_bytes() == data

    @pytest.mark.parametrize("remote", [False, True], ids=["local", "object store"])
    def test_answers_to_its_rows_are_published_under_the_next_name_and_found(
        self, store: TeacherStore, remote: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [1, 2]
        name = publish(store, rows)
        data = make_newer(store, name)
        view = view_of(store, rows)
        if remote:
            system = pafs.SubTreeFileSystem(store.path, pafs.LocalFileSystem())
            monkeypatch.setattr(RunFolder, "_opened", lambda self: (system, ""))
            monkeypatch.setattr(RunFolder, "is_local", False)
        other = publish(store, rows, salt=1)
        assert publish(store, rows, salt=2) == other
        assert path_of(store, name).read_bytes() == data
        for seen in (view, view_of(store, rows)):  # What a retried group finds, and another run.
            lookup = look_up(seen, rows)
            assert len(lookup.to_ask) == 0
            assert lookup.answered[0][1].equals(answers(rows, salt=1))

    def test_a_merged_segment_does_not_take_its_name(self, store: TeacherStore) -> None:
        name = publish(store, [1, 2])
        data = make_newer(store, name)
        for row in (1, 2):
            publish(store, [row], salt=1)
        assert compact(store).merged == 2
        assert path_of(store, name).read_bytes() == data
        assert len(look_up(view_of(store, [1, 2]), [1, 2]).to_ask) == 0


def test_the_worst_kind_gives_the_status_and_only_damage_goes(
    store: TeacherStore, network: Network, capsys
) -> None:
    damaged, away, newer, _ = (publish(store, [row]) for row in range(4))
    path_of(store, damaged).write_bytes(b"torn")
    make_newer(store, newer)
    network.failing = {away: 999}
    assert store_command("verify", store.path) == 1
    assert "1 damaged, 1 unreadable, 1 of a newer version" in capsys.readouterr().out
    assert store_command("prune", store.path) == 3
    assert "1 file removed" in capsys.readouterr().out
    network.failing = {}
    assert store_command("prune", store.path) == 4
    assert not path_of(store, damaged).exists()
    assert len(store.names()) == 3


def test_what_a_run_has_replaced_since_it_was_verified_stays(store: TeacherStore) -> None:
    name = publish(store, [1])
    path_of(store, name).write_bytes(b"torn")
    refused = verify(store)
    assert publish(store, [1]) == name
    assert prune(store, refused, None, dry_run=False).files == []
    assert verify(store) == {} and store.catalogue().rows == 1


def test_pruning_a_teacher_skips_what_vanishes_meanwhile(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = publish(store, [1])
    names = [*store.names(), "gone.parquet"]
    monkeypatch.setattr(store, "names", lambda: names)
    pruned = prune(store, {}, "abc", dry_run=False)
    assert (pruned.files, pruned.refused) == ([name], {})


def test_one_that_vanishes_between_two_reads_leaves_its_rows_to_be_asked(
    store: TeacherStore,
) -> None:
    name = publish(store, [1])
    publish(store, [2])
    view = view_of(store, [1, 2])
    path_of(store, name).unlink()
    assert look_up(view, [1, 2]).to_ask.tolist() == [0]
    assert publish(store, [1]) == name
    assert len(look_up(view_of(store, [1, 2]), [1, 2]).to_ask) == 0
