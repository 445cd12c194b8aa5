"""Pushes a finished student to the Hugging Face Hub: private by default, in one commit.

*Consumes* the ``student/`` folder with its papers. A repository that is not there is created. One
that has other files is left as it is, unless its owner said that they may go; a push that was cut
is repeated, and sends only what is missing. The token is huggingface_hub's own (``HF_TOKEN``, or
``hf auth login``), and is in no message.

Large files go by ``hf_xet``, huggingface_hub's own, to servers of Xet that the Hub names:
after all that is required here, and before the commit that names them. Those servers are shown a
token that the Hub makes for this repository; reports of use are switched off.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from hashlib import file_digest, sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raystill.base.errors import Problem, RunError
from raystill.base.records import BrokenFile, read_object
from raystill.base.redact import redact
from raystill.base.run_folder import HUB, MANIFEST, STUDENT, RunFolder
from raystill.cluster.lineage.sources import wrong_name
from raystill.config.training import HubConfig

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from raystill.config.run import RunConfig

THEIRS = frozenset({".gitattributes"})
"""Files that the Hub itself puts into a new repository."""
ATTEMPTS, PAUSE_S = 3, 2.0
SHOWN = 5
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b.*/xet-write-token/")
"""In an error of the Hub's; another server's says nothing about the Hub's token."""


class PushRefused(RunError):
    """The repository must not, or cannot, take the student; the message says what to do."""


def check_hub(config: "RunConfig", folder: RunFolder | None) -> tuple[list[Problem], list[str]]:
    """Problems and notices of ``output.hub``, before anything is spent.

    The repository is looked at where the Hub can be reached; where not, that is a notice.
    """
    hub = config.output.hub
    if hub is None:
        return [], []
    problems = list(_why_no_push(config, folder))
    if problems or folder is None or folder.exists(HUB):
        return problems, []
    try:
        _require_free(_api(), hub, [], replace=False)
    except PushRefused as error:
        return [Problem("output.hub", str(error))], []
    except Exception as error:  # Of several types: huggingface_hub's, httpx's, those of Xet.
        return [], [f"output.hub: the Hub could not be asked about {hub.repo} ({_reason(error)})"]
    return [], []


def _why_no_push(config: "RunConfig", folder: RunFolder | None) -> Iterator[Problem]:
    from huggingface_hub import constants, get_token

    hub = config.output.hub
    assert hub is not None
    if folder is not None and not folder.is_local:
        yield Problem(
            "output.hub",
            "pushes from a local run folder only; set output.path to one, or remove output.hub",
        )
    if not hub.private and not config.terms.distributed:
        yield Problem(
            "output.hub.private",
            "is false, which hands the student on to everybody, but terms.distributed is false; "
            "set terms.distributed: true, or output.hub.private: true",
        )
    if constants.HF_HUB_OFFLINE:
        yield Problem(
            "output.hub",
            "needs the Hub, but HF_HUB_OFFLINE is set; unset it, or remove output.hub and push "
            "later with 'push RUN_FOLDER'",
        )
    elif get_token() is None:
        yield Problem(
            "output.hub",
            "needs a token that may write; set HF_TOKEN, or log in with 'hf auth login'",
        )


def push_finished(folder: RunFolder, config: "RunConfig", tell: Callable[[str], None]) -> None:
    """Push where the run file says so; tell where, or why not: the run is finished all the same."""
    hub = config.output.hub
    if hub is None or not folder.exists(STUDENT):
        return
    try:
        tell(f"The student is at {push_student(folder, hub)['url']}")
    except RunError as error:
        tell(f"note: the student was not pushed: {error}")
        tell("note: push it later with the command 'push' and the run's folder")


def push_student(folder: RunFolder, hub: HubConfig, replace: bool = False) -> dict[str, Any]:
    """Push the student of a run folder; what was written into ``hub.json``.

    replace: the repository's other files may go. Raises RunError with a remedy.
    """
    local = folder.local
    if local is None or not (local / STUDENT).is_dir():
        raise RunError(f"{folder.path} has no folder {STUDENT}; name the folder of a finished run")
    _require_name(folder, hub)
    for path in (local / STUDENT, *(local / STUDENT).rglob("*")):
        if path.is_symlink():  # To a private file, for instance, of whoever pushes.
            raise PushRefused(
                f"{path} is a link to {os.readlink(path)}, and links are not pushed; put the file "
                "or folder itself there"
            )
    for attempt in range(1, ATTEMPTS + 1):
        try:
            commit = _commit(_api(), local / STUDENT, hub, _pushed(folder), replace)
            break
        except RunError:
            raise
        except Exception as error:  # As above.
            status = _status(error)
            if status < 500 or attempt == ATTEMPTS or _is_of_xet(error):
                raise PushRefused(_remedy(hub, status, error)) from None
            time.sleep(PAUSE_S * attempt)
    record = {"repo": hub.repo, "private": hub.private, **commit}
    folder.write_text(HUB, json.dumps(record, indent=2) + "\n")
    return record


