"""Prompts: file formats, broken rows, tokens equal to those of transformers, tables and keys."""

import csv
import gzip
import json
import math
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raystill.base.errors import ConfigError
from raystill.base.redact import redact
from raystill.base.run_folder import TRAIN_PROMPTS, RunFolder
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.prompts import tables as prompt_table
from raystill.datasets.prompts import tokenise
from raystill.datasets.prompts.formats import as_written
from raystill.datasets.prompts.read import RawPrompt, read_prompts
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.keys import answer_key, answer_keys
from raystill.datasets.rows.schema import PROMPT_SCHEMA
from raystill.datasets.spool import progress as prompt_progress

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one, é 漢字 🙂!"},
]


def prompts(path: Any, **settings: Any) -> PromptsConfig:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    return PromptsConfig(path=paths, **settings)


def broken(settings: PromptsConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_prompts(settings)
    return [str(problem) for problem in caught.value.problems]


def raw(text: str | None = None, messages: list[dict[str, Any]] | None = None) -> RawPrompt:
    return RawPrompt(text, messages, "s", "here")


ROWS = [{"prompt": "one, two", "source": "a"}, {"prompt": "drei\nvier", "source": "b"}]


def test_jsonl_json_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "p.jsonl").write_text(lines)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as stream:
        stream.write(lines)
    (tmp_path / "p.json").write_text(json.dumps(ROWS, indent=1))
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "source"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.jsonl.gz", "p.json", "p.csv", "p.parquet"):
        read = read_prompts(prompts(tmp_path / name))
        assert [(r.text, r.source) for r in read] == [(r["prompt"], r["source"]) for r in ROWS]
        assert name in read[0].where


def test_numbers_of_a_parquet_file_are_those_that_were_written() -> None:
    numbers = [0.1, 2.5, None, 1e20, -0.0, math.inf, 3.0]
    short, long = pa.array(numbers, pa.float32()), pa.array(numbers, pa.float64())
    batch = pa.record_batch({"a": short, "b": long, "c": pa.array(map(str, numbers))})
    read = as_written(batch)
    assert read["a"].to_pylist() == read["b"].to_pylist() == numbers
    assert read.column_names == ["a", "b", "c"] and read["c"].to_pylist()[0] == "0.1"


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\r\n\n two \n", encoding="utf-8")
    read = read_prompts(prompts(tmp_path / "p.txt"))
    assert [r.text for r in read] == ["one", " two "]
    assert read[1].where.endswith("p.txt, line 3")


def test_messages_are_read_from_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "prompt": "ignored"}, {"prompt": CHAT}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "p.parquet")
    read = read_prompts(prompts([tmp_path / "p.jsonl", tmp_path / "p.parquet"]))
    assert [r.messages for r in read] == [CHAT, CHAT, CHAT]


def test_globs_folders_lists_uris_and_limit(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    (tmp_path / "README.md").write_text("no prompts")
    (tmp_path / "empty.txt").write_text("")  # one of several: no mistake

    def texts(path: Any, **settings: Any) -> list[str | None]:
        return [r.text for r in read_prompts(prompts(path, **settings))]

    all_six = ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert texts(tmp_path / "*.txt") == all_six
    assert texts(tmp_path) == all_six
    assert texts(f"file://{tmp_path}/b.txt") == ["b1", "b2"]
    assert texts(f"file://{tmp_path}/[ab].txt") == ["a1", "a2", "b1", "b2"]
    assert texts(f"file://{tmp_path}/?.txt") == all_six
    assert texts([tmp_path / "c.txt", tmp_path / "a.txt"], limit=3) == ["c1", "c2", "a1"]


def test_field_names_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"q": "why?", "family": 3}')
    (read,) = read_prompts(prompts(tmp_path / "p.jsonl", prompt_field="q", source_field="family"))
    assert (read.text, read.source) == ("why?", "3")


