"""Names of a store's segments in few bytes, and what a large store takes of a process's memory."""

import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from benchmarks.store_rows import publish_rows
from benchmarks.store_scale import (
    compact_all,
    find_all,
    first_group,
    look_through,
    miss_groups,
    parts_of,
)
from raystill.datasets.lookup.files import part_files, read_part, write_part
from raystill.datasets.lookup.index import live_in
from raystill.datasets.lookup.part import Part
from raystill.datasets.lookup.rows import ROW, Rows
from raystill.datasets.store.compaction import compact, problem_of
from raystill.datasets.store.footer import Provenance, segment_schema
from raystill.datasets.store.reading import DamagedSegment, Listing, Names, is_in, places_in
from raystill.datasets.store.segment import encode
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import verify
from tests.datasets.test_store import TOPK, origin, path_of, publish

ZEROS = [f"{0:032x}.parquet", f"{1 << 120:032x}.parquet", f"{255:032x}.parquet"]
ODD = ["", "a.parquet", "A" * 32 + ".parquet", ".parquet", "b" * 32, os.fsdecode(b"\xff.parquet")]


def made_names(seed: int, number: int) -> list[str]:
    choice = random.Random(seed)
    return [f"{choice.getrandbits(128):032x}.parquet" for _ in range(number)]


@pytest.mark.parametrize("seed", range(5))
def test_names_come_back_as_they_were_whatever_they_are(seed: int) -> None:
    choice = random.Random(seed)
    told = [*made_names(seed, 40), *ZEROS, *ODD]
    choice.shuffle(told)
    names = Names.of(told)
    assert list(names) == told and [names[i] for i in range(len(names))] == told
    some = np.array([choice.random() < 0.5 for _ in told])
    assert list(names.chosen(some)) == [n for n, keep in zip(told, some, strict=True) if keep]
    assert list(Names.joined([names.chosen(slice(0, 9)), names.chosen(slice(9, None))])) == told
    assert list(Names.joined([])) == []


def test_names_in_a_file_are_strings_and_may_be_part_of_a_longer_column() -> None:
    for told in (made_names(1, 30) + ZEROS, [*made_names(2, 5), *ODD[:-1]], []):
        column = Names.of(told).column()
        assert column.type == pa.string() and column.to_pylist() == told
        longer = pa.chunked_array([pa.array(["x", *told, "y"], pa.string()).slice(1, len(told))])
        assert list(Names.of_column(longer)) == told
        both = pa.chunked_array([column, column], pa.string())
        assert list(Names.of_column(both)) == [*told, *told]
    for wrong in (["é" * 32 + ".parquet"], [made_names(3, 1)[0] + "\n"], ["0" * 31 + " .parquet"]):
        assert list(Names.of_column(pa.chunked_array([pa.array(wrong)]))) == wrong
    with pytest.raises(TypeError):
        Names.of_column(pa.chunked_array([pa.array([None, ZEROS[0]], pa.string())]))


@pytest.mark.parametrize("seed", range(5))
def test_names_are_found_among_others_as_strings_are(seed: int) -> None:
    choice = random.Random(seed)
    pool = [*made_names(7, 20), *ZEROS, *ODD]
    few, others = (choice.sample(pool, choice.randint(0, len(pool))) for _ in range(2))
    assert is_in(few, others).tolist() == [name in others for name in few]
    assert is_in(Names.of(few), Names.of(others)).tolist() == [name in others for name in few]
    ascending = Names.of(others)
    ascending = ascending.chosen(np.argsort(ascending.digests))
    places = places_in(ascending, Names.of(few))
    assert [ascending[p] if p >= 0 else None for p in places] == [
        name if name in others else None for name in few
    ]


def test_a_listing_ascends_and_keeps_what_belongs_together(tmp_path: Path) -> None:
    names = [*made_names(4, 300), *ZEROS]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * number)
        os.utime(tmp_path / name, ns=(0, 10**18 + number))
    infos = pafs.LocalFileSystem().get_file_info([str(tmp_path / name) for name in names])
    listing = Listing.of([infos[:7], infos[7:], []])
    told = zip(listing.names, listing.sizes.tolist(), listing.changed.tolist(), strict=True)
    wanted = [(name, n, 10**18 + n) for n, name in enumerate(names)]
    assert list(told) == sorted(wanted)
    assert len(Listing.of([]).names) == 0


