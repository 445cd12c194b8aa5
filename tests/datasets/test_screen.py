"""Personal data and keys in prompts: what is counted, masked, left out, and told to nobody."""

import json
from pathlib import Path
from typing import Any

import pytest

import driver
from raystill.base.errors import ConfigError
from raystill.base.run_folder import RunFolder
from raystill.base.user_function import Code, UserFunction
from raystill.cluster.report.page.answers import answers
from raystill.cluster.report.page.read import RunReader
from raystill.cluster.report.tables import examples
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-teacher"
MAIL, KEY = "bob.smith@mail.example.com", "AKIAIOSFODNN7EXAMPLE"
ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a colour.", "answer": "blue"},
    {"prompt": f"Write to {MAIL}.", "answer": MAIL},
    {"prompt": "Count.", "answer": 4111111111111111, "note": [f"by {MAIL}"]},
    {"messages": [{"role": "user", "content": f"Key {KEY}"}]},
    {"prompt": f"Write to {MAIL} with {KEY}.", "answer": None},
]


def config_of(tmp_path: Path, rows: list[dict[str, Any]], **prompts: Any) -> RunConfig:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(TINY)},
            "student": {"layers": [0]},
            "prompts": {"path": str(path), **prompts},
            "filters": [{"answer": {"column": "answer"}, "sources": ["prompts"]}],
        }
    )


def tables(tmp_path: Path, rows: list[dict[str, Any]], **prompts: Any) -> PromptTables:
    config = config_of(tmp_path, rows, **prompts).model_copy(update={"filters": no_filters()})
    return build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 400)


def no_filters() -> Any:
    return RunConfig.model_fields["filters"].default


def said(made: PromptTables) -> list[str]:
    tokeniser = PromptTokeniser(TINY, PromptsConfig(path="-"))
    return [tokeniser.tokenizer.decode(ids) for ids in made.train["prompt_ids"].to_pylist()]


def test_counting_tells_kinds_and_changes_no_prompt(tmp_path: Path) -> None:
    """The default: the ids, of which the keys are made, are those of a run that does not look."""
    counted, unseen = tables(tmp_path, ROWS), tables(tmp_path, ROWS, personal_data=None)
    assert counted.train["prompt_ids"] == unseen.train["prompt_ids"]
    assert unseen.personal is None and counted.personal is not None
    assert counted.personal.record() == {
        "action": "count",
        "prompts_read": 5,
        "prompts": 3,
        "kinds": {"aws_key": 2, "email": 2},
    }
    line = counted.personal.line()
    assert line == (
        "personal data and keys: in 3 of 5 prompts (aws_key 2, email 2), kept as they are"
    )


def test_masking_leaves_nothing_of_it_in_any_table(tmp_path: Path) -> None:
    config = config_of(tmp_path, [*ROWS[:3], {**ROWS[4], "answer": "x"}], personal_data="mask")
    update = {"evaluation": config.evaluation.model_copy(update={"held_out_rows": 1})}
    made = build_prompt_tables(
        config.model_copy(update=update), PromptTokeniser(TINY, config.prompts), 400
    )
    assert made.columns is not None
    everything = str([said(made), made.columns.to_pylist()])
    assert MAIL not in everything and KEY not in everything
    assert sum("[EMAIL]" in text for text in said(made)) >= 1
    assert "4111111111111111" in everything  # A number is a reference, and no text.


def test_masking_reaches_what_checks_read_and_given_responses(tmp_path: Path) -> None:
    rows = [{**row, "response": f"Yes, {MAIL}"} for row in ROWS if "prompt" in row]
    config = config_of(tmp_path, rows, personal_data="mask", response_field="response")
    function = tmp_path / "f.py"
    function.write_text("def good(row):\n    return True\n")
    sections = config.model_dump()
    sections["evaluation"] |= {"held_out_rows": 2, "checks": [{"function": f"{function}:good"}]}
    sections["filters"] = []
    config = RunConfig.model_validate(sections)
    made = build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 400)
    tokeniser = PromptTokeniser(TINY, config.prompts).tokenizer
    responses = [tokeniser.decode(ids) for ids in made.train["response_ids"].to_pylist()]
    assert made.held_out_fields is not None
    everything = str([said(made), responses, made.held_out_fields.to_pylist()])
    assert MAIL not in everything and KEY not in everything and "[EMAIL]" in everything