def test_broken_lines_are_named_all_at_once(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "torn',
        '{"question": "x"}',
        '{"prompt": 3}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        "[]",
        "7",
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    reported = broken(prompts(tmp_path / "p.jsonl"))
    for number, words in [
        (2, "is not JSON"),
        (3, "has neither 'prompt' nor 'messages' (it has: question)"),
        (4, "'prompt' is 3; expected text"),
        (5, "message 0 has content None"),
        (6, "the last message is the assistant's"),
    ]:
        assert f"p.jsonl, line {number}: " in reported[number - 2]
        assert words in reported[number - 2]
    assert reported[5].endswith("2 more broken rows")


def test_each_format_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "x"}\n{"prompt": "y"}')
    (tmp_path / "b.json").write_text('{"prompt": "x"}')
    (tmp_path / "c.parquet").write_text("no parquet")
    (tmp_path / "d.csv").write_text("prompt,source\nfine,a\none, two, three\n")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "f.jsonl").write_text("\n")
    (tmp_path / "g.docx").write_text("x")
    reported = broken(prompts([*sorted(tmp_path.iterdir()), tmp_path / "f.json"]))
    words = {
        "a.json, line 2": "set prompts.format: jsonl",
        "b.json": "expected a list of rows",
        "c.parquet": "cannot be read as parquet",
        "d.csv, line 3": "3 values for 2 columns",
        "e.txt": "cannot be read as text",
        "f.jsonl": "holds no prompts",
        "g.docx": "set prompts.format",
        "no such file": "f.json",
    }
    assert len(reported) == len(words)
    for where, message in words.items():
        assert any(where in line and message in line for line in reported), (where, reported)


def test_a_missing_file_names_the_near_miss(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("x")
    (problem,) = broken(prompts(tmp_path / "prompt.jsonl"))
    assert "no such file" in problem
    assert "did you mean" in problem
    assert "nothing matches" in broken(prompts(tmp_path / "*.csv"))[0]


BUCKET = "s3://me:se%2Fcret@bucket"
QUERY = "?region=eu-west-1&endpoint_override=localhost:9000&scheme=http"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A bucket that is a folder here; lists the URIs it is opened by, as pyarrow takes them."""
    opened: list[str] = []
    real = pafs.FileSystem.from_uri
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())

    class Opening:
        @staticmethod
        def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
            opened.append(uri)
            return store, real(uri)[1]

    monkeypatch.setattr(pafs, "FileSystem", Opening)
    for name in ("a-1", "a-2", "b c-1", "x#y-1", "100[x]-1"):
        (tmp_path / "bucket/data" / name).mkdir(parents=True)
        (tmp_path / "bucket/data" / name / "p.txt").write_text(name)
    return opened


@pytest.mark.parametrize("query", ["?region=eu-west-1", QUERY])
@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("/data/a-1/p.txt", ["a-1"]),
        ("/data/a-1", ["a-1"]),
        ("/data/a-?/p.txt", ["a-1", "a-2"]),
        ("/data/*-1/*.txt", ["100[x]-1", "a-1", "b c-1", "x#y-1"]),
        ("/data/a-[2-9]/*", ["a-2"]),
        ("/data/b%20c-1/p.txt", ["b c-1"]),
        ("/data/b%20c-1/*.txt", ["b c-1"]),
        ("/data/b c-1/*.txt", ["b c-1"]),
        ("/data/b%20c-?/*.txt", ["b c-1"]),
        ("/data/x%23y-?/*.txt", ["x#y-1"]),
        ("/data/x#y-1/*.txt", ["x#y-1"]),
        ("/data/100%5Bx%5D-1/*.txt", ["100[x]-1"]),
        ("/data/100%5Bx%5D-?/*.txt", ["100[x]-1"]),
    ],
)
def test_uris_keep_their_credentials_and_query(
    path: str, query: str, texts: list[str], bucket: list[str]
) -> None:
    read = read_prompts(prompts(f"{BUCKET}{path}{query}"))
    assert [r.text for r in read] == texts
    assert all("cret" not in r.where for r in read)
    (opened,) = bucket
    assert opened.startswith(f"{BUCKET}/data")
    assert opened.endswith(query)


def test_what_is_wrong_with_a_uri_shows_no_credentials(bucket: list[str]) -> None:
    for path, words in [
        ("/data/*.csv", "nothing matches 's3://***@bucket/data/*.csv?region"),
        ("/data/none.txt", "no such file: 's3://***@bucket/data/none.txt?region"),
        ("*/data/p.txt", "'s3://***@bucket*/data/p.txt?region=eu-west-1' cannot be opened: a glob"),
    ]:
        (problem,) = broken(prompts(f"{BUCKET}{path}?region=eu-west-1"))
        assert words in redact(problem)
        assert "cret" not in redact(problem)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's tokenizer with what other models have: begin token, additions, template."""
    folder = tmp_path_factory.mktemp("odd")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(MODEL / name, folder / name)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "eos_token": "<|im_end|>",
        "extra_special_tokens": ["<|new|>"],
        "chat_template": "unused",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% if tools is none %}no tools{% endif %}\n"
        "{%- for m in messages %}\n"
        "  {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "<|new|>{{ m.role }}{% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}go{{ enable_thinking }}{% endif %}"
    )
    return folder


