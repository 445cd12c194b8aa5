"""The store's index: the same answers as the segments themselves give, whatever becomes of it."""

import multiprocessing
import os
import random
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from raystill.base.run_folder import RunFolder
from raystill.cluster.commands.store import store_command
from raystill.datasets.lookup import files, keeping, rows
from raystill.datasets.lookup.files import FOLDER, part_files
from raystill.datasets.lookup.keeping import Notes, StoreIndex
from raystill.datasets.lookup.part import Part, encoded, halves, part_of
from raystill.datasets.lookup.rows import ROW, LostPart, Rows
from raystill.datasets.lookup.view import StaleIndex, StoreView
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Provenance
from raystill.datasets.store.segment import encode, segment_name
from raystill.datasets.store.store import SEGMENTS, RowCounts, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from tests.datasets.test_store import HIDDEN, TOPK, keys_of, origin, path_of, publish, segment

TEXT, SAMPLED = Signal("text"), Signal("sampled")
SIGNALS = [TEXT, SAMPLED, Signal("topk", 4), TOPK, HIDDEN]


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, so that small stores have several."""
    monkeypatch.setattr(keeping, "WORTH_A_PART", 1)
    monkeypatch.setattr(keeping, "BATCH", 3)
    monkeypatch.setattr(files, "PART_ROWS", 16)
    monkeypatch.setattr(keeping, "MANY_PARTS", 2)
    monkeypatch.setattr(rows, "STEP", 4)
    monkeypatch.setattr(rows, "STEPS", 2)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the segments whose keys are read."""
    names: list[str] = []
    keys_of_segment = TeacherStore.keys_of

    def counted(self: TeacherStore, name: str) -> object:
        names.append(name)
        return keys_of_segment(self, name)

    monkeypatch.setattr(TeacherStore, "keys_of", counted)
    return names


def require_as_the_segments_say(store: TeacherStore, index: StoreIndex, rows: int) -> None:
    """The index finds what a catalogue finds that reads every segment."""
    catalogue, found_by = store.catalogue(), index.look_through()
    keys = keys_of([*range(rows)])
    try:
        found_by.find(keys, TOPK)
    except LostPart:  # What a view does then.
        index.forget()
        found_by = index.look_through()
    assert found_by.rows == catalogue.rows and sorted(found_by.refused) == sorted(catalogue.refused)
    for wanted in SIGNALS:
        view = catalogue.ordered_for(wanted)
        where = view.locate(keys)
        found = found_by.find(keys, wanted)
        assert ((found.segment >= 0) == (where >= 0)).all()
        for row in np.flatnonzero(where >= 0):
            at = where[row]
            assert found_by.name(int(found.segment[row])) == view.entries[view.segment[at]].name
            assert (found.group[row], found.place[row]) == (view.group[at], view.place[at])
            assert found.serves[row] == view.serves(wanted, where[row : row + 1])[0]
        stored, served = found_by.find_many(pa.chunked_array([keys[:3], keys[3:]]), wanted)
        assert (stored == (where >= 0)).all() and (served == found.serves).all()


def look_up(store: TeacherStore, rows: list[int], view: StoreView | None = None) -> StoreView:
    """A view that has all of these rows, as they were published."""
    view = view or StoreView(store, pa.chunked_array([keys_of(rows)]), TOPK)
    lookup = view.look_up(np.arange(len(rows)), pa.nulls(len(rows), TOKEN_IDS))
    assert len(lookup.to_ask) == len(lookup.to_score[0]) == 0
    told = {
        int(place): ids
        for places, part in lookup.answered
        for place, ids in zip(places, part["response_ids"].to_pylist(), strict=True)
    }
    expected = segment(rows)["response_ids"].to_pylist()
    assert [told[place] for place in range(len(rows))] == expected
    return view


