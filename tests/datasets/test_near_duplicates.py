"""Near-duplicates among all answers of an epoch: signatures, the index, and who decides when.

The process that decides runs here without Ray: its handle calls it in the same event loop.
"""

import asyncio
import unicodedata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from raystill.base.run_folder import RunFolder
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.coordinator.duplicates import Duplicates, passed_positions
from raystill.config.stream import FiltersConfig, SimilarConfig, StreamConfig
from raystill.datasets.filters import minhash
from raystill.datasets.filters.filters import similarity
from raystill.datasets.filters.minhash import HASHES, NearIndex, bytes_of_row, signatures
from raystill.datasets.filters.near import NearPass
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import PROMPT_SCHEMA
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.filtering import GroupFilters
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, remaining_groups
from raystill.model.on_node import ModelSource
from tests.datasets.test_filters import TINY

GROUP_ROWS, SEED, STOP = 4, 7, 0
TEXT = Signal("text")
LONG = [i % 251 + 1 for i in range(40)]


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def words(seed: int, number: int = 60) -> Any:
    return np.random.default_rng(seed).integers(1, 40_000, number).astype(np.int32)


def estimate(one: Any, other: Any, ngram: int = 3) -> float:
    first, second = signatures([one, other], ngram)
    return float((first == second).mean())


def exact(one: Any, other: Any, ngram: int = 3) -> float:
    def grams(row: Any) -> set[bytes]:
        return {row[i : i + ngram].tobytes() for i in range(len(row) - ngram + 1)} or {
            row.tobytes()
        }

    return similarity(grams(one), grams(other))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (ids(), ids(), 1.0),
        (ids(), ids(5), 0.0),
        (ids(5), ids(5), 1.0),
        (ids(5, 6), ids(5, 6), 1.0),  # Shorter than an n-gram: the whole counts.
        (ids(5, 6), ids(6, 5), 0.0),
        (ids(5, 6), ids(5, 6, 7), 0.0),
        (ids(0, 0, 0), ids(0, 0), 0.0),
        (ids(0, 0, 0), ids(0, 0, 0, 0, 0), 1.0),  # A set: how often does not count.
        (ids(1, 2, 3), ids(3, 2, 1), 0.0),
        (words(1), words(2), 0.0),
        (words(1), words(1), 1.0),
        (ids(2**31 - 1, -1, 7), ids(2**31 - 1, -1, 7), 1.0),
    ],
)
def test_equal_and_different_answers(one: Any, other: Any, expected: float) -> None:
    assert estimate(one, other) == pytest.approx(expected, abs=0.03)
    assert exact(one, other) == expected


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("😀😃😄😁😆😅🤣😂" * 3, "😀😃😄😁😆😅🤣😂" * 3, True),
        (
            "あいうえおかきくけこさしすせそたち",
            "あいうえおかきくけこさしすせそたつ",
            True,
        ),
        ("for (i=0;i<n;i++){a[i]+=b[i];}" * 2, "{}[]();<>=+-*/" * 4, False),
        ("\u200b\u200c\u200d" * 9, "\ufeff\u2060\u00ad" * 9, False),
        # Tokens are compared: the same text in other forms is another text.
        (unicodedata.normalize("NFC", "é è ç ñ ü ö " * 5), "é è ç ñ ü ö " * 5, True),
        (*(unicodedata.normalize(f, "é è ç ñ ü ö " * 5) for f in ("NFC", "NFD")), False),
    ],
)
def test_texts_without_words_and_unicode_forms(one: str, other: str, near: bool) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    told = [np.array(tokenizer.encode(text).ids, np.int32) for text in (one, other)]
    assert (estimate(*told) > 0.7) is near


