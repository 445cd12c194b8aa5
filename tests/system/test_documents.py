"""The documents name only what is there: files, links, modules, fields, commands, make targets."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import driver
from raystill.config.load import load_config
from raystill.config.objective import ObjectiveConfig
from raystill.config.run import RunConfig
from tests.system.test_imports import GROUND, MAY_IMPORT

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
]
MOST_README_LINES = 150
TOPS = {
    *("raystill", "cluster", "serve", "datasets", "train", "docs", "tests", "configs"),
    *("examples", "benchmarks", "requirements", ".ci", ".github"),
}
"""Folders of the top level whose paths must exist; models/ and runs/ are made later."""
CODE_ENDINGS = (".py", ".md", ".yaml")
FILE_ENDINGS = (*CODE_ENDINGS, ".json", ".jsonl", ".parquet", ".svg")
BY_NAME = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[str]:
    """The fenced blocks, without their fences."""
    found = re.finditer(
        r"^(`{3,})[^\n]*\n(.*?)^\1$", document.read_text(), re.DOTALL | re.MULTILINE
    )
    return [match[2] for match in found]


def code_spans(document: Path) -> list[str]:
    """What stands in backticks outside of fenced blocks, line breaks as spaces."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(document))]


def anchors(document: Path) -> set[str]:
    """The anchors that a host of Git repositories gives the headings."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(document), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def whole_text(document: Path) -> str:
    """Sentences and blocks, continued lines as one: commands stand in both."""
    return re.sub(r"\\\n\s*", " ", document.read_text())


@cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes and methods (Class.method) of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (
                m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
            )
            names |= {f"{node.name}.{method.name}" for method in methods}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return frozenset(names)


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a folder, a module, or something that a module defines."""
    path = ROOT / dotted.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, name = dotted.rpartition(".")
    file = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return file.is_file() and name in defined(file)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def is_field(dotted: str, model: type[BaseModel] = RunConfig) -> bool:
    """Whether a run file may have the setting."""
    name, _, rest = dotted.partition(".")
    if name not in model.model_fields:
        return False
    models = sections_of(model.model_fields[name].annotation)
    return not rest or any(is_field(rest, section) for section in models)


