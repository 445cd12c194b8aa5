"""Checks for prompts that ask for JSON such as {"answer": 42}: an example for evaluation.checks.

Each function is called with the prompt, an answer and the fields of the prompt's row, and returns
true, false or a number. See docs/checks.md; the prompts are in sums.jsonl beside this file.
"""

import json
from typing import Any


def is_json(prompt: str, answer: str, row: dict[str, Any]) -> bool:
    """Whether the answer is one JSON object and nothing else."""
    return isinstance(parsed(answer), dict)


def is_right(prompt: str, answer: str, row: dict[str, Any]) -> bool:
    """Whether the object's ``answer`` is what the row expects."""
    value = parsed(answer)
    return isinstance(value, dict) and value.get("answer") == row["expected"]


def names_the_result(prompt: str, answer: str, row: dict[str, Any]) -> bool:
    """Whether the expected number is anywhere in the answer: a weaker wish."""
    return str(row["expected"]) in answer


def length_words(prompt: str, answer: str, row: dict[str, Any]) -> float:
    """Words of the answer: a check may be any number."""
    return len(answer.split())


def parsed(answer: str) -> Any:
    """The answer as JSON; None where it is none."""
    try:
        return json.loads(answer)
    except ValueError:
        return None
