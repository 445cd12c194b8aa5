"""Prompts that do not fit into memory: the same tables, few bytes a row, and a full disk."""

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import ConfigError
from raystill.config.run import RunConfig
from raystill.datasets.prompts import select
from raystill.datasets.prompts import tables as prompt_tables
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.spool import equal, progress, spool
from raystill.datasets.spool.equal import group_numbers, is_first
from raystill.datasets.spool.spool import Picked, Spool, TokenLists, token_lists

COUNTING = pa.proxy_memory_pool(pa.default_memory_pool())
"""Counts what one test has in Arrow's memory. It has to outlive whatever was made in it."""
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 rows."""
    monkeypatch.setattr(spool, "CHUNK_ROWS", 7)


def tables(path: Path, **sections: Any) -> PromptTables:
    prompts = {"path": str(path), **sections.pop("prompts", {})}
    model = {"teacher": {"model": str(TINY)}, "student": {"layers": [0]}}
    config = RunConfig.model_validate({**model, "prompts": prompts, **sections})
    tokeniser = PromptTokeniser(TINY, config.prompts)
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    return build_prompt_tables(config, tokeniser, 500)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_spool_is_read_like_a_list(short: None) -> None:
    items = Spool([str(n) for n in range(30)])
    items.extend(["30", "31"])
    assert (len(items), items[0], items[29], items[-1]) == (32, "0", "29", "31")
    assert list(items) == [str(n) for n in range(32)]
    assert list(items[5:9]) == ["5", "6", "7", "8"]
    assert list(Picked(items, np.array([31, 0, 15]))) == ["31", "0", "15"]
    with pytest.raises(IndexError):
        items[32]
    assert list(Spool[str]()) == []


def test_token_lists_are_taken_in_any_order(short: None) -> None:
    rows = [None if n % 5 == 3 else np.arange(n, dtype=np.int32) for n in range(20)]
    lists = TokenLists()
    for start in range(0, 20, 7):
        lists.append(rows[start : start + 7])
    assert len(lists) == 20
    assert lists.lengths().tolist() == [0 if row is None else len(row) for row in rows]
    shown = [None if row is None else row.tolist() for row in rows]
    assert [None if row is None else row.tolist() for row in lists] == shown
    assert [None if (row := lists[n]) is None else row.tolist() for n in range(20)] == shown
    order = np.array([0, 0, 19, 6, 7, 13, 3, 18, 18])
    assert lists.take(order).to_pylist() == [shown[n] for n in order]
    assert lists.take(order[:0]).to_pylist() == []


def test_equal_rows_have_one_number_that_ascends_with_the_first() -> None:
    digests = np.array([[5, 1], [2, 2], [5, 1], [5, 2], [2, 2]], np.uint64)
    assert group_numbers(digests).tolist() == [0, 1, 0, 2, 1]
    assert group_numbers(digests, np.array([0, 1, 1, 0, 1], np.int32)).tolist() == [0, 1, 2, 3, 1]


@pytest.mark.parametrize("seed", range(4))
def test_equal_rows_are_found_some_at_a_time(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(equal, "SORTED_ROWS", 3)
    for size in (0, 1, 2, 50, 2000):
        words = random.integers(0, 2**63, (max(1, size // 3), 2)).astype(np.uint64)
        words[::2, seed % 2] = words[0, seed % 2]  # One half of the hash is the same.
        words[1::5] = words[0]
        digests = words[random.integers(0, len(words), size)]
        teacher = random.integers(0, 3, size).astype(np.int32)
        for of in (None, teacher):
            seen: dict[tuple[int, ...], int] = {}
            rows = zip(*digests.T.tolist(), [0] * size if of is None else of.tolist(), strict=True)
            numbers = [seen.setdefault(row, len(seen)) for row in rows]
            assert group_numbers(digests, of).tolist() == numbers
            firsts = [number not in numbers[:place] for place, number in enumerate(numbers)]
            assert is_first(digests, of).tolist() == firsts


def test_tables_are_the_same_from_a_file_as_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "prompt": f"question {n % 31}" if n % 9 else " ",
            "source": "abt"[n % 3],
            "answer": ["yes", None, "", "no"][n % 4],
        }
        for n in range(60)
    ]
    path = write(tmp_path / "p.jsonl", rows)

    def made() -> list[Any]:
        found = tables(
            path,
            prompts={"response_field": "answer"},
            evaluation={"held_out_sources": ["t"], "held_out_rows": 3},
        )
        found = found.with_keys("identity", "float32", None, {"temperature": 1.0})
        lengths = (
            found.longest_asked_prompt,
            found.longest_row(9),
            found.response_tokens("train", 9),
        )
        told = [found.dropped, found.first_dropped, found.duplicates, lengths]
        return [found.train, found.held_out, *told, found.samples.tolist()]

    whole = made()
    assert (len(whole[0]), len(whole[1]), whole[4]) == (6, 13, 8), whole
    monkeypatch.setattr(spool, "CHUNK_ROWS", 7)
    assert made() == whole
    monkeypatch.setattr(select, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(equal, "SORTED_ROWS", 3)
    monkeypatch.setattr(prompt_tables, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(prompt_tables, "ROWS_PER_BLOCK", 3)
    again = made()
    assert again == whole and again[0]["prompt_ids"].num_chunks == 2


def test_a_row_takes_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and numpy hold at the most beside the table's ids, which are numpy's; Arrow's and
    the tokenizer's memory is not in it.
    """
    monkeypatch.setattr(spool, "CHUNK_ROWS", 250)
    monkeypatch.setattr(progress, "BATCH_PROMPTS", 250)
    monkeypatch.setattr(select, "ROWS_AT_ONCE", 250)
    monkeypatch.setattr(equal, "SORTED_ROWS", 250)
    monkeypatch.setattr(prompt_tables, "ROWS_PER_CHUNK", 250)
    num = 8_000
    path = write(tmp_path / "p.jsonl", [{"prompt": f"what is {n} and {n}?"} for n in range(num)])
    few = write(tmp_path / "few.jsonl", [{"prompt": f"what is {n}?"} for n in range(9)])
    tables(few, evaluation={"held_out_rows": 1})  # What is loaded once.
    tracemalloc.start()
    try:
        found = tables(path, evaluation={"held_out_rows": 64})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.train.num_rows == num - 64
    peak -= found.train.nbytes
    assert peak / num < 140, f"{peak / num:.0f} bytes a row"
    # The table itself: 4 bytes a token, and 40 for all else.
    assert found.train.nbytes / num < 4 * found.longest_prompt_tokens + 40


