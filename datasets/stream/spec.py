"""A group's answers: from the store what it has, from the teacher the rest, which is then stored.

The promise: no published answer is ever asked for again. So an answer is published before it is
passed on, and before anything is asked the name that its segment would get is looked for, since an
earlier try of this very group may have published it. An answer that is stored with a poorer signal
than is wished is *scored*: the teacher reads it and says the signal of just these tokens. So is a
response that came with its prompt.

Blocking work runs in threads; one object serves many groups at a time.

The stream from plan to workers: source, answer stage, shares.

``build_stream`` is called in a dataset factory by Ray Train's controller (each start of the worker
group builds it anew); ``UnevenShares`` deals its blocks to the workers. A delivered block is one
group in the columns of ``datasets.schema.row_schema``, shorter where rows were dropped.

What makes the row bound exact: a block is a group; the source is not fused into the answer stage,
whose event loop its wait for credits would freeze; blocks are dealt one by one without equalising;
workers take ``batch_size=None`` with ``prefetch_batches`` of at most 1. Ray's own limits by bytes
are off: with blocks kept in order they could hold back the one block everybody waits for, and
``max_rows_ahead`` already bounds what is in memory.
"""

from dataclasses import dataclass
from typing import Any

from raystill.config.run import RunConfig
from raystill.config.stream import StreamConfig
from raystill.datasets.rows.signal import Signal


@dataclass(frozen=True)
class Requester:
    """Who pays for what is asked: written into segments. ``purpose``: training or evaluation."""

    run: str
    purpose: str
    teacher_identity: str
    teacher: str


@dataclass(frozen=True)
class StreamSpec:
    """All the stream needs to know; pickled into the controller, the source and the answer stage.

    ``prompt_table``: path or URI of prompts/train.parquet with ``num_rows`` rows.
    ``groups_in_flight``: max_replicas x target_ongoing_requests of the teacher. ``store_path``:
    the teacher store; what is asked is ``paying``'s.
    """

    prompt_table: str
    num_rows: int
    order_seed: int
    signal: Signal
    stream: StreamConfig
    max_rows_ahead: int
    rows_per_step: int
    coordinator: Any
    app_name: str
    groups_in_flight: int
    store_path: str
    requester: Requester

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        prompt_table: str,
        num_rows: int,
        coordinator: Any,
        app_name: str,
        store_path: str,
        requester: Requester,
        signal: Signal,
    ) -> "StreamSpec":
        """The stream of a run."""
        teacher = config.teacher
        return cls(
            prompt_table=prompt_table,
            num_rows=num_rows,
            order_seed=config.section_seeds()["order"],
            signal=signal,
            stream=config.stream,
            max_rows_ahead=config.rows_ahead,
            rows_per_step=config.training.rows_per_step,
            coordinator=coordinator,
            app_name=app_name,
            groups_in_flight=teacher.max_replicas * teacher.target_ongoing_requests,
            store_path=store_path,
            requester=requester,
        )
