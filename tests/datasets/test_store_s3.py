"""The store on S3: the first published counts, through delays, 503s and broken connections."""

import io
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base import object_store
from raystill.base.errors import RunError
from raystill.base.object_store import objects_of
from raystill.base.run_folder import RunFolder
from raystill.cluster.check import output
from raystill.cluster.check.output import check_store
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.store import lease as lease_module
from raystill.datasets.store import reading
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Provenance
from raystill.datasets.store.lease import LEASE, Lease
from raystill.datasets.store.segment import segment_name
from raystill.datasets.store.store import SEGMENTS, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from tests.datasets.test_store import TOPK, answers, key, keys_of, origin, segment
from tests.support.s3 import KEYS, S3, Request, s3_server

NUMBERS = count()
Published = tuple[str, pa.Table]


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        running.make_bucket("bucket")
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    monkeypatch.setattr(object_store, "BUSY_RETRIES", 4)
    monkeypatch.setattr(output, "REMOTE_WAIT_S", 60.0)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.05)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for module in (reading, object_store):
        monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.01,) * 8)
    server.proxy.clear()
    yield server
    server.proxy.trouble, server.proxy.latency_s = lambda _: None, 0.0
    server.proxy.without_conditions = None


@pytest.fixture
def store(s3: S3) -> TeacherStore:
    return TeacherStore(s3.uri(f"bucket/{next(NUMBERS)}/store"))


def publish(store: TeacherStore, rows: list[int], salt: int = 0) -> Published:
    return store.publish(origin(), Provenance("run", "training"), segment(rows, salt=salt))


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """The results of works that begin at the same moment, each in a thread."""
    ready = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(lambda work: (ready.wait(), work())[1], works))


def path_of(rows: list[int]) -> str:
    return segment_name([key(row) for row in rows], TOPK)


def test_a_segment_is_published_with_one_request(store: TeacherStore, s3: S3) -> None:
    publish(store, [1])  # The first asks for nothing more, either.
    publish(store, [2, 3])
    assert [method for method, _ in s3.proxy.requests] == ["PUT", "PUT"]
    s3.proxy.clear()
    RunFolder(s3.uri("bucket/run")).write_text("metrics.jsonl", "{}")
    assert [method for method, _ in s3.proxy.requests] == ["PUT"]


def test_of_writers_of_one_key_the_first_counts_for_all(store: TeacherStore, s3: S3) -> None:
    s3.proxy.latency_s = 0.02
    for row in range(8):
        works = [lambda salt=salt, row=row: publish(store, [row], salt) for salt in range(3)]
        first, *others = at_once(*works)
        stored = store.open(first[0]).read(0, first[1].column_names)
        for name, rows in (first, *others):
            assert (name, rows.to_pylist()) == (first[0], stored.to_pylist()), row
    assert len(store.names()) == 8


@pytest.mark.parametrize("path", ["my%20store", "%C3%A4", "100%25", "a%23b"])
def test_a_path_with_escapes_is_one_place_for_both_libraries(s3: S3, path: str) -> None:
    store = TeacherStore(s3.uri(f"bucket/{next(NUMBERS)}/{path}"))
    assert output.check_store(store.path) == ([], [])
    first = publish(store, [1, 2])
    assert store.names() == [first[0]] and store.catalogue().rows == 2
    assert publish(store, [1, 2], salt=1)[1].equals(first[1])


