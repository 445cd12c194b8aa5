"""Sources of prompts: names, weights, and the messages for mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raystill.base.errors import ConfigError
from raystill.cluster.check.static import check_run_file
from raystill.config.load import compare_identity, config_text, load_config, load_leniently
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.select import list_rows, samples_asked
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.keys import answer_key

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ASKED = ("t", "float32", None, {"temperature": 1.0})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files: ten prompts of letters, and eight of numbers whose rows name another source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    Path("a.txt").write_text("\n".join(f"letter {letter}" for letter in "abcdefghij"))
    rows = [{"prompt": f"number {i}", "source": "from the file"} for i in range(8)]
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows)))


def sources(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> list[Any]:
    first = {"name": "letters", "path": "a.txt", **(a or {})}
    return [first, {"name": "numbers", "path": "b.jsonl", **(b or {})}]


def run_config(prompts: Any, seed: int = 0, **evaluation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": seed,
            "teacher": {"model": str(MODEL)},
            "student": {"layers": [0]},
            "prompts": prompts,
            "evaluation": evaluation,
        }
    )


def tables(
    listed: list[Any], samples: int = 1, limit: int | None = None, seed: int = 0, **evaluation: Any
) -> PromptTables:
    prompts = {"sources": listed, "samples_per_prompt": samples, "limit": limit}
    config = run_config({**prompts, "chat_template": False}, seed, **evaluation)
    return build_prompt_tables(config, PromptTokeniser(MODEL, config.prompts), 50)


def keys(made: PromptTables, which: str = "train") -> list[bytes]:
    return getattr(made.with_keys(*ASKED), which)["key"].to_pylist()


def rows_of(made: PromptTables, source: str) -> int:
    return made.train["source"].to_pylist().count(source)


def run_file(prompts: Any, **sections: Any) -> Path:
    settings = {"teacher": {"model": str(MODEL)}, "student": {"layers": [0]}, "prompts": prompts}
    path = Path("run.yaml")
    path.write_text(yaml.safe_dump({**settings, **sections}))
    return path


def refused(prompts: Any, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file(prompts), overrides)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_a_source_names_its_rows_whatever_the_file_says() -> None:
    read = read_prompts(PromptsConfig.model_validate({"sources": sources()}))
    assert [(raw.text, raw.source) for raw in read[9:11]] == [
        ("letter j", "letters"),
        ("number 0", "numbers"),
    ]
    assert {raw.source for raw in read} == {"letters", "numbers"}


def test_settings_of_a_source_replace_those_of_the_section() -> None:
    Path("c.data").write_text('{"q": "why?", "chat": [{"role": "user", "content": "no"}]}\n')
    third = {"name": "third", "path": ["c.data"], "format": "jsonl", "messages_field": "m"}
    prompts = {"sources": [*sources(), third], "prompt_field": "prompt"}
    with pytest.raises(ConfigError, match=r"neither 'prompt' nor 'm' .* set prompts\.sources\.2\."):
        read_prompts(PromptsConfig.model_validate(prompts))
    third["prompt_field"] = "q"
    assert read_prompts(PromptsConfig.model_validate(prompts))[-1].text == "why?"


def test_limits_of_a_source_and_of_the_whole_list() -> None:
    listed = sources({"limit": 3}, {"limit": 4})

    def read(limit: int | None) -> list[str | None]:
        prompts = PromptsConfig.model_validate({"sources": listed, "limit": limit})
        return [raw.text for raw in read_prompts(prompts)]

    first = ["letter a", "letter b", "letter c"]
    assert read(None) == [*first, "number 0", "number 1", "number 2", "number 3"]
    assert read(5) == [*first, "number 0", "number 1"]
    assert read(3) == first


def test_sources_of_weight_one_have_the_rows_order_and_keys_of_plain_files() -> None:
    plain = run_config({"path": ["a.txt", "b.jsonl"], "chat_template": False}, held_out_rows=4)
    made = build_prompt_tables(plain, PromptTokeniser(MODEL, plain.prompts), 50)
    named = tables(sources(), held_out_rows=4)
    for which in ("train", "held_out"):
        assert keys(named, which) == keys(made, which)
    prompts = made.train["prompt_ids"].to_pylist()
    assert keys(made) == [answer_key(*ASKED, np.array(ids)) for ids in prompts]


def test_a_whole_weight_asks_for_further_samples() -> None:
    once, twice = tables(sources()), tables(sources(b={"weight": 2}))
    assert keys(twice)[:18] == keys(once)
    assert twice.train["source"].to_pylist()[18:] == ["numbers"] * 8
    assert twice.samples.tolist() == [0] * 18 + [1] * 8
    ids = np.array(twice.train["prompt_ids"][10].as_py())
    assert keys(twice)[18] == answer_key(*ASKED, ids, sample=1)
    assert len(set(keys(twice))) == twice.train.num_rows == 26
    assert twice.train["row"].to_pylist() == list(range(26))


@pytest.mark.parametrize(
    ("weight", "samples", "rows"),
    [(0.25, 1, 2), (0.5, 3, 12), (1 / 3, 3, 8), (1.5, 2, 24), (2.6, 1, 21), (0.1, 30, 24)],
)
def test_weights_multiply_samples_per_prompt(weight: float, samples: int, rows: int) -> None:
    made = tables(sources(b={"weight": weight}), samples)
    assert rows_of(made, "numbers") == rows
    assert rows_of(made, "letters") == 10 * samples
    assert len(set(keys(made))) == made.train.num_rows
    assert np.all(np.diff(made.samples) >= 0)


def test_a_larger_weight_keeps_what_a_smaller_one_asked() -> None:
    before: set[bytes] = set()
    for weight in (0.1, 0.25, 0.5, 0.9, 1, 1.2, 1.7, 2, 3.4):
        now = set(keys(tables(sources({"weight": weight}))))
        assert before < now
        before = now


def test_the_choice_follows_seed_source_and_prompt_alone() -> None:
    def chosen(name: str = "letters", seed: int = 0) -> set[bytes]:
        return set(keys(tables(sources({"weight": 0.5, "name": name, "limit": 10}), seed=seed)))

    before = chosen()
    assert chosen() == before
    assert chosen(seed=1) != before
    assert chosen(name="characters") != before
    Path("a.txt").write_text("\n".join(f"letter {letter}" for letter in "jihgfedcba"))
    assert chosen() == before


def test_more_prompts_of_a_source_ask_for_little_else_than_new_ones() -> None:
    ids = [np.array([i], dtype=np.int32) for i in range(2200)]
    prompts = PromptsConfig.model_validate(
        {"sources": [{"name": "s", "path": "-", "weight": 0.25}]}
    )

    def chosen(num: int) -> set[int]:
        return set(np.flatnonzero(samples_asked(prompts, 7, ids[:num], ["s"] * num)))

    before, after = chosen(2000), chosen(2200)
    assert (len(before), len(after)) == (500, 550)
    assert len(before - after) < 25
    assert max(before) > 1900  # spread over the whole source


def test_rows_are_listed_sample_by_sample() -> None:
    rows, samples = list_rows(np.array([2, 0, 1, 3]))
    assert rows.tolist() == [0, 2, 3, 0, 3, 3]
    assert samples.tolist() == [0, 0, 0, 1, 1, 2]
    rows, samples = list_rows(np.zeros(0, dtype=np.int64))
    assert (len(rows), len(samples), rows.dtype) == (0, 0, np.int64)


def test_what_is_held_out_does_not_depend_on_weights() -> None:
    plain = tables(sources(), held_out_rows=5)
    weighted = tables(sources({"weight": 0.5}, {"weight": 3}), samples=2, held_out_rows=5)
    assert keys(weighted, "held_out") == keys(plain, "held_out")
    assert not set(keys(weighted)) & set(keys(plain, "held_out"))
    names = plain.held_out["source"].to_pylist()
    assert rows_of(weighted, "letters") == 10 - names.count("letters")
    assert rows_of(weighted, "numbers") == 6 * (8 - names.count("numbers"))


def test_a_held_out_source_is_named_as_in_the_list() -> None:
    made = tables(sources({"weight": 3}), held_out_sources=["letters"])
    assert set(made.held_out["source"].to_pylist()) == {"letters"}
    assert (made.held_out.num_rows, made.train.num_rows) == (10, 8)
    with pytest.raises(ConfigError, match=r"'from the file' is no source .*letters, numbers"):
        tables(sources(), held_out_sources=["from the file"])


def test_of_equal_prompts_the_first_source_has_the_row() -> None:
    Path("b.jsonl").write_text('{"prompt": "letter c"}\n{"prompt": "new"}\n')
    made = tables(sources(b={"weight": 2}))
    assert made.duplicates == 1
    assert (rows_of(made, "letters"), rows_of(made, "numbers")) == (10, 2)


def test_of_a_prompt_that_is_held_out_the_training_copy_is_dropped() -> None:
    Path("b.jsonl").write_text('{"prompt": "letter c"}\n{"prompt": "letter j"}\n{"prompt": "new"}')
    made = tables(sources(), held_out_sources=["numbers"])
    assert (made.train.num_rows, made.held_out.num_rows, made.duplicates) == (8, 3, 2)
    assert not set(keys(made)) & set(keys(made, "held_out"))
    # Whichever of the two was read first.
    swapped = tables(sources()[::-1], held_out_sources=["numbers"])
    assert (swapped.train.num_rows, swapped.held_out.num_rows, swapped.duplicates) == (8, 3, 2)
    Path("b.jsonl").write_text('{"prompt": "letter c"}\n{"prompt": "letter c"}')
    made = tables(sources(), held_out_sources=["numbers"], held_out_rows=4)
    assert (made.train.num_rows, made.held_out.num_rows, made.duplicates) == (5, 5, 2)


def test_a_held_out_source_that_is_left_without_a_row_is_refused() -> None:
    Path("b.jsonl").write_text(json.dumps({"prompt": "word " * 60}))
    with pytest.raises(ConfigError) as caught:
        tables(sources(), held_out_sources=["numbers"])
    (problem,) = caught.value.problems
    assert problem.where == "evaluation.held_out_sources"
    assert "names 'numbers', but none of the 10 usable rows is of these" in problem.message
    assert tables(sources(), held_out_sources=["numbers"], held_out_rows=1).held_out.num_rows == 1


def test_a_weight_that_makes_no_row_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        tables(sources({"weight": 0.01}, {"weight": 0.02}))
    first, second = caught.value.problems
    assert first.where == "prompts.sources.0.weight"
    assert "is 0.01, which makes no row of the 10 training prompts of 'letters'" in first.message
    assert second.where == "prompts.sources.1.weight"


def test_what_is_wrong_with_a_file_names_its_source() -> None:
    Path("b.jsonl").write_text('{"prompt": "fine"}\n{"question": "x"}\n')
    Path("empty.jsonl").write_text("")
    Path("folder").mkdir()
    listed = [
        *sources({"path": "aa.txt"}),
        {"name": "none", "path": "empty.jsonl"},
        {"name": "hollow", "path": "folder"},
        {"name": "odd", "path": "run.yaml"},
    ]
    run_file(listed)
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptsConfig.model_validate(listed))
    reported = {problem.where: problem.message for problem in caught.value.problems}
    assert "source 'letters': no such file: 'aa.txt'" in reported["prompts.sources.0.path"]
    assert "set prompts.sources.1.prompt_field" in reported["source 'numbers': b.jsonl, line 2"]
    assert "holds no prompts" in reported["source 'none': empty.jsonl"]
    assert "source 'hollow': nothing matches" in reported["prompts.sources.3.path"]
    assert "set prompts.sources.4.format" in reported["prompts.sources.4.path"]
    assert len(reported) == 5


def test_a_bare_list_is_short_for_sources() -> None:
    short, long = (load_config(run_file(p)) for p in (sources(), {"sources": sources()}))
    assert short == long
    assert load_config(run_file({"path": "-"}), [f"prompts={json.dumps(sources())}"]) is not None
    assert PromptsConfig.model_validate(sources()) == short.prompts
    assert load_config(Path(run_file(sources())), ["prompts.limit=3"]).prompts.limit == 3
    resolved = Path("resolved.yaml")
    resolved.write_text(config_text(short))
    assert load_config(resolved) == short


def test_overrides_reach_into_the_list() -> None:
    config = load_config(run_file(sources()), ["prompts.sources.1.weight=2.5"])
    assert config.prompts.sources is not None
    assert [source.weight for source in config.prompts.sources] == [1, 2.5]
    for override in ("prompts.sources.2.weight=1", "prompts.sources.numbers.weight=1"):
        (problem,) = refused(sources(), override).values()
        assert "prompts.sources has 2 entries, numbered from 0, and no " in problem


def test_exactly_one_of_path_and_sources_is_set() -> None:
    assert "has neither path nor sources; set prompts.path" in refused({"limit": 3})["prompts"]
    both = refused({"path": "a.txt", "sources": sources()})["prompts"]
    assert "has path ('a.txt') and sources (letters, numbers)" in both
    assert "remove the other, or set it to null" in both
    config = load_config(
        run_file({"path": "a.txt"}),
        ["prompts.path=null", f"prompts.sources={json.dumps(sources())}"],
    )
    assert config.prompts.files_setting == "prompts.sources"


@pytest.mark.parametrize(
    ("listed", "where", "words"),
    [
        (sources({"weight": 0}), "prompts.sources.0.weight", "is 0; expected a value greater than"),
        (sources({"weight": float("inf")}), "prompts.sources.0.weight", "expected a finite number"),
        (sources(b={"weight": "x"}), "prompts.sources.1.weight", "is 'x'; expected a number"),
        (sources(b={"wait": 2}), "prompts.sources.1.wait", "did you mean prompts.sources.1.weight"),
        (sources({"limit": 0}), "prompts.sources.0.limit", "is 0; expected"),
        (sources({"name": " "}), "prompts.sources.0.name", "is ' ', which is blank"),
        (sources(b={"name": "letters"}), "prompts.sources", "has the name 'letters' 2 times"),
        ([{"path": "a.txt"}], "prompts.sources.0.name", "is missing; set prompts.sources.0.name"),
        ([{"name": "a"}], "prompts.sources.0.path", "is missing; set prompts.sources.0.path"),
        (["a.txt"], "prompts.sources.0", "is 'a.txt'; expected a mapping of keys"),
        ([], "prompts.sources", "is an empty list"),
        ({"sources": {"name": "a", "path": "a.txt"}}, "prompts.sources", "expected a list"),
        ({"sources": sources(), "weight": 2}, "prompts.weight", "prompts.sources[].weight"),
    ],
)
def test_a_mistake_in_a_source_is_one_problem(listed: Any, where: str, words: str) -> None:
    ((reported, message),) = refused(listed).items()
    assert reported == where
    assert words in message


def test_a_mistake_in_one_source_leaves_the_others_to_be_judged() -> None:
    listed = sources({"weight": -1, "nme": "x"}, {"limit": "many"})
    loaded = load_leniently(run_file(listed, signal={"topk": 3}))
    assert {problem.where for problem in loaded.problems} == {
        "prompts.sources.0.weight",
        "prompts.sources.0.nme",
        "prompts.sources.1.limit",
        "signal.topk",
    }
    assert loaded.refused == {"prompts.sources.0.weight", "prompts.sources.1.limit"}
    assert loaded.config is not None
    assert loaded.config.prompts.sources is not None


def test_another_weight_makes_another_run() -> None:
    before, after = run_config(sources()), run_config(sources(b={"weight": 2}))
    (difference,) = compare_identity(before, after)
    assert difference.startswith("prompts.sources was ")


def test_the_check_prints_the_rows_of_each_source() -> None:
    path = run_file(
        sources({"weight": 0.5}, {"weight": 2}),
        evaluation={"held_out_rows": 4},
        training={"rows_per_step": 4},
        stream={"group_rows": 2},
        teacher={"model": str(MODEL), "sampling": {"max_tokens": 4}},
    )
    checked = check_run_file(str(path))
    assert checked.problems == []
    assert checked.prepared is not None
    lines = checked.prepared.describe().splitlines()
    names = checked.prepared.tables.held_out["source"].to_pylist()
    letters, numbers = names.count("letters"), names.count("numbers")
    assert lines[1:3] == [
        f"  letters: {(11 - letters) // 2} to train on (weight 0.5), {letters} held out",
        f"  numbers: {2 * (8 - numbers)} to train on (weight 2), {numbers} held out",
    ]
    lone = check_run_file(str(run_file(sources()[:1]))).prepared
    assert lone is not None
    assert "weight" not in lone.describe()


def test_too_long_prompts_name_their_source() -> None:
    Path("a.txt").write_text("word " * 200 + "\nshort")
    teacher = {"model": str(MODEL), "max_model_len": 64, "sampling": {"max_tokens": 4}}
    checked = check_run_file(str(run_file(sources(), teacher=teacher)))
    (problem,) = checked.problems
    assert problem.where == "prompts.sources"
    assert "the first is source 'letters': a.txt, line 1" in problem.message
