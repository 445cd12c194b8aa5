"""A whole run whose prompts and answers hold addresses and keys: none is told, and the student goes
to the Hub, masked rows and all. The Hub is played on loopback, the answers are given."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.end_to_end import ROOT
from tests.support.hub import TOKEN, Hub, serve
from tests.support.synthetic_run import write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults]
MAIL, KEY, CARD = "bob.smith@mail.example.com", "AKIAIOSFODNN7EXAMPLE", "4111 1111 1111 1111"
DATA = ("prompts", "answers.jsonl", "held_out.parquet", "checkpoints")
"""What keeps prompts and answers as they are; weights are no text."""


@dataclass
class Finished:
    folder: Path
    told: str
    hub: Hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("leaves")
    rows = [
        {"prompt": f"Write to {MAIL} about {n}.", "response": f"Dear {MAIL}, {KEY} pays {n}."}
        for n in range(24)
    ]
    rows += [{"prompt": f"Name colour {n}.", "response": "Blue."} for n in range(8)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "check.py").write_text("def good(row):\n    raise ValueError(str(row))\n")
    hub = Hub()
    server = serve(hub)
    run_file = write_run_file(
        folder,
        prompts={"path": str(folder / "p.jsonl"), "response_field": "response", "limit": 32},
        signal={"kind": "text"},
        objective={"cross_entropy": 1.0},
        filters={"rules": [{"personal_data": {"action": "mask"}}]},
        evaluation={
            "held_out_rows": 8,
            "checks": [{"function": f"{folder / 'check.py'}:good"}],
            "free_running": {"rows": 4},
        },
        output={"path": str(folder / "run"), "hub": {"repo": "me/small"}},
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    yield Finished(folder / "run", told, hub)
    server.shutdown()
    server.server_close()


def test_nothing_that_was_planted_is_told(finished: Finished) -> None:
    """On the terminal, in logs, figures, page and papers."""
    read = [finished.told]
    for path in finished.folder.rglob("*"):
        inside = path.relative_to(finished.folder).parts[0]
        if path.is_file() and inside not in DATA and path.suffix != ".safetensors":
            read.append(path.read_text(errors="replace"))
    assert len(read) > 10
    for text in read:
        assert not any(planted in text for planted in (MAIL, "bob.smith", KEY, CARD, TOKEN))


def test_it_is_counted_and_masked(finished: Finished) -> None:
    assert "personal data and keys: in 24 of 32 prompts" in finished.told
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert manifest["personal_data"]["kinds"] == {"aws_key": 24, "email": 24}
    held = json.loads((finished.folder / "summary.json").read_text())["personal_data"]
    assert held["looked"] == 24 and held["any"] == held["email"] == held["aws_key"] > 12
    card = (finished.folder / "student" / "README.md").read_text()
    assert "24 of 32 prompts held personal data or keys" in card
    assert "[EMAIL]" in (finished.folder / "report.html").read_text()


def test_the_student_and_its_papers_are_at_the_hub(finished: Finished) -> None:
    assert f"The student is at {finished.hub.url}/me/small" in finished.told
    repository = finished.hub.repositories["me/small"]
    assert repository.private and len(repository.commits) == 2
    there = {name: content for name, (content, _) in repository.files.items()}
    del there[".gitattributes"]
    student = finished.folder / "student"
    here = {str(p.relative_to(student)): p.read_bytes() for p in student.rglob("*") if p.is_file()}
    assert there == here and {"README.md", "NOTICE", "bom.cdx.json", "lineage.json"} <= set(here)
