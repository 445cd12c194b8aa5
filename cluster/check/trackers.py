"""Services outside, before anything is spent: the trackers, and a teacher behind an API.

Is each tracker's package here, and does it know where to write? Can the service do what the run
wants, and what may it cost? Looks for packages without importing them: wandb and mlflow take
seconds.
"""

import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.compute as pc

from raystill.base.errors import Problem
from raystill.base.records import read_bounded
from raystill.base.redact import redact
from raystill.base.run_folder import inside_job_package
from raystill.config.base import ApiConfig, PricesConfig
from raystill.config.run import RunConfig
from raystill.config.training import MlflowConfig, OutputConfig, WandbConfig
from raystill.datasets.prompts.tables import PromptTables

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
    address = environment.get("WANDB_BASE_URL") or WANDB_HOST
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:
        host = ""
    if not host:
        message = f"$WANDB_BASE_URL is {address!r}, which names no server; correct or unset it"
        yield Problem("output.wandb", message)
        return
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
        return word in read_bounded(file).decode(errors="replace")
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


def check_api(config: RunConfig) -> Iterator[Problem]:
    """With ``engine: api``: what a service cannot do, and the key that it wants."""
    if config.teacher.engine != "api":
        return
    text_only = config.teacher.gives_text_only
    if text_only and config.signal.kind != "text":
        yield Problem(
            "signal.kind",
            f"is {config.signal.kind!r}, but an API teacher gives its text alone; set signal: "
            "{kind: text} and objective: {cross_entropy: 1}, or teacher.api.ids: true where the "
            "service is a vLLM server, or teacher.api.top_logprobs: 20 where it tells the log "
            "probabilities of its tokens",
        )
    yield from _check_top_logprobs(config)
    if not text_only and config.signal.kind == "hidden":
        yield Problem(
            "signal.kind",
            "is 'hidden', but a server gives no hidden states; set signal.kind: topk",
        )
    if not config.teacher.scores and config.evaluation.free_running.teacher_scores:
        yield Problem(
            "evaluation.free_running.teacher_scores",
            "is true, but an API teacher cannot score the student's answers; set it to false",
        )
    yield from _check_key(config.teacher.api.api_key_env)


def _check_key(name: str | None) -> Iterator[Problem]:
    """Is the key here, and can a header of HTTP hold it?"""
    key = "none" if name is None else os.environ.get(name, "")
    if not key:
        yield Problem(
            "teacher.api.api_key_env",
            f"names ${name}, which is not set here; export it (and give it to a job with raystill "
            f"submit --env {name}), or set api_key_env: null where the service wants no key",
        )
    elif not (key.isascii() and key.isprintable()) or key != key.strip():
        yield Problem(
            "teacher.api.api_key_env",
            f"names ${name}, whose value has spaces or a line's end around it, or characters that "
            "no key has; export it again, without them",
        )


def _check_top_logprobs(config: RunConfig) -> Iterator[Problem]:
    """What a service that names its tokens in words cannot give."""
    named, signal = config.teacher.api.top_logprobs, config.signal
    if named is None:
        return
    if signal.kind == "text":
        yield Problem(
            "teacher.api.top_logprobs",
            f"is {named}, but signal.kind is 'text', which needs none; set signal.kind: topk, or "
            "leave it out",
        )
    wanted = {"signal.top_k": signal.top_k if signal.kind == "topk" else 0}
    if config.evaluation.enabled:
        wanted["evaluation.top_k"] = config.evaluation.top_k
    for name, top_k in wanted.items():
        if top_k > named:
            yield Problem(
                name,
                f"is {top_k}, but the service names {named} tokens (teacher.api.top_logprobs); "
                f"set it to {named} or less",
            )


def api_notices(config: RunConfig, tables: PromptTables) -> Iterator[str]:
    """What a run with an API teacher may cost, and whether its key travels in the open."""
    api = config.teacher.api
    if config.teacher.engine != "api" and api.base_url is not None:
        yield (
            f"teacher.api.base_url is set, but teacher.engine is {config.teacher.engine!r}, so the "
            "service is not asked; set teacher.engine: api to ask it"
        )
    if config.teacher.engine != "api" or api.base_url is None:
        return
    host = urlsplit(api.base_url).hostname or ""
    if api.base_url.startswith("http:") and host not in ("localhost", "127.0.0.1", "::1"):
        yield f"teacher.api.base_url is not https: prompts and key can be read on the way to {host}"
    rows = tables.train.num_rows + tables.held_out.num_rows
    prompts = sum(
        int(pc.sum(pc.list_value_length(t["prompt_ids"])).as_py() or 0)
        for t in (tables.train, tables.held_out)
    )
    longest = rows * config.teacher.sampling.max_tokens
    if not rows:  # It is a judge, which `judge_notices` tells of.
        return
    yield from _way_notices(config, rows)
    if api.prices is None:
        yield (
            f"teacher.api.prices is unset, so spending is not counted: {rows:,} answers to "
            f"{prompts:,} prompt tokens, with at most {longest:,} response tokens"
        )
        return
    prices = api.prices if api.batch is None else api.prices.times(api.batch.price_factor)
    most = (prompts * prices.input + longest * prices.output) / 1e6
    mean = longest / rows / 2
    expected = (prompts * prices.input + rows * mean * prices.output) / 1e6
    short = api.max_cost is not None and api.max_cost < expected
    too_low = ", less than is expected, so that the run would not reach its end" if short else ""
    yield (
        f"the teacher is expected to cost {expected:,.4g}, if answers have {mean:,.4g} tokens on "
        f"average, half of what they may have; it may cost up to {most:,.4g} ({rows:,} answers, "
        f"{prompts:,} prompt tokens of this tokenizer at {prices.input:g} and at most {longest:,} "
        f"response tokens at {prices.output:g} a million{_dated(prices)}; nothing cached, nothing "
        f"stored before); {limit_of(api)}{too_low}"
    )


def _dated(prices: PricesConfig) -> str:
    """Of which day the prices are."""
    return ", prices of an unknown day" if prices.as_of is None else f", prices of {prices.as_of}"


def limit_of(api: ApiConfig) -> str:
    """What ends the spending of a teacher, in words."""
    if api.max_cost is None:
        return "no limit is set (teacher.api.max_cost)"
    return f"teacher.api.max_cost stops it at {api.max_cost:g}"


def _way_notices(config: RunConfig, rows: int) -> Iterator[str]:
    """What the run waits for, or asks, before its first row."""
    api = config.teacher.api
    if api.ids:
        yield (
            f"{api.base_url} is asked by token ids; when the teacher starts, its tokenizer, "
            "vocabulary, context and logprobs are compared with what the run needs, for a few "
            "hundred tokens"
        )
    if api.batch is not None:
        size = min(api.batch.max_rows, config.rows_ahead)
        batches = math.ceil(rows / size)
        fewer = "; fewer with a larger teacher.api.batch.max_rows and stream.max_rows_ahead"
        yield (
            f"answers come in batches of up to {size:,} rows: {batches:,} for {rows:,} rows, one "
            f"after another, each within {api.batch.window}{fewer if batches > 1 else ''}"
        )