def sections_of(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [section for part in parts for section in sections_of(part)]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


@BY_NAME
def test_every_link_leads_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@BY_NAME
def test_every_path_exists(document: Path) -> None:
    words = {word for span in code_spans(document) for word in span.split()}
    paths = {word for word in words if "/" in word and re.fullmatch(r"[\w./*-]+", word)}
    ours = {p for p in paths if p.split("/")[0] in TOPS or p.endswith(CODE_ENDINGS)}
    assert not [path for path in sorted(ours) if not any(ROOT.glob(path))]


@BY_NAME
def test_every_module_is_there(document: Path) -> None:
    dotted = set(re.findall(r"\braystill(?:\.\w+)+", whole_text(document)))
    benchmarks = set(re.findall(r"\bbenchmarks\.\w+", whole_text(document)))
    named = {name for name in dotted | benchmarks if not name.endswith(FILE_ENDINGS)}
    assert not [name for name in sorted(named) if not is_module(name)]


@BY_NAME
def test_every_field_is_one_of_the_run_files(document: Path) -> None:
    removed = {"cluster.wait_timeout_s"}  # The CHANGELOG says so.
    dotted = (re.match(r"([a-z]+(?:\.[a-z_0-9]+)+)(?::.*)?$", s) for s in code_spans(document))
    named = {match[1] for match in dotted if match and not match[1].endswith(FILE_ENDINGS)}
    fields = {name for name in named if name.partition(".")[0] in RunConfig.model_fields}
    assert not [name for name in sorted(fields - removed) if not is_field(name)]


@BY_NAME
def test_every_make_target_is_one(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", whole_text(document), re.MULTILINE)
    assert not {word for words in said for word in words.split()} - targets


def test_every_command_is_one_of_the_drivers(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--help"]) == 0
    told = capsys.readouterr().out
    known = set(re.findall(r"^ +([a-z]+)  ", told, re.MULTILINE))
    assert {"run", "check", "fields"} <= known
    for document in DOCUMENTS:
        named = re.findall(
            r"(?:driver\.py|^raystill|`raystill) ([a-z]+)\b", whole_text(document), re.M
        )
        assert not set(named) - known, document.name


def test_the_readmes_print_is_the_demos_shortened() -> None:
    """Every line of it stands in docs/demo.md, in the same order; "..." stands for what is not."""
    [short] = [block for block in blocks(ROOT / "README.md") if "Raystill  runs/" in block]
    [whole] = [block for block in blocks(DOCS / "demo.md") if "Raystill  runs/" in block]
    left, was_left_out = whole.splitlines(), False
    for line in short.splitlines():
        if line == "...":
            was_left_out = True
            continue
        at = left.index(line)
        assert was_left_out or at == 0, f"lines are left out before {line!r} without a '...'"
        left, was_left_out = left[at + 1 :], False
    assert was_left_out or not left


def test_the_run_file_that_is_printed_is_one(tmp_path: Path) -> None:
    [text] = [block for block in blocks(DOCS / "run-file.md") if "\nteacher:" in block]
    file = tmp_path / "small.yaml"
    file.write_text(text)
    assert load_config(str(file), []).prompts.limit == 100
    [sources_of_prompts] = [b for b in blocks(DOCS / "run-file.md") if b.startswith("prompts:")]
    file.write_text(yaml.safe_dump(yaml.safe_load(text) | yaml.safe_load(sources_of_prompts)))
    assert load_config(str(file), []).evaluation.held_out_rows == 200


def laid_over(base: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run file with those of a block in their places."""
    merged = dict(base)
    for name, value in block.items():
        inner = name not in ("signal", "objective") and isinstance(base.get(name), dict)
        merged[name] = laid_over(base[name], value) if inner else value
    return merged


def test_the_blocks_about_api_teachers_change_the_run_file_that_they_name(tmp_path: Path) -> None:
    base = yaml.safe_load((ROOT / "configs" / "api.yaml").read_text())
    file, kinds = tmp_path / "api.yaml", []
    for block in blocks(DOCS / "api-teachers.md"):
        if not block.startswith("teacher:"):
            continue
        file.write_text(yaml.safe_dump(laid_over(base, yaml.safe_load(block))))
        config = load_config(str(file), [])
        told = config.teacher.api
        kinds.append((config.signal.kind, told.top_logprobs, told.ids, told.batch is not None))
    assert kinds == [
        ("topk", 20, False, False),
        ("topk", None, True, False),
        ("text", None, False, True),
    ]


def test_the_objectives_for_a_draft_are_objectives() -> None:
    [text] = [block for block in blocks(DOCS / "drafts.md") if "objective:" in block]
    objectives = [
        ObjectiveConfig(**yaml.safe_load(line)["objective"]) for line in text.split("\n") if line
    ]
    assert [one.divergences for one in objectives] == [
        ["acceptance"],
        ["forward_kl", "total_variation"],
    ]


def test_the_layouts_table_is_that_of_the_imports() -> None:
    layout = (
        prose(DOCS / "architecture.md").partition("## The folders")[2].partition("## One row")[0]
    )
    told = {}
    for folder, _, allowed in rows(layout)[2:]:
        names = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", allowed)}
        told[folder.strip("`/")] = names | (GROUND if "ground floor" in allowed else set())
    assert told == {folder: allowed - {folder} for folder, allowed in MAY_IMPORT.items()}


def test_a_rows_way_leads_through_functions_that_are_there() -> None:
    way = prose(DOCS / "architecture.md").partition("## One row")[2]
    stops = [row for row in rows(way) if row[0].isdigit()]
    assert [int(row[0]) for row in stops] == list(range(1, len(stops) + 1))
    missing = [
        f"{file}: {name}"
        for _, _, file, names, _ in stops
        for name in re.findall(r"`([^`]+)`", names)
        if name not in defined(ROOT / file.strip("`"))
    ]
    assert stops and not missing


def test_the_hooks_are_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [code] = re.findall(r"^CODE := (.+)$", makefile, re.MULTILINE)
    [recipe] = re.findall(r"^lint:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    expected = [
        line.strip().replace("$(BIN)", ".venv/bin").replace("$(CODE)", code)
        for line in recipe.splitlines()
    ]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == expected


def test_the_workflow_calls_what_everybody_can_run() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["ci"]["steps"]
    assert steps[-1] == {"run": ".ci/run"} and (ROOT / ".ci" / "run").exists()
