"""Check the run folder and the teacher store: writable, of this run, and with enough free space."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import yaml

from raystill.base.errors import Problem
from raystill.base.object_store import Objects
from raystill.base.records import BrokenFile, read_object
from raystill.base.run_folder import (
    CHECKPOINTS,
    CONFIG,
    HELD_OUT,
    LOGS,
    MANIFEST,
    METRICS,
    PROMPT_COLUMNS,
    STUDENT,
    SUMMARY,
    TOP_LEVEL_NAMES,
    TRAIN_PROMPTS,
    RunFolder,
    size_on_disk,
    split_query,
)
from raystill.config.load import compare_identity, parse_yaml, validate_leniently
from raystill.config.run import RunConfig
from raystill.datasets.filters.function import hashes_of, read_functions
from raystill.datasets.prompts.files import prompt_sources, would_read
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.rows.schema import STUDENT_PROMPT, TEACHER
from raystill.datasets.store.store import SEGMENTS
from raystill.model.adapters import trained_numbers
from raystill.model.files import ModelFolder
from raystill.model.sizes import count_parameters

REMOTE_WAIT_S = 4.0
"""Longest wait for an object store: the whole check has five seconds."""
ADAMW_BYTES = {"float32": 12, "float64": 24}  # of a parameter and its two moments
EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SIGNAL_BYTES = 8  # of an id and a logprob
ESTIMATED = (CHECKPOINTS, STUDENT, HELD_OUT)
"""What of the run folder ``space_needed`` counts."""
WRITE_TEST = ".raystill-write-test"
Found = tuple[list[Problem], list[str]]  # problems, notices


def check_output(config: RunConfig, folder: RunFolder, compare: bool = True) -> Found:
    """Problems and notices of the run folder. Leaves nothing behind in it.

    ``compare``: whether ``config`` can be compared with that of an earlier run; it cannot if parts
    of it are stand-ins.
    """
    if folder.is_local:
        if (problem := why_not_writable(Path(folder.path), "output.path")) is not None:
            return [Problem("output.path", problem)], []
        return check_earlier_run(config, folder) if compare else [], []
    return _in_time(lambda: (_check_remote(config, folder, compare), []), "output.path", folder)


def check_store(path: str) -> Found:
    """Can the teacher store be written, and does the first of two writers count there?"""
    folder = RunFolder(path)
    if not folder.is_local:
        return _in_time(lambda: _check_remote_store(folder), "store.path", folder)
    problem = why_not_writable(Path(path), "store.path") or why_no_links(Path(path))
    return ([Problem("store.path", problem)] if problem is not None else []), []


def _in_time(check: Callable[[], Found], setting: str, folder: RunFolder) -> Found:
    """What a check of an object store finds; a notice where it does not answer soon."""
    results: list[Found] = []
    # A daemon thread, since some object stores retry for minutes and cannot be interrupted.
    thread = threading.Thread(target=lambda: results.append(check()), name=setting, daemon=True)
    thread.start()
    thread.join(REMOTE_WAIT_S)
    late = f"{setting}: {folder.path} did not answer in {REMOTE_WAIT_S:.0f} s"
    return results[0] if results else ([], [late])


def why_no_links(path: Path) -> str | None:
    """Why the folder's file system makes no hard links, by which answers are published; or None."""
    existing = path / SEGMENTS
    while not existing.is_dir():
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".raystill-") as folder:
            first = Path(folder, "first")
            first.touch()
            os.link(first, Path(folder, "second"))
    except OSError as error:
        return (
            f"{path} cannot hold a teacher store: {existing}: no hard link can be made there "
            f"({error.strerror}), by which answers are published; set store.path to a folder on a "
            "local disk or on NFS, or to a URI such as s3://bucket/folder"
        )
    return None


def why_not_writable(path: Path, setting: str) -> str | None:
    """Why the folder cannot be made or written, or None."""
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{path} cannot be made: {existing} is a file; name another folder"
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".raystill-"):
            return None
    except OSError as error:
        return (
            f"{path} cannot be written: {existing}: {error.strerror}; make it writable or set "
            f"{setting} to another folder"
        )


def check_earlier_run(config: RunConfig, folder: RunFolder) -> list[Problem]:
    """A folder that exists must be empty or of this run."""
    names = folder.names()
    if CONFIG not in names:
        foreign = [n for n in names if n not in TOP_LEVEL_NAMES and not n.startswith(".")]
        if not foreign:
            return []
        listed = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        message = f"{folder.path} is no run folder, but has {listed}; name a new or empty folder"
        return [Problem("output.path", message)]
    # Leniently: an earlier version may have had fields that this one does not know.
    try:
        data = parse_yaml(folder.read_text(CONFIG))
        for name in (MANIFEST, SUMMARY):
            if name in names:
                read_object(folder, name)
    except BrokenFile as error:
        return [Problem("output.path", str(error))]
    except (OSError, ValueError, yaml.YAMLError):
        data = None
    earlier = validate_leniently(data, []).config if isinstance(data, dict) else None
    if earlier is None:
        message = f"{folder.path}/{CONFIG} cannot be read by this version"
        message += "; restore it, or set another output.path"
        return [Problem("output.path", message)]
    differences = compare_identity(earlier, config)
    was, now = earlier.training.epochs, config.training.epochs
    if now < was or (now > was and config.training.schedule != "constant"):
        differences.append(
            f"training.epochs was {was}, is {now}: it may only grow, and only with "
            "training.schedule: constant, because every other schedule depends on it"
        )
    if not differences:
        return []
    listed = "; ".join(differences)
    return [
        Problem(
            "output.path",
            f"{folder.path} holds a run of another configuration ({listed}); set these back to "
            "resume it, or set output.path to a new folder",
        )
    ]


