"""The teacher store: segments that are whole or refused, lookups, writers at once, upkeep."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raystill.base.errors import RunError
from raystill.cluster.commands.store import store_command
from raystill.config.objective import SignalConfig
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.answers import (
    Answer,
    answers_table,
    derive_answers,
    stored_columns,
    tail_logprob,
)
from raystill.datasets.rows.schema import answer_schema
from raystill.datasets.rows.signal import Signal, signal_of
from raystill.datasets.store import footer as footers
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import FOOTER, Origin, Provenance
from raystill.datasets.store.reading import (
    DamagedSegment,
    GoneSegment,
    NewerSegment,
    UnreadableSegment,
    UnusableSegment,
)
from raystill.datasets.store.segment import SegmentFile, encode, segment_name
from raystill.datasets.store.store import SEGMENTS, RowCounts, TeacherStore
from raystill.datasets.store.upkeep import prune, verify
from raystill.datasets.store.values import checksum
from tests.support.paid import rows_requested_by

V = 300
TOPK = Signal("topk", 16)
HIDDEN = Signal("hidden", 6)


def key(row: int, teacher: int = 0) -> bytes:
    return teacher.to_bytes(8, "big") + row.to_bytes(8, "big")


def origin(signal: Signal = TOPK, teacher: str = "abc") -> Origin:
    return Origin(teacher, "models/teacher", "vllm", "0.32.0", "float32", V, signal)


def answer_to(row: int, signal: Signal, salt: int = 0) -> Answer:
    """A teacher's answer to a row; the logprobs are of one distribution whatever K."""
    generator = np.random.default_rng([row, salt])
    length = int(generator.integers(1, 9))
    logits = generator.normal(0, 3, (length, V))
    logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    fields = {}
    if signal.kind != "text":
        fields["sampled_logprobs"] = logprobs[:, 0]
    if signal.kind == "topk":
        ids = order[:, : signal.width]
        best = np.take_along_axis(logprobs, ids, -1)
        fields |= {"topk_ids": ids.astype(np.int32), "topk_logprobs": best}
        fields["tail_logprob"] = tail_logprob(best, V)
    if signal.kind == "hidden":
        fields["hidden"] = generator.integers(0, 2**16, (length, signal.width), np.uint16)
    return Answer(order[:, 0].astype(np.int32), "stop", **fields)


def answers(rows: list[int], signal: Signal = TOPK, salt: int = 0) -> pa.Table:
    return answers_table([answer_to(r, signal, salt) for r in rows], signal)


def segment(rows: list[int], signal: Signal = TOPK, salt: int = 0, teacher: int = 0) -> pa.Table:
    answered = answers(rows, signal, salt).drop_columns(["error"])
    prompts = pa.array([[row, 1] for row in rows], pa.list_(pa.int32()))
    keys = pa.array([key(row, teacher) for row in rows], pa.binary(16))
    columns = dict(zip(answered.column_names, answered.columns, strict=True))
    return pa.table({"key": keys, "prompt_ids": prompts, **columns})


def keys_of(rows: list[int]) -> pa.Array:
    return pa.array([key(row) for row in rows], pa.binary(16))


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return TeacherStore(str(tmp_path / "store"))


def publish(store: TeacherStore, rows: list[int], run: str = "run", **what) -> str:
    signal = what.pop("signal", TOPK)
    return store.publish(
        origin(signal, what.pop("identity", "abc")),
        Provenance(run, what.pop("purpose", "training"), what.pop("scored", False)),
        segment(rows, signal, **what),
    )[0]


def path_of(store: TeacherStore, name: str) -> Path:
    return Path(store.path) / SEGMENTS / name


def test_what_serves_what_is_a_partial_order_within_that_of_richness() -> None:
    text, sampled, other = Signal("text"), Signal("sampled"), Signal("hidden", 7)
    ladder = [text, sampled, Signal("topk", 4), TOPK]
    for place, signal in enumerate(ladder):
        assert [signal.serves(wanted) for wanted in ladder] == [i <= place for i in range(4)]
    everything = [*ladder, HIDDEN, other]
    assert [HIDDEN.serves(wanted) for wanted in everything] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]
    assert not any(signal.serves(HIDDEN) for signal in [*ladder, other])
    for signal in everything:
        for wanted in everything:
            assert not signal.serves(wanted) or signal.richness >= wanted.richness
    with pytest.raises(ValueError, match="width of a hidden signal is 0"):
        Signal("hidden")


