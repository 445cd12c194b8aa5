"""How fast a service is asked, and for how much money.

Rows take turns: at most ``max_concurrency`` at once, no more requests and tokens a minute than are
configured, and none while the service has asked to wait. After "too many requests" half as many go
at once, and one more after each round of answers that went well (additive increase, multiplicative
decrease). A turn is only had where the budget covers the most that it may cost, so that the sum is
never above ``max_cost`` by what was in flight.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from raystill.base.records import RESTORE, BrokenFile, MetricsLog, number, read_lines
from raystill.base.redact import shown_value
from raystill.base.run_folder import SPENDING, RunFolder, named_file
from raystill.config.base import ApiConfig, PricesConfig

logger = logging.getLogger(__name__)

MINUTE_S = 60.0
DEFAULT_WAIT_S = 5.0
"""Pause after "too many requests" without a time."""
POLL_S = 0.05
OF_AN_ANSWER = frozenset({"api_told_tokens", "api_unmapped_mass"})
"""Counters that come with each answer: they are noted with the next one, in one line."""
ROUNDING = 1e-9
"""Share of a budget that sums of costs may be off by, which come and go in any order."""
UPLOAD_S, UPLOAD_BYTES_A_S = 2.0, 1 << 20
"""From a payment to its upload into a remote run folder: so long, and longer for a long file."""


class BudgetReached(Exception):
    """``max_cost`` does not cover another row."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: read, of these from the service's cache, written, of these unseen."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def cost(self, prices: PricesConfig | None) -> float:
        """What they cost, in the currency of the prices; 0 without prices."""
        if prices is None:
            return 0.0
        cached = prices.input if prices.cached_input is None else prices.cached_input
        fresh = max(0, self.input - self.cached)
        return (fresh * prices.input + self.cached * cached + self.output * prices.output) / 1e6


class Turn:
    """One request that may go; ``paid`` says what it took."""

    def __init__(self) -> None:
        self.usage: Usage | None = None

    def paid(self, usage: Usage) -> None:
        """The service has answered and charges this."""
        self.usage = usage


