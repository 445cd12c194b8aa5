"""Token pairs of the answers that a run has trained on, for the baselines.

They are counted once, at the end of a run, from the teacher store: counting them step by step would
cost each step time, and each checkpoint space.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base.run_folder import TRAIN_PROMPTS
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.prompt_table import PromptReader
from raystill.datasets.rows.schema import student_prompts
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.plan import epoch_order
from raystill.run import Run
from raystill.train.evaluation.baselines import PairCounts

MOST_ROWS = 100_000
"""Rows that are read at most: of more, as many in equal steps through the prompt table."""
ROWS_AT_ONCE = 1024


def count_pairs(run: Run, vocab_size: int, epoch: int, dropped: dict[int, str]) -> PairCounts:
    """Pairs of the teacher's answers to the rows that were trained.

    epoch: the last one. dropped: the positions of it that were dropped; their rows are left out.
    """
    counts = PairCounts(vocab_size)
    reader = PromptReader(run.folder.join(TRAIN_PROMPTS))
    keys = run.folder.read_table(TRAIN_PROMPTS, ["key"])["key"]
    view = StoreView(TeacherStore(run.store_path), keys, Signal("text"))
    for rows in _chosen(run, epoch, dropped):
        prompts = reader.take(rows)
        before = student_prompts(prompts).combine_chunks()
        given = prompts["response_ids"].combine_chunks()
        for places, answers in view.look_up(rows, given).answered:
            responses = answers["response_ids"].combine_chunks()
            counts.add(zip(_lists(before.take(pa.array(places))), _lists(responses), strict=True))
    return counts


def _chosen(run: Run, epoch: int, dropped: dict[int, str]) -> Iterator[NDArray[np.int64]]:
    """Numbers of the rows to count, ascending, some at a time."""
    seed, group_rows = run.config.section_seeds()["order"], run.config.stream.group_rows
    order = epoch_order(run.num_rows, seed, epoch, group_rows)
    number = min(run.num_rows, MOST_ROWS)
    rows = np.linspace(0, max(0, run.num_rows - 1), number).round().astype(np.int64)
    rows = np.setdiff1d(rows, order[np.array(sorted(dropped), dtype=np.int64)])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _lists(column: pa.ListArray) -> Iterator[NDArray[np.int32]]:
    """A view of each list of an int32 list column."""
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return (values[start:end] for start, end in pairwise(offsets))
