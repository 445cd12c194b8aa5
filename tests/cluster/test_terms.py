"""The gate: which teacher may teach which student, for what; the readings; the join."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystill.cluster.check import terms
from raystill.cluster.check.static import check_run_file
from raystill.cluster.check.terms import Finding, join, of_licence, of_service, of_weights
from raystill.config.load import load_config
from raystill.config.student import TermsConfig
from raystill.model.files import ModelFolder
from tests.support.end_to_end import ROOT

OWN = "http://127.0.0.1:8000/v1"
ALLOWED, DUTY = "allowed", "conditional"


def outcome(
    licence: str | None,
    url: str | None = None,
    base: str | None = None,
    **wanted: Any,
) -> tuple[str, bool]:
    """The verdict on a teacher, its route and the student's base, and whether it is refused."""
    parts = [] if licence == "hosted" else [of_licence(licence, "teacher")]
    if url is not None:
        parts.append(of_service(url))
    if base is not None:
        parts.append(of_weights(base, "base"))
    found = join(parts)
    return found.verdict, bool(terms.refusals(found, TermsConfig(**wanted)))


RESEARCH: dict[str, Any] = {}
INTERNAL = {"purpose": "internal"}
SOLD = {"purpose": "commercial", "distributed": True}
SHARED = {"distributed": True}

