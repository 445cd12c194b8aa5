"""Run files: valid and invalid ones, the messages, and which settings identify a run."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from raystill.base.errors import ConfigError, Problem, print_problems
from raystill.config.describe import describe_fields, fields
from raystill.config.load import (
    compare_identity,
    config_text,
    identity_fields,
    load_config,
    load_leniently,
)
from raystill.config.objective import TERMS
from raystill.config.run import RunConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "teacher": {"model": "models/tiny-teacher"},
    "student": {"layers": [0]},
    "prompts": {"path": "prompts.jsonl"},
}


def write(tmp_path: Path, text: str | None = None, **sections: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text if text is not None else yaml.safe_dump({**SMALL, **sections}))
    return path


def refused(path: Path, *overrides: str) -> dict[str, str]:
    """The problems of a run file that must not load, by where they are."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return {problem.where: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_run_file_loads(path: Path) -> None:
    assert load_config(path).teacher.model


def test_the_resolved_configuration_loads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["training.learning_rate=3e-5"])
    again = write(tmp_path, config_text(config))
    assert load_config(again) == config


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = [
        "training.learning_rate=1e-3",
        "teacher.num_replicas={min: 1, max: 3}",
        "teacher.engine_args.swap_ratio=2e-1",
        "student.layers=[0, 1]",
        "training.max_grad_norm=null",
        "prompts.system=a=b",
    ]
    config = load_config(write(tmp_path), overrides)
    assert config.training.learning_rate == 1e-3
    assert config.teacher.max_replicas == 3
    assert config.teacher.engine_args == {"swap_ratio": 0.2}
    assert config.student.layers == (0, 1)
    assert config.training.max_grad_norm is None
    assert config.prompts.system == "a=b"


def test_overrides_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    problems = refused(write(tmp_path), "training", "teacher.model.size=1", "seed=[1", "=3")
    assert set(problems) == {
        "--set training",
        "--set teacher.model.size=1",
        "--set seed",
        "--set =3",
    }


@pytest.mark.parametrize(
    ("override", "where", "meant"),
    [
        ("signal.topk=8", "signal.topk", "signal.top_k"),
        ("trainin.epochs=1", "trainin", "training"),
        ("learning_rate=1", "learning_rate", "training.learning_rate"),
        ("teacher.sampling.stop=[x]", "teacher.sampling.stop", "stop_token_ids"),
        ("teacher.num_replicas={min: 1, mx: 2}", "teacher.num_replicas.mx", "num_replicas.max"),
    ],
)
def test_an_unknown_key_names_the_near_miss_and_the_known_ones(
    tmp_path: Path, override: str, where: str, meant: str
) -> None:
    problems = refused(write(tmp_path), override)
    assert list(problems) == [where]
    assert "unknown key" in problems[where]
    assert meant in problems[where]
    assert "(keys of " in problems[where]


def test_a_wrong_type_says_value_expectation_and_meaning(tmp_path: Path) -> None:
    problems = refused(write(tmp_path), "training.epochs=two", "teacher.num_replicas=many")
    assert problems == {
        "training.epochs": "is 'two'; expected an integer (Number of passes over all rows)",
        "teacher.num_replicas": "is 'many'; expected an integer or a mapping of keys "
        "(Number of replicas of the teacher; {min, max} for autoscaling between these bounds)",
    }


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    problems = refused(write(tmp_path, "student: {layers: [0]}\nprompts: {path: p.txt}\n"))
    assert list(problems) == ["teacher"]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        objective={"forward_kl": 1.0},
        signal={"kind": "text", "topk": 3},
        student={"layers": [0], "layer_stride": 2, "depth": 3},
        training={"num_workers": 0, "schedule": "linear"},
    )
    problems = refused(path, "sed=4")
    assert set(problems) == {
        "signal.topk",
        "student.depth",
        "training.num_workers",
        "training.schedule",
        "sed",
        # rules between values, which are judged once the keys are right
        "student",
        "run file",
    }
    assert "signal.kind is 'text'" in problems["run file"]


@pytest.mark.parametrize("name", [name for name in TERMS if name != "cross_entropy"])
def test_a_divergence_without_teacher_probabilities_is_refused_with_the_remedy(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, objective={name: 0.5, "cross_entropy": 1.0}, signal={"kind": "text"})
    (message,) = refused(path).values()
    assert f"objective.{name} " in message
    assert "set signal.kind: topk" in message and "objective.cross_entropy alone" in message
    assert load_config(path, ["signal.kind=sampled"]).objective.divergences == [name]
    assert load_config(path, [f"objective.{name}=0"]).objective.weights == {"cross_entropy": 1.0}


@pytest.mark.parametrize("kind", ["text", "sampled", "topk"])
def test_a_temperature_is_for_the_hidden_signal(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, objective={"jsd": 1, "temperature": 2}, signal={"kind": "hidden"})
    assert load_config(path).objective.temperature == 2
    (message,) = refused(path, f"signal.kind={kind}").values()
    assert f"objective.temperature is 2, but signal.kind is '{kind}'" in message
    assert "set signal.kind: hidden, or objective.temperature: 1" in message
    assert ("objective.jsd needs" in message) == (kind == "text"), "all reasons at once"
    assert load_config(path, [f"signal.kind={kind}", "objective={forward_kl: 0, cross_entropy: 1}"])


