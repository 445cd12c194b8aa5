"""``revoke``: exactly one teacher's rows go, and every student that learned from them is named."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from driver import main
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.compaction import compact
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.lease import Lease
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.upkeep import verify
from raystill.serve.batch.journal import BatchJournal, Plan
from tests.datasets.test_store import TOPK, V, segment

BAD, GOOD = "ab" * 32, "abcd" + "ef" * 30


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """A store beside runs: three segments of one teacher, in two signals, and two of another."""
    store = TeacherStore(str(tmp_path / "runs" / "teacher_store"))
    for identity, name, rows, signal, run in (
        (BAD, "big", [0, 1, 2], TOPK, "run-a"),
        (BAD, "big", [3, 4], TOPK, "run-b"),
        (BAD, "big", [0, 1], Signal("text"), "run-b"),
        (GOOD, "small", [10, 11, 12], TOPK, "run-a"),
        (GOOD, "small", [13, 14], TOPK, "run-c"),
    ):
        origin = Origin(identity, name, "vllm", "1", "float32", V, signal)
        teacher = 0 if identity == BAD else 1
        store.publish(origin, Provenance(run, "training"), segment(rows, signal, teacher=teacher))
    return store


def run_folder(tmp_path: Path, name: str, finished: bool = True, **manifest: Any) -> Path:
    folder = tmp_path / "runs" / name
    (folder / "student").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def identities(store: TeacherStore) -> list[str]:
    return [entry.footer.origin.teacher_identity for entry in store.catalogue().entries]


def told(capsys: Any, *words: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["revoke", *words, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_all_rows_of_one_teacher_go_and_no_other(
    merged: bool, store: TeacherStore, capsys: Any
) -> None:
    if merged:  # Two rows are poorer duplicates.
        compact(store)
    found = told(capsys, store.path, "--teacher", BAD[:8])
    counts = (found["identity"], found["rows"], found["all_rows"])
    assert counts == ((BAD, 5, 10) if merged else (BAD, 7, 12))
    assert found["runs"] == {"run-a": 3, "run-b": 2 if merged else 4}
    assert set(identities(store)) == {GOOD} and store.catalogue().rows == 5
    assert not verify(store)
    assert main(["revoke", store.path, "--teacher", BAD[:8]]) == 1
    assert "is no teacher of" in capsys.readouterr().err


def test_a_dry_run_removes_nothing(store: TeacherStore, capsys: Any) -> None:
    before = store.names()
    assert len(told(capsys, store.path, "--teacher", "big", "--dry-run")["removed"]) == 3
    assert store.names() == before


@pytest.mark.parametrize("teacher", ["", "a", "ab", "abc", "ffff", "BIG", "models/big", "*"])
def test_who_is_not_named_clearly_loses_nothing(
    teacher: str, store: TeacherStore, capsys: Any
) -> None:
    before = store.names()
    assert main(["revoke", store.path, "--teacher", teacher]) == 1
    assert "big" in capsys.readouterr().err and store.names() == before


def test_a_beginning_that_two_teachers_have_is_refused(store: TeacherStore, capsys: Any) -> None:
    origin = Origin("abcd" + "00" * 30, "third", "vllm", "1", "float32", V, TOPK)
    store.publish(origin, Provenance("run", "training"), segment([90], teacher=2))
    assert main(["revoke", store.path, "--teacher", "abcd"]) == 1
    assert "2 teachers" in capsys.readouterr().err
    assert told(capsys, store.path, "--teacher", "abcde")["identity"] == GOOD


def test_students_are_named_by_manifest_store_and_lineage(
    store: TeacherStore, tmp_path: Path, capsys: Any
) -> None:
    run_folder(tmp_path, "taught", teacher_identity=BAD, run_id="x")
    run_folder(tmp_path, "asked", finished=False, teacher_identity="other", run_id="run-b")
    run_folder(tmp_path, "free", teacher_identity=GOOD, run_id="run-c")
    ancestors = {"terms": {"sources": {"ancestors": {BAD: {"name": "big"}}}}}
    run_folder(tmp_path, "second", teacher_identity="cd" * 32, run_id="y", **ancestors)
    one_of_two = {"teachers": {"a": {"identity": GOOD}, "b": {"identity": BAD}, "c": None}}
    run_folder(tmp_path, "of_two", teacher_identity=GOOD, run_id="t", **one_of_two)
    its = {"terms": {"sources": {"teachers": {"b": {"ancestors": {BAD: {"name": "big"}}}}}}}
    run_folder(tmp_path, "second_of_two", teacher_identity=GOOD, run_id="u", **its)
    third = run_folder(tmp_path, "third", teacher_identity="ee" * 32, run_id="z")
    models = {"s": {"name": "s", "learned_from": [BAD]}, BAD: {"name": "big"}}
    lineage = {"raystill_lineage": 1, "student": "s", "models": models}
    (third / "student" / "lineage.json").write_text(json.dumps(lineage))
    found = told(capsys, store.path, "--teacher", "big", "--dry-run")
    learned = {
        Path(one["folder"]).name: (one["how"], one["has_student"]) for one in found["learned"]
    }
    by_it, by_a_student = "taught by it", "taught by a student of it"
    assert learned == {
        "taught": (by_it, True),
        "asked": (by_it, False),
        "second": (by_a_student, True),
        "of_two": (by_it, True),
        "second_of_two": (by_a_student, True),
        "third": (by_a_student, True),
    }
    assert main(["revoke", store.path, "--teacher", "big"]) == 0
    out = capsys.readouterr().out
    assert "7 rows of big" in out and "58.3% of the store" in out
    assert "free" not in out and "no finished student yet" in out


def test_runs_elsewhere_are_looked_at_where_named(
    store: TeacherStore, tmp_path: Path, capsys: Any
) -> None:
    elsewhere = tmp_path / "elsewhere" / "runs"
    run_folder(tmp_path / "elsewhere", "taught", teacher_identity=BAD)
    assert told(capsys, store.path, "--teacher", "big", "--dry-run")["learned"] == []
    for folder in (elsewhere, elsewhere / "taught"):
        words = (store.path, "--teacher", "big", "--dry-run", "--runs", str(folder))
        assert len(told(capsys, *words)["learned"]) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", "[" * 100_000, '{"terms": [], "run_id": []}', "\xff"]
)
def test_a_broken_manifest_is_told_or_passed_over_and_stops_nothing(
    text: str, store: TeacherStore, tmp_path: Path, capsys: Any
) -> None:
    run_folder(tmp_path, "taught", teacher_identity=BAD)
    folder = run_folder(tmp_path, "broken")
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    (folder / "student" / "lineage.json").write_text("{")
    found = told(capsys, store.path, "--teacher", "big")
    assert [Path(one["folder"]).name for one in found["learned"]] == ["taught"]
    assert [Path(name).name for name in found["unread"]] == ["broken"]
    assert BAD not in identities(store)


def test_what_is_not_the_stores_own_stays(store: TeacherStore, tmp_path: Path, capsys: Any) -> None:
    """A link to another store's segment, and a file of something else."""
    segments = Path(store.path) / "segments"
    mine = next(n for n in store.names() if store.open(n).footer.origin.teacher_identity == BAD)
    theirs = tmp_path / mine
    os.rename(segments / mine, theirs)
    (segments / mine).symlink_to(theirs)
    (segments / "notes.txt").write_text("mine")
    told(capsys, store.path, "--teacher", "big")
    assert theirs.is_file() and (segments / mine).is_symlink()
    assert (segments / "notes.txt").read_text() == "mine"


