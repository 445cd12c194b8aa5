"""Runs one hostile case in this process, and says what is wrong with what the command did.

A case is a folder's files and a command line. Wanted of each: an exit status that it allows, no
traceback, at most 4,000 printable characters for a person or one JSON value for a program, less
than five seconds of processor time, the planted secret untold, and the files of others as they
were.
"""

import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import driver
from raystill.base.redact import spellings
from raystill.cluster.commands import as_json
from raystill.datasets.store.segment import OWN_NAME
from tests.support.sound_run import SOUND

MOST_CHARACTERS = 4_000
LONGEST_S = 5.0
SECRET = "planted'Secret@77-of\"hostile"
VARIABLE = "DB_PASSWORD"
OTHERS = "others"
"""The folder of somebody else, beside what a case is about."""
IN_JOURNAL = re.compile(r"store/batches/[0-9a-f]{32}\.(plan|batch|end)\.json")


@dataclass(frozen=True)
class Case:
    """One command on files.

    Attributes:
        words: The command line.
        files: Content by path, over the base's: bytes, or ``folder``, ``pipe``, or ``link TARGET``.
        base: What the folder begins with: ``run_file``, ``model``, ``run`` or ``store``.
        statuses: The exit statuses that are right.
    """

    words: tuple[str, ...]
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    base: str = "run_file"
    statuses: frozenset[int] = frozenset({0, 1, 2})


def write(place: Path, files: Mapping[str, bytes | str]) -> None:
    """Put files at their places; what is there goes."""
    for name, content in files.items():
        path = place / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(content.removeprefix("link "))


def sound_place(place: Path) -> None:
    """A sound run file with its prompts, and a folder of others."""
    rows = [{"prompt": f"Count to {i}."} for i in range(8)]
    write(
        place,
        {
            "prompts.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "sound.yaml": yaml.safe_dump(SOUND).encode(),
            f"{OTHERS}/letter.txt": b"of somebody else",
            f"{OTHERS}/{'0' * 32}.parquet": b"no segment of ours",
            f"{OTHERS}/deep/.gitkeep": b"",
        },
    )


@dataclass(frozen=True)
class Told:
    """What a command did: its exit status, its two outputs, its processor time in seconds."""

    status: int
    out: str
    err: str
    seconds: float


@contextmanager
def inside(place: Path) -> Iterator[None]:
    """The current folder, with a secret in the environment."""
    before, home = Path.cwd(), os.environ.pop("RAYSTILL_HOME", None)
    os.environ[VARIABLE] = SECRET
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)
        del os.environ[VARIABLE]
        if home is not None:
            os.environ["RAYSTILL_HOME"] = home


def call(words: tuple[str, ...]) -> Told:
    """The command in this process; what it prints must be of characters that UTF-8 has."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2)]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    start = time.process_time()
    try:
        status = driver.main(words)
    finally:
        seconds = time.process_time() - start
        sys.stdout, sys.stderr = before
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Told(status, texts[0], texts[1], seconds)


def content_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder; links are not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def judge(case: Case, place: Path) -> list[str]:
    """Run a case in ``place``, which its base has filled; what is wrong, a line each."""
    write(place, case.files)
    own = {name: data for name, data in case.files.items() if isinstance(data, bytes)}
    before = content_of(place / OTHERS)
    with inside(place):
        told = call(case.words)
    wrong = list(faults(told, case.statuses, "--json" in case.words, parts_of_secret(case)))
    if content_of(place / OTHERS) != before:
        wrong.append("files of others were changed")
    for name, data in own.items():
        path = place / name
        if OWN_NAME.fullmatch(path.name) or path.name in ("report.html", "comparison.html"):
            continue
        if not path.exists() and is_revoked(case, name):
            continue
        if not path.is_file() or path.read_bytes() != data:
            wrong.append(f"{name} was changed")
    return wrong


def is_revoked(case: Case, name: str) -> bool:
    """Whether a file is of a batch's journal, which ``revoke`` takes out with the answers."""
    does = "revoke" in case.words and "--dry-run" not in case.words
    return does and IN_JOURNAL.fullmatch(name) is not None


PARTS = frozenset(SECRET[i : i + 8] for i in range(len(SECRET) - 7))


def parts_of_secret(case: Case) -> frozenset[str]:
    """What no command may tell: the parts of the secret that the case has in whole secrets alone.

    Of a secret that was cut or spoilt before it was given, nobody knows that it is one.
    """
    given = [data.decode("utf-8", "replace") for data in map(as_bytes, case.files.values())]
    given += case.words
    for spelling in sorted(spellings(SECRET), key=len, reverse=True):
        given = [text.replace(spelling, "\0") for text in given]
    return frozenset(part for part in PARTS if not any(part in text for text in given))


def as_bytes(content: bytes | str) -> bytes:
    """The content of a file; what says what else it is, as text."""
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")


def faults(
    told: Told, statuses: frozenset[int], as_value: bool, parts: frozenset[str] = PARTS
) -> Iterator[str]:
    """What is wrong with what a command told. parts: of the secret, which it may not tell."""
    both = told.out + told.err
    if told.status not in statuses:
        yield f"exit status {told.status}, not one of {sorted(statuses)}"
    if "Traceback" in both or "unexpected:" in both:
        yield f"a traceback: {both[both.find('unexpected:') :][:200]}"
    for_person = told.err if as_value else both
    if len(for_person) > MOST_CHARACTERS:
        yield f"{len(for_person):,} characters"
    if odd := {c for c in both if not (c.isprintable() or c == "\n")}:
        yield f"characters that cannot be printed: {sorted(odd)[:5]!a}"
    if told.seconds > LONGEST_S:
        yield f"{told.seconds:.1f} s"
    if any(part in both for part in parts):
        yield "the secret is told"
    if as_value and told.out:
        yield from no_value(told.out)


def no_value(text: str) -> Iterator[str]:
    """Why an answer is none for programs."""
    if len(text) > as_json.MOST_CHARACTERS:
        yield f"{len(text):,} characters of JSON"
    try:
        json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        yield f"no JSON: {error}"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
