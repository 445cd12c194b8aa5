"""The installable package: what a wheel holds, that it runs by itself, and what it asks for."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import raystill
from tests.support.project_copy import ROOMS, ROOT, copy_project, package_modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIGHT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
}
TRACKERS = ("wandb", "mlflow", "trackio")
"""Extras whose packages, of the same names, need not be installed."""
BESIDE_MODULES = {
    "raystill/cluster/grafana/raystill.json",
    *(f"raystill/cluster/kuberay/{n}" for n in ("Dockerfile", "raycluster.yaml", "rayjob.yaml")),
    "raystill/cluster/report/page/style.css",
    "raystill/cluster/check/terms.toml",
}


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    project = copy_project(folder / "project")
    pip("wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(project))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and, as links, its light requirements: nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin" / "python")
    pip("--python", python, "install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel))
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in closure(LIGHT):
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(str(package.locate_file(name)))
    return folder


def closure(requirements: list[Requirement]) -> Iterator[Distribution]:
    """The distributions that an installation of these requirements brings."""
    left, seen = list(requirements), set()
    while left:
        one = left.pop()
        if one.name in seen or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        seen.add(one.name)
        yield (package := distribution(one.name))
        left += [Requirement(line) for line in package.requires or ()]


def run(environment: Path, *words: str, folder: Path) -> str:
    """What a command of the environment prints, run from a folder."""
    done = subprocess.run(
        [str(environment / "bin" / words[0]), *words[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_each_module_once_and_nothing_of_the_rest(wheel: Path) -> None:
    names = Counter(zipfile.ZipFile(wheel).namelist())
    assert set(names.values()) == {1}
    described = {name for name in names if ".dist-info/" in name}
    assert set(names) - described == package_modules() | BESIDE_MODULES


def test_the_command_lists_the_fields_and_its_version_from_another_folder(
    environment: Path, tmp_path: Path
) -> None:
    assert "rows_per_step" in run(environment, "raystill", "fields", folder=tmp_path)
    version = run(environment, "raystill", "--version", folder=tmp_path)
    assert raystill.__version__ in version.split()


def test_the_light_requirements_suffice_without_a_cluster(
    environment: Path, tmp_path: Path
) -> None:
    """The environment has neither Ray nor torch nor transformers."""
    check = ("raystill", "check", "configs/tiny.yaml", "--static")
    assert "no problems found" in run(environment, *check, folder=ROOT)
    (tmp_path / "store" / "segments").mkdir(parents=True)
    run(environment, "raystill", "store", "list", "store", folder=tmp_path)


def test_the_installed_package_is_not_the_project_folder(environment: Path, tmp_path: Path) -> None:
    code = "import raystill; print(raystill.__file__)"
    file = Path(run(environment, "python", "-c", code, folder=tmp_path).strip())
    assert file.resolve().is_relative_to(environment.resolve())
    assert not (file.parent / "cluster").is_symlink()


@pytest.mark.parametrize("place", [0, 99], ids=["earlier on the path", "later on the path"])
def test_the_installed_room_leaves_the_name_datasets_to_hugging_face(
    environment: Path, tmp_path: Path, place: int
) -> None:
    package = tmp_path / "elsewhere" / "datasets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class Dataset: pass\n")
    code = (
        f"import sys; sys.path.insert({place}, {str(package.parent)!r})\n"
        "import datasets, raystill.datasets.store.store as store\n"
        "print(datasets.Dataset.__name__, store.__name__)"
    )
    out = run(environment, "python", "-c", code, folder=tmp_path)
    assert out.split() == ["Dataset", "raystill.datasets.store.store"]


def pinned(name: str) -> dict[str, str]:
    """The versions of a list in requirements/, by normalised name."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize(
    ("extra", "lists"),
    [
        ("", ("cpu.txt", "gpu.txt")),
        ("cluster", ("cpu.txt", "gpu.txt")),
        ("s3", ("cpu.txt", "gpu.txt")),
        ("teacher", ("gpu.txt",)),
        ("cpu", ("cpu.txt",)),
        ("lora", ("cpu.txt", "gpu.txt")),
        ("language", ("cpu.txt", "gpu.txt")),
        ("tasks", ("tasks.txt",)),
        *((extra, ("trackers.txt",)) for extra in TRACKERS),
    ],
)
def test_the_pinned_versions_satisfy_what_the_package_asks_for(
    extra: str, lists: tuple[str, ...]
) -> None:
    own = {"cluster", "teacher", "cpu", "s3", "lora", "language", "tasks"}
    assert set(EXTRAS) == {*own, *TRACKERS}
    for name in lists:
        versions = pinned(name)
        for one in EXTRAS.get(extra, LIGHT):
            if one.name != PROJECT["name"]:
                assert one.specifier.contains(versions[canonicalize_name(one.name)]), (name, one)


LISTS = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("name", LISTS)
def test_every_pin_but_the_cpu_torch_has_a_hash(name: str) -> None:
    lines = (ROOT / "requirements" / "hashed" / name).read_text().splitlines()
    hashed = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in hashed)
    versions = dict(line.split(" ")[0].split("==") for line in hashed)
    expected = pinned(name)
    if name == "cpu.txt":
        del expected["torch"]
    assert {canonicalize_name(package): v for package, v in versions.items()} == expected


def test_a_build_of_another_index_gets_no_hash() -> None:
    """A machine with a CPU torch at hand would write that one's hash into the list of GPUs."""
    hash_py = runpy.run_path(str(ROOT / "requirements" / "hash.py"))
    archive = {"archive_info": {"hashes": {"sha256": "a" * 64}}}
    item = {"metadata": {"name": "torch", "version": "2.13.0"}, "download_info": archive}
    lines = hash_py["hashed_lines"](["torch==2.13.0"], [item])
    assert lines == [f"torch==2.13.0 --hash=sha256:{'a' * 64}"]
    item["metadata"]["version"] = "2.13.0+cpu"
    with pytest.raises(SystemExit, match="a build of another index"):
        hash_py["hashed_lines"](["torch==2.13.0"], [item])


def test_the_package_asks_for_what_its_code_imports_and_for_nothing_else() -> None:
    extras = [*EXTRAS["cluster"], *EXTRAS["lora"], *EXTRAS["s3"], *EXTRAS["language"]]
    asked = {canonicalize_name(one.name) for one in [*LIGHT, *extras]}
    brought = {
        "pydantic_core": "pydantic",  # One exact version of it.
        "vllm": "vllm",  # Of the extras teacher and cpu.
    }
    owners = packages_distributions()
    apart = {"lm_eval", *TRACKERS}  # In lists of their own, which need not be installed here.
    imported = {
        name: {brought[name]} if name in brought else {canonicalize_name(o) for o in owners[name]}
        for name in top_level_imports() - set(sys.stdlib_module_names) - {"raystill"} - apart
    }
    assert not {name for name, owner in imported.items() if not owner & (asked | {"vllm"})}
    assert not asked - {one for owner in imported.values() for one in owner}


def top_level_imports() -> set[str]:
    names: set[str] = set()
    folders = [ROOT / folder for folder in (*ROOMS, "raystill")]
    for path in [ROOT / "driver.py", *(file for one in folders for file in one.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names
