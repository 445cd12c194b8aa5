"""Each filter by a table of cases, and what hostile answers and expressions do to them."""

import asyncio
import json
import math
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from raystill.base.errors import ConfigError, RunError
from raystill.base.run_folder import PROMPT_COLUMNS, RunFolder
from raystill.cluster.check.output import check_same_columns, check_same_functions
from raystill.config.load import compare_identity, config_text, validate_leniently
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.config.stream import FiltersConfig
from raystill.datasets.filters import function as functions
from raystill.datasets.filters.answers import Answers
from raystill.datasets.filters.filters import AnswerFilters, repeated_share, text_of
from raystill.datasets.filters.function import read_functions
from raystill.datasets.filters.language import check_languages
from raystill.datasets.filters.reference import last_box, value_of
from raystill.datasets.prompts.tables import build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.prompt_table import PromptReader
from raystill.datasets.stream.filtering import GroupFilters, numbered
from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import epoch_order, remaining_groups
from raystill.model.on_node import ModelSource

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"
STOP = 0


def decode(rows):
    """A token is a character; the stop token is none."""
    return ["".join(chr(token) for token in row if token != STOP) for row in rows]


decode_plainly = decode


def ids_of(text, finished=True):
    return [ord(character) for character in text] + [STOP] * finished


def answers_of(*answers, sources=None, prompts=None, rows=None, **fields):
    """Answers: each a text, or token ids and how it ended. Fields: their values, None for none."""
    numbers, rows = rows, [(ids_of(a), "stop") if isinstance(a, str) else a for a in answers]
    texts = {n: [None if v is None else json.dumps(v) for v in vs] for n, vs in fields.items()}
    return Answers(
        pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
        pa.array([reason for _, reason in rows], pa.string()),
        np.array(numbers or range(len(answers)), np.int64),
        np.array(prompts or range(len(answers)), np.int64),
        pa.array(sources or ["s"] * len(answers), pa.string()),
        {name: pa.array(values, pa.string()) for name, values in texts.items()},
        decode,
    )


