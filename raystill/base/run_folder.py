"""The run folder: one place for everything a run writes, local or in an object store.

Every process of a run opens the same folder by its path, so a ``RunFolder`` holds only that
string and pickles. Names inside the folder are relative and use ``/`` (``checkpoints/state.json``).
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raystill.base.errors import ConfigError, Problem
from raystill.base.redact import redact

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
TRAIN_PROMPTS = "prompts/train.parquet"
HELD_OUT_PROMPTS = "prompts/held_out.parquet"
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
LOGS = "logs"
STORE = "teacher_store"
CALIBRATION = "calibration"

TOP_LEVEL_NAMES = frozenset(
    {CONFIG, MANIFEST, METRICS, METRICS_DISCARDED, EVALUATION, ANSWERS, HELD_OUT, PROBE, SUMMARY}
    | {TIMELINE, "prompts", CHECKPOINTS, STUDENT, LOGS, CALIBRATION}
)

URI_QUERY = re.compile(r"\?\w+=[^?*]*$")  # A glob's "?" has no name=value behind it.

JOB_PACKAGE_FOLDER = "runtime_resources/working_dir_files"


class RunFolder:
    """A run's folder: a local path or a URI that ``pyarrow.fs`` can open (s3://, gs://, hdfs://)."""

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
        """Whether the folder is a path of this machine (or of a file system mounted here)."""
        return "://" not in self.path

    @property
    def local(self) -> Path | None:
        """The folder as a path, or None for a URI."""
        return Path(self.path) if self.is_local else None

    @property
    def logs(self) -> Path:
        """A local folder for log files; beside the temporary files where the run is remote."""
        if self.is_local:
            folder = Path(self.path) / LOGS
        else:
            name = blake2b(self.path.encode(), digest_size=4).hexdigest()
            folder = Path(tempfile.gettempdir()) / f"raystill-{os.getuid()}" / name / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def join(self, name: str) -> str:
        """The full path or URI of ``name``."""
        plain, query = split_query(self.path)
        return f"{plain.rstrip('/')}/{name}{query}" if name else self.path

    def filesystem(self) -> pafs.FileSystem:
        """The file system that holds the folder; pair it with :attr:`root`."""
        return self._opened()[0]

    @property
    def root(self) -> str:
        """The folder's path inside :meth:`filesystem` (no scheme)."""
        return self._opened()[1]

    def ensure(self) -> "RunFolder":
        """Make the folder and its log folder; return self."""
        filesystem, root = self._opened()
        filesystem.create_dir(root, recursive=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name exists."""
        filesystem, path = self._at(name)
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Names directly in the folder, sorted; empty where there is no folder yet."""
        filesystem, root = self._opened()
        selector = pafs.FileSelector(root, allow_not_found=True)
        return sorted(info.base_name for info in filesystem.get_file_info(selector))

    def read_bytes(self, name: str) -> bytes:
        """The file's bytes."""
        with self.open_input(name) as stream:
            return bytes(stream.read())

    def read_text(self, name: str) -> str:
        """The file's text."""
        return self.read_bytes(name).decode("utf-8")

    def open_input(self, name: str) -> pa.NativeFile:
        """A seekable input; raises FileNotFoundError where there is none."""
        filesystem, path = self._at(name)
        return filesystem.open_input_file(path)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file whole: a reader sees the old or the new content, never a part."""
        with self._writing(name) as stream:
            stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Write the text whole, as :meth:`write_bytes` does."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a Parquet file whole."""
        with self._writing(name) as stream:
            pq.write_table(table, stream, row_group_size=row_group_size)

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file, or some of its columns."""
        with self.open_input(name) as stream:
            return pq.ParquetFile(stream).read(columns=None if columns is None else list(columns))

    def _opened(self) -> tuple[pafs.FileSystem, str]:
        if self.is_local:
            return pafs.LocalFileSystem(), self.path
        filesystem, root = pafs.FileSystem.from_uri(self.path)
        return filesystem, root.rstrip("/")

    def _at(self, name: str) -> tuple[pafs.FileSystem, str]:
        filesystem, root = self._opened()
        return filesystem, f"{root.rstrip('/')}/{name}" if name else root

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        """An output that appears under its name only when it is complete.

        Object stores publish an upload when it is closed, so only local files need the rename.
        """
        filesystem, target = self._at(name)
        filesystem.create_dir(os.path.dirname(target), recursive=True)
        if not self.is_local:
            with filesystem.open_output_stream(target) as stream:
                yield stream
            return
        folder, base = os.path.split(target)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{base}.")
        try:
            os.fchmod(descriptor, 0o644)
            with pa.PythonFile(os.fdopen(descriptor, "wb"), mode="w") as stream:
                yield stream
                stream.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def no_space_left(folder: RunFolder, error: BaseException) -> str:
    """What the owner of a run whose disk is full should do."""
    return (
        f"no space is left for the run folder {folder.path} ({error}); make room, and start the "
        "run again: it goes on from its last checkpoint"
    )


def resolve_output(path: str | None, run_file_name: str) -> str:
    """The run folder's absolute path or URI: ``path``, else ``runs/<name of the run file>``.

    ``path``: the run file's ``output.path``.

    Raises ConfigError for a relative path inside a Ray job, whose current folder is a copy that
    Ray deletes.
    """
    return _resolve_written(path or f"runs/{Path(run_file_name).stem}", "output.path")


def resolve_store(path: str | None, output: RunFolder) -> str:
    """The teacher store's absolute path or URI: ``path``, else beside the run folder.

    ``path``: the run file's ``store.path``.

    Runs in one folder so share one store. Raises ConfigError as ``resolve_output`` does, and where
    the run folder is a whole bucket, which has nothing beside it.
    """
    if path is not None:
        return _resolve_written(path, "store.path")
    plain, query = split_query(output.path)
    above = plain.rstrip("/").rpartition("/")[0]
    if not above.endswith(":/"):
        return f"{above}/{STORE}{query}"
    message = (
        f"{output.path} is a whole bucket, so the teacher store has no place beside the run "
        f"folder; set output.path to a folder in it ({output.join('runs/NAME')}), "
        "or set store.path"
    )
    raise ConfigError([Problem("output.path", message)])


def split_query(path: str) -> tuple[str, str]:
    """A URI without its query, and the query with its ``?``; empty where there is none.

    It holds settings of the file system (``?region=...``) and stands behind whatever path.
    """
    found = URI_QUERY.search(path) if "://" in path else None
    return (path, "") if found is None else (path[: found.start()], found[0])


def _resolve_written(path: str, setting: str) -> str:
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    home = os.environ.get("RAYSTILL_HOME")
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
    return os.path.normpath(os.path.join(home or os.getcwd(), path))


def resolve_input(path: str) -> str:
    """A file or folder that is read: a relative path is looked for in $RAYSTILL_HOME, then here.

    A path found in neither comes back relative to the current folder; URIs come back as they are.
    """
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    home = os.environ.get("RAYSTILL_HOME")
    if home and not os.path.isabs(path) and os.path.exists(os.path.join(home, path)):
        return os.path.normpath(os.path.join(home, path))
    return path


def inside_job_package() -> bool:
    """Whether the current folder is a package that Ray unpacked for a job."""
    return f"/{JOB_PACKAGE_FOLDER}/" in f"{os.path.realpath(os.getcwd())}/"
