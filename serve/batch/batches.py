"""Answers in batches: gathered, uploaded, awaited for hours, and never paid for twice.

Where it sits: between `BatchEngine`, which wants one line a key, and the service's ``/files`` and
``/batches``. *Consumes* questions until none has come for ``gather_s`` or a batch is full. *Waits
for* the service, which it asks every ``poll_s``. *Unblocks* the rows of a batch when it has ended.
What happens is in the journal before its effect can be lost (`journal.BatchJournal`), so that a
later process goes on with the same batches.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raystill.base.formatting import plural
from raystill.config.base import ApiConfig, BatchConfig
from raystill.datasets.rows.schema import FATAL
from raystill.serve.api.failures import describe
from raystill.serve.api.limits import Limits, Spending, Usage
from raystill.serve.api.parsed import LEAST_BYTES
from raystill.serve.api.service import Service, Unanswered
from raystill.serve.batch.journal import NEVER, BatchJournal, Line, Lines, Plan
from raystill.serve.batch.submit import ENDPOINT, Unsure, create, look_for

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
LIMIT_CODES = frozenset({"token_limit_exceeded"})
"""Of a batch that the service has no room for yet."""
MOST_BYTES = 190_000_000
"""Of one file; services take 200 MB."""
POLL_ATTEMPTS = 200
"""Failures in a row of one poll, up to a minute apart, before the run gives the service up."""
CHECK_S = 0.05
READ_AT_ONCE = 2
"""Lines of files, which may be long."""


@dataclass(frozen=True)
class Question:
    """What is asked for one key. body: of the chat completion. cost: the most of it.

    prompt_tokens: of it, by our own count.
    """

    body: Mapping[str, Any]
    cost: float
    prompt_tokens: int


@dataclass
class _Open:
    """A plan that this process knows of.

    held: of the budget. dormant: nobody has asked for its rows yet, so it is neither read nor
    followed. ended: with what came back, or Unanswered.
    """

    plan: Plan
    held: float = 0.0
    dormant: bool = False
    ended: "asyncio.Future[Lines]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass
class _Waiting:
    """A question that is in no batch yet. placed: the batch it came into, or a row's error."""

    question: Question
    placed: "asyncio.Future[_Open | str]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batches:
    """The batches of one run's service.

    run: path of the run folder. charged: gives the usage of an answer's line.
    """

    def __init__(
        self,
        api: ApiConfig,
        service: Service,
        journal: BatchJournal,
        run: str,
        spending: Spending,
    ) -> None:
        assert api.batch is not None
        self._api = api
        self._settings: BatchConfig = api.batch
        self._service = service
        self._limits: Limits = service.limits
        self._journal = journal
        self._run = run
        self._spending = spending
        self._of_key: dict[str, _Open] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._last = 0.0
        self._most_rows = self._settings.max_rows
        self._open = 0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    async def start(self, usage_of_line: Any, line_bytes: int) -> None:
        """Takes up what earlier processes have submitted. Raises Unanswered.

        usage_of_line: from a Line and the tokens of its prompt to its Usage. line_bytes: of a line,
        at most in the mean over a file.
        """
        self._usage_of, self._line_bytes = usage_of_line, line_bytes
        for plan in await asyncio.to_thread(self._journal.plans):
            if plan.status is None and plan.batch is None:
                if plan.run != self._run:  # Another run may be about to submit it.
                    continue
                found = await look_for(self._service, plan)
                if found is None:
                    await asyncio.to_thread(self._journal.ended, plan, NEVER, None)
                    continue
                plan = await asyncio.to_thread(self._journal.submitted, plan, found)
            await self._take_up(plan)
        self._run_task(self._collect())

    async def line(self, key: str, question: Question) -> Line | str | None:
        """What came back for a key; None: nothing did. A text is a row's error."""
        while True:
            follows = self._of_key.get(key) or await self._placed(key, question)
            if isinstance(follows, str):
                return follows
            if follows.dormant:
                follows.dormant = False
                self._follow_soon(follows)
            try:
                lines = await asyncio.shield(follows.ended)
            except Unanswered as error:
                return str(error)
            if not lines.later:
                try:
                    async with self._reading:
                        return await asyncio.to_thread(lines.line, key)
                except OSError as error:  # Removed meanwhile, as by `revoke`.
                    return f"{FATAL}a batch's lines cannot be read: {describe(error)}"
            if self._of_key.get(key) is follows:
                self.forget(key)

    async def _placed(self, key: str, question: Question) -> "_Open | str":
        """The batch that a question comes into, or a row's error."""
        if key not in self._waiting:
            self._waiting[key] = _Waiting(question)
            self._last = time.monotonic()
            self._wake.set()
        return await asyncio.shield(self._waiting[key].placed)

    def forget(self, key: str) -> None:
        """What came back for the key cannot be used: it is asked for again."""
        self._of_key.pop(key, None)

    def close(self) -> None:
        """Ends the tasks; the batches go on at the service."""
        for task in self._tasks:
            task.cancel()

    def _run_task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_up(self, plan: Plan) -> None:
        """A plan of an earlier process: its answers are here, or it is still at the service."""
        if plan.status == NEVER:
            return
        follows = _Open(plan, dormant=True)
        self._of_key.update((key, follows) for key in plan.keys)
        if plan.run != self._run or plan.name in self._spending.batches:
            return
        follows.dormant = False  # What it costs is this run's.
        follows.held = plan.most
        self._limits.hold_anyway(plan.most)  # Also where a lower max_cost no longer covers it.
        self._follow_soon(follows)

    def _follow_soon(self, follows: _Open) -> None:
        self._open += 1
        self._run_task(self._follow(follows))

    async def _collect(self) -> None:
        """Makes batches of what waits, one after another; they are followed side by side."""
        while True:
            await self._wake.wait()
            try:
                await self._next_batch()
            except Exception as error:  # The journal cannot be written.
                self._give_up(f"{FATAL}a batch could not be noted: {describe(error)}")
            if not self._waiting:
                self._wake.clear()

    async def _next_batch(self) -> None:
        """Waits until no question comes any more, and submits what the budget covers."""
        while len(self._waiting) < self._most_rows and self._quiet_s() < 0:
            await asyncio.sleep(CHECK_S)
        keys, data, cost = self._take()
        if keys:
            tokens = tuple(self._waiting[key].question.prompt_tokens for key in keys)
            url, model = str(self._api.base_url), str(self._api.model)
            await self._submit(Plan(self._run, url, model, tuple(keys), cost, tokens), data)
        elif self._open:  # Until a batch ends and leaves room in the budget.
            await asyncio.sleep(CHECK_S)
        else:
            least = min(w.question.cost for w in self._waiting.values())
            self._give_up(f"{FATAL}{self._limits.reached(least)}")

    def _give_up(self, told: str) -> None:
        for key in list(self._waiting):
            self._waiting.pop(key).placed.set_result(told)

    def _quiet_s(self) -> float:
        """Seconds since no question has come for ``gather_s``; negative before."""
        return time.monotonic() - self._last - self._settings.gather_s

    def _take(self) -> tuple[list[str], bytes, float]:
        """As many questions as a file takes and the budget covers; their sum is held."""
        keys: list[str] = []
        lines: list[bytes] = []
        size, cost = 0, 0.0
        for key, waiting in self._waiting.items():
            request = {"custom_id": key, "method": "POST", "url": ENDPOINT}
            line = json.dumps({**request, "body": waiting.question.body}).encode() + b"\n"
            full = len(keys) >= self._most_rows or (keys and size + len(line) > MOST_BYTES)
            if full or not self._limits.hold(waiting.question.cost):
                break
            keys.append(key)
            lines.append(line)
            size, cost = size + len(line), cost + waiting.question.cost
        return keys, b"".join(lines), cost

    async def _submit(self, plan: Plan, data: bytes) -> None:
        placed: _Open | str
        await asyncio.to_thread(self._journal.planned, plan)
        try:
            batch = await create(self._service, self._settings.window, plan, data)
        except Unanswered as error:
            if not isinstance(error, Unsure):  # Else it may have to be paid: the next start looks.
                self._limits.release(plan.most)
                await asyncio.to_thread(self._journal.ended, plan, NEVER, None)
            placed = str(error)
        else:
            plan = await asyncio.to_thread(self._journal.submitted, plan, batch)
            placed = _Open(plan, plan.most)
            self._of_key.update((key, placed) for key in plan.keys)
            self._limits.count("batches")
            self._follow_soon(placed)
        for key in plan.keys:
            self._waiting.pop(key).placed.set_result(placed)

    async def _follow(self, follows: _Open) -> None:
        """Waits for a batch and takes what it brought."""
        try:
            follows.ended.set_result(await self._result(follows.plan))
        except Exception as error:
            told = str(error) if isinstance(error, Unanswered) else f"{FATAL}{describe(error)}"
            follows.ended.set_exception(Unanswered(told))
            follows.ended.exception()  # Also where no row of this run waits for it.
        finally:
            self._open -= 1
            self._limits.release(follows.held)

    async def _result(self, plan: Plan) -> Lines:
        if plan.status is not None:
            lines = await asyncio.to_thread(self._journal.lines, plan)
            await self._charge(plan, lines)
            return lines
        batch = await self._polled(plan)
        if batch.status == "failed":
            await self._failed(plan, batch)
            return Lines({}, later=True)
        most = LEAST_BYTES + self._line_bytes * len(plan.keys)
        with self._journal.room() as room:
            for file in (batch.output_file_id, batch.error_file_id):
                if file:
                    await self._service.receive(file, room, most)
                    room.write(b"\n")
            room.seek(0)
            plan = await asyncio.to_thread(self._journal.ended, plan, batch.status, room)
        lines = await asyncio.to_thread(self._journal.lines, plan)
        for name, number in (("repeated_line", lines.repeated), ("broken_line", lines.broken)):
            for _ in range(number):
                self._limits.count(name)
        await self._charge(plan, lines)
        return lines

    async def _polled(self, plan: Plan) -> Any:
        """The batch, once it has ended."""
        while True:
            try:
                batch = await self._service.call(
                    lambda client: client.batches.retrieve(plan.batch), POLL_ATTEMPTS
                )
            except Unanswered as error:
                day = time.strftime("%Y-%m-%d", time.gmtime(plan.created))
                raise Unanswered(
                    f"{error}; it is about batch {plan.batch} of {day} "
                    f"({plural(len(plan.keys), 'row')}), which {self._journal.folder.path}/"
                    f"{plan.name}.plan.json belongs to: use the key it was submitted with, or "
                    "remove that file to have its rows asked for, and paid for, again"
                ) from None
            if batch.status in ENDED:
                return batch
            await asyncio.sleep(self._settings.poll_s)

    async def _failed(self, plan: Plan, batch: Any) -> None:
        """The service has refused the whole file, and charges nothing.

        Smaller ones go later where it had no room for so many tokens; else raises Unanswered.
        """
        errors = (batch.errors.data if batch.errors is not None else None) or []
        await asyncio.to_thread(self._journal.ended, plan, batch.status, b"")
        self._limits.count("batch_failed")
        alone = len(plan.keys) == 1 and self._open <= 1
        if errors and all(error.code in LIMIT_CODES for error in errors) and not alone:
            self._most_rows = max(1, len(plan.keys) // 2)
            await asyncio.sleep(self._settings.poll_s)
            return
        told = "; ".join(f"{error.code}: {error.message}" for error in errors[:3])
        raise Unanswered(
            f"{FATAL}{plan.service} refuses a batch of {plural(len(plan.keys), 'row')} "
            f"({told or 'without a reason'}); see teacher.api.batch"
        )

    async def _charge(self, plan: Plan, lines: Lines) -> None:
        """Accounts for a batch of this run once, over all its starts."""
        if plan.run != self._run or plan.name in self._spending.batches:
            return
        counts = dict(zip(plan.keys, plan.prompt_tokens, strict=False))
        usages: list[Usage] = []
        each = lines.each()
        while (one := await asyncio.to_thread(next, each, None)) is not None:
            key, line = one
            if line.status == 200:
                usages.append(self._usage_of(line, counts.get(key, 0)))
        self._limits.account(usages, plan.name)