def test_a_very_long_answer_has_the_signature_of_its_parts_together() -> None:
    long = words(3, 300_000)
    whole = signatures([long], 3)[0]
    assert estimate(long, np.concatenate([long, words(4, 3_000)])) > 0.9
    some = minhash.NGRAMS_AT_ONCE
    minhash.NGRAMS_AT_ONCE = 17
    try:
        assert np.array_equal(signatures([long[:2000]], 3), signatures([long[:2000]], 3))
        in_pieces = signatures([long[:5000]], 3)
    finally:
        minhash.NGRAMS_AT_ONCE = some
    assert np.array_equal(in_pieces, signatures([long[:5000]], 3)) and len(whole) == HASHES


def test_signatures_are_the_same_on_every_machine() -> None:
    """Those of several processes are compared, and those of a start with those of the next."""
    assert signatures([ids(1, 2, 3, 4, 5)], 3)[0][:6].tolist() == FIRST_VALUES


FIRST_VALUES = [2673, 15362, 13207, 15499, 40188, 20063]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 4))
def test_the_estimate_is_within_five_standard_errors(seed: int, share: float, ngram: int) -> None:
    one, other = words(seed, 120), words(seed, 120)
    cut = int(share * 120)
    other[cut:] = words(seed + 1, 120 - cut)
    true = exact(one, other, ngram)
    error = 5 * np.sqrt(max(true * (1 - true), 0.01) / HASHES)
    assert estimate(one, other, ngram) == pytest.approx(true, abs=error)


def variants(seed: int, number: int) -> list[Any]:
    """Answers of which many are near to an earlier one, more and less."""
    random = np.random.default_rng(seed)
    made = [words(seed)]
    while len(made) < number:
        one = made[random.integers(len(made))].copy()
        changed = random.integers(0, 30)
        one[random.permutation(60)[:changed]] = random.integers(1, 40_000, changed)
        made.append(one)
    return made


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_the_index_finds_what_comparing_with_all_finds(limit: float) -> None:
    made = signatures(variants(5, 400), 3)
    index, passed, missed = NearIndex(len(made), limit), [], 0
    for position, one in enumerate(made):
        best = max(((other == one).mean() for other in passed), default=0.0)
        near = index.has_near(one)
        assert not near or best > limit, "what the index says is near is near"
        missed += best > limit and not near
        if not near:
            index.add(one, position)
            passed.append(one)
    assert len(index) == len(passed) and missed <= 0.05 * len(made)


def test_a_full_index_answers_and_costs_what_is_told() -> None:
    made = signatures([words(seed, 30) for seed in range(500)], 3)
    index = NearIndex(len(made), 0.7)
    assert not any(index.has_near(one) or index.add(one, n) for n, one in enumerate(made))
    assert all(index.has_near(one) for one in made)
    assert not index.has_near(made[3], before=3) and index.has_near(made[3], before=4)
    arrays = (index._newest, index._older, index._signatures, index._positions)
    assert sum(a.nbytes for a in arrays) == pytest.approx(500 * bytes_of_row(0.7), rel=0.02)


def test_a_beginning_that_all_have_in_common_costs_a_bounded_time(monkeypatch: Any) -> None:
    """Answers that share half of their n-grams are in many bands together."""
    common = words(1, 30)
    rows = [np.concatenate([common, words(9 + n, 30)]) for n in range(300)]
    made = signatures(rows, 3)
    index = NearIndex(len(made), 0.7)
    monkeypatch.setattr(minhash, "LOOKED_AT", 3)
    for position, one in enumerate(made):
        assert not index.has_near(one)
        index.add(one, position)
    assert index.has_near(made[-1])


# Who decides when


class Handle:
    """A handle of an actor that lives in this event loop; its calls outlive who made them."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *a: asyncio.shield(method(*a)))


class Publishing:
    """What the run's coordinator tells of an attempt."""

    def __init__(self, ledger: Ledger, epoch: int = 0) -> None:
        self.told = {"attempt": 1, "epoch": epoch, "step": 0, "ledger": ledger.to_dict()}

    def publish(self, ledger: Ledger, epoch: int) -> int:
        attempt = self.told["attempt"] + 1
        self.told = {"attempt": attempt, "epoch": epoch, "step": 0, "ledger": ledger.to_dict()}
        return attempt

    async def published(self) -> dict[str, Any]:
        return self.told


