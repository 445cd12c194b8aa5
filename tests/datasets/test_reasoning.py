"""Reasoning is cut off answers by ids, and each id keeps its rows of the teacher's signal."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.datasets.rows.answers import Answer, answers_table, tail_logprob
from raystill.datasets.rows.reasoning import (
    NO_ANSWER,
    UNCLEAR,
    Cutter,
    Markers,
    reasoning_keys,
    reasoning_rows,
    with_reasoning,
    without_reasoning,
)
from raystill.datasets.rows.schema import TOKEN_IDS
from raystill.datasets.rows.signal import Signal

WORDS = ["", "<think>", "</think>", "\n\n", " The", " answer", ".", "<|end|>", "\n", "<th", "ink>"]
WORDS += ["think>", "</", "think>!", "</think>\n\n", "</think> I", " ", "say"]
ID = {word: i for i, word in enumerate(WORDS)}
END = ID["<|end|>"]
CUTTER = Cutter(
    {i: word.encode() for i, word in enumerate(WORDS)},
    Markers("<think>", "</think>", (1, 2)),
    [END],
)


def ids(*words: str) -> np.ndarray:
    return np.array([ID[word] for word in words], np.int32)


NOTHING = ids()
CASES = {
    "none": (NOTHING, ids(" The", " answer", "<|end|>"), 0),
    "a span": (NOTHING, ids("<think>", "say", "</think>", "\n\n", " The", "<|end|>"), 4),
    "after a line": (NOTHING, ids("\n", "<think>", "say", "</think>", " The"), 4),
    "begun by the prompt": (ids("say", "<think>", "\n"), ids("say", "</think>", " The"), 2),
    "ended by the prompt": (ids("<think>", "\n\n", "</think>"), ids(" The", "<|end|>"), 0),
    "begun by nobody, on its line": (NOTHING, ids("say", "\n", "</think>", "\n", " The"), 4),
    "named in a sentence": (NOTHING, ids("say", "</think>", " The"), 0),
    "both named in a sentence": (NOTHING, ids("say", "<think>", "\n", "</think>", " The"), 0),
    "unclosed": (NOTHING, ids("<think>", "say", " The"), NO_ANSWER),
    "unclosed, begun by the prompt": (ids("<think>"), ids("say", " The"), NO_ANSWER),
    "no answer": (NOTHING, ids("<think>", "say", "</think>", "\n\n"), NO_ANSWER),
    "an end alone": (NOTHING, ids("<think>", "say", "</think>", "<|end|>"), NO_ANSWER),
    "only the first span": (NOTHING, ids("<think>", "</think>", " The", "<think>", "</think>"), 2),
    "of several tokens": (NOTHING, ids("<th", "ink>", "say", "</", "think>", "\n", " The"), 6),
    "its end has the line": (NOTHING, ids("<think>", "say", "</think>\n\n", " The"), 3),
    "its end has a word": (NOTHING, ids("<think>", "say", "</think> I", " The"), UNCLEAR),
    "its last part has a sign": (NOTHING, ids("<think>", "say", "</", "think>!"), UNCLEAR),
    "an id that nobody knows": (NOTHING, np.array([1, 5, 2, 999, 4], np.int32), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_where_an_answer_begins(name: str) -> None:
    prompt, response, expected = CASES[name]
    assert CUTTER.first(prompt, response) == expected


def answer(response: np.ndarray, signal: Signal, seed: int = 0) -> Answer:
    rng, length = np.random.default_rng(seed), len(response)
    arrays: dict[str, np.ndarray] = {}
    if signal.kind != "text":
        arrays["sampled_logprobs"] = -rng.random(length).astype(np.float32)
    if signal.kind == "topk":
        best = np.sort(-5 - rng.random((length, signal.width)), axis=1)[:, ::-1]
        arrays["topk_logprobs"] = np.ascontiguousarray(best, np.float32)
        arrays["topk_ids"] = rng.integers(0, 17, (length, signal.width)).astype(np.int32)
        arrays["tail_logprob"] = tail_logprob(arrays["topk_logprobs"], 49152)
    if signal.kind == "hidden":
        arrays["hidden"] = rng.integers(0, 2**16, (length, signal.width)).astype(np.uint16)
    return Answer(response, "stop", **arrays)  # type: ignore[arg-type]


SIGNALS = [Signal("text"), Signal("sampled"), Signal("topk", 3), Signal("hidden", 4)]


@pytest.mark.parametrize("signal", SIGNALS, ids=str)
@pytest.mark.parametrize("start", [0, 2])
def test_each_id_that_is_left_has_the_rows_it_had(signal: Signal, start: int) -> None:
    """Also in a slice of a table, whose lists do not begin at 0."""
    told = [response for _, response, _ in CASES.values()]
    prompts = pa.array([prompt.tolist() for prompt, _, _ in CASES.values()], TOKEN_IDS)
    whole = answers_table([answer(r, signal, i) for i, r in enumerate(told)], signal)
    expected = [first for _, _, first in CASES.values()]
    sliced, ours = whole.slice(start), expected[start:]
    cut = without_reasoning(sliced, prompts.slice(start), CUTTER, np.ones(len(sliced), bool))
    assert cut.schema == whole.schema
    lists = [name for name in cut.column_names if pa.types.is_list(cut.schema.field(name).type)]
    assert len(lists) == {"text": 1, "sampled": 2, "topk": 5, "hidden": 3}[signal.kind]
    for row, first in enumerate(ours):
        before, after = sliced.slice(row, 1).to_pylist()[0], cut.slice(row, 1).to_pylist()[0]
        if isinstance(first, str):
            assert after["error"] == first and after["finish_reason"] is None
            assert all(after[name] == [] for name in lists)
        else:
            assert (after["error"], after["finish_reason"]) == (None, "stop")
            for name in lists:
                assert after[name] == before[name][first:]
    cut.validate(full=True)


def test_rows_that_are_given_or_unusable_stay_as_they_are() -> None:
    signal = Signal("sampled")
    thought = ids("<think>", "say", "</think>", " The")
    rows = [answer(thought, signal), Answer(error="poison"), answer(thought, signal)]
    table = answers_table(rows, signal)
    prompts = pa.array([[], [], []], TOKEN_IDS)
    cut = without_reasoning(table, prompts, CUTTER, np.array([True, True, False]))
    assert cut["response_ids"].to_pylist() == [[ID[" The"]], [], thought.tolist()]
    assert cut["error"].to_pylist() == [None, "poison", None]


def test_a_table_without_reasoning_is_the_very_same() -> None:
    table = answers_table([answer(ids(" The"), Signal("topk", 3))], Signal("topk", 3))
    prompts = pa.array([[]], TOKEN_IDS)
    assert without_reasoning(table, prompts, CUTTER, np.ones(1, bool)) is table


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(range(1, len(WORDS))), max_size=12),
    st.lists(st.sampled_from(range(1, len(WORDS))), max_size=3),
)
def test_what_is_left_is_the_end_of_what_was_there(response: list[int], prompt: list[int]) -> None:
    found = CUTTER.first(np.array(prompt, np.int32), np.array(response, np.int32))
    if isinstance(found, int) and found:
        text = "".join(WORDS[i] for i in response)
        kept = "".join(WORDS[i] for i in response[found:])
        assert text.endswith(kept) and kept.strip()
        assert "</think>" in text[: len(text) - len(kept)]
        assert text[: len(text) - len(kept)].count("</think>") == 1


def test_reasoning_comes_before_its_answer_up_to_the_limit() -> None:
    table = answers_table([answer(ids(" The", "."), Signal("text"))] * 3, Signal("text"))
    before = [np.array([1, 5, 2], np.int32), None, np.empty(0, np.int32)]
    told = with_reasoning(table, before, most=4)
    assert told["response_ids"].to_pylist() == [[1, 5, 2, 4], [4, 6], [4, 6]]
    assert told["finish_reason"].to_pylist() == ["length", "stop", "stop"]


def test_reasoning_is_stored_for_its_answer_alone() -> None:
    keys = pa.array([b"k" * 16, b"k" * 16, b"l" * 16])
    said = pa.array([[1, 2], [1, 3], [1, 2]], TOKEN_IDS)
    found = reasoning_keys(keys, said)
    assert len(set(found.to_pylist())) == 3 and not set(found.to_pylist()) & set(keys.to_pylist())
    assert reasoning_keys(keys.slice(1), said.slice(1)).equals(found.slice(1))
    segment = pa.table({"key": keys, "prompt_ids": said, "response_ids": said})
    assert reasoning_rows(segment, segment) is None
    nothing = pa.nulls(3, TOKEN_IDS)
    assert reasoning_rows(segment, segment.append_column("reasoning_ids", nothing)) is None
    one = pa.array([None, [7, 8], None], TOKEN_IDS)
    rows = reasoning_rows(segment, segment.append_column("reasoning_ids", one))
    assert rows is not None and rows["response_ids"].to_pylist() == [[], [7, 8], []]
    assert rows["key"].combine_chunks().equals(found)
