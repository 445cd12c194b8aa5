"""Teachers that ask one service with one key share its limits; others do not."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raystill.base.errors import RunError
from raystill.config.base import ApiConfig
from raystill.config.run import RunConfig
from raystill.placement.services import account_of, same_account, same_service, service_of
from raystill.serve import pace as pace_module
from raystill.serve.api.limits import MINUTE_S, Limits, Pace, Usage
from raystill.serve.pace import ActorPace, SharedPaces, start_paces
from tests.support.scripted_service import KEY, TEXT, Asked, Service, scripted_service, teacher_of

OTHER_KEY = "planted-other-key-77aa01"
QUIET_S = 0.2
"""Without any turn given, after which the clock of a test goes on by a minute."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("OTHER_API_KEY", OTHER_KEY)
    monkeypatch.setattr(pace_module, "AGAIN_S", 0.02)
    with scripted_service(monkeypatch) as server:
        yield server


class Actor:
    """The handle of an actor that is in this process, has a clock of its own, and can be lost."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.paces: SharedPaces | None = self.started()
        self.calls: Counter[str] = Counter()
        self.told: list[Any] = []
        self.turns: Counter[float] = Counter()
        """Turns that were given, by the time on the clock."""

    def started(self, was_lost: bool = False) -> SharedPaces:
        return SharedPaces(was_lost, lambda: self.now)

    def __getattr__(self, name: str) -> Any:
        actor = self

        class Method:
            def remote(self, *arguments: Any, **more: Any) -> "asyncio.Future[Any]":
                actor.calls[name] += 1
                actor.told.append((name, arguments, more))
                return asyncio.ensure_future(actor.call(name, *arguments, **more))

        return Method()

    async def call(self, name: str, *arguments: Any, **more: Any) -> Any:
        paces = self.paces
        if paces is None:
            if name in ("turn", "join"):
                raise RayActorError()
            return None
        answer = await getattr(paces, name)(*arguments, **more)
        if paces is not self.paces:
            raise RayActorError()
        if name == "turn" and answer:
            self.turns[self.now] += 1
        return answer

    async def goes_on(self) -> None:
        """Lets a minute pass whenever nobody gets a turn any more."""
        while True:
            before = self.turns.total()
            await asyncio.sleep(QUIET_S)
            if self.turns.total() == before:
                self.now += MINUTE_S + 1


async def all_of(*asked: Asked) -> None:
    """All questions of all teachers, at once."""
    for one in asked:
        await one.engine.start()
    told = await asyncio.gather(*(one.engine.sample(one.prompts, TEXT) for one in asked))
    assert all(answer.error is None for answers in told for answer in answers)


async def while_time_goes_on(actor: Actor, *asked: Asked) -> None:
    goes_on = asyncio.create_task(actor.goes_on())
    try:
        await all_of(*asked)
    finally:
        goes_on.cancel()


def teacher(folder: Path, service: Any, name: str, number: int, actor: Actor, **api: Any) -> Asked:
    """A teacher with so many questions."""
    asked = [f"{name} {i}" for i in range(number)]
    settings = {"request_timeout_s": 300.0, **api}
    return Asked(folder / name, service, asked, name=name, pace=(actor, "run"), **settings)


def test_two_teachers_with_one_key_never_exceed_their_joint_rate(
    tmp_path: Path, service: Service
) -> None:
    actor = Actor()
    rates = {"one": {"requests_per_minute": 5}, "other": {"requests_per_minute": 9}}
    one = teacher(tmp_path, service, "one", 8, actor, max_concurrency=8, **rates["one"])
    other = teacher(tmp_path, service, "other", 5, actor, max_concurrency=2, **rates["other"])
    asyncio.run(while_time_goes_on(actor, one, other))
    assert sum(service.asked.values()) == actor.turns.total() == 13
    assert max(actor.turns.values()) <= 5, "the smaller of the two, for both"
    assert len(actor.turns) >= 3
    assert KEY not in repr(actor.told), "nobody but the service is told the key"


def test_tokens_a_minute_are_of_both(tmp_path: Path, service: Service) -> None:
    """A question and its longest answer are 34 tokens."""
    actor = Actor()
    asked = [
        teacher(tmp_path, service, name, 3, actor, tokens_per_minute=limit)
        for name, limit in (("one", 1000), ("other", 70))
    ]
    asyncio.run(while_time_goes_on(actor, *asked))
    assert max(actor.turns.values()) <= 2 and actor.turns.total() == 6


def test_one_url_in_two_spellings_is_one_service(tmp_path: Path, service: Service) -> None:
    class Spelt:
        url = service.url + "/"

    actor = Actor()
    one = teacher(tmp_path, service, "one", 3, actor, requests_per_minute=4)
    other = teacher(tmp_path, Spelt(), "other", 3, actor, requests_per_minute=4)
    asyncio.run(while_time_goes_on(actor, one, other))
    assert max(actor.turns.values()) <= 4 and actor.turns.total() == 6


def test_teachers_with_different_keys_have_limits_of_their_own(
    tmp_path: Path, service: Service
) -> None:
    actor = Actor()
    one = teacher(tmp_path, service, "one", 4, actor, requests_per_minute=4)
    its_own = {"requests_per_minute": 4, "api_key_env": "OTHER_API_KEY"}
    other = teacher(tmp_path, service, "other", 4, actor, **its_own)
    asyncio.run(all_of(one, other))
    assert actor.turns == {1000.0: 8}, "no minute had to pass"
    assert service.keys == {f"Bearer {KEY}", f"Bearer {OTHER_KEY}"}


def test_an_actor_that_is_lost_costs_a_minute_and_no_rate_is_exceeded(
    tmp_path: Path, service: Service
) -> None:
    actor = Actor()
    one = teacher(tmp_path, service, "one", 6, actor, requests_per_minute=4)
    other = teacher(tmp_path, service, "other", 6, actor, requests_per_minute=4)

    async def lose() -> None:
        while not actor.turns.total():
            await asyncio.sleep(0.01)
        actor.paces = None
        await asyncio.sleep(0.1)
        actor.paces = actor.started(was_lost=True)

    async def run() -> None:
        losing = asyncio.create_task(lose())
        await while_time_goes_on(actor, one, other)
        await losing

    asyncio.run(run())
    assert sum(service.asked.values()) == 12
    assert max(actor.turns.values()) <= 4
    assert actor.calls["join"] >= 4, "each told the new one what it may do"


def test_too_many_of_one_hold_the_other_back_too() -> None:
    async def run() -> None:
        actor = Actor()
        one, other = (account(actor, name, max_concurrency=4) for name in ("one", "other"))
        assert await one.turn(1) and await other.turn(1)
        one.failed(1000.0, too_fast=True)
        assert await within(0.2, other.turn(1)) is None
        actor.now += 1001
        assert [bool(await within(5, other.turn(1))) for _ in range(2)] == [True, True]
        assert await within(0.2, one.turn(1)) is None, "half of eight go at once, of both"

    asyncio.run(run())


def account(actor: Any, teacher: str, **api: Any) -> ActorPace:
    settings = ApiConfig(base_url="http://h/v1", model="m", api_key_env=None, **api)
    return ActorPace(actor, teacher, settings, "run")


async def within(seconds: float, waits: Any) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await waits
    except TimeoutError:
        return None


def test_an_actor_that_never_comes_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "AGAIN_S", 0.01)
    monkeypatch.setattr(pace_module, "GIVE_UP_S", 0.1)

    async def run() -> None:
        actor = Actor()
        pace = account(actor, "one")
        assert await pace.turn(1)
        actor.paces = None
        with pytest.raises(RunError, match="start the run again"):
            await pace.turn(1)

    asyncio.run(run())


@pytest.mark.parametrize("was_lost", [True, False])
def test_one_that_tells_of_rates_later_knows_what_went_before(was_lost: bool) -> None:
    """The teacher that joins first has no rates of its own: its requests go at once, and count."""

    async def run() -> None:
        actor = Actor()
        actor.paces = actor.started(was_lost)
        free = account(actor, "free", max_concurrency=8)
        assert [await within(5, free.turn(1)) for _ in range(3)] == [1, 2, 3]
        bound = account(actor, "bound", max_concurrency=8, requests_per_minute=4)
        went = [await within(0.2, bound.turn(1)) for _ in range(2)]
        assert went == ([None, None] if was_lost else [1, None])
        actor.now += MINUTE_S + 1
        assert await within(5, bound.turn(1)) and await within(5, free.turn(1))

    asyncio.run(run())


def test_what_a_dead_replica_asked_for_is_over_when_the_next_one_comes() -> None:
    async def run() -> None:
        actor = Actor()
        first = account(actor, "one", max_concurrency=2)
        assert [await first.turn(1), await first.turn(1)] == [1, 2]
        assert await within(0.2, first.turn(1)) is None
        again = account(actor, "one", max_concurrency=2)  # Of the same teacher.
        assert await within(60, again.turn(1)) and await within(60, again.turn(1))
        other = account(actor, "other", max_concurrency=1)
        assert await within(60, other.turn(1)) == 1, "as many more as it brings"
        assert await within(0.2, other.turn(1)) is None

    asyncio.run(run())


def test_a_row_that_is_cancelled_while_it_waits_takes_no_turn() -> None:
    async def run() -> None:
        actor = Actor()
        pace = account(actor, "one", max_concurrency=1)
        held = await pace.turn(1)
        assert await within(0.1, pace.turn(1)) is None
        pace.ended(held, answered=True)
        assert await within(60, pace.turn(1)) is not None
        assert await within(0.1, pace.turn(1)) is None

    asyncio.run(run())


def test_the_budget_of_each_is_its_own_and_holds_while_it_waits_for_the_others() -> None:
    async def run() -> None:
        actor = Actor()
        prices = {"input": 1e6, "output": 1e6}
        settings = ApiConfig(
            base_url="http://h/v1", model="m", max_concurrency=1, prices=prices, max_cost=4.0
        )
        other = account(actor, "other", max_concurrency=1)
        assert await other.turn(1)
        limits = Limits(settings, shared=account(actor, "one", max_concurrency=1))
        async with limits.turn(1, 1) as turn:
            turn.paid(Usage(input=1, output=1))
        waits = asyncio.create_task(limits._wait(2, 2.0))
        await asyncio.sleep(0.1)
        assert limits.spent == 2.0 and await waits
        limits.hold_anyway(2.0)
        assert not limits.hold(1.0)

    asyncio.run(run())


def test_a_pace_that_is_allowed_more_or_less_keeps_what_it_has_learned() -> None:
    pace = Pace(0, None, None, lambda: 0.0)
    pace.allow(8, None, None)
    pace.failed(None, too_fast=True)
    assert pace.at_once == 4
    pace.allow(12, 3, None)
    assert (pace.at_once, pace.has_rates) == (8, True)
    pace.allow(2, None, None)
    assert pace.at_once == 1 and not pace.has_rates
    assert [pace.may_go(0, 1)] == [False], "it is still waiting"


SPELLINGS = {
    "https://API.Example.com/v1": "https://api.example.com/v1",
    "https://api.example.com:443/v1/": "https://api.example.com/v1",
    "http://h:80": "http://h",
    "http://h:8000/v1//": "http://h:8000/v1",
    "https://h:80/v1": "https://h:80/v1",
    "https://h./v1": "https://h/v1",
    "https://h/V1": "https://h/V1",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1",
}


@pytest.mark.parametrize("url", SPELLINGS)
def test_a_service_has_one_spelling(url: str) -> None:
    assert service_of(url) == SPELLINGS[url]
    assert service_of(service_of(url)) == service_of(url)


def test_an_account_is_a_service_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(url: str, name: str | None, salt: str = "") -> bytes:
        return account_of(ApiConfig(base_url=url, model="m", api_key_env=name), salt)

    monkeypatch.setenv("A_API_KEY", "same")
    monkeypatch.setenv("B_API_KEY", "same")
    monkeypatch.setenv("C_API_KEY", "another")
    url = "https://h/v1"
    assert of(url, "A_API_KEY") == of("https://H:443/v1/", "B_API_KEY")
    assert of(url, "A_API_KEY") != of(url, "C_API_KEY")
    assert of(url, "A_API_KEY") != of("https://h/v2", "A_API_KEY")
    assert of(url, "A_API_KEY") != of(url, "A_API_KEY", "another run")
    assert of(url, None) == of(url, "UNSET_API_KEY") != of(url, "A_API_KEY")


def run_of(**teachers: dict[str, Any]) -> RunConfig:
    sources = [{"name": n, "path": f"{n}.jsonl", "teacher": n} for n in teachers]
    return RunConfig.model_validate(
        {
            "teachers": {n: teacher_of("https://h/v1", **api) for n, api in teachers.items()},
            "student": {"init": "from_teacher", "layer_stride": 1},
            "prompts": {"sources": sources},
            "signal": {"kind": "text"},
            "objective": {"cross_entropy": 1.0},
            "evaluation": {"free_running": {"teacher_scores": False}},
        }
    )


def test_which_teachers_of_a_run_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", KEY)
    monkeypatch.setenv("OTHER_API_KEY", OTHER_KEY)
    monkeypatch.delenv("NOT_HERE_KEY", raising=False)
    config = run_of(
        a={"base_url": "https://h:443/v1/"},
        b={},
        c={"api_key_env": "OTHER_API_KEY"},
        d={"base_url": "https://else/v1"},
        e={"api_key_env": "NOT_HERE_KEY"},
        f={"api_key_env": "NOT_HERE_KEY"},
    )
    assert same_service(config) == {"https://h/v1": ["a", "b", "c", "e", "f"]}
    assert same_account(config) == [["a", "b"], ["e", "f"]]
    assert same_service(run_of(a={}, b={"base_url": "https://else/v1"})) == {}


@pytest.mark.ray
@pytest.mark.parametrize("key", [KEY, None], ids=["two accounts", "one account"])
def test_an_actor_whose_process_ends_comes_again_and_knows_it(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """A teacher with rates waits a minute; one of another account, or that comes first, goes on."""
    import ray

    monkeypatch.delenv("SERVICE_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("SERVICE_API_KEY", key)
    config = run_of(a={"requests_per_minute": 9}, b={"api_key_env": None}, c={})
    actors = start_paces(config)
    assert sorted(actors) == ["a", "b", "c"] and len(set(map(id, actors.values()))) == 1
    assert start_paces(run_of(a={}, b={"base_url": "https://else/v1"})) == {}
    paces = {
        name: ActorPace(actor, name, config.by_teacher[name].teacher.api, "run")
        for name, actor in actors.items()
    }

    async def run() -> None:
        assert await within(60, paces["a"].turn(1)) and await within(60, paces["b"].turn(1))
        pid = await actors["a"].__ray_call__.remote(lambda _: os.getpid())
        ray.kill(actors["a"], no_restart=False)
        async with asyncio.timeout(60):
            while Path(f"/proc/{pid}").exists():  # It answers until then.
                await asyncio.sleep(0.05)
        assert await within(60, paces["b"].turn(1)), "without rates"
        assert await within(2, paces["a"].turn(1)) is None, "nobody knows what has gone"
        paces["a"].failed(None, too_fast=True)
        for pace in paces.values():
            pace.ended(1, answered=True)  # Of which the new one does not know.
        if key:
            assert await within(60, paces["b"].turn(1))

    asyncio.run(run())