class Stage:
    """The answer stage over rows with these answers, without Ray and without a teacher."""

    def __init__(self, folder: Any, answers: list[Any], rules: Any, order: str = "fixed") -> None:
        self.answers, self.num_rows = answers, len(answers)
        self.folder = RunFolder(str(folder))
        rows = range(len(answers))
        keys = [row.to_bytes(16, "big") for row in rows]
        sources = [f"s{row % 2}" for row in rows]
        prompts = [[9, row] for row in rows]
        columns = [rows, keys, prompts, sources, [None] * len(answers)]
        self.table = pa.table(columns, schema=PROMPT_SCHEMA)
        self.folder.write_table("p.parquet", self.table, row_group_size=4)
        store = TeacherStore(self.folder.join("store"))
        told = [Answer(np.append(ids, STOP).astype(np.int32), "stop") for ids in answers]
        stored = answers_table(told, TEXT)
        stored = stored.append_column("key", self.table["key"].cast(pa.binary(16)))
        stored = stored.append_column("prompt_ids", self.table["prompt_ids"])
        if answers:
            origin = Origin("t", "t", "e", "1", "float32", 50_000, TEXT)
            store.publish(origin, Provenance("run", "training"), stored)
        self.spec = SimpleNamespace(
            filters=FiltersConfig.model_validate(rules),
            stream=StreamConfig(order=order, group_rows=GROUP_ROWS),
            num_rows=len(answers),
            order_seed=SEED,
            prompt_table=self.folder.join("p.parquet"),
            store_path=store.path,
            policy=None,
            teacher=ModelSource.of("tiny", TINY),
            prompt_columns=None,
            function_texts={},
            counts_personal=False,
        )

    def begin(self, ledger: Ledger | None = None, epoch: int = 0) -> None:
        """A driver starts: whoever decided before is gone."""
        self.ledger = Ledger(self.num_rows) if ledger is None else ledger
        self.epoch, self.attempt = epoch, 1
        self.coordinator = Publishing(self.ledger, epoch)
        self.spec.coordinator = Handle(self.coordinator)
        self.decider = Duplicates(self.spec)
        self.spec.duplicates = Handle(self.decider)
        self.filters = GroupFilters(self.spec)

    def groups(self) -> list[Any]:
        return list(remaining_groups(self.num_rows, GROUP_ROWS, self.ledger))

    async def answer(self, positions: Any) -> dict[int, str]:
        """Why rows of a group are rejected, by position."""
        order = epoch_order(self.num_rows, SEED, self.epoch, GROUP_ROWS)
        taken = self.table.take(pa.array(order[positions]))
        prompts = taken.append_column("position", pa.array(positions))
        told = [np.append(self.answers[row], STOP) for row in order[positions]]
        answers = pa.table(
            {
                "response_ids": pa.array([row.tolist() for row in told], pa.list_(pa.int32())),
                "finish_reason": pa.array(["stop"] * len(told)),
            }
        )
        nothing = pa.nulls(len(told), pa.string())
        found = await self.filters.applied(prompts, answers, nothing, self.attempt)
        pairs = zip(positions.tolist(), found.reasons.to_pylist(), strict=True)
        return {position: why for position, why in pairs if why is not None}

    async def all_groups(self, random: Any, kill: bool = False) -> dict[int, str]:
        """Groups come in any order, and with ``kill`` some are lost and answered again."""
        groups = self.groups()
        tasks = {}
        for number in random.permutation(len(groups)).tolist():
            tasks[number] = asyncio.ensure_future(self.answer(groups[number]))
            for _ in range(random.integers(0, 30)):
                await asyncio.sleep(0)
        if kill:
            for number in random.permutation(len(groups))[: len(groups) // 2].tolist():
                tasks[number].cancel()  # The process that answered is gone, at any point.
            await asyncio.sleep(0.02)
            for number, task in tasks.items():
                if task.cancelled() or random.integers(2):
                    tasks[number] = asyncio.ensure_future(self.answer(groups[number]))
        told: dict[int, str] = {}
        for part in await asyncio.wait_for(asyncio.gather(*tasks.values()), 60):
            told |= part
        return told


OVER_RUN = [{"similar": {"over": "run"}}]


def greedy(stage: Stage, epoch: int = 0, limit: float = 0.7) -> list[int]:
    """Positions that are near to an earlier one that passed, each compared with all of these."""
    order, passed, near = epoch_order(stage.num_rows, SEED, epoch, GROUP_ROWS), [], []
    for position, row in enumerate(order):
        (one,) = signatures([stage.answers[row]], 3)
        if any((one == other).mean() > limit for other in passed):
            near.append(position)
        else:
            passed.append(one)
    return near


def copies(number: int, different: int) -> list[Any]:
    """Answers of which many are equal, so that no estimate matters."""
    return [words(n % different) for n in range(number)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kill", [False, True])
def test_in_fixed_order_what_stays_depends_on_the_plan_alone(
    tmp_path: Any, seed: int, kill: bool
) -> None:
    stage = Stage(tmp_path, copies(30, 11), OVER_RUN)
    stage.begin()
    told = asyncio.run(stage.all_groups(np.random.default_rng(seed), kill))
    assert sorted(told) == greedy(stage) and len(told) == 19
    assert set(told.values()) == {"filtered: similar"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kill", [False, True])
def test_in_arrival_order_one_of_each_stays(tmp_path: Any, seed: int, kill: bool) -> None:
    stage = Stage(tmp_path, copies(30, 11), OVER_RUN, "arrival")
    stage.begin()
    told = asyncio.run(stage.all_groups(np.random.default_rng(seed), kill))
    order = epoch_order(30, SEED, 0, GROUP_ROWS)
    stays = [int(order[p]) % 11 for p in range(30) if p not in told]
    assert sorted(stays) == list(range(11)), "one of each, neither two nor none"


def test_a_group_waits_for_one_before_it_that_has_nothing_to_compare(tmp_path: Any) -> None:
    """A group whose answers are all too short has its turn too."""
    stage = Stage(tmp_path, copies(12, 2), [{"length": {"min_tokens": 1}}, *OVER_RUN])
    order = epoch_order(12, SEED, 0, GROUP_ROWS)
    for row in order[:GROUP_ROWS]:
        stage.answers[row] = ids()
    stage.begin()

    async def last_first() -> list[Any]:
        first, *others = stage.groups()
        later = [asyncio.ensure_future(stage.answer(group)) for group in others]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in later)
        told = await stage.answer(first)
        assert len(told) == GROUP_ROWS and set(told.values()) == {"filtered: length"}
        return await asyncio.wait_for(asyncio.gather(*later), 30)

    assert sum(len(told) for told in asyncio.run(last_first())) == 6


@pytest.mark.parametrize("order", ["fixed", "arrival"])
@pytest.mark.parametrize("done", [1, 7, 16, 29])
def test_a_resumed_run_decides_as_it_would_have(tmp_path: Any, order: str, done: int) -> None:
    """The process that decided is gone; the ledger and the store say what passed."""
    stage = Stage(tmp_path, copies(30, 11), OVER_RUN, order)
    stage.begin()
    random = np.random.default_rng(done)
    first = asyncio.run(stage.all_groups(random))
    ledger = Ledger(30)
    ledger.mark_dropped(first if done % 2 else {p: w for p, w in first.items() if p < done})
    ledger.mark_trained(p for p in range(done) if p not in first)
    stage.begin(Ledger.from_dict(ledger.to_dict()))
    again = asyncio.run(stage.all_groups(random, kill=True))
    told = dict(ledger.dropped) | again
    rows = epoch_order(30, SEED, 0, GROUP_ROWS)
    assert sorted(int(rows[p]) % 11 for p in range(30) if p not in told) == list(range(11))
    if order == "fixed":
        assert told == first


def test_rows_that_a_later_filter_rejected_had_passed(tmp_path: Any) -> None:
    """Also those that the ledger of a checkpoint names ahead of what was trained."""
    rules = [*OVER_RUN, {"regex": {"must_match": "never"}, "sources": ["s1"]}]
    stage = Stage(tmp_path, copies(24, 5), rules)
    stage.begin()
    first = asyncio.run(stage.all_groups(np.random.default_rng(1)))
    assert set(first.values()) == {"filtered: similar", "filtered: regex"}
    ledger = Ledger(24)
    ledger.mark_dropped(first)
    ledger.mark_trained([0] if 0 not in first else [])
    stage.begin(ledger)
    again = asyncio.run(stage.all_groups(np.random.default_rng(2)))
    assert again == {}
    names = ["a", "b", "c"]
    ledger = Ledger(5)
    ledger.mark_trained([0])
    ledger.mark_dropped({1: "filtered: a", 2: "filtered: c (timed out)", 3: "too_long"})
    assert passed_positions(ledger, "b", names).tolist() == [0, 2]
    assert passed_positions(ledger, "c", names).tolist() == [0]
    assert passed_positions(ledger, "a", names).tolist() == [0, 2]


def of_epochs(stage: Stage, number: int, kill: bool = False) -> list[dict[int, str]]:
    """What is rejected in each epoch of a run."""

    async def run() -> list[dict[int, str]]:
        told = []
        for epoch in range(number):
            if epoch:
                stage.epoch = epoch
                stage.attempt = stage.coordinator.publish(Ledger(stage.num_rows), epoch)
            told.append(await stage.all_groups(np.random.default_rng(epoch), kill))
        return told

    stage.begin()
    return asyncio.run(run())


def test_an_answer_is_no_duplicate_of_itself_in_the_next_epoch(tmp_path: Any) -> None:
    stage = Stage(tmp_path, copies(20, 20), OVER_RUN)
    assert list(of_epochs(stage, 3, kill=True)) == [{}, {}, {}]


def test_an_epoch_has_its_own_order(tmp_path: Any) -> None:
    stage = Stage(tmp_path, variants(2, 24), OVER_RUN)
    told = of_epochs(stage, 2)
    assert [sorted(one) for one in told] == [greedy(stage, 0), greedy(stage, 1)]
    assert told[0] != told[1]


def test_a_restored_attempt_releases_who_waits_in_the_one_before(tmp_path: Any) -> None:
    stage = Stage(tmp_path, copies(16, 2), OVER_RUN)
    stage.begin()

    async def overtaken() -> None:
        groups = stage.groups()
        old = asyncio.ensure_future(stage.answer(groups[3]))
        await asyncio.sleep(0.2)
        assert not old.done()
        stage.attempt = stage.coordinator.publish(stage.ledger, 0)
        told: dict[int, str] = {}
        for group in groups:
            told |= await stage.answer(group)
        assert sorted(told) == greedy(stage)
        assert await asyncio.wait_for(old, 10) == {}, "nobody reads it"
        stage.attempt = 1
        assert await asyncio.wait_for(stage.answer(groups[0]), 10) == {}

    asyncio.run(overtaken())


def test_short_answers_pass_and_sources_that_are_not_named_are_not_looked_at(
    tmp_path: Any,
) -> None:
    short = [words(1, 31)] * 8 + [ids()] * 4
    stage = Stage(tmp_path, short, OVER_RUN)
    stage.begin()
    assert asyncio.run(stage.all_groups(np.random.default_rng(1))) == {}
    stage = Stage(tmp_path / "all", short, [{"similar": {"over": "run", "min_tokens": 0}}])
    stage.begin()
    assert len(asyncio.run(stage.all_groups(np.random.default_rng(1)))) == 10
    rules = [{"similar": {"over": "run"}, "sources": ["s1"]}]
    stage = Stage(tmp_path / "s1", copies(12, 1), rules)
    stage.begin()
    told = asyncio.run(stage.all_groups(np.random.default_rng(1)))
    order = epoch_order(12, SEED, 0, GROUP_ROWS)
    assert len(told) == 5 and all(order[position] % 2 for position in told)


def test_one_of_several_samples_stays_and_is_compared_with_all_answers(tmp_path: Any) -> None:
    """``best`` first, then the near-duplicates among what it passed."""
    rules = [{"best": {"keep": 1}}, *OVER_RUN]
    stage = Stage(tmp_path, [words(n // 2 % 3) for n in range(16)], rules)
    prompts = [[9, row // 2] for row in range(16)]
    place = stage.table.schema.get_field_index("prompt_ids")
    field = stage.table.schema.field(place)
    stage.table = stage.table.set_column(place, field, pa.array(prompts, field.type))
    stage.begin()
    told = asyncio.run(stage.all_groups(np.random.default_rng(1)))
    assert sum(why == "filtered: best" for why in told.values()) == 8
    assert sum(why == "filtered: similar" for why in told.values()) == 5


def test_what_was_removed_from_the_store_is_told(tmp_path: Any, caplog: Any) -> None:
    stage = Stage(tmp_path, copies(8, 2), OVER_RUN)
    ledger = Ledger(8)
    ledger.mark_trained(range(4))
    stage.spec.store_path = str(tmp_path / "another")
    TeacherStore(stage.spec.store_path)
    stage.begin(ledger)
    asyncio.run(stage.all_groups(np.random.default_rng(1)))
    assert "4 answers that passed before are not in the store any more" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_decisions_in_turn_are_those_of_one_pass_however_often_they_are_asked(data: Any) -> None:
    """Groups of any size, asked in any order they may be, again and in parts."""
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    made = signatures([words(kind) for kind in kinds], 3)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(kinds) - 1)))) - {len(kinds)})
    starts = [0, *cuts]
    groups = dict(zip(starts, np.split(np.arange(len(kinds)), cuts), strict=True))
    one = NearPass(SimpleNamespace(max_similarity=0.7), len(kinds), starts)  # type: ignore[arg-type]
    told: dict[int, bool] = {}
    while len(told) < len(kinds):
        turn = [start for start in starts if one.is_turn_of(start)]
        group = data.draw(st.sampled_from(turn[-2:]))
        positions = groups[group]
        decided = one.decide(group, positions, made[positions])
        for position, near in zip(positions, decided, strict=True):
            assert told.setdefault(int(position), near) is near
    assert [told[p] for p in range(len(kinds))] == [k in kinds[:p] for p, k in enumerate(kinds)]


def test_the_setting_and_what_check_says_of_it() -> None:
    def filters(*rules: Any) -> FiltersConfig:
        return FiltersConfig.model_validate(list(rules))

    assert SimilarConfig().over == "prompt" and SimilarConfig().least_tokens == 0
    assert SimilarConfig(over="run").least_tokens == 32
    assert SimilarConfig(over="run", min_tokens=0).least_tokens == 0
    assert filters({"similar": {}}).compares_samples
    assert not filters(*OVER_RUN).compares_samples, "it needs no whole groups"
    both = filters({"similar": {}}, {"name": "all", "similar": {"over": "run"}})
    assert both.compares_samples and list(both.over_run) == ["all"]
    prepared: Any = SimpleNamespace(config=SimpleNamespace(filters=both), num_train_rows=10**7)
    (line,) = Prepared._describe_duplicates(prepared)
    assert "all compares all answers of an epoch, and needs up to 5.25 GiB" in line