CASES: list[tuple[str | None, str | None, str | None, dict[str, Any], str, bool]] = [
    # teacher's licence, route, base, purpose: verdict, refused
    ("apache-2.0", None, None, RESEARCH, ALLOWED, False),
    ("apache-2.0", None, None, SOLD, ALLOWED, False),
    ("Apache-2.0", None, None, SOLD, ALLOWED, False),
    ("apache-2.0", OWN, None, SOLD, ALLOWED, False),
    ("apache-2.0", "http://10.1.2.3/v1", None, SOLD, ALLOWED, False),
    ("apache-2.0", "http://localhost:1/v1", None, SOLD, ALLOWED, False),
    ("apache-2.0", "http://vllm:8000/v1", None, SOLD, ALLOWED, False),
    ("apache-2.0", "http://vllm.teachers.svc.cluster.local/v1", None, SOLD, ALLOWED, False),
    ("apache-2.0", "https://chat.qwen.ai/v1", None, RESEARCH, "forbidden", True),
    ("apache-2.0", "https://api.mistral.ai/v1", None, SOLD, ALLOWED, False),
    ("apache-2.0", "https://generativelanguage.googleapis.com/v1", None, SHARED, "forbidden", True),
    ("apache-2.0", "https://unheard.example/v1", None, RESEARCH, "unclear", True),
    ("apache-2.0", None, "apache-2.0", SOLD, ALLOWED, False),
    ("apache-2.0", None, "llama3", SOLD, DUTY, False),
    ("apache-2.0", None, "gemma", SOLD, DUTY, False),
    ("apache-2.0", None, "gemma", {**SOLD, "student_licence": "mit"}, DUTY, True),
    ("apache-2.0", None, None, {**SOLD, "student_licence": "mit"}, ALLOWED, False),
    ("apache-2.0", None, "cc-by-nc-4.0", SOLD, DUTY, True),
    ("apache-2.0", None, "cc-by-nc-4.0", RESEARCH, DUTY, False),
    ("mit", None, None, SOLD, ALLOWED, False),
    ("mit", None, None, INTERNAL, ALLOWED, False),
    ("openmdw-1.0", None, None, SOLD, ALLOWED, False),
    ("openmdw-1.1", None, None, SOLD, ALLOWED, False),
    ("nvidia-open-model-license", None, None, SOLD, ALLOWED, False),
    ("modified-mit", None, None, SOLD, ALLOWED, False),
    ("llama2", None, None, RESEARCH, "forbidden", True),
    ("llama2", None, None, SOLD, "forbidden", True),
    ("llama3", None, None, RESEARCH, "forbidden", True),
    ("llama3.1", None, None, RESEARCH, DUTY, False),
    ("llama3.1", None, None, SOLD, DUTY, False),
    ("llama3.2", None, None, SOLD, DUTY, False),
    ("llama3.3", None, None, INTERNAL, DUTY, False),
    ("llama4", None, None, SHARED, DUTY, False),
    ("llama4", "https://api.llama.com/v1", None, RESEARCH, "forbidden", True),
    ("llama3.1", None, "hyperclovax-seed", SHARED, DUTY, True),
    ("llama3.1", None, "hyperclovax-seed", INTERNAL, DUTY, False),
    ("llama3.1", None, "llama3.1", SHARED, DUTY, False),
    ("gemma", None, None, SOLD, DUTY, False),
    ("gemma", None, None, {**SHARED, "student_licence": "apache-2.0"}, DUTY, True),
    ("gemma", None, None, {**SHARED, "student_licence": "gemma"}, DUTY, False),
    ("gemma", None, None, {"student_licence": "apache-2.0"}, DUTY, False),
    ("gemma", None, "deepseek-license", SHARED, DUTY, True),
    ("qwen", None, None, SOLD, DUTY, False),
    ("tongyi-qianwen", None, None, RESEARCH, "forbidden", True),
    ("qwen-research", None, None, RESEARCH, DUTY, False),
    ("qwen-research", None, None, INTERNAL, DUTY, True),
    ("qwen-research", None, None, SOLD, DUTY, True),
    ("deepseek-license", None, None, SHARED, DUTY, False),
    ("nvidia-nemotron-open-model-license", None, None, RESEARCH, "unclear", True),
    ("mrl", None, None, RESEARCH, DUTY, False),
    ("mrl", None, None, {"purpose": "commercial"}, DUTY, True),
    ("mnpl", None, None, INTERNAL, DUTY, True),
    ("cc-by-nc-4.0", None, None, SHARED, DUTY, False),
    ("cc-by-nc-4.0", None, None, SOLD, DUTY, True),
    ("grok2-community", None, None, RESEARCH, "forbidden", True),
    ("exaone", None, None, RESEARCH, "forbidden", True),
    ("hyperclovax-seed", None, None, SOLD, DUTY, False),
    ("stabilityai-ai-community", None, None, RESEARCH, "forbidden", True),
    ("tencent-hunyuan-community", None, None, RESEARCH, "forbidden", True),
    ("falcon-llm-license", None, None, SOLD, DUTY, False),
    ("bigscience-openrail-m", None, None, SHARED, DUTY, False),
    ("bigscience-openrail-m", None, None, {**SHARED, "student_licence": "mit"}, DUTY, True),
    (None, None, None, RESEARCH, "unclear", True),
    (None, None, None, INTERNAL, "unclear", True),
    (None, None, None, SHARED, "unclear", True),
    ("my-own-licence", None, None, RESEARCH, "unclear", True),
    ("apache-2.0", None, "my-own-licence", RESEARCH, "unclear", True),
    ("my-own-licence", None, None, SOLD, "unclear", True),
    ("", None, None, SOLD, "unclear", True),
    ("hosted", "https://api.openai.com/v1", None, RESEARCH, "forbidden", True),
    ("hosted", "https://API.OpenAI.com:443/v1", None, RESEARCH, "forbidden", True),
    ("hosted", "https://api.anthropic.com/v1", None, RESEARCH, "forbidden", True),
    ("hosted", "https://api.x.ai/v1", None, INTERNAL, "forbidden", True),
    ("hosted", "https://api.deepseek.com/v1", None, SOLD, DUTY, False),
    ("hosted", "https://api.cohere.com/v1", None, RESEARCH, "unclear", True),
    ("hosted", "https://dashscope.aliyuncs.com/v1", None, RESEARCH, "unclear", True),
    ("hosted", "https://api.openai.com.evil.example/v1", None, RESEARCH, "unclear", True),
]


