"""Links and pipes in place of the files that a store or a run locks and appends to, by which the
files of somebody else would be written.
"""

import os
from pathlib import Path

import pytest

from raystill.base.errors import RunError
from raystill.base.records import MetricsLog, open_own
from raystill.base.run_folder import RunFolder
from raystill.cluster.job.driver_process import LOCK as DRIVER_LOCK
from raystill.cluster.job.driver_process import hold_run_folder
from raystill.datasets.lookup.files import FOLDER
from raystill.datasets.lookup.keeping import LOCK
from raystill.datasets.store.lease import LEASE
from tests.hostile.judge import OTHERS, Case, content_of
from tests.hostile.places import IDENTITY, Bases
from tests.hostile.test_newer_settings import judged

LETTER = f"../{OTHERS}/letter.txt"
KEEPERS = {
    "compact": ("store", "compact", "store"),
    "prune": ("store", "prune", "store"),
    "revoke": ("revoke", "store", "--teacher", IDENTITY[:8]),
}
READERS = {"list": ("store", "list", "store"), "verify": ("store", "verify", "store")}
NO_LOCKS = {
    "a link": (f"link {LETTER}", "is a link, and is not written to"),
    "a link to nothing": (f"link ../{OTHERS}/made.txt", "is a link, and is not written to"),
    "a link to a device": ("link /dev/zero", "is a link, and is not written to"),
    "a pipe": ("pipe", "is a device or pipe"),
    "a folder": ("folder", "directory"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("links"))


def seen(bases: Bases, case: Case) -> tuple[str, bool]:
    """What is told, and whether the files of others are as they were."""
    place = bases.fresh(case.base)  # Which the case is given anew.
    before = content_of(place / OTHERS)
    told = judged(bases, case)
    return told, content_of(place / OTHERS) == before


@pytest.mark.parametrize("kind", NO_LOCKS)
@pytest.mark.parametrize("verb", KEEPERS)
def test_the_lock_of_a_stores_upkeep(bases: Bases, verb: str, kind: str) -> None:
    content, words = NO_LOCKS[kind]
    case = Case(KEEPERS[verb], {f"store/{LEASE}": content}, "store", frozenset({1}))
    told, untouched = seen(bases, case)
    assert words in told and LEASE in told and untouched


@pytest.mark.parametrize("kind", NO_LOCKS)
@pytest.mark.parametrize("verb", READERS | KEEPERS)
def test_the_lock_of_a_stores_index(bases: Bases, verb: str, kind: str) -> None:
    content = NO_LOCKS[kind][0].replace("link ..", "link ../..")
    words = (READERS | KEEPERS)[verb]
    case = Case(words, {f"store/{FOLDER}/{LOCK}": content}, "store", frozenset({0}))
    assert seen(bases, case)[1]


@pytest.mark.parametrize("place", [f"logs/{DRIVER_LOCK}", "metrics.jsonl", "logs/driver.log"])
@pytest.mark.parametrize("target", ["letter.txt", "nothing"])
def test_the_files_of_a_run(tmp_path: Path, place: str, target: str) -> None:
    (tmp_path / "letter.txt").write_text("of somebody else")
    folder = RunFolder(str(tmp_path / "run")).ensure()
    (folder.logs / "ray").symlink_to("/nowhere")  # Ray's own, of a session that is gone.
    (tmp_path / "large").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "large")
    with hold_run_folder(folder):
        pass
    link = tmp_path / "run" / place
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(RunError, match="is a link to"), hold_run_folder(folder):
        pass
    assert (tmp_path / "letter.txt").read_text() == "of somebody else"
    assert not (tmp_path / "nothing").exists()


def test_what_is_moved_aside_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("of somebody else")
    folder = RunFolder(str(tmp_path / "run")).ensure()
    log = MetricsLog(folder)
    for step in (1, 2):
        log.append({"step": step})
    (tmp_path / "run/metrics.jsonl.part").symlink_to(tmp_path / "letter.txt")
    assert log.discard_beyond(1) == 1
    assert (tmp_path / "letter.txt").read_text() == "of somebody else"
    assert not (tmp_path / "run/metrics.jsonl").is_symlink()


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in (b"1", b"2"):
        with open_own(path) as file:
            file.write(text)
    assert path.read_bytes() == b"12"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "link", "loop", "."):
        with pytest.raises(OSError):
            open_own(tmp_path / name)
    assert path.read_bytes() == b"12"


PLACES: dict[str, bytes | str] = {
    "run/summary.json": b"",
    "sound.yaml": b"",
    f"{OTHERS}/letter.txt": b"",
    "to/letter.txt": f"link {LETTER}",
    "to/pipe": "pipe",
    "to/device": "link /dev/null",
    "to/folder": "folder",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_page_takes_the_place_of_nothing_else(
    bases: Bases, place: str, more: tuple[str, ...]
) -> None:
    files = {name: content for name, content in PLACES.items() if content and name == place}
    case = Case(("report", "run", "--html", place, *more), files, "run", frozenset({1}))
    told, untouched = seen(bases, case)
    assert ("is no page" in told or "is a folder, device or pipe" in told) and untouched


def test_a_page_takes_the_place_of_a_page(bases: Bases) -> None:
    empty: dict[str, bytes | str] = {"a.html": b"", "b.html": b"<!DOCTYPE html>\n<p>Of before."}
    for name in ("a.html", "b.html", "c.html"):
        case = Case(("report", "run", "--html", name), empty, "run", frozenset({0}))
        assert name in seen(bases, case)[0]