def rejected(rules, *answers, kept=None, **more):
    """The name of the filter that rejects each answer."""
    config = FiltersConfig.model_validate(rules)
    filters = AnswerFilters(config, read_functions(config))
    kept = np.ones(len(answers), bool) if kept is None else np.array(kept)
    reasons = filters.rejected(answers_of(*answers, **more), kept)
    filters.close()
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So it is 72.", 72),
        ("#### 1,234.50", Fraction(2469, 2)),
        ("x = -4", -4),
        ("x = \u22124", -4),
        ("5-3", 3),
        ("from 10-12 o'clock", 12),
        ("1/2", Fraction(1, 2)),
        ("1 / 3 of it", Fraction(1, 3)),
        ("\\frac{1}{2}", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("$5.00", 5),
        ("50%", 50),
        ("0", 0),
        ("0.0", 0),
        ("the 3rd", 3),
        ("1, 2 and 3", 3),
        ("\\boxed{7} since 3 + 4", 7),
        ("\\boxed{1} or rather \\boxed{2}", 2),
        ("\\boxed{\\boxed{3}}", 3),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{-\\dfrac{3}{4}}", Fraction(-3, 4)),
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{\\text{Blue}}", "blue"),
        ("\\boxed{x^2 + 1}", "x^2+1"),
        ("\\boxed{12", 12),
        ("1/0", "1/0"),
        ("9" * 5000, "9" * 5000),
        ("1e999", "1e999"),
        ("version 1.2.3", None),
        ("a1", None),
        ("Blue.", None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_the_value_of_a_text_is_its_last_box_or_its_last_number(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "right"),
    [
        ("So 3 + 4 = 7.", "7", {}, True),
        ("So 3 + 4 = 7.", "Adding gives\n#### 7", {}, True),
        ("It is \\boxed{0.5}.", "\\boxed{\\frac{1}{2}}", {}, True),
        ("It is 1,000", "1000.00", {}, True),
        ("It is 8", "7", {}, False),
        ("I do not know", "7", {}, False),
        ("", "7", {}, False),
        ("blue ", "Blue.", {}, True),
        ("It is blue", "Blue", {}, False),
        ("There are 3: blue", "Blue", {}, False),
        ("The answer is 1/2.", "1/2", {}, True),
        ("The answer is 1/2.", "2", {}, False),
        ("So it is $\\frac{3}{4}$.", "0.75", {}, True),
        ("So it is \\frac{3}{4}.", "4", {}, False),
        ("It is 3 / 4.", "3/4", {}, True),
        ("It is 1/2.5", "1/2", {}, False),
        ("\\boxed{3\\frac{1}{2}}", "3.5", {}, True),
        ("\\boxed{3\\frac{1}{2}}", "31/2", {}, False),
        ("It is $-1 \\dfrac{3}{4}$.", "-1.75", {}, True),
        ("x^2\\frac{1}{2}", "5/2", {}, False),
        ("3\\frac{1}{0}", "3", {}, False),
        ("\\boxed{Blue}", "\\boxed{\\text{ blue }}", {}, True),
        ("It is 3.14", "3.14159", {}, False),
        ("It is 3.14", "3.14159", {"tolerance": 0.01}, True),
        ("It is -3.14", "3.14159", {"tolerance": 0.01}, False),
        ("It is 0.001", "0", {"tolerance": 0.5}, False),
        ("Blue  Whale", "blue whale", {"by": "text"}, True),
        ("A blue whale", "blue whale", {"by": "text"}, False),
        ("7", "7.0", {"by": "text"}, False),
    ],
)
def test_answers_are_checked_against_a_reference(answer, reference, settings, right):
    rule = [{"answer": {"column": "gold", **settings}}]
    assert rejected(rule, answer, gold=[reference]) == [None if right else "answer"]


def test_a_reference_may_be_a_number_or_a_list_of_them():
    answers, gold = ["7", "7.0", "b", "b", "a"], [7, 7.0, ["a", "b"], [], ["a", 7]]
    rule = [{"answer": {"column": "gold"}}]
    assert rejected(rule, *answers, gold=gold) == [None, None, None, "answer", None]


def test_hostile_answers_take_no_time_to_compare():
    parts = ["1,234", "\\boxed{", "{", "}", "\\frac{", "1/", "-", "1", ",", "1 ", "1e", "(", "\\"]
    began = time.monotonic()
    for part in parts:
        value_of(part * 1_000_000)
        last_box(part * 20_000)
        value_of("\\boxed{" * 2000 + part * 2000 + "}" * 2000)
    assert time.monotonic() - began < 20


def test_a_filter_may_be_of_some_sources_only():
    rules = [
        {"sources": ["maths"], "answer": {"column": "gold"}},
        {"sources": ["chat", "web"], "length": {"max_tokens": 2}},
    ]
    answers, sources = ["7", "8", "888", "88", "999"], ["maths", "maths", "chat", "web", "other"]
    gold = ["7", "7", None, None, None]
    expected = [None, "answer", "length", None, None]
    assert rejected(rules, *answers, sources=sources, gold=gold) == expected


def test_an_answer_is_decoded_once_however_many_filters_read_it(monkeypatch):
    seen = []
    monkeypatch.setitem(globals(), "decode", lambda rows: seen.append(len(rows)) or told(rows))
    told = decode_plainly
    rules = [
        {"sources": ["b"], "regex": {"must_not_match": "x"}},
        {"name": "all", "regex": {"must_not_match": "y"}},
        {"refusal": {}},
        {"name": "again", "refusal": {}},
    ]
    answers, sources = ["x", "a", "y", "x"], ["a", "b", "a", "b"]
    assert rejected(rules, *answers, sources=sources) == [None, None, "all", "regex"]
    assert seen == [2, 2], "first those of one source, then the others"


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
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode("Water boils at 100 degrees.", add_special_tokens=False).ids
    stop = tokenizer.token_to_id("<|im_end|>")
    source = ModelSource.of("tiny", TINY)
    text = text_of(source)([np.array([*ids, stop], np.int32), np.array([], int)])
    assert text == ["Water boils at 100 degrees.", ""]
    with pytest.raises(ConfigError):
        text_of(ModelSource("none", "/nowhere"))([np.array([1], np.int32)])


def tables(tmp_path, rows, filters, **prompts):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        run_with(filters) | {"prompts": {"path": str(path), "chat_template": False, **prompts}}
    )
    return build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 100)


