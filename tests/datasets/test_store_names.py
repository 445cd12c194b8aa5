"""Names of a store's segments in few bytes, and what a large store takes of a process's memory."""

import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from raystill.datasets.lookup.files import part_files, read_part, write_part
from raystill.datasets.lookup.index import live_in
from raystill.datasets.lookup.part import Part
from raystill.datasets.lookup.rows import ROW, Rows
from raystill.datasets.store.reading import Listing, Names, is_in, places_in
from raystill.datasets.store.segment import Provenance
from raystill.datasets.store.store import TeacherStore
from tests.datasets.test_store import origin

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
