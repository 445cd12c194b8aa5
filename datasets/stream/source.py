"""The source of the stream: one ordered read task that emits the plan group by group.

*Consumes* the prompt table and what rank 0 published. *Waits for* credits before each group.
*Unblocked by* a worker that takes a block, or by dropped rows. It emits prompt ids, and the ids of
responses that came with their prompts, only.

A block is one row that holds a whole group in lists: Ray Data cuts blocks by bytes between rows,
and emits a block as soon as it is over its size limit of one byte, so a group leaves at once and
in one piece. What has been learned is read when the task runs, not when Ray plans the read (it
plans several times, also before anything is published).
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from raystill.datasets.rows.prompt_table import COLUMNS, PromptReader, open_table
from raystill.datasets.rows.schema import STUDENT_PROMPT, TEACHER, TOKEN_IDS
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import Positions, RoutedPlan, epoch_order, remaining_groups

if TYPE_CHECKING:
    from raystill.datasets.stream.spec import StreamSpec

OVERTAKEN = 4
"""Rows that a group of another teacher may be ahead of one that waits, in bounds of rows ahead."""

GROUP_SCHEMA = pa.schema(
    [
        pa.field("attempt", pa.int64()),
        pa.field("epoch", pa.int32()),
        pa.field("position", pa.list_(pa.int64())),
        pa.field("row", pa.list_(pa.int64())),
        pa.field("source", pa.list_(pa.string())),
        pa.field("prompt_ids", pa.list_(TOKEN_IDS)),
        pa.field("response_ids", pa.list_(TOKEN_IDS)),
        pa.field(STUDENT_PROMPT, pa.list_(TOKEN_IDS)),
    ]
)
"""One emitted block: a single row; its lists have one entry a row of the group. Student prompts are
null where they are the teacher's."""


def group_block(prompts: pa.Table, positions: Positions, attempt: int, epoch: int) -> pa.Table:
    """One group as a block of one row (GROUP_SCHEMA)."""
    ends = pa.array([0, len(positions)], pa.int32())

    nothing = pa.nulls(len(positions), TOKEN_IDS)

    def pack(values: pa.Array | pa.ChunkedArray) -> pa.Array:
        flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return pa.ListArray.from_arrays(ends, flat)

    columns = [
        pa.array([attempt], pa.int64()),
        pa.array([epoch], pa.int32()),
        pack(pa.array(positions, pa.int64())),
        *(pack(prompts[name] if name in prompts.column_names else nothing) for name in COLUMNS),
    ]
    return pa.table(columns, schema=GROUP_SCHEMA)


def emit_plan(spec: "StreamSpec") -> Iterator[pa.Table]:
    """Blocks of the rows still to do, in plan order; takes credits before each."""
    published: dict[str, Any] | None = ray.get(spec.coordinator.published.remote())
    assert published is not None, "a worker iterates before rank 0 published its ledger"
    attempt, epoch = published["attempt"], published["epoch"]
    prompts = PromptReader(spec.prompt_table)
    group_rows = spec.stream.group_rows
    order = epoch_order(spec.num_rows, spec.order_seed, epoch, group_rows)
    ledger = Ledger.from_dict(published["ledger"])
    groups = remaining_groups(spec.num_rows, group_rows, ledger)
    if spec.may_overtake:
        plan = routed_plan(spec, order, list(groups))
        for positions in routed(spec.coordinator, plan, attempt):
            yield group_block(prompts.take(order[positions]), positions, attempt, epoch)
        return
    for positions in groups:
        block = group_block(prompts.take(order[positions]), positions, attempt, epoch)
        oldest = None if spec.policy is None else spec.policy.oldest_version(epoch, positions)
        ask = spec.coordinator.acquire.remote(attempt, len(positions), int(positions[0]), oldest)
        if not ray.get(ask):
            return
        yield block


def routed_plan(spec: "StreamSpec", order: Positions, groups: list[Positions]) -> RoutedPlan:
    """The groups by their teachers; one at the seam of two counts as that of its first row."""
    named = open_table(spec.prompt_table).read([TEACHER])[TEACHER]
    firsts = pa.array([order[positions[0]] for positions in groups], pa.int64())
    return RoutedPlan(groups, named.take(firsts).to_pylist(), OVERTAKEN * spec.max_rows_ahead)


def routed(coordinator: Any, plan: RoutedPlan, attempt: int) -> Iterator[Positions]:
    """Groups as they get their credits."""
    number = 0
    while offers := plan.offers():
        group = ray.get(coordinator.acquire_one.remote(attempt, number, offers))
        if group is None:
            return
        yield plan.take(group)
        number += 1


class PlanSource(Datasource):
    """Ray Data's view of ``emit_plan``: always exactly one read task, however it is asked."""

    def __init__(self, spec: "StreamSpec") -> None:
        super().__init__()
        self._spec = spec

    def get_name(self) -> str:
        """Name of the read stage."""
        return "Plan"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: it depends on what is left of the epoch."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task, pure and cheap; Ray calls this several times, also while planning."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(emit_plan, self._spec), metadata)]
