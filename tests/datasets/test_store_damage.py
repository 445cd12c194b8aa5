"""One broken thing in a store costs what is broken, and nothing beside it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import FOOTER, footer_checksum
from raystill.datasets.store.reading import DamagedSegment, NewerSegment
from raystill.datasets.store.removal import put_all_back, set_aside
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from tests.datasets.test_store import TOPK, keys_of, publish

HOSTILE = "a" * 32 + ".parquet"


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


def asked(store: TeacherStore, count: int) -> list[int]:
    """Which of the first rows a run would ask its teacher for."""
    keys = pa.chunked_array([keys_of(list(range(count)))])
    looked_up = StoreView(store, keys, TOPK).look_up(np.arange(count), pa.nulls(count, TOKEN_IDS))
    return looked_up.to_ask.tolist()


def segment_file(store: TeacherStore, name: str) -> Path:
    return Path(store.path, "segments", name)


def spoil(store: TeacherStore, name: str, group: int, column: str = "response_ids") -> None:
    """Flip a bit of a group's values."""
    path = segment_file(store, name)
    columns = pq.ParquetFile(path).metadata.row_group(group)
    chunks = [columns.column(number) for number in range(columns.num_columns)]
    (chunk,) = (chunk for chunk in chunks if chunk.path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(data)


def with_footer(store: TeacherStore, name: str, change: Any) -> bytes:
    """A segment with another footer, whose checksum holds."""
    table = pq.read_table(segment_file(store, name))
    footer = json.loads(table.schema.metadata[FOOTER])
    del footer["footer_checksum"]
    change(footer)
    footer["footer_checksum"] = footer_checksum(footer)
    text = json.dumps(footer, sort_keys=True).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FOOTER: text}), sink)
    return bytes(sink.getvalue())


def test_a_damaged_group_is_asked_again_alone_and_the_others_are_never_removed(
    store: TeacherStore,
) -> None:
    for start in (0, 3, 6, 9):
        publish(store, [start, start + 1, start + 2])
    assert compact(store).into == 1
    (name,) = store.names()
    spoil(store, name, group=1)
    before = store.open(name).footer.groups
    assert len(before) == 4 and len(asked(store, 12)) == 3
    assert list(prune(store, verify(store), None, dry_run=True).files) == [name]
    assert store.names() == [name]
    assert prune(store, verify(store), None, dry_run=False).files == [name]
    assert verify(store) == {} and store.catalogue().rows == 9 and len(asked(store, 12)) == 3
    (left,) = store.names()
    groups = store.open(left).footer.groups
    assert sorted(map(str, groups)) == sorted(str(g) for i, g in enumerate(before) if i != 1)


def test_rows_of_a_damaged_group_are_found_in_another_segment(store: TeacherStore) -> None:
    for start in (0, 3):
        publish(store, [start, start + 1, start + 2])
    compact(store)
    (name,) = store.names()
    publish(store, [0, 1, 2], run="again")
    for group in (0, 1):
        spoil(store, name, group)
    assert asked(store, 6) == [3, 4, 5]
    assert len(prune(store, verify(store), None, dry_run=False).files) == 1
    assert store.catalogue().rows == 3, "nothing of it was sound"


def test_sound_rows_stay_where_they_could_not_be_written_elsewhere(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in (0, 3):
        publish(store, [start, start + 1, start + 2])
    compact(store)
    (name,) = store.names()
    spoil(store, name, group=0)
    refused = verify(store)

    def torn(self: TeacherStore, file: str, data: bytes) -> bool:
        segment_file(self, file).write_bytes(data[:-9])
        return True

    monkeypatch.setattr(TeacherStore, "put", torn)
    pruned = prune(store, refused, None, dry_run=False)
    assert (pruned.files, set(pruned.refused)) == ([], {name})
    assert name in store.names() and len(store.open(name).read(1, ["key"])) == 3


WRONG: dict[str, Any] = {
    "a run that is a list": lambda f: f["groups"][0].update(run=["x"]),
    "a run that is a number": lambda f: f["groups"][0].update(run=3),
    "a purpose that is an object": lambda f: f["groups"][0].update(purpose={}),
    "scored in words": lambda f: f["groups"][0].update(scored="x"),
    "scored as a list": lambda f: f["groups"][0].update(scored=[]),
    "rows as a fraction": lambda f: f["groups"][0].update(rows=3.0),
    "rows as a truth": lambda f: f["groups"][0].update(rows=True),
    "a checksum that is none": lambda f: f["groups"][0]["checksums"].update(key=[]),
    "an identity that is a list": lambda f: f["origin"].update(teacher_identity=["x"]),
    "a vocabulary in words": lambda f: f["origin"].update(vocab_size="1000"),
    "a vocabulary beyond numbers": lambda f: f["origin"].update(vocab_size=10**30),
    "no teacher": lambda f: f["origin"].update(teacher=None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_footer_of_other_types_is_refused_by_name_and_never_merged(
    store: TeacherStore, name: str
) -> None:
    for start in (0, 3):
        own = publish(store, [start, start + 1, start + 2])
    segment_file(store, HOSTILE).write_bytes(with_footer(store, own, WRONG[name]))
    assert asked(store, 7) == [6]
    (error,) = verify(store).values()
    assert isinstance(error, NewerSegment | DamagedSegment) and error.name == HOSTILE
    done = compact(store)
    assert (done.merged, done.into, set(done.refused)) == (2, 1, {HOSTILE})
    assert asked(store, 7) == [6]


def test_a_footer_without_end_of_depth_is_damaged(store: TeacherStore) -> None:
    own = publish(store, [0, 1, 2])
    table = pq.read_table(segment_file(store, own))
    deep = b'{"schema_version": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    pq.write_table(table.replace_schema_metadata({FOOTER: deep}), segment_file(store, HOSTILE))
    assert asked(store, 4) == [3]
    assert {n: type(e) for n, e in verify(store).items()} == {HOSTILE: DamagedSegment}
    assert prune(store, verify(store), None, dry_run=False).files == [HOSTILE]


def test_a_stray_file_whose_name_is_not_utf_8_stops_nothing(store: TeacherStore) -> None:
    for start in (0, 3):
        publish(store, [start, start + 1, start + 2])
    stray = os.fsencode(f"{store.path}/segments/") + b"\xff.parquet"
    Path(os.fsdecode(stray)).write_bytes(b"x")
    assert asked(store, 7) == [6] and len(store.names()) == 2
    assert compact(store).merged == 2 and verify(store) == {}
    assert prune(store, verify(store), None, dry_run=False).files == []
    assert os.path.exists(stray)


def test_a_segment_that_was_set_aside_comes_back_beside_a_link_to_nothing(
    store: TeacherStore,
) -> None:
    name = publish(store, [0, 1, 2])
    folder = f"{store.path}/segments"
    assert set_aside(folder, name) is not None
    os.symlink("nowhere", f"{folder}/{name}")
    put_all_back(folder)
    assert asked(store, 4) == [3]