class Pace:
    """How fast a service is asked with one key: adaptive, and at most so much a minute.

    most: requests at once when all goes well; 0: nobody asks yet. Rates of None are not kept.
    """

    def __init__(
        self,
        most: int,
        requests: int | None,
        tokens: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._at_once = float(most), float(most)
        self._requests, self._tokens = requests, tokens
        self._clock = clock
        self._wait_until = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._in_minute = 0
        """Tokens of `_recent`."""

    @property
    def at_once(self) -> int:
        """Requests that may go at once, now."""
        return max(1, int(self._at_once))

    @property
    def has_rates(self) -> bool:
        """Whether requests or tokens a minute are bounded."""
        return bool(self._requests or self._tokens)

    def allow(self, most: int, requests: int | None, tokens: int | None) -> None:
        """Other bounds; as many more go at once as are allowed more, or fewer."""
        self._at_once = min(float(most), max(1.0, self._at_once + most - self._most))
        self._most, self._requests, self._tokens = float(most), requests, tokens

    def may_go(self, running: int, tokens: int) -> bool:
        """Whether a request of so many tokens may go beside ``running``; it then counts."""
        now = self._clock()
        if running >= self.at_once or now < self._wait_until:
            return False
        if not self._within_rates(now, tokens):
            return False
        self._recent.append((now, tokens))  # Also without rates: they may be told later.
        self._in_minute += tokens
        return True

    def answered(self) -> None:
        """A request went well."""
        self._at_once = min(self._most, self._at_once + 1 / max(1.0, self._at_once))

    def failed(self, retry_after_s: float | None, too_fast: bool) -> None:
        """One failed in a way that may pass."""
        if too_fast:
            self._at_once = max(1.0, self._at_once / 2)
        if too_fast or retry_after_s is not None:
            self.pause(DEFAULT_WAIT_S if retry_after_s is None else retry_after_s)

    def pause(self, seconds: float) -> None:
        """Nobody goes for so long."""
        self._wait_until = max(self._wait_until, self._clock() + seconds)

    def _within_rates(self, now: float, tokens: int) -> bool:
        while self._recent and self._recent[0][0] <= now - MINUTE_S:
            self._in_minute -= self._recent.popleft()[1]
        if self._requests is not None and len(self._recent) >= self._requests:
            return False
        # One that is larger than the rate itself goes alone.
        most = self._tokens
        return most is None or not self._recent or self._in_minute + tokens <= most


class SharedPace(Protocol):
    """A pace that others share, in other processes."""

    async def turn(self, tokens: int) -> int:
        """Waits until a request of so many tokens may go; its number."""

    def ended(self, number: int, answered: bool) -> None:
        """It has ended. answered: and went well."""

    def failed(self, retry_after_s: float | None, too_fast: bool) -> None:
        """As `Pace.failed`."""


class Limits:
    """The limits of one service in one process.

    Args:
        config: Rates, prices, budget.
        spent: What earlier starts of the run have spent.
        report: Is given counters to add up: ``api_requests``, ``api_cost``, ``api_<failure>``, ...,
            and the name of the batch that they are of, if any.
        clock: Monotonic seconds.
        shared: The pace where other teachers ask the service with the same key.
    """

    def __init__(
        self,
        config: ApiConfig,
        spent: float = 0.0,
        report: Callable[..., None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        shared: SharedPace | None = None,
    ) -> None:
        self._config = config
        self._report = report or (lambda counters, batch=None: None)
        self.spent = spent
        self._shared = shared
        rates = (config.requests_per_minute, config.tokens_per_minute)
        if shared is not None:  # Which keeps them for all.
            rates = (None, None)
        self._pace = Pace(config.max_concurrency, *rates, clock)
        self._reserved = 0.0
        self._running = 0
        self._queue = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def at_once(self) -> int:
        """Requests that may go at once, now, by what this process knows."""
        return self._pace.at_once

    @asynccontextmanager
    async def turn(self, prompt_tokens: int, max_tokens: int) -> AsyncIterator[Turn]:
        """Waits until a request of so many tokens may go. Raises BudgetReached."""
        cost = Usage(input=prompt_tokens, output=max_tokens).cost(self._config.prices)
        number = await self._wait(prompt_tokens + max_tokens, cost)
        self._running += 1
        self._reserved += cost
        turn = Turn()
        try:
            yield turn
        finally:
            self._running -= 1
            self._reserved -= cost
            self._freed.set()
            if self._shared is not None:
                self._shared.ended(number, turn.usage is not None)
            if turn.usage is not None:
                self._pace.answered()
                self.account([turn.usage])

    def failed(self, name: str, retry_after_s: float | None, too_fast: bool) -> None:
        """A request failed in a way that may pass."""
        self.count(name)
        if self._shared is None:
            self._pace.failed(retry_after_s, too_fast)
        else:
            self._shared.failed(retry_after_s, too_fast)

    def lost(self, prompt_tokens: int, max_tokens: int) -> None:
        """A request was sent whose answer did not arrive whole: it may be charged for, at most so.

        That is told beside ``api_cost`` and not in it, nor in what ``max_cost`` bounds.
        """
        cost = Usage(input=prompt_tokens, output=max_tokens).cost(self._config.prices)
        if cost:
            self._report({"api_lost_cost": cost})

    def count(self, name: str) -> None:
        """One more of a kind, for the report."""
        self._report({f"api_{name}": 1})

    def told(self, tokens: int, unmapped: float) -> None:
        """An answer has log probabilities, in which so much is no id, summed over its tokens."""
        self._report({"api_told_tokens": tokens, "api_unmapped_mass": unmapped})

    def hold(self, cost: float) -> bool:
        """Sets so much of the budget aside, until ``release``; False if that is not left."""
        covered = self._covers(cost)
        if covered:
            self._reserved += cost
        return covered

    def hold_anyway(self, cost: float) -> None:
        """As ``hold``, of what is already on its way."""
        self._reserved += cost

    def release(self, cost: float) -> None:
        """Ends ``hold``: what was really paid is accounted for."""
        self._reserved -= cost

    def account(self, usages: Sequence[Usage], batch: str | None = None) -> None:
        """The service has answered and charges this: one usage for each request."""
        cost = sum(usage.cost(self._config.prices) for usage in usages)
        self.spent += cost
        counters = {
            "api_requests": len(usages),
            "api_input_tokens": sum(usage.input for usage in usages),
            "api_cached_tokens": sum(usage.cached for usage in usages),
            "api_output_tokens": sum(usage.output for usage in usages),
            "api_reasoning_tokens": sum(usage.reasoning for usage in usages),
            "api_cost": cost,
        }
        self._report(counters, batch)

    def reached(self, cost: float) -> BudgetReached:
        """What is said where an answer of that cost is not covered any more."""
        return BudgetReached(
            f"teacher.api.max_cost ({self._config.max_cost:g}) is reached: {self.spent:.4f} is "
            f"spent, and the next answer may cost {cost:.4f}; raise it and start the run again, "
            "which goes on from here: what is paid is kept"
        )

    def _covers(self, cost: float) -> bool:
        return self._is_within(self.spent + self._reserved + cost)

    def _is_within(self, cost: float) -> bool:
        budget = self._config.max_cost
        return budget is None or cost <= budget * (1 + ROUNDING)

    async def _wait(self, tokens: int, cost: float) -> int:
        """Rows go in the order they came: only the first looks whether it may, the others wait for
        it. Hundreds that each look many times a second take time that answers need.

        Returns the number of the shared turn; 0 where nobody shares it.
        """
        async with self._queue:
            while not self._may_go(tokens, cost):
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):  # Time alone may let it go too.
                        await self._freed.wait()
            if self._shared is None:
                return 0
            self._reserved += cost  # What is spent meanwhile leaves room for it.
            try:
                return await self._shared.turn(tokens)
            finally:
                self._reserved -= cost

    def _may_go(self, tokens: int, cost: float) -> bool:
        """Whether a request may go now; it then counts. Raises BudgetReached."""
        if not self._is_within(self.spent + cost):
            raise self.reached(cost)
        return self._covers(cost) and self._pace.may_go(self._running, tokens)


def _cost(line: dict[str, Any], where: str) -> float:
    """What a line says was paid. BrokenFile for less than nothing, or NaN: no bound would hold."""
    told = line.get("api_cost")
    cost = 0.0 if told is None else number(told)
    if cost is None or cost < 0:
        problem = f"has an api_cost of {shown_value(told, 40)}, expected a number from 0 up"
        raise BrokenFile(f"{where} {problem}; {RESTORE}")
    return cost


class Spending:
    """What a run has spent at a service, and how it failed, over all its starts: a line in a file
    for each answer and each failure, also of starts that end in an error.
    """

    def __init__(self, folder: RunFolder, teacher: str = "") -> None:
        """teacher: its name among several, each of which has a file of its own."""
        file = named_file(SPENDING, teacher)
        self._log = MetricsLog(folder, file, keep_more=True)
        self._writing = threading.Lock()
        self._timer: threading.Timer | None = None
        lines = read_lines(folder, file)
        self.cost = sum(_cost(line, folder.join(file)) for line in lines)
        self.batches = {str(line["batch"]) for line in lines if line.get("batch")}
        """Names of the batches that are accounted for."""
        self._later: Counter[str] = Counter()

    def add(self, counters: dict[str, float], batch: str | None = None) -> None:
        """Note what was paid, once a batch, or what has failed."""
        if counters.keys() <= OF_AN_ANSWER:
            self._later.update(counters)
            return
        line: dict[str, Any] = {"step": 0, "time": time.time(), **counters, **self._later}
        self._later.clear()
        if batch is not None:
            line["batch"] = batch
            self.batches.add(batch)
        self._log.append(line)
        if not self._log.is_local and self._timer is None:
            self._timer = threading.Timer(UPLOAD_S + self._log.size / UPLOAD_BYTES_A_S, self.upload)
            self._timer.daemon = True
            self._timer.start()

    def upload(self) -> None:
        """Write what is noted into a remote run folder; a failure is told, and the next payment
        tries again.
        """
        try:
            with self._writing:
                self._timer = None  # Before it is read: what is noted from now on needs another.
                self._log.upload()
        except Exception:
            logger.exception("what is spent could not be written to the run folder")

    def close(self) -> None:
        """Write what is not yet written into a remote run folder."""
        if self._timer is not None:
            self._timer.cancel()
            self.upload()
