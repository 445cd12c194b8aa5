"""A run file without a fault, which hostile cases change in one place."""

from typing import Any

from tests.support.end_to_end import TEACHER

SOUND: dict[str, Any] = {
    "teacher": {"model": str(TEACHER), "sampling": {"max_tokens": 8}},
    "student": {"layers": [1]},
    "prompts": {"path": "prompts.jsonl"},
    "training": {"rows_per_step": 4},
    "stream": {"group_rows": 2},
}