@pytest.mark.parametrize(("licence", "url", "base", "wanted", "verdict", "refused"), CASES)
def test_the_table_of_cases(
    licence: str | None,
    url: str | None,
    base: str | None,
    wanted: dict[str, Any],
    verdict: str,
    refused: bool,
) -> None:
    found, is_refused = outcome(licence, url, base, **wanted)
    assert (found, is_refused) == (verdict, refused)


def test_there_are_sixty_cases_and_thirty_dated_readings() -> None:
    assert len(CASES) >= 60
    readings = terms.rules()
    assert len(readings) >= 30 and len({rule.id for rule in readings}) == len(readings)
    names = [(rule.kind, name) for rule in readings for name in rule.match]
    assert len(set(names)) == len(names), "a name must have one reading"
    for rule in readings:
        assert rule.verdict in terms.VERDICTS and rule.kind in ("licence", "service"), rule
        assert rule.read in ("primary", "secondary") and rule.version and rule.checked.year == 2026
        assert all(name == name.lower() for name in rule.match), rule
        assert len(rule.quote.split()) <= 30, rule
        assert rule.source or rule.read == "secondary", rule


sources = st.one_of(
    st.sampled_from([name for r in terms.rules() if r.kind == "licence" for name in r.match]).map(
        lambda name: of_licence(name, "teacher")
    ),
    st.sampled_from([name for r in terms.rules() if r.kind == "service" for name in r.match]).map(
        lambda host: of_service(f"https://{host}/v1")
    ),
    st.sampled_from(["gemma", "llama2", "mit", None, "odd"]).map(lambda n: of_weights(n, "base")),
)


@given(st.lists(sources, max_size=6), st.randoms())
def test_the_join_has_no_order_and_naming_twice_changes_nothing(
    found: list[Finding], random: Any
) -> None:
    whole = join(found)
    shuffled = found + found[:2]
    random.shuffle(shuffled)
    assert join(shuffled) == whole
    assert whole.join(whole) == whole == whole.join(Finding())
    for one in found:  # Nothing that is owed or forbidden gets lost.
        worse = terms.VERDICTS.index
        assert worse(whole.verdict) >= worse(one.verdict) and one.duties <= whole.duties


def checked(tmp_path: Path, *changes: str) -> tuple[list[str], Any]:
    overrides = [f"output.path={tmp_path / 'run'}", *changes]
    result = check_run_file(str(ROOT / "configs" / "tiny.yaml"), overrides)
    return [str(p) for p in result.problems if p.where.startswith("terms")], result


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_is_forbidden_is_refused_with_its_clause_unless_a_letter_permits_it(
    tmp_path: Path,
) -> None:
    forbidden = "terms.teacher_licence=llama2"
    problems, _ = checked(tmp_path, forbidden)
    assert len(problems) == 1
    assert "to improve any other large language model" in problems[0]
    assert "2023-07-18" in problems[0] and "terms.permission" in problems[0]
    letter = tmp_path / "letter.txt"
    permission = f"terms.permission={{file: {letter}, rule: llama-2, reason: by agreement}}"
    problems, _ = checked(tmp_path, forbidden, permission)
    assert any("is no file" in problem for problem in problems)
    letter.write_text("you may")
    problems, result = checked(tmp_path, forbidden, permission)
    assert problems == []
    assert any("by agreement" in note and "sha256" in note for note in result.notices)
    kept = terms.record(result.config, result.prepared.teacher, result.prepared.student)
    assert json.loads(json.dumps(kept))["permission"]["rule"] == "llama-2"
    assert len(kept["permission"]["sha256"]) == 64 and kept["verdict"] == "forbidden"
    other = permission.replace("llama-2", "gemma")
    assert checked(tmp_path, forbidden, other)[0], "a letter answers its own rule only"