def made_part(number: int, seed: int) -> Part:
    """A part of so many segments of one row."""
    generator = np.random.default_rng(seed)
    table = np.zeros(number, ROW)
    table["high"] = np.sort(generator.integers(0, 1 << 63, number))
    table["group"] = generator.permutation(number)
    ascending = np.arange(number, dtype=np.int32)
    ones = np.ones(number, np.int32)
    return Part(
        Rows.of(table),
        ascending,
        0 * ones,
        ones,
        0 * ones,
        [Provenance("run", "training")],
        Names.of(made_names(seed, number)),
        5_000 + ascending.astype(np.int64),
        10**18 + ascending.astype(np.int64),
        0 * ones,
        [origin()],
    )


def test_a_segment_takes_forty_bytes_of_a_process_that_looks_through_a_store(
    tmp_path: Path,
) -> None:
    """A name took 44 bytes, and a part kept all of its file but the rows."""
    number = 1 << 17
    store = TeacherStore(str(tmp_path / "store"))
    for seed in (1, 2):
        write_part(store, made_part(number, seed))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    parts = [read_part(store, name) for name in part_files(store)]
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    live, missing = live_in(Listing(Names.of([]), np.empty(0, int), np.empty(0, int)), parts)
    tracemalloc.stop()
    assert len(missing) == 0 and not any(keep.any() for keep in live)
    assert held < 2 * number * 42
    seeds = {made_names(seed, 1)[0]: seed for seed in (1, 2)}
    for part in parts:
        expected = made_part(number, seeds[part.names[0]])
        for name in ("segment", "number", "rows", "asked", "sizes", "changed", "origin"):
            assert np.array_equal(getattr(part, name), getattr(expected, name)), name
        assert np.array_equal(part.names.digests, expected.names.digests)
        assert np.array_equal(part.where.all(), expected.where.all())


def test_small_groups_are_read_together_and_the_damaged_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TeacherStore(str(tmp_path / "store"))
    for row in range(5):
        publish(store, [row])
    compact(store)
    (name,) = store.names()
    looks: list[list[int]] = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, groups: range, *args: Any, **kwargs: Any) -> pa.Table:
        looks.append(list(groups))
        return read_row_groups(self, groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    assert problem_of(store, name) is None and looks == [[0, 1, 2, 3, 4]]
    columns = segment_schema(TOPK).names
    whole = pa.concat_tables(store.open(name).pieces(columns))
    monkeypatch.setattr("raystill.datasets.store.segment.THREADS_BYTES", 1)
    looks.clear()
    file = store.open(name)
    assert pa.concat_tables(file.pieces(columns)).equals(whole) and looks == []
    monkeypatch.undo()
    groups = [(group, file.read(i, columns)) for i, group in enumerate(file.footer.groups)]
    wrong = {**groups[3][0].checksums, "response_ids": "0" * 16}
    groups[3] = replace(groups[3][0], checksums=wrong), groups[3][1]
    path_of(store, name).write_bytes(encode(file.footer.origin, groups))
    problem = problem_of(store, name)
    assert isinstance(problem, DamagedSegment)
    assert problem.why == "group 3: response_ids is not what was written"


def test_a_benchmarks_store_is_one_that_a_run_has_published_and_goes_on_where_it_stopped(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path / "store")
    assert publish_rows(folder, 8 * 600, 2) == {"segments": 600, "written": 600}
    assert publish_rows(folder, 8 * 600, 2) == {"segments": 600, "written": 0}
    store = TeacherStore(folder)
    assert verify(store) == {}
    told = look_through(folder)
    assert (told["rows"], told["segments"], told["parts"]) == (4800, 600, 1)
    keys = store.catalogue().keys.to_pylist()
    assert len(set(keys)) == 4800
    broken = compact_all(folder, seconds=0.0)
    assert (broken["done"], broken["batches"], broken["left"]) == (1, 25, 577)
    assert "merged" not in broken and broken["planned_peak_mb"] > 0
    whole = compact_all(folder)
    assert (whole["merged"], whole["into"], whole["left"]) == (576, 24, 25)
    assert sorted(store.catalogue().keys.to_pylist()) == sorted(keys)
    assert parts_of(folder, ["publish"], 4800, 2, None) == {}  # They would be there twice.
    assert list(parts_of(folder, ["look", "compact"], 4800, 2, 9.0))[-1] == "compact"
    assert miss_groups(folder)["miss_ms"] > 0 and find_all(folder) == {"found": 4800}
    assert first_group(folder, 4800)["first_group_s"] > 0
