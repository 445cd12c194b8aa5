"""Conditional writes on S3: make an object only if there is none, replace it only if unchanged.

pyarrow's file systems cannot do this, so these few requests go through obstore (extra ``s3``),
with the credentials, the region and the endpoint that pyarrow has for the same URI. Everything else
stays with pyarrow. S3 itself has conditional writes, and so have most services that speak its
protocol; one without them answers 501, or ignores the condition, which ``Objects.probe`` finds out.
"""

import configparser
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs as pafs
    from obstore.store import S3Store

logger = logging.getLogger(__name__)

RETRY_PAUSES_S = (0.2, 1.0, 3.0)
"""Pauses before a request is made again whose connection broke: whether it had been carried out is
not known. obstore itself repeats what was answered with 429 or 5xx."""
BUSY_RETRIES = 6
"""How often it does so, with growing pauses: some five seconds in all."""
REQUEST_TIMEOUT_S = 600
"""Longest time of one request, in which up to 256 MB are sent."""

ANSWER_WAIT_S = 10.0
"""Seconds that a store has for its first answer: some retry for minutes by themselves, and one that
takes a connection and says nothing has no end."""
WAITING = "raystill: the first answer"
"""Name of the threads that wait for it."""

IN_MEMORY = 16 << 20
"""Bytes of a file on its way to an object store that stay in memory; more are on this disk."""

T = TypeVar("T")


