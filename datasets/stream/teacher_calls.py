"""Asks the deployed teacher for a group of answers, and survives the loss of its replicas.

Two kinds of death are told apart. Where an engine dies in a replica that lives, its answers name
the rows that were in it: these are asked again *one by one*, each with no other row in its engine,
whoever asks for it. A row that an engine dies of then is poison. So a row that kills its engine
costs two deaths. Rows that only waited for the engine are asked again as they were.

Where the whole replica goes, nothing is known of its rows. What is left of the group is asked once
more: most deaths have nothing to do with the rows. A row that was there at two such deaths is asked
by itself, and one such row at a time in this process; if its replica goes again, once more with no
other question of this process beside it. If it goes then too, the row is poison.

Poison comes back unusable, with the reason ``poison``, and the run goes on.

*Waits for* the teacher, also for its next replica. *Unblocked by* its answers or its errors.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Parts, unusable_answers
from raystill.datasets.rows.schema import (
    AT_LEAST,
    FATAL,
    GIVEN_UP,
    LOST,
    NOT_STARTED,
    ONE_BY_ONE,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.turns import Turns

logger = logging.getLogger(__name__)

GROUP_ATTEMPTS = 2
DEATHS_OF_POISON = 2
POISON = "poison"
MOST_IN_VAIN = 100
"""How often in a row engines may die before any row of a question has been in one."""
PAUSE_AFTER_DEATH_S = 0.2
LONGEST_PAUSE_AFTER_DEATH_S = 2.0
LONGEST_PAUSE_S = 10.0
POLL_S = 0.5


class TeacherCalls:
    """The teacher behind one application name, as one asking process sees it.

    ``coordinator`` hears whenever the teacher is needed: a run whose answers are all in the store
    deploys none, and ends it when they are. None where the teacher runs throughout. ``name``: that
    of the teacher among several.
    """

    def __init__(
        self, app_name: str, signal: Signal, max_attempts: int, coordinator: Any, name: str = ""
    ) -> None:
        self._name = name
        self._app_name = app_name
        self._signal = signal
        self._max_attempts = max_attempts
        self._coordinator = coordinator
        self._handle: Any = None
        self._life = 0
        self._starting = asyncio.Lock()
        self._suspect = asyncio.Lock()
        self._turns = Turns()

    async def sample(
        self,
        prompt_ids: pa.Array,
        keys: pa.Array | None = None,
        messages: pa.Array | None = None,
        *,
        at_least: int | None = None,
    ) -> pa.Table:
        """Answers in the order of the prompts (answer_schema); poison rows are unusable.

        keys: of the answers, where they have one. messages: the chats as JSON, where they are not
        among the run's prompts. at_least: where the student's sampler is asked, the oldest version
        of its weights that may answer. RunError where the teacher cannot be reached; its own errors
        are passed on.
        """
        columns = {"prompt_ids": prompt_ids, "key": keys, "messages": messages}
        if at_least is not None:
            columns[AT_LEAST] = pa.array([at_least] * len(prompt_ids), pa.int64())
        there = {name: values for name, values in columns.items() if values is not None}
        return await self._ask("sample", pa.table(there))

    async def score(self, prompt_ids: pa.Array, response_ids: pa.Array) -> pa.Table:
        """The signal for responses that are there already; as :meth:`sample`."""
        columns = {"prompt_ids": prompt_ids, "response_ids": response_ids}
        return await self._ask("score", pa.table(columns))

    async def _ask(self, method: str, rows: pa.Table) -> pa.Table:
        """Answers to a group; ``method``: the teacher's, which takes ``rows``.

        Rows that a dead engine had finished are not asked again. Where the teacher is gone for good
        after some had answers, these come all the same, and the others have an error of FATAL.
        """
        group = _Group(rows, self._signal)
        try:
            await self._ask_all(method, rows, group)
        except RunError as error:
            group.give_up(error)
        return group.parts.joined()

    async def _ask_all(self, method: str, rows: pa.Table, group: "_Group") -> None:
        vain, attempt = _InVain(), 0
        while len(places := group.due()):
            attempt += 1
            one_by_one = group.are_suspects(places)
            asked = rows.take(pa.array(places)).combine_chunks()
            what = f"{method}: group of {len(asked)} rows, attempt {attempt}"
            answers = await self._try(method, asked, what, one_by_one=one_by_one)
            if answers is None:
                group.lost_all(places)
            elif not group.take(places, answers, one_by_one, what):
                await vain.pause(answers)
        for index in group.left:
            group.parts.add(
                np.array([index]), await self._ask_suspect(method, rows.slice(index, 1))
            )

    async def _ask_suspect(self, method: str, row: pa.Table) -> pa.Table:
        """The answer to a row of which nobody knows whether its replicas have gone for it."""
        logger.warning("%s: asking a suspect row by itself", method)
        deaths, vain = 0, _InVain()
        while deaths < DEATHS_OF_POISON:
            what = f"{method}: suspect row, attempt {deaths + 1}"
            alone = deaths == DEATHS_OF_POISON - 1
            async with self._suspect:
                answer = await self._try(
                    method, row.combine_chunks(), what, one_by_one=True, alone=alone
                )
            error = None if answer is None else answer["error"][0].as_py()
            if answer is None or error == GIVEN_UP:
                deaths += 1
            elif error == NOT_STARTED:
                await vain.pause(answer)
            elif error == LOST:
                break
            else:
                return answer
        logger.error("poison: replicas failed each time for %s", row.to_pylist())
        return unusable_answers(1, POISON, self._signal)

    async def _try(
        self,
        method: str,
        rows: pa.Table,
        what: str,
        *,
        one_by_one: bool = False,
        alone: bool = False,
    ) -> pa.Table | None:
        """Answers; None where the replica went with the question.

        one_by_one: each row with no other in its engine. alone: with no other question of this
        process beside it, so that a replica's death is this one's. A teacher that is not there at
        all is asked again, up to ``max_attempts``; then RunError.
        """
        if one_by_one:
            rows = rows.append_column(ONE_BY_ONE, pa.array([True] * len(rows)))
        handle = await self._teacher()
        for attempt in range(1, self._max_attempts + 1):
            try:
                call = getattr(handle, method)
                async with self._turns.alone() if alone else self._turns.beside():
                    answers = await call.remote(rows, self._signal)
            except Exception as error:
                if is_death(error):
                    logger.warning("%s: %r", what, error)
                    await asyncio.sleep(PAUSE_AFTER_DEATH_S)
                    return None
                if not is_absence(error):
                    raise
                logger.warning("the teacher is not there: %r", error)
                last = error
                await asyncio.sleep(min(LONGEST_PAUSE_S, 0.1 * 2**attempt))
            else:
                assert len(answers) == len(rows), (
                    f"the teacher gave {len(answers)} answers to {len(rows)} rows"
                )
                return answers
        raise RunError(
            f"the teacher could not be reached {self._max_attempts} times (last: "
            f"{type(last).__name__}: {first_line(last)}); see the teacher's log files in the run "
            "folder, or raise stream.max_attempts"
        ) from last

    async def _teacher(self) -> Any:
        wish = None if self._coordinator is None else self._coordinator.want_teacher
        life = 0 if wish is None else await wish.remote(self._name)
        async with self._starting:
            if self._handle is None or life > self._life:
                self._handle = await asyncio.to_thread(teacher_handle, self._app_name)
                self._life = life
        return self._handle


@dataclass(frozen=True)
class InWords:
    """A teacher that is asked what is not among the run's prompts. chats: JSON, by answer key."""

    calls: TeacherCalls
    chats: Mapping[bytes, str]

    async def sample(self, prompt_ids: pa.Array, keys: pa.Array) -> pa.Table:
        """As `TeacherCalls.sample`."""
        chats = pa.array([self.chats[key] for key in keys.to_pylist()], pa.string())
        return await self.calls.sample(prompt_ids, keys, chats)

    async def score(self, prompt_ids: pa.Array, response_ids: pa.Array) -> pa.Table:
        """As `TeacherCalls.score`."""
        return await self.calls.score(prompt_ids, response_ids)


