"""The run folder: everything that a run writes, on a local path or in an object store.

Every process of a run opens the folder by its path. A ``RunFolder`` holds only that string, so that
it pickles. Names inside the folder are relative and use ``/``: ``checkpoints/state.json``.
"""

import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.object_store import Objects, objects_of, uploaded_whole
from raystill.base.redact import redact

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
TRAIN_PROMPTS = "prompts/train.parquet"
HELD_OUT_PROMPTS = "prompts/held_out.parquet"
MESSAGES = "prompts/messages.parquet"
PROMPT_COLUMNS = "prompts/columns.parquet"
HELD_OUT_FIELDS = "prompts/held_out_fields.parquet"
CHECKS = "checks"
SPENDING = "spending.jsonl"
METRICS = "metrics.jsonl"
METRICS_DISCARDED = "metrics.discarded.jsonl"
EVALUATION = "evaluation.jsonl"
ANSWERS = "answers.jsonl"
HELD_OUT = "held_out.parquet"
PROBE = "probe.json"
SUMMARY = "summary.json"
TIMELINE = "timeline.jsonl"
CHECKPOINTS = "checkpoints"
STUDENT = "student"
ADAPTER = "adapter"
BASE = "base"
LOGS = "logs"
STORE = "teacher_store"
CALIBRATION = "calibration"
LAYERS = "layers.json"
REFIT = "refit.safetensors"
REPORT = "report.html"
COMPARISON = "comparison.html"
STATUS = "status.json"
DRAFT = "draft.json"
TASKS = "tasks.json"
HUB = "hub.json"
SPEED = "speed.json"

TOP_LEVEL_NAMES = frozenset(
    {CONFIG, MANIFEST, METRICS, METRICS_DISCARDED, EVALUATION, ANSWERS, HELD_OUT, PROBE, SUMMARY}
    | {
        TIMELINE,
        "prompts",
        CHECKS,
        CHECKPOINTS,
        STUDENT,
        ADAPTER,
        BASE,
        LOGS,
        CALIBRATION,
        LAYERS,
        REFIT,
        REPORT,
        COMPARISON,
        STATUS,
        SPENDING,
        DRAFT,
        TASKS,
        HUB,
        SPEED,
    }
)


def named_file(file: str, teacher: str) -> str:
    """The name of a file that each of several teachers has: ``spending-NAME.jsonl``."""
    stem, dot, ending = file.rpartition(".")
    return f"{stem}-{teacher}{dot}{ending}" if teacher else file


LOCAL = pafs.LocalFileSystem()
LARGEST_TEXT = 4 << 30
NO_FILES = (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)
URI_QUERY = re.compile(r"\?\w+=[^?*]*$")  # A "?" of a glob is not followed by name=value.

JOB_PACKAGE_FOLDER = "runtime_resources/working_dir_files"
"""Where Ray unpacks a job's working directory, below its session folder."""


