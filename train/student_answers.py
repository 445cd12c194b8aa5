"""What the teacher thinks of the student's own answers: KL on contexts that the student wrote.

On teacher-written contexts a student never meets the mistakes it makes when it writes itself; this
figure is measured where they are. *Waits for* the teacher, which scores each answer by one prefill.

Legend: P prompt tokens, T tokens the student wrote, K teacher ids kept for each.
"""

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raystill.cluster.config import RunConfig
from raystill.datasets.schema import TOKEN_IDS
from raystill.datasets.signal import Signal
from raystill.datasets.teacher_calls import TeacherCalls
from raystill.train.batch import Row
from raystill.train.free_running import Written
from raystill.train.row_views import rows_from_table

GROUP_ROWS = 8


def score_answers(
    config: RunConfig, app_name: str, coordinator: Any, written: Written
) -> list[Row]:
    """What the student wrote as rows with the teacher's ``topk`` signal (evaluation.top_k).

    Empty answers, and such as the teacher cannot read, are left out. RunError as `TeacherCalls`.
    """
    wish = Signal("topk", config.evaluation.top_k)
    calls = TeacherCalls(app_name, wish, config.stream.max_attempts, coordinator)
    written = [(row, ids) for row, ids in written if ids]
    groups = [written[i : i + GROUP_ROWS] for i in range(0, len(written), GROUP_ROWS)]

    async def score_all() -> list[pa.Table]:
        return await asyncio.gather(*(_score(calls, group) for group in groups))

    rows = [row for table in asyncio.run(score_all()) for row in rows_from_table(table)]
    return rows


async def _score(calls: TeacherCalls, group: Written) -> pa.Table:
    prompts = pa.array([row.prompt_ids for row, _ in group], TOKEN_IDS)
    responses = pa.array([np.array(ids, np.int32) for _, ids in group], TOKEN_IDS)
    numbers = pa.array([row.row for row, _ in group], pa.int64())
    scored = await calls.score(prompts, responses)
    usable = pc.is_null(scored["error"])
    table = scored.append_column("prompt_ids", prompts)
    for name in ("row", "position"):
        table = table.append_column(name, numbers)
    return table.filter(usable).combine_chunks()
