"""A student's papers, the lineage back through generations, and what the next check makes of it."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from driver import main
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.terms import check_terms, finding_of, record, refusals
from raystill.cluster.job.manifest import adapter_record
from raystill.cluster.lineage import papers
from raystill.cluster.lineage.facts import PAPERS
from raystill.cluster.lineage.graph import MOST_MODELS, BrokenLineage, read_lineage
from raystill.cluster.lineage.papers import leave_papers, write_papers
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder
from raystill.model.identity import teacher_identity

SUMMARY = {
    "rows_trained": 4000,
    "evaluation": {
        "after": {
            "step": 9,
            "kl_nats_per_token": 0.5,
            "top1_agreement": 0.75,
            "num_tokens": 1234,
            "bound": "partition of K ids and a tail",
            "baselines": {"uniform": {}},
        }
    },
}


def model(folder: Path, licence: str | None = None, weights: str = "w") -> Path:
    """A model's folder with weights, a configuration, and a card that states the licence."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "config.json").write_text("{}")
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    return folder


def run_config(tmp_path: Path, teacher: str | dict[str, Any], **more: Any) -> RunConfig:
    run: dict[str, Any] = {
        "teacher": {"model": teacher} if isinstance(teacher, str) else teacher,
        "student": {"init": "from_teacher", "layer_stride": 2},
        "prompts": {"path": str(tmp_path / "questions.jsonl")},
        **more,
    }
    return RunConfig.model_validate(run)


def folders(config: RunConfig) -> tuple[ModelFolder | None, ModelFolder | None]:
    names = (config.teacher.model, config.student.model)
    teacher, base = (None if n is None else ModelFolder(n, Path(n)) for n in names)
    return teacher, base or teacher