@lru_cache(maxsize=64)
def _open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI and the path in it; one for the process.

    So connections and the credentials of an instance are used again: opening one anew for each
    call would ask for them each time. pyarrow's file systems may be used by many threads.
    """
    if uri.startswith("s3://") and "allow_delayed_open=" not in uri:
        # A small file is then one request and not three.
        uri = f"{uri}{'&' if split_query(uri)[1] else '?'}allow_delayed_open=true"
    filesystem, root = pafs.FileSystem.from_uri(uri)
    return filesystem, root.rstrip("/")


class RunFolder:
    """A run's folder: a local path, or a URI that ``pyarrow.fs`` opens (s3://, gs://, hdfs://)."""

    def __init__(self, path: str) -> None:
        if path.startswith("file://"):
            path = path.removeprefix("file://")
        self.path = path if "://" in path else os.path.abspath(os.path.expanduser(path))

    def __repr__(self) -> str:
        return f"RunFolder({redact(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def is_local(self) -> bool:
        """Whether the folder is a path on this machine or on a file system mounted here."""
        return "://" not in self.path

    @property
    def local(self) -> Path | None:
        """The folder as a path, or None for a URI."""
        return Path(self.path) if self.is_local else None

    @property
    def logs(self) -> Path:
        """A local folder for log files; below the temporary folder if the run folder is remote."""
        if self.is_local:
            folder = Path(self.path) / LOGS
        else:
            name = blake2b(self.path.encode(), digest_size=4).hexdigest()
            folder = Path(tempfile.gettempdir()) / f"raystill-{os.getuid()}" / name / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def join(self, name: str) -> str:
        """Return the full path or URI of ``name``; a query of the URI stays at the end."""
        plain, query = split_query(self.path)
        return f"{plain.rstrip('/')}/{name}{query}" if name else self.path

    def filesystem(self) -> pafs.FileSystem:
        """The file system that holds the folder; :attr:`root` is the path in it."""
        return self._opened()[0]

    def objects(self) -> Objects | None:
        """Conditional writes in the folder; None in a local one, or where there are none."""
        if self.is_local:
            return None
        filesystem, root = self._opened()
        objects = objects_of(self.path, getattr(filesystem, "region", ""), root)
        return None if objects is None or objects.refused.is_set() else objects

    @property
    def root(self) -> str:
        """The folder's path in :meth:`filesystem`, without a scheme."""
        return self._opened()[1]

    def ensure(self) -> "RunFolder":
        """Make the folder and its log folder if they are not there; return self."""
        filesystem, root = self._opened()
        filesystem.create_dir(root, recursive=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder with that name exists."""
        filesystem, path = self._at(name)
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Names directly in the folder, sorted; empty if there is no folder yet."""
        filesystem, root = self._opened()
        selector = pafs.FileSelector(root, allow_not_found=True)
        return sorted(info.base_name for info in filesystem.get_file_info(selector))

    def read_bytes(self, name: str) -> bytes:
        """The file's bytes."""
        with self.open_input(name) as stream:
            return bytes(stream.read())

    def read_text(self, name: str) -> str:
        """The file's text."""
        if self.local is not None and (self.local / name).stat().st_size > LARGEST_TEXT:
            raise OSError(f"{self.join(name)} has more than {LARGEST_TEXT:,} bytes")
        return self.read_bytes(name).decode("utf-8")

    def open_input(self, name: str) -> pa.NativeFile:
        """Open the file for reading, seekable. Raises FileNotFoundError if there is none."""
        filesystem, path = self._at(name)
        if self.is_local and stat.S_IFMT(os.stat(path).st_mode) in NO_FILES:
            raise OSError(f"{path} is a device or pipe, which may never end")
        return filesystem.open_input_file(path)

    def write_bytes(self, name: str, data: bytes | IO[bytes]) -> None:
        """Write the file atomically: a reader sees the old content or the new, never a part."""
        with self._writing(name) as stream:
            if isinstance(data, io.IOBase):
                shutil.copyfileobj(data, stream)
            else:
                stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Write the text atomically, as :meth:`write_bytes` does."""
        self.write_bytes(name, text.encode("utf-8"))

    def delete(self, name: str) -> None:
        """Delete the file. Raises FileNotFoundError if there is none."""
        filesystem, path = self._at(name)
        filesystem.delete_file(path)

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a Parquet file atomically."""
        with self._writing(name) as stream:
            pq.write_table(table, stream, row_group_size=row_group_size)

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file; all of its columns if ``columns`` is None."""
        with self.open_input(name) as stream:
            return pq.ParquetFile(stream).read(columns=None if columns is None else list(columns))

    def _opened(self) -> tuple[pafs.FileSystem, str]:
        # Not kept in the folder, so that it pickles and can be hashed.
        return (LOCAL, self.path) if self.is_local else _open_uri(self.path)

    def _at(self, name: str) -> tuple[pafs.FileSystem, str]:
        filesystem, root = self._opened()
        return filesystem, f"{root.rstrip('/')}/{name}" if name else root

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        """Open an output that appears under its name only when it is complete.

        A local file is written beside its place and renamed.
        """
        filesystem, target = self._at(name)
        if filesystem.type_name != "s3":  # It has no folders, only requests that would make some.
            filesystem.create_dir(os.path.dirname(target), recursive=True)
        if not self.is_local:
            with uploaded_whole(filesystem, target) as stream:
                yield stream
            return
        folder, base = os.path.split(target)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{base}.")
        try:
            os.fchmod(descriptor, 0o644)  # mkstemp makes a file that only its owner may read.
            with pa.PythonFile(os.fdopen(descriptor, "wb"), mode="w") as stream:
                yield stream
                stream.flush()
                os.fsync(descriptor)  # Else a power cut can leave the new name with no content.
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def require_path(path: str) -> str:
    """A path as a person named it. Raises RunError where no file or folder can have it."""
    if not is_utf8(path):
        raise RunError(f"the path {path!r} is not UTF-8; rename that file or folder")
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    if "\0" in path or longest > 255 or len(path) > 4000:
        told = "a NUL" if "\0" in path else "more characters than a path may have"
        raise RunError(f"the path {path[:80]!r} has {told}; name another one")
    return path


def is_utf8(path: str) -> bool:
    """Whether a path can be told to programs other than Python: a file may have any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_space_left(folder: RunFolder, error: BaseException) -> str:
    """Return the message for a run that stopped because its disk is full, with the remedy."""
    return (
        f"no space is left for the run folder {folder.path} ({error}); make room, and start the "
        "run again: it goes on from its last checkpoint"
    )


def resolve_output(path: str | None, run_file_name: str) -> str:
    """Return the run folder's absolute path or URI.

    ``path`` is the run file's ``output.path``; None gives ``runs/<name of the run file>``. A
    relative path starts at $RAYSTILL_HOME if that is set, else at the current folder.

    Raises ConfigError for a relative path inside a Ray job without RAYSTILL_HOME: the current
    folder of a job is a copy that Ray deletes.
    """
    return _resolve_written(path or f"runs/{Path(run_file_name).stem}", "output.path")


def resolve_store(path: str | None, output: RunFolder) -> str:
    """Return the teacher store's absolute path or URI.

    ``path`` is the run file's ``store.path``. None gives ``teacher_store`` beside the run folder,
    so that runs in one parent folder share a store.

    Raises ConfigError as ``resolve_output`` does, and if the run folder is a whole bucket, which
    has no parent folder.
    """
    if path is not None:
        return _resolve_written(path, "store.path")
    plain, query = split_query(output.path)
    parent = plain.rstrip("/").rpartition("/")[0]
    if not parent.endswith(":/"):
        return f"{parent}/{STORE}{query}"
    message = (
        f"{output.path} is a whole bucket, so there is no folder beside it for the teacher store; "
        f"set output.path to a folder in it ({output.join('runs/NAME')}), or set store.path"
    )
    raise ConfigError([Problem("output.path", message)])


def split_query(path: str) -> tuple[str, str]:
    """Split a URI into its path and its query with the ``?``; the query is '' if there is none.

    The query holds settings of the file system (``?region=...``), so it follows any path in it.
    """
    match = URI_QUERY.search(path) if "://" in path else None
    return (path, "") if match is None else (path[: match.start()], match[0])


def _resolve_written(path: str, setting: str) -> str:
    """Make a path that the run writes to absolute; ``setting`` names it in the error."""
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    home = os.environ.get("RAYSTILL_HOME")
    whole = path if os.path.isabs(path) else os.path.join(home or os.getcwd(), path)
    if not is_utf8(whole):  # By the run file's name, or a folder above: YAML has no such text.
        message = f"is by default {whole!r}, which is not UTF-8; set it to a path that is"
        raise ConfigError([Problem(setting, message)])
    if os.path.isabs(path):
        return os.path.normpath(path)
    if home is None and inside_job_package():
        raise ConfigError(
            [
                Problem(
                    setting,
                    f"{path!r} is relative, and this Ray job's current folder ({os.getcwd()}) is "
                    f"a copy that Ray deletes; set {setting} to an absolute path or a URI, or "
                    "set RAYSTILL_HOME in the job's env_vars",
                )
            ]
        )
    return os.path.normpath(whole)


def resolve_input(path: str) -> str:
    """Return the path of a file or folder to read.

    A relative path is looked for in $RAYSTILL_HOME, then in the current folder. A path that exists
    in neither, and a URI, are returned unchanged.
    """
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    # A job's current folder is a copy of the code; large inputs stay in $RAYSTILL_HOME.
    home = os.environ.get("RAYSTILL_HOME")
    if home and not os.path.isabs(path) and os.path.exists(os.path.join(home, path)):
        return os.path.normpath(os.path.join(home, path))
    return path


def inside_job_package() -> bool:
    """Whether the current folder is a working directory that Ray unpacked for a job."""
    return f"/{JOB_PACKAGE_FOLDER}/" in f"{os.path.realpath(os.getcwd())}/"


def size_on_disk(path: Path) -> int:
    """Size of a file, or of all files below a folder; 0 where there is none."""
    size = 0
    below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in below if path.is_dir() else [path]:
        with suppress(OSError):  # A checkpoint may be removed meanwhile.
            size += os.lstat(file).st_size
    return size
