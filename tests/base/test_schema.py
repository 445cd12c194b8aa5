"""The published JSON schema of a run file: current, true of the shipped run files, and strict."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from raystill.base.errors import ConfigError
from raystill.config.describe import (
    describe_fields,
    fields,
    fields_json,
    run_schema,
    schema_text,
    select_fields,
)
from raystill.config.load import parse_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = CONFIGS / "run.schema.json"
WRITE_IT = (
    "python -c 'from raystill.config.describe import schema_text; print(schema_text(), end=\"\")' "
    "> configs/run.schema.json"
)
SMALL: dict[str, Any] = {
    "teacher": {"model": "models/tiny-teacher"},
    "student": {"layers": [0]},
    "prompts": {"path": "prompts.jsonl"},
}
VALIDATOR = jsonschema.Draft202012Validator(run_schema())


def errors(**sections: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors({**SMALL, **sections})]


def test_the_published_schema_is_that_of_this_version() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), f"write it anew: {WRITE_IT}"
    jsonschema.Draft202012Validator.check_schema(run_schema())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_file_is_valid_and_names_the_schema_for_editors(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=run.schema.json\n")
    VALIDATOR.validate(parse_yaml(text))


def test_every_field_has_its_sentence_and_mark_in_the_schema() -> None:
    schema = run_schema()
    models = [schema, *schema["$defs"].values()]
    settings = [setting for model in models for setting in model["properties"].values()]
    assert {setting["kind"] for setting in settings} == {"identity", "operational"}
    described = {setting["description"] for setting in settings}
    assert {field.sentence for field in fields()} <= described
    assert all(model["description"] and model["title"] for model in models)
    assert schema["properties"]["teacher"]["kind"] == "identity"


def test_the_schema_refuses_what_loading_refuses() -> None:
    assert errors() == []
    assert errors(signal={"topk": 3}) == ["$.signal"]
    assert errors(training={"epochs": "two"}) == ["$.training.epochs"]
    assert errors(signal={"kind": "best"}) == ["$.signal.kind"]
    assert errors(training={"num_workers": 0}) == ["$.training.num_workers"]
    assert errors(teacher={}) == ["$.teacher"]


def test_short_and_long_forms_are_in_the_schema() -> None:
    sources = [{"name": "a", "path": "a.jsonl", "weight": 2}]
    assert errors(prompts=sources) == errors(prompts={"sources": sources}) == []
    assert errors(prompts=[{"name": "a"}]) == ["$.prompts"]
    teacher = {"model": "m", "num_replicas": {"min": 0, "max": 2}}
    assert errors(teacher=teacher, training={"num_workers": [1, 2]}) == []


def test_fields_as_json_have_values_where_the_help_has_words() -> None:
    by_name = {entry["name"]: entry for entry in fields_json()}
    assert list(by_name) == [field.name for field in fields()]
    assert json.loads(json.dumps(by_name)) == by_name
    assert by_name["training.epochs"]["default"] == 1
    assert by_name["training.max_grad_norm"]["type"] == "number > 0 or null"
    workers = by_name["training.num_workers"]["type"]
    assert workers == "integer > 0 or [integer > 0, integer > 0]"
    assert by_name["evaluation.held_out_sources"]["default"] == []
    assert by_name["teacher.model"]["required"] and by_name["teacher.model"]["default"] is None
    unset = by_name["cluster.address"]
    assert (unset["required"], unset["default"], unset["kind"]) == (False, None, "operational")


def test_the_help_of_a_section_or_a_field_is_a_part_of_the_whole() -> None:
    names = [field.name for field in select_fields("teacher.sampling")]
    assert names[0] == "teacher.sampling.temperature"
    assert all(name.startswith("teacher.sampling.") for name in names)
    assert [field.name for field in select_fields("seed")] == ["seed"]
    listed = [field.name for field in select_fields("prompts.sources")]
    assert listed[:2] == ["prompts.sources", "prompts.sources[].name"]
    text = describe_fields("signal")
    assert "  signal.top_k  (integer > 0; default: 64) [identity]" in text
    assert "teacher.model" not in text
    assert [entry["name"] for entry in fields_json("signal")] == ["signal.kind", "signal.top_k"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("teachr", "did you mean teacher?"),
        ("teacher.modl", "did you mean teacher.model?"),
        ("learning_rate", "did you mean training.learning_rate?"),
        ("batch_size", "set training.rows_per_step"),
        ("xyz", "a run file has seed, teacher, teachers, student"),
    ],
)
def test_an_unknown_section_is_refused_with_the_near_miss(name: str, words: str) -> None:
    for describe in (describe_fields, fields_json):
        with pytest.raises(ConfigError) as caught:
            describe(name)
        (problem,) = caught.value.problems
        assert problem.where == name
        assert words in problem.message
