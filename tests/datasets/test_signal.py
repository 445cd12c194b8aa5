"""What a stored row serves depends on what it holds: a response scored for hidden has no logprobs.

Legend: T response tokens, D hidden size, V vocabulary.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raystill.datasets.lookup.view import StoreView
from raystill.datasets.rows.answers import (
    NO_LOGPROBS,
    Answer,
    answers_table,
    derive_answers,
    stored_columns,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.footer import Provenance
from raystill.datasets.store.store import TeacherStore
from tests.datasets.test_store import keys_of, origin, publish, segment

V, HIDDEN, SAMPLED = 32, Signal("hidden", 6), Signal("sampled")


def stored_rows(*logprobs: list[float]) -> pa.Table:
    """Rows of a hidden segment whose drawn tokens have these logprobs [T]."""
    answers = [
        Answer(
            response_ids=np.arange(len(each), dtype=np.int32),
            finish_reason="stop",
            sampled_logprobs=np.array(each, np.float32),
            hidden=np.ones((len(each), HIDDEN.width), np.uint16),
        )
        for each in logprobs
    ]
    return answers_table(answers, HIDDEN)


def test_a_response_scored_for_hidden_serves_no_logprobs_but_all_else() -> None:
    assert HIDDEN.serves(SAMPLED) and not HIDDEN.serves(SAMPLED, scored=True)
    for wanted in (Signal("text"), HIDDEN):
        assert HIDDEN.serves(wanted, scored=True)
    for signal in (SAMPLED, Signal("topk", 4)):  # Scoring these runs the head.
        assert signal.serves(SAMPLED, scored=True)
        assert signal.serves(signal, scored=True)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_stored_row_without_logprobs_is_an_unusable_answer_and_never_a_row(start: int) -> None:
    nan = float("nan")
    rows = stored_rows([-1.0, -2.0], [nan, nan, nan], [], [-3.0], [-1.0, nan], [-4.0])
    sliced = rows.select(stored_columns(SAMPLED)).slice(start)  # Offsets do not start at 0.
    derived = derive_answers(sliced, HIDDEN, SAMPLED, V)
    expected = [None, NO_LOGPROBS, None, None, NO_LOGPROBS, None]
    assert derived["error"].to_pylist() == expected[start:]
    usable = derived.filter(pc.is_null(derived["error"]))
    values = usable["sampled_logprobs"].combine_chunks().flatten().to_numpy()
    assert np.isfinite(values).all() and len(usable) == expected[start:].count(None)


@pytest.mark.parametrize("wanted", [HIDDEN, Signal("text")], ids=str)
def test_a_signal_that_has_its_loss_without_logprobs_is_served_all_the_same(wanted: Signal) -> None:
    rows = stored_rows([float("nan")], [-1.0]).select(stored_columns(wanted))
    assert derive_answers(rows, HIDDEN, wanted, V)["error"].null_count == 2


def test_a_run_that_met_such_rows_resumes_from_the_store_that_holds_them(tmp_path: Path) -> None:
    """It ended at their NaN, and would have met them at each start: they are scored once more, or,
    where an earlier version did not note that they were scored, dropped by name.
    """
    store, wishes = TeacherStore(str(tmp_path / "store")), np.arange(5)
    hidden = Signal("hidden", 6)
    for rows, scored in (([1, 2], True), ([3, 4], False)):
        without = segment(rows, hidden)
        place = without.schema.get_field_index("sampled_logprobs")
        nan = [[float("nan")] * len(each) for each in without["response_ids"].to_pylist()]
        values = pa.array(nan, without.schema.field(place).type)
        damaged = without.set_column(place, "sampled_logprobs", values)
        store.publish(origin(hidden), Provenance("run", "training", scored=scored), damaged)
    publish(store, [0], signal=SAMPLED)
    keys = pa.chunked_array([keys_of([0, 1, 2, 3, 4])])
    found = StoreView(store, keys, SAMPLED).look_up(wishes, pa.nulls(5, pa.list_(pa.int32())))
    assert (found.to_score[0].tolist(), found.to_ask.tolist()) == ([1, 2], [])
    told = {
        place: error
        for places, part in found.answered
        for place, error in zip(places.tolist(), part["error"].to_pylist(), strict=True)
    }
    assert told == {0: None, 3: NO_LOGPROBS, 4: NO_LOGPROBS}
