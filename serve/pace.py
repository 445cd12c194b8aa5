"""The pace of services that several teachers of a run ask with one key.

Where it sits: one actor for the run, which the replicas of these teachers ask before each request.
It holds requests and tokens a minute and what was learned of "too many requests", by service and
key; each replica keeps its own ``max_concurrency`` and budget. *Waits for* room. *Unblocked by* the
ends of others' requests, or time.

Keys never come here: a replica names its account by a digest. An actor that is lost is started
again by Ray; since nobody knows what went in the last minute, accounts with rates then wait one.
"""

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from raystill.base.errors import RunError
from raystill.base.logs import write_line
from raystill.config.base import ApiConfig
from raystill.config.run import RunConfig
from raystill.placement.services import account_of, least_rates, same_service
from raystill.serve.api.limits import MINUTE_S, POLL_S, Pace

MOST_CALLS = 1000
"""Calls that the actor works on at a time: those that wait are one for each teacher."""
AGAIN_S, GIVE_UP_S = 0.5, 300.0
"""Between two looks for an actor that is lost, and how long it is looked for."""


@dataclass
class _Account:
    """One service with one key. members: by teacher, the life of its replica and its settings."""

    pace: Pace
    members: dict[str, tuple[str, ApiConfig]] = field(default_factory=dict)
    running: set[tuple[str, int]] = field(default_factory=set)
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class SharedPaces:
    """What the actor does. was_lost: another one before it has let requests go."""

    def __init__(self, was_lost: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._known_from = clock() + (MINUTE_S if was_lost else 0)
        """From when on all requests of the last minute are known."""
        self._accounts: dict[bytes, _Account] = {}
        self._of_life: dict[str, _Account] = {}
        self._left: set[tuple[str, int]] = set()

    async def join(self, account: bytes, teacher: str, life: str, api: ApiConfig) -> None:
        """A replica of a teacher; an earlier one of it has ended, and so have its requests."""
        own = self._accounts.setdefault(account, _Account(Pace(0, None, None, self._clock)))
        before = own.members.get(teacher)
        if before is not None and before[0] != life:
            self._of_life.pop(before[0], None)
            own.running = {turn for turn in own.running if turn[0] != before[0]}
        own.members[teacher], self._of_life[life] = (life, api), own
        apis = {name: one for name, (_, one) in own.members.items()}
        most = sum(one.max_concurrency for one in apis.values())
        own.pace.allow(most, *least_rates(apis))
        if own.pace.has_rates:
            own.pace.pause(self._known_from - self._clock())
        own.freed.set()

    async def turn(self, life: str, number: int, tokens: int) -> bool:
        """Waits until a request may go; False: this life is not known here, and is to join."""
        account = self._of_life.get(life)
        if account is None:
            return False
        async with account.queue:
            while (life, number) not in self._left:
                if life not in self._of_life:  # Its replica is another one now.
                    return False
                if account.pace.may_go(len(account.running), tokens):
                    account.running.add((life, number))
                    return True
                account.freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await account.freed.wait()
        self._left.discard((life, number))
        return True

    async def ended(self, life: str, number: int, answered: bool, waits: bool = False) -> None:
        """A request has ended; waits: its turn may not have come, and is not wanted any more."""
        account = self._of_life.get(life)
        if account is None:
            return
        if waits and (life, number) not in account.running:
            self._left.add((life, number))
        account.running.discard((life, number))
        if answered:
            account.pace.answered()
        account.freed.set()

    async def failed(self, life: str, retry_after_s: float | None, too_fast: bool) -> None:
        """A request of one of the teachers failed in a way that may pass: all go slower."""
        if (account := self._of_life.get(life)) is not None:
            account.pace.failed(retry_after_s, too_fast)


class ActorPace:
    """The actor as the replica of one teacher asks it (`limits.SharedPace`)."""

    def __init__(self, actor: Any, teacher: str, api: ApiConfig, salt: str) -> None:
        """salt: of the run, for the digest of the key that this process has."""
        self._actor = actor
        self._teacher, self._api = teacher, api
        self._account = account_of(api, salt)
        self._life = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    async def turn(self, tokens: int) -> int:
        """Waits until a request may go, also for an actor that is started again; its number.

        Raises RunError where it does not come again.
        """
        from ray.exceptions import RayActorError

        number, lost_at = next(self._numbers), math.inf
        try:
            while True:
                try:
                    if await self._actor.turn.remote(self._life, number, tokens):
                        return number
                    lost_at = math.inf
                    await self._actor.join.remote(
                        self._account, self._teacher, self._life, self._api
                    )
                except RayActorError as error:
                    if lost_at == math.inf:
                        write_line("the pace of a shared service is lost; it is waited for")
                    lost_at = min(lost_at, time.monotonic())
                    if time.monotonic() - lost_at > GIVE_UP_S:
                        raise RunError(
                            f"what keeps the pace of {self._api.base_url} for several teachers is "
                            f"gone ({error}); start the run again: what is answered is kept"
                        ) from None
                    await asyncio.sleep(AGAIN_S)
        except asyncio.CancelledError:
            self._actor.ended.remote(self._life, number, False, waits=True)
            raise

    def ended(self, number: int, answered: bool) -> None:
        """A request has ended."""
        self._actor.ended.remote(self._life, number, answered)

    def failed(self, retry_after_s: float | None, too_fast: bool) -> None:
        """A request failed in a way that may pass."""
        self._actor.failed.remote(self._life, retry_after_s, too_fast)


def start_paces(config: RunConfig) -> dict[str, Any]:
    """The actor by each teacher that shares a service with another one; it dies with the driver.

    Whether they have one key is known where they have it: each asks for its own account.
    """
    names = [name for group in same_service(config).values() for name in group]
    if not names:
        return {}
    import ray

    class PaceActor(SharedPaces):
        def __init__(self) -> None:
            super().__init__(ray.get_runtime_context().was_current_actor_reconstructed)

    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": MOST_CALLS}
    actor = ray.remote(PaceActor).options(**options).remote()
    return dict.fromkeys(names, actor)
