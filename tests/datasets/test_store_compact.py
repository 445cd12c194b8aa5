"""Compacting a store that is not whole: no row is lost, and what cannot be used is left alone."""

import os
import random
import time
import tracemalloc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raystill.base.errors import RunError
from raystill.cluster.commands.store import store_command
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store import catalogue, compaction
from raystill.datasets.store.catalogue import (
    SPOOLED_BYTES,
    Entry,
    Outlining,
    Stored,
    witnesses,
    words_of,
)
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Footer, Group, Provenance
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.reading import (
    ImpossibleValues,
    Names,
    ending_of,
    is_in,
    places_in,
)
from raystill.datasets.store.segment import READ_WHOLE_BYTES, DamagedSegment, encode, segment_name
from raystill.datasets.store.store import MERGED, MERGED_KEPT_S, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from raystill.datasets.store.values import impossible_rows
from raystill.datasets.stream.answers import without_impossible
from tests.datasets.test_store import (
    HIDDEN,
    TOPK,
    answers,
    key,
    keys_of,
    origin,
    path_of,
    publish,
    segment,
)


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


def alter(store: TeacherStore, name: str, column: str = "response_ids") -> bytes:
    """Flip a byte of a data column, which footer and keys know nothing of; the file's bytes."""
    path = path_of(store, name)
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    (chunk,) = (c for c in chunks if c.path_in_schema.split(".")[0] == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    assert store.catalogue().refused == {}
    assert list(verify(store)) == [name]
    return bytes(data)


def missing(store: TeacherStore, rows: list[int], wanted: Signal = TOPK) -> int:
    """How many of the rows a run would have to ask for."""
    view = StoreView(store, pa.chunked_array([keys_of(rows)]), wanted)
    lookup = view.look_up(np.arange(len(rows)), pa.nulls(len(rows), TOKEN_IDS))
    return len(lookup.to_ask) + len(lookup.to_score[0])


@pytest.mark.parametrize("stored", [TOPK, Signal("topk", 32)], ids=["as rich", "richer"])
@pytest.mark.parametrize("first", [True, False], ids=["damaged first", "damaged last"])
def test_a_good_copy_never_goes_for_the_sake_of_a_damaged_one(
    store: TeacherStore, first: bool, stored: Signal
) -> None:
    """A byte was altered in a compacted segment, and a run has asked for some of its rows again."""
    size = next(
        n for n in range(3, 99) if (name_of(range(n), stored) < name_of(range(2), TOPK)) == first
    )
    rows = list(range(size))
    bad = publish(store, rows, signal=stored)
    data = alter(store, bad)
    assert missing(store, rows) == size
    publish(store, rows[:2], salt=1)
    publish(store, rows[2:], salt=2)
    publish(store, [500])
    assert missing(store, rows) == 0
    done = compact(store)
    assert missing(store, [*rows, 500]) == 0
    assert path_of(store, bad).read_bytes() == data
    assert list(done.refused) == list(verify(store)) == [bad]
    assert isinstance(done.refused[bad], DamagedSegment)
    assert (done.merged, done.into, done.duplicates) == (3, 1, 0)


def name_of(rows: Iterable[int], signal: Signal) -> str:
    return segment_name([key(row) for row in rows], signal)


def test_a_damaged_segment_of_a_batch_is_left_and_the_others_are_merged(
    store: TeacherStore,
) -> None:
    bad = publish(store, [1])
    publish(store, [2])
    publish(store, [3])
    data = alter(store, bad)
    done = compact(store)
    assert (done.merged, done.into, done.duplicates) == (2, 1, 0)
    assert list(done.refused) == [bad]
    assert path_of(store, bad).read_bytes() == data
    assert missing(store, [2, 3]) == 0


@pytest.mark.parametrize("rows", [[1, 2], [1]], ids=["with a duplicate", "with none"])
def test_a_segment_that_vanishes_meanwhile_is_skipped(
    store: TeacherStore, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = publish(store, [1], signal=TOPK)
    for row in range(2, 5):
        publish(store, [row, 9][: 1 + (row == 4)])
    publish(store, rows, salt=1, signal=Signal("topk", 4))
    looked = compaction._outlining

    def outlining(store: TeacherStore):
        seen = looked(store)
        path_of(store, gone).unlink(missing_ok=True)
        return seen

    monkeypatch.setattr(compaction, "_outlining", outlining)
    done = compact(store)
    assert done.refused == {}
    monkeypatch.undo()
    assert missing(store, [2, 3, 4, 9]) == 0
    assert missing(store, rows, Signal("topk", 4)) == 0
    assert verify(store) == {}


def test_answers_of_two_engines_are_merged_without_one_taking_the_others_file(
    store: TeacherStore,
) -> None:
    """The rows of one are those of the other together, so the merged one would have its name."""
    newer = replace(origin(), engine_version="0.33.0")
    pair = next(
        [a, b]
        for a in range(20)
        for b in range(a)
        if max(name_of([a], TOPK), name_of([b], TOPK)) < name_of([a, b], TOPK)
    )
    other = max(range(100, 200), key=lambda row: name_of([row], TOPK))
    for rows, source in (([pair[0]], newer), ([pair[1]], newer), (pair, origin())):
        store.publish(source, Provenance("run", "training"), segment(rows))
    publish(store, [other])
    compact(store)
    assert missing(store, [*pair, other]) == 0
    assert store.catalogue().duplicates == 0
    assert compact(store).merged == 0


def test_the_answers_that_were_served_are_those_that_stay(store: TeacherStore) -> None:
    """Also where the segment that has the merged one's name already holds others."""
    pair = next(
        [a, b] for a in range(20) for b in range(a) if name_of([a], TOPK) < name_of([a, b], TOPK)
    )
    publish(store, pair)
    publish(store, pair[:1], salt=1)
    before = store.catalogue()
    served = store.read(before, before.locate(keys_of(pair)), ["response_ids"])
    compact(store)
    after = store.catalogue()
    assert (after.rows, len(after.entries)) == (2, 1)
    assert store.read(after, after.locate(keys_of(pair)), ["response_ids"]).equals(served)
    assert compact(store).merged == 0


def test_one_upkeep_at_a_time_and_the_other_is_told_whose_it_is(store: TeacherStore) -> None:
    publish(store, [1])
    with Lease(store.folder, "compact").held():
        for change in (compact, lambda s: prune(s, {}, None, dry_run=False)):
            with pytest.raises(RunError, match=r"in use by 'store compact' \(process \d+ on "):
                change(store)
        prune(store, {}, None, dry_run=True)
    compact(store)


def test_what_an_upkeep_that_died_had_set_aside_comes_back(store: TeacherStore) -> None:
    name = publish(store, [1])
    path_of(store, name).rename(path_of(store, f".removed-{'0' * 16}-{name}.aside"))
    assert missing(store, [1]) == 1
    compact(store)
    assert store.names() == [name] and missing(store, [1]) == 0


def test_prune_leaves_what_never_was_a_segment(store: TeacherStore, tmp_path: Path) -> None:
    """Tables and hidden files of others, and what a link of a segment's name leads to."""
    bad, linked = publish(store, [1]), publish(store, [2])
    path_of(store, bad).write_bytes(b"torn")
    outside = tmp_path / "outside.parquet"
    pq.write_table(pa.table({"a": [1]}), outside)
    path_of(store, linked).unlink()
    path_of(store, linked).symlink_to(outside)
    pq.write_table(pa.table({"a": [1]}), path_of(store, "others.parquet"))
    path_of(store, ".nfs0001").write_bytes(b"")
    path_of(store, "folder.parquet").mkdir()
    before = sorted(path.name for path in path_of(store, "").iterdir())
    assert store_command("prune", store.path) in (1, 5)
    after = sorted(path.name for path in path_of(store, "").iterdir())
    assert after == [name for name in before if name != bad]
    assert outside.exists() and path_of(store, linked).is_symlink()


@pytest.mark.parametrize("action", ["list", "verify", "compact", "prune"])
def test_a_folder_that_is_no_store_is_refused(action: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no teacher store: it has no folder 'segments'"):
        store_command(action, str(tmp_path))
    table = tmp_path / "segments" / "sales.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"a": [1]}), table)
    with pytest.raises(RunError, match=r"no file of its folder 'segments' is a segment"):
        store_command(action, str(tmp_path))
    assert table.exists()


def changed(rows: pa.Table, column: str, row: int, value: float) -> pa.Table:
    """The rows with the first number of a column's row replaced."""
    values = rows[column].to_pylist()
    numbers = values[row][0] if isinstance(values[row][0], list) else values[row]
    numbers[-1] = value
    place = rows.schema.get_field_index(column)
    return rows.set_column(place, column, pa.array(values, rows.schema.field(column).type))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("sampled_logprobs", np.nan),
        ("sampled_logprobs", 0.5),
        ("topk_logprobs", np.inf),
        ("topk_logprobs", 0.0),
        ("topk_ids", 300),
        ("topk_ids", -1),
        ("tail_logprob", np.nan),
    ],
)
def test_stored_rows_that_no_student_takes_are_found_and_only_they_are_pruned(
    store: TeacherStore, column: str, value: float
) -> None:
    rows = changed(segment([1, 2, 3]), column, 1, value)
    name, _ = store.publish(origin(), Provenance("run", "training"), rows)
    sound = publish(store, [4])
    refused = verify(store)
    assert list(refused) == [name] and isinstance(refused[name], ImpossibleValues)
    compact(store)
    assert store.names() == sorted([name, sound])
    assert prune(store, refused, None, dry_run=True).files == [name]
    assert store_command("verify", store.path) == 1
    assert prune(store, refused, None, dry_run=False).files == [name]
    assert verify(store) == {}
    assert (missing(store, [1, 3, 4]), missing(store, [2])) == (0, 1)


def test_an_answer_with_impossible_values_is_dropped_by_name_and_scored_states_are_not() -> None:
    given = answers([1, 2], TOPK)
    told = without_impossible(changed(given, "sampled_logprobs", 1, np.nan), origin())
    assert told["error"].to_pylist() == [None, "not_finite"]
    hidden = segment([1, 2], HIDDEN)
    numbers = hidden["sampled_logprobs"].to_pylist()
    numbers[0] = [np.nan] * len(numbers[0])
    place = hidden.schema.get_field_index("sampled_logprobs")
    scored = hidden.set_column(place, "sampled_logprobs", pa.array(numbers, pa.list_(pa.float32())))
    assert not impossible_rows(scored, HIDDEN, 300).any()
    assert impossible_rows(changed(hidden, "sampled_logprobs", 1, 1.0), HIDDEN, 300).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("compactions", [1, 2], ids=["one", "another one after it"])
@pytest.mark.parametrize("vanishes_late", [False, True], ids=["before it looked", "as it looked"])
def test_a_retry_after_a_compaction_finds_what_its_first_try_published(
    store: TeacherStore,
    monkeypatch: pytest.MonkeyPatch,
    vanishes_late: bool,
    compactions: int,
) -> None:
    """The view has read its catalogue before the first try published."""
    rows = list(range(12))
    view = StoreView(store, pa.chunked_array([keys_of(rows)]), TOPK)
    publish(store, [0, 1, 2])
    publish(store, [3, 4, 5])

    def compact_all() -> None:
        for number in range(compactions):
            publish(store, [20 + number])
            assert compact(store).into == 1

    exists = store.exists
    if vanishes_late:

        def exists_and_goes(name: str) -> bool:
            was_there = exists(name)
            monkeypatch.setattr(store, "exists", exists)
            compact_all()
            return was_there

        monkeypatch.setattr(store, "exists", exists_and_goes)
    else:
        compact_all()
    given = pa.nulls(3, TOKEN_IDS)
    lookup = view.look_up(np.array([0, 1, 2]), given)
    assert len(lookup.to_ask) == 0
    ((places, found),) = lookup.answered
    assert places.tolist() == [0, 1, 2]
    stored = segment([0, 1, 2])
    assert found["response_ids"].to_pylist() == stored["response_ids"].to_pylist()
    assert len(view.look_up(np.array([3, 4, 5]), given).to_ask) == 0
    assert view.look_up(np.array([6, 7, 8]), given).to_ask.tolist() == [0, 1, 2]


def test_a_look_at_what_was_merged_costs_no_further_catalogue(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(range(12))
    view = StoreView(store, pa.chunked_array([keys_of(rows)]), TOPK)
    for row in range(20, 24):
        publish(store, [row])
    compact(store)
    monkeypatch.setattr(store, "catalogue", lambda **_: pytest.fail("the catalogue was read"))
    for first in (0, 3, 6, 9):
        group = np.arange(first, first + 3)
        assert len(view.look_up(group, pa.nulls(3, TOKEN_IDS)).to_ask) == 3


def test_a_merged_segment_that_was_lost_is_asked_again(store: TeacherStore) -> None:
    view = StoreView(store, pa.chunked_array([keys_of([0, 1, 2])]), TOPK)
    publish(store, [0, 1, 2])
    publish(store, [9])
    compact(store)
    (merged,) = store.names()
    path_of(store, merged).unlink()
    lookup = view.look_up(np.arange(3), pa.nulls(3, TOKEN_IDS))
    assert lookup.to_ask.tolist() == [0, 1, 2]


def test_names_of_merged_segments_are_kept_for_a_day(store: TeacherStore) -> None:
    first = {publish(store, [0]), publish(store, [1])}
    compact(store)
    assert set(store.merged()[1]) == first
    publish(store, [2])
    compact(store)
    stamp, listed = store.merged()
    assert first < set(listed) and len(listed) == 4
    assert store.merged((stamp, listed)) == (stamp, listed), "it is read once"
    old = time.time() - 2 * MERGED_KEPT_S
    os.utime(store.folder.join(MERGED), (old, old))
    publish(store, [3])
    compact(store)
    assert len(store.merged()[1]) == 2


@pytest.mark.parametrize("size", [0, 15, 17, 16 * 999 + 7])
def test_a_look_up_stands_a_list_of_merged_segments_that_was_cut_or_altered(
    store: TeacherStore, size: int
) -> None:
    publish(store, [9])
    view = StoreView(store, pa.chunked_array([keys_of([0, 1, 2])]), TOPK)
    Path(store.folder.join(MERGED)).write_bytes(os.urandom(size))
    assert view.look_up(np.arange(3), pa.nulls(3, TOKEN_IDS)).to_ask.tolist() == [0, 1, 2]


@pytest.mark.parametrize("left", [0, 7, 16, 39])
def test_names_that_come_to_a_list_that_was_cut_are_read_as_they_are(
    store: TeacherStore, left: int
) -> None:
    names = [f"{number:032x}.parquet" for number in range(1 << 100, (1 << 100) + 5)]
    store.note_merged(names[:3])
    path = Path(store.folder.join(MERGED))
    path.write_bytes(path.read_bytes()[:left])
    store.note_merged(names[3:])
    assert set(store.merged()[1]) == {*names[: left // 16], *names[3:]}


def test_any_of_many_merged_segments_is_found(store: TeacherStore) -> None:
    names = [f"{row:032x}.parquet" for row in range(0, 1 << 20, 977)]
    names += [f"{row << 100:032x}.parquet" for row in range(1, 999)]  # Zeros at their ends.
    store.note_merged(reversed(names))
    _, listed = store.merged()
    assert (places_in(listed, Names.of(names)) >= 0).all()
    others = [f"{row:032x}.parquet" for row in range(1, 1 << 20, 977)]
    assert (places_in(listed, Names.of(others)) < 0).all()


@pytest.mark.parametrize(("fits", "into"), [(2.5, 3), (0.5, 0), (99, 1)])
def test_what_is_merged_into_one_segment_is_bounded_by_bytes(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch, fits: float, into: int
) -> None:
    """All of it is in memory at a time, whatever the answers' lengths and signals."""
    names = [publish(store, [row]) for row in range(6)]
    size = max(store.size(name) for name in names)
    monkeypatch.setattr(compaction, "COMPACT_BYTES", int(fits * size))
    done = compact(store)
    assert (done.into, done.merged) == (into, 6 if into else 0)
    assert len(store.names()) == (into or 6)
    assert missing(store, list(range(6))) == 0 and verify(store) == {}


def test_merged_segments_are_small_enough_to_read_a_group_of_them(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "COMPACT_ROWS", 4)
    for row in range(10):
        publish(store, [row])
    assert compact(store).into == 3
    rows = [entry.footer.rows for entry in store.catalogue().entries]
    assert sorted(rows) == [2, 4, 4]
    assert compact(store).merged == 0, "a second one finds nothing to do"


def test_a_segment_that_was_merged_when_they_had_more_rows_is_left_as_it_is(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "COMPACT_ROWS", 8)
    for row in range(16):
        publish(store, [row])
    assert compact(store).into == 2
    before = {name: path_of(store, name).stat() for name in store.names()}
    monkeypatch.setattr(compaction, "COMPACT_ROWS", 2)
    new = [publish(store, [row]) for row in (20, 21)]
    assert compact(store).merged == 2 and not set(new) & set(store.names())
    for name, stat in before.items():
        assert path_of(store, name).stat() == stat
    assert missing(store, [*range(16), 20, 21]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_an_outline_says_what_the_catalogue_says(
    store: TeacherStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are in a file and looked at some at a time; whichever segments are left out."""
    monkeypatch.setattr(catalogue, "SPOOLED_BYTES", 1)
    monkeypatch.setattr(catalogue, "BUCKETS", 3)
    monkeypatch.setattr(compaction, "OPENED_TOGETHER", 4)
    choice = random.Random(seed)
    for number in range(14):
        rows = choice.sample(range(12), choice.randint(1, 4))
        signal = choice.choice([TOPK, Signal("topk", 4), Signal("text"), HIDDEN])
        publish(store, rows, salt=number, signal=signal, scored=choice.random() < 0.3)
    made, there, refused = compaction._outlining(store)
    assert refused == {} and there.all()
    for left_out in ([], choice.sample(store.names(), 3), store.names()):
        told = store.catalogue(without=left_out)
        outline = made.outline(there & ~is_in(made.names, left_out))
        assert list(outline.names) == [entry.name for entry in told.entries]
        of_each = [outline.origins[number] for number in outline.origin]
        assert of_each == [entry.footer.origin for entry in told.entries]
        assert outline.sizes.tolist() == [store.size(entry.name) for entry in told.entries]
        rows = [entry.footer.rows for entry in told.entries]
        assert np.diff(outline.first).tolist() == rows and outline.rows == told.rows
        witness = told.witnesses()
        assert outline.dropped.tolist() == np.flatnonzero(~told.needed()).tolist()
        assert outline.held_in.tolist() == told.segment[witness[outline.dropped]].tolist()
        doubled = told.keys.take(pa.array(outline.dropped))
        shared = told.segment[np.flatnonzero(pc.is_in(told.keys, value_set=doubled))]
        assert outline.shared.tolist() == np.unique(shared).tolist()
        for number in range(len(told.entries)):
            expected = told.needed()[told.segment == number]
            assert outline.needed_of(number).tolist() == expected.tolist()


def test_an_outline_of_many_rows_takes_memory_for_its_segments_alone() -> None:
    """It held 18 bytes of each row, and ten times that while it looked for equal keys."""
    segments, rows = 4096, 128
    group = Group("run", "training", rows, {})
    footer = Footer(origin(), (group,))
    generator = np.random.default_rng(0)
    tracemalloc.start()
    made = Outlining()
    for number in range(0, segments, 64):
        read = []
        for name in range(number, number + 64):
            buffers = [None, pa.py_buffer(generator.bytes(16 * rows))]
            keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, buffers)
            read.append((Entry(f"{name:032x}.parquet", footer), [keys]))
        made.add(read, [1] * len(read))
    outline = made.outline(np.ones(segments, bool))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outline.rows == segments * rows and not len(outline.dropped)
    assert peak < SPOOLED_BYTES + 20 * outline.rows


@pytest.mark.parametrize("seed", range(20))
def test_the_witness_of_a_row_is_the_first_that_serves_all_it_serves(seed: int) -> None:
    generator = np.random.default_rng(seed)
    signals = [TOPK, Signal("topk", 4), Signal("text"), Signal("sampled"), HIDDEN]
    kinds = [Stored(signal, scored) for signal in signals for scored in (False, True)]
    rows, different = int(generator.integers(0, 60)), int(generator.integers(1, 30))
    keys = pa.array([key(int(k)) for k in generator.integers(0, different, rows)], pa.binary(16))
    kind = generator.integers(0, len(kinds), rows).astype(np.int16)
    witness, shared = witnesses(words_of(keys), kind, kinds)
    serving = [
        [b for b in range(rows) if keys[a] == keys[b] and kinds[kind[b]].replaces(kinds[kind[a]])]
        for a in range(rows)
    ]
    assert witness.tolist() == [of_row[0] for of_row in serving]
    doubled = {keys[row].as_py() for row in range(rows) if witness[row] != row}
    assert sorted(shared.tolist()) == [r for r in range(rows) if keys[r].as_py() in doubled]


def test_a_compaction_holds_the_footers_of_few_segments_at_a_time(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many segments there are: footers take several KB each, names and keys 0.2."""
    monkeypatch.setattr(compaction, "OPENED_TOGETHER", 5)
    monkeypatch.setattr(compaction, "COMPACT_ROWS", 5)
    for row in range(60):
        publish(store, [row])
    footers: list[weakref.ref] = []
    most = 0
    opened = store.open

    def counted(name: str):
        nonlocal most
        file = opened(name)
        footers.append(weakref.ref(file.footer))
        most = max(most, sum(footer() is not None for footer in footers))
        return file

    monkeypatch.setattr(store, "open", counted)
    assert compact(store).merged == 60
    assert most <= 12 and len(footers) > 120
    assert missing(store, list(range(60))) == 0


def test_the_ending_of_a_segment_tells_it_from_any_other(store: TeacherStore) -> None:
    """Also of one that is read in pieces, and of files that are no segments."""
    names = [publish(store, [1]), publish(store, [2])]
    groups = [(Provenance(f"run {row}", "training"), segment([row])) for row in range(100, 300)]
    large = {"metadata": groups, "data": [(groups[0][0], segment(list(range(100, 2000))))]}
    for name, of in large.items():
        names.append(f"{name}.parquet")
        assert store.put(names[-1], encode(origin(), of))
    endings = [ending_of(store.open(name).data) for name in names]
    assert [store.ending(name) for name in names] == endings and len(set(endings)) == 4
    assert all(store.size(name) > 2 * READ_WHOLE_BYTES for name in names[2:])
    for name in names:
        data = bytearray(path_of(store, name).read_bytes())
        assert path_of(store, name).rename(path_of(store, "other.parquet"))
        assert store.ending("other.parquet") == ending_of(store.open("other.parquet").data)
        for place in (-1, -8, -9, -int.from_bytes(data[-8:-4], "little") - 8):
            data[place] ^= 1
            path_of(store, name).write_bytes(data)
            assert store.ending(name) != store.ending("other.parquet")
            data[place] ^= 1
    for odd in (b"", b"PAR1", b"\xff" * 11, b"\0" * 8):
        path_of(store, "odd.parquet").write_bytes(odd)
        assert store.ending("odd.parquet") not in endings
    assert store.ending("no.parquet") is None


@pytest.mark.parametrize("first", range(6))
def test_what_a_compaction_that_died_had_published_is_used(store: TeacherStore, first: int) -> None:
    """Its inputs are there beside it, whichever of the names comes first."""
    names = [publish(store, [row]) for row in (first, first + 10)]
    data = [path_of(store, name).read_bytes() for name in names]
    compact(store)
    (merged,) = store.names()
    for name, of_name in zip(names, data, strict=True):
        path_of(store, name).write_bytes(of_name)
    done = compact(store)
    assert store.names() == [merged] and (done.merged, done.into, done.duplicates) == (3, 1, 2)
    assert missing(store, [first, first + 10]) == 0 and verify(store) == {}