@pytest.mark.parametrize("which", ["quickstart", "odd"])
@pytest.mark.parametrize("system", [None, "Be terse."])
def test_chat_tokens_equal_those_of_transformers(
    which: str, system: str | None, odd_model: Path
) -> None:
    from transformers import AutoTokenizer

    folder = MODEL if which == "quickstart" else odd_model
    settings = PromptsConfig(
        path="-", system=system, chat_template_kwargs={"enable_thinking": False}
    )
    reference = AutoTokenizer.from_pretrained(folder)
    chats = [CHAT, [{"role": "system", "content": "S"}, *CHAT], CHAT[:1]]
    cases = [(raw(messages=chat), chat) for chat in chats]
    cases.append((raw(text="plain"), [{"role": "user", "content": "plain"}]))
    encoded = PromptTokeniser(folder, settings).encode_many([case for case, _ in cases])
    for ids, (_, chat) in zip(encoded, cases, strict=True):
        if system is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": system}, *chat]
        expected = reference.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        assert ids.dtype == np.int32
        assert ids.tolist() == expected


def test_a_template_that_prints_the_date_prints_the_day_that_is_set(
    odd_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return next(days)

    monkeypatch.setattr(tokenise, "datetime", Clock)

    def ask(day: str | None, template: bool = True) -> tuple[list[str], list[str]]:
        settings = PromptsConfig(path="-", template_date=day, chat_template=template)
        tokeniser = PromptTokeniser(odd_model, settings)
        return [tokeniser.render(raw(text=text)) for text in "ab"], tokeniser.notices()

    days = iter([datetime(2031, 12, 31), datetime(2032, 1, 1)])
    texts, (notice,) = ask(None)
    assert all("2031go" in text for text in texts), "one day for all prompts"
    assert notice.endswith("set prompts.template_date: 2031-12-31")
    assert all("2032go" in text for text in ask(None)[0])
    texts, notices = ask("2031-12-31")
    assert all("2031go" in text for text in texts)
    assert notices == []
    days = iter([datetime(2031, 12, 31)])
    assert ask(None, template=False)[1] == []


@pytest.mark.parametrize("which", ["quickstart", "odd"])
@pytest.mark.parametrize("text", ["Once upon a time", "", "  <|im_start|>x <|new|>  \n\té漢"])
def test_raw_tokens_equal_those_of_transformers(which: str, text: str, odd_model: Path) -> None:
    from transformers import AutoTokenizer

    folder = MODEL if which == "quickstart" else odd_model
    tokeniser = PromptTokeniser(folder, PromptsConfig(path="-", chat_template=False))
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tokeniser.encode(raw(text=text)).tolist() == expected


def test_what_the_template_refuses_is_named(odd_model: Path) -> None:
    tokeniser = PromptTokeniser(odd_model, PromptsConfig(path="-"))
    with pytest.raises(
        ConfigError, match=r"here: the teacher's chat template refuses it: no tools"
    ):
        tokeniser.encode(raw(messages=[{"role": "tool", "content": "x"}]))


def test_a_folder_that_cannot_tokenise_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        PromptTokeniser(tmp_path, PromptsConfig(path="-"))
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match=r"no chat template; set prompts.chat_template: false"):
        PromptTokeniser(tmp_path, PromptsConfig(path="-"))
    with pytest.raises(ConfigError, match=r"prompts.system: is 'x', which needs a chat template"):
        PromptTokeniser(tmp_path, PromptsConfig(path="-", system="x", chat_template=False))
    tokeniser = PromptTokeniser(tmp_path, PromptsConfig(path="-", chat_template=False))
    with pytest.raises(ConfigError, match=r"set it to true"):
        tokeniser.encode(raw(messages=CHAT))


