"""Submitting a run to a cluster as a Ray job: ship the code, follow its log, pass signals on.

*Waits for*: the job's end. *Unblocked by*: its last status, a second signal, or a cluster that has
not answered for a minute. The job does not need this process: it goes on without it.

    python driver.py submit configs/cluster_8b_from_70b.yaml --address http://127.0.0.1:8265
"""

import asyncio
import contextlib
import http.client
import os
import shlex
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from raystill.base.console import printable
from raystill.base.errors import RunError, config_error
from raystill.base.redact import redact
from raystill.base.run_folder import require_path
from raystill.cluster.job.connect import NOT_SHIPPED
from raystill.cluster.job.driver_process import StopSignals
from raystill.config.load import load_config

DEFAULT_STOP_WAIT_S = 900
REACH_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
LOST_AFTER_S = 60.0
POLL_S = 1.0
LOG_GRACE_S = 10.0
# Ray sends SIGTERM to the driver and SIGKILL so many seconds later; it reads the number in the
# environment of the job's supervisor, which is the job's own (ray 2.60, job_supervisor.py).
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
# Ray lets both win over the address that a client is given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

T = TypeVar("T")


class JobClient(Protocol):
    """What is needed of ``ray.job_submission.JobSubmissionClient``."""

    def submit_job(self, *, entrypoint: str, runtime_env: dict[str, Any]) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def stop_job(self, job_id: str) -> bool: ...
    def tail_job_logs(self, job_id: str) -> Any: ...