def in_time(ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises; TimeoutError where it takes longer than `ANSWER_WAIT_S`.

    In a daemon thread, since a call into a file system cannot be interrupted: it goes on, and the
    process has to end without it (`console.leave`).
    """
    answers: list[Callable[[], T]] = []

    def call() -> None:
        try:
            answer = ask()
        except Exception as error:  # Of every file system its own kind.
            answers.append(partial(_raise, error))
        else:
            answers.append(lambda: answer)

    thread = threading.Thread(target=call, name=WAITING, daemon=True)
    thread.start()
    thread.join(ANSWER_WAIT_S)
    if not answers:
        raise TimeoutError(f"no answer in {ANSWER_WAIT_S:.0f} s")
    return answers[0]()


def _raise(error: Exception) -> NoReturn:
    raise error


@dataclass(frozen=True)
class Objects:
    """The objects of a bucket whose names begin with ``prefix``; names are relative to it.

    One for each URI and process, so that connections and credentials are used again. Threads may
    share it. Methods raise OSError, FileNotFoundError for an object or bucket that is not there.
    """

    store: "S3Store"
    prefix: str
    refused: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set once the service has said that it has no conditional writes."""

    def create(self, name: str, data: bytes) -> bool:
        """Make an object with one request; False, and nothing is written, if the name is taken.

        It may be taken by this very call: where a connection broke after the service had written
        the object, the second try finds it.

        Raises ConditionIgnored if the service has no conditional writes and says so.
        """
        return self._put(name, data, "create")

    def version(self, name: str) -> str:
        """The version (ETag) of an object."""
        import obstore

        return str(_tried(lambda: obstore.head(self.store, self.prefix + name))["e_tag"])

    def read(self, name: str) -> tuple[bytes, str]:
        """The content of an object and its version."""
        import obstore

        def get() -> tuple[bytes, str]:
            found = obstore.get(self.store, self.prefix + name)
            return bytes(found.bytes()), str(found.meta["e_tag"])

        return _tried(get)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Put ``data`` in the place of an object of this version; False if it is another one."""
        try:
            return self._put(name, data, {"e_tag": version})
        except FileNotFoundError:
            return False

    def probe(self, name: str) -> bool:
        """Whether the service keeps the condition: a name is made twice, the second must fail."""
        try:
            self.create(name, b"")
            return not self.create(name, b"")
        except ConditionIgnored:
            return False
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Delete an object."""
        import obstore

        obstore.delete(self.store, self.prefix + name)

    def _put(self, name: str, data: bytes, mode: Any) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        def put() -> bool:
            try:
                obstore.put(self.store, self.prefix + name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            except NotSupportedError as error:
                raise ConditionIgnored(_first_line(error)) from error
            return True

        try:
            return _tried(put)
        except ConditionIgnored as error:
            self.refused.set()
            logger.warning("the object store has no conditional writes (%s)", error)
            raise


class ConditionIgnored(Exception):
    """The service answers that it has no conditional writes."""


def _tried(request: Callable[[], T]) -> T:
    """The result of a request that may be repeated; as OSError, what it fails with at last."""
    from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

    for pause in (*RETRY_PAUSES_S, None):
        try:
            return request()
        except GenericError as error:
            if "501 Not Implemented" in str(error):
                raise ConditionIgnored(_first_line(error)) from error
            if pause is None:
                raise OSError(_first_line(error)) from error
            time.sleep(pause)
        except FileNotFoundError as error:
            raise FileNotFoundError(_first_line(error)) from error
        except PermissionDeniedError as error:
            raise PermissionError(_first_line(error)) from error
        except BaseError as error:
            raise OSError(_first_line(error)) from error
    raise AssertionError("the last try returns or raises")


def _first_line(error: BaseException) -> str:
    """What happened, without obstore's description of the request, which goes on for pages."""
    return str(error).strip().partition("\n")[0]


@lru_cache(maxsize=64)
def objects_of(uri: str, region: str, root: str) -> Objects | None:
    """Conditional writes below a URI of pyarrow (``s3://[key:secret@]bucket/path?settings``).

    region: that of pyarrow's file system, which asks the bucket where none is stated. root: bucket
    and path as pyarrow reads them, without the URI's escapes.
    None for other object stores, or if obstore is not installed.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        return None
    try:
        from obstore.store import S3Store
    except ImportError:
        return None
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint = query.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
    from_environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    plain = (endpoint or from_environment or "").startswith("http://")
    settings: dict[str, Any] = {
        "region": region,
        "retry_config": {"max_retries": BUSY_RETRIES},
        "client_options": {"allow_http": plain, "timeout": f"{REQUEST_TIMEOUT_S}s"},
        **({"endpoint": endpoint.rstrip("/")} if endpoint else {}),
    }
    if parts.username:
        settings["access_key_id"] = unquote(parts.username)
        settings["secret_access_key"] = unquote(parts.password or "")
    else:
        settings |= _profile()
    bucket, _, prefix = root.rstrip("/").partition("/")
    return Objects(S3Store(bucket, **settings), f"{prefix}/" if prefix else "")


@contextmanager
def uploaded_whole(filesystem: "pafs.FileSystem", target: str) -> "Iterator[pa.NativeFile]":
    """An output that is uploaded when all of it is there.

    A stream of pyarrow's publishes what it has when it is closed, also where an error closes it.
    """
    import pyarrow as pa

    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as room:
        stream = pa.PythonFile(room, mode="w")
        yield stream
        stream.flush()
        room.seek(0)
        with filesystem.open_output_stream(target) as upload:
            shutil.copyfileobj(room, upload, 1 << 20)


def _profile() -> dict[str, Any]:
    """The credentials of the profile in AWS's files, where the environment has none.

    obstore finds those of the environment, of a container and of an instance by itself. A profile
    with a role or single sign-on needs boto3.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ:
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    folder = os.path.expanduser("~/.aws")
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", f"{folder}/credentials")
    config = os.environ.get("AWS_CONFIG_FILE", f"{folder}/config")
    found = configparser.ConfigParser(interpolation=None, strict=False)
    found.read([config, path])
    for section in (profile, f"profile {profile}"):
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        values = [found.get(section, name, fallback=None) for name in names]
        if values[0] and values[1]:
            keys = ("access_key_id", "secret_access_key", "session_token")
            return {key: v for key, v in zip(keys, values, strict=True) if v is not None}
    if not any(found.has_section(section) for section in (profile, f"profile {profile}")):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        logger.warning("profile %s of %s has no keys, and its role needs boto3", profile, config)
        return {}
    return {"credential_provider": Boto3CredentialProvider()}