def test_a_place_that_the_libraries_read_differently_is_refused(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.uri(f"bucket/{next(NUMBERS)}/store")
    other = RunFolder(s3.uri(f"bucket/{next(NUMBERS)}/elsewhere")).objects()
    assert other is not None
    monkeypatch.setattr(RunFolder, "objects", lambda _: other)
    (problem,), _ = output.check_store(uri)
    assert "is not found again" in problem.message
    with pytest.raises(OSError, match="not for reading"):
        for salt in range(2):
            publish(TeacherStore(uri), [1], salt)


def test_a_file_that_could_not_be_read_whole_replaces_nothing(s3: S3) -> None:
    class Fails(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError("the disk went")
            return super().read(4)

    folder = RunFolder(s3.uri(f"bucket/{next(NUMBERS)}/run"))
    folder.write_bytes("lines", b"what was there")
    with pytest.raises(OSError, match="the disk went"):
        folder.write_bytes("lines", Fails(b"new content"))
    assert folder.read_bytes("lines") == b"what was there"


def test_connections_are_used_again(store: TeacherStore, s3: S3) -> None:
    for row in range(20):
        name, _ = publish(TeacherStore(store.path), [row])
        TeacherStore(store.path).open(name).read(0, ["key"])
    assert len(s3.proxy.requests) >= 60
    assert s3.proxy.connections <= 4


@pytest.mark.parametrize("seed", range(2))
def test_delays_503s_and_broken_connections_lose_and_change_nothing(
    store: TeacherStore, s3: S3, seed: int
) -> None:
    """A write may be carried out and answered 503: the next try then finds the own segment."""
    generator = random.Random(seed)
    lock = threading.Lock()
    done: Counter[str | None] = Counter()

    def trouble(_: Request) -> str | None:
        with lock:
            kind = generator.choices([None, "busy", "late", "cut", "lost"], [20, 2, 2, 2, 2])[0]
            done[kind] += 1
        return kind

    s3.proxy.trouble, s3.proxy.latency_s = trouble, 0.002

    def writer(salt: int) -> list[Published]:
        return [publish(store, [row, row + 100], salt) for row in range(10)]

    one, two = at_once(lambda: writer(0), lambda: writer(1))
    s3.proxy.trouble = lambda _: None
    assert {"busy", "late", "cut", "lost"} <= set(done)
    for (name, rows), (other, same) in zip(one, two, strict=True):
        stored = store.open(name).read(0, rows.column_names).to_pylist()
        assert (name, rows.to_pylist(), same.to_pylist()) == (other, stored, stored)
    assert len(store.names()) == 10
    assert verify(store) == {}


def test_a_damaged_segment_is_replaced_by_one_of_two_runs(store: TeacherStore, s3: S3) -> None:
    """The other one publishes when this one has judged the damage and is about to write."""
    rows = [1, 2]
    store.folder.write_bytes(f"{SEGMENTS}/{path_of(rows)}", b"torn")
    other: list[Published] = []
    puts = count()

    def trouble(request: Request) -> None:
        if request[0] == "PUT" and next(puts) == 1:  # The first is refused: the name is taken.
            other.append(publish(store, rows, salt=1))

    s3.proxy.trouble = trouble
    name, kept = publish(store, rows)
    assert (name, kept.to_pylist()) == (path_of(rows), other[0][1].to_pylist())
    assert store.open(name).read(0, kept.column_names).to_pylist() == kept.to_pylist()


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_two_that_saw_no_holder_one_has_the_lease(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch, s3: S3, left_behind: bool
) -> None:
    """The first takes it when the second has looked and is about to write: a condition decides.

    left_behind: a lease that has ended is there.
    """
    if left_behind:
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "LEASE_S", -1.0)
            assert Lease(store.folder, "compact")._write(None)
    first = Lease(store.folder, "compact")
    with ExitStack() as inside:
        begun: list[Request] = []

        def trouble(request: Request) -> None:
            if request[0] == "PUT" and LEASE in request[1] and not begun:
                begun.append(request)
                inside.enter_context(first.held())

        s3.proxy.trouble = trouble
        with (
            pytest.raises(RunError, match="is in use by 'store compact'"),
            Lease(store.folder, "prune").held(),
        ):
            pass
        assert begun
        first.confirm()
    assert not store.folder.exists(LEASE)


def test_a_lease_is_renewed_and_its_loss_is_noticed(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_S", 0.3)
    lease, other = Lease(store.folder, "compact"), Lease(store.folder, "prune")
    with lease.held():
        for _ in range(6):
            lease_module.time.sleep(0.08)
            lease.confirm()
        lease_module.time.sleep(0.4)
        with other.held(), pytest.raises(RunError, match="is in use by 'store prune'"):
            lease.confirm()


def test_whoever_meets_a_lease_is_told_when_it_ends(store: TeacherStore, s3: S3) -> None:
    """Its holder may have died, or not have reached the store when it ended."""
    with Lease(store.folder, "compact").held():
        s3.proxy.trouble = lambda request: "busy" if request[0] == "DELETE" else None
    with pytest.raises(RunError, match=r"\(its lease ends in \d+ s, should it have died\)"):
        prune(store, {}, None, dry_run=False)


def test_a_renewal_that_is_done_and_not_confirmed_is_no_loss(
    store: TeacherStore, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server writes it and answers 503, so the next try finds another version than it read."""
    monkeypatch.setattr(lease_module, "LEASE_S", 600.0)
    lease, late = Lease(store.folder, "compact"), []

    def trouble(request: Request) -> str | None:
        if request[0] == "PUT" and LEASE in request[1] and not late:
            late.append(request)
            return "late"
        return None

    with lease.held():
        monkeypatch.setattr(lease_module, "LEASE_S", 1500.0)  # Half of it is over.
        s3.proxy.trouble = trouble
        lease.confirm()
        assert late
        lease.confirm()


@pytest.mark.parametrize("kind", ["late", "cut"])
def test_a_merged_segment_whose_writing_was_not_confirmed_is_published_once(
    store: TeacherStore, s3: S3, kind: str
) -> None:
    """The server writes it, and the next try finds its name taken."""
    first = [publish(store, [row])[0] for row in range(4)]
    troubled: list[Request] = []

    def trouble(request: Request) -> str | None:
        if request[0] == "PUT" and "/segments/" in request[1] and not troubled:
            troubled.append(request)
            return kind
        return None

    s3.proxy.trouble = trouble
    done = compact(store)
    assert troubled and (done.merged, done.into, done.duplicates) == (4, 1, 0)
    (name,) = store.names()
    assert name not in first and verify(store) == {}
    assert store.catalogue().locate(keys_of(list(range(4)))).min() >= 0


def test_upkeep_and_look_up(store: TeacherStore, s3: S3) -> None:
    for row in range(6):
        publish(store, [row])
    name, _ = publish(store, [0, 1], salt=1)
    store.folder.write_bytes(f"{SEGMENTS}/{path_of([9])}", b"torn")
    assert list(verify(store)) == [path_of([9])]
    assert prune(store, verify(store), None, dry_run=False).files == [path_of([9])]
    done = compact(store)
    assert (done.merged, done.into, done.duplicates) == (7, 1, 2)
    found = StoreView(store, pa.chunked_array([keys_of(list(range(6)))]), TOPK).look_up(
        np.arange(6), pa.nulls(6, TOKEN_IDS)
    )
    assert len(found.to_ask) == 0
    rows = found.answered[0][1]["response_ids"].to_pylist()
    for row, ids in enumerate(rows):
        salts = (0, 1) if row < 2 else (0,)
        assert ids in [answers([row], salt=s)["response_ids"][0].as_py() for s in salts]
    assert not store.exists(name)


class TestWithoutConditions:
    """A service that does not know them, and an environment without obstore."""

    def test_one_that_says_so_is_written_as_before(
        self, store: TeacherStore, s3: S3, caplog: pytest.LogCaptureFixture
    ) -> None:
        s3.proxy.without_conditions = "refuses"
        with caplog.at_level(logging.WARNING):
            name, _ = publish(store, [1])
        assert caplog.text.count("has no conditional writes") == 1
        assert store.folder.objects() is None  # It is not asked again.
        assert publish(store, [1], salt=1)[0] == name
        kept = store.open(name).read(0, ["response_ids"])["response_ids"]
        assert kept.to_pylist() == answers([1])["response_ids"].to_pylist()
        compact(store)

    def test_one_that_ignores_them_is_found_out(self, store: TeacherStore, s3: S3) -> None:
        assert objects(store).probe("probe")
        s3.proxy.without_conditions = "ignores"
        assert not objects(store).probe("probe")
        assert not store.folder.exists("probe")

    @pytest.mark.parametrize("how", [None, "refuses", "ignores"])
    def test_upkeep_says_that_nothing_keeps_two_apart(
        self, how: str | None, store: TeacherStore, s3: S3, caplog: pytest.LogCaptureFixture
    ) -> None:
        publish(store, [1])
        publish(store, [2])
        s3.proxy.without_conditions = how
        with caplog.at_level(logging.WARNING):
            assert compact(store).merged == 2
        said = [line for line in caplog.messages if "nothing keeps two upkeeps of it apart" in line]
        assert len(said) == (how is not None)
        assert verify(store) == {} and len(store.folder.names()) <= 2, "segments, and what merged"

    @pytest.mark.parametrize("how", ["refuses", "ignores"])
    def test_of_two_that_write_a_lease_the_later_one_has_it(
        self, how: str, store: TeacherStore, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both saw no holder, and the second writes while the first waits before it looks."""
        both_wrote = threading.Barrier(2, timeout=120)
        waiting = SimpleNamespace(time=time.time, sleep=lambda _: both_wrote.wait())
        monkeypatch.setattr(lease_module, "time", waiting)
        s3.proxy.without_conditions = how
        lock, both, in_it, writes = threading.Lock(), threading.Barrier(2), [], count()

        def trouble(request: Request) -> None:
            if request[0] == "PUT" and request[1].split("?")[0].endswith(LEASE):
                with lock:
                    number = next(writes)
                if number < 2:
                    both.wait()
                    time.sleep(0.3 * number)

        def upkeep(doing: str) -> str:
            try:
                with Lease(store.folder, doing).held():
                    in_it.append(doing)
                    time.sleep(0.5)
            except RunError as error:
                return str(error)
            return "done"

        publish(store, [1])  # Where the service says so, conditions are not tried again.
        s3.proxy.trouble = trouble
        told = at_once(lambda: upkeep("compact"), lambda: upkeep("prune"))
        assert len(in_it) == 1
        assert sorted(told)[0] == "done" and "is in use by 'store" in sorted(told)[1]

    def test_without_obstore_pyarrow_writes(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        objects_of.cache_clear()
        try:
            assert store.folder.objects() is None
            name, _ = publish(store, [1])
            assert publish(store, [1], salt=1)[1].equals(segment([1]))
            assert store.names() == [name]
        finally:
            objects_of.cache_clear()


def objects(store: TeacherStore) -> object_store.Objects:
    found = store.folder.objects()
    assert found is not None
    return found


@pytest.mark.parametrize("where", ["uri", "environment", "profile", "config", "temporary"])
def test_credentials_come_from_where_pyarrow_has_them(
    where: str, s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    secret, token = "se/c+ret", None
    uri = s3.uri(f"bucket/{where}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in KEYS:
        monkeypatch.delenv(name)
    lines = f"aws_access_key_id = me\naws_secret_access_key = {secret}\n"
    if where == "uri":
        uri = uri.replace("s3://", "s3://me:se%2Fc%2Bret@")
    elif where == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    elif where == "config":
        monkeypatch.setenv("AWS_PROFILE", "work")
        (tmp_path / "config").write_text(f"[profile work]\n{lines}")
    else:
        token = "tok" if where == "temporary" else None
        more = f"aws_session_token = {token}\n" if token else ""
        (tmp_path / "credentials").write_text(f"[default]\n{lines}{more}")
    objects_of.cache_clear()
    folder = RunFolder(uri)
    found = folder.objects()
    assert found is not None
    settings = dict(found.store.config)
    if where == "environment":  # obstore reads it by itself.
        settings = {"access_key_id": "me", "secret_access_key": secret} | settings
    assert (settings["access_key_id"], settings["secret_access_key"]) == ("me", secret)
    assert settings.get("session_token") == token
    assert found.create("a", b"1")
    assert not found.create("a", b"2")
    assert folder.read_bytes("a") == b"1"


def test_what_fails_is_an_oserror_of_one_line_without_secrets(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.uri("nobucket/store").replace("s3://", "s3://me:secretsecret@")
    with pytest.raises(OSError, match="not found") as caught:
        publish(TeacherStore(uri), [1])
    assert "secretsecret" not in str(caught.value)
    assert "\n" not in str(caught.value)


class TestCheck:
    def test_a_store_that_can_be_written_has_nothing_to_say(self, store: TeacherStore) -> None:
        assert check_store(store.path) == ([], [])
        assert store.folder.names() == []

    @pytest.mark.parametrize("how", ["refuses", "ignores"])
    def test_one_without_conditional_writes_is_said_plainly(
        self, how: str, store: TeacherStore, s3: S3
    ) -> None:
        s3.proxy.without_conditions = how
        problems, (notice,) = check_store(store.path)
        assert problems == []
        assert f"{store.path}: it has no conditional writes, so of two runs" in notice

    def test_a_bucket_that_is_not_there_is_a_problem(self, s3: S3) -> None:
        (problem,), notices = check_store(s3.uri("nobucket/store"))
        assert (problem.where, notices) == ("store.path", [])
        assert "cannot be written" in str(problem)
        assert "check the name and your credentials" in str(problem)
