"""Who reads which prompt while a student is measured whose teacher sees more."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.run_folder import HELD_OUT_PROMPTS, RunFolder
from raystill.datasets.rows.schema import CONTEXT_SCHEMA, ENGINE, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.rows import Row, rows_from_table
from raystill.train.evaluation.free_running import _score, teacher_prompts


class Scorer:
    async def score(self, prompt_ids, response_ids):
        self.asked = prompt_ids.to_pylist()
        tokens = response_ids.to_pylist()
        values = [[-0.5] * len(ids) for ids in tokens]
        columns = [tokens, ["stop"] * len(tokens), [None] * len(tokens), values]
        schema = answer_schema(Signal("sampled")).with_metadata({ENGINE: json.dumps({})})
        return pa.table(columns, schema=schema)


@pytest.mark.parametrize("sees_more", [True, False])
def test_the_teacher_scores_the_students_answers_after_its_own_prompt(tmp_path, sees_more):
    folder = RunFolder(str(tmp_path)).ensure()
    columns = [[0, 1], [bytes(16)] * 2, [[1, 2, 3], [4, 5, 6]], ["s"] * 2, [None] * 2, [[7], [8]]]
    folder.write_table(HELD_OUT_PROMPTS, pa.table(columns, schema=CONTEXT_SCHEMA))
    prompts = SimpleNamespace(teacher_sees_more=sees_more)
    run = SimpleNamespace(config=SimpleNamespace(prompts=prompts), folder=folder)
    held_out = [Row(n, n, np.array([7 + n], np.int32), np.array([9], np.int32)) for n in (0, 1)]
    written = [(held_out[1], [11, 12]), (held_out[0], [13])]
    scorer = Scorer()
    rows = rows_from_table(asyncio.run(_score(scorer, written, teacher_prompts(run))))
    assert scorer.asked == ([[4, 5, 6], [1, 2, 3]] if sees_more else [[8], [7]])
    assert [row.prompt_ids.tolist() for row in rows] == [[8], [7]], "the student's own"
    assert [row.response_ids.tolist() for row in rows] == [[11, 12], [13]]
    assert [row.row for row in rows] == [1, 0]
