"""``driver.py revoke``: take a teacher's answers out of a store, and name the students that have
learned from it.

A licence that changes, or a letter that is withdrawn, is answered by this. What learned already is
not undone; it is named, by the manifests and lineage files of the runs beside the store.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from raystill.base import formatting
from raystill.base.console import open_named, print_lines
from raystill.base.errors import ConfigError, RunError
from raystill.base.records import read_object, require_size
from raystill.base.redact import redact
from raystill.base.run_folder import CONFIG, MANIFEST, STUDENT, SUMMARY, RunFolder, split_query
from raystill.cluster.commands.as_json import print_json
from raystill.cluster.commands.store import opened_store, refused_json, status, tell
from raystill.cluster.lineage.graph import BrokenLineage, read_lineage
from raystill.config.load import LARGEST_FILE, parse_yaml
from raystill.datasets.store.catalogue import Catalogue
from raystill.datasets.store.footer import WITH_TOKENIZER
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import prune
from raystill.serve.batch.journal import BatchJournal, Plan

SHORTEST_PREFIX = 4
WRONG = (OSError, ValueError, RecursionError, yaml.YAMLError)
DIRECTLY, BY_ANOTHER = "taught by it", "taught by a student of it"


@dataclass(frozen=True)
class Learned:
    """A run whose student learned from the teacher. has_student: whether it has finished one."""

    folder: str
    how: str
    has_student: bool


@dataclass
class Found:
    """What the store and the runs beside it have of a teacher.

    runs: rows of the store by the run that asked for them. learned: runs of its students. batches:
    those in the journal beside the store. unread: run folders that could not be looked at, with the
    reason.
    """

    identity: str
    name: str
    rows: int
    all_rows: int
    runs: dict[str, int] = field(default_factory=dict)
    learned: list[Learned] = field(default_factory=list)
    batches: int = 0
    unread: dict[str, str] = field(default_factory=dict)


def revoke_command(
    path: str, teacher: str, runs: Sequence[str], dry_run: bool, as_json: bool
) -> int:
    """Remove a teacher's answers; the exit status is that of the segments that cannot be judged.

    teacher: the first digits of its identity, or its name, if these are of one teacher alone. runs:
    folders with run folders; those beside the store where none is named. Raises RunError.
    """
    with opened_store(path) as store:
        catalogue = store.catalogue()
        found = find(store, catalogue, teacher)
        look_at_runs(found, runs or [beside(store)])
        batches = batches_of(store, catalogue, found)
        found.batches = len(batches)
        for plan in batches if not dry_run else ():
            BatchJournal(store.path).forget(plan)
        pruned = prune(store, {}, found.identity, dry_run)
    if as_json:
        files = {"dry_run": dry_run, "removed": pruned.files}
        refused = refused_json(pruned.refused)
        print_json({"store": store.path, **asdict(found), **files, "refused": refused})
        return status(pruned.refused)
    tell(pruned.refused)
    print_lines(describe(found, dry_run))
    return status(pruned.refused)


def find(store: TeacherStore, catalogue: Catalogue, teacher: str) -> Found:
    """The one teacher that is meant, and its rows. Raises RunError where it is none or several."""
    names: dict[str, str] = {}
    runs: dict[str, Counter[str]] = {}
    for entry in catalogue.entries:
        origin = entry.footer.origin
        names[origin.teacher_identity] = origin.teacher
        for group in entry.footer.groups:
            runs.setdefault(origin.teacher_identity, Counter())[group.run] += group.rows
    is_prefix = len(teacher) >= SHORTEST_PREFIX
    meant = [
        i
        for i, n in names.items()
        if (teacher and teacher in served(n)) or (is_prefix and i.startswith(teacher))
    ]
    if len(meant) != 1:
        known = ", ".join(f"{i[:12]} ({redact(n)})" for i, n in sorted(names.items())) or "nobody"
        many = f"{len(meant)} teachers" if meant else "no teacher"
        raise RunError(
            f"{teacher!r} is {many} of {store.path}, which has answers of {known}; name one by the "
            f"first {SHORTEST_PREFIX} or more digits of its identity"
        )
    (identity,) = meant
    rows = runs[identity]
    return Found(identity, names[identity], sum(rows.values()), catalogue.rows, dict(rows))


def served(name: str) -> tuple[str, str]:
    """What a teacher may be called by: its whole name, or that of the service's model alone."""
    return name, name.partition(WITH_TOKENIZER)[0]


def batches_of(store: TeacherStore, catalogue: Catalogue, found: Found) -> list[Plan]:
    """The teacher's batches in the journal beside the store.

    A batch is his if an answer to one of its keys is stored as his, or if the run that submitted it
    has no other teacher that works in batches.
    """
    journal = BatchJournal(store.path)
    if not journal.folder.exists():
        return []
    his = np.array([e.footer.origin.teacher_identity == found.identity for e in catalogue.entries])
    rows = np.flatnonzero(his[catalogue.segment])
    keys = {key.hex() for key in catalogue.keys.take(pa.array(rows)).to_pylist()}
    plans, submitters = journal.plans(), dict[str, str | None]()
    for run in {plan.run for plan in plans}:
        if "://" in run and _place(run) != _place(store.path):  # A file says where to ask.
            found.unread[redact(run)] = "it is elsewhere than the store, and was not asked"
            submitters[run] = None
        else:
            submitters[run] = _submitter(RunFolder(run), found)
    return [
        plan
        for plan in plans
        if not keys.isdisjoint(plan.keys) or submitters[plan.run] == found.identity
    ]