def test_a_segment_that_cannot_be_judged_is_left_and_told(store: TeacherStore, capsys: Any) -> None:
    torn = next(n for n in store.names() if store.open(n).footer.origin.teacher_identity == BAD)
    (Path(store.path) / "segments" / torn).write_bytes(b"PAR1 torn")
    found = told(capsys, store.path, "--teacher", "big", status=1)
    assert [one["segment"] for one in found["refused"]] == [torn]
    assert torn in store.names()


def test_beside_another_upkeep_it_waits_for_nobody_and_removes_nothing(
    store: TeacherStore, capsys: Any
) -> None:
    before = store.names()
    with Lease(store.folder, "compact").held():
        assert main(["revoke", store.path, "--teacher", "big"]) == 1
    assert "in use by 'store compact'" in capsys.readouterr().err and store.names() == before


def test_batches_of_the_teacher_leave_the_journal_and_no_others(
    store: TeacherStore, tmp_path: Path, capsys: Any
) -> None:
    """By an answer that is stored, or by the run that submitted them; an open one too."""
    journal = BatchJournal(store.path)
    keys = {origin: [] for origin in (BAD, GOOD)}  # type: dict[str, list[str]]
    for entry in store.catalogue().entries:
        rows = store.rows_of(entry.name, pa.chunked_array(store.keys_of(entry.name)[1]), ["key"])[1]
        keys[entry.footer.origin.teacher_identity] += [k.hex() for k in rows["key"].to_pylist()]
    runs = {
        name: str(run_folder(tmp_path, name, **manifest))
        for name, manifest in {
            "his": {"teacher_identity": BAD},
            "other": {"teacher_identity": GOOD},
            "both": {"teachers": {"a": {"identity": GOOD}, "b": {"identity": BAD}}},
        }.items()
    }
    Path(runs["both"], "config.yaml").write_text(
        json.dumps({"teachers": {"a": {"api": {}}, "b": {"api": {"batch": {"max_rows": 4}}}}})
    )
    gone, stay = [], []
    for run, of, ended in (
        ("other", [keys[BAD][0], "00" * 16], True),  # An answer of it is stored as his.
        ("his", ["01" * 16], True),
        ("both", ["02" * 16], False),
        ("other", [keys[GOOD][0]], True),
        ("nowhere", ["03" * 16], True),
    ):
        plan = Plan(runs.get(run, "/nowhere"), "http://service", "m", tuple(of), 0.0)
        journal.planned(plan)
        plan = journal.submitted(plan, "batch")
        if ended:
            journal.ended(plan, "completed", b"{}")
        (stay if len(gone) == 3 else gone).append(plan.name)
    words = (store.path, "--teacher", BAD[:8])
    assert told(capsys, *words, "--dry-run")["batches"] == 3 and len(journal.plans()) == 5
    assert main(["revoke", *words]) == 0
    assert "batches of it in the journal beside the store, removed: 3" in capsys.readouterr().out
    assert {plan.name for plan in journal.plans()} == set(stay)
    assert not [name for name in journal.folder.names() if name.partition(".")[0] in gone]