def test_a_temperature_that_nothing_would_see_is_refused(tmp_path: Path) -> None:
    objective = {"cross_entropy": 1, "temperature": 0.5}
    message = refused(write(tmp_path, objective=objective, signal={"kind": "hidden"}))["objective"]
    assert "temperature is 0.5" in message and "give a divergence a weight" in message
    for value in ("0", "-1", ".nan", ".inf"):
        problems = refused(write(tmp_path), f"objective.temperature={value}")
        assert list(problems) == ["objective.temperature"]


def test_tokens_are_weighed_by_what_the_signal_says(tmp_path: Path) -> None:
    weights = {"by": "entropy", "truncated_rows": 0}
    path = write(tmp_path, objective={"cross_entropy": 1, "token_weights": weights})
    assert load_config(path).objective.token_weights.truncated_rows == 0
    (message,) = refused(path, "signal.kind=text").values()
    assert "objective.token_weights.by is 'entropy', but signal.kind is 'text'" in message
    assert "objective.token_weights.by: none" in message
    problems = refused(path, "objective.token_weights.by=loss")
    assert list(problems) == ["objective.token_weights.by"]


@pytest.mark.parametrize("name", ["jsd_beta", "skew_alpha"])
@pytest.mark.parametrize("value", ["0", "1", "-0.5", ".nan"])
def test_the_ends_of_a_mixture_are_refused_and_point_to_the_two_kls(
    tmp_path: Path, name: str, value: str
) -> None:
    problems = refused(write(tmp_path), "objective.jsd=1", f"objective.{name}={value}")
    assert list(problems) == [f"objective.{name}"]
    assert "forward_kl or reverse_kl" in problems[f"objective.{name}"]


def test_an_objective_without_a_weight_names_the_terms(tmp_path: Path) -> None:
    message = refused(write(tmp_path, objective={"jsd_beta": 0.2}))["objective"]
    assert all(name in message for name in TERMS)


def test_what_is_usable_is_kept_for_further_checks(tmp_path: Path) -> None:
    loaded = load_leniently(write(tmp_path), ["training.epochs=two", "prompts.pth=x", "student=3"])
    assert loaded.config is not None
    assert loaded.config.prompts.path == "prompts.jsonl"
    assert loaded.refused == {"training.epochs", "student"}
    assert len(loaded.problems) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- 1\n", "a list"),
        ("teacher: {model: x\nstudent: 3\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "given twice"),
    ],
)
def test_a_file_that_is_no_run_file_says_so(tmp_path: Path, text: str, words: str) -> None:
    ((_, message),) = refused(write(tmp_path, text)).items()
    assert words in message


def test_a_missing_run_file_is_no_traceback(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.yaml")[str(tmp_path / "none.yaml")]


def test_identity_holds_what_makes_a_run_and_nothing_operational() -> None:
    identity = identity_fields(RunConfig.model_validate(SMALL))
    assert identity["teacher.model"] == "models/tiny-teacher"
    assert identity["evaluation.max_rows"] == 128
    assert identity["stream.order"] == "fixed"
    for name in ("training.epochs", "training.num_workers", "output.path", "stream.max_rows_ahead"):
        assert name not in identity
    marked = {field.name for field in fields() if field.kind == "identity"}
    marked = {name for name in marked if "[]" not in name}  # entries are compared with their list
    of_a_choice = {"student.layers.keep", "student.layers.by"}
    of_a_ramp = {f"policy.student_share.{name}" for name in ("start", "to", "over_steps")}
    marked -= of_a_ramp  # A plain share has none of these.
    of_adapters = {name for name in marked if name.startswith("student.lora.")}
    assert "student.lora.base_dtype" in of_adapters
    marked -= of_adapters  # It has no adapters.
    assert set(identity) == marked - of_a_choice  # Of these it has none: it names the layers.
    choice = {**SMALL, "student": {"layers": {"keep": 2}}}
    chosen = identity_fields(RunConfig.model_validate(choice))
    assert set(chosen) == marked - {"student.layers"}


def test_differences_of_identity_are_listed_by_name() -> None:
    old = RunConfig.model_validate(SMALL)
    new = RunConfig.model_validate(
        {**SMALL, "seed": 3, "training": {"rows_per_step": 8, "num_workers": 4}}
    )
    assert compare_identity(old, old) == []
    assert compare_identity(old, new) == [
        "seed was 0, is 3",
        "training.rows_per_step was 32, is 8",
    ]


@pytest.mark.parametrize("field", list(fields()), ids=lambda field: field.name)
def test_every_field_has_a_sentence_and_a_mark(field: Any) -> None:
    assert field.sentence.endswith(".")
    assert field.kind in ("identity", "operational")
    assert field.type
    assert f"  {field.name}  (" in describe_fields()


def test_errors_pickle_with_their_problems() -> None:
    error = pickle.loads(pickle.dumps(ConfigError([Problem("a.b", "is 3; expected 4")])))
    assert error.problems == [Problem("a.b", "is 3; expected 4")]
    assert str(error) == "a.b: is 3; expected 4"


def test_problems_are_printed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_problems([Problem("a", "x"), Problem("b", "y")])
    assert capsys.readouterr().err.splitlines()[1:] == ["  - a: x", "  - b: y"]
