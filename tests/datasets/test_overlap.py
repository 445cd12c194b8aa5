"""Overlap of training prompts with held-out ones and with benchmarks, by n-grams of words."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.base.errors import ConfigError
from raystill.config.run import RunConfig
from raystill.datasets.overlap.ngrams import MOST_TEXTS, WORDS, Items, words_of
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"
LONG = "A farmer sells five brown eggs for every hen that walks over the old stone bridge"


def shares(items: list[list[str]], trained: list[str], n: int = 8) -> list[float]:
    looked = Items(items, n)
    looked.look_in(trained)
    return looked.shares()[0].round(4).tolist()


def slowly(text: str, trained: list[str], n: int) -> float:
    """The share by its definition: words in an n-gram that 1 to 10 trained texts have, or any
    number where they have all."""

    def grams(words: list[str]) -> list[tuple[str, ...]]:
        size = min(n, len(words))
        return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []

    words = WORDS.findall(text.casefold())
    others = [set(grams(WORDS.findall(one.casefold()))) for one in trained]
    times = [sum(gram in other for other in others) for gram in grams(words)]
    hit = [bool(number) and (number <= MOST_TEXTS or all(times)) for number in times]
    inside = [
        any(hit[i] for i in range(max(0, word - min(n, len(words)) + 1), word + 1) if i < len(hit))
        for word in range(len(words))
    ]
    return sum(inside) / len(words) if words else 0.0


@pytest.mark.parametrize(
    ("item", "trained", "share"),
    [
        (LONG, [LONG], 1.0),
        (LONG, ["Say: " + LONG.upper().replace(" ", ",  ") + "!"], 1.0),
        (LONG, [" ".join(LONG.split()[:8])], 0.5),
        (LONG, [" ".join(LONG.split()[:7])], 0.0),
        (LONG, [" ".join(LONG.split()[:8]), " ".join(LONG.split()[8:])], 1.0),
        (LONG, [], 0.0),
        (LONG, ["", "x"], 0.0),
        ("one two", ["one two"], 1.0),
        ("one two", ["one two three"], 0.0),
        ("one two", ["two one"], 0.0),
        ("", ["", LONG], 0.0),
        ("农夫卖五个鸡蛋给每个人", ["问题:农夫卖五个鸡蛋给每个人。"], 1.0),
    ],
)
def test_the_share_of_words_in_common_ngrams(item: str, trained: list[str], share: float) -> None:
    assert shares([[item]], trained) == [share]


def test_a_phrase_of_many_trained_texts_is_a_template() -> None:
    phrase = "Answer the following question about the text in one word"
    few = [f"{phrase} number {i}" for i in range(MOST_TEXTS)]
    item = f"{phrase} and no other"
    most = len(phrase.split()) / len(item.split())
    assert shares([[item]], few) == [round(most, 4)]
    assert shares([[item]], [*few, f"{phrase} once more"]) == [0.0]
    assert shares([[phrase]], [phrase * 50]) == [1.0]  # Of one text as often as it likes.


@pytest.mark.parametrize("times", [1, MOST_TEXTS, MOST_TEXTS + 1, 200])
def test_an_item_that_was_copied_often_is_no_template(times: int) -> None:
    copies = [f"{LONG} {number}" for number in range(times)]
    assert shares([[LONG], [f"{LONG} of the mill"]], copies)[0] == 1.0


def test_of_an_item_the_longest_texts_count() -> None:
    """Not an answer of one word, which any text may have alone."""
    assert shares([["yes", LONG]], ["yes"]) == [0.0]
    assert shares([["yes", LONG]], [LONG]) == [1.0]
    assert shares([["yes", "no"]], ["no"]) == [1.0]


def test_the_first_trained_text_is_named_over_batches() -> None:
    looked = Items([[LONG]], 8)
    looked.look_in([f"other {n}" for n in range(700)] + [LONG] + ["more"] * 300 + [LONG])
    looked.look_in([LONG])
    assert looked.shares()[1].tolist() == [700]


WORDS_OF = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


@given(WORDS_OF, st.lists(WORDS_OF, max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_it_equals_the_definition(text: str, trained: list[str], n: int) -> None:
    assert shares([[text]], trained, n) == [pytest.approx(slowly(text, trained, n), abs=1e-4)]


@pytest.mark.parametrize("text", ["a" * 3_000_000, "a " * 1_000_000, "\ud800x " * 9, "\0 \n" * 99])
def test_hostile_texts_are_read_in_bounded_time(text: str) -> None:
    start = time.process_time()
    assert len(words_of(text)) <= 500_000
    assert shares([[text]], [text]) in ([0.0], [1.0])
    assert time.process_time() - start < 20


def test_memory_is_that_of_the_items() -> None:
    """8,000 trained texts pass by in batches; kept are the n-grams of 100 items."""
    import tracemalloc

    draw = random.Random(0)
    words = [f"w{n}" for n in range(5000)]
    items = [[" ".join(draw.choices(words, k=50))] for _ in range(100)]
    looked = Items(items, 8)
    tracemalloc.start()
    looked.look_in(" ".join(draw.choices(words, k=50)) for _ in range(8_000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 << 20
    assert not np.any(looked.shares()[0])


def made(tmp_path: Path, rows: list[dict[str, Any]], **overlap: Any) -> PromptTables:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "teacher": {"model": str(TINY)},
            "student": {"layers": [0]},
            "prompts": {"path": str(path), "system": LONG, "overlap": overlap},
            "evaluation": {"held_out_sources": ["test"], "held_out_rows": 0},
        }
    )
    return build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 500)


TRAIN = [{"prompt": f"{LONG}, and then?", "source": "web"}, {"prompt": "x y", "source": "web"}]
TEST = [{"prompt": LONG, "source": "test"}, {"prompt": "Name a colour.", "source": "test"}]


def test_held_out_prompts_are_always_counted(tmp_path: Path) -> None:
    """Not the system message, which all share."""
    (overlap,) = made(tmp_path, TRAIN + TEST).overlap
    assert overlap.record() == {"name": "held-out prompts", "items": 2, "contained": 1}
    assert overlap.line().startswith(
        "overlap: 1 of 2 held-out prompts are contained in training prompts; the first is "
    )
    assert "p.jsonl, line 3, by " in overlap.line() and overlap.line().endswith("p.jsonl, line 1")
    assert LONG not in overlap.line()
    (clean,) = made(tmp_path, TRAIN[1:] + TEST).overlap
    assert clean.contained == 0


def test_above_the_limit_the_run_is_refused(tmp_path: Path) -> None:
    made(tmp_path, TRAIN + TEST, max_fraction=0.5)
    with pytest.raises(ConfigError, match=r"max_fraction: is 0\.4, but 1 of 2 held-out prompts"):
        made(tmp_path, TRAIN + TEST, max_fraction=0.4)
    made(tmp_path, TRAIN + TEST, max_fraction=0, min_share=1, ngram=64)


def test_named_benchmarks_are_compared_whatever_their_fields(tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    rows = [{"question": LONG, "answer": "5"}, {"choices": ["a b", {"text": "other words"}]}]
    bench.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "more.txt").write_text("Nothing of it.\n")
    files = [str(bench), str(tmp_path / "more.txt")]
    _, first, second = made(tmp_path, TRAIN + TEST, path=files).overlap
    assert (first.items, first.contained, second.items, second.contained) == (2, 1, 1, 0)
    with pytest.raises(ConfigError, match=r"1 of 2 rows of .*bench\.jsonl are contained"):
        made(tmp_path, TRAIN + TEST[1:], path=files, max_fraction=0.0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "holds no rows"),
        ("broken.jsonl", '{"a": ', "is not JSON"),
        ("bench.docx", "x", "set prompts.overlap.format"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_a_problem(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        made(tmp_path, TRAIN + TEST, path=str(tmp_path / name))
