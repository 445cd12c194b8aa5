"""A program for the interpreter that has the harness: which tasks can be loaded, and their data?

    python -P probe.py NAME...      in the folder of the task files

The last line of its output is JSON: ``unknown``, names that the harness does not have, and
``broken``, why a task could not be loaded, by name. A task is loaded with its data, which the
harness then has in its cache. Imports nothing of ours.
"""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

LONGEST = 300


def probe(names: list[str], include: str | None) -> dict[str, Any]:
    """What is wrong with these tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    unknown = [name for name in names if not manager.match_tasks([name])]
    broken: dict[str, str] = {}
    for name in names:
        if name in unknown:
            continue
        try:
            manager.load(manager.match_tasks([name]))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            broken[name] = f"{type(error).__name__}: {lines[0]}"[:LONGEST]
    own = sorted({n for n in manager.all_tasks if _is_below(manager.task_index[n].yaml_path)})
    return {"unknown": unknown, "broken": broken, "included": own[:20] if include else []}


def _is_below(path: Path | None) -> bool:
    """Whether a task's file is in this folder."""
    return path is not None and Path(path).absolute().is_relative_to(Path.cwd())


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        included = "." if any(Path().rglob("*.yaml")) else None
        found = probe(sys.argv[1:], included)
    print(json.dumps(found))
