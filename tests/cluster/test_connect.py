"""Starting and leaving a local cluster: quiet, reachable from here only, and asked before use; what
is shipped to an existing one.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raystill.base.errors import RunError
from raystill.cluster.job import connect as connecting
from raystill.cluster.job.connect import JOB_VARIABLE, NOT_SHIPPED, connect, quiet_locally
from raystill.config.run import ClusterConfig
from tests.support.project_copy import ROOMS, copy_project, package_modules

ROOT = Path(__file__).resolve().parents[2]

SESSION = """
import os, sys
from pathlib import Path
from raystill.cluster.job import connect
from raystill.cluster.check.cluster import check_cluster
from raystill.config.run import ClusterConfig, RunConfig

logs = Path(sys.argv[1])
connect.connect(ClusterConfig(num_cpus=2, object_store_memory_gib=0.1), logs)
import ray
print("cpus", ray.cluster_resources()["CPU"])
print("linked", (logs / "ray").is_dir())

@ray.remote(num_cpus=0)
def room():
    import raystill.base.formatting
    print("a worker's chatter")
    return raystill.base.formatting.share(0.5)

print("worker", ray.get(room.remote()))
def problems(workers):
    config = RunConfig.model_validate({
        "teacher": {"model": "x"}, "student": {"layers": [0]}, "prompts": {"path": "x"},
        "training": {"num_workers": workers}})
    return check_cluster(config)
print("fits", problems(1))
for problem in problems(64):
    print("refused", problem)
