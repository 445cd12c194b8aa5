"""The stream from plan to workers: source, answer stage, shares.

``build_stream`` is called in a dataset factory by Ray Train's controller (each start of the worker
group builds it anew); ``UnevenShares`` deals its blocks to the workers. A delivered block is one
group in the columns of `row_schema` (datasets/rows/schema.py), shorter where rows were dropped.

What makes the row bound exact: a block is a group; the source is not fused into the answer stage,
whose event loop its wait for credits would freeze; blocks are dealt one by one without equalising;
workers take ``batch_size=None`` with ``prefetch_batches`` of at most 1. Ray's own limits by bytes
are off: with blocks kept in order they could hold back the one block everybody waits for, and
``max_rows_ahead`` already bounds what is in memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.train import DataConfig

from raystill.datasets.stream.answer_stage import AnswerGroup
from raystill.datasets.stream.source import PlanSource
from raystill.datasets.stream.spec import StreamSpec

GROUPS_PER_ACTOR = 384
"""Groups one answering process has in flight at most, those of 8 replicas at the defaults; most of
them only wait."""
CALLS_PER_PLACE = 2
"""Calls an answering process holds for each that it runs, the others wait in its queue: Ray Data
looks ten times a second, and a place that is free would stay so until then."""
NO_LIMIT = 1e6
SOURCE_BUFFER_GROUPS = 256
"""Groups that have their credits and wait for Ray Data to look at the source."""

NODE_ID_LABEL = "ray.io/node-id"
BACKPRESSURE = "backpressure_policies.enabled"


class GroupsStayWhole(ExecutionCallback):
    """Before each execution: the plan has the shape the row bound rests on, or nothing starts.

    The source emits a block as soon as it holds one byte; the answer stage makes one block of one
    block, of any size.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Check the physical plan and set the source's block size."""
        stages = [op for op in executor._topology if op.input_dependencies]
        names = [op.name for op in stages]
        fits = len(stages) >= 2 and names[0] == "ReadPlan" and "AnswerGroup" in names[1]
        assert fits and "->" not in names[1], (
            f"Ray Data planned the stages {names}; expected the source ReadPlan and the answer "
            "stage as two, since a source fused into it would freeze the answers in flight"
        )
        stages[0].override_target_max_block_size(1)


def stream_context(order: str) -> DataContext:
    """Ray Data's options for the stream, from the current ones."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = None
    context.execution_options.preserve_order = order == "fixed"
    context.execution_options.verbose_progress = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.set_config(BACKPRESSURE, [])
    context.op_resource_reservation_enabled = False  # Budgets that only such policies would read.
    # Where blocks fill three quarters of what they may, Ray Data asks the autoscaler for one more
    # node of each kind it has, teachers' nodes with their GPUs among them, and keeps those there.
    context.override_object_store_memory_limit_fraction = NO_LIMIT
    context.memory_usage_poll_interval_s = None  # A thread a task, for a figure nobody reads.
    context.execution_no_progress_timeout_s = -1  # A slow teacher or student is no failure.
    context.custom_execution_callback_classes = [GroupsStayWhole]
    # Ray Data looks at its tasks ten times a second and takes what each holds ready; of its default
    # of 2 blocks the source would pass on ten groups a second, whatever waits for them.
    context._max_num_blocks_in_streaming_gen_buffer = SOURCE_BUFFER_GROUPS
    return context


def build_stream(spec: StreamSpec) -> Dataset:
    """The dataset of answered rows; lazy. Whoever iterates it starts one execution."""
    places = spec.groups_in_flight
    if spec.may_overtake:  # Calls to one teacher that wait must not take the places of another's.
        places = max(places, math.ceil(spec.max_rows_ahead / spec.stream.group_rows))
    num_actors = math.ceil(places / GROUPS_PER_ACTOR)
    in_flight = math.ceil(places / num_actors)
    if spec.groups_wait:  # And what they wait for must have a place, however calls are dealt out.
        in_flight = spec.max_rows_ahead
    with DataContext.current(stream_context(spec.stream.order)):
        groups = ray.data.read_datasource(
            PlanSource(spec),
            override_num_blocks=1,
            num_cpus=0,
            concurrency=1,
            max_calls=1,  # Sets it apart from the answer stage: unequal arguments do not fuse.
        )
        return groups.map_batches(
            AnswerGroup,
            fn_constructor_args=(spec,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ActorPoolStrategy(
                size=num_actors,
                max_tasks_in_flight_per_actor=CALLS_PER_PLACE * in_flight,
                max_concurrent_calls_per_actor=in_flight,
            ),
        )


class UnevenShares(DataConfig):
    """Deals every row: Ray Train's own shares are made equal by dropping the remainder.

    The stream's processes stay on the workers' nodes, to which its rows go: they ask for no CPU,
    and elsewhere one of them would keep a teacher's node from being given back.

    Keeps the options the dataset was built with. No locality hints: they make the splitter hold
    blocks back, which nobody would hand out credits for.
    """

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Any = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One shard of each dataset for every worker."""
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            if worker_node_ids:
                nodes = ",".join(sorted(set(worker_node_ids)))
                dataset.context.execution_options.label_selector = {NODE_ID_LABEL: f"in({nodes})"}
            for rank, shard in enumerate(uneven_shares(dataset, world_size)):
                output[rank][name] = shard
        return output


def uneven_shares(dataset: Dataset, world_size: int) -> list[Any]:
    """Iterators over disjoint shares of all rows, one for each of ``world_size`` workers."""
    return dataset.streaming_split(world_size, equal=False)


def iterate_groups(shard: Any) -> Iterator[pa.Table]:
    """A worker's groups as they come, each a table of ``row_schema``; empty ones left out.

    Ray Data's ``prefetch_batches`` keeps each group back until the next one is there. Without it a
    thread of its own still fetches one group ahead, while the student computes.
    """
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        if len(block):
            yield block