def fill(store: TeacherStore, segments: int = 6) -> list[int]:
    for first in range(0, 3 * segments, 3):
        publish(store, [first + 2, first, first + 1])
    return list(range(3 * segments))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_becomes_of_store_and_index_it_finds_what_the_segments_hold(
    store: TeacherStore, seed: int
) -> None:
    """Random interleavings of two holders of the index, of runs, upkeep, and damage."""
    rows, choice = 24, random.Random(seed)
    indexes = [StoreIndex(store), StoreIndex(store)]
    notes = Notes(store, enough=2)

    def run() -> None:
        signal = choice.choice(SIGNALS)
        some = choice.sample(range(rows), choice.randint(1, 5))
        name = publish(store, some, signal=signal, scored=choice.random() < 0.3)
        if choice.random() < 0.5:
            file = store.open(name)
            of_groups = zip(file.footer.groups, store.keys_of(name)[1], strict=True)
            notes.add(name, file.footer.origin, [(g.provenance, keys) for g, keys in of_groups])

    def one_of(folder: str) -> Path | None:
        files = [p for p in (Path(store.path) / folder).glob("[0-9a-f]*")]
        return choice.choice(sorted(files)) if files else None

    def damage() -> None:
        if (path := one_of(choice.choice([SEGMENTS, FOLDER]))) is not None:
            data = bytearray(path.read_bytes())
            if data:
                data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
            path.write_bytes(data[: choice.choice([len(data), len(data) // 2, 0])])

    def lose() -> None:
        if (path := one_of(choice.choice([SEGMENTS, FOLDER]))) is not None:
            path.unlink()

    def tend() -> None:
        compact(store, None, notes.add)

    def mend() -> None:
        prune(store, verify(store), None, dry_run=False)

    deeds = [run, run, run, run, damage, lose, tend, mend]
    run()
    for _ in range(20):
        choice.choice(deeds)()
        require_as_the_segments_say(store, choice.choice(indexes), rows)


class TestKeeping:
    def test_a_segment_is_opened_once(self, store: TeacherStore, opened: list[str]) -> None:
        rows = fill(store)
        look_up(store, rows)
        assert sorted(opened) == store.names()
        opened.clear()
        look_up(store, rows)
        assert opened == []
        new = publish(store, [90, 91])
        StoreIndex(store).look_through()
        StoreIndex(store).look_through()
        assert opened == [new]

    def test_what_a_process_has_noted_is_not_opened(
        self, store: TeacherStore, opened: list[str]
    ) -> None:
        notes = Notes(store, enough=3)
        names = []
        for row in range(4):
            table = segment([row])
            name, _ = store.publish(origin(), Provenance("run", "training"), table)
            noted = [(Provenance("run", "training"), table["key"].combine_chunks())]
            notes.add(name, origin(), noted)
            names.append(name)
        look_up(store, [0, 1, 2, 3])
        assert opened == [names[-1]]

    def test_a_compaction_leaves_its_segments_in_the_index(
        self, store: TeacherStore, opened: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = fill(store)
        look_up(store, rows)
        assert store_command("compact", store.path) == 0
        opened.clear()
        look_up(store, rows)
        assert opened == [] and len(part_files(store)) <= 3

    def test_a_part_whose_segments_are_gone_goes_too(
        self, store: TeacherStore, opened: list[str]
    ) -> None:
        """Else each process would read and search what was there before a compaction as well."""
        rows = fill(store)
        look_up(store, rows)
        assert store_command("compact", store.path) == 0
        opened.clear()
        index = StoreIndex(store).look_through()
        assert index.rows == sum(len(part.where) for part in index.parts) == len(rows)
        assert opened == [] and all(keep.all() for keep in index.live)

    def test_a_part_whose_segments_are_passed_over_stays(self, store: TeacherStore) -> None:
        """They may be out of reach for a while."""
        fill(store)
        StoreIndex(store).look_through()
        before = part_files(store)
        assert StoreIndex(store).look_through(without=store.names()).rows == 0
        assert before and part_files(store) == before

    def test_an_index_outlives_a_folder_of_segments_that_is_away(
        self, store: TeacherStore, opened: list[str]
    ) -> None:
        rows, folder = fill(store), Path(store.path) / SEGMENTS
        look_up(store, rows)
        folder.rename(folder.with_name("away"))
        assert StoreIndex(store).look_through().rows == 0
        folder.with_name("away").rename(folder)
        opened.clear()
        look_up(store, rows)
        assert opened == []

    def test_several_that_look_at_once_share_the_work(
        self, store: TeacherStore, opened: list[str]
    ) -> None:
        rows = fill(store, 20)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: look_up(store, rows), range(4)))
        assert sorted(opened) == store.names()

    def test_parts_are_merged_up_to_their_bound(self, store: TeacherStore) -> None:
        for first in range(0, 60, 3):
            publish(store, [first, first + 1, first + 2])
            StoreIndex(store).look_through()
        index = StoreIndex(store).look_through()
        assert index.rows == 60 and max(len(part.where) for part in index.parts) <= 16
        assert len(part_files(store)) <= -(-60 // 8) + keeping.MANY_PARTS + 1

    def test_a_small_store_has_no_index(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keeping, "WORTH_A_PART", 256)
        look_up(store, fill(store))
        assert os.listdir(store.path) == [SEGMENTS]

    def test_a_store_that_does_not_exist_is_not_made(self, store: TeacherStore) -> None:
        assert StoreIndex(store).look_through().rows == 0
        assert not Path(store.path).exists()

    def test_rows_are_counted_by_run_and_purpose(self, store: TeacherStore) -> None:
        publish(store, [1, 2, 3], run="a")
        publish(store, [4], run="a", purpose="evaluation")
        publish(store, [5, 6], run="a", scored=True)
        publish(store, [7], run="b")
        for _ in range(2):
            counts = StoreIndex(store).look_through().requested_by("a")
            assert counts == {"training": RowCounts(3, 2), "evaluation": RowCounts(1, 0)}


class TestTrust:
    """An index is never believed over a segment."""

    @pytest.fixture
    def rows(self, store: TeacherStore) -> list[int]:
        rows = fill(store)
        look_up(store, rows)
        assert part_files(store)
        return rows

    @pytest.mark.parametrize(
        "harm",
        [
            lambda data: data[:-1],
            lambda data: b"",
            lambda data: b"ARROW1\0\0" + data[8:][::-1],
            lambda data: bytes([data[0] ^ 1]) + data[1:],
            lambda data: (
                data[: len(data) // 2]
                + bytes([data[len(data) // 2] ^ 8])
                + data[len(data) // 2 + 1 :]
            ),
        ],
    )
    def test_a_damaged_part_is_as_none(
        self, store: TeacherStore, rows: list[int], harm: Callable[[bytes], bytes]
    ) -> None:
        for name in part_files(store):
            path = Path(store.path) / FOLDER / name
            path.write_bytes(harm(path.read_bytes()))
        look_up(store, rows)
        require_as_the_segments_say(store, StoreIndex(store), 20)

    def test_a_part_that_is_no_file_or_of_a_newer_version_is_as_none(
        self, store: TeacherStore, rows: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.rmtree(Path(store.path) / FOLDER)
        (Path(store.path) / FOLDER / f"{'0' * 32}-3.rows").mkdir(parents=True)
        monkeypatch.setattr("raystill.datasets.lookup.part.VERSION", 3)
        look_up(store, rows)
        newer = part_files(store)
        monkeypatch.undo()
        look_up(store, rows)
        assert set(newer) <= set(part_files(store))

    def test_the_index_of_another_store_is_as_none(
        self, store: TeacherStore, rows: list[int], tmp_path: Path
    ) -> None:
        other = TeacherStore(str(tmp_path / "other"))
        for first in range(0, 18, 3):  # Of the same names, with other rows at each place.
            publish(other, [first, first + 1, first + 2])
        shutil.copytree(Path(store.path) / FOLDER, Path(other.path) / FOLDER)
        for name in store.names():
            shutil.copystat(path_of(store, name), path_of(other, name))
        look_up(other, rows)

    def test_a_part_that_says_what_is_not_so_is_found_out(
        self, store: TeacherStore, rows: list[int]
    ) -> None:
        shutil.rmtree(Path(store.path) / FOLDER)
        wrong = [[2, 1, 0], [5, 4, 3], [8, 7, 6]]  # They are stored as 2, 0, 1.
        for number, of_segment in enumerate(wrong):
            keys = segment(of_segment)["key"].combine_chunks()
            name = segment_name(keys.to_pylist(), TOPK)
            told = [(Provenance("run", "training", scored=number == 1), keys)]
            if number == 2:
                told = [(Provenance("run", "training"), keys[:2]), (told[0][0], keys[2:])]
            part = part_of([(name, store.stamp(name) or (0, 0), origin(), told)])
            file, data = encoded(part)
            store.folder.write_bytes(f"{FOLDER}/{file}", data)
        look_up(store, rows)
        require_as_the_segments_say(store, StoreIndex(store), 20)

    def test_a_segment_that_was_replaced_unseen_is_opened_again(
        self, store: TeacherStore, rows: list[int]
    ) -> None:
        view = look_up(store, rows)
        name = segment_name(keys_of([0, 1, 2]).to_pylist(), TOPK)
        stat = path_of(store, name).stat()
        path_of(store, name).unlink()
        groups = [(Provenance("run", "training"), segment(some)) for some in ([1], [0, 2])]
        data = encode(origin(), groups)
        path_of(store, name).write_bytes(data)
        os.utime(path_of(store, name), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        look_up(store, rows, view)
        look_up(store, rows)

    def test_an_index_may_be_deleted_and_the_store_compacted_under_a_reader(
        self, store: TeacherStore, rows: list[int]
    ) -> None:
        view = look_up(store, rows)
        shutil.rmtree(Path(store.path) / FOLDER)
        compact(store)
        look_up(store, rows, view)
        look_up(store, rows)

    def test_a_store_that_cannot_be_written_is_looked_through_all_the_same(
        self, store: TeacherStore, opened: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = fill(store)

        def refused(self: RunFolder, name: str, data: bytes) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(RunFolder, "write_bytes", refused)
        view = look_up(store, rows)
        opened.clear()
        view._reload()
        assert opened == []
        require_as_the_segments_say(store, StoreIndex(store), 20)

    def test_a_lock_that_cannot_be_made_is_done_without(
        self, store: TeacherStore, rows: list[int]
    ) -> None:
        shutil.rmtree(Path(store.path) / FOLDER)
        (Path(store.path) / FOLDER).write_text("in the way")
        look_up(store, rows)


class TestOnDisk:
    """The rows of an index stay on the disk, and it is not held twice to merge it."""

    @pytest.mark.parametrize("seed", range(12))
    def test_rows_near_keys_are_all_that_begin_as_they_do(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        table = np.zeros(int(generator.integers(0, 60)), ROW)
        table["high"] = np.sort(generator.integers(0, [3, 12, 1000][seed % 3], len(table)))
        table["group"] = np.arange(len(table))
        kept = Rows.of(table)
        assert np.array_equal(kept.all(), table)
        for number in (0, 1, 2, 7, 40):
            high = np.sort(generator.integers(0, 14, number)).astype(np.uint64)
            near = kept.near(high)
            assert (np.diff(near["group"]) > 0).all(), "in order, and none twice"
            wanted = table[np.isin(table["high"], high)]
            assert np.isin(wanted["group"], near["group"]).all()
            assert len(near) <= 3 * rows.STEP * max(1, len(np.unique(high))) + len(wanted)

    def test_a_large_part_is_read_where_a_key_is_looked_for(self, store: TeacherStore) -> None:
        fill(store, 5)
        StoreIndex(store).look_through()
        index = StoreIndex(store).look_through()
        assert all(not isinstance(part.where.file, pa.BufferReader) for part in index.parts)
        for part in index.parts:
            assert len(part.where.fences) == len(part.where.sums) == -(-len(part.where) // 4)
        assert (index.find(keys_of(list(range(15))), TOPK).segment >= 0).all()

    @pytest.mark.parametrize(
        "harm",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:100]),
            lambda path: path.write_bytes(bytes([path.read_bytes()[30] ^ 1]) * 200),
            lambda path: path.unlink(),
        ],
    )
    def test_a_part_that_changes_under_a_reader_is_read_again_or_done_without(
        self, store: TeacherStore, harm: Callable[[Path], object]
    ) -> None:
        stored = fill(store)
        view = look_up(store, stored)
        view._index.forget()
        view._reload()  # So that it has the files, and not what it has opened itself.
        for name in part_files(store):
            harm(Path(store.path) / FOLDER / name)
        look_up(store, stored, view)
        require_as_the_segments_say(store, StoreIndex(store), 20)

    def test_a_part_that_can_never_be_read_ends_a_look_up(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        view = look_up(store, fill(store))

        def lost(*_: object) -> None:
            raise LostPart("stale file handle")

        monkeypatch.setattr(StoreView, "_sort", lost)
        with pytest.raises(LostPart):
            look_up(store, [0], view)

    def test_many_small_parts_are_merged_one_after_the_other(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes = Notes(store, enough=1)
        for row in range(40):
            name = publish(store, [row])
            noted = [(Provenance("run", "training"), keys_of([row]))]
            notes.add(name, origin(), noted)
        assert len(part_files(store)) == 40
        held: list[weakref.ref[Part]] = []
        most = 0
        read = keeping.read_part

        def counted(of: TeacherStore, name: str) -> Part:
            nonlocal most
            part = read(of, name)
            held.append(weakref.ref(part))
            most = max(most, sum(len(p.where) for ref in held if (p := ref()) and len(p.where) < 8))
            return part

        monkeypatch.setattr(keeping, "read_part", counted)
        index = StoreIndex(store).look_through()
        assert index.rows == 40 and most <= 4, "not all of them are held at a time"
        assert len(part_files(store)) <= 40 // 8 + keeping.MANY_PARTS
        require_as_the_segments_say(store, StoreIndex(store), 40)

    def test_damaged_small_parts_are_not_merged_for_ever(
        self, store: TeacherStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = fill(store)
        look_up(store, rows)
        for number in range(9):
            file = Path(store.path) / FOLDER / f"{number:032x}-1.rows"
            file.write_bytes(b"no part")
        index = StoreIndex(store)
        assert index.look_through().rows == len(rows)
        monkeypatch.setattr(StoreIndex, "_merge_small", lambda _: pytest.fail("once more"))
        assert index.look_through().rows == len(rows)

    def test_a_segment_that_two_parts_have_counts_once_when_they_are_merged(
        self, store: TeacherStore
    ) -> None:
        for row in range(3):
            name = publish(store, [row])
            told = [(Provenance("run", "training"), keys_of([row]))]
            for other in range(2):  # Two processes that have noted it, each with another segment.
                beside = publish(store, [10 + 2 * row + other])
                also = [(Provenance("run", "training"), keys_of([10 + 2 * row + other]))]
                described = [
                    (n, store.stamp(n) or (0, 0), origin(), groups)
                    for n, groups in ((name, told), (beside, also))
                ]
                files.write_part(store, part_of(described))
        index = StoreIndex(store).look_through()
        assert index.rows == 9 and index.num_segments == 9
        require_as_the_segments_say(store, StoreIndex(store), 20)


def test_a_listing_is_that_of_the_file_system_however_many_are_looked_at_together(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    folder = Path(store.path) / SEGMENTS
    (folder / "a.parquet").mkdir()
    (folder / "b.parquet").symlink_to("nowhere")
    (folder / "c.txt").write_text("")
    (folder / ".parquet").write_text("odd")
    (folder / "d.parquet").symlink_to(store.names()[0])
    selector = pafs.FileSelector(str(folder))
    infos = pafs.LocalFileSystem().get_file_info(selector)
    wanted = sorted(
        (i.base_name, i.size, i.mtime_ns)
        for i in infos
        if i.type == pafs.FileType.File and i.extension == "parquet"
    )
    for together in (1, 2, 4096):
        monkeypatch.setattr("raystill.datasets.store.reading.LISTED_TOGETHER", together)
        told = store.listing()
        found = zip(told.names, told.sizes.tolist(), told.changed.tolist(), strict=True)
        assert sorted(found) == wanted
        few = store.listing(without=[wanted[0][0]])
        assert sorted(few.names) == [name for name, _, _ in wanted[1:]]


def die_writing(path: str) -> None:
    keeping.WORTH_A_PART = 1

    def die(self: RunFolder, name: str, data: bytes) -> None:
        (Path(path) / FOLDER / f".{name.rpartition('/')[2]}.x").write_bytes(bytes(data)[:99])
        os._exit(9)

    RunFolder.write_bytes = die  # type: ignore[method-assign]
    StoreIndex(TeacherStore(path)).look_through()


def test_a_process_that_dies_with_the_lock_and_half_a_part_leaves_both_to_the_next(
    store: TeacherStore, opened: list[str]
) -> None:
    rows = fill(store)
    process = multiprocessing.get_context("fork").Process(target=die_writing, args=(store.path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and not part_files(store)
    look_up(store, rows)
    opened.clear()
    look_up(store, rows)
    assert opened == []


def test_keys_of_any_binary_type_are_found_and_of_another_size_refused() -> None:
    keys = [bytes([n]) * 16 for n in range(5)]
    fixed, plain = pa.array(keys, pa.binary(16)), pa.array(keys, pa.binary())
    for some in (fixed, plain, fixed.slice(1, 3), plain.slice(1, 3)):
        words = [int.from_bytes(key[:8], "big") for key in some.to_pylist()]
        assert halves(some)[0].tolist() == words
    with pytest.raises(pa.ArrowInvalid):
        halves(pa.array([b"short"], pa.binary()))


def test_a_segment_that_stays_stale_ends_a_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TeacherStore(str(tmp_path))
    view = StoreView(store, pa.chunked_array([[bytes(16)]], pa.binary(16)), TOPK)

    def stale(*_: object) -> None:
        raise StaleIndex("a.parquet", "the index has other rows of it")

    monkeypatch.setattr(StoreView, "_sort", stale)
    with pytest.raises(StaleIndex):
        view.look_up(np.array([0]), pa.nulls(1, pa.list_(pa.int32())))