def test_the_tables_are_in_arrows_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither building them nor making their keys copies a whole column."""
    monkeypatch.setattr(spool, "CHUNK_ROWS", 100)
    monkeypatch.setattr(prompt_tables, "ROWS_PER_CHUNK", 200)
    rows = [{"prompt": f"what is {n} and {n}?"} for n in range(4_000)]
    path = write(tmp_path / "p.jsonl", rows)
    before = pa.default_memory_pool()
    pa.set_memory_pool(COUNTING)
    try:
        found = tables(path, evaluation={"held_out_rows": 64})
        found = found.with_keys("identity", "float32", None, {"temperature": 1.0})
        assert found.longest_asked_prompt == found.longest_prompt_tokens
    finally:
        pa.set_memory_pool(before)
    assert COUNTING.max_memory() < 1.2 * found.train.nbytes


def test_a_full_temporary_folder_is_named(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    path = write(tmp_path / "p.jsonl", [{"prompt": f"what is {n}?"} for n in range(20)])
    with pytest.raises(ConfigError, match=r"TMPDIR: .* \(No space left on device\); set the"):
        tables(path, evaluation={"held_out_rows": 2})


def test_rows_are_taken_as_arrow_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_ROWS", 7)
    generator = np.random.default_rng(0)
    for _ in range(200):
        count, nulls = int(generator.integers(0, 40)), generator.choice([0.0, 0.3, 1.0])
        rows = [
            None if generator.random() < nulls else np.arange(n, dtype=np.int32)
            for n in generator.integers(0, 6, count)
        ]
        lists = TokenLists()
        for start in range(0, count, 7):
            lists.append(rows[start : start + 7])
        wanted = generator.integers(0, max(count, 1), generator.integers(0, 50) if count else 0)
        wanted = np.sort(wanted) if generator.random() < 0.5 else wanted
        taken = lists.take(wanted)
        taken.validate(full=True)
        assert taken.equals(token_lists(rows).take(pa.array(wanted)))


def test_taking_rows_needs_none_of_arrows_memory() -> None:
    """Its pool keeps what it frees for a while: tables took twice their size while being made."""
    lists, size = TokenLists(), spool.CHUNK_ROWS
    for start in range(0, 3 * size, size):
        lists.append([np.full(100, start + i, np.int32) for i in range(size)])
    before, peak = pa.default_memory_pool(), COUNTING.max_memory()
    pa.set_memory_pool(COUNTING)
    try:
        kept = pa.allocate_buffer(peak + 1 - COUNTING.bytes_allocated(), memory_pool=COUNTING)
        peak = COUNTING.max_memory()  # Of this test alone from here on.
        taken = lists.take(np.arange(0, 3 * size, 2))
    finally:
        pa.set_memory_pool(before)
    del kept
    assert len(taken.values) == 150 * size
    assert COUNTING.max_memory() - peak < taken.nbytes / 10