def finished(tmp_path: Path, name: str, teacher: Any, **more: Any) -> Path:
    """The folder of a finished run with its papers; its student's weights are its name."""
    config = run_config(tmp_path, teacher, **more)
    folder = tmp_path / "runs" / name
    model(folder / "student", weights=f"student {name}")
    is_local = config.teacher.engine == "vllm"
    manifest = {
        "run_id": name[:8],
        "teacher": config.teacher.model,
        "teacher_identity": teacher_identity(config.teacher.model) if is_local else "api-identity",
        "terms": record(config, *folders(config)),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    write_papers(RunFolder(str(folder)))
    for paper in PAPERS:  # Whoever gets the student learns nothing of the machine.
        assert str(tmp_path) not in (folder / "student" / paper).read_text()
    return folder


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of the student's card."""
    text = (folder / "student" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def bom(folder: Path) -> dict[str, Any]:
    """The bill of materials, which CycloneDX's own schema accepts."""
    found: dict[str, Any] = json.loads((folder / "student" / "bom.cdx.json").read_text())
    problems = [error.message for error in validator().iter_errors(found)]
    assert not problems
    refs = [found["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in found["components"])]
    assert len(refs) == len(set(refs))
    for entry in found["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= set(refs)
    return found


def validator() -> Draft7Validator:
    """Of CycloneDX 1.7, from the schemas in the package ``cyclonedx-python-lib``; no network."""
    spec = find_spec("cyclonedx")
    assert spec is not None and spec.submodule_search_locations is not None
    (place,) = spec.submodule_search_locations
    schemas = Path(place) / "schema" / "_res"
    registry: Registry[Any] = Registry()
    for name in ("spdx", "jsf-0.82", "cryptography-defs", "bom-1.7"):
        schema = json.loads((schemas / f"{name}.SNAPSHOT.schema.json").read_text())
        resource = Resource.from_contents(schema)
        for uri in (schema["$id"], f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json"):
            registry = registry.with_resource(uri, resource)
    return Draft7Validator(schema, registry=registry)


def test_the_validator_refuses_what_is_no_bill_of_materials(tmp_path: Path) -> None:
    found = bom(finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit"))))
    for wrong in (
        {"bomFormat": "SPDX"},
        {"components": [{"type": "teacher", "name": "x"}]},
        {"metadata": {"component": {"type": "data", "name": "x", "licenses": [{"id": "MIT"}]}}},
        {"serialNumber": "7"},
    ):
        assert list(validator().iter_errors({**found, **wrong}))


def test_the_papers_of_a_student_of_a_free_teacher(tmp_path: Path) -> None:
    teacher = model(tmp_path / "big-teacher", "apache-2.0")
    terms = {"student_licence": "apache-2.0", "purpose": "commercial", "distributed": True}
    folder = finished(tmp_path, "small", str(teacher), terms=terms)
    front, body = card(folder)
    assert front["license"] == "apache-2.0"
    assert front["teacher_models"] == ["big-teacher"]
    assert "base_model" not in front  # A folder is no id of the Hub.
    assert {"distillation", "synthetic"} <= set(front["tags"])
    assert "# small" in body and "questions.jsonl" in body and "4000 rows" in body
    assert "| KL(teacher, student), nats a token | 0.5 |" in body
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}
    assert "commercial, to be handed on" in body and "allowed" in body
    found = bom(folder)
    student = found["metadata"]["component"]
    assert student["licenses"][0]["license"]["id"] == "Apache-2.0"
    hashes = {file["name"]: file["hashes"][0]["content"] for file in student["components"]}
    assert set(hashes) == {"config.json", "model.safetensors"}
    by_ref = {entry["ref"]: entry["dependsOn"] for entry in found["dependencies"]}
    (answers,) = [ref for ref in by_ref[student["bom-ref"]] if ref.startswith("answers:")]
    names = {c["bom-ref"]: c["name"] for c in found["components"]}
    assert sorted(names[ref] for ref in by_ref[answers]) == ["big-teacher", "questions.jsonl"]


def test_the_id_of_a_student_is_the_identity_that_the_next_run_gives_its_teacher(
    tmp_path: Path,
) -> None:
    folder = finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit")))
    lineage = read_lineage(folder / "student")
    assert lineage is not None and lineage.student == teacher_identity(folder / "student")


class TestDuties:
    def test_a_name_prefix_is_in_the_name(self, tmp_path: Path) -> None:
        teacher = str(model(tmp_path / "teacher", "llama3.1"))
        front, body = card(finished(tmp_path, "small", teacher, terms={"distributed": True}))
        assert "# Llama-small" in body and "begins with `Llama`" in body
        assert "license" not in front
        _, body = card(finished(tmp_path, "llama-tiny", teacher))
        assert "# llama-tiny" in body

    def test_terms_that_travel_are_the_licence_and_the_notice(self, tmp_path: Path) -> None:
        folder = finished(tmp_path, "small", str(model(tmp_path / "teacher", "gemma")))
        assert card(folder)[0]["license"] == "gemma"
        assert "ai.google.dev/gemma/terms" in (folder / "student" / "NOTICE").read_text()
        assert bom(folder)["metadata"]["component"]["licenses"][0]["license"]["name"] == "gemma"

    def test_an_unusual_licence_is_named(self, tmp_path: Path) -> None:
        folder = finished(tmp_path, "small", str(model(tmp_path / "t", "deepseek-license")))
        if card(folder)[0].get("license"):
            assert card(folder)[0]["license"] == "other"
            assert card(folder)[0]["license_name"] == "deepseek-license"
        bom(folder)


class TestTheNextGeneration:
    def taught_by(self, tmp_path: Path, folder: Path, **terms: Any) -> tuple[str, list[str]]:
        """The verdict on a run that the student of ``folder`` is to teach, and the refusals."""
        config = run_config(tmp_path, str(folder / "student"), terms=terms)
        found = finding_of(config, *folders(config))
        return found.verdict, refusals(found, config.terms)

    def test_duties_arrive_though_the_card_says_mit(self, tmp_path: Path) -> None:
        teacher = str(model(tmp_path / "teacher", "gemma"))
        first = finished(tmp_path, "first", teacher, terms={"student_licence": "mit"})
        verdict, reasons = self.taught_by(tmp_path, first)
        assert (verdict, reasons) == ("conditional", [])
        shared = {"distributed": True, "student_licence": "mit"}
        (reason,) = self.taught_by(tmp_path, first, **shared)[1]
        assert "must carry gemma" in reason

    def test_the_licence_of_a_teachers_prompts_arrives(self, tmp_path: Path) -> None:
        teacher = str(model(tmp_path / "teacher", "mit"))
        prompts = {"path": str(tmp_path / "questions.jsonl"), "licence": "cc-by-nc-4.0"}
        terms = {"student_licence": "mit"}
        first = finished(tmp_path, "first", teacher, prompts=prompts, terms=terms)
        _, body = card(first)
        assert "(under `cc-by-nc-4.0`)" in body and "not used commercially" in body
        bom(first)
        second = finished(tmp_path, "second", str(first / "student"), terms=terms)
        for folder in (first, second):
            verdict, reasons = self.taught_by(
                tmp_path, folder, teacher_licence="mit", purpose="commercial"
            )
            assert verdict == "conditional" and reasons[0].startswith("cc-by-nc allows research")

    def test_credit_is_in_the_notice(self, tmp_path: Path) -> None:
        prompts = {"path": str(tmp_path / "questions.jsonl"), "licence": "cc-by-4.0"}
        first = finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit")), prompts=prompts)
        notice = (first / "student" / "NOTICE").read_text()
        assert "Credit for its prompts: the authors of the data under CC BY 4.0." in notice

    def test_a_letter_of_the_first_does_not_speak_for_the_second(self, tmp_path: Path) -> None:
        (tmp_path / "letter.pdf").write_text("yes")
        tokenizer = model(tmp_path / "tokenizer", "mit")
        service = {
            "engine": "api",
            "model": str(tokenizer),
            "api": {"base_url": "https://api.openai.com/v1", "model": "big"},
        }
        letter = {"file": str(tmp_path / "letter.pdf"), "rule": "openai-api", "reason": "agreed"}
        terms = {"permission": letter, "student_licence": "apache-2.0"}
        more = {"signal": {"kind": "text"}, "objective": {"cross_entropy": 1.0}}
        first = finished(tmp_path, "first", service, terms=terms, **more)
        _, body = card(first)
        assert "A letter permits `openai-api`: agreed" in body and "api.openai.com" in body
        verdict, reasons = self.taught_by(tmp_path, first)
        assert verdict == "forbidden" and reasons[0].startswith("openai-api ")
        bom(first)

    @pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "vllm.team.internal", "gpu7"])
    def test_a_server_of_ones_own_is_not_named(self, host: str, tmp_path: Path) -> None:
        service = {
            "engine": "api",
            "model": str(model(tmp_path / "tokenizer", "mit")),
            "api": {"base_url": f"http://{host}:8000/v1", "model": "big"},
        }
        more = {"signal": {"kind": "text"}, "objective": {"cross_entropy": 1.0}}
        first = finished(tmp_path, "first", service, terms={"teacher_licence": "llama3.1"}, **more)
        assert not [n for n in PAPERS if host in (first / "student" / n).read_text()]
        verdict, _ = self.taught_by(tmp_path, first, teacher_licence="mit")
        assert verdict == "conditional"  # The licence arrives all the same.

    def test_contradicting_duties_of_two_generations_are_seen(self, tmp_path: Path) -> None:
        teacher = str(model(tmp_path / "teacher", "llama3.1"))
        first = finished(tmp_path, "first", teacher, terms={"student_licence": "hyperclovax-seed"})
        stated = {"teacher_licence": "gemma", "distributed": True}
        config = run_config(tmp_path, str(first / "student"), terms=stated)
        found = finding_of(config, *folders(config))
        assert {("name_prefix", "Llama"), ("same_terms", "gemma")} <= found.duties

    def test_what_only_gave_its_weights_binds_as_weights(self, tmp_path: Path) -> None:
        """Llama 2 forbids its outputs for other models, not its own fine-tuning."""
        teacher = str(model(tmp_path / "teacher", "mit"))
        base = str(model(tmp_path / "base", "llama2", "b"))
        terms = {"student_licence": "llama2"}
        student = {"init": "model", "model": base}
        first = finished(tmp_path, "first", teacher, student=student, terms=terms)
        verdict, reasons = self.taught_by(tmp_path, first, teacher_licence="mit")
        assert (verdict, reasons) == ("conditional", [])

    @pytest.mark.parametrize("purpose", ["research", "internal"])
    def test_a_lineage_that_cannot_be_read_is_an_unknown_source(
        self, purpose: str, tmp_path: Path
    ) -> None:
        folder = model(tmp_path / "runs" / "torn" / "student", "apache-2.0")
        (folder / "lineage.json").write_text('{"raystill_lineage": 1')
        verdict, reasons = self.taught_by(tmp_path, folder.parent, purpose=purpose)
        assert verdict == "unclear" and reasons

    def test_a_licence_that_an_ancestor_lacks_is_answered_by_a_letter_alone(
        self, tmp_path: Path
    ) -> None:
        first = finished(tmp_path, "first", str(model(tmp_path / "origin")))
        (tmp_path / "letter.pdf").write_text("yes")
        letter = {"file": str(tmp_path / "letter.pdf"), "rule": "origin", "reason": "agreed"}
        for permission, problems in ((None, 1), (letter, 0), ({**letter, "rule": "first"}, 1)):
            terms = {"purpose": "internal", "teacher_licence": "mit", "permission": permission}
            config = run_config(tmp_path, str(first / "student"), terms=terms)
            found, _ = check_terms(config, *folders(config))
            assert len(found) == problems
            assert all("origin (in the lineage of " in str(problem) for problem in found)

    def test_three_generations_are_printed_once_each(self, tmp_path: Path, capsys: Any) -> None:
        first = finished(tmp_path, "first", str(model(tmp_path / "origin", "qwen")))
        terms = {"student_licence": "mit"}
        second = finished(tmp_path, "second", str(first / "student"), terms=terms)
        third = finished(
            tmp_path,
            "third",
            str(second / "student"),
            student={"init": "model", "model": str(first / "student")},
        )
        bom(third)
        assert main(["lineage", str(third)]) == 0
        out = capsys.readouterr().out
        places = [out.index(f"{n}, ") for n in ("third", "second", "first", "origin")]
        assert places == sorted(places)
        # "first" cut its layers out of its teacher's weights.
        assert [out.count(f"of {n}, ") for n in ("origin", "first")] == [1, 2]
        assert out.count("by origin, ") == 1 and out.count("(see above)") == 2
        assert "Built with Qwen" in out and "on: questions.jsonl" in out
        assert main(["lineage", str(third / "student"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert len(told["models"]) == 4 and told["changed"] is False

    def test_it_grows_by_one_model_a_generation(self, tmp_path: Path) -> None:
        """Also where each student begins with its teacher's weights: the ways back double."""
        teacher = model(tmp_path / "origin", "mit")
        for number in range(12):
            student = {"init": "model", "model": str(teacher)}
            folder = finished(tmp_path, f"g{number}", str(teacher), student=student)
            teacher = folder / "student"
        lineage = read_lineage(teacher)
        assert lineage is not None and len(lineage.models) == 14  # The base origin by its name.
        bom(folder)

    def test_changed_weights_are_told(self, tmp_path: Path, capsys: Any) -> None:
        folder = finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit")))
        (folder / "student" / "model.safetensors").write_text("other weights")
        assert main(["lineage", str(folder)]) == 1
        assert "are not those that the lineage was written for" in capsys.readouterr().out
        second = finished(tmp_path, "two", str(folder / "student"))
        lineage = read_lineage(second / "student")
        assert lineage is not None
        taught = lineage.models[lineage.models[lineage.student].learned_from[0]]
        assert taught.started_from is not None and taught.id == teacher_identity(folder / "student")


def chain(length: int) -> dict[str, Any]:
    models: dict[str, Any] = {
        f"m{i}": {"name": f"m{i}", "learned_from": [f"m{i + 1}"]} for i in range(length - 1)
    }
    models[f"m{length - 1}"] = {"name": "last"}
    return {"raystill_lineage": 1, "student": "m0", "models": models}


ONE = {"raystill_lineage": 1, "student": "a", "models": {"a": {"name": "a"}}}
HOSTILE: dict[str, Any] = {
    "no JSON": "{",
    "nested without end": "[" * 200_000,
    "no object": [],
    "a later version": {**ONE, "raystill_lineage": 2},
    "no models": {**ONE, "models": {}},
    "too many models": chain(MOST_MODELS + 1),
    "no student": {**ONE, "student": "b"},
    "a student that is a list": {**ONE, "student": ["a"]},
    "a parent that is not there": {**ONE, "models": {"a": {"name": "a", "learned_from": ["b"]}}},
    "its own teacher": {**ONE, "models": {"a": {"name": "a", "learned_from": ["a"]}}},
    "a circle": {
        **ONE,
        "models": {"a": {"learned_from": ["b"]}, "b": {"started_from": "a"}},
    },
    "a name with a line break": {**ONE, "models": {"a": {"name": "a\n---\nlicense: mit"}}},
    "a name with a terminal's escape": {**ONE, "models": {"a": {"name": "\x1b[2J"}}},
    "a name of a megabyte": {**ONE, "models": {"a": {"name": "x" * 1_000_000}}},
    "a name that is a number": {**ONE, "models": {"a": {"name": 7}}},
    "facts without end": {**ONE, "models": {"a": {"made": {str(i): "" for i in range(99)}}}},
    "a model that is a text": {**ONE, "models": {"a": "b"}},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_lineage_is_refused_and_shown_by_nobody(
    content: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = model(tmp_path / "student", "mit")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "lineage.json").write_text(text)
    with pytest.raises(BrokenLineage):
        read_lineage(folder)
    assert main(["lineage", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "lineage.json" in err and len(err) < 1000 and "\x1b" not in err


def test_the_longest_chain_is_read_printed_and_checked(tmp_path: Path, capsys: Any) -> None:
    folder = model(tmp_path / "student", "mit")
    (folder / "lineage.json").write_text(json.dumps(chain(MOST_MODELS)))
    assert main(["lineage", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "more lines; --json" in told and len(told) < 4000
    assert main(["lineage", "--json", str(folder)]) == 0
    assert "last" in capsys.readouterr().out


def test_names_are_no_markup_and_no_metadata(tmp_path: Path) -> None:
    """Names of folders and prompt files stand in a page that the Hub renders."""
    evil = "x`](http:e)<script>alert(1)|\n---\nlicense: mit"
    teacher = model(tmp_path / evil.replace("/", ""), "apache-2.0")
    prompts = {"path": str(tmp_path / "<img src=x>`.jsonl")}
    folder = finished(tmp_path, "# <b>`run`\n- x", str(teacher), prompts=prompts)
    front, body = card(folder)
    assert "license" not in front
    assert "<" not in body and "\n---\n" not in body
    assert body.count("\n# ") == 1
    bom(folder)


def test_the_manifest_of_an_earlier_version_gives_papers_too(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "old"
    model(folder / "student")
    manifest = {"teacher": "models/t", "teacher_identity": "ab" * 32, "run_id": "r"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text("{}")
    write_papers(RunFolder(str(folder)))
    front, body = card(folder)
    assert front["teacher_models"] == ["t"] and "nothing was measured" in body
    bom(folder)


def test_a_student_of_several_teachers_has_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    model(folder / "student")
    teachers = {"writer": {"identity": "a" * 64}, "judge": {"identity": "b" * 64}}
    sources = {"teachers": {"writer": {"teacher": {"name": "big"}}}, "teacher": {"name": "big"}}
    manifest = {"teacher": "big", "teacher_identity": "a" * 64, "run_id": "r"}
    manifest |= {"teachers": teachers, "terms": {"sources": sources}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text("{}")
    write_papers(RunFolder(str(folder)))
    lineage = read_lineage(folder / "student")
    assert lineage is not None
    named = {id_: one.name for id_, one in lineage.models.items()}
    assert named == {lineage.student: "small", "a" * 64: "big", "b" * 64: "judge"}
    assert lineage.models[lineage.student].learned_from == ("a" * 64, "b" * 64)
    assert bom(folder)["metadata"]["component"]["name"] == "small"


def test_a_run_does_not_fail_by_its_papers(tmp_path: Path, monkeypatch: Any) -> None:
    folder = finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit")))
    told: list[str] = []

    def full(_: RunFolder) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(papers, "write_papers", full)
    leave_papers(RunFolder(str(folder)), told.append)
    assert len(told) == 1 and "No space left" in told[0]
    leave_papers(RunFolder(str(tmp_path / "without a student")), told.append)
    assert len(told) == 1


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
@pytest.mark.parametrize("text", ["", '{"run_id": ', "[1]", "[" * 100_000, "null"])
def test_a_broken_file_of_the_run_is_named_and_ends_nothing(
    tmp_path: Path, name: str, text: str
) -> None:
    folder = finished(tmp_path, "one", str(model(tmp_path / "teacher", "mit")))
    (folder / name).write_text(text)
    told: list[str] = []
    leave_papers(RunFolder(str(folder)), told.append)
    assert len(told) == 1 and f"{folder}/{name}" in told[0] and len(told[0]) < 600


@pytest.mark.parametrize("layers", [{"layer_stride": 1}, {"layer_stride": 2}])
def test_the_papers_of_an_adapter_name_it_and_its_base(tmp_path: Path, layers: Any) -> None:
    teacher = model(tmp_path / "big", "apache-2.0")
    config = run_config(tmp_path, str(teacher), student={"lora": {"rank": 4}, **layers})
    folder = finished(tmp_path, "small", str(teacher))
    manifest = json.loads((folder / "manifest.json").read_text())
    found = ModelFolder("big", teacher)
    prepared = SimpleNamespace(teacher=found, teacher_identity=teacher_identity(teacher))
    found.config["num_hidden_layers"] = 4
    manifest |= adapter_record(config, prepared)  # type: ignore[arg-type]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("a")
    write_papers(RunFolder(str(folder)))
    whole = layers["layer_stride"] == 1
    assert manifest["adapter"]["whole_base"] == whole
    identities = set()
    for part in ("student", "adapter"):
        text = (folder / part / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n", 2)[1])
        assert front["library_name"] == {"student": "transformers", "adapter": "peft"}[part]
        assert "LoRA of rank 4, alpha 32.0, on all-linear" in text
        assert teacher_identity(teacher) in text
        assert ("of which a part was kept" in text) == (not whole)
        lineage = read_lineage(folder / part)
        assert lineage is not None
        made = lineage.models[lineage.student]
        assert made.started_from == teacher_identity(teacher)
        assert made.made["adapter"].startswith("LoRA of rank 4")
        identities.add(lineage.student)
    assert len(identities) == 2
    assert adapter_record(run_config(tmp_path, str(teacher)), prepared) == {}  # type: ignore[arg-type]