def test_the_signal_asked_for_has_the_teachers_hidden_size() -> None:
    def asked(teacher: dict[str, Any], **signal: Any) -> Signal:
        return signal_of(SignalConfig(**signal), teacher)

    assert asked({}, kind="topk", top_k=3) == Signal("topk", 3)
    assert asked({}, kind="sampled") == Signal("sampled")
    assert asked({"hidden_size": 576}, kind="hidden") == Signal("hidden", 576)
    assert asked({"text_config": {"hidden_size": 8}}, kind="hidden") == Signal("hidden", 8)
    assert asked({"n_embd": 768}, kind="hidden") == Signal("hidden", 768)
    with pytest.raises(ValueError, match=r"names no hidden_size.*set signal\.kind: topk"):
        asked({"vocab_size": 3}, kind="hidden")


class TestReading:
    def test_rows_come_back_bit_for_bit_in_the_order_asked(self, store: TeacherStore) -> None:
        publish(store, [3, 1, 2])
        publish(store, [7, 8])
        catalogue = store.catalogue()
        where = catalogue.locate(keys_of([8, 1, 99, 3, 7]))
        assert where.tolist()[2] == -1
        read = store.read(catalogue, where[where >= 0], stored_columns(TOPK))
        assert derive_answers(read, TOPK, TOPK, V).equals(answers([8, 1, 3, 7]))

    @pytest.mark.parametrize(
        "wanted",
        [TOPK, Signal("topk", 5), Signal("topk", 1), Signal("sampled"), Signal("text")],
        ids=str,
    )
    def test_a_poorer_signal_is_served_exactly_as_if_asked_for(
        self, store: TeacherStore, wanted: Signal
    ) -> None:
        self.served(store, TOPK, wanted)

    @pytest.mark.parametrize("wanted", [HIDDEN, Signal("sampled"), Signal("text")], ids=str)
    def test_hidden_states_serve_themselves_and_what_is_stored_beside_them(
        self, store: TeacherStore, wanted: Signal
    ) -> None:
        self.served(store, HIDDEN, wanted)

    def served(self, store: TeacherStore, stored: Signal, wanted: Signal) -> None:
        rows = list(range(20))
        publish(store, rows, signal=stored)
        catalogue = store.catalogue()
        read = store.read(catalogue, catalogue.locate(keys_of(rows)), stored_columns(wanted))
        served = derive_answers(read, stored, wanted, V)
        assert served.schema.equals(answer_schema(wanted))
        assert served.equals(answers(rows, wanted))

    def test_the_richest_answer_to_a_key_is_served(self, store: TeacherStore) -> None:
        publish(store, [1, 2], signal=Signal("topk", 4))
        publish(store, [2, 1])
        catalogue = store.catalogue()
        segments = catalogue.segment[catalogue.locate(keys_of([1, 2]))]
        assert {catalogue.entries[s].footer.origin.signal for s in segments} == {TOPK}
        assert (catalogue.rows, catalogue.duplicates) == (4, 2)

    def test_each_wanted_signal_finds_its_own_of_two(self, store: TeacherStore) -> None:
        for signal in (Signal("topk", 4), HIDDEN, TOPK, Signal("sampled")):
            publish(store, [1, 2], signal=signal)
        publish(store, [2, 3], signal=Signal("text"))
        catalogue = store.catalogue()
        assert catalogue.needed().sum() == 5  # Hidden and topk 16 of 1 and 2, and 3.
        assert (catalogue.rows, catalogue.duplicates) == (10, 5)

        def used(wanted: Signal, row: int) -> Signal:
            view = catalogue.ordered_for(wanted)
            (where,) = view.locate(keys_of([row]))
            (read,) = store.read(view, np.array([where]), ["key"])["key"].to_pylist()
            assert read == key(row)
            return view.entries[view.segment[where]].footer.origin.signal

        assert used(TOPK, 1) == used(Signal("topk", 4), 2) == TOPK
        assert used(HIDDEN, 1) == used(Signal("sampled"), 1) == used(Signal("text"), 2) == HIDDEN
        assert used(Signal("topk", 17), 1) == HIDDEN  # To be scored: nothing serves it.
        assert used(TOPK, 3) == Signal("text")

    def test_an_empty_store_has_nothing(self, store: TeacherStore) -> None:
        for catalogue in (store.catalogue(), store.catalogue().ordered_for(TOPK)):
            assert catalogue.locate(keys_of([1])).tolist() == [-1]
            assert (catalogue.rows, catalogue.duplicates) == (0, 0)