@dataclass(frozen=True)
class Submission:
    """What is submitted where. ``variables``: NAME (taken from here) or NAME=VALUE for the job."""

    run_file: str
    address: str
    overrides: Sequence[str] = ()
    working_dir: str = "."
    stop_wait_s: int = DEFAULT_STOP_WAIT_S
    python: str = "python"
    variables: Sequence[str] = ()

    def entrypoint(self) -> str:
        """The job's shell command; the run file by its path inside the working directory."""
        root = Path(self.working_dir).resolve()
        if not (root / "driver.py").is_file():
            raise config_error(
                "--working-dir",
                f"{self.working_dir} has no driver.py; name the folder of Raystill's code",
            )
        file = Path(self.run_file).resolve()
        if not file.is_relative_to(root):
            raise config_error(
                self.run_file,
                f"lies outside the working directory {root}, which is all that is shipped; copy it "
                "there, or name another --working-dir",
            )
        words = [self.python, "driver.py", "run", str(file.relative_to(root))]
        for override in self.overrides:
            if redact(override) != override:
                raise config_error(
                    f"--set {override}",
                    "holds credentials, and a job's command is shown to all who see the cluster; "
                    "give them in variables: --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY",
                )
            words += ["--set", override]
        return shlex.join(words)

    def runtime_env(self, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
        """What Ray sets up for the job: the code without models, runs and caches, and variables."""
        if self.stop_wait_s < 1:
            raise config_error("--stop-wait-s", f"is {self.stop_wait_s}; expected 1 second or more")
        variables = {STOP_WAIT_VARIABLE: str(self.stop_wait_s)}
        for variable in self.variables:
            name, equals, value = variable.partition("=")
            if not equals and name not in environment:
                raise config_error(
                    f"--env {name}", "is not set here; set it, or give it as NAME=VALUE"
                )
            variables[name] = value if equals else environment[name]
        return {
            "working_dir": str(Path(self.working_dir).resolve()),
            "excludes": list(NOT_SHIPPED),
            "env_vars": variables,
        }


def submit(submission: Submission, out: TextIO | None = None) -> int:
    """Submit the run, write the job's log to ``out`` (standard output), and return its exit code.

    Raises ConfigError for what can be known before anything is sent, RunError where the cluster
    does not answer or refuses the job.
    """
    load_config(submission.run_file, submission.overrides)
    require_path(submission.working_dir)
    entrypoint, runtime_env = submission.entrypoint(), submission.runtime_env()
    shown = redact(submission.address)
    with StopSignals() as signals:
        client = connect_client(submission.address)
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except Exception as error:
            raise RunError(f"{shown} did not take the job: {_first_line(error)}") from error
        note(f"submitted to {shown} as {job}: {entrypoint}")
        return follow(client, job, signals, submission.stop_wait_s, out or sys.stdout)


def connect_client(address: str) -> JobClient:
    """A client of the job server at ``address``, the dashboard's URL. Raises RunError."""
    shown = redact(address)
    if _scheme(address) not in ("http", "https"):
        raise config_error(
            "--address",
            f"is {shown!r}; expected the URL of the cluster's dashboard, e.g. http://127.0.0.1:8265"
            " (ray dashboard ray_config.yaml forwards it)",
        )
    if why := unreachable(address):
        raise RunError(
            f"no job server answers at {shown} ({why}); start a cluster (ray up ray_config.yaml), "
            "forward its dashboard (ray dashboard ray_config.yaml), or correct --address"
        )
    for name in ADDRESS_VARIABLES:
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client, whose requests would otherwise wait for an answer for ever."""

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": REQUEST_TIMEOUT_S, **kwargs})

    try:
        return Client(address)
    except AuthenticationError as error:
        raise RunError(
            f"{shown} asks for a token and did not take this one; set RAY_AUTH_MODE=token and the "
            "cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except Exception as error:
        raise RunError(f"{shown} is no job server of Ray: {_first_line(error)}") from error


def unreachable(address: str, timeout_s: float = REACH_TIMEOUT_S) -> str | None:
    """Why nobody answers HTTP at ``address``, or None; refusing without a token is an answer."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return redact(str(getattr(error, "reason", None) or error) or type(error).__name__)
    return None


def _scheme(address: str) -> str:
    try:
        return urllib.parse.urlsplit(address).scheme
    except ValueError:  # Of brackets that hold no address.
        return ""


def follow(client: JobClient, job: str, signals: StopSignals, stop_wait_s: int, out: TextIO) -> int:
    """Show the job's log until it has ended; its exit code. The first signal stops the job."""
    log = LogTail(client, job, out)
    log.start()
    asked_at = None
    while not (details := patiently(lambda: client.get_job_info(job), job)).status.is_terminal():
        if signals.received and asked_at is None:
            asked_at = time.monotonic()
            note(
                f"stopping {job}: it may take {stop_wait_s} s to write a checkpoint (once more to "
                "leave it to that)"
            )
            patiently(lambda: client.stop_job(job), job)
        time.sleep(POLL_S)
    log.finish()
    if asked_at is not None and time.monotonic() - asked_at >= stop_wait_s:
        note(f"{job} was not done after {stop_wait_s} s and was killed; raise --stop-wait-s")
    return exit_code(details, signals.received)


def exit_code(details: Any, stopped_by: int) -> int:
    """The driver's own exit code, as far as Ray tells it: of a stopped job it keeps none.

    ``details``: Ray's JobDetails. ``stopped_by``: the signal that we passed on, or 0.
    """
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return 128 + (stopped_by or signal.SIGTERM)
    if details.driver_exit_code is None:
        note(f"the job could not be run: {redact(details.message or 'Ray gives no reason')}")
        return 1
    code = int(details.driver_exit_code)
    return code if code >= 0 else 128 - code  # Of a signal's number.


class LogTail(threading.Thread):
    """Writes a job's log as it grows, and what it missed at the end; survives a lost connection."""

    def __init__(self, client: JobClient, job: str, out: TextIO) -> None:
        super().__init__(name="job log", daemon=True)
        self._client, self._job, self._out = client, job, out
        self._written = 0  # characters

    def run(self) -> None:
        while True:
            try:
                asyncio.run(self._tail())
                return
            except Exception:
                time.sleep(POLL_S)  # The watching thread notices where the cluster is gone.

    async def _tail(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._job):
            fresh = text[max(0, self._written - seen) :]  # A new connection begins at the start.
            seen += len(text)
            self._write(fresh)

    def finish(self) -> None:
        """Wait for the last lines; take them another way where they do not come."""
        self.join(LOG_GRACE_S)
        if self.is_alive():
            with contextlib.suppress(OSError, RuntimeError):
                self._write(self._client.get_job_logs(self._job)[self._written :])

    def _write(self, text: str) -> None:
        self._written += len(text)
        self._out.write(text)
        self._out.flush()


def patiently(ask: Callable[[], T], job: str) -> T:
    """The answer; a cluster that does not give one is asked again, for a minute. RunError then."""
    deadline = time.monotonic() + LOST_AFTER_S
    while True:
        try:
            return ask()
        except (OSError, RuntimeError) as error:  # No connection; an answer that is an error.
            if time.monotonic() >= deadline:
                raise RunError(
                    f"the cluster has not answered for {LOST_AFTER_S:.0f} s "
                    f"({_first_line(error)}); {job} may go on there: ray job logs --follow {job}"
                ) from error
        time.sleep(POLL_S)


def note(text: str) -> None:
    """A line of ours, beside the job's log on standard output."""
    print(f"[submit] {printable(text)}", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
