"""Where a benchmark's figures go: one JSON file with the machine, the settings and the commit."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Store a result with its date and commit (marked where the tree has uncommitted changes)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    stamped = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamped, indent=2) + "\n")
    print(f"stored in {path}")