def check_same_prompts(folder: RunFolder, train: pa.Table, setting: str) -> list[Problem]:
    """A resumed run needs the rows that it began with, since its ledger counts them by number.

    ``setting`` is the key of the prompts' files. If the rows have the same sources as before, only
    a date in the prompts may differ, and the message says how to set it.
    """
    if not folder.exists(TRAIN_PROMPTS):
        return []
    before = _table_of(folder, TRAIN_PROMPTS)
    if isinstance(before, Problem):
        return [before]
    names = ("prompt_ids", "source", "response_ids", STUDENT_PROMPT, TEACHER)
    shared = [n for n in names if n in before.column_names and n in train.column_names]
    if before.select(shared).combine_chunks().equals(train.select(shared).combine_chunks()):
        return []
    dated = ""
    if "source" in shared and before["source"].combine_chunks().equals(
        train["source"].combine_chunks()
    ):
        dated = (
            "if the teacher's chat template prints the date, set prompts.template_date to the day "
            f"of the first start ({TRAIN_PROMPTS} is of {_day_of(folder, TRAIN_PROMPTS)}), else "
        )
    return [
        Problem(
            setting,
            f"the prompts are not those that {folder.path} began with ({before.num_rows} rows, now "
            f"{train.num_rows}); {dated}restore the files, or set output.path to a new folder",
        )
    ]


def check_same_columns(folder: RunFolder, columns: pa.Table | None) -> list[Problem]:
    """A resumed run needs the references that it began with: they decide which rows are trained."""
    if columns is None or not folder.exists(PROMPT_COLUMNS):
        return []
    before = _table_of(folder, PROMPT_COLUMNS)
    if isinstance(before, Problem):
        return [before]
    names = [name for name in columns.column_names if name != "row"]
    changed = [
        name
        for name in names
        if name not in before.column_names
        or before[name].cast(pa.string()).combine_chunks()
        != columns[name].cast(pa.string()).combine_chunks()
    ]
    return [
        Problem(
            "filters",
            f"the prompts' {name} is not what {folder.path} began with, and a filter reads it; "
            "restore the files, or set output.path to a new folder",
        )
        for name in changed[:1]
    ]


def _table_of(folder: RunFolder, name: str) -> pa.Table | Problem:
    """A table that an earlier start has written, or that it cannot be read."""
    try:
        return folder.read_table(name)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        message = f"{folder.path}/{name} cannot be read ({reason}); restore it from a copy, or set"
        return Problem("output.path", f"{message} output.path to a new folder")


def check_same_functions(config: RunConfig, folder: RunFolder) -> list[Problem]:
    """Problems of a run that is resumed with another text of a filter's function."""
    now = hashes_of(read_functions(config.filters))
    if not now or not folder.exists(MANIFEST):
        return []
    try:
        before = read_object(folder, MANIFEST).get("filter_functions", now)
    except BrokenFile:  # Which the check of the folder says.
        return []
    before = before if isinstance(before, dict) else {}
    return [
        Problem(
            "filters",
            f"{path} has changed since {folder.path} began, and it decides which rows are trained; "
            "put it back to resume the run, or set output.path to a new folder: the answers are "
            "stored and are not asked again",
        )
        for path in now
        if before.get(path) != now[path]
    ]


def _day_of(folder: RunFolder, name: str) -> str:
    """The local day on which a file of the run was last written."""
    written = folder.filesystem().get_file_info(f"{folder.root}/{name}").mtime
    return "an unknown day" if written is None else f"{written.astimezone():%Y-%m-%d}"


def _check_remote(config: RunConfig, folder: RunFolder, compare: bool) -> list[Problem]:
    try:
        folder.write_bytes(WRITE_TEST, b"")
        folder.filesystem().delete_file(f"{folder.root}/{WRITE_TEST}")
        return check_earlier_run(config, folder) if compare else []
    except Exception as error:  # Every object store has its own errors.
        return [Problem("output.path", _not_written(folder, error))]


def _check_remote_store(folder: RunFolder) -> Found:
    try:
        objects = folder.objects()
        if objects is not None and objects.probe(WRITE_TEST):
            return _seen_by_both(folder, objects), []
        folder.write_bytes(WRITE_TEST, b"")
        folder.filesystem().delete_file(f"{folder.root}/{WRITE_TEST}")
    except Exception as error:
        return [Problem("store.path", _not_written(folder, error))], []
    here = "there are conditional writes only for s3:// (pip install 'raystill[s3]')"
    why = here if objects is None else "it has no conditional writes"
    told = (
        "so of two runs that ask for the same rows at the same moment the last one's answers count"
    )
    return [], [f"store.path: {folder.path}: {why}, {told}"]