def rewritten(data: bytes, change: Callable[[dict[str, Any]], object]) -> pa.Buffer:
    """The segment with another footer, its checksum right; the columns as they are."""
    file = pq.ParquetFile(pa.BufferReader(data))
    footer = json.loads(file.schema_arrow.metadata[FOOTER])
    del footer["footer_checksum"]
    change(footer)
    text = json.dumps(footer, sort_keys=True)
    footer["footer_checksum"] = blake2b(text.encode(), digest_size=8).hexdigest()
    sink = pa.BufferOutputStream()
    rows = file.read().replace_schema_metadata({FOOTER: json.dumps(footer, sort_keys=True)})
    pq.write_table(rows, sink)
    return sink.getvalue()


class TestFooter:
    def test_one_from_before_hidden_states_is_read(self) -> None:
        data = encode(origin(), [(Provenance("run", "training"), segment([1, 2]))])

        def as_before(footer: dict[str, Any]) -> None:
            signal = footer["origin"]["signal"]
            signal["top_k"] = signal.pop("width")
            del footer["origin"]["hidden_is"]

        file = SegmentFile(pa.BufferReader(rewritten(data, as_before)), "old")
        assert file.footer == SegmentFile(pa.BufferReader(data), "new").footer
        assert file.footer.origin == origin()
        assert file.read(0, ["topk_ids"]).equals(segment([1, 2]).select(["topk_ids"]))

    def test_its_checksum_is_of_what_it_says_in_whatever_text(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it was written, of its own bytes; else of the same footer made anew."""
        data = encode(origin(), [(Provenance("run", "training"), segment([1, 2]))])
        made = []
        of_footer = footers.footer_checksum
        monkeypatch.setattr(
            footers, "footer_checksum", lambda footer: made.append(1) or of_footer(footer)
        )
        footer = SegmentFile(pa.BufferReader(data), "written").footer
        assert not made
        described = pq.ParquetFile(pa.BufferReader(data)).schema_arrow.metadata[FOOTER]
        said = json.loads(described)
        for text in (json.dumps(said, indent=1), json.dumps(dict(reversed(said.items())))):
            assert footers.footer_of({FOOTER: text.encode()}, "other") == footer
        assert len(made) == 2
        for name, wrong in (("footer_checksum", None), ("footer_checksum", "0" * 16)):
            with pytest.raises(ValueError, match="not what was written"):
                footers.footer_of({FOOTER: json.dumps(said | {name: wrong}).encode()}, "wrong")
        altered = described.replace(b'"rows": 2', b'"rows": 3')
        assert altered != described
        with pytest.raises(ValueError, match="not what was written"):
            footers.footer_of({FOOTER: altered}, "altered")

    def test_it_says_which_hidden_state_it_holds_and_another_is_refused(self) -> None:
        data = encode(origin(HIDDEN), [(Provenance("run", "training"), segment([1, 2], HIDDEN))])
        written = SegmentFile(pa.BufferReader(data), "new").footer.origin
        assert written.hidden_is == "after the final norm"
        assert origin().hidden_is is None

        def other_state(footer: dict[str, Any]) -> None:
            footer["origin"]["hidden_is"] = "before the final norm"

        with pytest.raises(NewerSegment, match="those before the final norm; expected after"):
            SegmentFile(pa.BufferReader(rewritten(data, other_state)), "other")

    def test_the_checksum_of_states_is_of_their_values_alone(self) -> None:
        states = answers(list(range(12)), HIDDEN)["hidden"].combine_chunks()
        part = states.slice(3, 5)
        assert part.flatten().offset > 0
        whole = pa.array(part.to_pylist(), states.type)
        chunks = pa.chunked_array([part.slice(0, 2), part.slice(2)])
        assert checksum(part) == checksum(whole) == checksum(chunks)
        assert checksum(part) != checksum(states.slice(4, 5))
        assert checksum(pa.array([], states.type)) != checksum(pa.array([[]], states.type))

    def test_checksums_are_what_they_were_when_older_segments_were_written(self) -> None:
        logprobs = [[[-0.5, -1.0]], [], [[-2.0, -3.5]]]
        lists = pa.array(logprobs, pa.list_(pa.list_(pa.float32(), 2)))
        assert checksum(keys_of([1, 2, 3])) == "501ffc080f014ab1"
        assert checksum(lists) == "78049016215d212a"


class TestDamage:
    @pytest.fixture
    def name(self, store: TeacherStore) -> str:
        return publish(store, list(range(8)))

    def read_all(self, store: TeacherStore, name: str) -> pa.Table:
        file = store.open(name)
        return file.read(0, ["key", "prompt_ids", *stored_columns(TOPK)])

    def test_a_byte_changed_anywhere_changes_nothing_or_is_refused_by_name(
        self, store: TeacherStore, name: str
    ) -> None:
        whole, sound = path_of(store, name).read_bytes(), self.read_all(store, name)
        generator, refused = random.Random(5), Counter()
        for _ in range(400):
            place = generator.randrange(len(whole))
            altered = bytearray(whole)
            altered[place] ^= 1 << generator.randrange(8)
            path_of(store, name).write_bytes(altered)
            try:
                assert self.read_all(store, name).equals(sound)
                assert store.open(name).footer.rows == 8
            except UnusableSegment as damage:
                assert name in str(damage)
                refused[type(damage)] += 1
        assert refused[DamagedSegment] > 250
        assert refused[UnreadableSegment] == 0  # Every byte came.
        assert refused[NewerSegment] < 10  # Types that Arrow does not have.

    def test_a_byte_changed_in_the_name_of_its_version_is_damage(
        self, store: TeacherStore, name: str
    ) -> None:
        """Else it would be taken for a newer one, which is never removed."""
        whole, named = path_of(store, name).read_bytes(), b'"schema_version": 1'
        start = whole.index(named)
        for bit in range(8 * len(named)):
            altered = bytearray(whole)
            altered[start + bit // 8] ^= 1 << bit % 8
            path_of(store, name).write_bytes(altered)
            with pytest.raises(DamagedSegment, match=name):
                store.open(name)
        assert prune(store, verify(store), None, dry_run=False).files == [name]

    def test_a_truncated_one_is_refused(self, store: TeacherStore, name: str) -> None:
        whole = path_of(store, name).read_bytes()
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path_of(store, name).write_bytes(whole[:length])
            with pytest.raises(DamagedSegment, match=name):
                store.open(name)
        assert list(store.catalogue().refused) == [name]
        assert list(verify(store)) == [name]

    def test_a_deleted_one_is_gone_when_it_is_read(self, store: TeacherStore, name: str) -> None:
        catalogue = store.catalogue()
        path_of(store, name).unlink()
        with pytest.raises(GoneSegment, match=name):
            store.read(catalogue, catalogue.locate(keys_of([1])), ["response_ids"])
        assert verify(store) == store.catalogue().refused == {}

    def test_publishing_its_rows_again_replaces_it(self, store: TeacherStore, name: str) -> None:
        path_of(store, name).write_bytes(b"PAR1 and not much else")
        assert publish(store, list(range(8)), salt=1) == name
        assert self.read_all(store, name).equals(segment(list(range(8)), salt=1).combine_chunks())
        assert verify(store) == {}

    def test_prune_removes_it_and_nothing_else(self, store: TeacherStore, name: str) -> None:
        other = publish(store, [50, 51])
        path_of(store, name).write_bytes(b"")
        stale = path_of(store, ".old.part")
        stale.write_bytes(b"half")
        os.utime(stale, (1, 1))
        path_of(store, ".new.part").write_bytes(b"somebody's")
        damaged = verify(store)
        pruned = prune(store, damaged, None, dry_run=True)
        assert (pruned.files, pruned.refused) == (sorted([name, stale.name]), {})
        assert path_of(store, name).exists()
        prune(store, damaged, None, dry_run=False)
        left = {path.name for path in path_of(store, "").iterdir()}
        assert left == {other, ".new.part"}

    def test_prune_can_remove_a_teacher(self, store: TeacherStore, name: str) -> None:
        publish(store, [1], teacher=9, identity="def")
        assert prune(store, {}, "ab", dry_run=False).files == [name]
        assert store.catalogue().rows == 1


class TestWriting:
    def test_the_first_of_two_writers_counts(self, store: TeacherStore) -> None:
        first = segment([1, 2])
        store.publish(origin(), Provenance("a", "training"), first)
        second = segment([2, 1], salt=1)
        name, published = store.publish(origin(), Provenance("b", "training"), second)
        assert published["key"].to_pylist() == [key(2), key(1)]
        assert published["response_ids"].to_pylist() == first["response_ids"].to_pylist()[::-1]
        assert store.names() == [name]
        assert rows_requested_by(store.catalogue(), "a") == {
            "training": RowCounts(2),
            "evaluation": RowCounts(),
        }
        assert rows_requested_by(store.catalogue(), "b") == {
            "training": RowCounts(),
            "evaluation": RowCounts(),
        }

    def test_many_processes_write_the_same_rows_at_once(self, store: TeacherStore) -> None:
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            published = pool.starmap(write_many, [(store.path, salt) for salt in range(4)])
        assert len(store.names()) == 10
        assert verify(store) == {}
        assert all(rows == published[0] for rows in published), (
            "the writers passed on different answers"
        )

    def test_the_name_depends_on_rows_and_signal_alone(self) -> None:
        assert segment_name([key(1), key(2)], TOPK) == segment_name([key(2), key(1)], TOPK)
        assert segment_name([key(1)], TOPK) != segment_name([key(1)], Signal("topk", 8))
        assert Signal("text", 64) == Signal("text")

    def test_no_space_harms_nothing_that_is_published(self, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)],
            capture_output=True, check=False,
        )  # fmt: skip
        if mounted.returncode != 0:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            store = TeacherStore(str(small))
            before = 0
            with pytest.raises(OSError, match="No space left"):
                for number in range(1000):
                    publish(store, list(range(8 * number, 8 * number + 8)))
                    before += 8
            assert verify(store) == {}
            assert store.catalogue().rows == before
            shutil.rmtree(path_of(store, store.names()[0]), ignore_errors=True)
            assert not [n for n in os.listdir(path_of(store, "")) if n.endswith(".part")]
        finally:
            subprocess.run(["umount", str(small)], check=True)


def write_many(path: str, salt: int) -> list:
    store = TeacherStore(path)
    kept = []
    for start in range(0, 40, 4):
        rows = list(range(start, start + 4))
        provenance = Provenance(f"run{salt}", "training")
        _, published = store.publish(origin(), provenance, segment(rows, salt=salt))
        kept += published["response_ids"].to_pylist()
    return kept


class TestCompacting:
    def test_every_row_once_with_its_run_and_its_answer(self, store: TeacherStore) -> None:
        publish(store, [1, 2, 3], run="a")
        publish(store, [4, 5], run="b", purpose="evaluation")
        publish(store, [5, 6], run="b")
        publish(store, [2, 9], run="c", salt=1)
        publish(store, [1, 7], run="c", signal=Signal("topk", 4))
        before = store.catalogue()
        where = before.locate(keys_of([1, 2, 3, 4, 5, 6, 7, 9]))
        columns = ["response_ids", "finish_reason"]
        served = store.read(before, where, columns)
        done = compact(store)
        assert (done.merged, done.into, done.duplicates) == (5, 2, 3)
        after = store.catalogue()
        assert (after.rows, after.duplicates, after.refused) == (8, 0, {})
        again = store.read(after, after.locate(keys_of([1, 2, 3, 4, 5, 6, 7, 9])), columns)
        assert again.equals(served)
        assert verify(store) == {}
        assert compact(store).merged == 0
        paid = [rows_requested_by(after, run) for run in "abc"]
        assert sum(rows.asked for by_purpose in paid for rows in by_purpose.values()) == 8

    def test_two_signals_of_a_key_stay_two_and_every_signal_is_served_as_before(
        self, store: TeacherStore
    ) -> None:
        narrow, rows = Signal("topk", 4), [1, 2, 3, 4]
        publish(store, [1, 2], signal=HIDDEN, run="a", scored=True)
        publish(store, [3, 4], signal=HIDDEN, salt=1)  # Another answer than the topk ones.
        publish(store, [1, 2, 3, 4])
        publish(store, [2], signal=narrow, salt=2)
        publish(store, [3, 9], signal=narrow)
        publish(store, [1, 4], signal=Signal("text"), salt=3)
        signals = [HIDDEN, TOPK, narrow, Signal("sampled"), Signal("text")]

        def served() -> list[pa.Table]:
            views = [store.catalogue().ordered_for(wanted) for wanted in signals]
            where = [view.locate(keys_of(rows)) for view in views]
            return [
                store.read(view, rows_of_view, stored_columns(Signal("sampled")))
                for view, rows_of_view in zip(views, where, strict=True)
            ]

        before = served()
        assert not before[0].equals(before[1])
        done = compact(store)
        assert (done.merged, done.into, done.duplicates) == (5, 2, 4)
        assert served() == before
        after = store.catalogue()
        assert (after.rows, after.duplicates) == (9, 0)
        assert rows_requested_by(after, "a") == {
            "training": RowCounts(0, 2),
            "evaluation": RowCounts(),
        }
        assert verify(store) == {}
        assert compact(store).merged == 0

    def test_a_response_scored_for_hidden_is_scored_once_more_for_logprobs_and_never_again(
        self, store: TeacherStore
    ) -> None:
        sampled, wishes = Signal("sampled"), np.arange(5)
        keys = pa.chunked_array([keys_of([0, 1, 2, 3, 4])])
        without = segment([1, 2], HIDDEN)
        place = without.schema.get_field_index("sampled_logprobs")
        nan = [[float("nan")] * len(each) for each in without["response_ids"].to_pylist()]
        values = pa.array(nan, without.schema.field(place).type)
        store.publish(
            origin(HIDDEN),
            Provenance("run", "training", scored=True),
            without.set_column(place, "sampled_logprobs", values),
        )
        publish(store, [3], signal=HIDDEN)
        publish(store, [4])

        def look_up(wanted: Signal) -> tuple[list[int], list[int], list[int]]:
            view = StoreView(store, keys, wanted)
            found = view.look_up(wishes, pa.nulls(5, pa.list_(pa.int32())))
            for _, part in found.answered:
                assert part["error"].null_count == len(part)
            answered = [place for places, _ in found.answered for place in places.tolist()]
            return sorted(answered), found.to_score[0].tolist(), found.to_ask.tolist()

        def look_up_all() -> None:
            assert look_up(sampled) == ([1, 2, 3, 4], [], [0])
            assert look_up(HIDDEN) == ([1, 2, 3], [4], [0])
            assert look_up(Signal("text")) == ([1, 2, 3, 4], [], [0])

        assert look_up(sampled) == ([3, 4], [1, 2], [0])
        assert compact(store).duplicates == 0
        assert look_up(sampled) == ([3, 4], [1, 2], [0])
        publish(store, [1, 2], signal=sampled, scored=True)
        look_up_all()
        assert compact(store).duplicates == 0  # The logprobs are nowhere else.
        look_up_all()
        publish(store, [1], signal=HIDDEN, salt=1)  # With logprobs: it serves all of the others.
        assert store.catalogue().duplicates in (1, 2)  # By the order of names.
        compact(store)
        look_up_all()

    def test_a_damaged_segment_is_left_alone(self, store: TeacherStore) -> None:
        bad = publish(store, [1])
        publish(store, [2])
        publish(store, [3])
        path_of(store, bad).write_bytes(b"x")
        assert compact(store).merged == 2
        assert path_of(store, bad).exists()
        assert store.catalogue().rows == 2


class TestCommand:
    def test_list_and_verify_say_what_is_there(self, store: TeacherStore, capsys) -> None:
        publish(store, [1, 2, 3])
        publish(store, [3, 4], signal=Signal("text"))
        assert store_command("list", store.path) == 0
        shown = capsys.readouterr().out
        for words in ("models/teacher", "vllm 0.32.0 float32", "topk 16", "5 rows", "duplicates 1"):
            assert words in shown
        assert store_command("verify", store.path) == 0
        bad = store.names()[0]
        path_of(store, bad).write_bytes(b"")
        assert store_command("verify", store.path) == 1
        assert bad in capsys.readouterr().out
        assert store_command("prune", store.path) == 0
        assert store_command("compact", store.path) == 0
        assert "1 file removed" in capsys.readouterr().out

    def test_a_store_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no teacher store at"):
            store_command("list", str(tmp_path / "none"))


def test_a_published_name_is_on_the_disk_before_anybody_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    link, fsync = os.link, os.fsync

    def noted_link(source: str, target: str) -> None:
        link(source, target)
        order.append("named")

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append("names" if path.is_dir() else "content")

    monkeypatch.setattr(os, "link", noted_link)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    assert TeacherStore(str(tmp_path)).put("a.parquet", b"answers")
    assert order == ["content", "named", "names"]
    assert not TeacherStore(str(tmp_path)).put("a.parquet", b"others")
    assert (tmp_path / SEGMENTS / "a.parquet").read_bytes() == b"answers"
