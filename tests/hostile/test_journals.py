"""The journal of batches beside a store, whose files somebody else may have written: `revoke` reads
it and removes batches, and the journal of a run is read by the next one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raystill.base.records import BrokenFile, read_lines
from raystill.base.run_folder import SPENDING, RunFolder
from raystill.cluster.report.summary import counted
from raystill.serve.api.limits import Spending
from raystill.serve.batch.journal import BatchJournal, Plan
from tests.hostile.judge import OTHERS, SECRET, Case, content_of, inside, judge
from tests.hostile.places import IDENTITY, Bases
from tests.hostile.test_newer_settings import judged

NAME = "c" * 32
KEY = (0).to_bytes(16, "big").hex()
SOUND_PLAN: dict[str, Any] = {
    "run": "runs/x",
    "service": "http://service",
    "model": "m",
    "keys": [KEY],
    "most": 1.0,
    "name": NAME,
    "created": 1.0,
}
REVOKE = ("revoke", "store", "--teacher", IDENTITY[:8])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("journals"))


def plan(**changed: Any) -> bytes:
    return json.dumps(SOUND_PLAN | changed).encode()


WITHOUT = json.dumps({k: v for k, v in SOUND_PLAN.items() if k != "run"}).encode()
NO_PLANS: dict[str, bytes | str] = {
    "empty": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "UTF-16": "{}".encode("utf-16"),
    "without a run": WITHOUT,
    "of a newer version": plan(more=1),
    "with what other files say": plan(status="completed", batch="b"),
    "a name above": plan(name="../../x"),
    "a name of others": plan(name=f"../../{OTHERS}/letter"),
    "an absolute name": plan(name="/tmp/x"),
    "another name": plan(name="d" * 32),
    "a name of 300": plan(name="x" * 300),
    "a name with NUL": plan(name="a\0"),
    "a time of digits": plan(created="1"),
    "no time": plan(created=None),
    "NaN": plan(created=float("nan")),
    "400 digits": plan(created=10**400),
    "a cost of words": plan(most="x"),
    "a run with NUL": plan(run="a\0b"),
    "keys of a key": plan(keys=[[KEY]]),
    "keys as one text": plan(keys=KEY),
    "keys as an object": plan(keys={KEY: 1}),
    "a pipe": "pipe",
    "a device": "link /dev/zero",
    "a folder": "folder",
}
for _name in ("run", "service", "model", "name", "keys"):
    for _kind, _value in {"null": None, "a number": 3, "a list": [["a"]]}.items():
        NO_PLANS[f"{_name}: {_kind}"] = plan(**{_name: _value})


@pytest.mark.parametrize("kind", NO_PLANS)
def test_what_is_no_plan_of_a_batch(bases: Bases, kind: str) -> None:
    files = {f"store/batches/{NAME}.plan.json": NO_PLANS[kind]}
    told = judged(bases, Case(REVOKE, files, "store", frozenset({1})))
    assert f"{NAME}.plan.json" in told and "batches" in told


@pytest.mark.parametrize("name", ["../x", f"../../{OTHERS}/x", "/{place}/y"])
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--json",)])
def test_a_plan_writes_nowhere_else(bases: Bases, name: str, more: tuple[str, ...]) -> None:
    place = bases.fresh("store")
    before = set(content_of(place))
    written = plan(name=name.format(place=place))
    files: dict[str, bytes | str] = {f"store/batches/{NAME}.plan.json": written}
    judged(bases, Case((*REVOKE, *more), files, "store", frozenset({1})))
    assert set(content_of(place)) - before == set(files)


@pytest.mark.parametrize(
    ("key", "more", "goes"),
    [(KEY, (), True), (KEY, ("--dry-run",), False), ("f" * 32, (), False)],
    ids=["his", "dry run", "of nobody known"],
)
def test_a_plan_goes_with_the_answers_of_its_teacher_alone(
    bases: Bases, key: str, more: tuple[str, ...], goes: bool
) -> None:
    name = f"store/batches/{NAME}.plan.json"
    place = bases.fresh("store")
    judged_at = judge(Case((*REVOKE, *more), {name: plan(keys=[key])}, "store"), place)
    assert not judged_at and (place / name).exists() is not goes


ODD: dict[str, bytes | str] = {
    "empty": b"",
    "a list": b"[]",
    "an empty object": b"{}",
    "numbers": b'{"batch": 3, "status": 3}',
    "a pipe": "pipe",
    "a folder": "folder",
}


@pytest.mark.parametrize("what", ["batch", "end"])
@pytest.mark.parametrize("kind", ODD)
def test_what_became_of_a_plan_is_told_in_words(bases: Bases, kind: str, what: str) -> None:
    files = {
        f"store/batches/{NAME}.plan.json": plan(),
        f"store/batches/{NAME}.{what}.json": ODD[kind],
    }
    told = judged(bases, Case(REVOKE, files, "store", frozenset({1})))
    assert f"{NAME}.{what}.json" in told


RUNS = {
    "at a host of its own choice": ("s3://b/x?endpoint_override=http://127.0.0.1:9", "elsewhere"),
    "of another scheme": ("zz://x", "elsewhere"),
    "with a password": (f"s3://me:{SECRET}@b/x", "elsewhere"),
    "with an escape": ("\x1b[2J[/red]", "could not be looked at"),
    "of others": (OTHERS, "could not be looked at"),
    "a device": ("/dev", "could not be looked at"),
    "half a character": ("\ud800", "could not be looked at"),
    "long": ("x" * 5000, "would be removed"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_run_of_a_plan_is_anywhere(bases: Bases, kind: str) -> None:
    run, words = RUNS[kind]
    files: dict[str, bytes | str] = {f"store/batches/{NAME}.plan.json": plan(run=run)}
    told = judged(bases, Case((*REVOKE, "--dry-run"), files, "store", frozenset({0})))
    assert words in told


def test_a_journal_reads_what_it_wrote(tmp_path: Path) -> None:
    journal = BatchJournal(str(tmp_path))
    one = Plan("runs/x", "http://service", "m", (KEY,), 0.0)
    journal.planned(one)
    assert journal.plans() == [one]
    assert journal.plans() == [one] and journal.submitted(one, "b") == journal.plans()[0]
    ended = journal.ended(journal.plans()[0], "completed", b"")
    assert journal.plans() == [ended]
    spoilt: Callable[[str, str], None] = journal.folder.write_text
    spoilt(f"{one.name}.end.json", '{"status": null}')
    with inside(tmp_path), pytest.raises(BrokenFile, match="no status in words"):
        journal.plans()


SPENT = {"half": [0.5], "two": [0.5, 0.25], "without a price": [None, 1.0], "whole": [2]}
NO_SPENDING = {
    "NaN": float("nan"),
    "endless": float("inf"),
    "less than nothing": -1e9,
    "a text": "1",
    "a list": [1],
    "yes": True,
    "400 digits": 10**400,
}


@pytest.mark.parametrize("kind", SPENT)
def test_what_a_run_has_spent_is_added_up(tmp_path: Path, kind: str) -> None:
    lines = "".join(json.dumps({"step": 0, "api_cost": cost}) + "\n" for cost in SPENT[kind])
    folder = RunFolder(str(tmp_path))
    folder.write_text("spending.jsonl", lines)
    assert Spending(folder).cost == sum(cost or 0 for cost in SPENT[kind])


@pytest.mark.parametrize("kind", NO_SPENDING)
def test_a_budget_holds_whatever_a_file_says_was_spent(tmp_path: Path, kind: str) -> None:
    folder = RunFolder(str(tmp_path))
    line = {"step": 0, "api_cost": NO_SPENDING[kind], "api_requests": NO_SPENDING[kind]}
    folder.write_text("spending.jsonl", json.dumps(line) + "\n")
    with pytest.raises(BrokenFile, match=r"spending\.jsonl has an api_cost of"):
        Spending(folder)
    if kind != "less than nothing":
        assert counted(read_lines(folder, SPENDING)) == {}