DATA: list[tuple[str, dict[str, Any], str, str]] = [
    # licence of the prompts, purpose: a word of the refusal, of the notes
    ("mit", SOLD, "", ""),
    ("cc0-1.0", SOLD, "", ""),
    ("cc-by-4.0", SOLD, "", "credit the authors of the data under CC BY 4.0"),
    ("cc-by-sa-4.0", SHARED, "", "BY-SA Compatible License"),
    ("odc-by", SOLD, "", "ODC-BY"),
    ("cc-by-nc-4.0", RESEARCH, "", "non_commercial"),
    ("cc-by-nc-4.0", SOLD, "cc-by-nc allows research only", "non_commercial"),
    ("llama2", RESEARCH, "llama-2 is read as forbidden", "llama-2"),
    ("gemma", {**SHARED, "student_licence": "mit"}, "must carry gemma", "same_terms gemma"),
    ("odd", RESEARCH, "the prompts' data is under 'odd'", "'odd'"),
    ("odd", INTERNAL, "the prompts' data is under 'odd'", "'odd'"),
]


@pytest.mark.parametrize(("licence", "wanted", "refused", "noted"), DATA)
def test_the_prompts_licence_counts(
    tmp_path: Path, licence: str, wanted: dict[str, Any], refused: str, noted: str
) -> None:
    stated = ["terms.teacher_licence=apache-2.0", f"prompts.licence={licence}"]
    stated += [f"terms.{name}={json.dumps(value)}" for name, value in wanted.items()]
    problems, result = checked(tmp_path, *stated)
    assert bool(problems) == bool(refused) and all(refused in one for one in problems)
    notes = [note for note in result.notices if note.startswith("terms:")]
    assert bool(notes) == bool(noted) and any(noted in note for note in [*notes, ""])


def test_each_source_has_its_own_licence_or_that_of_all(tmp_path: Path) -> None:
    prompts = str(ROOT / "examples" / "prompts" / "quickstart.jsonl")
    sources = [{"name": n, "path": prompts, "limit": 8} for n in ("free", "bound")]
    sources[1]["licence"] = "cc-by-nc-4.0"
    section = {"path": None, "limit": None, "sources": sources, "licence": "cc0-1.0"}
    problems, result = checked(
        tmp_path,
        f"prompts={json.dumps(section)}",
        "terms={teacher_licence: apache-2.0, purpose: commercial}",
    )
    (problem,) = problems
    assert problem.startswith("terms: cc-by-nc allows research only")
    kept = terms.record(result.config, None, None)
    assert kept["sources"]["prompts_licences"] == ["cc-by-nc-4.0", "cc0-1.0"]


@pytest.mark.parametrize(
    ("repo", "distributed", "refused"),
    [
        ("me/small", True, True),
        ("me/Llama-small", True, False),
        ("Llama/small", True, True),
        ("me/llama3-small", True, False),
        ("me/small", False, False),
    ],
)
def test_a_name_without_the_prefix_that_is_owed_is_handed_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, distributed: bool, refused: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    overrides = [
        "terms.teacher_licence=llama3.1",
        f"terms.distributed={json.dumps(distributed)}",
        f"output.hub.repo={repo}",
    ]
    result = check_run_file(
        str(ROOT / "configs" / "tiny.yaml"), [f"output.path={tmp_path / 'run'}", *overrides]
    )
    named = [str(p) for p in result.problems if p.where == "output.hub.repo"]
    assert bool(named) is refused and all(
        "me/Llama-small" in n or "Llama/Llama-" in n for n in named
    )


def test_a_stated_licence_passes_without_a_word_and_an_unstated_one_is_refused(
    tmp_path: Path,
) -> None:
    plain = without_card(tmp_path)
    for purpose in ("research", "internal", "commercial"):
        wanted = f"terms.purpose={purpose}"
        (problem,) = checked(tmp_path, f"teacher.model={plain}", wanted)[0]
        assert problem.startswith(f"terms: {plain} states no licence")
        assert "state the licence with terms.teacher_licence" in problem, "what to write"
        for stated in ([f"teacher.model={plain}", "terms.teacher_licence=apache-2.0"], []):
            problems, result = checked(tmp_path, *stated, wanted)
            assert problems == [] and not any("terms" in note for note in result.notices)


