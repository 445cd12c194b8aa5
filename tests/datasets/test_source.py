"""The prompt table's random access and the blocks cut from it, without a cluster."""

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import RunFolder
from raystill.datasets.prompts import reader
from raystill.datasets.rows.schema import PROMPT_SCHEMA, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.stream import source
from raystill.datasets.stream.answer_stage import dropped_reasons, unpack_group, with_foreign


@pytest.fixture
def prompts(tmp_path):
    rows = list(range(50))
    prompts = [[row] * (row % 4) for row in rows]
    given = [[row, 1] if row % 2 else None for row in rows]
    columns = [rows, [bytes(16)] * 50, prompts, ["a", "b"] * 25, given]
    folder = RunFolder(str(tmp_path))
    folder.write_table("prompts.parquet", pa.table(columns, schema=PROMPT_SCHEMA), 7)
    return reader.PromptReader(folder.join("prompts.parquet"))


def test_rows_come_in_the_order_asked_across_row_groups(prompts):
    assert prompts.num_rows == 50
    rows = np.array([49, 0, 6, 7, 20])
    taken = prompts.take(rows)
    assert taken["row"].to_pylist() == rows.tolist()
    assert taken["prompt_ids"].to_pylist() == [[row] * (row % 4) for row in rows]


def test_only_as_much_is_held_as_allowed(prompts, monkeypatch):
    monkeypatch.setattr(reader, "CACHE_BYTES", 400)
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


def test_rows_with_an_id_that_the_student_has_not_are_dropped_by_that_reason():
    """A model may draw an id that its tokenizer does not name, from a padded row of its head."""
    columns = [[[1, 9], [2], [10], []], ["stop"] * 3 + [None], [None] * 3 + ["too_long"]]
    answers = pa.table(columns, schema=answer_schema(Signal("text")))
    prompts = pa.table({"prompt_ids": pa.array([[3], [12, 3], [4], [5]], pa.list_(pa.int32()))})
    reasons = dropped_reasons(answers, "keep")
    told = with_foreign(reasons, prompts, answers, 10).to_pylist()
    assert told == [None, "foreign_id", "foreign_id", "too_long"]
    assert with_foreign(reasons, prompts, answers, None).to_pylist() == [None] * 3 + ["too_long"]
    # Slices keep their own rows apart.
    sliced = with_foreign(reasons.slice(1), prompts.slice(1), answers.slice(1), 10)
    assert sliced.to_pylist() == told[1:]