def test_fields_of_the_prompt_file_follow_their_rows(tmp_path):
    rows = [
        {"prompt": f"What is {i}?", "answer": i, "more": {"a": [i, "\ud800"]}} for i in range(9)
    ]
    rows += [{"prompt": "What is 3?", "answer": "a duplicate", "more": None}]
    made = tables(tmp_path, rows, [{"answer": {}}], samples_per_prompt=2)
    folder = RunFolder(str(tmp_path))
    folder.write_table(PROMPT_COLUMNS, made.columns, row_group_size=4)
    reader = PromptReader(folder.join(PROMPT_COLUMNS), None)
    taken = reader.take(np.array([3, 11, 0, 17]))
    assert taken["field answer"].cast(pa.string()).to_pylist() == ["3", "2", "0", "8"]
    assert "field more" not in taken.column_names
    assert made.columns["row"].to_pylist() == list(range(18))
    assert tables(tmp_path, rows, [{"finished": True}]).columns is None


def test_a_group_is_filtered_with_the_fields_of_its_rows(tmp_path):
    """What the answer stage does, without Ray: rows come in the order of the plan."""
    rows = [{"prompt": f"What is {i}?", "answer": i} for i in range(6)]
    folder = RunFolder(str(tmp_path))
    folder.write_table(PROMPT_COLUMNS, tables(tmp_path, rows, [{"answer": {}}]).columns)
    spec = SimpleNamespace(
        filters=FiltersConfig.model_validate([{"answer": {}}]),
        teacher=ModelSource.of("tiny", TINY),
        prompt_columns=folder.join(PROMPT_COLUMNS),
        function_texts={},
    )
    tokeniser = PromptTokeniser(TINY, PromptsConfig(path="p", chat_template=False))
    texts = ["It is 4.", "It is 4.", "", "It is 5."]
    ids = [tokeniser.tokenizer.encode(text).ids for text in texts]
    answers = pa.table(
        {
            "response_ids": pa.array(ids, pa.list_(pa.int32())),
            "finish_reason": ["length", "length", None, "length"],
        }
    )
    ids = pa.array([[4], [0], [1], [5]], pa.list_(pa.int32()))
    prompts = pa.table({"row": [4, 0, 1, 5], "source": ["s"] * 4, "prompt_ids": ids})
    reasons = pa.array([None, None, "empty", None], pa.string())
    spec.counts_personal = True
    same, told, counters = asyncio.run(GroupFilters(spec).applied(prompts, answers, reasons))
    assert told.to_pylist() == [None, "filtered: answer", "empty", None]
    assert same is answers
    assert counters == {"personal_data/looked": 3, "personal_data/any": 0}
    spec.teacher = ModelSource("none", "/nowhere")
    spec.filters = FiltersConfig()
    same, told, counters = asyncio.run(GroupFilters(spec).applied(prompts, answers, reasons))
    assert told.to_pylist() == [None, None, "empty", None] and counters == {}
    assert numbered(pa.array([[1], [2], [1], [], [1, 2]])).tolist() == [0, 1, 0, 2, 3]


ONE_OF_TWO = ("rules.0.answer.column", "1 of 2")


