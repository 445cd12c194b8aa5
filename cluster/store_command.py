"""``driver.py store``: what the teacher store holds, and looking after it."""

import sys
from collections import defaultdict
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from raystill.cluster import wording
from raystill.cluster.problems import RunError
from raystill.cluster.redact import redact
from raystill.datasets.segment import Origin
from raystill.datasets.store import TeacherStore
from raystill.datasets.store_upkeep import compact, prune, verify

EXIT_DAMAGED = 1


def store_command(action: str, path: str, teacher: str | None = None, dry_run: bool = False) -> int:
    """Run one of list, verify, compact, prune on the store at ``path``; the exit status."""
    store = TeacherStore(path)
    if not store.folder.exists():
        raise RunError(f"there is no teacher store at {store.path}; name one, as a run printed it")
    if action == "list":
        return _list(store)
    if action == "compact":
        done = compact(store, _progress("compacting"))
        print(
            f"{wording.plural(done.merged, 'segment')} merged into {done.into}, "
            f"{wording.plural(done.duplicates, 'duplicate row')} left out"
        )
        return 0
    damaged = verify(store, _progress("verifying"))
    for why in damaged.values():
        print(redact(f"  - {why}"))
    if action == "prune":
        names = prune(store, damaged, teacher, dry_run)
        said = "would be removed" if dry_run else "removed"
        print(f"{wording.plural(len(names), 'file')} {said}")
        return 0
    print(f"{wording.plural(len(store.names()), 'segment')} read, {len(damaged)} damaged")
    return EXIT_DAMAGED if damaged else 0


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
            wording.count(segments),
            wording.count(rows),
            wording.size(size),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    print(
        f"{wording.count(catalogue.rows)} rows, of which duplicates "
        f"{wording.count(catalogue.duplicates)}; refused segments {len(catalogue.refused)}"
    )
    for why in catalogue.refused.values():
        print(redact(f"  - {why}"))
    return 0


def _progress(what: str) -> Callable[[int, int], None]:
    def show(done: int, there: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == there else "\r"
            print(f"{what} {done}/{there}", end=end, file=sys.stderr, flush=True)

    return show
