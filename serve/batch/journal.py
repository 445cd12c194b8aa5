"""The journal of batches: which answers were asked for in which batch, beside the teacher store.

A folder ``batches`` in the store's folder, so that every run of the store finds what another has
paid for. Of each batch, under a name of our own:

====================  ============================================================================
``NAME.plan.json``    Written before anything is uploaded: keys, service, the most that it costs.
``NAME.batch.json``   The service's id of the batch, as soon as it has one.
``NAME.lines.jsonl``  The lines that came back, answers and errors, as they came.
``NAME.end.json``     How it ended: written once the lines are here, or that it was never submitted.
====================  ============================================================================

A kill between any two of them loses nothing: a plan without a batch is looked for at the service by
its name, which the batch carries in its metadata; a batch without an end is asked for again.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any
from uuid import uuid4

from raystill.base.records import RESTORE, BrokenFile, number, read_object
from raystill.base.run_folder import RunFolder

BATCHES = "batches"
NEVER = "never_submitted"
"""How a plan ended whose batch the service does not have."""
LONGEST_LINE = 64 << 20
"""Bytes of a line that is read: 30,000 tokens with 20 named beside each have no more."""
PLAN, BATCH, LINES, END = ".plan.json", ".batch.json", ".lines.jsonl", ".end.json"


@dataclass(frozen=True)
class Plan:
    """One batch, from the wish to its end.

    run: path of the run folder that submits it. keys: hexadecimal, each once. most: what it costs
    at most. prompt_tokens: of each key's prompt, by our own count; none where an earlier version
    has written the plan.
    created: seconds since 1970. batch: the service's id. status: how it ended.
    """

    run: str
    service: str
    model: str
    keys: tuple[str, ...]
    most: float
    prompt_tokens: tuple[int, ...] = ()
    name: str = field(default_factory=lambda: uuid4().hex)
    created: float = field(default_factory=time.time)
    batch: str | None = None
    status: str | None = None


class BatchJournal:
    """The journal in one store's folder. Its methods block."""

    def __init__(self, store_path: str) -> None:
        self.folder = RunFolder(RunFolder(store_path).join(BATCHES))

    def plans(self) -> list[Plan]:
        """All plans, the oldest first. Raises BrokenFile for what this version does not write."""
        names = set(self.folder.names())
        found = []
        for file in names:
            if not file.endswith(PLAN):
                continue
            plan = self._plan(file)
            if plan.name + BATCH in names:
                plan = replace(plan, batch=self._text(plan.name + BATCH, "batch"))
            if plan.name + END in names:
                plan = replace(plan, status=self._text(plan.name + END, "status"))
            found.append(plan)
        return sorted(found, key=lambda plan: (plan.created, plan.name))

    def _plan(self, file: str) -> Plan:
        """A plan as it was written. Its name is that of its file, by which others are written."""
        told = read_object(self.folder, file)
        texts, numbers = ("run", "service", "model", "name"), ("most", "created")
        keys, counts = told.get("keys"), told.get("prompt_tokens", [])
        if (
            told.keys() - {"prompt_tokens"} != {*texts, *numbers, "keys"}
            or not all(isinstance(told[name], str) and "\0" not in told[name] for name in texts)
            or not all(number(told[name]) is not None for name in numbers)
            or not (isinstance(keys, list) and all(isinstance(key, str) for key in keys))
            or not (isinstance(counts, list) and len(counts) in (0, len(keys)))
            or not all(type(count) is int and count >= 0 for count in counts)
            or told["name"] != file.removesuffix(PLAN)
        ):
            raise BrokenFile(f"{self.folder.path}/{file} is no plan of this version; {RESTORE}")
        return Plan(**{**told, "keys": tuple(keys), "prompt_tokens": tuple(counts)})

    def _text(self, file: str, name: str) -> str:
        """What one file says under one name."""
        value = read_object(self.folder, file).get(name)
        if not isinstance(value, str):
            raise BrokenFile(f"{self.folder.path}/{file} has no {name} in words; {RESTORE}")
        return value

    def planned(self, plan: Plan) -> None:
        """Note what is about to be uploaded."""
        told = asdict(plan)
        self._write(plan.name + PLAN, {n: told[n] for n in told if n not in ("batch", "status")})

    def submitted(self, plan: Plan, batch: str) -> Plan:
        """Note the service's id."""
        self._write(plan.name + BATCH, {"batch": batch})
        return replace(plan, batch=batch)

    def room(self) -> IO[bytes]:
        """An unnamed file for lines on their way, on the journal's own disk if that is here."""
        return tempfile.TemporaryFile(dir=self.folder.local)

    def ended(self, plan: Plan, status: str, lines: bytes | IO[bytes] | None) -> Plan:
        """Keep what came back, then note that it is all."""
        if lines is not None:
            self.folder.write_bytes(plan.name + LINES, lines)
        self._write(plan.name + END, {"status": status})
        return replace(plan, status=status)

    def forget(self, plan: Plan) -> None:
        """Remove a batch and what came back; a kill on the way leaves one that says nothing."""
        self._write(plan.name + END, {"status": NEVER})
        for name in (LINES, BATCH, PLAN, END):
            if self.folder.exists(plan.name + name):  # Not by a list of all: they may be thousands.
                self.folder.delete(plan.name + name)

    def lines(self, plan: Plan) -> "Lines":
        """What came back of a plan that has ended."""
        if plan.status in (None, NEVER):
            return Lines({})
        return read_lines(lambda: self.folder.open_input(plan.name + LINES), plan.keys)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.write_text(name, json.dumps(content) + "\n")