def tables(
    tmp_path: Path,
    rows: list[tuple[str, str]],
    longest: int = 8,
    samples: int = 1,
    **evaluation: Any,
) -> PromptTables:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "source": s}) for p, s in rows))
    settings = {
        "teacher": {"model": str(MODEL)},
        "student": {"layers": [0]},
        "prompts": {"path": str(path), "chat_template": False, "samples_per_prompt": samples},
        "evaluation": evaluation,
    }
    config = RunConfig.model_validate(settings)
    return build_prompt_tables(config, PromptTokeniser(MODEL, config.prompts), longest)


def texts(table: pa.Table) -> list[str]:
    tokeniser = PromptTokeniser(MODEL, PromptsConfig(path="-", chat_template=False))
    return [tokeniser.tokenizer.decode(ids) for ids in table["prompt_ids"].to_pylist()]


def test_duplicates_and_unusable_prompts_are_counted(tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "x"), ("a", "y"), ("", "x"), ("long " * 20, "x"), ("c", "y")]
    made = tables(tmp_path, rows)
    assert texts(made.train) == ["a", "b", "c"]
    assert made.train["row"].to_pylist() == [0, 1, 2]
    assert made.train["source"].to_pylist() == ["x", "x", "y"]
    assert made.duplicates == 1
    assert made.dropped == {"empty": 1, "too_long": 1}
    assert "line 5: 21 tokens" in made.first_dropped["too_long"]
    assert (made.num_read, made.num_dropped, made.longest_prompt_tokens) == (6, 2, 1)


def test_held_out_sources_are_kept_whole_from_training(tmp_path: Path) -> None:
    rows = [(f"{i} {source}", source) for i in range(10) for source in ("a", "b", "c")]
    made = tables(tmp_path, rows, held_out_sources=["b"], max_rows=4)
    assert set(made.train["source"].to_pylist()) == {"a", "c"}
    assert made.train.num_rows == 20
    assert made.held_out["source"].to_pylist() == ["b"] * 4
    assert made.held_out["row"].to_pylist() == [0, 1, 2, 3]
    assert texts(made.held_out) == sorted(texts(made.held_out))


def test_held_out_rows_are_drawn_by_seed(tmp_path: Path) -> None:
    rows = [(f"number {i}", "a") for i in range(30)]
    once, twice = (tables(tmp_path, rows, held_out_rows=7) for _ in range(2))
    assert once.held_out.equals(twice.held_out)
    assert once.train.num_rows == 23
    assert sorted(texts(once.train) + texts(once.held_out)) == sorted(p for p, _ in rows)


def test_a_held_out_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    rows = [("a", "recipes"), ("b", "poems")]
    with pytest.raises(ConfigError, match=r"'recipe' is no source .*did you mean 'recipes'"):
        tables(tmp_path, rows, held_out_sources=["recipe"])
    with pytest.raises(ConfigError, match=r"leaves none to train on"):
        tables(tmp_path, rows, held_out_rows=2)


