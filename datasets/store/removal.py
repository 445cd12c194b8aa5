"""Removal of a segment in a local folder, so that a sound one is never lost.

There is no way to delete a file only if it still has a certain content. So a segment is first
renamed to a name that is no segment's (*set aside*), judged there, where nobody else can replace
it, and then deleted or put back. What decides about the removal is looked at after the file was set
aside: of two processes that would each remove one of two copies, at least one then finds the
other's copy missing, and puts its own back.

Imports neither Ray nor torch.
"""

import os
import re
import secrets
from contextlib import suppress

from raystill.datasets.store.segment import next_name

ASIDE = re.compile(r"\.removed-[0-9a-f]{16}-(?P<name>.+)\.aside")
"""Name of a file that was set aside. It does not end as a segment's, so that nobody lists it."""

TEMPORARY = re.compile(r"\.(.+\.part|[0-9a-f]{32}\.parquet\..+)")
"""Names of the temporary files that segments are written to."""


def set_aside(folder: str, name: str) -> str | None:
    """Rename a segment to a name that is no segment's, and return it; None if it is gone."""
    aside = f".removed-{secrets.token_hex(8)}-{name}.aside"
    try:
        os.rename(f"{folder}/{name}", f"{folder}/{aside}")
    except FileNotFoundError:
        return None
    return aside


def put_back(folder: str, aside: str) -> None:
    """Give a file that was set aside its name again; the next free one if it is taken."""
    match = ASIDE.fullmatch(aside)
    assert match is not None, aside
    name, path = match["name"], f"{folder}/{aside}"
    with suppress(FileNotFoundError):  # Another process has put it back already.
        while True:
            try:
                os.link(path, f"{folder}/{name}")
                break
            except FileExistsError:  # By the same file, by another, or by a link to nothing.
                there = os.path.exists(f"{folder}/{name}")
                if there and os.path.samefile(path, f"{folder}/{name}"):
                    break
                name = next_name(name)
        os.unlink(path)


def discard(folder: str, aside: str) -> None:
    """Delete a file that was set aside."""
    with suppress(FileNotFoundError):
        os.unlink(f"{folder}/{aside}")


def put_all_back(folder: str) -> None:
    """Put back what a process that died had set aside."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if ASIDE.fullmatch(name):
                put_back(folder, name)