class _InVain:
    """Counts how often in a row a question came to an engine that was dead already."""

    def __init__(self) -> None:
        self._times = 0

    async def pause(self, answers: pa.Table) -> None:
        """Wait for the next replica; longer each time, since a dead one still takes questions.

        RunError where that has gone on for `MOST_IN_VAIN` times.
        """
        waited = pc.all(pc.equal(answers["error"], NOT_STARTED)).as_py()
        self._times = self._times + 1 if waited else 0
        if self._times >= MOST_IN_VAIN:
            raise RunError(
                f"{self._times} times in a row the teacher's engine died before it began with a "
                f"question of {len(answers)} rows; see the teacher's log files in the run folder"
            )
        pause = PAUSE_AFTER_DEATH_S * 1.5 ** max(0, self._times - 1)
        await asyncio.sleep(min(LONGEST_PAUSE_AFTER_DEATH_S, pause))


class _Group:
    """A group's rows while engines and replicas die under them.

    ``left``: places of the rows without an answer, in order. ``parts``: the answers so far.
    """

    def __init__(self, rows: pa.Table, signal: Signal) -> None:
        self.left = np.arange(len(rows))
        self.parts = Parts()
        self._rows = rows
        self._signal = signal
        self._deaths = np.zeros(len(rows), int)  # Of its replicas; and times it was given up.
        self._lost = np.zeros(len(rows), bool)  # Whether it was in an engine that died.

    def due(self) -> NDArray[np.int64]:
        """Places to ask next: suspects, if there are any. Not those that are to be asked apart."""
        due = self.left[self._deaths[self.left] < GROUP_ATTEMPTS]
        suspects = due[self._lost[due]]
        return suspects if len(suspects) else due

    def are_suspects(self, places: NDArray[np.int64]) -> bool:
        """Whether these, which are due, are to be asked one by one."""
        return bool(self._lost[places].any())

    def lost_all(self, places: NDArray[np.int64]) -> None:
        """Their replica has gone, and told nothing of them."""
        self._deaths[places] += 1

    def give_up(self, error: RunError) -> None:
        """All rows without an answer have this error; raises it where no row has one."""
        if not self.parts.told_by_engine:
            raise error
        left = np.setdiff1d(np.arange(len(self._rows)), self.parts.places)
        told = unusable_answers(len(left), f"{FATAL}{error}", self._signal)
        self.parts.add(left, told)

    def take(
        self, places: NDArray[np.int64], answers: pa.Table, one_by_one: bool, what: str
    ) -> bool:
        """Take what was told of the rows at ``places``; whether all have an answer now."""
        errors = answers["error"].to_numpy(zero_copy_only=False)
        lost = errors == LOST
        self._deaths[places[errors == GIVEN_UP]] += 1
        assert not one_by_one or lost.sum() <= 1, "more than one row was in an engine alone"
        if one_by_one and lost.any():
            killers = places[lost]
            said = self._rows.take(pa.array(killers)).to_pylist()
            logger.error("%s: poison: the engine died with this row alone in it: %s", what, said)
            self.parts.add(killers, unusable_answers(len(killers), POISON, self._signal))
            self.left = np.setdiff1d(self.left, killers)
        elif lost.any():
            self._lost[places[lost]] = True
            logger.warning(
                "%s: the engine died with %d of these rows in it; each is asked again with no "
                "other row in its engine, which shows whether it dies of one of them",
                what,
                lost.sum(),
            )
        kept = ~np.isin(errors, [LOST, NOT_STARTED, GIVEN_UP])
        self.parts.add(places[kept], answers.filter(pa.array(kept)))
        self.left = np.setdiff1d(self.left, places[kept])
        return bool(kept.all())


