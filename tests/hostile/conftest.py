"""The current folder of a hostile case: a sound run file and its prompts."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.sound_run import SOUND


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``sound.yaml`` and ``prompts.jsonl``, made the current one."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Count to {i}."} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "sound.yaml").write_text(yaml.safe_dump(SOUND))
    return tmp_path
