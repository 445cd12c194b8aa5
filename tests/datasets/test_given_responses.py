"""Prompts with a given response: reading, tokenising, keys, and the messages for mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import ConfigError
from raystill.cluster.check.static import check_run_file
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows import keys as row_keys
from raystill.datasets.rows.keys import answer_key, given_keys
from raystill.datasets.rows.schema import PROMPT_SCHEMA

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
TOKENISER = PromptTokeniser(MODEL, PromptsConfig(path="-", chat_template=False))
PAIR = ("prompt_ids", "response_ids")
ASKED = ("t", "float32", None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)


def write(name: str, rows: list[tuple[str, str | None]]) -> str:
    """A file of rows (prompt, answer)."""
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
    Path(name).write_text("\n".join(map(json.dumps, lines)))
    return name


def run_settings(
    prompts: Any, teacher: Any = None, seed: int = 0, **evaluation: Any
) -> dict[str, Any]:
    section = {"chat_template": False, "response_field": "answer"}
    return {
        "seed": seed,
        "teacher": {"model": str(MODEL), **(teacher or {})},
        "student": {"layers": [0]},
        "prompts": {**section, **prompts},
        "training": {"rows_per_step": 2},
        "stream": {"group_rows": 1},
        "evaluation": evaluation,
    }


def tables(
    rows: list[tuple[str, str | None]] | None, context: int = 40, **settings: Any
) -> PromptTables:
    """Their tables; prompts have 8 tokens at most, both together ``context``."""
    prompts = settings.pop("prompts", {}) | ({"path": write("p.jsonl", rows)} if rows else {})
    config = RunConfig.model_validate(run_settings(prompts, **settings))
    tokeniser = PromptTokeniser(MODEL, config.prompts)
    return build_prompt_tables(config, tokeniser, 8, context)


def checked(prompts: Any, **settings: Any) -> Any:
    Path("run.yaml").write_text(json.dumps(run_settings(prompts, **settings)))
    return check_run_file("run.yaml")


def encode(text: str) -> list[int]:
    return TOKENISER.tokenizer.encode(text).ids


def test_a_response_ends_with_a_stop_token_whether_its_text_does_or_not() -> None:
    rows: list[Any] = [("a", "one"), ("b", "two<|im_end|>"), ("c", "<|im_end|>")]
    (stop,) = encode("<|im_end|>")
    responses = tables(rows).train["response_ids"].to_pylist()
    assert responses == [[*encode(word), stop] for word in ("one", "two", "")]
    # Where the tokenizer's end token is none of them: the first that ends the teacher's answers.
    train = tables(rows[:2], teacher={"sampling": {"stop_token_ids": [11, 7]}}).train
    assert [ids[-1] for ids in train["response_ids"].to_pylist()] == [11, 11]
    assert stop not in train["response_ids"].to_pylist()[1]  # It ends no answer: it is text.
    with pytest.raises(ConfigError, match=r"stop_token_ids: is empty, and prompts.response_field"):
        tables(rows, teacher={"sampling": {"stop_token_ids": []}})


def test_equal_and_unusable_rows_are_dropped_and_counted() -> None:
    rows = [("a", "x"), ("a", "y"), ("a", "x"), ("b", ""), ("b", None), ("c", "many " * 50)]
    made = tables([*rows, ("", "x"), ("d " * 40, "x")])
    assert [TOKENISER.tokenizer.decode(ids) for ids in made.train["prompt_ids"].to_pylist()] == [
        "a",
        "a",
    ]
    assert made.dropped == {"empty_response": 2, "response_too_long": 1, "empty": 1, "too_long": 1}
    assert made.duplicates == 1
    assert "p.jsonl, line 6: " in made.first_dropped["response_too_long"]
    assert (made.longest_row(1000), made.response_tokens("train", 1000)) == (3, 4)
    assert made.longest_asked_prompt is None


def words(table: pa.Table) -> list[str]:
    return [TOKENISER.tokenizer.decode(ids) for ids in table["prompt_ids"].to_pylist()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("asked", "least", "most"), [(1, 1, 3), (4, 4, 6), (6, 6, 7)])
def test_a_prompt_is_trained_on_or_held_out_whatever_its_responses(
    seed: int, asked: int, least: int, most: int
) -> None:
    rows: list[Any] = [(prompt, response) for response in "xyz" for prompt in "abcd"]
    made = tables([*rows, ("e", "x")], seed=seed, held_out_rows=asked)
    assert not set(words(made.held_out)) & set(words(made.train))
    assert (made.held_out.num_rows + made.train.num_rows, made.duplicates) == (13, 0)
    assert least <= made.held_out.num_rows <= most


def test_a_prompt_of_a_held_out_source_is_not_trained_on_with_another_response() -> None:
    write("chat.jsonl", [("a", "x"), ("a", "y"), ("b", "x"), ("c", "x"), ("d", "x")])
    write("eval.jsonl", [("a", "x"), ("b", "z"), ("b", "y"), ("c", "many " * 50)])
    Path("asked.txt").write_text("b\ne")
    listed: list[dict[str, Any]] = [
        {"name": "chat", "path": "chat.jsonl", "response_field": "answer"},
        {"name": "asked", "path": "asked.txt"},
        {"name": "eval", "path": "eval.jsonl", "response_field": "answer"},
    ]
    prompts = {"sources": listed, "response_field": None}
    made = tables(None, prompts=prompts, held_out_sources=["eval"])
    assert words(made.held_out) == ["a", "b", "b"]
    # Not c either: it is named as held out, though its row there is too long.
    assert words(made.train) == ["d", "e"]
    assert (made.duplicates, made.num_dropped) == (5, 1)


def test_the_key_is_of_both_texts_and_not_of_the_sampling() -> None:
    made = tables([("a", "x"), ("a", "y"), ("b", "x"), ("c", "x")], held_out_rows=1)
    one, two = (made.with_keys(*ASKED, {"temperature": t}) for t in (0.5, 1.0))
    assert one.train.schema.equals(PROMPT_SCHEMA)
    assert one.train.equals(two.train) and one.held_out.equals(two.held_out)
    table = pa.concat_tables([one.train, one.held_out])
    prompts, responses = ([np.array(ids) for ids in table[n].to_pylist()] for n in PAIR)
    assert table["key"].to_pylist() == given_keys(*ASKED, prompts, responses)
    assert len(set(table["key"].to_pylist())) == 4


def test_a_key_changes_with_all_that_decides_the_signal() -> None:
    prompt, response = (np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5]))

    def key(*asked: Any, prompt: Any = prompt, response: Any = response) -> bytes:
        (made,) = given_keys(*(asked or ("t", "bfloat16", None)), [prompt], [response])
        return made

    keys = [
        key(),
        key("u", "bfloat16", None),
        key("t", "float16", None),
        key("t", "bfloat16", "fp8"),
        key(prompt=prompt[:2], response=np.array([3, 4, 5])),  # The same ids, cut elsewhere.
        key(response=response[:1]),
        answer_key("t", "bfloat16", None, {}, prompt),
    ]
    assert len(set(keys)) == len(keys)
    # This value must never change: stored answers are looked up by it.
    assert key().hex() == "4d2190574cad78a09bdde60951a89335"


def test_keys_that_end_in_zero_bytes_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tables([("a", "x"), ("b", "x")])
    keys = [bytes([i]) + bytes(15) for i in range(2)]
    monkeypatch.setattr(
        row_keys, "given_keys", lambda *asked: [keys[i] for i, _ in enumerate(asked[3])]
    )
    assert made.with_keys(*ASKED, {}).train["key"].to_pylist() == keys


def test_some_sources_bring_responses_and_the_teacher_answers_the_others() -> None:
    write("given.jsonl", [("a", "x"), ("b", "y"), ("c", "z"), ("d", "z")])
    Path("asked.txt").write_text("e\nf")
    listed: list[dict[str, Any]] = [
        {"name": "given", "path": "given.jsonl", "response_field": "answer", "weight": 0.5},
        {"name": "asked", "path": "asked.txt", "weight": 2},
    ]
    made = tables(None, prompts={"sources": listed, "response_field": None})
    assert made.train["source"].to_pylist() == ["given"] * 2 + ["asked"] * 4
    given = made.train["response_ids"].is_valid().to_pylist()
    assert given == [True, True, False, False, False, False]
    assert (made.longest_asked_prompt, made.longest_row(1000)) == (1, 1001)
    keyed = made.with_keys(*ASKED, {"temperature": 1.0})
    prompts, responses = ([ids for ids in made.train[n].to_pylist()] for n in PAIR)
    pairs = [list(map(np.array, ids[:2])) for ids in (prompts, responses)]
    expected = given_keys(*ASKED, *pairs) + [
        answer_key(*ASKED, {"temperature": 1.0}, np.array(encode(text)), sample)
        for sample in (0, 1)
        for text in "ef"
    ]
    assert keyed.train["key"].to_pylist() == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "has no 'answer' (it has: prompt); set prompts.response_field"),
        ({"prompt": "x", "answer": ["y"]}, "'answer' is ['y']; expected text"),
        ("x", "is 'x'; expected an object"),
    ],
)
def test_a_row_without_the_response_it_should_bring_is_broken(row: Any, words: str) -> None:
    Path("p.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptsConfig(path="p.jsonl", response_field="answer"))
    assert words in str(caught.value.problems[0])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"path": "p.jsonl", "samples_per_prompt": 2}, "has samples_per_prompt (2) above 1, but"),
        (
            {"sources": [{"name": "s", "path": "p.jsonl", "weight": 1.5}]},
            "has sources.0.weight (1.5) times samples_per_prompt (1) above 1, but",
        ),
    ],
)
def test_one_response_is_not_sampled_twice(prompts: Any, words: str) -> None:
    write("p.jsonl", [("a", "x")])
    (problem,) = checked(prompts).problems
    assert problem.where == "prompts"
    assert words in problem.message
    assert "set response_field to null" in problem.message


def test_the_check_names_what_is_dropped_and_ignores_max_tokens() -> None:
    teacher = {"max_model_len": 64, "sampling": {"max_tokens": 60}}
    path = write("p.jsonl", [("word " * 9, "x"), ("a", "y"), ("b", "z"), ("c", "word " * 64)])
    given = checked({"path": path}, teacher=teacher)
    (problem,) = given.problems
    assert "1 of 4 prompts are longer than 64 tokens with their response" in problem.message
    assert "p.jsonl, line 4: 67 tokens" in problem.message
    assert not any("leaves its answer" in notice for notice in given.notices)
    asked = checked({"path": path, "response_field": None}, teacher=teacher)
    assert asked.problems == []
    assert any("leaves its answer" in notice for notice in asked.notices)
    write("p.jsonl", [("a", "x"), ("b", "")])
    (problem,) = checked({"path": path}).problems
    assert "1 of 2 prompts are without a response" in problem.message