def test_prompts_are_left_out_without_a_word_of_theirs(tmp_path: Path) -> None:
    made = tables(tmp_path, ROWS, personal_data="drop")
    assert len(made.train) == 2 and made.personal is not None and made.personal.num_prompts == 3
    assert made.num_dropped == 0  # It was asked for, and is no fault of the prompts.
    with pytest.raises(ConfigError, match=r"each of the 2 prompts .*aws_key 2, email 1") as caught:
        tables(tmp_path, ROWS[3:], personal_data="drop")
    assert MAIL not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        f'{{"prompt": "write to {MAIL}',
        json.dumps({"prompt": {"to": MAIL}}),
        json.dumps({"prompt": "x" * 40 + " " + MAIL + " and more"})[:-3],
        json.dumps({"messages": [{"role": MAIL, "content": None}]}),
        json.dumps([MAIL]),
    ],
)
def test_a_broken_row_is_named_without_what_it_holds(tmp_path: Path, line: str) -> None:
    """Also where the message is cut in the middle of an address."""
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptsConfig(path=str(path)))
    assert "bob" not in str(caught.value) and "p.jsonl" in str(caught.value)


def test_check_tells_counts_and_no_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(tmp_path, ROWS)
    text = f"teacher: {{model: {TINY}}}\nstudent: {{layers: [0]}}\nprompts: {{path: p.jsonl}}\n"
    (tmp_path / "run.yaml").write_text(text.replace("p.jsonl", str(tmp_path / "p.jsonl")))
    driver.main(["check", "--static", str(tmp_path / "run.yaml"), "--set", "training.epochs=1"])
    told = capsys.readouterr()
    assert "in 3 of 5 prompts (aws_key 2, email 2)" in told.out
    driver.main(["check", "--static", "--json", str(tmp_path / "run.yaml")])
    as_json = capsys.readouterr()
    assert json.loads(as_json.out)["personal_data"]["kinds"] == {"aws_key": 2, "email": 2}
    for text in (told.out, told.err, as_json.out, as_json.err):
        assert MAIL not in text and KEY not in text


def test_whatever_is_kept_of_a_row_is_masked_or_refused(tmp_path: Path) -> None:
    """Names of fields, roles that are none, and what is nested too deeply to be looked through."""
    function = tmp_path / "f.py"
    function.write_text("def good(row):\n    return True\n")
    rows = [{"prompt": f"Say {n}.", "role": MAIL, "x": {MAIL: [KEY]}} for n in range(4)]
    config = config_of(tmp_path, rows, personal_data="mask").model_dump()
    config["evaluation"] |= {"held_out_rows": 2, "checks": [{"function": f"{function}:good"}]}
    config = RunConfig.model_validate(config | {"filters": []})
    made = build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 400)
    assert made.held_out_fields is not None
    kept = str(made.held_out_fields.to_pylist())
    assert MAIL not in kept and KEY not in kept and "[EMAIL]" in kept
    deep = "[" * 700 + "1" + "]" * 700
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write(f'{{"prompt": "x", "x": {deep}}}\n')
    with pytest.raises(ConfigError, match=r"line 5: .*nested too deeply"):
        build_prompt_tables(config, PromptTokeniser(TINY, config.prompts), 400)


def test_report_and_page_show_marks(tmp_path: Path) -> None:
    """Token by token too, where no token alone is an address."""
    folder = RunFolder(str(tmp_path / "run")).ensure()
    pieces = ["Write ", "to ", "bob", ".smith", "@mail", ".example", ".com", ", ok"]
    record = {"row": 1, "prompt": f"Key {KEY}?", "teacher": "".join(pieces), "student": MAIL}
    tokens = {"teacher_tokens": pieces, "teacher_kl": [0.5] * len(pieces)}
    lines = [json.dumps({"step": step, **record, **tokens}) for step in (0, 9)]
    folder.write_text("answers.jsonl", "\n".join(lines) + "\n")
    page = str(answers([RunReader(folder).read()]))
    for text in (page, str(examples(folder))):
        assert not any(part in text for part in ("bob", "smith", "AKIA", ".example"))
        assert "[EMAIL]" in text and "[AWS_KEY]" in text
    assert ", ok" in page


def test_an_error_of_a_function_that_quotes_the_row_is_masked(tmp_path: Path) -> None:
    text = "def f(row):\n    raise KeyError('x' * 280 + ' ' + row)\n"
    with UserFunction(Code("f", file="f.py", text=text), 20) as function:
        error = function.call(f"{MAIL} is it").error
    assert error.startswith("KeyError") and "bob" not in error and "@" not in error
