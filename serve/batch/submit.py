"""A batch comes to be at the service, once: its file, its creation, and the search for one.

Where it sits: between `Batches` and the service's ``/files`` and ``/batches``. *Waits for* the
service. What ends here in doubt stays a plan in the journal, for which the next start looks.
"""

import asyncio
from typing import Any

from raystill.serve.api.failures import judge, pause_s
from raystill.serve.api.service import MAX_TRANSIENT, Service, Unanswered
from raystill.serve.batch.journal import Plan

ENDPOINT = "/v1/chat/completions"
METADATA = "raystill"
"""Field of a batch's metadata that holds the plan's name."""
LOOKS, LOOK_AGAIN_S = 2, 5.0
"""How often a batch is looked for before it is held to be not there, and seconds between."""
LISTED_BACK_S = 86_400.0


class Unsure(Unanswered):
    """The service could not be asked whether it has the batch: it may be there, and be paid for."""


async def create(service: Service, window: str, plan: Plan, data: bytes) -> str:
    """Upload a plan's lines and create its batch; the service's id.

    Where the answer to ``create`` is lost, the batch may be there all the same: it is looked for
    before it is created again. The name goes as idempotency key too.

    Raises:
        Unsure: A batch may have been created, and could not be looked for.
        Unanswered: There is no such batch.
    """
    name = f"raystill-{plan.name}.jsonl"
    file = await service.call(
        lambda client: client.files.create(file=(name, data), purpose="batch"),
        file_bytes=len(data),
    )
    attempts, last = 0, None
    while attempts < MAX_TRANSIENT:
        try:
            async with service.in_time():
                batch = await service.client.batches.create(
                    input_file_id=file.id,
                    endpoint=ENDPOINT,
                    completion_window=window,
                    metadata={METADATA: plan.name},
                    extra_headers={"Idempotency-Key": plan.name},
                )
            return str(batch.id)
        except Exception as error:
            verdict = judge(error)
            if isinstance(verdict, str):
                raise Unanswered(verdict) from None
            attempts, last = attempts + verdict.counts, error
            service.limits.failed(verdict.name, verdict.retry_after_s, verdict.too_fast)
            await asyncio.sleep(verdict.retry_after_s or pause_s(max(1, attempts)))
            found = await look_for(service, plan)
            if found is not None:
                return found
    raise Unanswered(service.gave_up(attempts, last))


async def look_for(service: Service, plan: Plan) -> str | None:
    """The service's id of a plan's batch, by its metadata; None: there is none. Raises Unsure."""

    async def look(client: Any) -> str | None:
        async for batch in await client.batches.list(limit=100):
            if (batch.metadata or {}).get(METADATA) == plan.name:
                return str(batch.id)
            if batch.created_at < plan.created - LISTED_BACK_S:
                return None
        return None

    for number in range(LOOKS):
        if number:
            await asyncio.sleep(LOOK_AGAIN_S)
        try:
            found = await service.call(look)
        except Unanswered as error:
            raise Unsure(str(error)) from None
        if found is not None:
            return found
    return None