@pytest.mark.parametrize(
    ("rows", "filters", "where", "message"),
    [
        ([{"gold": 1}, {}], [{"answer": {"column": "gold"}}], "rules.0.answer.column", "1 of 2"),
        ([{"gold": None}], [{"answer": {"column": "gold"}}], "rules.0.answer.column", "line 1"),
        *(
            ([{"gold": 0}, {"gold": gold}], [{"answer": {"column": "gold"}}], *ONE_OF_TWO)
            for gold in ("", " \n", [], math.nan)
        ),
        ([{}], [{"finished": True, "sources": ["math"]}], "rules.0.sources", "'math' is no source"),
    ],
)
def test_a_reference_that_is_missing_is_told_before_anything_is_spent(
    tmp_path, rows, filters, where, message
):
    rows = [{"prompt": f"p {i}", **row} for i, row in enumerate(rows)]
    with pytest.raises(ConfigError) as error:
        tables(tmp_path, rows, filters)
    assert [p.where for p in error.value.problems] == [f"filters.{where}"]
    assert message in error.value.problems[0].message


def test_a_source_without_references_needs_none_where_the_filter_is_not_of_it(tmp_path):
    rows = [{"prompt": "a", "gold": 1, "source": "maths"}, {"prompt": "b", "source": "chat"}]
    made = tables(tmp_path, rows, [{"sources": ["maths"], "answer": {"column": "gold"}}])
    assert made.columns["field gold"].cast(pa.string()).to_pylist() == ["1", None]


def test_another_reference_is_another_run(tmp_path):
    rows = [{"prompt": f"p {i}", "gold": i} for i in range(4)]
    rule, folder = [{"answer": {"column": "gold"}}], RunFolder(str(tmp_path / "run")).ensure()
    before = tables(tmp_path, rows, rule).columns
    assert check_same_columns(folder, before) == []
    folder.write_table(PROMPT_COLUMNS, before)
    assert check_same_columns(folder, tables(tmp_path, rows, rule).columns) == []
    rows[2]["gold"] = 7
    (problem,) = check_same_columns(folder, tables(tmp_path, rows, rule).columns)
    assert "field gold" in problem.message


