"""``driver.py store``: what the teacher store holds, and looking after it."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.console import open_named, print_lines
from raystill.base.errors import RunError, shown
from raystill.cluster.commands.as_json import print_json
from raystill.datasets.lookup.keeping import Notes, StoreIndex
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Origin
from raystill.datasets.store.reading import (
    DamagedSegment,
    ForeignFile,
    ImpossibleValues,
    NewerSegment,
    RefusedSegments,
    UnreadableSegment,
)
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import prune, refuse_foreign, verify

EXIT_DAMAGED = 1
EXIT_UNREADABLE = 3  # 2 is a command that was refused.
EXIT_NEWER = 4
EXIT_FOREIGN = 5

MOST_OF_KIND = 1500
"""Characters of the segments of one kind that are named."""
MOST_ORIGINS, LONGEST_NAME = 20, 80
"""Teachers that are listed for a person, and characters of a name."""

KINDS = (
    (
        DamagedSegment,
        EXIT_DAMAGED,
        "damaged",
        "read, and not what was written; a run that needs their rows asks for them again, and "
        "'store prune' removes them",
    ),
    (
        ImpossibleValues,
        EXIT_DAMAGED,
        "with impossible values",
        "no student learns from such rows; 'store prune' removes them and keeps the others, and a "
        "run that needs them asks for them again",
    ),
    (
        UnreadableSegment,
        EXIT_UNREADABLE,
        "unreadable",
        "their bytes do not come just now; they may be sound, and are never removed: see to the "
        "connection, the disk and the rights, and run this again",
    ),
    (
        NewerSegment,
        EXIT_NEWER,
        "of a newer version",
        "they are not used here, and are never removed: use the version that wrote them, or a "
        "later one; where no later one has been used, their bytes are altered, and their files "
        "can be deleted by hand",
    ),
    (
        ForeignFile,
        EXIT_FOREIGN,
        "that this program did not write",
        "they are no segments of the store, are not used and are never removed: move them out of "
        "its folder",
    ),
)
"""Kinds of segments that cannot be used: class, exit status, words, what to do. The worst first."""


def store_command(
    action: str,
    path: str,
    teacher: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Run one of list, verify, compact, prune on the store at ``path``; the exit status.

    ``verify``: of the worst kind there is; ``prune``: of the worst that it left. Raises RunError.
    """
    with opened_store(path) as store:
        if action == "list":
            return _list(store, as_json)
        if action == "compact":
            return _compact(store, as_json)
        if action == "verify":
            return _verify(store, as_json)
        return _prune(store, teacher, dry_run, as_json)


@contextmanager
def opened_store(path: str) -> Iterator[TeacherStore]:
    """The store at ``path``. Raises RunError if there is none, and in place of an OSError."""
    store = TeacherStore(open_named(path).path)
    try:
        if not store.folder.exists():
            raise RunError(
                f"there is no teacher store at {store.path}; name one, as a run printed it"
            )
        refuse_foreign(store)
        yield store
    except BrokenPipeError:  # Whoever read what is printed has left.
        raise
    except OSError as error:
        raise RunError(
            f"the teacher store {store.path} could not be looked through or changed ({error}); see "
            "to the connection, the disk and the rights, and run this again: nothing is lost by it"
        ) from error


def _verify(store: TeacherStore, as_json: bool) -> int:
    refused = verify(store, _progress("verifying"))
    segments = len(store.names())
    if as_json:
        print_json({"store": store.path, "segments": segments, "refused": refused_json(refused)})
        return status(refused)
    tell(refused)
    damaged = sum(isinstance(error, DamagedSegment) for error in refused.values())
    print(
        f"{formatting.plural(segments, 'segment')}, {damaged} damaged"
        + "".join(
            f", {number} {words}"
            for kind, _, words, _ in KINDS[1:]
            if (number := sum(isinstance(error, kind) for error in refused.values()))
        )
    )
    return status(refused)


def _prune(store: TeacherStore, teacher: str | None, dry_run: bool, as_json: bool) -> int:
    refused = verify(store, _progress("verifying"))
    if not as_json:
        tell({n: error for n, error in refused.items() if isinstance(error, DamagedSegment)})
    pruned = prune(store, refused, teacher, dry_run)
    if as_json:
        files = {"dry_run": dry_run, "removed": pruned.files}
        print_json({"store": store.path, **files, "refused": refused_json(pruned.refused)})
        return status(pruned.refused)
    tell(pruned.refused)
    said = "would be removed" if dry_run else "removed"
    print(f"{formatting.plural(len(pruned.files), 'file')} {said}")
    return status(pruned.refused)


