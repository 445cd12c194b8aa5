"""Each filter by a table of cases, and what hostile answers and expressions do to them."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import ConfigError
from raystill.config.load import compare_identity, config_text, validate_leniently
from raystill.config.run import RunConfig
from raystill.config.stream import FiltersConfig
from raystill.datasets.filters.filters import AnswerFilters, repeated_share, text_of
from raystill.model.on_node import ModelSource

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"
STOP = 0


def decode(rows):
    """A token is a character; the stop token is none."""
    return ["".join(chr(token) for token in row if token != STOP) for row in rows]


def ids_of(text, finished=True):
    return [ord(character) for character in text] + [STOP] * finished


def rejected(rules, *answers, kept=None):
    """The name of the filter that rejects each answer: a text, or token ids and how it ended."""
    rows = [(ids_of(a), "stop") if isinstance(a, str) else a for a in answers]
    table = pa.table(
        {
            "response_ids": pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
            "finish_reason": pa.array([reason for _, reason in rows], pa.string()),
        }
    )
    filters = AnswerFilters(FiltersConfig.model_validate(rules), decode)
    kept = np.ones(len(rows), bool) if kept is None else np.array(kept)
    reasons = filters.rejected(table, kept)
    assert reasons.type == pa.string()
    return [None if r is None else r.removeprefix("filtered: ") for r in reasons.to_pylist()]


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({}, []),
        ({"min_tokens": 1}, [0]),
        ({"min_tokens": 3}, [0, 1, 2]),
        ({"max_tokens": 2}, [3, 4]),
        ({"min_tokens": 2, "max_tokens": 3}, [0, 1, 4]),
    ],
)
def test_length_counts_tokens_without_the_stop_token(limits, lengths):
    answers = [("x" * n, n) for n in range(5)]
    finished = rejected([{"length": limits}], *(text for text, _ in answers))
    cut = rejected([{"length": limits}], *((ids_of(t, False), "length") for t, _ in answers))
    expected = ["length" if n in lengths else None for _, n in answers]
    assert finished == cut == expected


@pytest.mark.parametrize(
    ("text", "ngram", "share"),
    [
        ("", 1, 0.0),
        ("abc", 4, 0.0),
        ("abcd", 4, 0.0),
        ("aaaa", 1, 0.75),
        ("abab", 2, 1 / 3),
        ("abcabcabc", 3, 4 / 7),
        ("abcdefgh", 2, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_occurred_before(text, ngram, share):
    ids = np.array(ids_of(text, False), np.int32)
    assert repeated_share(ids, ngram) == pytest.approx(share)
    slow = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
    assert repeated_share(ids, ngram) == pytest.approx(
        1 - len(set(slow)) / max(1, len(slow)) if slow else 0
    )
    for most, bad in ((share, False), (max(0.0, share - 0.01), share > 0)):
        rule = [{"repetition": {"ngram": ngram, "max_share": most}}]
        assert rejected(rule, text) == ["repetition" if bad else None]


@pytest.mark.parametrize(
    ("settings", "text", "bad"),
    [
        ({"must_match": "Answer: [0-9]+"}, "So. Answer: 12", False),
        ({"must_match": "Answer: [0-9]+"}, "So. answer: 12", True),
        ({"must_match": "Answer: [0-9]+", "ignore_case": True}, "So. answer: 12", False),
        ({"must_match": "^A"}, "B\nA", True),
        ({"must_match": "(?m)^A"}, "B\nA", False),
        ({"must_match": "."}, "", True),
        ({"must_not_match": "TODO"}, "", False),
        ({"must_not_match": "TODO"}, "is TODO", True),
        ({"must_not_match": r"\p{Han}"}, "latin", False),
        ({"must_not_match": r"\p{Han}"}, "漢字", True),
        ({"must_match": "a", "must_not_match": "b"}, "a", False),
        ({"must_match": "a", "must_not_match": "b"}, "ab", True),
        ({"must_match": "a", "must_not_match": "b"}, "c", True),
    ],
)
def test_regular_expressions(settings, text, bad):
    assert rejected([{"regex": settings}], text) == ["regex" if bad else None]


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("I can't help with that.", True),
        ("I can\u2019t help with that.", True),
        ("  i  CANNOT\nassist you", True),
        ("I'm sorry, but I can't do that.", True),
        ("As an AI language model, I have no taste.", True),
        ("You can't help with a broken arm.", False),
        ("Paris.", False),
        ("", False),
        ("x" * 200 + " I can't help with that.", False),
    ],
)
def test_refusals_are_looked_for_at_the_beginning(text, bad):
    assert rejected([{"refusal": {}}], text) == ["refusal" if bad else None]


def test_own_phrases_replace_the_usual_ones():
    rule = [{"refusal": {"phrases": ["Je ne peux pas"], "within_chars": 20}}]
    assert rejected(rule, "je ne  peux pas", "I can't help with that.") == ["refusal", None]


def test_unfinished_answers_are_rejected():
    assert rejected([{"finished": True}], "a", (ids_of("a", False), "length")) == [None, "finished"]


def test_the_first_filter_that_rejects_a_row_is_named_and_others_see_what_passed():
    rules = [
        {"name": "short", "length": {"max_tokens": 3}},
        {"name": "no b", "regex": {"must_not_match": "b"}},
        {"name": "no c", "regex": {"must_not_match": "c"}},
    ]
    with pytest.raises(ValueError, match="no b"):
        FiltersConfig.model_validate(rules)
    rules[1]["name"], rules[2]["name"] = "no-b", "no-c"
    answers = ["abcd", "abc", "ac", "a", "abcd"]
    assert rejected(rules, *answers) == ["short", "no-b", "no-c", None, "short"]
    kept = [False, True, False, True, True]
    assert rejected(rules, *answers, kept=kept) == [None, "no-b", None, None, "short"]
    assert rejected(rules, *answers, kept=[False] * 5) == [None] * 5
    assert rejected(rules) == []


def test_no_expression_and_no_answer_takes_long():
    """Expressions that take a backtracking matcher for ever, and answers made to be slow."""
    patterns = ["^(a+)+$", "(a|aa)+$", "(.*a){20}$", "^(([a-z])+.)+[A-Z]([a-z])+$"]
    rules = [{"name": f"r{i}", "regex": {"must_not_match": p}} for i, p in enumerate(patterns)]
    rules += [{"repetition": {"ngram": 8, "max_share": 0.99}}, {"refusal": {}}]
    began = time.monotonic()
    rejected(rules, "a" * 50_000 + "!", "i can't " * 20_000, "\n" * 100_000, "\U0001f600" * 50_000)
    assert time.monotonic() - began < 10, "a backtracking matcher would need years"


def run_with(filters):
    return {
        "teacher": {"model": "t"},
        "student": {"init": "from_teacher", "layers": [0]},
        "prompts": {"path": "p.jsonl"},
        "filters": filters,
    }


@pytest.mark.parametrize(
    ("filters", "where", "message"),
    [
        ([{}], "filters.rules.0", "sets no filter"),
        ([{"length": {}, "finished": True}], "filters.rules.0", "length and finished"),
        ([{"lenght": {}}], "filters.rules.0.lenght", "length"),
        ([{"finished": True}] * 2, "filters.rules", "2 filters that are counted as 'finished'"),
        ([{"regex": {}}], "filters.rules.0.regex", "must_match"),
        ([{"regex": {"must_match": "("}}], "filters.rules.0.regex.must_match", "RE2"),
        ([{"regex": {"must_match": "(?=a)"}}], "filters.rules.0.regex.must_match", "look-around"),
        ([{"regex": {"must_match": "(a{1000}){1000}"}}], "filters.rules.0.regex.must_match", "RE2"),
        ([{"length": {"min_tokens": 5, "max_tokens": 2}}], "filters.rules.0.length", "below"),
        ([{"name": "a\nb", "finished": True}], "filters.rules.0.name", ""),
        ([{"refusal": {"phrases": []}}], "filters.rules.0.refusal.phrases", ""),
        ({"max_rejected_fraction": 2}, "filters.max_rejected_fraction", ""),
        ("length", "filters", ""),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(filters, where, message):
    problems = validate_leniently(run_with(filters), []).problems
    assert [p.where for p in problems] == [where]
    assert message in problems[0].message


def test_a_bare_list_is_short_and_another_list_is_another_run():
    short = RunConfig.model_validate(run_with([{"finished": True}]))
    long = RunConfig.model_validate(
        run_with({"rules": [{"finished": True}], "max_rejected_fraction": 0.9})
    )
    assert compare_identity(short, long) == []
    none = RunConfig.model_validate(run_with([]))
    (line,) = compare_identity(short, none)
    assert line.startswith("filters.rules was ")
    assert "filters" in config_text(short)


def test_texts_are_those_of_the_teachers_tokenizer():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.encode("Water boils at 100 degrees.", add_special_tokens=False)
    source = ModelSource.of("tiny", TINY)
    text = text_of(source)([np.array([*ids, tokenizer.eos_token_id], np.int32), np.array([], int)])
    assert text == ["Water boils at 100 degrees.", ""]
    with pytest.raises(ConfigError):
        text_of(ModelSource("none", "/nowhere"))([np.array([1], np.int32)])