def is_death(error: BaseException) -> bool:
    """Whether a call may have cost its replica: replica, engine or node is gone.

    A row that only takes long is none: its engine gives it up, and it alone. An engine that hangs
    fails its health check, and Serve replaces the replica.
    """
    if isinstance(error, RayTaskError):  # Raised by the teacher's own code in a live replica.
        return type(error.cause).__name__ == "EngineDeadError"
    return isinstance(error, (RayActorError, ObjectLostError))


def is_absence(error: BaseException) -> bool:
    """Whether there was no replica to take the call."""
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    return isinstance(error, (BackPressureError, DeploymentUnavailableError))


def teacher_handle(app_name: str) -> Any:
    """Handle of the teacher's application; waits until it answers, so that loading is no time-out.

    One replica is enough: of a fixed number, some may have no place since their node has gone. Not
    bounded here: the driver watches the start-up and ends the run if it takes too long.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while True:
        status = applications().get(app_name)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return serve.get_app_handle(app_name)  # Without a replica too: Serve brings one.
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            raise RunError(f"the teacher could not be deployed: {status.message}")
        if status is not None and status.status != ApplicationStatus.DELETING:
            states = [d.replica_states for d in status.deployments.values()]
            if any(state.get("RUNNING", 0) for state in states):
                return serve.get_app_handle(app_name)
        time.sleep(POLL_S)


SERVE = threading.RLock()
"""Held for each call of Serve's that may start it or look at its configuration. Threads of one
driver would start it twice, and it pickles by a list of modules that a process has once."""


def applications() -> dict[str, Any]:
    """Status of each application that Serve runs, by name; empty where Serve does not run."""
    from ray import serve

    with SERVE:
        try:
            return dict(serve.status().applications)
        except RayActorError:
            # Another run has ended and shut Serve down, since no application was left. This
            # process's client still refers to the controller that is gone.
            serve.context._set_global_client(None)
            return dict(serve.status().applications)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]
