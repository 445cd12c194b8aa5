"""The answer stage: a group of prompts goes to the teacher, rows of the stream come back.

*Consumes* groups from the source. *Waits for* the teacher. *Unblocked by* its answers, one Serve
call a group, many groups in flight in one process; each is passed on as soon as it is done. Rows
without a usable answer are dropped here and their credits returned.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from raystill.cluster.problems import RunError
from raystill.datasets.schema import row_schema

if TYPE_CHECKING:
    from raystill.datasets.stream import StreamSpec

logger = logging.getLogger(__name__)

TRUNCATED = "length"
LONGEST_PAUSE_S = 10.0
POLL_S = 0.5


class TeacherCalls:
    """Asks the deployed teacher for a group of answers; tries again where a replica failed."""

    def __init__(
        self, app_name: str, kind: str, top_k: int, timeout_s: float, max_attempts: int
    ) -> None:
        self._handle = teacher_handle(app_name)
        self._kind = kind
        self._top_k = top_k
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts

    async def sample(self, prompt_ids: pa.Array) -> pa.Table:
        """Answers in the order of the prompts (answer_schema).

        A dead replica, a dead engine and a time-out are tried again elsewhere, up to the number of
        attempts; then RunError. Other errors are the teacher's own and are passed on.
        """
        prompts = pa.table({"prompt_ids": prompt_ids})
        for attempt in range(1, self._max_attempts + 1):
            try:
                answers = await asyncio.wait_for(self._call(prompts), self._timeout_s)
            except Exception as error:
                if not is_fault(error):
                    raise
                logger.warning("attempt %d of a group failed: %r", attempt, error)
                last = error
                await asyncio.sleep(min(LONGEST_PAUSE_S, 0.1 * 2**attempt))
            else:
                assert len(answers) == len(prompts), (
                    f"the teacher gave {len(answers)} answers to {len(prompts)} prompts"
                )
                return answers
        reason = f"{type(last).__name__}: {first_line(last)}" if first_line(last) else repr(last)
        raise RunError(
            f"the teacher failed {self._max_attempts} times to answer a group of {len(prompts)} "
            f"rows (last: {reason}); see the teacher's log files in the run folder, or raise "
            f"stream.max_attempts or teacher.request_timeout_s ({self._timeout_s:g})"
        ) from last

    async def _call(self, prompts: pa.Table) -> pa.Table:
        response = self._handle.sample.remote(prompts, self._kind, self._top_k)
        try:
            return await response
        except asyncio.CancelledError:  # Timed out: the replica need not go on with it.
            response.cancel()
            raise


def is_fault(error: BaseException) -> bool:
    """Whether asking again elsewhere may help: the replica, its engine or its node is gone."""
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, RayTaskError):  # Raised by the teacher's own code in a live replica.
        return type(error.cause).__name__ == "EngineDeadError"
    gone = (RayActorError, ObjectLostError, BackPressureError, DeploymentUnavailableError)
    return isinstance(error, (TimeoutError, *gone))


def teacher_handle(app_name: str) -> Any:
    """Handle of the teacher's application; waits until it runs, so that loading is no time-out.

    Not bounded here: the driver watches the start-up and ends the run if it takes too long.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while True:
        told = serve.status().applications.get(app_name)
        if told is not None and told.status == ApplicationStatus.RUNNING:
            return serve.get_app_handle(app_name)
        if told is not None and told.status == ApplicationStatus.DEPLOY_FAILED:
            raise RunError(f"the teacher could not be deployed: {told.message}")
        time.sleep(POLL_S)


class AnswerGroup:
    """Ray Data's async map over groups; one instance works on many groups at a time."""

    def __init__(self, spec: "StreamSpec") -> None:
        self._coordinator = spec.coordinator
        self._on_truncated = spec.stream.on_truncated
        self._schema = row_schema(spec.signal.kind, spec.signal.top_k)
        self._teacher = TeacherCalls(
            spec.app_name,
            spec.signal.kind,
            spec.signal.top_k,
            spec.request_timeout_s,
            spec.stream.max_attempts,
        )

    async def __call__(self, block: pa.Table) -> pa.Table:
        """A group (GROUP_SCHEMA) becomes its answered rows (row_schema), in plan order."""
        prompts = unpack_group(block)
        attempt = block["attempt"][0].as_py()
        try:
            answers = await self._teacher.sample(prompts["prompt_ids"].combine_chunks())
            rows, counters = self._join(prompts, answers)
            await self._drop(attempt, prompts, dropped_reasons(answers, self._on_truncated))
        except Exception as error:
            message = told_to_owner(error)
            await self._coordinator.failed.remote(message)
            raise RunError(message) from None if isinstance(error, RunError) else error
        self._coordinator.add.remote(counters)
        return rows

    def _join(self, prompts: pa.Table, answers: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        reasons = dropped_reasons(answers, self._on_truncated)
        columns = {**_columns(prompts), **_columns(answers)}
        rows = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        if reasons.null_count < len(reasons):
            rows = rows.filter(pc.is_null(reasons))
        counters = {
            "rows_asked": len(prompts),
            "rows_answered": len(rows),
            "rows_truncated": pc.sum(pc.equal(rows["finish_reason"], TRUNCATED)).as_py() or 0,
        }
        return rows, counters

    async def _drop(self, attempt: int, prompts: pa.Table, reasons: pa.Array) -> None:
        gone = pc.is_valid(reasons)
        positions = prompts["position"].filter(gone).to_pylist()
        if positions:
            named = reasons.filter(gone).to_pylist()
            await self._coordinator.dropped.remote(attempt, positions, named)


def dropped_reasons(answers: pa.Table, on_truncated: str) -> pa.Array:
    """Why each row is dropped, string; null: it is kept."""
    reasons = answers["error"].combine_chunks()
    if on_truncated == "drop":
        truncated = pc.equal(answers["finish_reason"].combine_chunks(), TRUNCATED)
        mark = pc.if_else(truncated, pa.scalar("truncated"), pa.scalar(None, pa.string()))
        reasons = pc.coalesce(reasons, mark)
    return reasons


def unpack_group(block: pa.Table) -> pa.Table:
    """The rows of a one-row group block: position, row, epoch, source, prompt_ids."""
    assert len(block) == 1, f"a group is one row, but the block has {len(block)}"
    names = ("position", "row", "source", "prompt_ids")
    columns = {name: block[name].combine_chunks().flatten() for name in names}
    epoch = pa.array([block["epoch"][0].as_py()] * len(columns["row"]), pa.int32())
    return pa.table({**columns, "epoch": epoch})


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def told_to_owner(error: BaseException) -> str:
    """What stopped the stage, in a sentence, without the remote traceback Ray wraps around it."""
    cause = getattr(error, "cause", None) or error
    if isinstance(error, RunError) or isinstance(cause, RunError):
        return str(cause)
    return (
        f"answering a group failed with {type(cause).__name__}: {first_line(cause)}; the teacher's "
        "log files in the run folder say more"
    )


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))
