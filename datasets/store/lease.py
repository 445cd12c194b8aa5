"""The lease of a store's upkeep: only one ``compact`` or ``prune`` changes a store at a time.

In a local store it is a lock (``flock``) on the file ``upkeep.lock``, which ends with its process.
A file system without such locks has no lease; upkeep is safe there too (see ``removal.py``), and
may leave more duplicates. On an object store it is the file itself, with a token and the time at
which it ends. On S3 it is taken, renewed and taken over by conditional writes: one process has it.
Other object stores have none here, and a service with S3's protocol may ignore them, which is tried
out before the lease is taken. Whoever takes it there is told so, and waits for others that saw no
holder either: the last that wrote its token has the lease, and ``confirm`` reads it again.

Imports neither Ray nor torch.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from raystill.base.errors import RunError
from raystill.base.object_store import ConditionIgnored
from raystill.base.records import open_own
from raystill.base.run_folder import RunFolder

logger = logging.getLogger(__name__)

LEASE = "upkeep.lock"
LEASE_S = 600.0
"""Seconds for which a lease on an object store holds. It is renewed at each ``confirm``."""
SETTLE_S = 2.0
"""Wait between writing a lease without a condition and looking whose it is. Two processes can both
have it only if one of them took longer from its look to its writing."""


class Lease:
    """The right to remove segments of one store."""

    def __init__(self, folder: RunFolder, doing: str) -> None:
        self._folder = folder
        self._token = secrets.token_hex(16)
        self._who = {
            "doing": doing,
            "owner": f"process {os.getpid()} on {socket.gethostname()}",
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def confirm(self) -> None:
        """Make sure that the lease is still held. Raises RunError if another process has it."""
        if self._folder.is_local:
            return
        holder, version = _read(self._folder)
        if holder.get("token") != self._token:
            raise _in_use(self._folder, holder)
        if _ends(holder) - time.time() < LEASE_S / 2 and not self._write(version):
            holder = _read(self._folder)[0]  # A write may be done, and not confirmed.
            if holder.get("token") != self._token:
                raise _in_use(self._folder, holder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease in the block. Raises RunError if another process has it."""
        with self._locked() if self._folder.is_local else self._written():
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The file is never deleted: another process could hold a lock on what was deleted.
        with open_own(f"{self._folder.path}/{LEASE}") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _in_use(self._folder, _read(self._folder)[0]) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                logger.warning("%s has no locks (%s)", self._folder.path, error)
            file.truncate(0)
            file.write(json.dumps(self._who).encode())
            file.flush()
            yield

    @contextmanager
    def _written(self) -> Iterator[None]:
        conditional = self._has_conditions()
        holder, version = _read(self._folder)
        if _ends(holder) > time.time():
            raise _in_use(self._folder, holder)
        if not conditional:
            logger.warning(
                "%s has no conditional writes, so nothing keeps two upkeeps of it apart that begin "
                "at the same moment, and rows could be lost: see to it that only one 'store "
                "compact' or 'store prune' runs at a time",
                self._folder.path,
            )
        self._write(version)
        if not conditional:
            time.sleep(SETTLE_S)
        self.confirm()
        try:
            yield
        finally:
            with suppress(OSError):
                if _read(self._folder)[0].get("token") == self._token:
                    self._folder.filesystem().delete_file(f"{self._folder.root}/{LEASE}")

    def _has_conditions(self) -> bool:
        """Whether the store keeps the condition of a write; found out by writing a name twice."""
        objects = self._folder.objects()
        return objects is not None and objects.probe(f"probe-{self._token}")

    def _write(self, version: str | None) -> bool:
        """Write that the lease is held; False if its file is no longer of this version (None: there
        is no file). It is written in any case where the store has no conditional writes.
        """
        ends = str(time.time() + LEASE_S)
        text = json.dumps({**self._who, "token": self._token, "ends": ends})
        if (objects := self._folder.objects()) is not None:
            with suppress(ConditionIgnored):
                if version is None:
                    return objects.create(LEASE, text.encode())
                return objects.replace(LEASE, text.encode(), version)
        self._folder.write_text(LEASE, text)
        return True


def _read(folder: RunFolder) -> tuple[dict[str, str], str | None]:
    """Who holds the lease (empty if nobody does, or the file says nothing), and the file's version.

    The version is None if there is no file, or where the store has no conditional writes.
    """
    version = None
    with suppress(FileNotFoundError, ValueError):
        if (objects := folder.objects()) is not None:
            data, version = objects.read(LEASE)
        else:
            data = folder.read_bytes(LEASE)
        found = json.loads(data)
        if isinstance(found, dict):
            return found, version
    return {}, version


def _ends(holder: dict[str, str]) -> float:
    """The time (of ``time.time``) at which the lease ends; 0 if it says none."""
    with suppress(ValueError):
        return float(holder.get("ends", 0))
    return 0.0


def _in_use(folder: RunFolder, holder: dict[str, str]) -> RunError:
    who = holder.get("owner", "another process")
    doing = holder.get("doing", "upkeep")
    left = _ends(holder) - time.time()
    died = f" (its lease ends in {left:.0f} s, should it have died)" if left > 0 else ""
    return RunError(
        f"the teacher store {folder.path} is in use by 'store {doing}' ({who}, since "
        f"{holder.get('since', 'just now')}); wait until it has ended{died}, and run this again"
    )
