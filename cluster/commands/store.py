"""``driver.py store``: what the teacher store holds, and looking after it."""

import sys
from collections import defaultdict
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.base.redact import redact
from raystill.datasets.store.reading import DamagedSegment, NewerSegment, UnreadableSegment
from raystill.datasets.store.segment import Origin
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import Refused, compact, prune, verify

EXIT_DAMAGED = 1
EXIT_UNREADABLE = 3  # 2 is a command that was refused.
EXIT_NEWER = 4

KINDS = (
    (
        DamagedSegment,
        EXIT_DAMAGED,
        "damaged",
        "read, and not what was written; a run that needs their rows asks for them again, and "
        "'store prune' removes them",
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
        "later one",
    ),
)
"""Kinds of segments that cannot be used: class, exit status, words, what to do. The worst first."""


def store_command(action: str, path: str, teacher: str | None = None, dry_run: bool = False) -> int:
    """Run one of list, verify, compact, prune on the store at ``path``; the exit status.

    ``verify``: of the worst kind there is; ``prune``: of the worst that it left. Raises RunError.
    """
    store = TeacherStore(path)
    try:
        if not store.folder.exists():
            raise RunError(
                f"there is no teacher store at {store.path}; name one, as a run printed it"
            )
        if action == "list":
            return _list(store)
        if action == "compact":
            return _compact(store)
        return _verify(store) if action == "verify" else _prune(store, teacher, dry_run)
    except BrokenPipeError:  # Whoever read what is printed has left.
        raise
    except OSError as error:
        raise RunError(
            f"the teacher store {store.path} could not be looked through or changed ({error}); see "
            "to the connection, the disk and the rights, and run this again: nothing is lost by it"
        ) from error


def _verify(store: TeacherStore) -> int:
    refused = verify(store, _progress("verifying"))
    status = _tell(refused)
    damaged = sum(isinstance(error, DamagedSegment) for error in refused.values())
    print(
        f"{formatting.plural(len(store.names()), 'segment')}, {damaged} damaged"
        + "".join(
            f", {number} {words}"
            for kind, _, words, _ in KINDS[1:]
            if (number := sum(isinstance(error, kind) for error in refused.values()))
        )
    )
    return status


def _prune(store: TeacherStore, teacher: str | None, dry_run: bool) -> int:
    refused = verify(store, _progress("verifying"))
    _tell({n: error for n, error in refused.items() if isinstance(error, DamagedSegment)})
    pruned = prune(store, refused, teacher, dry_run)
    status = _tell(pruned.refused)
    said = "would be removed" if dry_run else "removed"
    print(f"{formatting.plural(len(pruned.files), 'file')} {said}")
    return status


def _compact(store: TeacherStore) -> int:
    done = compact(store, _progress("compacting"))
    _tell(done.refused)
    print(
        f"{formatting.plural(done.merged, 'segment')} merged into {done.into}, "
        f"{formatting.plural(done.duplicates, 'duplicate row')} left out"
    )
    return 0


def _tell(refused: Refused) -> int:
    """Name segments that cannot be used, kind by kind, with what to do; the exit status."""
    status = 0
    for kind, code, words, remedy in KINDS:
        told = [error for error in refused.values() if isinstance(error, kind)]
        if told:
            print(f"{formatting.plural(len(told), 'segment')} {words} ({remedy}):")
            status = status or code
        for error in told:
            print(redact(f"  - {error}"))
    return status


def _list(store: TeacherStore) -> int:
    """A line for every teacher and signal."""
    catalogue = store.catalogue()
    by_origin: dict[Origin, list[int]] = defaultdict(lambda: [0, 0, 0])
    for entry in catalogue.entries:
        sums = by_origin[entry.footer.origin]
        sums[0] += 1
        sums[1] += entry.footer.rows
        sums[2] += store.size(entry.name)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("teacher", "identity", "engine", "signal"):
        table.add_column(heading)
    for heading in ("segments", "rows", "size"):
        table.add_column(heading, justify="right")
    for origin, (segments, rows, size) in by_origin.items():
        table.add_row(
            origin.teacher,
            origin.teacher_identity[:12],
            f"{origin.engine} {origin.engine_version} {origin.dtype}",
            str(origin.signal),
            formatting.count(segments),
            formatting.count(rows),
            formatting.size(size),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    print(
        f"{formatting.count(catalogue.rows)} rows, of which duplicates "
        f"{formatting.count(catalogue.duplicates)}; refused segments {len(catalogue.refused)}"
    )
    _tell(catalogue.refused)
    return 0


def _progress(what: str) -> Callable[[int, int], None]:
    def show(done: int, there: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == there else "\r"
            print(f"{what} {done}/{there}", end=end, file=sys.stderr, flush=True)

    return show