def _compact(store: TeacherStore, as_json: bool) -> int:
    notes = Notes(store)
    done = compact(store, _progress("compacting"), notes.add)
    notes.write()
    StoreIndex(store).look_through()
    if as_json:
        numbers = {"merged": done.merged, "into": done.into, "duplicates": done.duplicates}
        print_json({"store": store.path, **numbers, "refused": refused_json(done.refused)})
        return 0
    tell(done.refused)
    print(
        f"{formatting.plural(done.merged, 'segment')} merged into {done.into}, "
        f"{formatting.plural(done.duplicates, 'duplicate row')} left out"
    )
    return 0


def tell(refused: RefusedSegments) -> None:
    """Name segments that cannot be used, kind by kind, with what to do."""
    for kind, _, words, remedy in KINDS:
        errors = [error for error in refused.values() if isinstance(error, kind)]
        if errors:
            print(f"{formatting.plural(len(errors), 'segment')} {words} ({remedy}):")
        print_lines([f"  - {error}" for error in errors], MOST_OF_KIND)


def refused_json(refused: RefusedSegments) -> list[dict[str, str]]:
    """The same for programs: segment, kind, reason."""
    return [
        {"segment": error.name, "kind": words, "why": error.why}
        for kind, _, words, _ in KINDS
        for error in refused.values()
        if isinstance(error, kind)
    ]


def status(refused: RefusedSegments) -> int:
    """The exit status: of the worst kind there is."""
    codes = (c for kind, c, _, _ in KINDS if any(isinstance(e, kind) for e in refused.values()))
    return next(codes, 0)


def _list(store: TeacherStore, as_json: bool) -> int:
    """Show a line for every teacher and signal."""
    catalogue = store.catalogue()
    by_origin: dict[Origin, list[int]] = defaultdict(lambda: [0, 0, 0])
    for entry in catalogue.entries:
        sums = by_origin[entry.footer.origin]
        sums[0] += 1
        sums[1] += entry.footer.rows
        sums[2] += store.size(entry.name)
    if as_json:
        found = {"rows": catalogue.rows, "duplicates": catalogue.duplicates}
        answers = [_origin(origin, *sums) for origin, sums in by_origin.items()]
        refused = refused_json(catalogue.refused)
        print_json({"store": store.path, **found, "answers": answers, "refused": refused})
        return 0
    _print_origins(by_origin)
    print(
        f"{formatting.count(catalogue.rows)} rows, of which duplicates "
        f"{formatting.count(catalogue.duplicates)}; refused segments {len(catalogue.refused)}"
    )
    tell(catalogue.refused)
    return 0


def _origin(origin: Origin, segments: int, rows: int, size: int) -> dict[str, Any]:
    """One line of the list for programs."""
    return {
        "teacher": origin.teacher,
        "teacher_identity": origin.teacher_identity,
        "engine": origin.engine,
        "engine_version": origin.engine_version,
        "dtype": origin.dtype,
        "signal": {"kind": origin.signal.kind, "width": origin.signal.width},
        "segments": segments,
        "rows": rows,
        "bytes": size,
    }


def _print_origins(by_origin: Mapping[Origin, Sequence[int]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("teacher", "identity", "engine", "signal"):
        table.add_column(heading)
    for heading in ("segments", "rows", "size"):
        table.add_column(heading, justify="right")
    for origin, (segments, rows, size) in list(by_origin.items())[:MOST_ORIGINS]:
        table.add_row(
            shown(origin.teacher, LONGEST_NAME),
            shown(origin.teacher_identity[:12]),
            shown(f"{origin.engine} {origin.engine_version} {origin.dtype}", LONGEST_NAME),
            str(origin.signal),
            formatting.count(segments),
            formatting.count(rows),
            formatting.size(size),
        )
    # A path is data: what stands in brackets in it is no markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(table)
    if len(by_origin) > MOST_ORIGINS:
        print(f"... and {len(by_origin) - MOST_ORIGINS:,} more; --json tells more of them")


def _progress(what: str) -> Callable[[int, int], None]:
    def show(done: int, there: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == there else "\r"
            print(f"{what} {done}/{there}", end=end, file=sys.stderr, flush=True)

    return show
