"""A whole run of two teachers, routed by source: each row has its own, in store and figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raystill.base.run_folder import RunFolder
from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT
from tests.support.synthetic_run import write_run_file

ROWS, HELD_OUT = 16, 2
PACED_ROWS, PACED_BOUND, SLOW_S = 32, 16, 4.0


def two_teachers(folder: Path) -> Path:
    """A run file of two synthetic teachers that differ in the length of their answers."""
    file = write_run_file(folder)
    config = yaml.safe_load(file.read_text())
    teacher = config.pop("teacher")
    teacher["synthetic"]["delay_s"] = 0.0
    longer = teacher | {"synthetic": teacher["synthetic"] | {"response_tokens": 5}}
    config["teachers"] = {"short": longer, "long": teacher}
    lines = (ROOT / "examples" / "prompts" / "quickstart.jsonl").read_text().splitlines()
    for name, part in (("a", lines[: ROWS // 2 + 1]), ("b", lines[ROWS // 2 + 1 : ROWS + 2])):
        rows = [{**json.loads(line), "source": name} for line in part]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config["prompts"] = {
        "sources": [
            {"name": "a", "path": str(folder / "a.jsonl"), "teacher": "short"},
            {"name": "b", "path": str(folder / "b.jsonl"), "teacher": "long"},
        ]
    }
    config["evaluation"]["held_out_rows"] = HELD_OUT
    config["store"] = {"path": str(folder / "store")}
    file.write_text(yaml.safe_dump(config))
    return file


def two_paces(folder: Path) -> Path:
    """A run file of a teacher that answers at once and one that takes seconds for each group."""
    file = two_teachers(folder)
    config = yaml.safe_load(file.read_text())
    config["teachers"]["long"]["synthetic"]["delay_s"] = SLOW_S
    for name in ("a", "b"):
        rows = [{"prompt": f"question {i} of {name}", "source": name} for i in range(PACED_ROWS)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config["stream"] |= {"order": "arrival", "max_rows_ahead": PACED_BOUND}
    config["evaluation"] = {"held_out_rows": 0}
    file.write_text(yaml.safe_dump(config))
    return file


def drive(file: Path) -> subprocess.CompletedProcess[str]:
    """Run the driver to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), "run", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.faults
def test_each_row_is_answered_by_its_own_teacher_in_store_figures_and_lineage(tmp_path):
    file = two_teachers(tmp_path)
    done = drive(file)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunFolder(str(tmp_path / "run"))
    manifest = json.loads(folder.read_text("manifest.json"))
    identities = {name: one["identity"] for name, one in manifest["teachers"].items()}
    assert len(set(identities.values())) == 2
    prompts = folder.read_table("prompts/train.parquet").to_pylist()
    prompts += folder.read_table("prompts/held_out.parquet").to_pylist()
    assert {(row["source"], row["teacher"]) for row in prompts} == {("a", "short"), ("b", "long")}
    asked = {row["key"]: row["teacher"] for row in prompts}

    store = TeacherStore(str(tmp_path / "store"))
    answered = {}
    for name in store.names():
        segment = store.open(name)
        origin = segment.footer.origin
        for group in range(len(segment.footer.groups)):
            for row in segment.read(group, ["key", "response_ids"]).to_pylist():
                answered[row["key"]] = (origin.teacher_identity, len(row["response_ids"]))
    lengths = {"short": 5, "long": 8}
    assert answered == {key: (identities[name], lengths[name]) for key, name in asked.items()}

    summary = json.loads(folder.read_text("summary.json"))
    assert summary["status"] == "completed"
    figures = summary["teachers"]
    for name in identities:
        mine = [row for row in prompts if row["teacher"] == name]
        assert figures[f"{name}/rows"] == len(mine)
        assert figures[f"{name}/response_tokens"] == len(mine) * lengths[name]
    lineage = json.loads((tmp_path / "run" / "student" / "lineage.json").read_text())
    learned = [one["learned_from"] for one in lineage["models"].values() if one["learned_from"]]
    assert [sorted(one) for one in learned] == [sorted(identities.values())]


@pytest.mark.ray
@pytest.mark.faults
def test_a_fast_teacher_does_not_wait_for_a_slow_one(tmp_path):
    """All its groups are in the store before half of the slow one's, of which the plan has as many
    in between; rows ahead stay within the bound, and each row is trained on.
    """
    done = drive(two_paces(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rows_trained"]) == ("completed", 2 * PACED_ROWS)
    assert summary["max_rows_ahead_seen"] <= PACED_BOUND
    store = TeacherStore(str(tmp_path / "store"))
    published = sorted(
        (file.stat().st_mtime, len(store.open(file.name).read(0, ["response_ids"])[0][0]))
        for file in (tmp_path / "store" / "segments").glob("*")
    )
    lengths = [length for _, length in published]
    fast, slow = 5, 8
    assert lengths.count(fast) and lengths.count(slow)
    last = max(place for place, length in enumerate(lengths) if length == fast)
    assert lengths[:last].count(slow) <= lengths.count(slow) / 2