def without_card(tmp_path: Path) -> Path:
    """The tiny teacher in a folder that states no licence."""
    source = ROOT / "models" / "tiny-teacher"
    kept = shutil.ignore_patterns("README.md")
    return Path(shutil.copytree(source, tmp_path / "plain", ignore=kept))


def test_of_a_model_that_is_not_found_that_alone_is_told(tmp_path: Path) -> None:
    problems, result = checked(tmp_path, f"teacher.model={tmp_path / 'nowhere'}")
    assert problems == [] and any("there is no folder" in str(p) for p in result.problems)
    assert result.prepared is None, "so nothing starts"


def test_what_is_not_listed_is_answered_by_a_letter(tmp_path: Path) -> None:
    """For a model of one's own as well, and for data, by the words a refusal begins with."""
    letter = tmp_path / "letter.txt"
    letter.write_text("this is ours")
    plain = without_card(tmp_path)
    for changes, rule in (
        ([f"teacher.model={plain}"], str(plain)),
        (["terms.teacher_licence=ours-1.0"], "models/tiny-teacher"),
        (["prompts.licence=ours-1.0"], "the prompts' data"),
    ):
        (problem,) = checked(tmp_path, *changes)[0]
        assert problem.startswith(f"terms: {rule} ")
        permission = {"file": str(letter), "rule": rule, "reason": "our own"}
        problems, result = checked(tmp_path, *changes, f"terms.permission={json.dumps(permission)}")
        assert problems == [] and any("our own" in note for note in result.notices)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_no_shipped_run_file_is_refused_for_what_it_leaves_unsaid(name: str) -> None:
    config = load_config(str(ROOT / "configs" / name))
    if not Path(ROOT, config.teacher.model).exists():
        pytest.skip("its teacher is on the Hub, whose card is not on this machine")
    folder = ModelFolder("teacher", ROOT / config.teacher.model)
    found = terms.finding_of_all(config, folder, folder, {})
    assert terms.refusals(found, config.terms) == [] and not found.unknown


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# A model"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"}, "qwen-research"),
        ({"README.md": "---\nlicense: other\n---\n"}, None),
        ({"README.md": "---\nlicense: [mit, gemma]\n---\n"}, None),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, "mit"),
        ({"README.md": "---\n{{ broken: [\n---\n"}, None),
        ({"README.md": "---\n!!python/object/apply:os.system [exit]\n---\n"}, None),
        ({"README.md": "license: apache-2.0"}, None),
        ({"LICENSE": "   Apache License\n  Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "Some other terms, unlike the Apache License"}, None),
        ({"LICENSE": "\0\xff" * 100}, None),
        ({}, None),
    ],
)
def test_a_folders_licence_is_what_its_card_says(
    tmp_path: Path, files: dict[str, str], licence: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert terms.licence_of(ModelFolder("model", tmp_path)) == licence


def test_a_licence_text_without_end_is_not_read_for_its_hash(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "configs" / "tiny.yaml"))

    def kept() -> str | None:
        sources = terms.record(config, ModelFolder("m", tmp_path), None)["sources"]
        found: str | None = sources["teacher"]["licence_sha256"]
        return found

    assert kept() is None
    (tmp_path / "LICENSE").write_text("you may")
    assert kept() == hashlib.sha256(b"you may").hexdigest()
    os.truncate(tmp_path / "LICENSE", 300 << 30)
    assert kept() is None


def test_the_shipped_demo_is_free_of_duties() -> None:
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip("the demo's model is not on this machine; make models")
    assert terms.licence_of(ModelFolder("demo", folder)) == "apache-2.0"
