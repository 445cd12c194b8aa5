"""The import rules: rooms without packages, light configuration, vLLM and Ray only where placed."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "serve", "train", "datasets")
MOST_MODULES = 10
LONGEST_MODULE = 400
LONGEST_FUNCTION = 60

PACKAGE = "raystill"
GROUND = {PACKAGE, *(f"raystill/{name}" for name in ("base", "config", "model", "placement"))}
ROWS = {"datasets/rows"}
LOSS = {"train/batch", "train/loss"}
STUDENT = LOSS | {"train/start", "train/student"}
STEP = STUDENT | {"train/step"}
WORKER = STEP | {"train/checkpoint", "train/evaluation", "train/worker"}
MAY_IMPORT: dict[str, set[str]] = {
    "raystill/base": set(),
    "raystill/config": {"raystill/base"},
    "raystill/model": {"raystill/base", "raystill/config"},
    "raystill/placement": {"raystill/base", "raystill/config"},
    "raystill": {"raystill/base", "raystill/config", "raystill/model"},
    "datasets/rows": {"raystill/base", "raystill/config"},
    "datasets/policy": GROUND | ROWS,
    "datasets/overlap": GROUND,
    "datasets/spool": GROUND | ROWS,
    "datasets/prompts": GROUND | ROWS | {"datasets/overlap", "datasets/spool"},
    "datasets/store": GROUND | ROWS,
    "datasets/lookup": GROUND | ROWS | {"datasets/store"},
    "datasets/exchange": GROUND | ROWS | {"datasets/prompts", "datasets/store"},
    "datasets/filters": GROUND | ROWS,
    "datasets/judging": GROUND | ROWS | {"datasets/prompts"},
    "datasets/stream": GROUND
    | ROWS
    | {"datasets/filters", "datasets/policy", "datasets/prompts", "datasets/store"}
    | {"datasets/judging", "datasets/lookup"},
    "serve/engine": GROUND | ROWS,
    "serve/api": GROUND | ROWS,
    "serve/batch": GROUND | ROWS | {"serve/api"},
    "serve": GROUND | ROWS | {"datasets/stream", "serve/api", "serve/batch", "serve/engine"},
    "serve/bench": GROUND | ROWS | {"serve/engine"},
    "train/batch": GROUND | ROWS,
    "train/loss": GROUND | LOSS,
    "train/start": GROUND,
    "train/student": GROUND | LOSS | {"train/start"},
    "train/step": GROUND | STUDENT,
    "train/checkpoint": GROUND | STEP,
    "train/evaluation": GROUND
    | ROWS
    | STEP
    | {"datasets/lookup", "datasets/prompts", "datasets/store", "datasets/stream"},
    "train/calibration": GROUND | ROWS | STEP | {"datasets/store"},
    "train/worker": GROUND | WORKER | {"datasets/stream"},
    "cluster/lineage": GROUND,
    "cluster/harness": GROUND,
    "cluster/check/ahead": GROUND | {"datasets/prompts", "datasets/stream"},
    "cluster/check": GROUND
    | ROWS
    | {
        "cluster/check/ahead",
        "cluster/harness",
        "cluster/lineage",
        "datasets/filters",
        "datasets/judging",
        "datasets/prompts",
        "datasets/store",
    }
    | {"datasets/lookup", "datasets/spool", "serve/engine"},
    "cluster/coordinator": GROUND
    | ROWS
    | {"datasets/filters", "datasets/lookup", "datasets/prompts", "datasets/store"}
    | {"datasets/stream"},
    "cluster/report": GROUND | {"cluster/check", "cluster/coordinator", "datasets/store"},
    "cluster/report/page": GROUND | {"cluster/report"},
    "cluster/job": GROUND
    | {"cluster/check", "cluster/coordinator", "cluster/report", "datasets/filters"}
    | {
        "cluster/report/page",
        "datasets/lookup",
        "datasets/store",
        "datasets/stream",
        "serve",
        "train/evaluation",
        "train/worker",
    },
    "cluster/commands": GROUND
    | ROWS
    | {
        "cluster/check",
        "cluster/check/ahead",
        "cluster/job",
        "cluster/report",
        "datasets/store",
        "datasets/stream",
    }
    | {"cluster/lineage", "cluster/report/page", "serve", "train/calibration"}
    | {"datasets/lookup", "datasets/prompts", "train/step", "train/worker"},
    "cluster/worth": GROUND
    | ROWS
    | {"cluster/check", "cluster/commands", "cluster/job", "cluster/report", "cluster/report/page"}
    | {"cluster/harness", "serve", "serve/bench"}
    | STUDENT,
    "cluster/store": GROUND
    | {"cluster/check", "cluster/commands", "cluster/lineage", "datasets/exchange"}
    | {"datasets/prompts", "datasets/rows", "datasets/store", "serve/batch"},
}
"""What each folder may import of ours. A folder stands above all that it imports: no circles, and
no arrow up (cluster -> train, serve -> datasets -> raystill)."""

PLACES_RAY = {
    *("datasets/stream", "serve", "train/worker", "cluster/coordinator"),
    *("cluster/job", "cluster/commands", "cluster/worth"),
}
"""Folders whose business is to place or call something with Ray."""
PLACES_RAY_TOO = {
    *("cluster/check/cluster.py", "cluster/report/exporters.py", "train/evaluation/probe.py"),
}


def folder_of(path: Path) -> str:
    return str(path.relative_to(ROOT).parent)


def python_files() -> list[Path]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    ground = [path for folder in GROUND for path in (ROOT / folder).glob("*.py")]
    return sorted(path for path in files + ground if not path.is_symlink())


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("raystill") else f"raystill.{name}"


MODULES = {module_of(path): path for path in python_files()}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def ours(path: Path) -> set[Path]:
    """Our modules that a file imports, wherever in the file."""
    found: set[Path] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raystill."):
            for alias in node.names:
                name = node.module or ""
                full = f"{name}.{alias.name}"
                found.add(MODULES[full] if full in MODULES else MODULES[name])
        elif isinstance(node, ast.Import):
            found |= {MODULES[a.name] for a in node.names if a.name.startswith("raystill.")}
    return found


@cache
def imported(path: Path) -> set[str]:
    """Every module name a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def run_python(code: str, *folders: Path) -> str:
    path = ":".join(str(folder) for folder in (*folders, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_rooms_are_no_packages() -> None:
    assert not [room for room in ROOMS if (ROOT / room / "__init__.py").exists()]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_is_never_imported_by_its_bare_name(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & set(ROOMS)


def test_only_the_engine_imports_vllm() -> None:
    users = {
        folder_of(path)
        for path in python_files()
        if any(name.split(".")[0] == "vllm" for name in imported(path))
    }
    assert users == {"serve/engine"}


def test_ray_is_imported_only_where_something_is_placed_or_called() -> None:
    users = {
        path
        for path in python_files()
        if any(name.split(".")[0] == "ray" for name in imported(path))
        and folder_of(path) not in PLACES_RAY
    }
    assert {str(path.relative_to(ROOT)) for path in users} == PLACES_RAY_TOO


def test_a_folder_imports_only_what_the_table_allows() -> None:
    assert {folder_of(path) for path in python_files()} == set(MAY_IMPORT)
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path in python_files()
        for other in ours(path)
        if folder_of(other) != folder_of(path)
        and folder_of(other) not in MAY_IMPORT[folder_of(path)]
    ]
    assert not wrong


def test_the_table_has_no_circle() -> None:
    TopologicalSorter({k: v - {k} for k, v in MAY_IMPORT.items()}).prepare()


def test_no_two_files_import_each_other() -> None:
    TopologicalSorter({path: ours(path) for path in python_files()}).prepare()


def test_the_house_stays_small() -> None:
    """A folder holds at most ten modules, a module 400 lines, a function 60."""
    sizes = Counter(folder_of(path) for path in python_files())
    assert not {folder: n for folder, n in sizes.items() if n > MOST_MODULES}
    long = {p: n for p in python_files() if (n := p.read_text().count("\n")) > LONGEST_MODULE}
    assert not long
    functions = [
        (str(path.relative_to(ROOT)), node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [one for one in functions if one[2] > LONGEST_FUNCTION]


def test_a_run_begins_before_a_framework_is_imported() -> None:
    """The driver's job needs Ray; torch costs it seconds in which the teacher could be starting."""
    found = run_python(
        "import sys, raystill.cluster.job.run, raystill.train.worker.fit\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    assert "[]" in found


def test_an_installed_hugging_face_datasets_wins_over_the_folder(tmp_path: Path) -> None:
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("class Dataset: pass\n")
    out = run_python(
        "import datasets, raystill.datasets.rows.schema as schema\n"
        "print(datasets.Dataset.__name__, schema.__name__)",
        tmp_path,
    )
    assert out.split() == ["Dataset", "raystill.datasets.rows.schema"]


def test_the_folder_is_also_left_behind_by_a_package_later_on_the_path(tmp_path: Path) -> None:
    # A folder without __init__.py is the last thing Python falls back to, whatever its place.
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("class Dataset: pass\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import datasets; print(hasattr(datasets, 'Dataset'))"
    )
    assert run_python(code).strip() == "True"


def test_the_names_agree_with_the_lint_rule() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{room}".msg' in text for room in ROOMS)
