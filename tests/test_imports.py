"""The import rules: rooms without packages, light configuration, vLLM and Ray only where placed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cluster", "serve", "train", "datasets")
HEAVY = ("torch", "ray", "vllm", "transformers")
PLACES_RAY = {
    "cluster/calibrate.py",
    "cluster/check_cluster.py",
    "cluster/connect.py",
    "cluster/coordinator.py",
    "cluster/job.py",
    "cluster/probe.py",
    "cluster/submit.py",
    "cluster/telemetry.py",
    "cluster/waiting.py",
    "cluster/watch.py",
    "datasets/answer.py",
    "datasets/teacher_calls.py",
    "datasets/held_out.py",
    "datasets/source.py",
    "datasets/stream.py",
    "serve/deploy.py",
    "serve/teacher.py",
    "train/fit.py",
    "train/trainer.py",
    "train/process.py",
    "train/worker.py",
}


def python_files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module name a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_only_the_teachers_room_imports_vllm() -> None:
    users = {
        path.relative_to(ROOT).parts[0]
        for path in python_files()
        if any(name.split(".")[0] == "vllm" for name in imported(path))
    }
    assert users == {"serve"}


def test_ray_is_imported_only_where_something_is_placed_or_called() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in python_files()
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert users <= PLACES_RAY, users - PLACES_RAY


@pytest.mark.parametrize(
    "code",
    [
        "import raystill.cluster.config",
        "import raystill.cluster.check",
        "import sys; sys.argv = ['driver.py', '--help']\nimport driver\n"
        "try: driver.main(['--help'])\nexcept SystemExit: pass",
        "import driver; driver.main(['check', 'configs/tiny.yaml', '--static'])",
    ],
    ids=["configuration", "check", "help", "static check of a run file"],
)
def test_what_comes_before_spending_imports_nothing_heavy(code: str) -> None:
    tell = f"import sys; print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    assert "HEAVY []" in run_python(f"{code}\n{tell}")


def test_an_installed_hugging_face_datasets_wins_over_the_folder(tmp_path: Path) -> None:
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("class Dataset: pass\n")
    out = run_python(
        "import datasets, raystill.datasets.schema as schema\n"
        "print(datasets.Dataset.__name__, schema.__name__)",
        tmp_path,
    )
    assert out.split() == ["Dataset", "raystill.datasets.schema"]


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