def _place(path: str) -> tuple[str, str]:
    """Which file system a path is in: scheme and bucket, and the settings of its query."""
    plain, query = split_query(path)
    return "/".join(plain.split("/")[:3]) if "://" in plain else "", query


def _submitter(run: RunFolder, found: Found) -> str | None:
    """Identity of the teacher that works in batches in a run; None where it is not known."""
    try:
        manifest = read_object(run, MANIFEST)
        several = _entries(manifest, "teachers")
        if not several:
            return str(manifest["teacher_identity"])
        require_size(run, CONFIG, LARGEST_FILE)
        teachers = parse_yaml(run.read_text(CONFIG))["teachers"]
        (name,) = (n for n, one in teachers.items() if (one.get("api") or {}).get("batch"))
        return str(several[name]["identity"])
    except (*WRONG, LookupError, TypeError, AttributeError, ConfigError) as error:
        found.unread.setdefault(run.path, str(error).partition("\n")[0])
        return None


def beside(store: TeacherStore) -> str:
    """The folder that the store is in, where runs are by default."""
    plain, query = split_query(store.path)
    return plain.rstrip("/").rpartition("/")[0] + query


def look_at_runs(found: Found, folders: Sequence[str]) -> None:
    """Find the runs whose student learned from the teacher, or from a student of it."""
    for folder in dict.fromkeys(folders):
        for run in _run_folders(open_named(folder), found):
            try:
                how = _how(run, found)
                has_student = how is not None and run.exists(SUMMARY) and run.exists(STUDENT)
            except (OSError, ValueError, RecursionError) as error:
                found.unread[run.path] = str(error).partition("\n")[0]
                continue
            if how is not None:
                found.learned.append(Learned(run.path, how, has_student))


def _run_folders(folder: RunFolder, found: Found) -> Iterator[RunFolder]:
    """The folder itself and those in it, as far as they are run folders."""
    try:
        names = folder.names()
    except OSError as error:  # No folder, or one that is not to be read.
        found.unread[folder.path] = str(error).partition("\n")[0]
        names = []
    for one in (folder, *(RunFolder(folder.join(name)) for name in names)):
        if one.exists(MANIFEST):
            yield one


def _how(run: RunFolder, found: Found) -> str | None:
    """How a run's student learned from the teacher; None if it did not. Raises ValueError."""
    manifest = read_object(run, MANIFEST)
    several = _entries(manifest, "teachers")
    taught = [manifest.get("teacher_identity"), *(one.get("identity") for one in several.values())]
    if str(manifest.get("run_id")) in found.runs or found.identity in taught:
        return DIRECTLY
    sources = _entry(_entry(manifest, "terms"), "sources")
    for one in (sources, *_entries(sources, "teachers").values()):
        if found.identity in _entry(one, "ancestors"):
            return BY_ANOTHER
    try:
        lineage = None if run.local is None else read_lineage(run.local / STUDENT)
    except BrokenLineage as error:
        raise ValueError(f"{STUDENT}/lineage.json {error}") from error
    return BY_ANOTHER if lineage is not None and found.identity in lineage.models else None


def _entry(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in an object; {} where there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _entries(record: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """Objects by name in an object."""
    return {key: one for key, one in _entry(record, name).items() if isinstance(one, dict)}


def describe(found: Found, dry_run: bool) -> Iterator[str]:
    """What was found and done, a line each."""
    share = f"{found.rows / found.all_rows:.1%} of the store"
    verb = "would be removed" if dry_run else "removed"
    rows = formatting.plural(found.rows, "row")
    yield f"{rows} of {found.name} (identity {found.identity[:12]}) {verb}: {share}"
    if found.batches:
        yield f"batches of it in the journal beside the store, {verb}: {found.batches}"
    for one in found.learned:
        state = "its student" if one.has_student else "no finished student yet"
        yield f"  {one.folder}: {one.how}; {state}"
    if not found.learned:
        yield "  no run that was looked at has learned from it; name others with --runs FOLDER"
    known = {one.folder for one in found.learned}
    if found.runs and not known:
        asked = ", ".join(f"{run} ({n} rows)" for run, n in sorted(found.runs.items()))
        yield f"  the rows were asked for by: {asked}"
    for folder, reason in found.unread.items():
        yield f"  {folder} could not be looked at: {reason}"
    yield (
        "students keep what they learned, run folders their own copies (held_out.parquet, "
        "answers.jsonl), and a run of this teacher that goes on asks it again"
    )