def _require_name(folder: RunFolder, hub: HubConfig) -> None:
    """That a student which is handed on has a name with the prefix that it owes."""
    try:
        terms = read_object(folder, MANIFEST).get("terms")
    except (BrokenFile, FileNotFoundError):
        return
    told = terms if isinstance(terms, dict) else {}
    duties = [(str(kind), str(value)) for kind, value in told.get("duties") or ()]
    why = wrong_name(duties, hub.repo) if told.get("distributed") or not hub.private else None
    if why is not None:
        raise PushRefused(f"the repository {why}")


def _status(error: Exception) -> int:
    """The HTTP status of a failure; 500 where it has none. Xet tells it in words."""
    told = XET_STATUS.search(str(error)) if _is_of_xet(error) else None
    if told:
        return int(told[1])
    return getattr(getattr(error, "response", None), "status_code", 500)


def _is_of_xet(error: Exception) -> bool:
    """Whether hf_xet gave up, after attempts of its own: most of its errors are Python's."""
    plain = type(error) in (RuntimeError, ConnectionError, TimeoutError)
    return plain or type(error).__module__.startswith("hf_xet")


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


def _pushed(folder: RunFolder) -> dict[str, Any]:
    """What an earlier push noted; {} without one."""
    if not folder.exists(HUB):
        return {}
    try:
        return read_object(folder, HUB)
    except BrokenFile:
        return {}


def _commit(
    api: "HfApi", student: Path, hub: HubConfig, before: dict[str, Any], replace: bool
) -> dict[str, Any]:
    """Make the repository's files those of the student, in one commit on top of what was seen."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        head = api.repo_info(hub.repo).sha
    except RepositoryNotFoundError:
        api.create_repo(hub.repo, private=hub.private)
        head = api.repo_info(hub.repo).sha
    files = sorted(path for path in student.rglob("*") if path.is_file())
    own = [(path, path.relative_to(student).as_posix()) for path in files]
    # What we pushed ourselves, and nobody has changed since, is ours to change.
    ours = before.get("repo") == hub.repo and before.get("commit") == head
    remote = _require_free(api, hub, own, replace=replace or ours)
    new = [(p, name) for p, name in own if name not in remote or not _same(p, remote[name])]
    gone = sorted(set(remote) - {name for _, name in own} - THEIRS)
    commit = head
    if new or gone:
        done = api.create_commit(
            hub.repo,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=p) for p, name in new),
                *(CommitOperationDelete(path_in_repo=name) for name in gone),
            ],
            commit_message="A student distilled with Raystill",
            parent_commit=head,
        )
        commit = done.oid
    url = f"{api.endpoint}/{hub.repo}"
    return {"commit": commit, "url": url, "files": len(own), "sent": len(new)}


def _require_free(
    api: "HfApi", hub: HubConfig, own: list[tuple[Path, str]], replace: bool
) -> "dict[str, RepoFile]":
    """The repository's files by name; {} where there is none. Raises PushRefused where it has files
    that are not ``own``, without ``replace``, or is public though the student is to be private.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.repo_info(hub.repo)
    except RepositoryNotFoundError:
        return {}
    if hub.private and info.private is False:
        raise PushRefused(
            f"{hub.repo} is there and public, but the student is to be private "
            "(output.hub.private); make it private, or name another repository"
        )
    tree = api.list_repo_tree(hub.repo, recursive=True)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    local = {name: path for path, name in own}
    other = [
        name
        for name, entry in sorted(remote.items())
        if name not in THEIRS and not (name in local and _same(local[name], entry))
    ]
    if other and not replace:
        named = ", ".join(other[:SHOWN]) + (", ..." if len(other) > SHOWN else "")
        raise PushRefused(
            f"{hub.repo} has files that are not this student's ({named}); name another "
            "repository, or replace them with 'push RUN_FOLDER --replace' (its history keeps them)"
        )
    return remote


def _same(path: Path, entry: "RepoFile") -> bool:
    """Whether a file of ours has the content that the repository's has."""
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    content = path.read_bytes()  # As git names a file: by its size and content.
    return sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


def _remedy(hub: HubConfig, status: int, error: BaseException) -> str:
    """What was refused, in words, and what to do about it."""
    owner = hub.repo.partition("/")[0]
    known = {
        401: "the Hub does not accept the token; set HF_TOKEN to a valid one",
        403: f"the token may not write to {owner}; use one with write access to {owner}",
        404: f"the Hub knows no {owner}; correct output.hub.repo",
        409: f"{hub.repo} was changed by somebody else meanwhile; push again",
        412: f"{hub.repo} was changed by somebody else meanwhile; push again",
        429: "the Hub has too many requests of this token; push again later",
    }
    if isinstance(error, Exception) and _is_of_xet(error) and status not in known:
        return (
            f"Xet, which keeps the Hub's large files, failed ({_reason(error)}); push again, or "
            "with HF_HUB_DISABLE_XET=1 where its servers cannot be reached: what is there stays"
        )
    return known.get(status, f"the Hub failed ({_reason(error)}); push again: what is there stays")


def _reason(error: BaseException) -> str:
    text = redact(str(error)).strip().partition("\n")[0]
    return text or type(error).__name__
