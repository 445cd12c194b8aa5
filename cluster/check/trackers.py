"""Trackers before anything is spent: is each one's package here, and does it know where to write?

Looks for packages without importing them: wandb and mlflow take seconds.
"""

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from raystill.base.errors import Problem
from raystill.base.redact import redact
from raystill.base.run_folder import inside_job_package
from raystill.config.run import MlflowConfig, OutputConfig, WandbConfig

WANDB_HOST = "https://api.wandb.ai"
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
MLFLOW_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def check_trackers(
    config: OutputConfig, environment: Mapping[str, str] = os.environ
) -> Iterator[Problem]:
    """A problem for each tracker that ``output`` names and that could not take the run."""
    if config.wandb is not None:
        yield from check_packages("wandb", ["wandb"])
        yield from check_wandb(config.wandb, environment)
    if config.mlflow is not None:
        uri = config.mlflow.tracking_uri or environment.get("MLFLOW_TRACKING_URI", "")
        database = uri.partition(":")[0].partition("+")[0] in MLFLOW_DATABASES
        needed = ["mlflow", "sqlalchemy", "alembic"] if database else ["mlflow"]
        yield from check_packages("mlflow", needed)
        yield from check_mlflow(config.mlflow, uri)
    if config.trackio is not None:
        yield from check_packages("trackio", ["trackio"])


def check_packages(extra: str, packages: list[str]) -> Iterator[Problem]:
    """Are the packages of an extra installed?"""
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        yield Problem(
            f"output.{extra}",
            f"needs the package {' and '.join(missing)}, which is not installed here; "
            f"pip install 'raystill[{extra}]' (in a clone: pip install -e '.[{extra}]'), or "
            f"remove output.{extra}",
        )


def is_installed(package: str) -> bool:
    """Whether Python would import it from a file. A bare folder of the name, as these tools leave
    in the current folder, is none.
    """
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_wandb(config: WandbConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Is there a key to log in with? In a run nobody is there to type one."""
    if config.mode == "offline" or any(environment.get(name) for name in WANDB_KEYS):
        return
    host = urlsplit(environment.get("WANDB_BASE_URL") or WANDB_HOST).hostname or ""
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    netrc = [home / ".netrc", home / "_netrc"]
    if environment.get("NETRC"):
        netrc = [Path(environment["NETRC"])]
    settings = Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings"
    if any(mentions(file, host) for file in netrc) or mentions(settings, "api_key"):
        return
    yield Problem(
        "output.wandb.mode",
        f"is online, but there is no key for {host}; set WANDB_API_KEY, run 'wandb login', or set "
        "output.wandb.mode: offline",
    )


def mentions(file: Path, word: str) -> bool:
    """Whether a text file can be read and has the word."""
    try:
        return word in file.read_text(errors="replace")
    except OSError:
        return False


def check_mlflow(config: MlflowConfig, uri: str) -> Iterator[Problem]:
    """Is there a place that MLflow still takes, and that outlives the run?"""
    where = "output.mlflow.tracking_uri"
    if not uri:
        yield Problem(
            where,
            "is not set, and neither is MLFLOW_TRACKING_URI; name a server (http://HOST:5000) or a "
            "database (sqlite:////absolute/path/mlflow.db)",
        )
    elif "://" not in uri or uri.startswith("file:"):
        yield Problem(
            where,
            f"({redact(uri)}) is a folder, which MLflow no longer writes to; name a database "
            "(sqlite:////absolute/path/mlflow.db) or a server (http://HOST:5000)",
        )
    elif uri.startswith("sqlite:///"):
        yield from check_sqlite(where, uri)


def check_sqlite(where: str, uri: str) -> Iterator[Problem]:
    """Can the database's file be made there?"""
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not path.is_absolute() and inside_job_package():
        yield Problem(
            where,
            f"({uri}) is relative, and this Ray job's current folder is a copy that Ray deletes; "
            "name an absolute path (sqlite:////absolute/path/mlflow.db)",
        )
    elif not path.absolute().parent.is_dir():
        yield Problem(
            where,
            f"({uri}) is in the folder {path.absolute().parent}, which does not exist; make it, or "
            "name another",
        )