connect.disconnect()
print("left", ray.is_initialized())
"""


@pytest.mark.ray
def test_a_local_cluster_is_quiet_and_says_what_it_cannot_hold(tmp_path: Path) -> None:
    quiet = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # Not the project's folder: workers must find the rooms all the same.
        env=quiet,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:4] == ["cpus 2.0", "linked True", "worker 50 %", "fits []"]
    assert lines[4].startswith("refused training.num_workers: the run needs CPU: 65")
    assert lines[5:] == ["left False"]
    assert (tmp_path / "logs" / "driver.log").exists()


def test_a_ray_client_address_is_refused_with_the_way_to_submit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunError, match="ray job submit"):
        connect(ClusterConfig(address="ray://10.0.0.1:10001"), None)


def test_a_local_cluster_with_a_dashboard_tells_it_of_its_tasks():
    """Only without one are task events off and figures exported less often."""
    watched, unwatched = quiet_locally(dashboard=True), quiet_locally(dashboard=False)
    assert not any(name.startswith("RAY_task_events") for name in watched)
    assert unwatched["RAY_task_events_report_interval_ms"] == "0"
    assert watched.items() < unwatched.items()


def packed(folder: Path, target: Path, excludes: list[str], parent: bool = False) -> list[str]:
    """The files of a package that Ray makes of a folder, unpacked into ``target``."""
    from ray._private.runtime_env.packaging import create_package

    archive = target.with_suffix(".zip")
    create_package(str(folder), archive, True, include_parent_dir=parent, excludes=excludes)
    with zipfile.ZipFile(archive) as package:
        package.extractall(target)
        return [name for name in package.namelist() if not name.endswith("/")]


def run_python(*words: str, folder: Path, **variables: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, with what a run and a build leave in it, and a deeper folder named models."""
    folder = copy_project(tmp_path_factory.mktemp("clone") / "project")
    left = ("models/a/weights", "runs/b/rows", "build/lib/raystill/driver.py", ".venv/bin/python")
    caches = ("raystill/base/__pycache__/errors.pyc", ".mypy_cache/x", "raystill.egg-info/x")
    for name in (*left, *caches, ".git/HEAD", "examples/models/prompts.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    return folder


@pytest.fixture(scope="module", params=["submitted by the driver", "plain ray job submit"])
def job_copy(request: pytest.FixtureRequest, project: Path, tmp_path_factory: Any) -> Path:
    """A job's copy of the project; the plain line has Ray's own excludes and no others."""
    from ray._private.ray_constants import get_runtime_env_default_excludes as of_ray

    by_driver = request.param == "submitted by the driver"
    folder: Path = tmp_path_factory.mktemp("job") / "copy"
    names = packed(project, folder, [*of_ray(), *(NOT_SHIPPED if by_driver else ())])
    assert set(Counter(names).values()) == {1}
    return folder


def test_a_jobs_copy_holds_each_module_once(job_copy: Path) -> None:
    """The driver alone is there twice, as in the project: as a script and as raystill.driver."""
    modules = {str(path.relative_to(job_copy)) for path in job_copy.rglob("*.py")}
    others = ("examples", "benchmarks")
    ours = {name for name in modules if name.split("/")[0] not in others}
    assert ours == {"driver.py"} | package_modules()
    assert not [path for path in job_copy.rglob("*") if path.is_symlink()]


def test_a_jobs_copy_holds_run_files_and_prompts_but_nothing_that_was_made(job_copy: Path) -> None:
    tops = {path.name for path in job_copy.iterdir() if path.is_file() or any(path.iterdir())}
    assert tops >= {"driver.py", "configs", "examples", "raystill"}
    assert not tops & {"models", "runs", "build", "tests", "docs", ".git", ".venv", *ROOMS}
    assert (job_copy / "configs" / "tiny.yaml").is_file()
    assert (job_copy / "examples" / "prompts" / "quickstart.jsonl").is_file()
    assert (job_copy / "examples" / "models" / "prompts.jsonl").is_file()  # Not the top's models.
    for made in ("__pycache__", "*.egg-info", ".mypy_cache"):
        assert not [path for path in job_copy.rglob(made) if any(path.iterdir())]


def test_the_driver_runs_in_a_jobs_copy(job_copy: Path, tmp_path: Path) -> None:
    assert "rows_per_step" in run_python("driver.py", "fields", folder=job_copy)
    code = "import raystill.driver; print(raystill.driver.__file__)"
    out = run_python("-c", code, folder=tmp_path, PYTHONPATH=str(job_copy))
    assert out.strip() == str(job_copy / "raystill" / "driver.py")


def in_job(monkeypatch: pytest.MonkeyPatch, runtime_env: dict[str, Any]) -> None:
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": runtime_env}))


def shipped(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, Any]:
    """What a driver whose code is in ``root`` ships."""
    monkeypatch.setattr(connecting, "project_root", lambda: root)
    env = connecting._runtime_env()
    assert env.pop("env_vars")
    return env


def test_a_driver_that_joins_a_cluster_ships_the_project(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    env = shipped(monkeypatch, project)
    assert env == {"working_dir": str(project), "excludes": NOT_SHIPPED}
    in_job(monkeypatch, {"env_vars": {"HF_TOKEN": "x"}})  # A job whose code is on the nodes.
    assert shipped(monkeypatch, project) == env


def test_a_jobs_driver_ships_nothing_and_leaves_the_jobs_variables(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    monkeypatch.chdir(project)
    variables = {"RAY_USAGE_STATS_ENABLED": "1"}
    in_job(monkeypatch, {"working_dir": "gcs://project.zip", "env_vars": variables})
    monkeypatch.setattr(connecting, "project_root", lambda: project)
    env = connecting._runtime_env()
    assert set(env) == {"env_vars"}
    assert set(env["env_vars"]) == set(connecting.QUIET) - set(variables)


def test_a_jobs_driver_from_elsewhere_ships_its_package(
    monkeypatch: pytest.MonkeyPatch, project: Path, tmp_path: Path
) -> None:
    """E.g. the driver of a node's image, with run files that the job has shipped."""
    monkeypatch.chdir(tmp_path)
    in_job(monkeypatch, {"working_dir": "gcs://run_files.zip"})
    env = {"py_modules": [str(project / "raystill")], "excludes": ["__pycache__"]}
    assert shipped(monkeypatch, project) == env


@pytest.fixture
def site_packages(project: Path, tmp_path: Path) -> Path:
    """An installed package: plain folders, beside another package's driver.py."""
    folder = tmp_path / "site-packages"
    shutil.copytree(project / "raystill", folder / "raystill", symlinks=False)
    (folder / "driver.py").write_text("# of another package\n")
    return folder


@pytest.mark.parametrize("job", [{}, {"working_dir": "gcs://run_files.zip"}], ids=["alone", "job"])
def test_an_installed_driver_ships_its_package(
    monkeypatch: pytest.MonkeyPatch, site_packages: Path, job: dict[str, Any]
) -> None:
    in_job(monkeypatch, job)
    package = str(site_packages / "raystill")
    env = {"py_modules": [package], "excludes": ["__pycache__"]}
    assert shipped(monkeypatch, site_packages) == env


@pytest.mark.parametrize("kind", ["installed", "project"])
def test_a_package_that_was_shipped_is_imported_whole(
    site_packages: Path, project: Path, tmp_path: Path, kind: str
) -> None:
    package = (site_packages if kind == "installed" else project) / "raystill"
    names = packed(package, tmp_path / "modules", ["__pycache__"], parent=True)
    assert sorted(name for name in names if name.endswith(".py")) == sorted(package_modules())
    code = "import raystill.datasets.store.store as store; print(store.__file__)"
    out = run_python("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path / "modules"))
    assert out.startswith(str(tmp_path / "modules" / "raystill"))


def test_what_a_job_has_set_is_not_set_again(
    monkeypatch: pytest.MonkeyPatch, site_packages: Path
) -> None:
    in_job(monkeypatch, {"py_modules": ["gcs://raystill.zip"]})
    assert shipped(monkeypatch, site_packages) == {"excludes": ["__pycache__"]}
