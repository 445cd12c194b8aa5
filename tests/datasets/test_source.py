"""The prompt table's random access and the blocks cut from it, without a cluster."""

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import RunFolder
from raystill.datasets.prompts import tables
from raystill.datasets.rows.schema import PROMPT_SCHEMA, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream import source
from raystill.datasets.stream.answer_stage import dropped_reasons, unpack_group


@pytest.fixture
def prompts(tmp_path):
    rows = list(range(50))
    prompts = [[row] * (row % 4) for row in rows]
    given = [[row, 1] if row % 2 else None for row in rows]
    columns = [rows, [bytes(16)] * 50, prompts, ["a", "b"] * 25, given]
    folder = RunFolder(str(tmp_path))
    folder.write_table("prompts.parquet", pa.table(columns, schema=PROMPT_SCHEMA), 7)
    return tables.PromptReader(folder.join("prompts.parquet"))


def test_rows_come_in_the_order_asked_across_row_groups(prompts):
    assert prompts.num_rows == 50
    rows = np.array([49, 0, 6, 7, 20])
    taken = prompts.take(rows)
    assert taken["row"].to_pylist() == rows.tolist()
    assert taken["prompt_ids"].to_pylist() == [[row] * (row % 4) for row in rows]


def test_only_as_much_is_held_as_allowed(prompts, monkeypatch):
    monkeypatch.setattr(tables, "CACHE_BYTES", 400)
    for start in range(0, 48, 8):
        prompts.take(np.arange(start, start + 8))
    held = sum(part.nbytes for part in prompts._held.values())
    assert held == prompts._held_bytes <= 400


def test_a_group_travels_as_one_row_and_comes_out_whole(prompts):
    rows, positions = np.array([5, 3, 4]), np.array([8, 9, 11])
    block = source.group_block(prompts.take(rows), positions, attempt=2, epoch=1)
    assert len(block) == 1
    assert block["attempt"].to_pylist() == [2]
    group = unpack_group(pa.concat_tables([block, block]).slice(1, 1))
    assert group["row"].to_pylist() == [5, 3, 4]
    assert group["position"].to_pylist() == [8, 9, 11]
    assert group["epoch"].to_pylist() == [1, 1, 1]
    assert group["prompt_ids"].to_pylist() == [[5], [3, 3, 3], []]
    assert group["source"].to_pylist() == ["b", "b", "a"]
    assert group["response_ids"].to_pylist() == [[5, 1], [3, 1], None]


def test_truncated_rows_are_dropped_only_on_request_and_errors_always():
    columns = [[[1], [2], []], ["length", "stop", None], [None, None, "too_long"]]
    answers = pa.table(columns, schema=answer_schema(Signal("text")))
    assert dropped_reasons(answers, "keep").to_pylist() == [None, None, "too_long"]
    assert dropped_reasons(answers, "drop").to_pylist() == ["truncated", None, "too_long"]
