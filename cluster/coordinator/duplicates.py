"""The process of a run that finds near-duplicates among all answers of an epoch.

*Consumes* the signatures of each group's answers, from the answer stage. *Waits for* the groups
before it, where the order is fixed. *Unblocked by* them: a group that has nothing to compare comes
too. It keeps nothing on disk: after a restart what passed before is what the checkpoint's ledger
names, and its answers are read from the teacher store.
"""

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.config.stream import FilterConfig
from raystill.datasets.filters.answers import Answers
from raystill.datasets.filters.minhash import signatures
from raystill.datasets.filters.near import NearPass
from raystill.datasets.lookup.view import StoreView, in_order
from raystill.datasets.rows.prompt_table import PromptReader, open_table
from raystill.datasets.rows.schema import FILTERED, TOKEN_IDS, answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import Positions, epoch_order, remaining_groups

if TYPE_CHECKING:
    from raystill.datasets.stream.spec import StreamSpec

READ_AT_ONCE = 1024
MOST_CALLS = 100_000
"""Groups that may wait for their turn."""
TEXT = Signal("text")

logger = logging.getLogger(__name__)


class Duplicates:
    """Decides for the filters that compare all answers of an epoch; an async actor of the run.

    Plain to test without Ray, but for the coordinator's handle.
    """

    def __init__(self, spec: "StreamSpec") -> None:
        self._spec = spec
        self._rules = {r.label: r for r in spec.filters.rules if r.label in spec.filters.over_run}
        self._changed = asyncio.Condition()
        self._attempt = 0
        self._passes: dict[str, NearPass] = {}

    async def decide(
        self,
        name: str,
        attempt: int,
        group: int,
        positions: Positions,
        made: NDArray[np.uint16],
    ) -> list[bool] | None:
        """Which rows of a group are near-duplicates, [n]; waits for the group's turn.

        name: of the filter. group: its first position. positions, made: of the rows to compare,
        [n], and their signatures, [n, H]. None: the attempt is over, and nobody reads the rows.
        """
        async with self._changed:
            if attempt > self._attempt:
                await self._begin(attempt)
            await self._changed.wait_for(
                lambda: attempt != self._attempt or self._passes[name].is_turn_of(group)
            )
            if attempt != self._attempt:
                return None
            near = self._passes[name].decide(group, positions, made)
            self._changed.notify_all()
            return near

    async def _begin(self, attempt: int) -> None:
        """Begin the newest attempt, if that is it."""
        published = await self._spec.coordinator.published.remote()
        if published["attempt"] == attempt:
            self._passes = {}  # Of two at once the memory may be too small.
            self._passes = await asyncio.to_thread(self._restored, published)
            self._attempt = attempt
            self._changed.notify_all()

    def _restored(self, published: dict[str, Any]) -> dict[str, NearPass]:
        """Each filter's pass as the ledger has it."""
        spec, ledger = self._spec, Ledger.from_dict(published["ledger"])
        groups = None
        if spec.stream.order == "fixed":
            left = remaining_groups(spec.num_rows, spec.stream.group_rows, ledger)
            groups = [int(positions[0]) for positions in left]
        passes = {}
        for name, rule in self._rules.items():
            assert rule.similar is not None
            passes[name] = NearPass(rule.similar, spec.num_rows, groups)
            for positions, answers in self._passed(rule, ledger, published["epoch"]):
                long = [len(ids) >= rule.similar.least_tokens for ids in answers.tokens]
                kept = [ids for ids, is_long in zip(answers.tokens, long, strict=True) if is_long]
                passes[name].restore(positions[long], signatures(kept, rule.similar.ngram))
        return passes

    def _passed(
        self, rule: FilterConfig, ledger: Ledger, epoch: int
    ) -> Iterator[tuple[Positions, Answers]]:
        """Positions that passed a filter, ascending, and their answers, as the store has them."""
        spec = self._spec
        positions = passed_positions(ledger, rule.label, [r.label for r in spec.filters.rules])
        if spec.policy is not None:  # Filters judge what the teacher wrote.
            positions = positions[~spec.policy.by_student(epoch, positions)]
        if not len(positions):
            return
        logger.info("%s: reading %d answers that passed before", rule.label, len(positions))
        order = epoch_order(spec.num_rows, spec.order_seed, epoch, spec.stream.group_rows)
        prompts = PromptReader(spec.prompt_table)
        keys = open_table(spec.prompt_table).read(["key"])["key"]
        view, lost = StoreView(TeacherStore(spec.store_path), keys, TEXT), 0
        for start in range(0, len(positions), READ_AT_ONCE):
            some = positions[start : start + READ_AT_ONCE]
            asked = prompts.take(order[some])
            found = view.look_up(order[some], given_of(asked))
            places, table = in_order(found.answered, answer_schema(TEXT))
            lost += len(some) - len(places)
            answers = Answers(
                table["response_ids"].combine_chunks(),
                table["finish_reason"].combine_chunks(),
                order[some][places],
                order[some][places],
                asked["source"].combine_chunks().take(pa.array(places)),
                {},
                _no_text,
            )
            mine = np.flatnonzero(answers.of_sources(rule.sources))
            yield some[places][mine], answers.take(mine)
        if lost:
            logger.warning(
                "%s: %d answers that passed before are not in the store any more; their "
                "near-duplicates are not found",
                rule.label,
                lost,
            )


def passed_positions(ledger: Ledger, name: str, filters: list[str]) -> Positions:
    """Positions that passed a filter, ascending: what is trained, and what later ones rejected.

    filters: the names of all, in order.
    """
    passed = np.ones(ledger.num_rows, bool)
    passed[ledger.missing()] = False
    later = {FILTERED + label for label in filters[filters.index(name) + 1 :]}
    for position, reason in ledger.dropped.items():
        passed[position] = reason.partition(" (")[0] in later
    return np.flatnonzero(passed).astype(np.int64)


def given_of(prompts: pa.Table) -> pa.Array:
    """Responses that came with the prompts, null where there is none."""
    if "response_ids" not in prompts.column_names:
        return pa.nulls(len(prompts), TOKEN_IDS)
    return prompts["response_ids"].combine_chunks()


def _no_text(_: Any) -> list[str]:
    raise AssertionError("near-duplicates are told by their tokens")


def start_duplicates(spec: "StreamSpec") -> Any:
    """Start the actor on this node and return its handle; None where no filter needs it.

    It dies with the driver.
    """
    if not spec.filters.over_run:
        return None
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Duplicates).options(
        num_cpus=0, max_restarts=0, max_concurrency=MOST_CALLS, scheduling_strategy=here
    )
    return actor.remote(spec)