def _seen_by_both(folder: RunFolder, objects: Objects) -> list[Problem]:
    """Conditional writes go by another library than all else: do both mean the same object?"""
    objects.create(WRITE_TEST, b"")
    if folder.exists(WRITE_TEST):
        folder.delete(WRITE_TEST)
        return []
    objects.remove(WRITE_TEST)
    message = (
        f"{folder.path}: what is written there is not found again ({folder.root} is read); spell "
        "the path with letters, digits, '-', '_' and single '/' only"
    )
    return [Problem("store.path", message)]


def _not_written(folder: RunFolder, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{folder.path} cannot be written ({reason}); check the name and your credentials"


def space_needed(config: RunConfig, student: ModelFolder, tables: PromptTables) -> int | None:
    """Bytes of checkpoints, exported student and held-out answers; None if the number of
    parameters is unknown.
    """
    kept = None
    if config.student.init == "from_teacher":
        kept = config.student.kept_layers(student.num_layers or 0)
    parameters = count_parameters(student, kept)
    if parameters is None:
        return None
    training = config.training
    # One more than are kept: the newest is written before the oldest is removed.
    checkpoints = (training.num_checkpoints_to_keep + 1) * ADAMW_BYTES[training.param_dtype]
    tokens = tables.response_tokens("held_out", config.max_response_tokens)
    held_out = tokens * config.evaluation.top_k * SIGNAL_BYTES
    trained, exported = parameters, EXPORT_BYTES[training.export_dtype]
    if config.student.lora is not None:
        trained = trained_numbers(student, config.student.lora, kept) or parameters
        checkpoints += 4  # The adapter.
        exported += 4 if kept is not None else 0  # The weights that it belongs to.
    return trained * checkpoints + parameters * exported + held_out


def check_space(folder: RunFolder, needed_bytes: int | None) -> list[Problem]:
    """Is there space for what the run has yet to write? An object store always has it."""
    free = free_bytes(folder)
    if needed_bytes is None or free is None:
        return []
    written = sum(size_on_disk(Path(folder.path, name)) for name in ESTIMATED)
    if free >= needed_bytes - written:
        return []
    return [
        Problem(
            "output.path",
            f"{folder.path} will need about {(needed_bytes - written) / 2**30:.1f} GiB"
            f"{' more' if written else ''}, but its disk has {free / 2**30:.1f} GiB free; free "
            "some, lower training.num_checkpoints_to_keep, or set another output.path",
        )
    ]


def free_bytes(folder: RunFolder) -> int | None:
    """Free bytes of the disk where the folder is or will be; None for an object store."""
    if not folder.is_local:
        return None
    existing = Path(folder.path)
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


WRITTEN = (METRICS, MANIFEST, TRAIN_PROMPTS, f"{STUDENT}/config.json", f"{LOGS}/driver.txt")
"""Some of the files that a run writes into its folder, one of each kind."""


def check_apart(config: RunConfig, output: RunFolder, store_path: str) -> Iterator[Problem]:
    """Does each folder hold what is its own: would a later start read what the run writes as
    prompts, or one of store and run folder take the files of the other for its own?
    """
    folders: dict[str, tuple[str, tuple[str, ...]]] = {"output.path": (output.path, WRITTEN)}
    if store_path:
        folders["store.path"] = (store_path, ("segments/x.parquet",))
        yield from _store_apart(_real(output.path), _real(store_path))
    for source in prompt_sources(config.prompts):
        for where, (folder, names) in folders.items():
            root = split_query(folder)[0].rstrip("/")
            read = next((n for n in names if would_read(source, f"{root}/{n}")), None)
            if read is not None:
                yield source.problem(
                    f"{', '.join(source.paths)} takes in the folder that {where} names, so that a "
                    f"later start would read the run's own files ({root}/{read}) as prompts; name "
                    f"the prompts more closely, or set {where} to a folder elsewhere"
                )


def _store_apart(output: str, store: str) -> Iterator[Problem]:
    """Problems of a run folder in a store, and of a store where the run has its own files."""
    if f"{output}/".startswith(f"{store}/"):
        message = f"is {output}, which is {'' if output == store else 'inside '}the teacher store"
        yield Problem("output.path", f"{message}; set it to a folder elsewhere")
    elif store.startswith(f"{output}/"):
        name = store[len(output) + 1 :].partition("/")[0]
        if name in TOP_LEVEL_NAMES:
            message = f"is {store}, but the run has files of its own in {output}/{name}"
            yield Problem("store.path", f"{message}; set it to a folder elsewhere")


def _real(path: str) -> str:
    """A folder's one name: without query, links and slashes at its end."""
    plain = split_query(path)[0].rstrip("/")
    return plain if "://" in plain else os.path.realpath(plain)