def test_tables_get_keys_and_are_written_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tables(tmp_path, [(f"{i}", "a") for i in range(10)], held_out_rows=3)
    keyed = made.with_keys("t", "bfloat16", None, {"temperature": 1.0})
    assert keyed.train.schema.equals(PROMPT_SCHEMA)
    ids = np.array(keyed.train["prompt_ids"][2].as_py(), dtype=np.int32)
    assert keyed.train["key"][2].as_py() == answer_key(
        "t", "bfloat16", None, {"temperature": 1.0}, ids
    )
    folder = RunFolder(str(tmp_path / "run"))
    monkeypatch.setattr(prompt_table, "MIN_ROW_GROUP", 6)
    keyed.write(folder, group_rows=4)  # 6 rows are one whole group of 4: row groups of 4.
    assert folder.read_table(TRAIN_PROMPTS).equals(keyed.train)
    with folder.open_input(TRAIN_PROMPTS) as stream:
        assert pq.ParquetFile(stream).num_row_groups == 2
    with pytest.raises(AssertionError, match="with_keys"):
        made.write(folder, group_rows=4)


def test_each_sample_of_a_prompt_is_a_row_with_a_key_of_its_own(tmp_path: Path) -> None:
    rows = [(f"{i}", "a") for i in range(5)]
    made = tables(tmp_path, rows, samples=3, held_out_rows=1)
    keyed = made.with_keys("t", "float32", None, {})
    assert (made.train.num_rows, made.held_out.num_rows) == (12, 1)
    assert texts(made.train) == texts(made.train.slice(0, 4)) * 3
    assert made.train["row"].to_pylist() == list(range(12))
    ids = np.array(made.train["prompt_ids"][1].as_py(), dtype=np.int32)
    expected = [answer_key("t", "float32", None, {}, ids, sample) for sample in range(3)]
    assert [keyed.train["key"][row].as_py() for row in (1, 5, 9)] == expected
    assert len(set(keyed.train["key"].to_pylist())) == 12
    once = tables(tmp_path, rows, held_out_rows=1).with_keys("t", "float32", None, {})
    assert keyed.train["key"].to_pylist()[:4] == once.train["key"].to_pylist()


def test_a_key_changes_with_all_that_decides_an_answer() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    sampling = {"temperature": 1.0, "stop_token_ids": [2, 7]}
    keys = [
        answer_key("t", "bfloat16", None, sampling, ids),
        answer_key("u", "bfloat16", None, sampling, ids),
        answer_key("t", "float16", None, sampling, ids),
        answer_key("t", "bfloat16", "fp8", sampling, ids),
        answer_key("t", "bfloat16", None, {**sampling, "temperature": 0.9}, ids),
        answer_key("t", "bfloat16", None, sampling, ids[:2]),
        answer_key("t", "bfloat16", None, sampling, ids, sample=1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)


def test_a_key_is_the_same_however_the_settings_are_spelled() -> None:
    ids = np.array([1, 2, 3], dtype=np.int64)
    one = answer_key("t", "bfloat16", None, {"a": 1, "stop_token_ids": (7, 2)}, ids)
    two = answer_key("t", "bfloat16", None, {"stop_token_ids": [2, 7], "a": 1.0}, ids.astype("i4"))
    assert one == two
    assert answer_keys("t", "bfloat16", None, {"a": 1, "stop_token_ids": [2, 7]}, [ids]) == [one]
    # This value must never change: stored answers are looked up by it.
    assert one.hex() == "c193986bed83c7c0ac694148bd2bbb78"


def test_progress_is_reported_of_every_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_progress, "BATCH_PROMPTS", 4)
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{i}", "answer": "x"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    reports: list[tuple[str, int, int | None]] = []

    def note(*report: Any) -> None:
        reports.append(report)

    settings = prompts(paths, response_field="answer", limit=7)
    read = read_prompts(settings, note)
    assert list(read) == list(read_prompts(settings))
    assert reports == [("reading prompts", done, None) for done in (0, 4, 5, 7)]
    reports.clear()
    tokeniser = PromptTokeniser(MODEL, settings, note)
    ids = tokeniser.encode_many(read)
    assert [part.tolist() for part in ids] == [tokeniser.encode(raw).tolist() for raw in read]
    assert reports[:6] == [
        (phase, done, 7)
        for phase in ("rendering prompts", "tokenising prompts")
        for done in (0, 4, 7)
    ]
    reports.clear()
    tokeniser.encode_responses([raw.response or "" for raw in read], [2])
    assert reports == [("tokenising responses", done, 7) for done in (0, 4, 7)]