@dataclass(frozen=True)
class Line:
    """What came back for one key. status: the HTTP status; None where the service did not ask.

    body: of the response. code, message: of an error.
    """

    status: int | None
    body: Any = None
    code: str = ""
    message: str = ""


@dataclass(frozen=True)
class Lines:
    """What came back of a batch; lines beyond one a key; lines that say nothing.

    They stay in their file, which ``source`` opens: all of a batch may be more than memory has.
    places: by key, where the line that counts begins. later: the service took none of it now, and
    smaller batches may pass.
    """

    places: dict[str, int]
    source: Callable[[], Any] = io.BytesIO
    repeated: int = 0
    broken: int = 0
    later: bool = False

    def line(self, key: str) -> Line | None:
        """What came back for a key; None: nothing did. Blocks. Raises OSError."""
        place = self.places.get(key)
        return None if place is None else next(self._at([place]))

    def each(self) -> Iterator[tuple[str, Line]]:
        """All lines that count, by key. Blocks."""
        keys = sorted(self.places, key=self.places.__getitem__)
        return zip(keys, self._at([self.places[key] for key in keys]), strict=True)

    def _at(self, places: Sequence[int]) -> Iterator[Line]:
        with closing(io.BufferedReader(self.source())) as stream:
            for place in places:
                stream.seek(place)
                line = _parsed(stream.readline(LONGEST_LINE))[1]
                if line is None:
                    raise OSError("a batch's lines have changed")
                yield line


def read_lines(source: Callable[[], Any], keys: Sequence[str]) -> Lines:
    """Lines in any order. Of several with one key the first answer counts, else the first line.

    Lines that are no JSON, or of a key that was not asked for, say nothing.
    """
    wanted, repeated, broken = set(keys), 0, 0
    places, good = dict[str, int](), set[str]()
    with closing(io.BufferedReader(source())) as stream:
        for place, raw in _lines(stream):
            key, line = _parsed(raw)
            if line is None or key not in wanted:
                broken += 1
                continue
            if key in places:
                repeated += 1
                if key in good or line.status != 200:
                    continue
            places[key] = place
            good.update([key] if line.status == 200 else [])
    return Lines(places, source, repeated, broken)


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, and where they begin; of one that is too long its beginning."""
    while True:
        place = stream.tell()
        raw = rest = stream.readline(LONGEST_LINE)
        while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE)
        if not raw:
            return
        if raw.strip():
            yield place, raw


def _parsed(raw: bytes) -> tuple[str, Line | None]:
    try:
        told = json.loads(raw)
        response, error = told.get("response") or {}, told.get("error") or {}
        body = response.get("body")
        status = response.get("status_code")
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            error = error or body["error"]
        known = status if isinstance(status, int) else None
        line = Line(known, body, str(error.get("code") or ""), str(error.get("message") or ""))
        return str(told["custom_id"]), line
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return "", None