FUNCTIONS = """
import dataclasses, os, re, subprocess, sys, time

@dataclasses.dataclass
class Kept:
    words: int = 2

def few_words(row):
    print("to nobody")
    return len(row["response"].split()) <= Kept().words

def length(row):
    return len(row["response"])

def told(row):
    return row["columns"]["gold"] == row["response"] and row["source"] == "s"

def hostile(row):
    text = row["response"]
    if text == "sleep":
        time.sleep(60)
    if text == "regex":
        re.match("(a+)+$", "a" * 64 + "!")
    if text == "children":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3717)"])
        time.sleep(60)
    if text == "exit":
        os._exit(0)
    if text == "quit":
        sys.exit(3)
    if text == "stdin":
        return len(sys.stdin.read()) == 0
    if text == "nan":
        return float("nan")
    if text == "none":
        return None
    if text == "raise":
        raise KeyError("x" * 10_000_000)
    return True
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_the_function_of_the_examples_compares_by_algebra():
    path = Path(__file__).parents[2] / "examples" / "filters" / "maths.py"
    rule = [{"function": {"path": f"{path}:agrees", "columns": ["answer"], "timeout_s": 30}}]
    cases = {
        (r"It is $\boxed{(x+1)^2}$.", "x^2+2x+1"): True,
        (r"It is $\boxed{(x+2)^2}$.", "x^2+2x+1"): False,
        (r"The set is $\{2, 1\}$.", r"\{1,2\}"): True,
        (r"$x \in [0, 1]$", "(0,1]"): False,
        (r"$2\sqrt{2}$", r"\sqrt{8}"): True,
        (r"\boxed{100\text{ cm}}", "100 cm"): True,
        ("So it is 0.5.", r"\frac{1}{2}"): True,
        ("I get 12", 12): True,
        ("none", "42"): False,
        ("42", ""): False,
        ("12", None): False,
    }
    told, meant = zip(*cases, strict=True)
    found = rejected(rule, *told, answer=list(meant))
    assert [reason is None for reason in found] == list(cases.values())


def test_a_function_of_ones_own_decides(file):
    few = [{"name": "few", "function": {"path": f"{file}:few_words"}}]
    assert rejected(few, "a", "a b c", "a b", "") == [None, "few", None, None]
    scored = [{"function": {"path": f"{file}:length", "min_score": 2}}]
    assert rejected(scored, "a", "abc", "ab") == ["function", None, None]
    told = [{"function": {"path": f"{file}:told", "columns": ["gold"]}}]
    odd = "\ud800 \x00 \U0001f600"
    answers = {"gold": ["a", None, [1], odd], "sources": ["s", "s", "s", "s"]}
    assert rejected(told, "a", "b", "1", "x", **answers) == [None, *["function"] * 3]
    imported = [{"function": {"path": "operator:truth"}}]  # Importable; a row is not empty.
    assert rejected(imported, "a") == [None]


def test_what_a_function_does_to_its_process_costs_its_own_row_only(file):
    rule = [{"name": "f", "function": {"path": f"{file}:hostile", "timeout_s": 2}}]
    cases = {
        "good": None,
        "sleep": "f (timed out)",
        "regex": "f (timed out)",  # Keeps the interpreter: only ending the process helps.
        "children": "f (timed out)",
        "exit": "f (failed)",
        "quit": "f (failed)",
        "stdin": None,
        "nan": "f (failed)",
        "none": "f (failed)",
        "raise": "f (failed)",
        "x" * 3_000_000: None,
    }
    began = time.monotonic()
    assert rejected(rule, *cases, "again") == [*cases.values(), None]
    assert time.monotonic() - began < 60
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert b"3717" not in command.read_bytes(), "what it started lives on"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.module:f", "No module named 'nowhere'"),
        ("FILE:missing", "there is no 'missing'"),
        ("operator:nothing", "there is no 'nothing'"),
    ],
)
def test_a_function_that_cannot_be_loaded_ends_the_run(file, path, message):
    rule = [{"function": {"path": path.replace("FILE", file)}}]
    config = FiltersConfig.model_validate(rule)
    (problem,) = functions.check_functions(config, read_functions(config))
    assert problem.where == "filters.rules.0.function.path"
    assert message in problem.message, "told before anything is spent"
    with pytest.raises(RunError, match=message):
        rejected(rule, "a")


@pytest.mark.parametrize("text", [None, "def f(:\n", "\0"])
def test_a_file_that_is_no_python_is_told_before_anything_is_spent(tmp_path, text):
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    config = FiltersConfig.model_validate([{"function": {"path": f"{tmp_path}/bad.py:f"}}])
    with pytest.raises(ConfigError) as error:
        read_functions(config)
    assert error.value.problems[0].where == "filters.rules.0.function.path"


def test_another_text_of_the_function_is_another_run(tmp_path, file):
    rule = [{"function": {"path": f"{file}:few_words"}}]
    config = RunConfig.model_validate(run_with(rule))
    folder = RunFolder(str(tmp_path / "run")).ensure()
    assert check_same_functions(config, folder) == []
    hashes = functions.hashes_of(read_functions(config.filters))
    folder.write_text("manifest.json", json.dumps({"filter_functions": hashes}))
    assert check_same_functions(config, folder) == []
    Path(file).write_text(FUNCTIONS + "#")
    (problem,) = check_same_functions(config, folder)
    assert "mine.py:few_words has changed" in problem.message
    folder.write_text("manifest.json", "{}")  # Of an earlier version.
    assert check_same_functions(config, folder) == []


def test_the_best_answers_to_each_prompt_pass(file):
    best = {"best": {"keep": 1, "score": {"path": f"{file}:length", "min_score": 1}}}
    answers = ["ab", "abc", "abd", "", "a", "", "xy", "xyzw"]
    more = {"prompts": [0, 0, 0, 1, 1, 2, 3, 3], "rows": [2, 1, 0, 4, 3, 5, 7, 6]}
    told = ["best", "best", None, "best", None, "best", "best", None]
    assert rejected([best], *answers, **more) == told, "of equals the earlier sample"
    two = {"best": {"keep": 2, "score": {"path": f"{file}:length"}}}
    assert rejected([two], *answers, **more) == [
        "best",
        None,
        None,
        "best",
        *[None, "best"],
        None,
        None,
    ]
    short = {"length": {"max_tokens": 2}}
    told = [None, "length", "length", "best", None, "best", None, "length"]
    assert rejected([short, best], *answers, **more) == told, "of those that passed before"
    first = {"best": {"keep": 1}}
    told = ["best", "best", None, "best", None, None, "best", None]
    assert rejected([first], *answers, **more) == told
    left = [told_of is None for told_of in told]
    assert rejected([first], *answers, kept=left, **more) == [None] * 8, "they pass again alone"


@pytest.mark.parametrize(
    ("answers", "most", "told"),
    [
        (["abcdef", "abcdef", "abcdef"], 0.9, [None, "similar", "similar"]),
        (["abcdef", "uvwxyz"], 0.0, [None, None]),
        (["abcdef", "abcdeg"], 0.6, [None, None]),  # 3 of 5 in common, and 0.6 is allowed.
        (["abcdef", "abcdeg"], 0.59, [None, "similar"]),
        (["ab", "ba", "ab", "", ""], 0.5, [None, None, "similar", None, "similar"]),
        (["abcd", "abcdX", "abcdXY"], 0.5, [None, "similar", None]),  # Not like one that passed.
    ],
)
def test_near_duplicates_among_the_answers_to_a_prompt_are_rejected(answers, most, told):
    rule = [{"similar": {"ngram": 3, "max_similarity": most}}]
    alone = list(range(len(answers)))
    assert rejected(rule, *answers, prompts=[0] * len(answers)) == told
    assert rejected(rule, *answers, prompts=alone) == [None] * len(answers)
    left = [one is None for one in told]
    again = rejected(rule, *answers, kept=left, prompts=[0] * len(answers))
    assert again == [None] * len(answers)
    order = [*reversed(alone)]  # In which a group's rows come makes no difference.
    mixed = rejected(rule, *(answers[i] for i in order), prompts=[0] * len(answers), rows=order)
    assert mixed == [told[i] for i in order]


def test_the_samples_of_a_prompt_stand_together_where_they_are_compared(tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(5)]
    made = tables(tmp_path, rows, [{"best": {}}], samples_per_prompt=4)
    assert made.samples.tolist() == [0, 1, 2, 3] * 5
    prompts = made.train["prompt_ids"].to_pylist()
    assert [prompts.index(ids) for ids in prompts] == [4 * (row // 4) for row in range(20)]
    for epoch in range(3):
        order = epoch_order(20, 7, epoch, 8).reshape(-1, 4)
        for group in (order[:2], order[2:4], order[4:]):
            numbers = (group.reshape(-1) // 4).tolist()
            assert all(numbers.count(number) == 4 for number in numbers)
    apart = tables(tmp_path, rows, [], samples_per_prompt=4)
    assert apart.samples.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.parametrize(
    ("samples", "keep", "where"),
    [(1, 1, "prompts.samples_per_prompt"), (3, 1, "stream.group_rows"), (2, 2, "prompts.")],
)
def test_answers_that_cannot_be_compared_are_told_before_anything_is_spent(
    tmp_path, samples, keep, where
):
    with pytest.raises(ConfigError) as error:
        tables(tmp_path, [{"prompt": "a"}], [{"best": {"keep": keep}}], samples_per_prompt=samples)
    assert error.value.problems[0].where.startswith(where)


def test_what_best_must_reject_is_in_its_quota():
    prompts = {"prompts": {"path": "p", "samples_per_prompt": 4}}
    config = RunConfig.model_validate(run_with([{"best": {}}]) | prompts)
    assert config.max_rejected_fraction == 0.875
    assert RunConfig.model_validate(run_with([]) | prompts).max_rejected_fraction == 0.5
    with pytest.raises(ValueError, match="best more than once"):
        FiltersConfig.model_validate([{"best": {}}, {"name": "b", "best": {}}])


@pytest.mark.parametrize("seed", range(8))
def test_restarts_at_any_time_train_the_same_rows(seed):
    """Groups are decided on, rows of them are trained in any order, and the run dies at any time.

    A checkpoint has the rows trained so far and all drops; what came after it is decided anew.
    """
    random = np.random.default_rng(seed)
    samples, num_rows = 4, 48
    texts = ["".join(random.choice(list("ab"), random.integers(0, 7))) for _ in range(num_rows)]
    rules = [
        {"length": {"min_tokens": 1}},
        {"similar": {"ngram": 2, "max_similarity": 0.6}},
        {"best": {"keep": 2}},
    ]
    filters = AnswerFilters(FiltersConfig.model_validate(rules))
    order = epoch_order(num_rows, seed, 0, 8)

    def passed_of(positions):
        rows = order[positions]
        seen = answers_of(*(texts[r] for r in rows), prompts=list(rows // samples), rows=list(rows))
        reasons = filters.rejected(seen, np.ones(len(rows), bool)).to_pylist()
        return {int(p): r for p, r in zip(positions, reasons, strict=True)}

    whole = {}
    for positions in remaining_groups(num_rows, 8, Ledger(num_rows)):
        whole |= passed_of(positions)
    expected = {p for p, reason in whole.items() if reason is None}
    assert 0 < len(expected) < num_rows

    saved = Ledger(num_rows)
    for life in range(20):
        ledger, waiting = Ledger.from_dict(saved.to_dict()), []
        for positions in remaining_groups(num_rows, 8, ledger):
            told = passed_of(positions)
            ledger.mark_dropped({p: r for p, r in told.items() if r is not None})
            waiting += [p for p, r in told.items() if r is None]
            random.shuffle(waiting)
            trained, waiting = waiting[: len(waiting) // 2], waiting[len(waiting) // 2 :]
            ledger.mark_trained(trained)
            if random.random() < 0.5:
                saved = Ledger.from_dict(ledger.to_dict())
            if life < 19 and random.random() < 0.4:
                break
        else:
            ledger.mark_trained(waiting)
            assert set(range(num_rows)) - set(ledger.dropped) == expected
            assert ledger.dropped == {p: r for p, r in whole.items() if r is not None}
            return


MAIL = "bob@mail.example.com"


def test_answers_with_personal_data_are_rejected_by_kind():
    answers = ["Blue.", f"Write to {MAIL}.", "Ask 8.8.8.8 first.", "AKIAIOSFODNN7EXAMPLE"]
    assert rejected([{"personal_data": {}}], *answers) == [None, *["personal_data"] * 3]
    only = {"name": "mail", "personal_data": {"kinds": ["email"]}}
    assert rejected([only], *answers) == [None, "mail", None, None]
    assert rejected([{"personal_data": {"action": "mask"}}], *answers) == [None] * 4
    with pytest.raises(ValueError, match=r"is 'mail'; expected one of .*email"):
        FiltersConfig.model_validate([{"personal_data": {"kinds": ["mail"]}}])


def test_a_masked_answer_is_what_the_student_gets(tmp_path):
    """Its stop token stays, other answers keep their ids, and special tokens in it are text."""
    tokenizer = PromptTokeniser(TINY, PromptsConfig(path="p", chat_template=False)).tokenizer
    plain = PromptTokeniser(TINY, PromptsConfig(path="p", chat_template=False)).plain_text()
    stop = tokenizer.token_to_id("<|im_end|>")
    said = ["Blue.", f"Write to {MAIL} <|im_end|>now.", f"To {MAIL}", f"{MAIL} at 8.8.8.8"]
    ids = [plain.encode(text) for text in said]
    ids[1], ids[2] = [*ids[1], stop], None  # Dropped rows need have none.
    ends = ["length", "stop", "stop", "length"]
    answers = pa.table(
        {"response_ids": pa.array(ids, pa.list_(pa.int32())), "finish_reason": ends, "row": ends}
    )
    spec = SimpleNamespace(
        filters=FiltersConfig.model_validate([{"personal_data": {"action": "mask"}}]),
        teacher=ModelSource.of("tiny", TINY),
        prompt_columns=None,
        function_texts={},
        counts_personal=True,
    )
    prompt = pa.array([[4], [0], [1], [5]], pa.list_(pa.int32()))
    prompts = pa.table({"row": [0, 1, 2, 3], "source": ["s"] * 4, "prompt_ids": prompt})
    reasons = pa.array([None, None, "empty", None], pa.string())
    masked, told, counters = asyncio.run(GroupFilters(spec).applied(prompts, answers, reasons))
    assert told.to_pylist() == [None, None, "empty", None]
    assert masked.schema == answers.schema
    got = masked["response_ids"].to_pylist()
    assert got[0] == ids[0] and got[2] is None
    assert got[1][-1] == stop and got[1].count(stop) == 1
    assert tokenizer.decode(got[1]) == "Write to [EMAIL] <|im_end|>now."
    assert tokenizer.decode(got[3]) == "[EMAIL] at [IP_ADDRESS]"
    assert counters == {
        "personal_data/looked": 3,
        "personal_data/any": 2,
        "personal_data/email": 2,
        "personal_data/ip_address": 1,
    }


def test_a_mask_needs_a_run_that_learns_from_text(tmp_path):
    rule = [{"personal_data": {"action": "mask"}}]
    with pytest.raises(ConfigError, match=r"signal.kind is 'topk'.*set action: reject"):
        tables(tmp_path, [{"prompt": "x"}], rule)


@pytest.mark.parametrize(
    ("text", "allowed", "bad"),
    [
        ("The farmer sells five of his eggs at the market.", ["en"], False),
        ("Der Bauer verkauft f\u00fcnf Eier auf dem Markt.", ["en"], True),
        ("Der Bauer verkauft f\u00fcnf Eier auf dem Markt.", ["en", "de"], False),
        ("\u7b54\u6848\u662f\u56db\u5341\u4e8c\u3002", ["en"], True),
        ("42", ["de"], False),
        ("", ["de"], False),
        ("x = [f(y) for y in z]", ["de"], False),
        ("word " * 200_000, ["en", "nl", "af"], False),
    ],
)
def test_answers_in_other_languages_are_rejected(text, allowed, bad):
    pytest.importorskip("py3langid")
    start = time.process_time()
    told = rejected([{"language": {"allowed": allowed}}], text)
    assert told == ["language" if bad else None]
    assert time.process_time() - start < 10


def test_languages_that_nobody_knows_are_a_problem(monkeypatch):
    pytest.importorskip("py3langid")
    config = FiltersConfig.model_validate([{"language": {"allowed": ["en", "english"]}}])
    (problem,) = check_languages(config)
    assert problem.where == "filters.rules.0.language.allowed"
    assert "'english'" in problem.message and " en, " in problem.message
    monkeypatch.setattr("raystill.datasets.filters.language.find_spec", lambda name: None)
    (problem,) = check_languages(config)
    assert "raystill[language]" in problem.message
    assert list(check_languages(FiltersConfig())) == []
